"""Mixed precision by autocast: weights, gradients and norms stay in fp32, matrix products run in bf16 or fp16."""

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from dist_finetune.errors import TrainingError
from dist_finetune.freeze import Manifest
from dist_finetune.plan import Plan

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(plan: Plan) -> Callable[[], AbstractContextManager[Any]]:
    """What a forward pass runs in."""
    return autocast_in(plan.precision, plan.topology.device)


def autocast_in(precision: Literal["fp32", "bf16", "fp16"], device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast in a precision on a kind of device; fp32 computes in what the weights are."""
    is_mixed = precision != "fp32"
    dtype = DTYPES[precision] if is_mixed else torch.bfloat16
    return functools.partial(torch.autocast, device, dtype, enabled=is_mixed)


def bf16_of(plan: Plan) -> AbstractContextManager[Any]:
    """What passes outside an engine run in: bf16 where the run trains in it, else fp32 (also beside fp16)."""
    return autocast_in("bf16" if plan.precision == "bf16" else "fp32", plan.topology.device)()


class LossScale:
    """Scales the loss in fp16, whose smallest numbers gradients fall below. Halves after gradients that overflowed,
    whose step is left out at every rank, and doubles after `GROWTH_STEPS` good ones. 1 at other precisions, where
    `train.max_skipped` may leave out steps too.

    torch's GradScaler looks for overflow in each rank's own gradients; the global norm, which is computed anyway, says
    it on every rank alike, wherever shards lie.
    """

    def __init__(self, plan: Plan) -> None:
        self._is_on = plan.precision == "fp16"
        self._may_skip = self._is_on or plan.spec.train.max_skipped > 0
        self.scale = FIRST_SCALE if self._is_on else 1.0
        self._good_steps = 0

    @property
    def state(self) -> list[float]:
        """What a resumed run needs to go on at the same scale."""
        return [self.scale, self._good_steps]

    def restore(self, state: Sequence[float]) -> None:
        """Goes on from a saved `state`."""
        if self._is_on:
            self.scale, self._good_steps = float(state[0]), int(state[1])

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss whose gradients are taken."""
        return loss * self.scale if self._is_on else loss

    def unscale(self, grads: Sequence[torch.Tensor]) -> None:
        """Brings gradients back to their own size, in place; exact, as the scale is a power of two."""
        if self._is_on:
            for grad in grads:
                grad.mul_(1.0 / self.scale)

    def allows_step(self, norm: torch.Tensor) -> bool:
        """False, and in fp16 a smaller scale, where gradients of global norm `norm` are not finite. Waits for the
        device only where a step may be left out.

        Raises TrainingError where no scale is small enough.
        """
        if not self._may_skip:
            return True
        is_finite = bool(torch.isfinite(norm))
        if not self._is_on:
            return is_finite
        if is_finite:
            self._good_steps += 1
            if self._good_steps % GROWTH_STEPS == 0:
                self.scale *= 2.0
            return True
        self._good_steps = 0
        self.scale /= 2.0
        if self.scale < 1.0:
            raise TrainingError("train.precision: fp16 can't hold this model's gradients; use bf16 or fp32")
        return False


def round_frozen(model: nn.Module, manifest: Manifest, trained: Collection[str]) -> tuple[str, ...]:
    """Rounds frozen matrices and kernels to bf16, in place; returns their names. Norms and biases, which weigh little,
    stay in fp32, and so do those that `trained` in an earlier phase: no source has them."""
    names = set(manifest.frozen) - set(trained)
    rounded = {name: p for name, p in model.named_parameters() if name in names and p.dim() > 1}
    for parameter in rounded.values():
        parameter.data = parameter.data.bfloat16()
    return tuple(rounded)
