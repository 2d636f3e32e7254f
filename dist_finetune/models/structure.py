"""The structure map: which tensor belongs to the embeddings, to which numbered block, to the neck or to the head.

Read from the modules alone, so the model may be on the meta device; no weight is looked at.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from dist_finetune.models.blocks import BlockPaths, Calls, children_of, find_blocks, has_params, main_stack
from dist_finetune.models.head import find_head
from dist_finetune.models.structure_table import known_layout

Kind = Literal["embeddings", "block", "neck", "head", "other"]

# A second stack outside the blocks that is this large beside them (an encoder next to a decoder) is not a mere neck.
SECOND_TRUNK_SHARE = 0.2


@dataclass(frozen=True)
class Part:
    """One part of a model, as freeze rules name it. Names of a tensor that has several are all listed."""

    label: str
    """`embeddings` or `stem`, `block 3`, `neck`, `head`, `other`."""
    kind: Kind
    index: int | None
    """Block number from 0."""
    modules: tuple[str, ...]
    """Dotted paths of the modules that make the part, also those without tensors, such as dropout."""
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    num_params: int
    """Elements of its parameters; a tensor that an earlier part holds too counts there."""


@dataclass(frozen=True)
class Structure:
    """The parts of a model in execution order: embeddings, blocks, neck, head, then what could not be named."""

    parts: tuple[Part, ...]
    aliases: tuple[tuple[str, ...], ...]
    """Groups of parameter names that are one tensor."""
    shared_blocks: tuple[tuple[int, ...], ...] = ()
    """Groups of block numbers that run the same weights (ALBERT)."""
    notes: tuple[str, ...] = ()
    """What could not be named, and how blocks were put together."""

    @property
    def blocks(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.kind == "block")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def num_params(self) -> int:
        """Elements of all parameters, each tensor once."""
        return sum(part.num_params for part in self.parts)

    def of_kind(self, kind: Kind) -> Part | None:
        """The first part of a kind, None where the model has none."""
        return next((part for part in self.parts if part.kind == kind), None)

    def part_of(self, name: str) -> Part:
        """The part that a parameter or buffer belongs to (the first block of shared ones). Raises KeyError."""
        return self._part_by_name[name]

    @cached_property
    def _part_by_name(self) -> dict[str, Part]:
        return {name: part for part in reversed(self.parts) for name in (*part.parameters, *part.buffers)}


@dataclass
class _Places:
    """The label of each module that is assigned as a whole, and of each tensor that a container owns directly."""

    modules: dict[str, str]
    tensors: dict[str, str]

    def label_of(self, name: str) -> str:
        if name in self.tensors:
            return self.tensors[name]
        path = name
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        return self.modules.get(path, "other")


def structure_of(model: nn.Module, visited: Sequence[str] = ()) -> Structure:
    """The structure map of `model`, which may be on the meta device. A model it doesn't know is mapped as far as it
    can be; the rest is the part `other`, and a note says so.

    `visited` are the modules in the order in which a forward pass calls them, see `order.structure_for`; what is left
    out is taken to be called where it is registered.
    """
    calls = _calls(model, visited)
    head = find_head(model, calls)
    layout = known_layout(model)
    blocks, block_note = (layout.blocks, None) if layout.blocks else find_blocks(model, head, calls)
    places = _place(model, head, blocks, layout.parts, calls)
    parts = _parts(model, blocks, places)
    shared = _shared_blocks(model, blocks)
    notes = [block_note] if block_note else []
    if not blocks:
        notes.append("no stack of blocks was found: freeze by patterns; embeddings and layers can't be named")
    if not any(part.kind == "head" and part.parameters for part in parts):
        notes.append("no head was found")
    notes += [f"blocks {group[0]}-{group[-1]} run one set of weights; they freeze together" for group in shared]
    for part in parts:
        if part.kind == "other" and blocks:
            notes.append(f"could not be named, freeze by patterns: {', '.join((*part.modules, *part.parameters)[:6])}")
    return Structure(parts, _alias_groups(model), shared, tuple(notes))


def _calls(model: nn.Module, visited: Sequence[str]) -> Calls:
    """When each module is first called; a list, which never is, with the first of what it holds."""
    calls: dict[int, int] = {}
    for when, path in enumerate(visited):
        calls.setdefault(id(model.get_submodule(path)), when)
    for module in reversed(list(model.modules()) if calls else []):
        if id(module) not in calls and (inner := [calls[id(m)] for m in module.children() if id(m) in calls]):
            calls[id(module)] = min(inner)
    return calls


def _place(model: nn.Module, head: tuple[str, ...], blocks: BlockPaths, known: dict[str, str], calls: Calls) -> _Places:
    marked: dict[str, str] = dict.fromkeys(head, "head")
    for i in reversed(range(len(blocks))):  # a module that several blocks run is placed in the first of them
        marked |= dict.fromkeys(blocks[i], f"block {i}")
    marked |= known
    holds_mark = _ancestors(marked)
    holds_block = _ancestors(path for block in blocks for path in block)
    stack = main_stack(model, head)
    limit = SECOND_TRUNK_SHARE * stack.num_params if stack else 0
    places = _Places({}, {})
    seen_block = False

    def walk(path: str, module: nn.Module) -> None:
        nonlocal seen_block
        if path in marked:
            places.modules[path] = marked[path]
            seen_block = seen_block or marked[path].startswith("block")
        elif path in holds_mark:
            label = "embeddings" if path in holds_block else "neck" if blocks else "other"
            own = (*module._parameters, *module._buffers)
            places.tensors.update({f"{path}.{name}".lstrip("."): label for name in own})
            for name, child in children_of(module, calls):
                walk(f"{path}.{name}".lstrip("."), child)
        else:
            places.modules[path] = _label_by_position(path, module, seen_block, limit) if blocks else "other"

    if marked:
        walk("", model)
    else:
        places.modules[""] = "other"
    _give_head_its_dropout(model, places, head)
    return places


def _label_by_position(path: str, module: nn.Module, seen_block: bool, limit: float) -> str:
    inner = main_stack(module)
    if inner is not None and limit and inner.num_params >= limit:
        return "other"
    name = path.rpartition(".")[2]
    if seen_block:
        # Position tables that every block reads are often registered behind the blocks (MPNet, BEiT).
        is_table = re.search("embed|relpos|relativeposition", type(module).__name__, re.IGNORECASE)
        return "embeddings" if is_table else "neck"
    return "neck" if "pool" in name and has_params(module) else "embeddings"


def _give_head_its_dropout(model: nn.Module, places: _Places, head: tuple[str, ...]) -> None:
    """Modules without parameters between the last neck parameter and the head go with the head: its dropout has to
    stay active when the neck is frozen."""
    if not head:
        return
    for path in reversed(list(places.modules)):
        if places.modules[path] == "neck":
            module = model.get_submodule(path)
            if has_params(module) or next(module.buffers(), None) is not None:
                break
            places.modules[path] = "head"
        elif places.modules[path].startswith("block"):
            break


def _parts(model: nn.Module, blocks: BlockPaths, places: _Places) -> tuple[Part, ...]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    parameters: dict[str, list[str]] = {}
    buffers: dict[str, list[str]] = {}
    modules: dict[str, list[str]] = {}
    for name in tensors:
        parameters.setdefault(places.label_of(name), []).append(name)
    for name, _ in model.named_buffers(remove_duplicate=False):
        buffers.setdefault(places.label_of(name), []).append(name)
    for path, label in places.modules.items():
        modules.setdefault(label, []).append(path)
    first_of = {paths: i for i, paths in reversed(list(enumerate(blocks)))}
    order: list[tuple[str, Kind, int | None]] = [("embeddings", "embeddings", None)]
    order += [(f"block {i}", "block", i) for i in range(len(blocks))]
    order += [("neck", "neck", None), ("head", "head", None), ("other", "other", None)]
    counted: set[int] = set()
    parts = []
    for label, kind, index in order:
        source = f"block {first_of[blocks[index]]}" if index is not None else label
        names = tuple(parameters.get(source, ()))
        # Dropout or a permutation alone makes no part; head and neck keep theirs, it matters for what is held in eval.
        if not names and not buffers.get(source) and (kind == "embeddings" or not modules.get(source)):
            continue
        if kind == "embeddings":
            label = _embeddings_label(model, modules.get(source, ()))
        new = {id(tensors[name]): tensors[name].numel() for name in names if id(tensors[name]) not in counted}
        counted |= new.keys()
        paths = tuple(modules.get(source, ()))
        parts.append(Part(label, kind, index, paths, names, tuple(buffers.get(source, ())), sum(new.values())))
    return tuple(parts)


def _embeddings_label(model: nn.Module, paths: tuple[str, ...] | list[str]) -> str:
    """`embeddings` where tokens are looked up, `stem` where pixels or other signals come in."""
    inner = [module for path in paths for module in model.get_submodule(path).modules()]
    has_table = any(isinstance(module, nn.Embedding) for module in inner)
    has_conv = any(isinstance(module, nn.Conv2d) for module in inner)
    return "embeddings" if has_table and not has_conv else "stem"


def _ancestors(paths: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        while path:
            path = path.rpartition(".")[0]
            found.add(path)
    return found


def _alias_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _shared_blocks(model: nn.Module, blocks: BlockPaths) -> tuple[tuple[int, ...], ...]:
    """Groups of blocks in which one holds a tensor of another."""
    group_of_tensor: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for i, paths in enumerate(blocks):
        ids = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
        group = next((group_of_tensor[key] for key in ids if key in group_of_tensor), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(i)
        group_of_tensor |= dict.fromkeys(ids, group)
    return tuple(tuple(group) for group in groups if len(group) > 1)


def render_structure(structure: Structure) -> RenderableType:
    """A table of the parts (modules, tensors, parameters, share), then tied tensors and notes; for a rich console."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    table.add_column("modules", overflow="fold")
    for heading in ("tensors", "parameters", "%"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = structure.num_params
    for part in structure.parts:
        share = f"{100 * part.num_params / total:.1f}" if total else ""
        table.add_row(part.label, _owners(part), str(len(part.parameters)), f"{part.num_params:,}", share)
    num_tensors = sum(len(part.parameters) for part in structure.parts)
    num_tensors -= sum(len(group) - 1 for group in structure.aliases)
    num_tensors -= sum(len(structure.blocks[i].parameters) for group in structure.shared_blocks for i in group[1:])
    table.add_row(
        "all", f"{structure.depth} blocks", str(num_tensors), f"{total:,}", "100.0" if total else "", style="bold"
    )
    lines = [f"one tensor: {' = '.join(group)}" for group in structure.aliases]
    lines += [f"note: {note}" for note in structure.notes]
    return Group(table, *lines)


def _owners(part: Part, limit: int = 5) -> str:
    """The part's modules that hold tensors, and parameters that no such module holds, runs of numbers joined."""
    names = (*part.parameters, *part.buffers)
    modules = [path for path in part.modules if any(name.startswith(path + ".") for name in names)]
    loose = [name for name in part.parameters if not any(name.startswith(path + ".") for path in part.modules)]
    shown = _join_numbers([*loose, *modules])
    more = f", and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _join_numbers(paths: Sequence[str]) -> list[str]:
    """`features.0`, `features.1`, `features.3` become `features.0-3`: what lies between holds no tensor."""
    joined: list[tuple[str, str, str]] = []
    for path in paths:
        match = re.fullmatch(r"(.*\.)(\d+)", path)
        if match and joined and joined[-1][0] == match[1]:
            joined[-1] = (match[1], joined[-1][1], match[2])
        elif match:
            joined.append((match[1], match[2], match[2]))
        else:
            joined.append((path, "", ""))
    return [base + (first if first == last else f"{first}-{last}") for base, first, last in joined]
