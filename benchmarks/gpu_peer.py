#!/usr/bin/env python3
"""What a user would pick instead on GPUs: transformers.Trainer for texts, a loop around timm for images, both in bf16.

Run under torchrun by peers.py. `--frozen` takes beginnings of parameter names; frozen BatchNorm does not update.
Without a GPU it does the same on the CPU, to be tried. Rank 0 prints one line of JSON: seconds of training without
loading, accuracy, and the most memory that it held.
"""

import argparse
import contextlib
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
WORKERS = 8 if CUDA else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["text", "image"])
    parser.add_argument("--model", required=True, help="a folder of transformers' format, or a name of timm's")
    parser.add_argument("--weights", help="of timm's model; left out: random")
    parser.add_argument("--train", required=True, help=".jsonl of sentence and label, or a folder of class folders")
    parser.add_argument("--validation", required=True)
    parser.add_argument("--frozen", nargs="*", default=[])
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="rows a rank")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group-by-length", action="store_true")
    given = parser.parse_args()
    if CUDA:
        torch.cuda.set_device(DEVICE)
    train_s, accuracy = texts(given) if given.kind == "text" else images(given)
    if int(os.environ["RANK"]) == 0:
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = torch.cuda.max_memory_allocated() / 2**20 if CUDA else peak_kib / 2**10
        print(json.dumps({"peer": given.kind, "train_s": train_s, "accuracy": accuracy, "peak_rss_mib": peak}))
    dist.destroy_process_group()


def freeze(model: nn.Module, frozen: list[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(tuple(frozen))


def texts(given: argparse.Namespace) -> tuple[float, float]:
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(given.model)

    def read(path: str) -> Any:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=128)
        return Dataset.from_dict({**encoded, "label": [row["label"] for row in rows]})

    train, validation = read(given.train), read(given.validation)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    freeze(model, given.frozen)
    arguments = TrainingArguments(
        output_dir="trainer_out",
        per_device_train_batch_size=given.batch,
        per_device_eval_batch_size=4 * given.batch,
        num_train_epochs=given.epochs,
        learning_rate=given.lr,
        bf16=True,
        seed=given.seed,
        use_cpu=not CUDA,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **({"train_sampling_strategy": "group_by_length"} if given.group_by_length else {}),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=lambda told: {"accuracy": float((told.predictions.argmax(-1) == told.label_ids).mean())},
    )
    started = time.perf_counter()
    trainer.train()
    train_s = time.perf_counter() - started  # Trainer reads the loss last, and so waits for the device
    return train_s, trainer.evaluate()["eval_accuracy"]


def images(given: argparse.Namespace) -> tuple[float, float]:
    import timm
    import timm.data
    from torch.utils.data import DataLoader, DistributedSampler
    from torchvision.datasets import ImageFolder

    dist.init_process_group("nccl" if CUDA else "gloo")
    torch.manual_seed(given.seed)
    model = timm.create_model(given.model, checkpoint_path=given.weights or "")
    model.reset_classifier(2)
    freeze(model, given.frozen)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    train, validation = (ImageFolder(folder, transform) for folder in (given.train, given.validation))
    sampler: Any = DistributedSampler(train, seed=given.seed)
    options: Any = {"num_workers": WORKERS, "pin_memory": CUDA, "persistent_workers": WORKERS > 0}
    loader = DataLoader(train, given.batch, sampler=sampler, **options)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[DEVICE] if CUDA else None)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=given.lr, fused=CUDA)
    started = time.perf_counter()
    for epoch in range(given.epochs):
        sampler.set_epoch(epoch)
        ddp.train()
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and f"{name}.".startswith(tuple(given.frozen)):
                module.eval()
        for inputs, labels in loader:
            with in_bf16():
                logits = ddp(moved(inputs))
            nn.functional.cross_entropy(logits.float(), labels.to(DEVICE)).backward()
            optimizer.step()
            optimizer.zero_grad()
    if CUDA:
        torch.cuda.synchronize()
    train_s = time.perf_counter() - started
    model.eval()
    right = np.zeros(0, bool)
    with torch.no_grad(), in_bf16():  # all of it on each rank: outside of what is timed
        for inputs, labels in DataLoader(validation, 4 * given.batch, num_workers=WORKERS):
            right = np.append(right, model(moved(inputs)).argmax(1).cpu() == labels)
    return train_s, float(right.mean())


def in_bf16() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def moved(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.to(DEVICE, non_blocking=True, memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
