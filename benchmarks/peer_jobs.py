"""What is compared with peers: jobs, our config of each, and the peer's command."""

import csv
import json
import random
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_finetune.models.demo import efficientnet_file, minilm_folder

GROUPED = "Trainer, grouped by length"
MINILM, EFFICIENTNET, BERT_LARGE = "demo:minilm", "demo:efficientnet-lite0", "bert-large"
IMAGE_SIZE = 240
"""At 224 a head of EfficientNet is right on 0.947 of ants and bees, 0.008 up or down by its seed; at 240 on 0.96."""
NUM_BLOCKS = {MINILM: 6, EFFICIENTNET: 7, BERT_LARGE: 24, "resnet50": 4, "convnext_base": 4}
STAGES = {
    "resnet50": ("conv1. bn1.", "layer1.", "layer2.", "layer3.", "layer4."),
    "convnext_base": ("stem.", "stages.0.", "stages.1.", "stages.2.", "stages.3. head.norm."),
}
"""Beginnings of timm's names of the stem and of each stage, the last one with the neck."""


@dataclass(frozen=True)
class Job:
    """One comparison: how many of the model's first blocks are frozen, with what lies before them, and how long it
    trains. All blocks: the head trains alone (in a BERT with the pooler)."""

    model: str
    num_frozen: int
    epochs: int
    goals: dict[str, float]
    """Times faster than a peer that we mean to be."""
    lrs: tuple[float, ...] = ()
    """A sweep: the same job once for each, one after the other."""

    @property
    def is_text(self) -> bool:
        return self.model in (MINILM, BERT_LARGE)

    @property
    def on_gpus(self) -> bool:
        return not self.model.startswith("demo:")

    @property
    def freeze(self) -> Any:
        """In our words."""
        if self.num_frozen == 0:
            return "none"
        if not self.is_text and self.num_frozen == NUM_BLOCKS[self.model]:
            return "backbone"
        return {"embeddings": True, "layers": f"0-{self.num_frozen - 1}"}

    @property
    def frozen_names(self) -> list[str]:
        """Beginnings of the names of frozen parameters, for the peers on GPUs."""
        if self.num_frozen == 0:
            return []
        if self.is_text:
            return ["bert.embeddings.", *(f"bert.encoder.layer.{block}." for block in range(self.num_frozen))]
        return " ".join(STAGES[self.model][: 1 + self.num_frozen]).split()


def text(num_frozen: int, epochs: int, grouped: float, default: float, *lrs: float, model: str = MINILM) -> Job:
    return Job(model, num_frozen, epochs, {GROUPED: grouped, "Trainer": default}, lrs or (5e-5,))


def image(num_frozen: int, epochs: int, goal: float, model: str = EFFICIENTNET) -> Job:
    program = "timm loop" if model == EFFICIENTNET else "timm loop in bf16"
    return Job(model, num_frozen, epochs, {program: goal}, (1e-3,))


