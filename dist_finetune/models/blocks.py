"""Finds the numbered blocks of a model: layers of a transformer, stages of a CNN.

What is looked for is the longest stack, by parameters, of numbered siblings of one class, wherever it sits. Blocks of
one stage that stand in a row (EfficientNet in transformers, MobileNet in torchvision) are joined into stages where
channels or resolution change, and a plain row of convolutions (VGG) is cut at its poolings.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

BlockPaths = tuple[tuple[str, ...], ...]
"""For each block, in execution order, the dotted paths of its modules."""
Calls = Mapping[int, int]
"""When a forward pass first calls a module or something in it, by the module's id."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

# A stack that holds less than this share of the body (lookup tables and head aside) is no trunk, only a detail in one.
MIN_TRUNK_SHARE = 0.3


@dataclass(frozen=True)
class Stack:
    """Numbered siblings of one class: `parent` is their common path, `names` are the children's names in order."""

    parent: str
    names: tuple[str, ...]
    num_params: int

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(join(self.parent, name) for name in self.names)


def find_blocks(model: nn.Module, head: Iterable[str], calls: Calls | None = None) -> tuple[BlockPaths, str | None]:
    """The blocks of `model` outside the `head` paths, and a note where they had to be put together; empty if none.

    They are in the order of `calls`, and without it in that in which they are registered."""
    head_paths = tuple(head)
    calls = calls or {}
    stack = main_stack(model, head_paths)
    body = _count(module for path, module in model.named_modules() if not _within(path, head_paths))
    if stack is not None and stack.num_params >= MIN_TRUNK_SHARE * body:
        return _with_parallel_lists(model, *_stages(model, stack, calls), stack, calls)
    row = _pooled_row(model, head_paths, calls)
    if row:
        return row, "blocks are stretches of a plain row of convolutions, cut where the resolution falls"
    return (), None


def main_stack(module: nn.Module, head: tuple[str, ...] = ()) -> Stack | None:
    """The stack with the most parameters inside `module` (the outermost of equals), or None."""
    stacks = list(_stacks(module, head))
    best = max(stacks, key=lambda s: s.num_params, default=None)
    several = max((s for s in stacks if len(s.names) > 1), key=lambda s: s.num_params, default=None)
    # A list of one is a block only where it isn't a wrapper around the real stack.
    if best is not None and several is not None and several.num_params >= 0.5 * best.num_params:
        return several
    return best


def join(parent: str, name: str) -> str:
    """The dotted path of child `name` of module `parent` (the root's path is empty)."""
    return f"{parent}.{name}" if parent else name


def children_of(module: nn.Module, calls: Calls | None = None) -> list[tuple[str, nn.Module]]:
    """All children by name, also the repeats of one shared module, which `named_children` leaves out. In the order of
    `calls`; one that is never called stays behind the one that it is registered after."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not calls:
        return children
    places, place = [], -1
    for _, child in children:
        place = calls.get(id(child), place)
        places.append(place)
    return [children[i] for i in sorted(range(len(children)), key=places.__getitem__)]


def has_params(module: nn.Module) -> bool:
    """Whether the module or anything below it owns a parameter."""
    return next(module.parameters(), None) is not None


def _stacks(model: nn.Module, head: tuple[str, ...]) -> Iterator[Stack]:
    for parent_path, parent in model.named_modules():
        runs: list[list[str]] = []
        last: dict[str, list[str]] = {}  # the run that the newest sibling of each base name is in
        for name, child in children_of(parent):
            match = re.fullmatch(r"(.*?)(\d+)", name)
            if not match or not has_params(child):
                continue
            base, run = match[1], last.get(match[1])
            if not _can_be_block(child) or "aux" in base or _holds(join(parent_path, name), head):
                last.pop(base, None)
            elif run and type(child) is type(parent.get_submodule(run[-1])):
                run.append(name)
            else:
                last[base] = [name]
                runs.append(last[base])
        if isinstance(parent, nn.ModuleList):
            everything = [name for run in runs for name in run]
            if len(runs) > 1 and len(everything) == len(parent):
                runs.append(everything)  # blocks of several classes that take turns
        else:
            runs = [run for run in runs if len(run) > 1]
        for run in runs:
            inner = (module for name in run for module in parent.get_submodule(name).modules())
            yield Stack(parent_path, tuple(run), _count(inner))


def _can_be_block(module: nn.Module) -> bool:
    return bool(children_of(module)) or not type(module).__module__.startswith("torch.nn")


def _within(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _holds(path: str, inner: tuple[str, ...]) -> bool:
    """Whether module `path` is, or contains, one of the `inner` modules."""
    return any(other == path or other.startswith(path + ".") for other in inner)


def _count(modules: Iterable[nn.Module]) -> int:
    """Elements of the parameters that the modules own themselves, each tensor once. Lookup tables don't count: a small
    transformer with a large vocabulary has most of its parameters there."""
    seen: dict[int, int] = {}
    for module in modules:
        if not isinstance(module, nn.Embedding):
            seen.update((id(p), p.numel()) for p in module._parameters.values() if p is not None)
    return sum(seen.values())


def _stages(model: nn.Module, stack: Stack, calls: Calls) -> tuple[BlockPaths, str | None]:
    parent = model.get_submodule(stack.parent)
    # What stands between two members (a DenseNet transition) belongs to the one before it.
    order = [name for name, _ in children_of(parent, calls)]
    stack = replace(stack, names=tuple(sorted(stack.names, key=order.index)))
    members = [parent.get_submodule(name) for name in stack.names]
    starts = _stage_starts(members)
    first, last = order.index(stack.names[0]), order.index(stack.names[-1])
    stages: list[list[str]] = []
    for name in order[first : last + 1]:
        if name in stack.names and starts[stack.names.index(name)]:
            stages.append([])
        stages[-1].append(join(stack.parent, name))
    blocks = tuple(tuple(stage) for stage in stages)
    note = None
    if len(blocks) < len(members):
        span = f"{len(members)} modules {stack.paths[0]} to {stack.paths[-1]}"
        note = f"{span} are joined into {len(blocks)} stages, cut where channels change"
    elif any(len(stage) > 1 for stage in blocks):
        note = "what stands between two blocks is counted to the block before it"
    return blocks, note


def _stage_starts(members: list[nn.Module]) -> list[bool]:
    """Which members begin a stage: all of them, unless some change the shape of their input and others keep it."""
    changes = [_changes_shape(member) for member in members]
    single = not all(_is_stage(member) for member in members)
    if single and any(changes[1:]) and not all(changes[1:]):
        return [True, *changes[1:]]
    return [True] * len(members)


def _is_stage(module: nn.Module) -> bool:
    """A row of blocks itself: FocalNet's stages hold one, and all but the last change the resolution behind it."""
    rows = (nn.Sequential, nn.ModuleList)
    return isinstance(module, rows) or any(isinstance(child, nn.ModuleList) for _, child in children_of(module))


