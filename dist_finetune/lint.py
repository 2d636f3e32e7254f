"""What a freeze costs or forgets although it is valid, with numbers: notes for the plan, never errors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_finetune.freeze import Manifest
from dist_finetune.freeze_rules import ranges
from dist_finetune.models.structure import Part, Structure

GRADIENT_AND_ADAM_BYTES = 12  # of a parameter, fp32: a gradient and two moments, over all ranks that share them
Code = Literal[
    "first-trainable", "trains-below-frozen", "frozen-head", "batchnorm-trains", "checkpointing-without-effect"
]


@dataclass(frozen=True)
class LintNote:
    """One remark; `first-trainable` is information, the others are worth a second look."""

    code: Code
    message: str


def lint(
    manifest: Manifest, structure: Structure, model: nn.Module, gradient_checkpointing: bool = False
) -> tuple[LintNote, ...]:
    """Notes on a compiled freeze: where backward ends, parts that train below frozen ones and what freezing them would
    save, a frozen head, BatchNorm that still moves its statistics, gradient checkpointing that can't help."""
    first = first_trainable_part(manifest, structure)
    notes = [
        _first_trainable(structure, first) if manifest.frozen else None,
        _trains_below_frozen(manifest, structure),
        _frozen_head(manifest, structure),
        _batchnorm_trains(manifest, structure, model),
    ]
    if gradient_checkpointing and first.kind in ("neck", "head"):
        text = f"gradient checkpointing has no effect: no block trains, backward ends at the {first.label}"
        notes.append(LintNote("checkpointing-without-effect", text))
    return tuple(note for note in notes if note is not None)


def first_trainable_part(manifest: Manifest, structure: Structure) -> Part:
    """The first part in execution order that holds a trainable parameter: backward runs down to it and no further.

    The part `other` counts as first, since nothing is known about where it runs.
    """
    trainable = set(manifest.trainable)
    order = sorted(structure.parts, key=lambda part: part.kind != "other")
    return next(part for part in order if trainable.intersection(part.parameters))


def below(first: Part, structure: Structure) -> tuple[Part, ...]:
    """The parts that run before `first`; none are known below the part `other`."""
    return structure.parts[: structure.parts.index(first)] if first.kind != "other" else ()


def passes_frozen_matrices(manifest: Manifest, structure: Structure) -> bool:
    """True where the backward pass goes through a part with a frozen matrix: under `bias-only` and above "1,2,3"."""
    under = {part.label for part in below(first_trainable_part(manifest, structure), structure)}
    return any(
        record.frozen and record.kind == "parameter" and len(record.shape) == 2 and record.part not in under
        for record in manifest.records
    )


def _first_trainable(structure: Structure, first: Part) -> LintNote:
    prefix = below(first, structure)
    saved = sum(part.num_params for part in prefix)
    share = 100 * saved / structure.num_params
    text = f"first trainable part: {first.label}; backward ends there"
    if first.kind == "other":
        text = "parts that could not be named train (other): backward is taken to run through the whole model"
    if prefix:
        text += f", {saved:,} of {structure.num_params:,} parameters ({share:.0f} %) lie below it"
    return LintNote("first-trainable", text)


def filled_up(manifest: Manifest, structure: Structure) -> Manifest:
    """The manifest with all frozen that trains below frozen blocks; the same where nothing does."""
    under = {name for part in _under_frozen(manifest, structure)[1] for name in part.parameters}
    records = (replace(record, frozen=record.frozen or record.name in under) for record in manifest.records)
    return replace(manifest, records=tuple(records))


def _trunk(structure: Structure) -> list[Part]:
    return [part for part in structure.parts if part.kind in ("embeddings", "block") and part.parameters]


def _under_frozen(manifest: Manifest, structure: Structure) -> tuple[int, list[Part]]:
    """The place in the trunk of its last part that is all frozen, and the parts below with something that trains."""
    trainable, trunk = set(manifest.trainable), _trunk(structure)
    is_frozen = [not trainable.intersection(part.parameters) for part in trunk]
    frozen_at = [i for i, (part, frozen) in enumerate(zip(trunk, is_frozen, strict=True)) if frozen and part.num_params]
    top = frozen_at[-1] if frozen_at else 0
    return top, [part for part, frozen in zip(trunk[:top], is_frozen, strict=False) if not frozen]


