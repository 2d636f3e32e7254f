"""From a YAML file and `key=value` overrides to a checked `Spec`; every problem is reported at once, with its line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.spec import Spec


def load_spec(config: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Spec:
    """The checked spec of a YAML file (or of a dict of the same shape), after dotted overrides such as `train.lr=3e-5`.

    Raises UserError that lists every problem: file, line, key, what is wrong and the nearest valid key.
    """
    if isinstance(config, dict):
        raw, where = dict(config), "config"
    else:
        raw, where = _read_yaml(Path(config)), str(config)
        raw.setdefault("name", Path(config).stem)
    changed = [_apply_override(raw, item) for item in overrides]
    try:
        return Spec.model_validate(_plain(raw))
    except ValidationError as problems:
        lines = [_describe(raw, problem, where, changed) for problem in problems.errors()]
        unique = list(dict.fromkeys(lines))
        count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
        raise UserError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in unique)) from None


def resolved_yaml(spec: Spec) -> str:
    """The spec as YAML text that `load_spec` reads back to an equal spec; every default is written out."""
    from io import StringIO

    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(spec.model_dump(mode="json", by_alias=True), out)
    return out.getvalue()


def _read_yaml(path: Path) -> CommentedMap:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config file. {did_you_mean(path.name, near)}".rstrip()) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a text file: {error}") from None
    try:
        raw = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{at}: not valid YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, CommentedMap):
        raise UserError(f"{path}: a config is a mapping of keys such as `model:` and `data:`, this file is not one")
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> str:
    """Sets one `a.b=value` in `raw`; returns the dotted key."""
    key, equals, text = item.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(f"{item!r} is no override; write key=value with a dotted key, such as train.lr=3e-5")
    try:
        value = YAML(typ="safe").load(text)
    except YAMLError:
        raise UserError(f"{item!r}: the value is not valid YAML; quote it, such as '{key}=\"...\"'") from None
    *parents, last = key.split(".")
    node: Any = raw
    for i, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            parent = ".".join(parents[: i + 1])
            raise UserError(f"{item!r}: the config sets {parent} to {node!r}, which has no keys; override {parent} as a whole")
    node[last] = value
    return key


def _plain(node: Any) -> Any:
    """YAML containers as plain dicts, lists and values, so that a dump or an error shows nothing of the YAML library."""
    if isinstance(node, dict):
        return {str(k): _plain(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(v) for v in node]
    return node


def _describe(raw: Any, problem: Any, where: str, changed: Sequence[str]) -> str:
    loc = [str(part) for part in problem["loc"]]
    path = _existing_path(raw, loc)
    key = ".".join(path)
    at = "override" if key in changed else _line(raw, path, where)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{at}: unknown key {key}. {did_you_mean(loc[-1], _known_keys(loc[:-1]))}"
    if kind == "missing":
        return f"{where}: {'.'.join(loc)} is required"
    if kind == "literal_error":
        valid = [v.strip(" '") for v in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{at}: {key} can't be {value!r}. {did_you_mean(str(value), valid)} One of: {', '.join(valid)}."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{at}: {key}: {message}" + ("" if kind == "value_error" else f" (got {value!r})")


def _existing_path(raw: Any, loc: Sequence[str]) -> list[str]:
    """`loc` without the union branches that pydantic adds after the last key that the file really has."""
    path: list[str] = []
    node = raw
    for part in loc:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            break
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


def _known_keys(parents: Sequence[str]) -> list[str]:
    """Keys that the section at dotted path `parents` knows."""
    section: type[BaseModel] = Spec
    for part in parents:
        field = next((f for n, f in section.model_fields.items() if part in (n, f.alias)), None)
        options = [field.annotation, *get_args(field.annotation)] if field else []
        models = [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            return []
        section = models[0]
    return [field.alias or name for name, field in section.model_fields.items()]
