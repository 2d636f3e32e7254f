"""A model that trains like any other until a fault that a test asks for: `model.name: faulty_model:build`.

The environment variable FAULT holds JSON {"kind", "rank", "call", "marker"}: what happens at which training pass of
which rank, once where a `marker` file is named. SLOW_S makes each training pass take longer, SLOW_EVAL_S all others, so
that a signal meets a run in its middle, and SLOW_CLOSE_S what closes W&B.
"""

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from dist_finetune.tracking import WandbRun

FAULT = json.loads(os.environ.get("FAULT", "null"))
SLOW_S, SLOW_EVAL_S, SLOW_CLOSE_S = (
    float(os.environ.get(name, "0")) for name in ("SLOW_S", "SLOW_EVAL_S", "SLOW_CLOSE_S")
)


class Faulty(nn.Module):
    """Mean of word vectors, dropout, two layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(2000, 32)
        self.inner = nn.Linear(32, 64)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, num_classes)
        self.num_calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_calls += 1
        time.sleep(SLOW_S if self.training else SLOW_EVAL_S)
        mask = attention_mask.unsqueeze(-1).float()
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(self.dropout(torch.relu(self.inner(mean))))
        return logits * self.fault()

    def fault(self) -> float:
        """1, unless it is time for the fault."""
        if (
            not FAULT
            or not self.training
            or (self.num_calls, int(os.environ.get("RANK", 0))) != (FAULT["call"], FAULT["rank"])
        ):
            return 1.0
        if FAULT.get("marker"):
            marker = Path(FAULT["marker"])
            if marker.exists():
                return 1.0
            marker.touch()
        if FAULT["kind"] == "raise":
            raise ValueError("the fault that was asked for")
        if FAULT["kind"] == "hang":
            time.sleep(600)
        if FAULT["kind"] == "kill":
            os.kill(os.getpid(), 9)
        return float("nan") if FAULT["kind"] == "nan" else 1.0


def build(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return Faulty(num_classes)


if SLOW_CLOSE_S:
    _close = WandbRun.finish
    WandbRun.finish = lambda *words: (time.sleep(SLOW_CLOSE_S), _close(*words))[1]  # type: ignore[method-assign]


build.tokenizer = os.environ.get("FAULTY_TOKENIZER", "")  # type: ignore[attr-defined]
