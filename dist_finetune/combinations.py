"""Settings that can't go together, each with the reason and what would work. Checked before a GPU is taken."""

import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from dist_finetune.errors import UserError
from dist_finetune.models.dropout import layer_drops
from dist_finetune.models.structure import Structure
from dist_finetune.phases import PhasePlan
from dist_finetune.spec import Spec, Strategy

if TYPE_CHECKING:
    from dist_finetune.topology import Topology


def possible_strategies(
    spec: Spec, strategies: Sequence[Strategy], phases: Sequence[PhasePlan]
) -> tuple[Strategy, ...]:
    """Those of `strategies` that can do what the spec asks for, in their order.

    Raises UserError where the one that it names, or any at all, can't.
    """
    problems = {s: list(_strategy_problems(spec, s, phases)) for s in strategies}
    asked = spec.shard.strategy
    if asked != "auto" and problems[asked]:
        raise UserError(_listed(problems[asked]))
    possible = tuple(s for s in strategies if not problems[s])
    if not possible:
        raise UserError(_listed([found[0] for found in problems.values()]))
    return possible


def refuse_impossible(
    spec: Spec, topology: "Topology", precision: str, structure: Structure, phases: Sequence[PhasePlan]
) -> None:
    """Raises UserError that names every setting which can't work, or does nothing, whatever the strategy."""
    problems = list(_problems(spec, topology, precision, structure, phases))
    if problems:
        raise UserError(_listed(problems))


def refuse_layer_drop(spec: Spec, model: nn.Module, world_size: int, phases: Sequence[PhasePlan]) -> None:
    """Raises UserError where processes would leave out layers of their own: each waits for gradients, or weights, of
    what another one does not run."""
    if world_size == 1:
        return
    held = [set(phase.manifest.held_modules if phase.manifest.mode == "eval" else ()) for phase in phases]
    for path, name, rate in layer_drops(model):
        above = {path, *(path[:i] for i, letter in enumerate(path) if letter == ".")}
        if not all(above & modules for modules in held):
            raise UserError(
                f"model.name: {spec.model.name} leaves out layers at random ({f'{path}.{name}'.lstrip('.')} is "
                f"{rate:g}), each of {world_size} processes others, so that they can't train together. Set "
                "model.dropout: 0.0, make it 0 in a copy of the model's config.json, or use one process"
            )


def _problems(
    spec: Spec, topology: "Topology", precision: str, structure: Structure, phases: Sequence[PhasePlan]
) -> Iterator[str]:
    freezes = any(phase.manifest.frozen for phase in phases)
    rounded = any(phase.frozen_dtype == "bf16" for phase in phases)
    if spec.shard.frozen != "auto" and not freezes:
        yield f"shard.frozen: {spec.shard.frozen} has no effect: nothing is frozen; remove it"
    always = {"replicate": ("ddp", "zero1", "zero2"), "shard": ("zero3",)}.get(spec.shard.frozen, ())
    if spec.shard.strategy in always:
        yield (
            f"shard.frozen: {spec.shard.frozen} has no effect, {spec.shard.strategy} always does so; remove it, or "
            "choose fsdp, which can do both"
        )
    if rounded and not freezes:
        yield "freeze.dtype: bf16 has no effect: nothing is frozen; remove it"
    elif rounded and precision != "bf16":
        yield (
            f"freeze.dtype: bf16 needs train.precision: bf16 (it is {precision}): a matrix product takes both sides in "
            "one type"
        )
    if rounded and spec.checkpoint.full:
        yield "checkpoint.full would store the rounded weights of freeze.dtype: bf16; leave one of them out"
    statistics = [r.name for p in phases for r in p.manifest.records if r.kind == "buffer" and not r.frozen]
    if spec.train.max_skipped and any("running_" in name for name in statistics):
        yield (
            "train.max_skipped can't work with BatchNorm that trains: the batch of a step that is left out has already "
            "moved its statistics; freeze the norms, or leave it out"
        )
    for name in ("gradient_checkpointing", "compile"):
        if getattr(spec.train, name) and not structure.blocks:
            yield f"train.{name} works block by block, and no blocks were found in this model; remove it"
    if spec.train.compile and topology.is_seen and not has_compiler(topology.device):
        language = "C++ compiler (g++)" if topology.device == "cpu" else "C compiler (gcc)"
        yield f"train.compile needs a {language}, and there is none; install one or leave it out"


def _strategy_problems(spec: Spec, strategy: Strategy, phases: Sequence[PhasePlan]) -> Iterator[str]:
    offload, frozen = spec.shard.offload, spec.shard.frozen
    if offload != "none" and strategy == "ddp":
        yield (
            f"shard.offload: {offload} can't work with ddp, whose ranks update whole weights; use zero1 to zero3 or "
            "fsdp"
        )
    if offload == "optimizer" and strategy == "fsdp":
        yield (
            "shard.offload: optimizer can't work with fsdp, where a weight and its optimizer state lie together; "
            "use shard.offload: parameters, or zero1 to zero3"
        )
    if offload == "parameters" and strategy in ("zero1", "zero2"):
        yield (
            f"shard.offload: parameters can't work with {strategy}, whose ranks hold whole weights; use zero3 or "
            "fsdp, or shard.offload: optimizer"
        )
    if frozen == "shard" and strategy in ("ddp", "zero1", "zero2"):
        yield f"shard.frozen: shard can't work with {strategy}, whose ranks hold whole weights; use fsdp or zero3"
    if frozen == "replicate" and strategy == "zero3":
        yield "shard.frozen: replicate can't work with zero3, which cuts every weight; use fsdp, zero2 or ddp"
    if spec.train.compile and strategy == "zero3":
        yield (
            "train.compile can't work with zero3, whose hooks fetch weights inside the blocks; use fsdp, "
            "zero1, zero2 or ddp"
        )
    if strategy == "fsdp":
        scalars = {
            r.name for p in phases for r in p.manifest.records if not r.frozen and not r.shape and r.kind == "parameter"
        }
        if scalars:
            yield (
                f"fsdp can't share out {min(scalars)}, a single number that trains; freeze it, or use zero1 to zero3"
            )


def has_compiler(device: str) -> bool:
    """Whether torch.compile finds a compiler: for code of the CPU, or for what Triton starts a GPU's kernels by."""
    cpu, gpu = ("CXX", "g++", "clang++", "c++"), ("CC", "gcc", "clang")
    variable, *usual = cpu if device == "cpu" else gpu
    return any(shutil.which(name) for name in (os.environ.get(variable, ""), *usual) if name)


def _listed(problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    return (
        unique[0] if len(unique) == 1 else "\n".join(["settings that can't go together:", *(f"  {p}" for p in unique)])
    )
