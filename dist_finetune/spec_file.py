"""From a YAML file and `key=value` overrides to a checked `Spec`; every problem is reported at once, with its line."""

import datetime
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from dist_finetune.errors import UserError, did_you_mean, nearest
from dist_finetune.spec import Spec
from dist_finetune.spec_base import as_list

# Beginnings of pydantic's problem types, and what the key would have taken.
EXPECTED_WORDS = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} character",
    "string_": "a text",
    "tuple_": "a list",
    "greater_than_equal": "a number from {ge} up",
    "greater_than": "a number above {gt}",
    "less_than_equal": "a number up to {le}",
    "less_than": "a number below {lt}",
}

MAX_SHOWN = 200  # characters of a wrong value in a message

# What transformers' Trainer and its example scripts call a key, and what says the same here.
TRAINER_NAMES = {
    "batch_size": "train.global_batch_size",
    "bf16": "train.precision",
    "dataloader_num_workers": "data.num_workers",
    "dataset_name": "data.train",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.global_batch_size",
    "learning_rate": "train.lr",
    "logging_steps": "train.log_every",
    "lr_scheduler_type": "train.schedule",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.name",
    "num_train_epochs": "train.epochs",
    "output_dir": "output",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "report_to": "track.wandb",
    "run_name": "name",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
}


def load_spec(config: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Spec:
    """The checked spec of a YAML file (or of a dict of the same shape), after dotted overrides such as `train.lr=3e-5`.

    Raises UserError that lists every problem: file, line, key, what is wrong and the nearest valid key.
    """
    if isinstance(config, dict):
        raw, where = _plain(config), "config"
    else:
        raw, where = _read_yaml(Path(config)), str(config)
        raw.setdefault("name", Path(config).stem)
    lines, changed = [], []
    for item in overrides:
        try:
            changed.append(_apply_override(raw, item))
        except UserError as problem:
            lines.append(f"override {problem}")
    try:
        spec = Spec.model_validate(_plain(raw))
    except ValidationError as problems:
        lines += _describe_all(raw, problems, where, changed)
    if lines:
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines))
    return spec


