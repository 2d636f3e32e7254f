"""Spec + topology -> everything that will happen, decided before a GPU is taken or a weight is read.

A plan is a frozen value. No later stage re-derives or corrects what it says; `run` writes it to plan.json.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dist_finetune.cache.decide import CacheDecision, decide_cache
from dist_finetune.combinations import possible_strategies, refuse_impossible
from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.deepspeed_settings import deepspeed_settings, zero_section
from dist_finetune.errors import UserError
from dist_finetune.freeze import Manifest
from dist_finetune.fsdp_layout import FrozenLayout, fsdp_section
from dist_finetune.memory.activations import fake_inputs
from dist_finetune.memory.choice import USABLE_SHARE, Limits, RankMemory, choose_strategy, rows_in_caches
from dist_finetune.memory.costs import Costs, PassRequest, plan_costs
from dist_finetune.models.card import ModelCard
from dist_finetune.models.sources import build_model, describe_model, for_task
from dist_finetune.models.structure import Structure, structure_of
from dist_finetune.phases import PhasePlan, plan_phases
from dist_finetune.spec import Spec, Strategy
from dist_finetune.tasks.names import TaskName, require_metric

MAX_TOKENS = 512  # default limit of max_length: what BERT's positions allow
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Topology:
    """Where a run will live. `device_memory_bytes` is None where no limit is known."""

    num_nodes: int = 1
    processes_per_node: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    device_memory_bytes: int | None = None
    supports_bf16: bool = True

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.processes_per_node


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
class BatchPlan:
    """Batch arithmetic: global_batch_size = micro_batch_size x gradient_accumulation_steps x world_size."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    steps_per_epoch: int
    last_batch_size: int


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
        if mine.micro_batch_size > 1:
            ways.append("a smaller train.micro_batch_size")
        if least != self.strategy:
            ways.append(f"shard.strategy: {least} ({self.memory[least].needed / 2**30:.1f} GiB)")
        if self.topology.world_size > 1 and self.strategy == least:
            ways.append("more GPUs")
        return (
            f"{self.strategy} needs {mine.needed / 2**30:.1f} GiB a GPU"
            + (f" at {mine.micro_batch_size} rows" if mine.peak is not None else " before any activation")
            + f", and of a GPU's {limit / 2**30:.1f} GiB {USABLE_SHARE * limit / 2**30:.1f} are usable: "
            + ", or ".join(ways)
        )

    @property
    def widest(self) -> PhasePlan:
        """The phase that trains most: it decides what memory the run needs."""
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
        out["parts"] = [
            {"part": p.label, "modules": p.modules, "num_params": p.num_params} for p in self.structure.parts
        ]
        result: dict[str, Any] = json.loads(json.dumps(out, default=_jsonable))
        return result

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


def local_topology(processes: int = 1, num_nodes: int = 1) -> Topology:
    """The topology of this machine's device with so many processes on a node."""
    if not torch.cuda.is_available():
        return Topology(num_nodes, processes, "cpu")
    memory = torch.cuda.get_device_properties(0).total_memory
    return Topology(num_nodes, processes, "cuda", memory, torch.cuda.is_bf16_supported())


