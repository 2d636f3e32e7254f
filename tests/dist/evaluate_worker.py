"""One rank of an evaluation of every task: evaluate_worker.py OUT. The model is a table, whose logits no batch rounds
otherwise; each rank writes OUT.RANK: metrics, and what it holds of the logits, in hexadecimal."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_finetune.data.loading import Rows
from dist_finetune.evaluate import evaluate
from dist_finetune.spec import LaunchSpec
from dist_finetune.tasks.names import TaskName
from dist_finetune.world import join_world

NUM_ROWS, CLASSES = 37, ("O", "B-a", "I-a")
NUM_WORDS = np.arange(NUM_ROWS, dtype=np.int64) % 4 + 1


class TableModel:
    """Logits of a row, or of each of its words, by its number."""

    def __init__(self, num_outputs: int) -> None:
        torch.manual_seed(0)
        self.module = nn.Embedding(NUM_ROWS * 4, num_outputs)

    @torch.no_grad()
    def predict(self, inputs: Any) -> torch.Tensor:
        return self.module(inputs)


def rows_of(task: TaskName) -> Rows:
    drawn = torch.Generator().manual_seed(1)
    tags = torch.randint(0, len(CLASSES), (NUM_ROWS, 4), generator=drawn)
    several, numbers = (tags[:, :3] > 1).float(), torch.randn(NUM_ROWS, generator=drawn)
    labels = {"classification": tags[:, 0], "multilabel": several, "regression": numbers}
    if task != "token-classification":
        return Rows(
            range(NUM_ROWS),  # type: ignore[arg-type]
            lambda ids: {"inputs": torch.tensor(ids), "labels": labels[task][ids]},
            None,
            task=task,
            classes=CLASSES,
        )

    def collate(ids: list[int]) -> dict[str, torch.Tensor]:
        is_word = torch.arange(4) < torch.from_numpy(NUM_WORDS)[ids][:, None]
        places = torch.tensor(ids)[:, None] * 4 + torch.arange(4)
        return {"inputs": places, "labels": tags[ids].where(is_word, torch.tensor(-100))}

    return Rows(range(NUM_ROWS), collate, None, task=task, classes=CLASSES, num_targets=NUM_WORDS)  # type: ignore[arg-type]


def main() -> None:
    out = Path(sys.argv[1])
    found = {}
    tasks: tuple[TaskName, ...] = ("classification", "multilabel", "regression", "token-classification")
    with join_world(LaunchSpec()) as world:
        for task in tasks:
            result = evaluate(TableModel(1 if task == "regression" else 3), rows_of(task), 4, world)
            held = {name: getattr(result, name) for name in ("logits", "labels", "rows")}
            numbers = {name: tensor.numpy().tobytes().hex() for name, tensor in held.items()}
            found[task] = {"metrics": {key: value.hex() for key, value in result.metrics.items()}, **numbers}
    out.with_name(f"{out.name}.{world.rank}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
