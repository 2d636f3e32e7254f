"""Spec + topology -> everything that will happen, decided before a GPU is taken or a weight is read.

A plan is a frozen value. No later stage re-derives or corrects what it says; `run` writes it to plan.json.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from dist_finetune.batch_plan import BatchPlan, micro_batch_tokens, plan_batches, rows_per_rank, steps_per_epoch
from dist_finetune.cache.decide import CacheDecision, decide_cache
from dist_finetune.combinations import possible_strategies, refuse_impossible, refuse_layer_drop
from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.deepspeed_settings import deepspeed_settings, zero_section
from dist_finetune.errors import UserError
from dist_finetune.features.bare import refuse_idle_settings, without_training
from dist_finetune.freeze import Manifest
from dist_finetune.fsdp_layout import FrozenLayout, fsdp_section
from dist_finetune.memory.activations import fake_inputs
from dist_finetune.memory.choice import USABLE_SHARE, Limits, RankMemory, choose_strategy
from dist_finetune.memory.costs import Costs, PassRequest, plan_costs
from dist_finetune.memory.demand import Way
from dist_finetune.memory.state import FP32_BYTES
from dist_finetune.models.card import ModelCard
from dist_finetune.models.dropout import has_dropout
from dist_finetune.models.image_size import refuse_image_size
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.order import structure_for
from dist_finetune.models.sources import build_model, describe_model, for_task
from dist_finetune.models.structure import Part, Structure
from dist_finetune.models.unread import can_skip_unread, skip_unread
from dist_finetune.one_row import refuse_one_value_a_channel
from dist_finetune.phases import PhasePlan, plan_phases
from dist_finetune.spec import FreezeSpec, Spec, Strategy
from dist_finetune.tasks.names import TaskName, require_metric
from dist_finetune.topology import Topology, local_topology

MAX_TOKENS = 512  # default limit of max_length: what BERT's positions allow
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class DataPlan:
    num_rows: dict[str, int]
    classes: tuple[str, ...]
    modality: Literal["text", "image"]
    columns: tuple[str, ...]
    label: tuple[str, ...]
    fingerprint: str
    max_length: int | None
    image_size: tuple[int, int] | None
    num_workers: int
    task: TaskName = "classification"


@dataclass(frozen=True)
class Plan:
    """All decisions of a run."""

    spec: Spec
    topology: Topology
    card: ModelCard
    data: DataPlan
    structure: Structure
    phases: tuple[PhasePlan, ...]
    batches: BatchPlan
    precision: Literal["fp32", "bf16", "fp16"]
    strategy: Strategy
    strategy_reason: str
    costs: Costs
    deepspeed: tuple[dict[str, Any] | None, ...]
    """The config of each phase's engine; None for a strategy without DeepSpeed."""
    cache: tuple[CacheDecision, ...]
    """Of each phase."""
    skips_unread: bool
    """True where the last block computes the first token alone, as the head reads no other."""

    @property
    def memory(self) -> dict[Strategy, RankMemory]:
        """What a rank needs under each strategy."""
        return self.costs.memory

    @property
    def misfit(self) -> str | None:
        """Why the run would not fit into a GPU and what to do; None where it fits or no limit is known."""
        mine, limit = self.memory[self.strategy], self.topology.device_memory_bytes
        if limit is None or mine.fits is not False:
            return None
        least = min(self.memory, key=lambda strategy: self.memory[strategy].needed)
        ways = ["freeze more"]
        if mine.micro_batch_size > 1 and mine.total < USABLE_SHARE * limit:  # else state alone is too large
            ways.append("a smaller train.micro_batch_size")
        if least != self.strategy:
            ways.append(f"shard.strategy: {least} ({self.memory[least].needed / 2**30:.1f} GiB)")
        offloaded = self.costs.offloaded
        if offloaded and offloaded.fits and not self.memory[least].fits:
            ways.append(f"shard: {{strategy: zero3, offload: parameters}} ({offloaded.needed / 2**30:.1f} GiB)")
        shares = self.strategy != "ddp" or (self.spec.shard.strategy == "auto" and len(self.memory) > 1)
        if shares and (self.topology.world_size == 1 or self.strategy == least):
            ways.append("more GPUs")
        return (
            f"{self.strategy} needs {mine.needed / 2**30:.1f} GiB a GPU"
            + (f" at {mine.micro_batch_size} rows" if mine.peak is not None else " before any activation")
            + f", and of a GPU's {limit / 2**30:.1f} GiB {USABLE_SHARE * limit / 2**30:.1f} are usable: "
            + ", or ".join(ways)
        )

    @property
    def is_larger_than_device(self) -> bool:
        """True where a device could not hold the whole model, which zero3 and fsdp never ask of it."""
        limit = self.topology.device_memory_bytes
        return limit is not None and self.structure.num_params * FP32_BYTES > limit

    @property
    def precision_reason(self) -> str:
        """Why the precision is what it is."""
        if self.spec.train.precision != "auto":
            return "asked for"
        if not self.topology.is_seen:
            return "auto: taken to be there; a V100 or T4 has none, and a run there takes fp32"
        if self.topology.device == "cuda":
            return "auto: this GPU has it" if self.precision == "bf16" else "auto: this GPU has no bf16"
        if self.topology.has_amx:
            return "auto: a CPU rounds nothing unasked; it has AMX, so train.precision=bf16 would be much faster"
        return "auto: this CPU has no AMX, which bf16 would gain from"

    @property
    def widest(self) -> PhasePlan:
        """The phase that trains most."""
        return max(self.phases, key=lambda phase: phase.manifest.num_trainable)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases; a phase with `until` may end sooner."""
        return sum(phase.num_steps for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, without the tensor-by-tensor manifests, which freeze.json holds."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "structure"}
        out["spec"] = self.spec.model_dump(mode="json", by_alias=True)
        out["memory"] = self.memory
        out["costs"] = {f.name: getattr(self.costs, f.name) for f in dataclasses.fields(Costs) if f.name != "memory"}
        out["total_steps"] = self.total_steps
        out["precision_reason"], out["misfit"] = self.precision_reason, self.misfit
        out["parts"] = [
            {"part": p.label, "modules": p.modules, "num_params": p.num_params, "phases": self._phases_of(p)}
            for p in self.structure.parts
        ]
        result: dict[str, Any] = json.loads(json.dumps(out, default=_jsonable))
        return result

    def _phases_of(self, part: Part) -> dict[str, dict[str, Any]]:
        """By phase, how many elements of a part are frozen, and the rates at which the others train."""
        found = {}
        for phase in self.phases:
            sizes = {r.name: r.num_elements for r in phase.manifest.records if r.frozen and r.kind == "parameter"}
            rates = {group.lr for group in phase.groups if not set(group.names).isdisjoint(part.parameters)}
            found[phase.name] = {"num_frozen": sum(sizes.get(n, 0) for n in part.parameters), "lr": sorted(rates)}
        return found

    def digest(self) -> str:
        """Short hash of every decision; ranks compare it before they start."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _jsonable(value: Any) -> Any:
    if isinstance(value, Manifest):
        counts = {"num_frozen": value.num_frozen, "num_trainable": value.num_trainable}
        return {"digest": value.digest, "mode": value.mode, **counts, "rules": value.rules}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{type(value)} has no JSON form")


