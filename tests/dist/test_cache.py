"""Training from stored activations: the same numbers as without, the export complete, the store shared by runs."""

import pytest
import torch
from harness import Job, Run, RunJobs, read_lines
from material import Material

pytestmark = pytest.mark.dist

STRATEGIES = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def pairs(material: Material, runs: RunJobs) -> dict[str, Run]:
    jobs = []
    for kind, config in (("text", material.text()), ("image", material.image())):
        for strategy in STRATEGIES:
            jobs += [
                Job(f"{kind}-{strategy}-{mode}", {**config, "shard": {"strategy": strategy}, "cache": mode})
                for mode in ("off", "on")
            ]
    return runs(jobs, 2)


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


def test_an_entry_is_readable_at_another_world_size(material: Material, runs: RunJobs, tmp_path: object) -> None:
    config = {**material.text(), "cache": {"mode": "on", "folder": str(tmp_path)}, "shard": {"strategy": "ddp"}}
    two = runs([Job("two", config)], 2)["two"]
    one = runs([Job("one", config)], 1)["one"]
    assert "cache reused" in log_of(one)
    assert one.series("train/loss") == pytest.approx(two.series("train/loss"), rel=1e-5)


def test_views_of_augmented_images_cycle(material: Material, runs: RunJobs) -> None:
    config = material.image(data={"augment": True}, train={"epochs": 3})
    config["cache"] = {"mode": "on", "views": 2}
    config["shard"] = {"strategy": "ddp"}
    run = runs([Job("views", config)], 2)["views"]
    assert "cache built" in log_of(run)
    assert len(read_lines(run.folder / "metrics.jsonl")) > 0


def log_of(run: Run) -> str:
    return (run.folder / "log.txt").read_text(encoding="utf-8")
