"""CoNLL files: a word and its tag a line, a blank line between sentences."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from dist_finetune.errors import UserError

DOCUMENT = "-DOCSTART-"  # begins a line between documents

_NAMED = re.compile(r"#\s*[\w.:-]+\s*=\s")  # `# sent_id = 1`, of which a file of four columns could make a word


def conll_sentences(path: Path, lines: Iterable[str]) -> Iterator[dict[str, list[str]]]:
    """`{"tokens": words, "tags": tags}` of each sentence. Of several columns, parted by tabs or else by spaces, the
    first is the word and the last its tag. Comments before a sentence are left out; see `_is_comment`. Raises UserError
    for a line without a tag."""
    rest, head, layout = iter(lines), [], None
    for line in rest:
        head.append(line)
        if line.strip() and not line.startswith(("#", DOCUMENT)):
            layout = _layout(line)
            break
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(chain(head, rest, [""]), 1):
        cells = _cells(line)
        if not words and _is_comment(line, layout):
            continue
        if cells and any(cells) and cells[0] != DOCUMENT:
            if len(cells) < 2 or not cells[-1]:
                raise UserError(f"{path}:{number}: {line.strip()!r:.80} has no tag; write a word and its tag a line")
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            yield {"tokens": words, "tags": tags}
            words, tags = [], []


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("\t" if "\t" in line else None)]


def _layout(line: str) -> tuple[bool, int]:
    """Whether tabs part a line's columns, and how many there are."""
    return "\t" in line, len(_cells(line))


def _is_comment(line: str, layout: tuple[bool, int] | None) -> bool:
    """Whether a line before a sentence's first word is none of its words. One such as "#" or "#Oslo" has a tag in the
    columns of the file; a comment has a name and a value, or is text of other columns."""
    if not line.startswith("#") or (len(line.split()) == 1 and line.strip() != "#"):
        return False  # "#Oslo" alone lacks its tag, and is told
    return _NAMED.match(line) is not None or (layout is not None and _layout(line) != layout)
