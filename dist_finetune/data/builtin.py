"""Real data that installed packages ship, for a first run of each task without a download."""

import io
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image

from dist_finetune.errors import UserError, did_you_mean

NAMES = ("topics", "digits", "punctuation")
# Below 40 distinct utterances a topic gives a held-out tenth of fewer than four: too few to tell anything apart.
MIN_TOPIC_ROWS = 40
PUNCTUATION = {",": "comma", ".": "period", "!": "period", "?": "question"}
# libyaml's parser, where PyYAML was built with it, takes a twentieth of the time of any in Python.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TRAITS = {"even": {0, 2, 4, 6, 8}, "prime": {2, 3, 5, 7}, "round": {0, 6, 8, 9}}


def read_builtin(name: str) -> Dataset:
    """The rows of `builtin:NAME`: "text" and "label" (a topic); "image", "label" (a digit), "traits" (a list) and
    "slant" (a real number); or "tokens" and "tags" (the punctuation behind each word).

    Raises UserError for a name that isn't known and for a package that isn't installed.
    """
    if name == "topics":
        return _topics()
    if name == "digits":
        return _digits()
    if name == "punctuation":
        return _punctuation()
    raise UserError(f"builtin:{name}: no such data. {did_you_mean(name, NAMES)} One of: {', '.join(NAMES)}.")


def _topics() -> Dataset:
    """Distinct English utterances of chatterbot-corpus, labelled with the file (topic) they stand in.

    The corpus repeats many utterances, in other case or punctuation too: each is kept once, and not at all where two
    topics have it. Topics with fewer than `MIN_TOPIC_ROWS` are left out, and so is
    "conversations", small talk on anything.
    """
    topics_of: dict[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    for topic, utterance in _utterances("topics"):
        words = " ".join(re.findall(r"\w+", utterance.casefold()))
        if words:
            topics_of[words].add(topic)
            first.setdefault(words, " ".join(utterance.split()))
    rows = [(first[words], min(topics)) for words, topics in topics_of.items() if len(topics) == 1]
    sizes: dict[str, int] = defaultdict(int)
    for _, topic in rows:
        sizes[topic] += 1
    kept = [row for row in rows if sizes[row[1]] >= MIN_TOPIC_ROWS and row[1] != "conversations"]
    return Dataset(pa.table({"text": [text for text, _ in kept], "label": [topic for _, topic in kept]}))


def _punctuation() -> Dataset:
    """The same utterances as lower-case words, each tagged with the punctuation behind it: "comma", "period" (or an
    exclamation mark), "question", or "O" for none. Utterances of fewer than three words or with other signs are left
    out."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for _, utterance in _utterances("punctuation"):
        pieces = [re.fullmatch(r"([\w'\u2019-]+)([.,!?]?)", piece) for piece in utterance.casefold().split()]
        whole = [piece for piece in pieces if piece]
        if len(whole) == len(pieces) >= 3:
            rows.setdefault(tuple(piece[1] for piece in whole), [PUNCTUATION.get(piece[2], "O") for piece in whole])
    return Dataset(pa.table({"tokens": [list(words) for words in rows], "tags": list(rows.values())}))


def _utterances(name: str) -> Iterator[tuple[str, str]]:
    """File (topic) and text of each English utterance of chatterbot-corpus, in its order."""
    found = find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"builtin:{name}: the package chatterbot-corpus is not installed; run: pip install 'dist-finetune[demo]'"
        )
    folder = Path(found.submodule_search_locations[0]) / "data" / "english"
    for file in sorted(folder.glob("*.yml")):
        for conversation in yaml.load(file.read_text(encoding="utf-8"), YAML_LOADER)["conversations"]:
            # One conversation of the corpus is a bare string instead of a list.
            for utterance in [conversation] if isinstance(conversation, str) else conversation:
                yield file.stem, utterance


def _digits() -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey, as RGB images; with what is true of each digit ("even",
    "prime", "round" where it has a closed loop), and the angle in degrees by which each is slanted to the right."""
    found = find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise UserError("builtin:digits: the package scikit-learn is not installed; run: pip install scikit-learn")
    # The file that `load_digits` reads: importing scikit-learn (and scipy) for it would be a tenth of a plan.
    cells = np.loadtxt(Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images, digits = cells[:, :-1].reshape(-1, 8, 8), cells[:, -1].astype(int).tolist()
    pixels = (images * (255 / 16)).round().astype("uint8")
    rows = {
        "image": [{"bytes": _png(grey), "path": None} for grey in map(Image.fromarray, pixels)],
        "label": digits,
        "traits": [[name for name, those in TRAITS.items() if digit in those] for digit in digits],
        "slant": np.degrees(_slopes(images)).tolist(),
    }
    kinds = {"image": ImageFeature(), "label": Value("int64")}
    kinds |= {"traits": List(Value("string")), "slant": Value("float64")}
    return Dataset.from_dict(rows, features=Features(kinds))


def _slopes(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """The angle from upright of the line that ink (N, H, W) lies along, from its second moments."""
    y, x = np.mgrid[: images.shape[1], : images.shape[2]]
    mass = images.sum((1, 2), keepdims=True)
    x, y = (axis - (images * axis).sum((1, 2), keepdims=True) / mass for axis in (x, y))
    slopes: NDArray[np.float64] = np.arctan(-(images * x * y).sum((1, 2)) / (images * y * y).sum((1, 2)))
    return slopes


def _png(grey: Image.Image) -> bytes:
    out = io.BytesIO()
    grey.convert("RGB").save(out, format="PNG", compress_level=1)
    return out.getvalue()
