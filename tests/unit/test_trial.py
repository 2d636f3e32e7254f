"""`micro_batch_size: auto` tried out: what a trial holds, and what follows where it says nothing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dist_finetune import trial
from dist_finetune.errors import PlanError
from dist_finetune.plan import Plan, make_plan
from dist_finetune.spec import LaunchSpec, Spec
from dist_finetune.topology import Topology
from dist_finetune.world import World, join_world


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A small BERT on two processes, under zero3."""
    folder = tmp_path_factory.mktemp("trial")
    config = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 50, "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(40)))
    data = {"train": str(folder / "rows.csv"), "max_length": 8}
    train, shard = {"global_batch_size": 16}, {"strategy": "zero3"}
    spec = {"model": {"name": str(folder / "bert")}, "data": data, "train": train, "shard": shard, "name": "tried"}
    return make_plan(Spec.model_validate(spec), Topology(1, 2))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which joining sets
    with join_world(LaunchSpec()) as alone:
        yield replace(alone, world_size=2)


@pytest.mark.parametrize(("strategy", "keeps"), [("zero3", False), ("fsdp", False), ("ddp", True)])
def test_gradients_that_are_cut_as_they_arrive_are_not_all_there_at_once(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, strategy: Any, keeps: bool
) -> None:
    made: list[nn.Module] = []
    build = trial._empty_model
    monkeypatch.setattr(trial, "_empty_model", lambda *args: made.append(build(*args)) or made[0])
    sharded = replace(plan, strategy=strategy, costs=replace(plan.costs, memory={strategy: plan.memory["zero3"]}))
    trial._pass(sharded, plan.phases[0], 2, torch.device("cpu"))
    assert {parameter.grad is not None for parameter in made[0].parameters()} == {keeps}


def test_a_whole_model_that_leaves_no_room_says_nothing_of_shards(
    plan: Plan, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _pass(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trial, "_pass", _pass)
    rows, untried = trial.tried_micro_batch(plan, world)
    assert rows == plan.batches.micro_batch_size
    assert untried == "the whole model, which a trial holds, leaves no room on a GPU"
    replicated = replace(plan, strategy="ddp", costs=replace(plan.costs, memory={"ddp": plan.memory["zero3"]}))
    with pytest.raises(PlanError, match="even a micro-batch of 1 does not fit"):
        trial.tried_micro_batch(replicated, world)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", (4, None)),
        ("FIND was unable to find an engine to execute this computation", (4, None)),
        ("Tensor on device meta is not on the expected device cuda:0!", (8, "RuntimeError: Tensor on device meta")),
    ],
)
def test_what_is_no_lack_of_memory_leaves_the_plans_word(
    plan: Plan, world: World, monkeypatch: pytest.MonkeyPatch, words: str, expected: tuple[int, str | None]
) -> None:
    def _pass(plan: Plan, phase: object, rows: int, device: object) -> None:
        if rows > 4:
            raise RuntimeError(words)

    monkeypatch.setattr(trial, "_pass", _pass)
    rows, untried = trial.tried_micro_batch(plan, world)
    assert (rows, untried and untried[:35]) == expected