def resolved_yaml(spec: Spec) -> str:
    """The spec as YAML text that `load_spec` reads back to an equal spec; every default is written out."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(_quoted(spec.model_dump(mode="json", by_alias=True)), out)
    return out.getvalue()


def _quoted(node: Any) -> Any:
    """`node` with double quotes asked for around texts that hold U+0085: elsewhere the YAML library writes it as it is,
    and reads it back as a line break."""
    if isinstance(node, dict):
        return {_quoted(key): _quoted(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_quoted(value) for value in node]
    return DoubleQuotedScalarString(node) if isinstance(node, str) and "\x85" in node else node


def _read_yaml(path: Path) -> CommentedMap:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config file. {did_you_mean(path.name, near)}".rstrip()) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a text file: {error}") from None
    raw = parse_yaml(text, path)
    if not isinstance(raw, CommentedMap):
        raise UserError(f"{path}: a config is a mapping of keys such as `model:` and `data:`, this file is not one")
    return raw


def parse_yaml(text: str, path: Path, kind: Literal["rt", "safe"] = "rt") -> Any:
    """What YAML text holds, with its lines ("rt") or plain. Raises UserError that says where in `path` it is no YAML,
    and why."""
    try:
        return YAML(typ=kind).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        why = error.problem or error.context or ""
        hint = "; indent with spaces" if r"'\t'" in why else ""
        raise UserError(f"{path}{at}: not valid YAML: {why}{hint}") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except ValueError as error:  # what looks like a date or a whole number, and can't be one
        raise UserError(f"{path}: a value can't be read: {error}. Write it in quotes if it is a text") from None
    except RecursionError:
        raise UserError(f"{path}: lists or keys within each other, too deep to be read") from None


def _apply_override(raw: dict[str, Any], item: str) -> str:
    """Sets one `a.b=value` in `raw`; returns the dotted key."""
    key, equals, text = item.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(f"{item!r} is no override; write key=value with a dotted key, such as train.lr=3e-5")
    try:
        value = YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError):
        raise UserError(f"{item!r}: the value is not valid YAML; quote it, such as '{key}=\"...\"'") from None
    *parents, last = key.split(".")
    node: Any = raw
    for i, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            parent = ".".join(parents[: i + 1])
            raise UserError(
                f"{item!r}: the config sets {parent} to {node!r}, which has no keys; override {parent} as a whole"
            )
    node[last] = value
    return key


def _plain(node: Any) -> Any:
    """YAML containers and scalars as plain Python values: a dump or an error shows nothing of the YAML library."""
    if isinstance(node, dict):
        return {str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(v) for v in node]
    if isinstance(node, ScalarBoolean):
        return bool(node)
    if isinstance(node, datetime.date):
        return str(node)
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _describe_all(raw: Any, problems: ValidationError, where: str, changed: Sequence[str]) -> list[str]:
    """One line for each key that is wrong; pydantic reports one problem for each branch of a union."""
    by_path: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems.errors():
        loc = [str(part) for part in problem["loc"]]
        missing = [loc.pop()] if problem["type"] == "missing" else []
        by_path.setdefault((*_existing_path(raw, loc), *missing), []).append(problem)
    for path in list(by_path):  # phases are a word or a list: that a list is no word is not what is wrong inside it
        if any(len(other) > len(path) > 0 and other[: len(path)] == path for other in by_path):
            del by_path[path]
    return [_describe(raw, path, found, where, changed) for path, found in by_path.items()]


def _describe(raw: Any, path: Sequence[str], problems: list[Any], where: str, changed: Sequence[str]) -> str:
    key = ".".join(path)
    at = _line(raw, path, where)
    # A section that only overrides made has no line either.
    if any(key == c or key.startswith(f"{c}.") or (at == where and c.startswith(f"{key}.")) for c in changed):
        at = "override"
    kind, value = problems[0]["type"], problems[0].get("input")
    if kind == "missing":
        field = _field(path)
        return f"{at}: {key} is required. {field.description or '' if field else ''}".rstrip()
    if kind == "extra_forbidden":
        elsewhere = [f"{section}.{path[-1]}" for section in Spec.model_fields if path[-1] in _known_keys([section])]
        elsewhere = elsewhere or [name for name in [TRAINER_NAMES.get(path[-1])] if name]
        hint = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
        return f"{at}: unknown key {key}. {hint or did_you_mean(path[-1], _known_keys(path[:-1]))}"
    if kind == "value_error":
        return f"{at}: {key}: {problems[0]['msg'].removeprefix('Value error, ')}"
    valid = [v for p in problems if p["type"] == "literal_error" for v in _literals(p)]
    expected = [*valid, *(_expected(p, path) for p in problems if p["type"] != "literal_error")]
    close = nearest(str(value), valid)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{at}: {key} can't be {_shown(value)}.{guess} It takes {' or '.join(expected)}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _literals(problem: Any) -> list[str]:
    return [v.strip(" '") for v in problem["ctx"]["expected"].replace(" or ", ",").split(",")]


def _expected(problem: Any, path: Sequence[str]) -> str:
    """What would have been right, in words, for one of pydantic's problems."""
    kind, limits = problem["type"], problem.get("ctx", {})
    if kind in ("model_type", "dict_type"):
        keys = ", ".join(_known_keys(path)[:4])
        return f"a section of keys, such as {keys}" if keys else "a mapping of keys"
    field = _field(path)
    if kind.startswith("tuple_") and field and any(getattr(m, "func", None) is as_list for m in field.metadata):
        return "a text, or a list of them"
    for prefix, words in EXPECTED_WORDS.items():
        if kind.startswith(prefix):
            return words.format(**limits)
    return f"something else: {problem['msg']}"


def _existing_path(raw: Any, loc: Sequence[str]) -> list[str]:
    """`loc` without the union branches that pydantic adds between and after the keys that the file really has."""
    path: list[str] = []
    node = raw
    for part in loc:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            continue
        path.append(part)
    return path or list(loc)


def _line(raw: Any, path: Sequence[str], where: str) -> str:
    """`file:line` of the last key of `path` that YAML recorded a position for."""
    node, line = raw, None
    for part in path:
        position = None
        if isinstance(node, CommentedMap) and part in (node.lc.data or {}):
            position = node.lc.key(part)
        elif isinstance(node, CommentedSeq) and part.isdigit():
            position = node.lc.item(int(part))
        line = position[0] + 1 if position else line
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            break
    return f"{where}:{line}" if line else where


def _known_keys(path: Sequence[str]) -> list[str]:
    """Keys that the section at `path` knows; none where `path` is not a section."""
    section = _section(path)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _field(path: Sequence[str]) -> FieldInfo | None:
    section = _section(path[:-1])
    fields = section.model_fields.items() if section else ()
    return next((field for name, field in fields if path[-1] in (name, field.alias)), None)


def _section(path: Sequence[str]) -> type[BaseModel] | None:
    """The pydantic model that checks the section at `path`."""
    if not path:
        return Spec
    if path[-1].isdigit():
        return _member(_field(path[:-1]))
    field = _field(path)
    options = [field.annotation, *get_args(field.annotation)] if field else []
    return next((t for t in options if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _member(field: FieldInfo | None) -> type[BaseModel] | None:
    """The pydantic model that checks each member of a list."""
    lists = [get_args(option) for option in get_args(field.annotation)] if field else []
    return next((t for types in lists for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)
