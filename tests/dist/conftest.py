"""Fixtures that many tests share, so that models, data and the start-up of processes are paid once a session."""

import functools
from itertools import product

import pytest
from harness import MATRIX, Job, Matrix, Run, RunJobs, finish, ten_steps, torchrun, train_jobs
from material import Material, write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RunJobs:
    """`runs(jobs, num_processes)`: as `train_jobs`, in a folder of its own; a run that ended with an error fails."""

    def train(jobs: list[Job], num_processes: int, *, may_fail: bool = False, **env: str) -> dict[str, Run]:
        done = train_jobs(jobs, num_processes, tmp_path_factory.mktemp(f"world{num_processes}-"), **env)
        errors = {name: run.by_rank for name, run in done.items() if any("error" in rank for rank in run.by_rank)}
        assert may_fail or not errors, errors
        return done

    return train


@pytest.fixture(scope="session")
def by_torchrun(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`ten_steps` by a real torchrun on 2 processes, which every other launcher is compared with."""
    folder = tmp_path_factory.mktemp("by_torchrun")
    config = ten_steps(material, folder, "torchrun")
    done = finish([*torchrun(2), "-m", "dist_finetune", "train", str(config)], 200, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder / "runs" / "torchrun", ())


@pytest.fixture(scope="session")
def matrix(material: Material, runs: RunJobs) -> Matrix:
    """20 optimizer steps of a BERT that holds its frozen part, and 21 of a CNN without it, each in seven ways."""
    found: dict[str, Run] = {}
    for num_processes in (1, 2):
        strategies = [strategy for n, strategy in MATRIX if n == num_processes]
        kinds = {"text": functools.partial(material.text, cache="off"), "image": material.image}
        found |= runs(
            [
                Job(f"{kind}-{num_processes}-{strategy}", kinds[kind](shard={"strategy": strategy}))
                for kind, strategy in product(kinds, strategies)
            ],
            num_processes,
        )
    keys = [f"{num_processes}-{strategy}" for num_processes, strategy in MATRIX]
    return Matrix(*({key: found[f"{kind}-{key}"] for key in keys} for kind in ("text", "image")))