def make_plan(spec: Spec, topology: Topology | None = None) -> Plan:
    """The plan of `spec` on `topology` (one process on this machine's device when left out). Reads data, no weights.

    Raises UserError for anything wrong with the user's input.
    """
    tables = read_tables(spec.data, spec.train.seed, task=spec.label_task)
    return plan_run(spec, topology or local_topology(), tables, measure=True)


def for_planning(spec: Spec, world_size: int) -> Spec:
    """The spec whose plan tells what a run of `spec` needs. Extracting features is planned as training the head alone
    under ddp, which holds the model just so.

    Raises UserError where measuring comes first.
    """
    if spec.strategy == "auto":
        raise UserError(
            "strategy: auto is decided by measuring: run `dist-finetune advise` on this config, then plan the "
            "advice.yaml that it writes"
        )
    if spec.task == "features":
        refuse_idle_settings(spec)
        return without_training(spec, world_size).model_copy(update={"freeze": FreezeSpec(rule="backbone")})
    return spec


def plan_run(spec: Spec, topology: Topology, tables: Tables, measure: bool | None = None) -> Plan:
    """As `make_plan`, for data that is already read. `measure` says whether to run the model without data, for
    activations and a forecast; left out, only where they decide something: on a device whose memory is known."""
    compare = bool(measure)
    measure = topology.device_memory_bytes is not None if measure is None else measure
    card = describe_model(spec.model, spec.data.image_size)
    data = _plan_data(spec, topology, tables, card)
    card = for_task(card, data.task)
    require_metric(spec.checkpoint.best, data.task)
    with on_meta():
        model = build_model(card, spec.model, data.classes)
    if spec.data.image_size:
        refuse_image_size(model, card, spec.model, data.classes)
    if spec.model.dropout and not has_dropout(model, spec.model.dropout):
        raise UserError(f"model.dropout: {spec.model.dropout:g} has no effect: {card.name} has no dropout; remove it")
    structure = structure_for(model, card)
    share = rows_per_rank(spec, topology)
    phases = plan_phases(spec, structure, model, steps_per_epoch(spec, data.num_rows["train"]), card.default_lr)
    precision = _plan_precision(spec, topology)
    refuse_impossible(spec, topology, precision, structure, phases)
    trains = spec.task != "features"  # in which nothing is in training mode, and every token is read
    if trains:
        refuse_layer_drop(spec, model, topology.world_size, phases)
    skips_unread = trains and spec.train.skip_unread and can_skip_unread(model)
    if skips_unread:
        skip_unread(model)
    strategies = possible_strategies(spec, STRATEGIES, phases)
    limits = Limits(topology.world_size, topology.device, topology.device_memory_bytes, share)
    costs = plan_costs(
        model,
        structure,
        phases,
        [way for strategy in strategies for way in _ways(spec, strategy, topology.world_size)],
        limits,
        spec.train.micro_batch_size,
        precision != "fp32",
        PassRequest(
            fake_inputs(card, data.max_length, data.image_size),
            spec.train.gradient_checkpointing,
            compare,
            data.task,
        )
        if measure
        else None,
        spec.checkpoint.full,
        _offload(spec, topology, strategies),
    )
    strategy, reason = choose_strategy(spec.shard.strategy, costs.memory, limits)
    batches = plan_batches(spec, data, limits, costs.memory[strategy])
    if trains:
        refuse_one_value_a_channel(
            model,
            fake_inputs(card, data.max_length, data.image_size),
            phases,
            data.num_rows["train"],
            batches.global_batch_size,
            batches.micro_batch_size,
            topology.world_size,
            topology.device,
        )
    deepspeed = tuple(deepspeed_settings(spec, strategy, batches, precision, phase.manifest) for phase in phases)
    cache = tuple(
        decide_cache(spec, phase.manifest, structure, phase.num_steps / batches.steps_per_epoch) for phase in phases
    )
    return Plan(
        spec=spec,
        topology=topology,
        card=card,
        data=data,
        structure=structure,
        phases=phases,
        batches=batches,
        precision=precision,
        strategy=strategy,
        strategy_reason=reason,
        costs=costs,
        deepspeed=deepspeed,
        cache=cache,
        skips_unread=skips_unread,
    )