def _trains_below_frozen(manifest: Manifest, structure: Structure) -> LintNote | None:
    """The classic "1,2,3" leaves block 0, and mostly the embeddings, to train underneath."""
    top, under = _under_frozen(manifest, structure)
    if not under:
        return None
    trainable, trunk = set(manifest.trainable), _trunk(structure)
    numel = {record.name: record.num_elements for record in manifest.records}
    more = sum(numel[name] for part in under for name in part.parameters if name in trainable)
    frozen_above = [part for part in trunk[trunk.index(under[0]) : top + 1] if part not in under]
    next_trainable = next((part.label for part in trunk[top:] if trainable.intersection(part.parameters)), None)
    blocks_left = structure.depth - sum(part.kind == "block" for part in trunk[: top + 1])
    other = structure.of_kind("other")
    if other and trainable.intersection(other.parameters):
        gain = ", but where backward could end then is not known: parts that could not be named train (other)"
    else:
        end = next_trainable or "the neck or head"
        gain = f" and lets backward end at {end}, after {blocks_left} of {structure.depth} blocks"
    verb, them = ("trains", "it") if len(under) == 1 else ("train", "them")
    text = (
        f"{_names(under)} {verb} below frozen {_names(frozen_above)}: backward still runs down to {under[0].label}. "
        f"Freezing {them} too ({_spec_for(trunk[: top + 1])}) takes {more:,} more parameters out of training, "
        f"{more * GRADIENT_AND_ADAM_BYTES / 2**20:,.1f} MiB of gradients and optimizer state{gain}"
    )
    return LintNote("trains-below-frozen", text)


def _frozen_head(manifest: Manifest, structure: Structure) -> LintNote | None:
    head = structure.of_kind("head")
    frozen = set(manifest.frozen).intersection(head.parameters) if head else set()
    if head is None or not frozen:
        return None
    num = sum(record.num_elements for record in manifest.records if record.name in frozen)
    text = (
        f"{num:,} of {head.num_params:,} parameters of the head are frozen; a new head that isn't trained stays random"
    )
    return LintNote("frozen-head", text)


def _batchnorm_trains(manifest: Manifest, structure: Structure, model: nn.Module) -> LintNote | None:
    frozen = set(manifest.frozen)
    held = set(manifest.held_modules) if manifest.mode == "eval" else set()
    touched = {part.label for part in structure.parts if frozen.intersection(part.parameters)}
    moving: list[str] = []
    labels: list[str] = []
    reasons: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            continue
        segments = path.split(".")
        if any(".".join(segments[:i]) in held for i in range(1, len(segments) + 1)):
            continue
        part = structure.part_of(f"{path}.running_mean".lstrip("."))
        if part.label in touched:
            moving.append(path)
            labels.append(part.label)
            owns = any(True for _ in module.parameters())
            reasons.append("their own weight or bias trains" if owns else "they have no weight that could be frozen")
    if not moving:
        return None
    reason = "freeze.mode is train" if manifest.mode == "train" else " or ".join(dict.fromkeys(reasons))
    where = ", ".join(dict.fromkeys(labels))
    text = (
        f"{len(moving)} BatchNorm layers in {where}, which are frozen in whole or in part, keep updating their running "
        f"statistics, because {reason} (first: {moving[0]})"
    )
    return LintNote("batchnorm-trains", text)


def _names(parts: Sequence[Part]) -> str:
    numbers = [part.index for part in parts if part.index is not None]
    labels = [part.label for part in parts if part.index is None]
    if numbers:
        labels.append(f"block{'s' if len(numbers) > 1 else ''} {ranges(numbers)}")
    return " and ".join(labels)


def _spec_for(parts: Sequence[Part]) -> str:
    numbers = [part.index for part in parts if part.index is not None]
    keys = ["embeddings: true"] if any(part.kind == "embeddings" for part in parts) else []
    return ", ".join([*keys, f'layers: "{ranges(numbers)}"'])
