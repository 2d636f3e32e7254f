"""`micro_batch_size: auto` is tried before it is used: what one rank can't hold, no rank takes."""

import json

import pytest
from harness import run_ranks, write_config

pytestmark = pytest.mark.dist

TRY = """
import json, resource, sys
from pathlib import Path
from dist_finetune.plan import make_plan
from dist_finetune.topology import local_topology
from dist_finetune.spec_file import load_spec
from dist_finetune.trial import _problem, tried_micro_batch
from dist_finetune.world import join_world

config, results, spare = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
spec = load_spec(str(config), [])
with join_world(spec.launch) as world:
    plan = make_plan(spec, local_topology(2))
    unlimited, _ = tried_micro_batch(plan, world)  # which also has everything imported that a pass needs
    if world.rank == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    error, rows = None, 0
    try:
        rows, _ = tried_micro_batch(plan, world)
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    above = world.rank == 1 and bool(rows) and _problem(plan, 2 * rows, world.device) is None
    found = [plan.batches.micro_batch_size, unlimited, rows, above, error]
    Path(f"{results}.{world.rank}").write_text(json.dumps(found))
"""


def try_out(material, tmp_path, spare_mib: int, global_batch_size: int, image_size: int) -> list[list]:
    """What both ranks found, rank 1 with so much memory to spare."""
    train = {"global_batch_size": global_batch_size, "micro_batch_size": "auto"}
    config = write_config(tmp_path / "c.yaml", material.image(train=train, data={"image_size": image_size}), name="t")
    (tmp_path / "try.py").write_text(TRY)
    done = run_ranks(2, tmp_path / "try.py", [config, tmp_path / "out", spare_mib * 2**20], 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1)]


def test_a_micro_batch_that_one_rank_cannot_hold_is_backed_off_on_all(material, tmp_path):
    first, second = try_out(material, tmp_path, 192, 64, 512)
    planned, unlimited, rows, _, error = first
    assert (planned, unlimited, error) == (32, 32, None)
    assert second[:3] == first[:3]
    assert rows in (1, 2, 4, 8, 16)
    assert second[3] is False  # it is the largest that runs


@pytest.mark.slow
def test_where_nothing_fits_every_rank_says_so(material, tmp_path):
    for _, _, _, _, error in try_out(material, tmp_path, 24, 2, 2048):
        assert error.startswith("PlanError: even a micro-batch of 1 does not fit")
        assert "shard.strategy" in error
