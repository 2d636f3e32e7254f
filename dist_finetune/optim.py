"""Parameter groups of what trains, AdamW over exactly those, and the learning rate as a function of the step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.freeze import Manifest
from dist_finetune.freeze_rules import match_names, no_match
from dist_finetune.models.structure import Part, Structure
from dist_finetune.spec import TrainSpec


@dataclass(frozen=True)
class GroupPlan:
    """Parameters that share a peak learning rate, a weight decay and a count of updates."""

    lr: float
    weight_decay: float
    since_phase: int
    """Index of the phase since which they train without a break: ZeRO keeps one Adam step count a group."""
    names: tuple[str, ...]
    num_params: int


def plan_groups(
    manifest: Manifest, structure: Structure, train: TrainSpec, lr: float, since_phase: Mapping[str, int]
) -> tuple[GroupPlan, ...]:
    """The groups of every trainable parameter, none empty, ordered by first appearance in the model.

    Biases and one-dimensional parameters (norm scales) have no weight decay, as in the BERT paper. `head_lr` is the
    rate of the head; `layer_decay` (ULMFiT's discriminative rates, Howard & Ruder 2018) counts depth on the full model,
    so that freezing more changes no rate; `pattern_lr` wins over both.

    Raises UserError as `pattern_rates` does.
    """
    stated = pattern_rates(train.pattern_lr, [r.name for r in manifest.records if r.kind == "parameter"])
    shapes = {r.name: r for r in manifest.records if r.kind == "parameter" and not r.frozen}
    groups: dict[tuple[float, float, int], list[str]] = {}
    for name in manifest.trainable:
        part = structure.part_of(name)
        weight_decay = train.weight_decay if len(shapes[name].shape) > 1 else 0.0
        rate = stated.get(name) or lr_of_part(part, structure.depth, train, lr)
        key = (rate, weight_decay, since_phase[name])
        groups.setdefault(key, []).append(name)
    return tuple(
        GroupPlan(*key, tuple(names), sum(shapes[n].num_elements for n in names)) for key, names in groups.items()
    )


def pattern_rates(patterns: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The peak learning rate of each of a model's parameters that a pattern takes, frozen or not.

    Raises UserError that lists the patterns that take nothing, with the nearest names, and those that take the same.
    """
    taken_by: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        taken = match_names(pattern, names)
        if not taken:
            problems.append(no_match("train.pattern_lr", pattern, names))
        if both := next((name for name in taken if name in taken_by), None):
            problems.append(
                f"train.pattern_lr: {taken_by[both]!r} and {pattern!r} both take {both}; let only one of them take it"
            )
        taken_by |= dict.fromkeys(taken, pattern)
    if problems:
        raise UserError("\n".join(problems))
    return {name: patterns[pattern] for name, pattern in taken_by.items()}


def lr_of_part(part: Part, depth: int, train: TrainSpec, lr: float) -> float:
    """Peak learning rate of a part of the model."""
    if part.kind == "head":
        return train.head_lr or lr
    if train.layer_decay is None:
        return lr
    distance = {"embeddings": depth + 1, "block": depth - (part.index or 0)}.get(part.kind, 0)
    return lr * train.layer_decay**distance


def build_optimizer(model: nn.Module, groups: Sequence[GroupPlan]) -> torch.optim.AdamW:
    """AdamW over exactly the planned parameters; the fused kernel where all of them are floating point on one device.

    Raises TrainingError unless the model's trainable parameters are exactly the planned ones: the contract between
    freezing and the optimizer.
    """
    named = dict(model.named_parameters())
    planned = {name for group in groups for name in group.names}
    actual = {name for name, p in named.items() if p.requires_grad}
    if planned != actual:
        raise TrainingError(
            "the optimizer would not hold exactly the planned parameters: "
            f"planned but frozen {sorted(planned - actual)[:5]}, "
            f"trainable but not planned {sorted(actual - planned)[:5]}"
        )
    return torch.optim.AdamW(
        [
            {"params": [named[n] for n in g.names], "lr": g.lr, "weight_decay": g.weight_decay, "peak_lr": g.lr}
            for g in groups
        ],
        fused=True,
    )


def lr_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0); the same at every world size."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(param_groups: Sequence[dict[str, Any]], factor: float) -> float:
    """Sets every group to `factor` of its peak rate; returns the highest rate, the one that is logged."""
    for group in param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in param_groups)
