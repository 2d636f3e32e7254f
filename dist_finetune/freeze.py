"""From a freeze section to an exact manifest: for every tensor, whether it is frozen and which rule decided.

The manifest is compiled on shapes alone, before optimizer and shards exist, and compared with the model wherever
the run depends on it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.freeze_rules import Rule, compile_rules
from dist_finetune.models.structure import Structure
from dist_finetune.spec import FreezeSpec


@dataclass(frozen=True)
class TensorRecord:
    """One parameter or saved buffer, under the first of its names."""

    name: str
    shape: tuple[int, ...]
    num_elements: int
    kind: Literal["parameter", "buffer"]
    part: str
    """`Part.label`."""
    frozen: bool
    rule: str | None
    """The rule that froze or excepted it; None where no rule names it, and for buffers."""


@dataclass(frozen=True)
class RuleReport:
    """What one rule names: tensors that two rules name count for both."""

    rule: str
    num_tensors: int
    num_params: int


@dataclass(frozen=True)
class Manifest:
    """Every parameter, then every saved buffer, in the model's order, each tensor once."""

    records: tuple[TensorRecord, ...]
    rules: tuple[RuleReport, ...]
    digest: str
    """sha256 (hex) over names, shapes and frozen flags in order: equal digests mean the same freeze."""
    held_modules: tuple[str, ...]
    """The outermost modules with nothing left to train; mode `eval` keeps them in eval mode."""
    mode: Literal["eval", "train"]

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that train."""
        return tuple(r.name for r in self.records if r.kind == "parameter" and not r.frozen)

    @cached_property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that don't."""
        return tuple(r.name for r in self.records if r.kind == "parameter" and r.frozen)

    @cached_property
    def frozen_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that must not move: those of held modules, none in mode `train`."""
        return tuple(r.name for r in self.records if r.kind == "buffer" and r.frozen)

    @cached_property
    def num_trainable(self) -> int:
        """Elements of the parameters that train."""
        return sum(r.num_elements for r in self.records if r.kind == "parameter" and not r.frozen)

    @cached_property
    def num_frozen(self) -> int:
        """Elements of the parameters that don't."""
        return sum(r.num_elements for r in self.records if r.kind == "parameter" and r.frozen)

    def without(self, names: Iterable[str]) -> "Manifest":
        """The manifest of a model that lacks some of its frozen tensors; the digest stays that of the whole freeze."""
        gone = set(names)
        kept = tuple(record for record in self.records if record.name not in gone)
        lost = {record.name for record in self.records} & gone
        held = tuple(m for m in self.held_modules if not any(name.startswith(f"{m}.") for name in lost))
        return replace(self, records=kept, held_modules=held)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists that `json.dumps` takes."""
        return {
            "digest": self.digest,
            "mode": self.mode,
            "num_trainable": self.num_trainable,
            "num_frozen": self.num_frozen,
            "held_modules": list(self.held_modules),
            "rules": [asdict(rule) for rule in self.rules],
            "tensors": [{**asdict(record), "shape": list(record.shape)} for record in self.records],
        }


def compile_freeze(spec: FreezeSpec, structure: Structure, model: nn.Module) -> Manifest:
    """The manifest that `spec` means for `model`, whose weights are not read (it may be on the meta device).

    Raises UserError with all problems at once: a rule that takes nothing, a block out of range, a tied tensor frozen
    under one name only, part of a set of shared blocks, nothing left to train.
    """
    freezing, excepting, problems = compile_rules(spec, structure, model)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    decided = _decide(freezing, excepting)
    if not problems:
        problems += _alias_conflicts(structure, decided)
        left = [name for name in tensors if not decided.get(name, ("", False))[1]]
        if not left:
            problems.append(_nothing_left(structure))
    if spec.mode == "train" and not problems and not decided:
        problems.append("mode: train has no effect: nothing is frozen. Leave it out")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"freeze: {count}\n" + "\n".join(f"  {problem}" for problem in problems))

    frozen_ids = {id(tensor) for name, tensor in tensors.items() if decided.get(name, ("", False))[1]}
    held = _held_modules(model, structure, frozen_ids)
    records = _records(model, structure, decided, held, spec.mode)
    reports = tuple(_report(rule, tensors) for rule in (*freezing, *excepting))
    return Manifest(records, reports, _digest(records), held, spec.mode)


def apply_freeze(model: nn.Module, manifest: Manifest) -> None:
    """Sets `requires_grad` of every parameter as the manifest says, and drops gradients of frozen ones.

    Raises TrainingError, before it changes anything, if names or shapes of the model aren't the manifest's.
    """
    present = {name: tuple(tensor.shape) for name, tensor, _ in _tensors(model)}
    wanted = {record.name: record.shape for record in manifest.records}
    wrong = [f"{name}: not in the model" for name in wanted if name not in present]
    wrong += [f"{name}: not in the manifest" for name in present if name not in wanted]
    wrong += [
        f"{name}: shape {list(present[name])}, planned {list(shape)}"
        for name, shape in wanted.items()
        if name in present and present[name] != shape
    ]
    if wrong:
        raise TrainingError(_differs("the model is not the one that the freeze was planned for", wrong))
    frozen = set(manifest.frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in frozen:
            parameter.grad = None  # a stale gradient would let weight decay and momentum move it


def check_frozen_flags(model: nn.Module, manifest: Manifest) -> None:
    """Raises TrainingError if any parameter's `requires_grad` is not what the manifest says, or a name differs.

    Shapes are not compared: ZeRO-3 and FSDP leave only a rank's share in place.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrong = [f"{name}: planned frozen, would train" for name in manifest.frozen if flags.get(name) is True]
    wrong += [f"{name}: planned to train, is frozen" for name in manifest.trainable if flags.get(name) is False]
    wrong += [f"{name}: not in the model" for name in (*manifest.frozen, *manifest.trainable) if name not in flags]
    known = {record.name for record in manifest.records}
    wrong += [f"{name}: not in the manifest" for name in flags if name not in known]
    if wrong:
        raise TrainingError(_differs("what is frozen is no longer what was planned", wrong))


