"""Tiny models and data, made on the spot: a BERT folder with its vocabulary, weights of a CNN, texts, images."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

TOPICS = {
    "weather": ["rain", "sun", "cloud", "storm", "wind", "snow", "warm", "cold", "forecast"],
    "food": ["bread", "soup", "apple", "cheese", "salt", "dinner", "cook", "taste", "sweet"],
    "music": ["song", "piano", "drum", "loud", "melody", "singer", "concert", "guitar", "tune"],
}
FILLERS = ["the", "a", "we", "had", "some", "very", "good", "with", "and", "today", "my", "again", "often", "more"]
NUM_TRAIN, NUM_VALIDATION = 151, 37  # odd and prime: no batch, window or share comes out even
NUM_IMAGES, NUM_VALIDATION_IMAGES = 44, 13
NUM_TASK_TRAIN, NUM_TASK_VALIDATION = 45, 23


@dataclass(frozen=True)
class Material:
    """Paths of tiny models and data in one folder."""

    folder: Path
    bert: Path
    cnn_weights: Path
    train: Path
    validation: Path
    images: Path
    validation_images: Path

    def text(self, **changes: Any) -> dict[str, Any]:
        """A config of a 3-block BERT, embeddings and one block frozen, fp32, no dropout; `changes` by section."""
        base = {
            "model": {"name": str(self.bert), "dropout": 0.0},
            "data": {"train": str(self.train), "validation": str(self.validation)},
            "freeze": {"embeddings": True, "layers": "0"},
            "train": {"epochs": 2, "global_batch_size": 16, "micro_batch_size": 4, "lr": 2e-4, "precision": "fp32"},
            "track": {"wandb": "off"},
        }
        return _changed(base, changes)

    def task(self, label: str, **changes: Any) -> dict[str, Any]:
        """A config as `text` gives it, of rows with a label of another task: `topics` (a list), `score` or `tags`."""
        files = (str(self.folder / f"{name}.jsonl") for name in ("tasks", "tasks_validation"))
        data = dict(zip(("train", "validation"), files, strict=True))
        data |= {"text": "words" if label == "tags" else "text", "label": label}
        return _changed(self.text(data=data), changes)

    def image_task(self, label: str, **changes: Any) -> dict[str, Any]:
        """A config as `image` gives it, of rows with a label of another task: `colours` (a list) or `brightness`."""
        names = ("train", "images"), ("validation", "validation_images")
        data = {role: str(self.folder / f"{name}.jsonl") for role, name in names}
        return _changed(self.image(data={**data, "image": "file", "label": label}), changes)

    def image(self, **changes: Any) -> dict[str, Any]:
        """A config of a small ResNet, stem, two stages and every BatchNorm frozen."""
        base = {
            "model": {"name": "timm:test_resnet", "weights": str(self.cnn_weights)},
            "data": {
                "train": str(self.images), "validation": str(self.validation_images), "image_size": 32, "num_workers": 0
            },
            "freeze": {
                "embeddings": True, "layers": "0-1", "patterns": ["*.bn1.*", "*.bn2.*", "*.bn3.*", "*.downsample.2.*"]
            },
            "train": {"epochs": 7, "global_batch_size": 16, "micro_batch_size": 4, "lr": 2e-4, "precision": "fp32"},
            "track": {"wandb": "off"},
        }  # fmt: skip
        return _changed(base, changes)


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        keep = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if keep else value
    return merged


def write_material(folder: Path) -> Material:
    """Writes everything that a config of `Material` names into `folder`."""
    bert, cnn = folder / "bert", folder / "cnn.safetensors"
    texts, images = (folder / "train.csv", folder / "validation.csv"), (folder / "images", folder / "validation_images")
    _write_bert(bert)
    _write_cnn(cnn)
    for seed, (path, num_rows) in enumerate(zip(texts, (NUM_TRAIN, NUM_VALIDATION), strict=True)):
        write_sentences(path, num_rows, seed)
    for seed, (path, num_images) in enumerate(zip(images, (NUM_IMAGES, NUM_VALIDATION_IMAGES), strict=True)):
        write_images(path, num_images, seed)
        write_image_rows(path)
    for seed, (name, num_rows) in enumerate((("tasks", NUM_TASK_TRAIN), ("tasks_validation", NUM_TASK_VALIDATION))):
        write_task_rows(folder / f"{name}.jsonl", num_rows, seed)
    return Material(folder, bert, cnn, *texts, *images)


def _write_bert(folder: Path) -> None:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *(w for topic in TOPICS.values() for w in topic)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, classifier_dropout=0.0,
        hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def _write_cnn(path: Path) -> None:
    """Weights whose BatchNorm statistics are not those of a fresh model, so that a frozen one can be told by them."""
    torch.manual_seed(1)
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(1234)
    save_file(state, path)


def write_sentences(path: Path, num_rows: int, seed: int) -> None:
    """Sentences of 2 to 24 words about a topic; all differ."""
    draw, topics = random.Random(seed), list(TOPICS)
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        topic = topics[len(rows) % len(topics)]
        words = draw.sample(TOPICS[topic], 2) + draw.choices(FILLERS, k=draw.randint(0, 22))
        draw.shuffle(words)
        rows.setdefault(" ".join([*words, str(seed)]), topic)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows.items()])


def task_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows of 1 to 20 words, some of them several tokens long, about none to three topics: `words` and `tags` (BIO),
    `text`, `topics` (a list) and `score` (a real number)."""
    draw, rows = random.Random(seed), []
    while len(rows) < num_rows:
        words, tags = [], []
        topics = draw.sample(list(TOPICS), draw.randint(0, 3))
        for _ in range(draw.randint(1, 7)):
            if topics and draw.random() < 0.5:
                topic = draw.choice(topics)
                words += draw.sample(TOPICS[topic], draw.randint(1, 3))
                tags += [f"B-{topic}", f"I-{topic}", f"I-{topic}"][: len(words) - len(tags)]
            else:
                words.append("-".join(draw.choices(FILLERS, k=draw.randint(1, 3))))
                tags.append("O")
        found = sorted({tag[2:] for tag in tags if tag != "O"})
        score = len(found) + 0.25 * len(words) / 20 + draw.random() / 8
        rows.append({"words": words, "tags": tags, "text": " ".join(words), "topics": found, "score": score})
    return rows


def write_task_rows(path: Path, num_rows: int, seed: int) -> None:
    """`task_rows` as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in task_rows(num_rows, seed)), encoding="utf-8")


def write_images(folder: Path, num_images: int, seed: int) -> None:
    """Noise around a colour for each class, 40 x 48 pixels, so that they are resized and cropped."""
    rng = np.random.default_rng(seed)
    for i in range(num_images):
        name, colour = list({"red": (180, 60, 60), "green": (60, 180, 60), "blue": (60, 60, 180)}.items())[i % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.clip(rng.normal(colour, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{i:03}.png")


def write_image_rows(folder: Path) -> None:
    """<folder>.jsonl with a row for each image: its `file`, the `colours` that it has more than half of, and its
    `brightness`, a real number."""
    rows = []
    for path in sorted(folder.rglob("*.png")):
        means = np.asarray(Image.open(path)).reshape(-1, 3).mean(0) / 255
        colours = [name for name, mean in zip(("red", "green", "blue"), means, strict=True) if mean > 0.45]
        colours += ["bright"] if means.mean() > 0.405 else []
        rows.append({"file": str(path), "colours": colours, "brightness": float(means.mean())})
    folder.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
