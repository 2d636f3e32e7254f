"""The language of the `freeze:` section: block numbers, globs, ready words; each turned into tensor names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from dist_finetune.errors import did_you_mean, nearest
from dist_finetune.models.structure import Part, Structure
from dist_finetune.spec import FREEZE_WORDS, FreezeSpec

MAX_LAYERS, MAX_TERM = 500, 40  # characters: no model has blocks of such numbers, and Python reads no such number
LAYERS_HELP = '"1,2,3", "0-5,9", "-1", "first 6", "last 2", "50%" or "all"'


@dataclass(frozen=True)
class Rule:
    """One rule of the section, as reports call it, and the parameter names it takes (every name of a tied tensor)."""

    label: str
    names: tuple[str, ...]


def compile_rules(spec: FreezeSpec, structure: Structure, model: nn.Module) -> tuple[list[Rule], list[Rule], list[str]]:
    """Rules that freeze (in the order in which they claim a tensor), rules that except, and what is wrong with them."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    freezing: list[Rule] = []
    problems: list[str] = []

    def add(label: str, taken: Iterable[str] | str) -> None:
        """A string instead of names is what is wrong."""
        if isinstance(taken, str):
            problems.append(taken)
        else:
            freezing.append(Rule(label, tuple(dict.fromkeys(taken))))

    if spec.rule != "none":
        add(f"rule {spec.rule}", _ready_word(spec.rule, structure, model))
    if spec.embeddings:
        add("embeddings", _embeddings(structure))
    if spec.layers is not None:
        add(f'layers "{spec.layers}"', _layers(spec.layers, structure))
    for pattern in spec.patterns:
        taken = match_names(pattern, names)
        add(f"pattern {pattern}", taken or no_match("pattern", pattern, names))
    claimed = {name for rule in freezing for name in rule.names}
    excepting = []
    for pattern in spec.except_:
        taken = match_names(pattern, names)
        if not taken:
            problems.append(no_match("except", pattern, names))
        elif not claimed.intersection(taken) and not problems:
            problems.append(f"except {pattern!r} has no effect: no other rule freezes what it names. Leave it out")
        excepting.append(Rule(f"except {pattern}", tuple(taken)))
    if claimed and not problems and claimed.issubset(name for rule in excepting for name in rule.names):
        problems.append("except undoes all that the other rules freeze: nothing is frozen. Leave rules or except out")
    return freezing, excepting, problems