def with_micro_batch(plan: Plan, tables: Tables, rows: int) -> Plan:
    """The plan with fewer rows in a micro-batch, which divide its own. The strategy stays as chosen: one that takes
    more memory, and by the numbers would do with these rows, is not the one that was tried with them."""
    spec = plan.spec
    train = spec.train.model_copy(update={"micro_batch_size": rows})
    shard = spec.shard.model_copy(update={"strategy": plan.strategy})
    again = plan_run(spec.model_copy(update={"train": train, "shard": shard}), plan.topology, tables)
    tokens = micro_batch_tokens(spec, plan.data, rows, again.batches.gradient_accumulation_steps)
    batches = replace(again.batches, micro_batch_tokens=tokens)
    return replace(again, spec=spec, strategy_reason=plan.strategy_reason, batches=batches)


def _ways(spec: Spec, strategy: Strategy, world_size: int) -> list[Way]:
    """How a strategy may lay out a phase; under fsdp, frozen weights may lie in two ways."""
    if strategy != "fsdp":
        return [Way(strategy, lambda manifest: zero_section(spec, strategy, manifest))]
    frozen: tuple[FrozenLayout, ...] = ("replicate", "shard") if spec.shard.frozen == "auto" else (spec.shard.frozen,)
    offload = spec.shard.offload == "parameters"

    def section(manifest: Manifest, way: FrozenLayout) -> dict[str, Any]:
        return fsdp_section(manifest, world_size, way, offload)

    return [Way(strategy, partial(section, way=way), way) for way in frozen]


def _offload(spec: Spec, topology: Topology, strategies: Sequence[Strategy]) -> Way | None:
    """zero3 with all that can be in host memory, where that is a choice which the run does not make."""
    if spec.shard.offload != "none" or topology.device == "cpu" or "zero3" not in strategies:
        return None
    shard = spec.shard.model_copy(update={"offload": "parameters"})
    return Way("zero3", partial(zero_section, spec.model_copy(update={"shard": shard}), "zero3"))


def _plan_data(spec: Spec, topology: Topology, tables: Tables, card: ModelCard) -> DataPlan:
    if tables.modality != card.modality:
        raise UserError(
            f"model.name: {spec.model.name} reads {card.modality}, but data.train has {tables.modality} rows; "
            f"choose a model for {tables.modality} or other data"
        )
    splits = {"train": tables.train, "validation": tables.validation, "test": tables.test}
    is_text = card.modality == "text"
    if is_text and (spec.data.image_size or spec.data.augment):
        raise UserError("data.image_size and data.augment have no effect on text; remove them")
    if not is_text and spec.data.max_length:
        raise UserError("data.max_length has no effect on images; remove it")
    limit = card.max_length or MAX_TOKENS
    if is_text and spec.data.max_length and spec.data.max_length > limit:
        raise UserError(f"data.max_length: {spec.data.max_length} is more than the {limit} tokens {card.name} can read")
    default_workers = 0 if is_text or topology.device == "cpu" else 8
    return DataPlan(
        {name: len(rows) for name, rows in splits.items() if rows is not None},
        tables.classes,
        tables.modality,
        tables.columns.inputs,
        tables.columns.label,
        tables.fingerprint,
        spec.data.max_length or min(limit, MAX_TOKENS) if is_text else None,
        card.image.size if card.image else None,
        default_workers if spec.data.num_workers is None else spec.data.num_workers,
        tables.task,
    )


def _plan_precision(spec: Spec, topology: Topology) -> Literal["fp32", "bf16", "fp16"]:
    wanted = spec.train.precision
    if wanted == "auto":
        return "bf16" if topology.device == "cuda" and topology.supports_bf16 else "fp32"
    if wanted == "bf16" and not topology.supports_bf16:
        raise UserError("train.precision: this GPU has no bf16; use fp16 or fp32")
    return wanted
