"""Phases over processes: what a phase thaws trains, what goes on keeps its Adam state, at every strategy."""

import pytest
import torch
from harness import STRATEGIES, Job, Run, RunJobs, read_json
from material import Material

pytestmark = pytest.mark.dist

PHASES = [
    {"name": "head", "freeze": "backbone", "epochs": 1, "lr": 1e-3},
    {"name": "top", "freeze": {"embeddings": True, "layers": "0-1"}, "epochs": 1},
    {"name": "again-less", "freeze": "backbone", "epochs": 1},
]


@pytest.fixture(scope="module")
def phased(material: Material, runs: RunJobs) -> dict[str, Run]:
    config = material.text(freeze=None, phases=PHASES, train={"epochs": 3})
    jobs = [Job(s, {**config, "shard": {"strategy": s}, "cache": "off"}) for s in STRATEGIES]
    jobs.append(Job("cached", {**config, "shard": {"strategy": "zero2"}, "cache": "on"}))
    return runs(jobs, 2)


def test_losses_and_weights_are_the_same_at_every_strategy(phased: dict[str, Run]) -> None:
    expected, weights = phased["ddp"].series("train/loss"), phased["ddp"].weights()
    assert len(expected) == phased["ddp"].summary["steps"]
    for name, run in phased.items():
        assert run.series("train/loss") == pytest.approx(expected, rel=1e-5), name
        for key, value in run.weights().items():
            if "key.bias" not in key:
                torch.testing.assert_close(value, weights[key], rtol=0, atol=2e-6, msg=f"{name}: {key}")


def test_what_a_phase_froze_again_keeps_what_it_learned(phased: dict[str, Run], material: Material) -> None:
    """The last phase trains the head alone: block 2 must hold what the phase before it learned (Lightning#21901)."""
    for name, run in phased.items():
        frozen = {
            phase: {t["name"]: t["sha256"] for t in content["tensors"] if t["frozen"] and t["kind"] == "parameter"}
            for phase, content in read_json(run.folder / "freeze.json")["phases"].items()
        }
        block = "bert.encoder.layer.2.output.dense.weight"
        assert block not in frozen["top"]
        assert frozen["head"][block] != frozen["again-less"][block], name
        lower = "bert.encoder.layer.0.output.dense.weight"
        assert frozen["head"][lower] == frozen["top"][lower] == frozen["again-less"][lower], name


def test_adam_goes_on_by_name(phased: dict[str, Run]) -> None:
    """Step counts in the last checkpoint: the head's all steps, nothing else is trained in the last phase."""
    for name, run in phased.items():
        newest = max((run.folder / "checkpoints").glob("step-*"))
        steps = read_json(newest / "state.json")["adam_steps"]
        assert set(steps) == {"classifier.weight", "classifier.bias"}
        assert set(steps.values()) == {run.summary["steps"]}, name
