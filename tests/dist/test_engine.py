"""Partitions of all ranks together hold each trainable element once, the padding that was stated, and nothing else."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from harness import STRATEGIES, read_json, run_ranks, write_config
from material import Material

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("engine_worker.py")
ALIGNMENT = 64
"""No engine pads a group to more elements than this for each rank."""


@pytest.fixture(scope="module")
def held(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """For 1 and 2 processes what each rank holds, by strategy; three groups: decayed, not decayed, the head's."""
    folder = tmp_path_factory.mktemp("held")
    text = material.text(train={"head_lr": 1e-3}, cache="off")
    config = write_config(folder / "held.yaml", text, output=str(folder / "runs"))
    for n in (1, 2):
        done = run_ranks(n, WORKER, [config, folder / f"{n}.json", *STRATEGIES], 400, folder)
        assert done.returncode == 0, done.stderr[-5000:]
    return {n: [read_json(folder / f"{n}.json.{rank}") for rank in range(n)] for n in (1, 2)}


WAYS = list(itertools.product((1, 2), STRATEGIES))


@pytest.mark.parametrize(("num_processes", "strategy"), WAYS)
def test_every_trainable_element_has_one_owner(
    held: dict[int, list[dict[str, Any]]], num_processes: int, strategy: str
) -> None:
    ranks = [rank[strategy] for rank in held[num_processes]]
    sizes = {name: ranks[0]["sizes"][name] for name in ranks[0]["trainable"]}
    owners = ranks[:1] if strategy == "ddp" else ranks  # under ddp each rank has it all
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for rank in owners:
        for name, offset, length, moments in rank["fragments"]:
            assert moments == [length, length]
            spans[name].append((offset, offset + length))  # KeyError: something frozen is held
    for name, size in sizes.items():
        edges = sorted(spans[name])
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])], name
        assert edges[-1][1] == size, name
    if strategy == "ddp":
        assert all(rank["fragments"] == ranks[0]["fragments"] for rank in ranks)


@pytest.mark.parametrize(("num_processes", "strategy"), WAYS)
def test_counts_are_the_plans_and_padding(
    held: dict[int, list[dict[str, Any]]], num_processes: int, strategy: str
) -> None:
    ranks = [rank[strategy] for rank in held[num_processes]]
    trainable = sum(ranks[0]["sizes"][name] for name in ranks[0]["trainable"])
    assert 0 < trainable < sum(ranks[0]["sizes"].values())
    if strategy == "ddp":
        assert {(rank["optimizer"], rank["gradients"], rank["padding"]) for rank in ranks} == {
            (trainable, trainable, 0)
        }
        return
    padding = round(sum(rank["padding"] for rank in ranks))
    assert sum(rank["optimizer"] for rank in ranks) == trainable + padding
    assert sum(rank["gradients"] for rank in ranks) == trainable + padding
    assert 0 <= padding <= ALIGNMENT * num_processes * len(ranks[0]["trainable"])
    assert max(rank["optimizer"] for rank in ranks) < trainable or num_processes == 1


@pytest.mark.parametrize(("num_processes", "strategy"), WAYS)
def test_predictions_come_without_autograd(
    held: dict[int, list[dict[str, Any]]], num_processes: int, strategy: str
) -> None:
    """In inference mode where weights lie whole; those that are gathered for a pass can't be inference tensors."""
    for rank in held[num_processes]:
        assert (rank[strategy]["inference"], rank[strategy]["graph"]) == (strategy not in ("zero3", "fsdp"), False)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_no_whole_tensor_of_the_load_outlives_sharding(held: dict[int, list[dict[str, Any]]], strategy: str) -> None:
    """A process that reads alone maps nothing; of a node's shared tensors stay those that each rank keeps whole."""
    assert held[1][0][strategy]["mapped"] == 0
    for rank in held[2]:
        found = rank[strategy]
        whole = found["buffers"] + (found["replicated"] if strategy == "fsdp" else 0)
        assert found["mapped"] <= whole < len(found["sizes"])


@pytest.mark.parametrize(("num_processes", "strategy"), WAYS)
def test_nothing_outlives_an_engine(held: dict[int, list[dict[str, Any]]], num_processes: int, strategy: str) -> None:
    """Weights and moments go as it is closed: those of the next phase need the room."""
    for rank in held[num_processes]:
        assert rank[strategy]["held"] > len(rank[strategy]["trainable"])
        assert rank[strategy]["left"] == 0


@pytest.mark.parametrize(("num_processes", "strategy"), WAYS)
def test_the_check_refuses_what_another_freeze_would_hold(
    held: dict[int, list[dict[str, Any]]], num_processes: int, strategy: str
) -> None:
    for rank in held[num_processes]:
        assert "partitions other parameters than the plan trains" in rank[strategy]["refusal"]
        assert "bert." in rank[strategy]["refusal"]