def plan_run(spec: Spec, topology: Topology, tables: Tables, measure: bool | None = None) -> Plan:
    """As `make_plan`, for data that is already read. `measure` says whether to run the model on fake tensors, for
    activations and a forecast; left out, only where they decide something: on a device whose memory is known."""
    compare = bool(measure)
    measure = topology.device_memory_bytes is not None if measure is None else measure
    card = describe_model(spec.model, spec.data.image_size)
    data = _plan_data(spec, topology, tables, card)
    card = for_task(card, data.task)
    require_metric(spec.checkpoint.best, data.task)
    with torch.device("meta"):
        model = build_model(card, spec.model, data.classes)
    structure = structure_of(model)
    rows_per_rank = _rows_per_rank(spec, topology)
    phases = plan_phases(spec, structure, model, _steps_per_epoch(spec, data), card.default_lr)
    precision = _plan_precision(spec, topology)
    refuse_impossible(spec, topology, precision, structure, phases)
    strategies = possible_strategies(spec, STRATEGIES, precision, phases)
    limits = Limits(topology.world_size, topology.device, topology.device_memory_bytes, rows_per_rank)
    widest = max(phases, key=lambda phase: phase.manifest.num_trainable)
    costs = plan_costs(
        model,
        structure,
        widest,
        {s: _layouts(spec, s, structure, widest.manifest, topology.world_size) for s in strategies},
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
    )
    strategy, reason = choose_strategy(spec.shard.strategy, costs.memory, limits)
    batches = _plan_batches(spec, topology, data, rows_per_rank, costs.memory[strategy].micro_batch_size)
    deepspeed = tuple(deepspeed_settings(spec, strategy, batches, precision, phase.manifest) for phase in phases)
    cache = tuple(
        decide_cache(spec, phase.manifest, structure, phase.num_steps / batches.steps_per_epoch) for phase in phases
    )
    return Plan(
        spec, topology, card, data, structure, phases, batches, precision, strategy, reason, costs, deepspeed, cache
    )


def _layouts(
    spec: Spec, strategy: Strategy, structure: Structure, manifest: Manifest, world_size: int
) -> list[dict[str, Any] | None]:
    """What a strategy's memory depends on besides sizes; for fsdp one for each way that frozen weights may lie."""
    if strategy != "fsdp":
        return [zero_section(spec, strategy, manifest)]
    ways: tuple[FrozenLayout, ...] = ("replicate", "shard") if spec.shard.frozen == "auto" else (spec.shard.frozen,)
    offload = spec.shard.offload == "parameters"
    return [fsdp_section(structure, manifest, world_size, way, offload) for way in ways]


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


def _rows_per_rank(spec: Spec, topology: Topology) -> int:
    """Rows of a global batch that each rank takes, with the micro-batch checked against them where the user set it."""
    train, world_size = spec.train, topology.world_size
    if train.global_batch_size % world_size:
        below = train.global_batch_size // world_size * world_size
        works = " or ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} can't be divided over {world_size} processes; "
            f"use {works}"
        )
    share = train.global_batch_size // world_size
    if train.micro_batch_size != "auto" and share % train.micro_batch_size:
        works = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise UserError(
            f"train.micro_batch_size: {train.micro_batch_size} does not divide the {share} samples that each of "
            f"{world_size} processes takes a step (global_batch_size {train.global_batch_size}); use one of {works}"
        )
    return share


def _steps_per_epoch(spec: Spec, data: DataPlan) -> int:
    return -(-data.num_rows["train"] // spec.train.global_batch_size)


def _plan_batches(spec: Spec, topology: Topology, data: DataPlan, rows_per_rank: int, micro: int) -> BatchPlan:
    train, steps_per_epoch = spec.train, _steps_per_epoch(spec, data)
    if train.eval_batch_size != "auto":
        eval_batch = train.eval_batch_size
    elif topology.device == "cpu" and data.image_size:
        eval_batch = rows_in_caches(data.image_size)
    else:
        eval_batch = max(64, 2 * micro)
    last = data.num_rows["train"] - (steps_per_epoch - 1) * train.global_batch_size
    return BatchPlan(train.global_batch_size, micro, rows_per_rank // micro, eval_batch, steps_per_epoch, last)


def _plan_precision(spec: Spec, topology: Topology) -> Literal["fp32", "bf16", "fp16"]:
    wanted = spec.train.precision
    if wanted == "auto":
        return "bf16" if topology.device == "cuda" and topology.supports_bf16 else "fp32"
    if wanted == "bf16" and not topology.supports_bf16:
        raise UserError("train.precision: this GPU has no bf16; use fp16 or fp32")
    return wanted
