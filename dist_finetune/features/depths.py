"""Where features are taken, and the hooks that take them: before the blocks, after each block, before the classifier.

Hooks see a model as it is: nothing is wrapped or rewritten, so any family that the structure map knows can be used.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dist_finetune.data.loading import Batch
from dist_finetune.engine.base import Inputs
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.evaluate import to_device
from dist_finetune.features.pooling import pooled
from dist_finetune.freeze_rules import block_numbers
from dist_finetune.models.sources import forward_logits
from dist_finetune.models.structure import Structure
from dist_finetune.spec_features import Pool

STEM, HEAD = "stem", "head"
STEM_WORDS = (STEM, "embeddings")


@dataclass(frozen=True)
class Depth:
    """One place to take features from; `label` is `stem`, `block 3` or `head`."""

    label: str
    index: int | None
    """Block number; None for stem and head."""

    @property
    def freeze_word(self) -> str:
        """How the config names it under `features.at`."""
        return self.label if self.index is None else str(self.index)


def find_depths(at: Sequence[str], structure: Structure, model: nn.Module) -> tuple[Depth, ...]:
    """The depths that `features.at` names, in the order the network computes them; all of them where `at` is empty.

    Raises UserError with every word that names none.
    """
    has_head = head_linear(structure, model) is not None
    every = [Depth(STEM, None)] if structure.depth else []
    every += [Depth(f"block {i}", i) for i in range(structure.depth)]
    every += [Depth(HEAD, None)] if has_head else []
    if not every:
        raise UserError("features: neither blocks nor a head are known of this model, so there is nothing to take")
    wanted: set[str] = set()
    problems: list[str] = []
    for word in (part.strip() for item in at for part in item.split(",")):
        if word in STEM_WORDS and structure.depth:
            wanted.add(STEM)
        elif word == HEAD and has_head:
            wanted.add(HEAD)
        elif not structure.depth:
            problems.append(f"{word}: this model has no numbered blocks and no linear head but {every[0].label}")
        else:
            numbers = block_numbers(word, structure.depth)
            if isinstance(numbers, str):
                near = did_you_mean(word, (*STEM_WORDS, HEAD)) if word.isalpha() else ""
                problems.append(f"{word}: {near}" if near else numbers)
            else:
                wanted |= {f"block {i}" for i in numbers}
    if problems:
        raise UserError("features.at: " + "; ".join(problems))
    return tuple(depth for depth in every if not wanted or depth.label in wanted)


def head_linear(structure: Structure, model: nn.Module) -> str | None:
    """Path of the last Linear of the model's head: what it reads is the depth `head`. None where there is none."""
    head = structure.of_kind("head")
    if head is None:
        return None
    inside = tuple(f"{path}." for path in head.modules)
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (path in head.modules or path.startswith(inside))
    ]
    return found[-1] if found else None


class _Enough(Exception):
    """Ends a forward pass once the deepest wanted depth is there."""


class Capture:
    """Hooks on a model in eval mode; `features` runs a batch and returns what they saw. Use it in a `with`."""

    def __init__(self, model: nn.Module, structure: Structure, depths: Sequence[Depth], pool: Pool) -> None:
        self._model, self._depths, self._pool = model, tuple(depths), pool
        self._seen: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._num_rows = 0
        self._hooks = ExitStack()
        self._calls: dict[str, int] = {}
        for depth in depths:
            self._hook(depth, structure)

    def features(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """float32 (B, D) on the CPU for each depth, by label; D may differ between depths."""
        with torch.inference_mode():
            found = self.run(to_device(batch["inputs"], device), len(batch["labels"]))
        return {label: features.cpu() for label, features in found.items()}

    def run(self, inputs: Inputs, num_rows: int) -> dict[str, Tensor]:
        """The same of `num_rows` inputs on the model's device, and left there."""
        self._seen, self._calls = {}, {}
        self._mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        self._num_rows = num_rows
        with suppress(_Enough):
            forward_logits(self._model, inputs)
        missing = [depth.label for depth in self._depths if depth.label not in self._seen]
        if missing:
            raise UserError(
                f"features.at: {type(self._model).__name__} did not run the modules of {', '.join(missing)}; "
                "leave these depths out"
            )
        return {depth.label: self._seen[depth.label] for depth in self._depths}

    def _hook(self, depth: Depth, structure: Structure) -> None:
        if depth.label == HEAD:
            path = head_linear(structure, self._model)
            assert path is not None
            self._before(path, depth.label)
        elif depth.label == STEM:
            self._before(structure.blocks[0].modules[0], depth.label)
        else:
            assert depth.index is not None
            self._after(depth.index, structure)

    def _before(self, path: str, label: str) -> None:
        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            # A module that several blocks run is the stem's reader at its first call only.
            if label not in self._seen:
                self._store(label, _first_tensor((*args, *kwargs.values()), label))

        module = self._model.get_submodule(path)
        self._hooks.callback(module.register_forward_pre_hook(take, with_kwargs=True).remove)

    def _after(self, index: int, structure: Structure) -> None:
        """Takes what the last module of a block gives. Blocks that share weights are passes through one module: block i
        is its call number (how many earlier blocks run it)."""
        block = structure.blocks[index]
        path = block.modules[-1]
        call = sum(other.modules == block.modules for other in structure.blocks[:index])

        def take(_: nn.Module, __: Any, output: Any) -> None:
            number = self._calls.get(block.label, 0)
            self._calls[block.label] = number + 1
            if number == call:
                self._store(block.label, _first_tensor(output, block.label))

        self._hooks.callback(self._model.get_submodule(path).register_forward_hook(take).remove)

    def _store(self, label: str, output: Tensor) -> None:
        self._seen[label] = pooled(output, self._pool, self._mask, self._num_rows, label)
        if len(self._seen) == len(self._depths):
            raise _Enough

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()


def _first_tensor(output: Any, label: str) -> Tensor:
    """The hidden states of what a module got or gave: the first floating-point tensor in it."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UserError(f"features.at: {label} works on {type(output).__name__}, not on a tensor; leave this depth out")
