"""The ranks of a machine share the reading of image files, and find what one process finds."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import read_json, run_ranks, write_config
from material import Material

from dist_finetune.data.tables import read_tables
from dist_finetune.spec import DataSpec

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("images_worker.py")


@pytest.fixture
def images(material: Material, tmp_path: Path) -> Path:
    return Path(shutil.copytree(material.images, tmp_path / "images"))


def by_rank(images: Path, num_processes: int, ranks_a_machine: int) -> list[dict[str, Any]]:
    folder = images.parent
    parts = {"model": {"name": "timm:no_such_model"}, "data": {"train": str(images)}}
    config = write_config(folder / "job.yaml", parts, name="job", output=str(folder / "runs"))
    done = run_ranks(num_processes, WORKER, [config, folder / "found", ranks_a_machine], 120, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [read_json(folder / f"found.{rank}") for rank in range(num_processes)]


def test_each_file_is_read_once_a_machine_and_decoded_once(images: Path) -> None:
    tables = read_tables(DataSpec(train=str(images)), 0)
    num = len(tables.train) + len(tables.validation)
    found = by_rank(images, 4, 2)
    assert {rank["fingerprint"] for rank in found} == {tables.fingerprint}
    counts = [rank["counts"] for rank in found]
    assert [sum(c["read"] for c in counts[first : first + 2]) for first in (0, 2)] == [num, num]
    assert max(c["read"] for c in counts) == -(-num // 2)
    assert [c["decoded"] for c in counts] == [c["read"] for c in counts[:2]] + [0, 0]


def test_a_damaged_file_is_named_on_every_rank_whoever_read_it(images: Path) -> None:
    """Also by feature runs and advice."""
    damaged = sorted(images.rglob("*.*g"))[2:4]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:300])
    for rank in by_rank(images, 3, 3):
        assert len(rank["errors"]) == 3
        for message in rank["errors"]:
            assert [line.split(": ")[1] for line in message.splitlines()] == [str(path) for path in damaged]
            assert message.count("a damaged image file") == 2