def match_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob takes. It is matched on whole dotted segments, so `layer.1` never takes `layer.10`.

    Inside a segment `*`, `?` and `[0-3]` mean what they mean in a shell. A lone `*` stands for one or more segments at
    either end and for exactly one in the middle; `**` stands for any number, also none. A pattern that ends at a module
    takes all tensors below it.
    """
    segments = pattern.split(".")
    return [name for name in names if _matches(segments, name.split("."))]


def _matches(pattern: Sequence[str], name: Sequence[str]) -> bool:
    """Follows all ways to read a pattern at once, each a number of segments of the name that it has taken."""
    taken = {0}
    for i, segment in enumerate(pattern):
        if segment == "**":
            taken = set(range(min(taken), len(name) + 1))
        elif segment == "*" and i in (0, len(pattern) - 1):
            taken = set(range(min(taken) + 1, len(name) + 1))
        else:
            taken = {at + 1 for at in taken if at < len(name) and fnmatchcase(name[at], segment)}
        if not taken:
            return False
    return True  # the pattern names this tensor or a module above it


def no_match(key: str, pattern: str, names: Sequence[str]) -> str:
    """What is wrong with a pattern that takes nothing, and what was probably meant."""
    message = f"{key} {pattern!r} matches no parameter."
    for anchored in (f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"):
        if match_names(anchored, names):
            return f"{message} A pattern starts at the root of the model. Did you mean {anchored!r}?"
    # Suggest at the depth at which the user wrote: whole paths for a path, single segments for `*.LayrNorm.*`.
    words = [segment for segment in pattern.split(".") if not set(segment) <= set("*")]
    if pattern.startswith("*") or len(words) == 1:
        known = list(dict.fromkeys(segment for name in names for segment in name.split(".")))
        wrong = [word for word in words if not any(fnmatchcase(segment, word) for segment in known)]
        if wrong and (close := nearest(wrong[0], known)):
            return f"{message} Did you mean {' or '.join(repr(pattern.replace(wrong[0], word)) for word in close)}?"
    length = len(pattern.split("."))
    return f"{message} {did_you_mean(pattern, dict.fromkeys('.'.join(name.split('.')[:length]) for name in names))}"


def _ready_word(word: str, structure: Structure, model: nn.Module) -> list[str] | str:
    """The names that a ready word freezes, or what is wrong. No word ever takes the head."""
    head = structure.of_kind("head")
    body = [name for part in structure.parts if part.kind != "head" for name in part.parameters]
    if word == "backbone":
        if head is None or not head.parameters:
            return (
                "rule 'backbone' freezes all but the head, and no head was found in this model. "
                "Name what to freeze by patterns, or see `dist-finetune inspect`"
            )
        return body
    if word == "bias-only":
        return _bias_only(body, model)
    if word == "norms":
        norms = norm_parameters(model)
        taken = [name for name in body if name in norms]
        return taken or "rule 'norms': this model has no normalisation layer with parameters outside its head"
    if match := re.fullmatch(r"all-but-last\s+(\d+)", word):
        return _all_but_last(int(match[1]), structure)
    return f"{word!r} is no ready word. {did_you_mean(word, FREEZE_WORDS)}"


def _bias_only(body: Sequence[str], model: nn.Module) -> list[str] | str:
    taken = [name for name in body if not name.endswith("bias")]
    if len(taken) < len(body):
        return taken
    norms = {name.split(".")[-2] for name in body if name in norm_parameters(model) and name.count(".")}
    way_out = "`freeze: backbone` does the same and says so"
    if norms:
        patterns = ", ".join(f'"*.{name}.*"' for name in sorted(norms)[:4])
        way_out += f"; `freeze: {{rule: backbone, except: [{patterns}]}}` trains the norms besides"
    return f"rule 'bias-only': this model has no bias outside its head, so that the head alone would train: {way_out}"


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers, told by class name, since models bring their own classes."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if re.search("norm|GRN", type(module).__name__, re.IGNORECASE)
        for name, tensor in module._parameters.items()
        if tensor is not None
    }


def _all_but_last(count: int, structure: Structure) -> list[str] | str:
    where = f"rule 'all-but-last {count}'"
    if not structure.depth:
        return f"{where}: {_no_blocks()}"
    if count > structure.depth:
        return f"{where} is out of range: {_depth(structure)}, so the number is 0 to {structure.depth}"
    embeddings = structure.of_kind("embeddings")
    names = list(embeddings.parameters) if embeddings else []
    blocks = _blocks(range(structure.depth - count), structure, where)
    return blocks if isinstance(blocks, str) else (names + blocks) or f"{where} freezes nothing in this model"


def _embeddings(structure: Structure) -> list[str] | str:
    part = structure.of_kind("embeddings")
    if part is not None and part.parameters:
        return list(part.parameters)
    labels = ", ".join(_short_labels(structure.parts))
    return f"embeddings: this model has no embeddings or stem to freeze. Its parts: {labels}"


def _layers(text: str, structure: Structure) -> list[str] | str:
    where = f'layers "{text}"' if len(text) <= MAX_LAYERS else f'layers "{text[:MAX_LAYERS]}..."'
    if not structure.depth:
        return f"{where}: {_no_blocks()}"
    indices: set[int] = set()
    for term in text.split(","):
        found = block_numbers(term.strip(), structure.depth)
        if isinstance(found, str):
            return f"{where}: {found}"
        indices |= set(found)
    return _blocks(sorted(indices), structure, where)


def block_numbers(term: str, depth: int) -> Iterable[int] | str:
    """Block numbers of one comma-separated term, or what is wrong with it."""
    valid = f"this model has {depth} block{'s' if depth > 1 else ''}, numbers 0 to {depth - 1} (or -{depth} to -1)"
    if len(term) > MAX_TERM:
        return f"'{term[:MAX_TERM]}...' names no blocks. Write {LAYERS_HELP}; {valid}"
    if term.lower() == "all":
        return range(depth)
    if match := re.fullmatch(r"(first|last)\s+(\d+)", term, re.IGNORECASE):
        count = int(match[2])
        if not 1 <= count <= depth:
            return f"{term!r} is out of range: this model has {depth} block{'s' if depth > 1 else ''}"
        return range(count) if match[1].lower() == "first" else range(depth - count, depth)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", term):
        # Decimal text times a whole number: rounding first keeps 0.1-like errors from losing a block.
        count = int(round(depth * float(match[1]) / 100, 6))
        if float(match[1]) > 100 or not count:
            return f"{term!r} of {depth} blocks is {'more than all blocks' if count else 'less than one block'}"
        return range(count)
    if match := re.fullmatch(r"(-?\d+)(?:\s*-\s*(-?\d+))?", term):
        ends = [int(end) for end in match.groups() if end is not None]
        if wrong := [str(end) for end in ends if not -depth <= end < depth]:
            return f"block {' and '.join(wrong)} is out of range: {valid}"
        first, last = (ends[0] % depth, ends[-1] % depth)
        if first > last:
            return f"the range {term!r} is empty: it starts at block {first} and ends at block {last}"
        return range(first, last + 1)
    return f"{term!r} names no blocks. Write {LAYERS_HELP}; {valid}"


def _blocks(indices: Iterable[int], structure: Structure, where: str) -> list[str] | str:
    chosen = set(indices)
    for group in structure.shared_blocks:
        missing = [i for i in group if i not in chosen]
        if missing and len(missing) < len(group):
            together = ranges(sorted(chosen | set(group)))
            return (
                f"{where} takes a part of blocks {ranges(group)}, which run one and the same set of weights: they can "
                f'only be frozen or trained together. Write layers: "{together}" or leave them out'
            )
    return [name for part in structure.blocks if part.index in chosen for name in part.parameters]


def ranges(indices: Sequence[int]) -> str:
    """Sorted numbers as a `layers:` string: 0,1,2,5 is "0-2,5"."""
    spans: list[list[int]] = []
    for i in indices:
        if spans and i == spans[-1][1] + 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _short_labels(parts: Sequence[Part]) -> list[str]:
    numbers = [part.index for part in parts if part.index is not None]
    others = [part.label for part in parts if part.index is None]
    return ([f"blocks {ranges(numbers)}"] if numbers else []) + others


def _depth(structure: Structure) -> str:
    return f"this model has {structure.depth} blocks"


def _no_blocks() -> str:
    return "no numbered blocks were found in this model; freeze by patterns, `dist-finetune inspect` lists the names"
