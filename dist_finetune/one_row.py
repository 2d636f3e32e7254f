"""BatchNorm that trains needs two values for each channel; a micro-batch of one row may leave it one."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_finetune.data.batches import deal
from dist_finetune.errors import UserError
from dist_finetune.freeze import train_mode
from dist_finetune.models.sources import forward_logits
from dist_finetune.phases import PhasePlan

MOST_MORE = 64
"""How much larger a global batch than the user's is looked at."""


def refuse_one_value_a_channel(
    model: nn.Module,
    inputs: Callable[[int], Any],
    phases: Sequence[PhasePlan],
    num_rows: int,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    device: Literal["cpu", "cuda"],
) -> None:
    """Raises UserError where a step of some phase would have one row alone at a BatchNorm that trains and sees one
    value for each channel then. `model` lies on the meta device, and `inputs(rows)` are what it takes.

    On several GPUs batches are normalised over all ranks, and so over at least two rows.
    """
    if device == "cuda" and world_size > 1:
        return
    total_steps = sum(phase.num_steps for phase in phases)
    alone = partial(_leaves_one_alone, num_rows, total_steps=total_steps, world_size=world_size)
    what = alone(global_batch_size, micro_batch_size)
    if what is None:
        return
    narrow = next(filter(None, (_one_value_norm(model, inputs, phase) for phase in phases)), None)
    if narrow is None:
        return
    share = global_batch_size // world_size
    ways = [
        f"train.micro_batch_size: {micro}"
        for micro in range(share, 1, -1)
        if share % micro == 0 and alone(global_batch_size, micro) is None
    ][:1]
    more = range(global_batch_size, global_batch_size + MOST_MORE, world_size)
    ways += [
        f"train.global_batch_size: {size} with train.micro_batch_size: {size // world_size}"
        for size in more
        if size > global_batch_size and alone(size, size // world_size) is None
    ][:1]
    raise UserError(
        f"{what}, where {narrow}, a BatchNorm that trains, would have one value for each channel and nothing to "
        f"normalise by. Use {', or '.join([*ways, 'freeze the norms (freeze.rule: norms)'])}"
    )


def _leaves_one_alone(
    num_rows: int, global_batch_size: int, micro_batch_size: int, *, total_steps: int, world_size: int
) -> str | None:
    """Which of a run's batches leave a process with a micro-batch of one row, in words; None where none does."""
    num_full, rest = divmod(num_rows, global_batch_size)
    batches = [(min(num_rows, global_batch_size), "each global batch")]
    if rest and num_full and total_steps > num_full:
        batches.append((rest, f"the last global batch of each epoch, {rest} of {num_rows} rows,"))
    for size, words in batches:
        shares = (deal(np.arange(size), rank, world_size, micro_batch_size) for rank in range(world_size))
        if any(len(micro.ids) == 1 for share in shares for micro in share):
            who = "a process" if world_size > 1 else "a micro-batch"
            return f"{words} in micro-batches of {micro_batch_size} leaves {who} one row"
    return None


def _one_value_norm(model: nn.Module, inputs: Callable[[int], Any], phase: PhasePlan) -> str | None:
    """The first BatchNorm that trains in `phase` and gets one value for each channel from one row."""
    train_mode(model, phase.manifest)
    training = {m: path for path, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
    model.eval()
    return next((training[norm] for norm in _norms_with_one_value(model, inputs) if norm in training), None)


def _norms_with_one_value(model: nn.Module, inputs: Callable[[int], Any]) -> Iterator[nn.Module]:
    found: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        if args[0].numel() == args[0].shape[1]:
            found.append(module)

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        with torch.device("meta"), torch.no_grad():
            forward_logits(model, inputs(1))
    except Exception:  # a model of the user's own may look at values, which meta tensors don't have, and raise anything
        return iter(())
    finally:
        for handle in handles:
            handle.remove()
    return iter(found)
