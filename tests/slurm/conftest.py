"""A real SLURM of two nodes on this machine, and configs of short jobs on it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import clean_environment
from material import Material, write_material
from slurm_cluster import SCRIPT, Cluster, WriteConfig

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; tests/run.sh installs them when run as root")
    if os.geteuid() != 0:
        pytest.skip("only root can start the daemons of a SLURM")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", folder], check=True, timeout=60)
    try:
        yield Cluster(folder, clean_environment(SLURM_CONF=str(folder / "slurm.conf")))
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=60)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def config(material: Material, tmp_path: Path) -> WriteConfig:
    """Writes the config of a run of a few seconds, on CPUs that the job asks for one each."""

    def write(name: str, folder: Path = tmp_path, **changes: Any) -> Path:
        slurm = {"time": "10 min", "cpus_per_process": 1, "max_requeues": 3} | changes.pop("slurm", {})
        content = material.text(launch={"slurm": slurm}, shard={"strategy": "zero2"}, **changes)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(json.dumps({**content, "name": name}), encoding="utf-8")
        return path

    return write
