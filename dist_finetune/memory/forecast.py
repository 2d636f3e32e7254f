"""What a freeze gains in compute: floating point operations of a step, with and without it."""

from dataclasses import dataclass

from dist_finetune.freeze import Manifest
from dist_finetune.lint import first_trainable_part
from dist_finetune.memory.activations import Pass
from dist_finetune.models.structure import Structure


@dataclass(frozen=True)
class Forecast:
    """Floating point operations for one sample in a training step, and what they say about time.

    With F for the forward pass, a whole backward pass takes 2F: half for the gradients of inputs, half for those of
    weights. Attention, norms and data loading are not in proportion, so that the real gain is mostly smaller.
    """

    forward_flops: int
    frozen_prefix_share: float
    """Part p of the forward pass that runs before anything trains: it has no backward pass."""
    unfrozen_flops: int
    """3F: everything trains."""
    frozen_flops: int
    """F + 2F(1-p), and less where frozen tensors above the first trainable one need no gradient of their own."""
    cached_flops: int
    """The same with the results of the frozen prefix at hand: 3F(1-p)."""
    speedup: float
    """Of the freeze over the unfrozen run."""
    speedup_cached: float
    """Of the freeze with a cached prefix over the unfrozen run."""


def forecast(measured: Pass, manifest: Manifest, structure: Structure) -> Forecast:
    """The forecast for a freeze, from a pass of the same model."""
    first = first_trainable_part(manifest, structure)
    start = 0 if first.kind == "other" else structure.parts.index(first)
    trainable = set(manifest.trainable)
    sizes = {record.name: record.num_elements for record in manifest.records}
    total, prefix, backward = measured.forward_flops, 0, 0.0
    backward += 2 * measured.flops_by_part.get("", 0)
    for index, part in enumerate(structure.parts):
        flops = measured.flops_by_part.get(part.label, 0)
        if index < start and part.kind != "other":
            prefix += flops
            continue
        # a tied tensor is listed under its first name only
        all_elements = sum(sizes.get(name, 0) for name in part.parameters)
        own = sum(sizes[name] for name in part.parameters if name in trainable)
        backward += flops * (1 + (own / all_elements if all_elements else 1.0))
    if not total:  # nothing that is counted: lookups and element-wise operations only
        return Forecast(0, 0.0, 0, 0, 0, 1.0, 1.0)
    rows, frozen = measured.micro_batch_size, total + backward
    cached = frozen - prefix
    return Forecast(
        total // rows,
        prefix / total,
        3 * total // rows,
        round(frozen / rows),
        round(cached / rows),
        3 * total / frozen,
        3 * total / cached if cached else float("inf"),
    )


def num_passed_by_backward(manifest: Manifest, structure: Structure) -> int:
    """Elements of the weights, trained or not, that the backward pass goes through."""
    first = first_trainable_part(manifest, structure)
    if first.kind == "other":
        return structure.num_params
    return sum(part.num_params for part in structure.parts[structure.parts.index(first) :])