CPU_JOBS = {
    "text-4of6-3": text(4, 3, 1.7, 3.2),
    "image-head-5": image(7, 5, 1.0),
    "text-none-3": text(0, 3, 1.15, 2.0),
    "text-4of6-10": text(4, 10, 2.0, 4.0),
    "text-5of6-10": text(5, 10, 3.0, 5.0),
    "text-head-10": text(6, 10, 15.0, 28.0),
    "image-head-10": image(7, 10, 9.0),
    "image-5stages-10": image(5, 10, 2.0),
    "text-5of6-3-sweep": text(5, 3, 3.5, 6.0, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
}
GPU_JOBS = {
    "bert-large-none-3": text(0, 3, 1.0, 1.0, model=BERT_LARGE),
    "bert-large-16of24-3": text(16, 3, 1.0, 1.0, model=BERT_LARGE),
    "bert-large-16of24-10": text(16, 10, 1.0, 1.0, model=BERT_LARGE),
    "bert-large-20of24-10": text(20, 10, 1.0, 1.0, model=BERT_LARGE),
    "bert-large-head-10": text(24, 10, 1.0, 1.0, model=BERT_LARGE),
    "resnet50-none-10": image(0, 10, 1.0, model="resnet50"),
    "resnet50-3stages-10": image(3, 10, 1.0, model="resnet50"),
    "resnet50-head-10": image(4, 10, 1.0, model="resnet50"),
    "convnext_base-3stages-10": image(3, 10, 1.0, model="convnext_base"),
    "convnext_base-head-10": image(4, 10, 1.0, model="convnext_base"),
}
JOBS = {**CPU_JOBS, **GPU_JOBS}
MAIN = {False: ("text-4of6-3", "image-head-5"), True: ("bert-large-16of24-3", "resnet50-head-10")}
"""By whether there are GPUs."""


def config_of(job: Job, epochs: int, seed: int, lr: float, cache: Path, given: Namespace) -> dict[str, Any]:
    """Our config for a job: the peers' settings, their batch sizes, and no checkpoint before the last."""
    common = {"epochs": epochs, "lr": lr, "warmup": 0, "seed": seed, "precision": given.precision}
    batch = rows_a_rank(job) * given.processes
    if job.is_text:  # as Trainer's defaults have it
        config: dict[str, Any] = {
            "model": {"name": str(bert_large(given)) if job.on_gpus else MINILM},
            "data": {
                "train": str(given.out / "sst2-train.jsonl"),
                "validation": str(given.out / "sst2-test.jsonl"),
                "max_length": 128,
            },
            "train": {**common, "global_batch_size": batch, "weight_decay": 0.0},
        }
    else:
        data = given.shared / "data" / "hymenoptera"
        weights = {"name": f"timm:{job.model}", "weights": str(weights_of(job, given) or "none")}
        config = {
            "model": weights if job.on_gpus else {"name": EFFICIENTNET},
            "data": {"train": str(data / "train"), "validation": str(data / "val")},
            "train": {**common, "global_batch_size": batch, "schedule": "constant", "max_grad_norm": None},
        }
        if not job.on_gpus:
            config["data"]["image_size"] = IMAGE_SIZE
    return {
        **config,
        "freeze": job.freeze,
        "cache": {"folder": str(cache)},
        "checkpoint": {"every": f"{epochs} epochs"},
        "track": {"wandb": "off"},
        "output": str(given.out / "runs"),
    }


def peer_command(job: Job, program: str, epochs: int, seed: int, lr: float, given: Namespace) -> list[object]:
    """A peer under torchrun; it prints its numbers as one line of JSON."""
    here, data = Path(__file__).parent, given.shared / "data"
    command: list[object] = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.processes}",
    ]  # fmt: skip
    if job.on_gpus:
        command += [here / "gpu_peer.py", "text" if job.is_text else "image", "--batch", rows_a_rank(job)]
        command += ["--seed", seed]
        if job.is_text:
            command += ["--model", bert_large(given), "--train", given.out / "sst2-train.jsonl"]
            command += ["--validation", given.out / "sst2-test.jsonl"]
        else:
            command += ["--model", job.model, "--train", data / "hymenoptera/train"]
            command += ["--validation", data / "hymenoptera/val"]
            weights = weights_of(job, given)
            command += ["--weights", weights] if weights else []
        command += ["--frozen", *job.frozen_names]
    elif job.is_text:
        command += [given.shared / "peers/trainer_text.py", "--model", minilm_folder(), "--rows", given.rows]
        command += ["--train", data / "sst2/train.tsv", "--test", data / "sst2/test.tsv", "--seed", seed]
        command += ["--freeze-layers", job.num_frozen or -1]
    else:
        # Trainer has a way of its own to bf16, see `timed` of peers.py
        command += [here / "in_bf16.py"] if given.precision == "bf16" else []
        command += [given.shared / "peers/trainer_image.py", "--size", IMAGE_SIZE, "--weights", efficientnet_file()]
        command += ["--data", data / "hymenoptera", "--freeze-until", job.num_frozen or -1]
    command += ["--group-by-length"] if program == GROUPED else []
    return [*command, "--epochs", epochs, "--lr", lr]


def rows_a_rank(job: Job) -> int:
    return 32 if job.is_text else 16


def bert_large(given: Namespace) -> Path:
    """A folder of BERT-large with MiniLM's tokenizer, whose vocabulary is BERT's: the user's, or random weights, which
    take as long."""
    if given.gpu_models and (folder := given.gpu_models / BERT_LARGE).exists():
        return Path(folder)
    folder = Path(given.out / BERT_LARGE)
    if not (folder / "model.safetensors").exists():
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        BertForSequenceClassification(config).save_pretrained(folder)
        for file in minilm_folder().glob("*token*"):
            shutil.copy(file, folder)
        shutil.copy(minilm_folder() / "vocab.txt", folder)
    return folder


def weights_of(job: Job, given: Namespace) -> Path | None:
    """The user's weights of a CNN on GPUs; None: random ones."""
    file = given.gpu_models and given.gpu_models / f"{job.model}.safetensors"
    return Path(file) if file and file.exists() else None


def write_texts(given: Namespace) -> None:
    """The rows that the text peer takes of SST-2, in its order, as files for our config."""
    for source, target, limit in (("train.tsv", "sst2-train", given.rows), ("test.tsv", "sst2-test", 10**9)):
        with (given.shared / "data" / "sst2" / source).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        random.Random(0).shuffle(rows)
        lines = (json.dumps({"sentence": row["sentence"], "label": int(row["label"])}) for row in rows[:limit])
        (given.out / f"{target}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
