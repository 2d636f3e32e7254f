"""Training from stored activations: the same numbers as without, the export complete, the store shared by runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, Run, RunJobs, read_lines
from material import Material, write_sentences

from dist_finetune.cache.tokens import STORE_FROM_ROWS

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pairs(material: Material, runs: RunJobs, shared_cache: Path) -> dict[str, Run]:
    jobs = []
    for kind, config in (("text", material.text()), ("image", material.image())):
        for strategy in STRATEGIES:
            jobs += [
                Job(f"{kind}-{strategy}-{mode}", {**config, "shard": {"strategy": strategy}, "cache": mode})
                for mode in ("off", "on")
            ]
    jobs.append(Job("two", elsewhere(material, shared_cache)))
    views = material.image(data={"augment": True}, train={"epochs": 3})
    jobs.append(Job("views", {**views, "cache": {"mode": "on", "views": 2}, "shard": {"strategy": "ddp"}}))
    jobs += [Job(f"large-{number}", large(material, shared_cache)) for number in (1, 2)]
    return runs(jobs, 2)


def elsewhere(material: Material, cache: Path) -> dict[str, Any]:
    return {**material.text(), "cache": {"mode": "on", "folder": str(cache)}, "shard": {"strategy": "ddp"}}


def large(material: Material, cache: Path) -> dict[str, Any]:
    """Two steps on a data set that is large enough for its tokens to be kept."""
    if not (cache / "rows.csv").exists():
        write_sentences(cache / "rows.csv", STORE_FROM_ROWS, seed=7)
    config = material.text(data={"train": str(cache / "rows.csv")}, train={"max_steps": 2})
    return {**config, "cache": {"mode": "off", "folder": str(cache / "tokens")}, "shard": {"strategy": "ddp"}}


@pytest.mark.parametrize(("kind", "tolerance"), [("text", 1e-6), ("image", 1e-5)])
def test_losses_are_those_of_the_plain_run(pairs: dict[str, Run], kind: str, tolerance: float) -> None:
    for strategy in STRATEGIES:
        plain, cached = pairs[f"{kind}-{strategy}-off"], pairs[f"{kind}-{strategy}-on"]
        assert "cache built" in log_of(cached) or "cache reused" in log_of(cached)
        assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=tolerance)
        assert cached.series("eval/accuracy") == plain.series("eval/accuracy")


def test_the_export_is_complete_and_frozen_tensors_are_the_sources(pairs: dict[str, Run]) -> None:
    for name in (f"{kind}-{strategy}" for kind in ("text", "image") for strategy in STRATEGIES):
        plain, cached = pairs[f"{name}-off"], pairs[f"{name}-on"]
        assert list(plain.weights()) == list(cached.weights())
        assert cached.summary["frozen_verified"] == plain.summary["frozen_verified"]
        exported = plain.weights()
        for key, value in cached.weights().items():
            if key in cached.summary["frozen_verified"]:
                assert torch.equal(value, exported[key]), f"{name}: {key}"


def test_a_second_run_reuses_what_the_first_stored(pairs: dict[str, Run]) -> None:
    """One key for every strategy: a sweep pays for the prefix once."""
    logs = [log_of(pairs[f"text-{strategy}-on"]) for strategy in STRATEGIES]
    assert "cache built" in logs[0]
    assert all("cache reused" in log for log in logs[1:])


def test_an_entry_is_readable_at_another_world_size(
    pairs: dict[str, Run], material: Material, runs: RunJobs, shared_cache: Path
) -> None:
    one = runs([Job("one", elsewhere(material, shared_cache))], 1)["one"]
    assert "cache reused" in log_of(one)
    assert one.series("train/loss") == pytest.approx(pairs["two"].series("train/loss"), rel=1e-5)


def test_views_of_augmented_images_cycle(pairs: dict[str, Run]) -> None:
    assert "cache built" in log_of(pairs["views"])
    assert len(read_lines(pairs["views"].folder / "metrics.jsonl")) > 0


def test_tokens_of_a_large_data_set_are_kept(pairs: dict[str, Run], shared_cache: Path) -> None:
    (entry,) = (shared_cache / "tokens").iterdir()
    first, second = pairs["large-1"], pairs["large-2"]
    assert entry.name.startswith("tokens-")
    assert (entry / "input_ids.npy").stat().st_mtime < (first.folder / "plan.json").stat().st_mtime
    assert first.series("train/loss") == second.series("train/loss")
    assert len(first.series("train/loss")) == 2


def log_of(run: Run) -> str:
    return (run.folder / "log.txt").read_text(encoding="utf-8")
