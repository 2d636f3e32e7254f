"""Bytes on the wire: what two processes send in a real step is what the plan says, for every strategy."""

from pathlib import Path
from typing import Any

import pytest
from harness import STRATEGIES, read_json, run_ranks, write_config
from material import Material

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("traffic_worker.py")
WORLD_SIZE = 2
SENT_OF_WHOLE = {
    "c10d::allreduce_": 2 * (WORLD_SIZE - 1) / WORLD_SIZE,
    "c10d::_allgather_base_": (WORLD_SIZE - 1) / WORLD_SIZE,
    "c10d::_reduce_scatter_base_": (WORLD_SIZE - 1) / WORLD_SIZE,
}
"""Share of a collective's bytes that one rank sends in a ring; another collective in a step fails the test."""
FEW = 32
"""Bytes that a step may send for single numbers: gradient norms, overflow."""


@pytest.fixture(scope="module", params=[4, 8], ids=["two micro-batches", "one micro-batch"])
def ranks(
    request: pytest.FixtureRequest, material: Material, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank sent, by strategy. The cache is off: with it, frozen weights are neither held nor gathered."""
    folder = tmp_path_factory.mktemp("traffic")
    config = material.text(train={"micro_batch_size": request.param}, cache="off")
    path = write_config(folder / "traffic.yaml", config, output=str(folder / "runs"))
    done = run_ranks(WORLD_SIZE, WORKER, [path, folder / "sent.json", *STRATEGIES], 400, folder)
    assert done.returncode == 0, done.stderr[-5000:]
    return [read_json(folder / f"sent.json.{rank}") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_sends_what_the_plan_says(ranks: list[dict[str, Any]], strategy: str) -> None:
    for found in (rank[strategy] for rank in ranks):
        assert found["taken"] == [found["micro_batches"]] * len(found["taken"])
        # at first DDP says how it laid out its buckets, and ZeRO-3 learns the order of weights over two passes or three
        settled = found["steps"][3:]
        assert len(settled) == 2
        for step in settled:
            sent = sum(size * SENT_OF_WHOLE[name] for name, size in step)
            # shares are padded to be even: never less than planned, and hardly more
            assert found["planned"] <= sent <= 1.005 * found["planned"] + FEW


def test_fsdp_gathers_a_block_at_a_time(ranks: list[dict[str, Any]]) -> None:
    """All in one group would send as many bytes, and hold the whole model at once."""
    for found in (rank["fsdp"] for rank in ranks):
        gathered = [size for name, size in found["steps"][-1] if name == "c10d::_allgather_base_"]
        assert len(gathered) >= 3 * found["micro_batches"]  # two blocks and the head train
        assert max(gathered) < sum(gathered) / 2 / found["micro_batches"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_micro_batch_waits_for_a_number(ranks: list[dict[str, Any]], strategy: str) -> None:
    """Nothing in a step reads one but the model, which asks whether its mask has padding."""
    for found in (rank[strategy] for rank in ranks):
        assert found["reads"] == [found["reads_of_model"] * taken for taken in found["taken"]]
        assert found["reads_of_model"] <= 1
