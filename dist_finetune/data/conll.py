"""CoNLL files: a word and its tag a line, a blank line between sentences."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from dist_finetune.errors import UserError

DOCUMENT = "-DOCSTART-"  # begins a line between documents


def conll_sentences(path: Path, lines: Iterable[str]) -> Iterator[dict[str, list[str]]]:
    """`{"tokens": words, "tags": tags}` of each sentence. Of several columns, parted by tabs or else by spaces, the
    first is the word and the last its tag. Raises UserError for a line without a tag."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(chain(lines, [""]), 1):
        cells = [cell.strip() for cell in line.split("\t" if "\t" in line else None)]
        if cells and any(cells) and cells[0] != DOCUMENT:
            if len(cells) < 2 or not cells[-1]:
                raise UserError(f"{path}:{number}: {line.strip()!r:.80} has no tag; write a word and its tag a line")
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            yield {"tokens": words, "tags": tags}
            words, tags = [], []
