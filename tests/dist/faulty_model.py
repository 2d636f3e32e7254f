"""A model that trains like any other until a fault that a test asks for: `model.name: faulty_model:build`.

The environment variable FAULT holds JSON {"kind", "rank", "call", "marker"}, or a list of such: what happens at which
training pass of which rank, once where a `marker` file is named. SLOW_S makes each training pass take longer,
SLOW_EVAL_S all others, so that a signal meets a run in its middle, and SLOW_CLOSE_S what closes W&B.
"""

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from dist_finetune.tracking import WandbRun

FAULT = json.loads(os.environ.get("FAULT", "[]"))
FAULTS = FAULT if isinstance(FAULT, list) else [FAULT]
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
        """1, unless it is time for a fault."""
        here = (self.num_calls, int(os.environ.get("RANK", 0)))
        fault = next((f for f in FAULTS if self.training and (f["call"], f["rank"]) == here), None)
        if fault is None:
            return 1.0
        if fault.get("marker"):
            marker = Path(fault["marker"])
            if marker.exists():
                return 1.0
            marker.touch()
        if fault["kind"] == "raise":
            raise ValueError("the fault that was asked for")
        if fault["kind"] == "memory":
            torch.empty(2**50)
        if fault["kind"] == "hang":
            time.sleep(600)
        if fault["kind"] == "kill":
            os.kill(os.getpid(), 9)
        return float("nan") if fault["kind"] == "nan" else 1.0


def build(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return Faulty(num_classes)


if SLOW_CLOSE_S:
    _close = WandbRun.finish
    WandbRun.finish = lambda *words: (time.sleep(SLOW_CLOSE_S), _close(*words))[1]  # type: ignore[method-assign]


build.tokenizer = os.environ.get("FAULTY_TOKENIZER", "")  # type: ignore[attr-defined]
