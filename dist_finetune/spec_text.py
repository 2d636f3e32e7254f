"""Every key of a config as tables in Markdown, made from the schema that checks it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

WORDS = {"integer": "whole number", "boolean": "true, false", "string": "text", "array": "list", "object": "mapping"}
Schema = Mapping[str, Any]


def key_tables(schema: Schema) -> str:
    """A table for the top of the file and one for each section: key, what it takes, default, meaning. `schema` is the
    JSON Schema of a config."""
    return "\n".join(_tables(schema, dict(schema["$defs"]), "")).rstrip() + "\n"


def _tables(section: Schema, definitions: dict[str, Schema], prefix: str) -> Iterator[str]:
    """The tables of a section and of those inside it, each kind of section once; `prefix` is its key with a dot, empty
    for the whole file."""
    rows: list[str] = []
    inner: list[tuple[str, str]] = []
    for key, value in section["properties"].items():
        takes, name = _takes(value), _section_in(value)
        if name:
            inner.append((f"{prefix}{key}{'[]' if 'list' in takes else ''}.", name))
        if takes == ["section"]:  # its keys have a table of their own, and it has no short form
            continue
        meaning = " ".join(value.get("description", "").split()).replace("|", "\\|").replace("<", "\\<")
        default = "needed" if key in section.get("required", ()) else _default(value.get("default"))
        rows.append(f"| `{prefix}{key}` | {', '.join(takes)} | {default} | {meaning} |")
    yield f"### `{prefix.rstrip('.')}`\n" if prefix else "### Top of the file\n"
    if prefix and "description" in section:
        yield section["description"].partition("\n")[0] + "\n"
    yield "| key | takes | default | meaning |\n|---|---|---|---|"
    yield from rows
    yield ""
    for inner_prefix, name in inner:
        if name in definitions:
            yield from _tables(definitions.pop(name), definitions, inner_prefix)


def _takes(value: Schema) -> list[str]:
    """What a key takes, in words; null is what leaving it out means."""
    words: list[str] = []
    for form in value.get("anyOf", [value]):
        if "$ref" in form:
            words.append("section")
        elif "enum" in form or "const" in form:
            words += [f"`{choice}`" for choice in form.get("enum", [form.get("const")])]
        elif form["type"] != "null":
            words.append(WORDS.get(form["type"], form["type"]))
    return list(dict.fromkeys(words))


def _section_in(value: Schema) -> str | None:
    """The name of the section that a key takes, or takes a list of."""
    for form in value.get("anyOf", [value]):
        reference = form.get("$ref") or form.get("items", {}).get("$ref")
        if reference:
            return str(reference).rpartition("/")[2]
    return None


def _default(value: Any) -> str:
    if value is None or value == [] or isinstance(value, dict):
        return ""
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value if isinstance(value, str) else json.dumps(value).removesuffix('.0')}`"
