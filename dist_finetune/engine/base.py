"""What the stages need of a sharded model, whatever the strategy."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dist_finetune.engine.precision import LossScale

Inputs = dict[str, torch.Tensor] | torch.Tensor
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names for its running means of gradients and of their squares


@dataclass(frozen=True)
class Held:
    """What one rank's engine holds for training, in elements. Partitions are summed over ranks, replicas are not."""

    parameters: list[torch.Tensor]
    optimizer: int
    gradients: int
    padding: float


@dataclass(frozen=True)
class Fragment:
    """The part of one trainable parameter that this rank updates: live one-dimensional views, `offset` elements into
    the flattened parameter. Writing into them changes the engine's state."""

    name: str
    offset: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


class Predictor(Protocol):
    """A model that predicts."""

    @property
    def module(self) -> nn.Module:
        """The model itself, without wrappers."""
        ...

    def predict(self, inputs: Inputs) -> torch.Tensor:
        """Logits (B, num_classes) in fp32 without gradients. Collective where weights are sharded."""
        ...


class Engine(Predictor, Protocol):
    """A model that steps."""

    is_partitioned: bool
    """True where each rank updates a share of every parameter group, False where all ranks hold all of it."""
    loss_scale: LossScale
    """The factor on fp16 losses, 1 at other precisions; it is part of a run's state."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer; setting `lr` in them takes effect at the next step."""
        ...

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        """Logits (B, num_classes) in fp32 with gradients; `is_last` marks the step's last micro-batch."""
        ...

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Adds the gradients of a scalar `loss`; reduces them over ranks at the step's last micro-batch or before."""
        ...

    def step(self) -> torch.Tensor | float:
        """Clips, updates and clears the gradients; returns their global norm before clipping."""
        ...

    def gathered(self, tensor: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
        """Gives the tensor whole, on every rank, to read within the context. Collective where weights are sharded."""
        ...

    def held(self) -> Held:
        """What this rank's optimizer and gradient partitions hold."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of weights and Adam moments; over all ranks every element (once, where partitioned)."""
        ...

    def adam_steps(self) -> dict[str, int]:
        """Updates that each trainable parameter has had, by name."""
        ...

    def set_adam_steps(self, steps: Mapping[str, int]) -> None:
        """Sets them, as Adam's bias correction needs after a resume. Parameters of one group have the same count."""
        ...

    def rehearse(self, inputs: Inputs) -> None:
        """Brings the engine into the state that it keeps from its second step on. Changes no weight. Collective."""
        ...

    def close(self) -> None:
        """Frees what the engine holds, the module too: a phase or a reopened model that comes next needs the room."""
        ...


def collect() -> None:
    """Frees what nothing but itself refers to, as engines do whose hooks refer to them, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def adam_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's state of a tensor, made as Adam would make it where no step has been taken yet."""
    state: dict[str, torch.Tensor] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state