def train_mode(model: nn.Module, manifest: Manifest) -> None:
    """Use in place of every `model.train()`: puts held modules back in eval in mode `eval`.

    Their BatchNorm then normalises by stored statistics and doesn't move them, and their dropout is off
    (pytorch/pytorch#86590).
    """
    model.train()
    if manifest.mode == "eval":
        for path in manifest.held_modules:
            model.get_submodule(path).eval()


def _decide(freezing: list[Rule], excepting: list[Rule]) -> dict[str, tuple[str, bool]]:
    """For each name that a rule takes, the rule that decides and whether it freezes. Exceptions win, then the first."""
    decided: dict[str, tuple[str, bool]] = {}
    for rule in freezing:
        for name in rule.names:
            decided.setdefault(name, (rule.label, True))
    for rule in reversed(excepting):
        decided |= {name: (rule.label, False) for name in rule.names if name in decided}
    return decided


def _alias_conflicts(structure: Structure, decided: dict[str, tuple[str, bool]]) -> list[str]:
    problems = []
    for group in structure.aliases:
        frozen = [name for name in group if decided.get(name, ("", False))[1]]
        free = [name for name in group if name not in frozen]
        if not frozen or not free:
            continue
        by = decided[free[0]][0] if free[0] in decided else None
        other_side = f"{by!r} lets it train" if by else f"no rule freezes it (part {structure.part_of(free[0]).label})"
        problems.append(
            f"{frozen[0]} and {free[0]} are one tensor: {decided[frozen[0]][0]!r} freezes it under the first name; "
            f'under the second {other_side}. Freeze it under both (patterns: ["{free[0]}"]) or let it train under both '
            f'(except: ["{frozen[0]}"])'
        )
    return problems


def _nothing_left(structure: Structure) -> str:
    has_head = any(part.kind == "head" and part.parameters for part in structure.parts)
    way_out = "`freeze: backbone` trains the head alone" if has_head else "leave a block out, or give the model a head"
    return (
        f"nothing is left to train: the rules freeze all {structure.num_params:,} parameters. {way_out}; "
        "to use the model as it is, extract features with `dist-finetune features`"
    )


def _tensors(model: nn.Module) -> Iterable[tuple[str, Any, Literal["parameter", "buffer"]]]:
    """Parameters, then buffers that a state dict saves, each tensor once. Other buffers are recomputed by the model
    itself (position numbers, rotary tables) and are no part of its state."""
    for name, parameter in model.named_parameters():
        yield name, parameter, "parameter"
    for name, buffer in model.named_buffers():
        path, _, last = name.rpartition(".")
        if last not in model.get_submodule(path)._non_persistent_buffers_set:
            yield name, buffer, "buffer"


def _records(
    model: nn.Module,
    structure: Structure,
    decided: dict[str, tuple[str, bool]],
    held: tuple[str, ...],
    mode: Literal["eval", "train"],
) -> tuple[TensorRecord, ...]:
    held_set = set(held)
    records = []
    for name, tensor, kind in _tensors(model):
        if kind == "parameter":
            rule, frozen = decided.get(name, (None, False))
        else:
            rule, frozen = None, mode == "eval" and any(path in held_set for path in _parents(name))
        part = structure.part_of(name).label
        records.append(TensorRecord(name, tuple(tensor.shape), tensor.numel(), kind, part, frozen, rule))
    return tuple(records)


def _held_modules(model: nn.Module, structure: Structure, frozen_ids: set[int]) -> tuple[str, ...]:
    """The outermost modules with parameters that are all frozen. Modules without any (dropout, BatchNorm without
    affine) follow the part they stand in, if all of that is frozen."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    num_all: dict[str, int] = {}
    num_frozen: dict[str, int] = {}
    for name, tensor in tensors.items():
        for path in _parents(name):
            num_all[path] = num_all.get(path, 0) + 1
            num_frozen[path] = num_frozen.get(path, 0) + (id(tensor) in frozen_ids)
    in_frozen_part = {
        path
        for part in structure.parts
        if part.parameters and all(id(tensors[name]) in frozen_ids for name in part.parameters)
        for path in part.modules
    }
    held: list[str] = []
    for path, _ in model.named_modules(remove_duplicate=False):
        all_frozen = num_all[path] == num_frozen[path] if path in num_all else path in in_frozen_part
        if path and all_frozen and not any(parent in held for parent in _parents(path)):
            held.append(path)
    return tuple(held)


def _parents(name: str) -> list[str]:
    """Paths of all modules that a dotted name lies in, innermost first, without the root."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _report(rule: Rule, tensors: dict[str, nn.Parameter]) -> RuleReport:
    taken = {id(tensors[name]): tensors[name].numel() for name in rule.names}
    return RuleReport(rule.label, len(taken), sum(taken.values()))


def _digest(records: Iterable[TensorRecord]) -> str:
    lines = (json.dumps([r.name, list(r.shape), r.frozen], ensure_ascii=False) for r in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _differs(what: str, wrong: list[str], limit: int = 10) -> str:
    more = f"\n  and {len(wrong) - limit} more" if len(wrong) > limit else ""
    return f"{what} ({len(wrong)} tensors):\n" + "\n".join(f"  {line}" for line in wrong[:limit]) + more
