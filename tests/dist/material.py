"""Tiny models and data, made on the spot: a BERT folder with its vocabulary, weights of a CNN, texts, images."""

import csv
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


def write_images(folder: Path, num_images: int, seed: int) -> None:
    """Noise around a colour for each class, 40 x 48 pixels, so that they are resized and cropped."""
    rng = np.random.default_rng(seed)
    for i in range(num_images):
        name, colour = list({"red": (180, 60, 60), "green": (60, 180, 60), "blue": (60, 60, 180)}.items())[i % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.clip(rng.normal(colour, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