def _with_parallel_lists(
    model: nn.Module, blocks: BlockPaths, note: str | None, stack: Stack, calls: Calls
) -> tuple[BlockPaths, str | None]:
    """The blocks with what lists of the same length beside theirs give to each: attentions in one list, feed-forward
    layers in another. Only lists that take turns in `calls` are such."""
    holder, _, own = stack.parent.rpartition(".")
    if not calls or not own or any(len(block) != 1 for block in blocks) or len(blocks) != len(stack.names):
        return blocks, note
    rows: list[list[tuple[str, nn.Module]]] = []
    for name, module in children_of(model.get_submodule(holder)):
        row = children_of(module, calls)
        if isinstance(module, nn.ModuleList) and len(row) == len(blocks) and all(id(m) in calls for _, m in row):
            rows.append([(join(join(holder, name), key), member) for key, member in row])
    turns = [sorted(calls[id(row[i][1])] for row in rows) for i in range(len(blocks))]
    if len(rows) < 2 or any(turns[i][-1] >= turns[i + 1][0] for i in range(len(turns) - 1)):
        return blocks, note
    names = " and ".join(row[0][0].rpartition(".")[0] for row in rows)
    return tuple(
        tuple(row[i][0] for row in rows) for i in range(len(blocks))
    ), f"a block is one module of each of {names}, which take turns"


def _changes_shape(block: nn.Module) -> bool:
    convs = [m for m in block.modules() if isinstance(m, CONVOLUTIONS)]
    if not convs:
        return False
    return convs[0].in_channels != convs[-1].out_channels or any(_stride(conv) > 1 for conv in convs)


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else int(stride or 1)


def _pooled_row(model: nn.Module, head: tuple[str, ...], calls: Calls) -> BlockPaths:
    """Stages of a module that lists its convolutions directly (VGG): a new one after each pooling or at a stride."""
    rows = [(path, m) for path, m in model.named_modules() if _num_convs(m) > 1]
    if not rows:
        return ()
    path, row = max(rows, key=lambda item: _num_convs(item[1]))
    children = [(name, child) for name, child in children_of(row, calls) if not _holds(join(path, name), head)]
    conv_at = [i for i, (_, child) in enumerate(children) if isinstance(child, CONVOLUTIONS)]
    stages: list[list[str]] = [[]]
    cut = False
    for i, (name, child) in enumerate(children[conv_at[0] :], start=conv_at[0]):
        if i > conv_at[-1] and isinstance(child, (nn.Linear, nn.Flatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
            break
        if isinstance(child, CONVOLUTIONS):
            if stages[-1] and (cut or _stride(child) > 1):
                stages.append([])
            cut = False
        elif isinstance(child, POOLINGS) and _stride(child) > 1:
            cut = True
        stages[-1].append(join(path, name))
    return tuple(tuple(stage) for stage in stages)


def _num_convs(module: nn.Module) -> int:
    return sum(isinstance(child, CONVOLUTIONS) for _, child in children_of(module))
