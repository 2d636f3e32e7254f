"""Material on disk and the config of a case: what it trains, on what, and in which folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from material import FILLERS, TOPICS, Material, write_images, write_material, write_sentences, write_task_rows
from transformers import BertConfig, BertModel, BertTokenizerFast

from invariance.cases import LARGE_STEPS, ROWS, SMALL, SMALL_STEPS, Case, reference_of

NUM_VALIDATION = 13
"""Rows that are evaluated five times a run: few, and at 2 and 4 processes not the same number on each."""
# Equal numbers are claimed where BatchNorm is frozen: which rows share a batch depends on the world size.
BATCH_NORMS = {
    "resnet": ["conv1.1.*", "conv1.4.*", "bn1.*", "*.bn1.*", "*.bn2.*", "*.bn3.*", "*.downsample.2.*"],
    "efficientnet": ["bn1.*", "bn2.*", "*.bn1.*", "*.bn2.*", "*.bn3.*"],
}


@dataclass(frozen=True)
class Inputs:
    """Folders that the configs of all cases read, and how many steps the large models take."""

    folder: Path
    bert: Path
    material: Material
    large_steps: int = LARGE_STEPS


def write_inputs(folder: Path) -> Inputs:
    """Writes a 4-block BERT, a small CNN's weights, texts and images into `folder`."""
    folder.mkdir(parents=True)
    material = write_material(folder)
    write_sentences(material.validation, NUM_VALIDATION, seed=1)
    write_task_rows(folder / "tasks_validation.jsonl", NUM_VALIDATION, seed=1)
    write_task_rows(folder / "tasks.jsonl", max(ROWS), seed=0)
    write_images(material.images, max(ROWS), seed=0)
    bert = folder / "bert4"
    bert.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *(w for topic in TOPICS.values() for w in topic)]
    (bert / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast.from_pretrained(bert).save_pretrained(bert)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=50,
        max_position_embeddings=40, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(bert)
    return Inputs(folder, bert, material)


def config_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The config of a case, without name and output."""
    changes, material = case.overrides(), inputs.material
    is_text = case.model in ("bert", "bert-tokens", "minilm")
    models: dict[str, dict[str, Any]] = {
        "bert": {"name": str(inputs.bert), "dropout": 0.0},
        "bert-tokens": {"name": str(inputs.bert), "dropout": 0.0},
        "minilm": {"name": "demo:minilm", "dropout": 0.0},
        "resnet": {"name": "timm:test_resnet", "weights": str(material.cnn_weights)},
        "efficientnet": {"name": "demo:efficientnet-lite0", "dropout": 0.0},
    }
    train, validation = (
        (material.train, material.validation) if is_text else (material.images, material.validation_images)
    )
    data: dict[str, Any] = {"train": str(train), "validation": str(validation), "max_rows": case.rows}
    if case.model == "bert-tokens":
        data |= material.task("tags")["data"]
    elif not is_text:
        data |= {"image_size": 32, "num_workers": 0}
    return {
        "model": models[case.model],
        "data": data,
        **_freeze(case.freeze, BATCH_NORMS.get(case.model)),
        "train": {
            **({} if case.freeze == "phases" else {"epochs": 20}),
            "max_steps": SMALL_STEPS if case.model in SMALL else inputs.large_steps,
            "global_batch_size": case.global_batch_size, "micro_batch_size": changes["micro"], "eval_batch_size": 8,
            "lr": 2e-4 if case.model in ("bert", "bert-tokens") else 5e-5, "precision": "fp32",
            "skip_unread": case != reference_of(case),
        },
        "shard": changes["shard"],
        "cache": "off",
        "checkpoint": {"every": "1000 steps", "keep": 1},
        "track": {"wandb": "off"},
        "launch": {"timeout": "3 min"},
    }  # fmt: skip


def _freeze(word: str, patterns: list[str] | None) -> dict[str, Any]:
    more = {"patterns": patterns} if patterns else {}
    rules: dict[str, dict[str, Any]] = {
        "none": {},
        "embeddings": {"embeddings": True},
        "prefix": {"embeddings": True, "layers": "first 2"},
        "1,2,3": {"layers": "1,2,3"},
        "norms": {"rule": "norms"},
        "bias-only": {"rule": "bias-only"},
        "backbone": {"rule": "backbone"},
    }
    if word != "phases":
        return {"freeze": {**rules[word], **more}}
    head = {"name": "head", "freeze": {"rule": "backbone", **more}, "epochs": 2, "lr": 2e-4}
    rest = {"name": "all", "freeze": {**rules["embeddings"], **more}, "epochs": 20}
    return {"phases": [head, rest]}
