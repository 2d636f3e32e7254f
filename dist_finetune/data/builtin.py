"""Real data that installed packages ship, for a first run without a download: `builtin:topics` and `builtin:digits`."""

import io
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from ruamel.yaml import YAML

from dist_finetune.errors import UserError, did_you_mean

NAMES = ("topics", "digits")
# Below 40 distinct utterances a topic gives a held-out tenth of fewer than four: too few to tell anything apart.
MIN_TOPIC_ROWS = 40


def read_builtin(name: str) -> Dataset:
    """The rows of `builtin:NAME`: columns "text" and "label" (a topic), or "image" and "label" (a digit).

    Raises UserError for a name that isn't known and for a package that isn't installed.
    """
    if name == "topics":
        return _topics()
    if name == "digits":
        return _digits()
    raise UserError(f"builtin:{name}: no such data. {did_you_mean(name, NAMES)} One of: {', '.join(NAMES)}.")


def _topics() -> Dataset:
    """Distinct English utterances of chatterbot-corpus, labelled with the file (topic) they stand in.

    The corpus repeats many utterances, in other case or punctuation too: each is kept once, and not at all where two
    topics have it. Topics with fewer than `MIN_TOPIC_ROWS` are left out, and so is
    "conversations", small talk on anything.
    """
    found = find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "builtin:topics: the package chatterbot-corpus is not installed; run: pip install 'dist-finetune[demo]'"
        )
    folder = Path(found.submodule_search_locations[0]) / "data" / "english"
    topics_of: dict[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    for file in sorted(folder.glob("*.yml")):
        for conversation in YAML(typ="safe").load(file.read_text(encoding="utf-8"))["conversations"]:
            # One conversation of the corpus is a bare string instead of a list.
            for utterance in [conversation] if isinstance(conversation, str) else conversation:
                words = " ".join(re.findall(r"\w+", utterance.casefold()))
                if words:
                    topics_of[words].add(file.stem)
                    first.setdefault(words, " ".join(utterance.split()))
    rows = [(first[words], min(topics)) for words, topics in topics_of.items() if len(topics) == 1]
    sizes: dict[str, int] = defaultdict(int)
    for _, topic in rows:
        sizes[topic] += 1
    kept = [row for row in rows if sizes[row[1]] >= MIN_TOPIC_ROWS and row[1] != "conversations"]
    return Dataset(pa.table({"text": [text for text, _ in kept], "label": [topic for _, topic in kept]}))


def _digits() -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey, as RGB images."""
    if find_spec("sklearn") is None:
        raise UserError("builtin:digits: the package scikit-learn is not installed; run: pip install scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    rows = {
        "image": [{"bytes": _png(grey), "path": None} for grey in map(Image.fromarray, pixels)],
        "label": digits.target.tolist(),
    }
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("int64")}))


def _png(grey: Image.Image) -> bytes:
    out = io.BytesIO()
    grey.convert("RGB").save(out, format="PNG", compress_level=1)
    return out.getvalue()
