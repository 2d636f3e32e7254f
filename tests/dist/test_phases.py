"""Phases over processes: what a phase thaws trains, what goes on keeps its Adam state, at every strategy."""

import pytest
import torch
from harness import STRATEGIES, Job, Run, RunJobs, read_json
from material import Material
from safetensors.torch import load_file

from dist_finetune.optim import lr_factor

pytestmark = pytest.mark.dist

PHASES = [
    {"name": "head", "freeze": "backbone", "epochs": 1, "lr": 1e-3},
    {"name": "top", "freeze": {"embeddings": True, "layers": "0-1"}, "epochs": 1, "schedule": "cosine", "warmup": 2},
    {"name": "again-less", "freeze": "backbone", "epochs": 1},
]
FROZEN = {"embeddings": True, "layers": "0"}


@pytest.fixture(scope="module")
def trained(material: Material, runs: RunJobs) -> dict[str, Run]:
    """`PHASES` at every strategy and with a cache, 10 steps a phase; and of 3 steps an epoch a run `whole` and the same
    `split` into phases, and the ready words."""
    config = material.text(freeze=None, phases=PHASES, train={"epochs": 3})
    jobs = [Job(s, {**config, "shard": {"strategy": s}, "cache": "off"}) for s in STRATEGIES]
    jobs.append(Job("cached", {**config, "shard": {"strategy": "zero2"}, "cache": "on"}))
    halves = [{"name": name, "freeze": FROZEN, "epochs": 1} for name in ("first", "second")]
    for name, sections in {
        "whole": {"freeze": FROZEN, "train": {"epochs": 2, "schedule": "constant", "warmup": 0}},
        "split": {"freeze": None, "phases": halves, "train": {"schedule": "constant", "warmup": 0}},
        "gradual": {"freeze": None, "phases": "gradual", "train": {"epochs": 3}},
        "lp-ft": {"freeze": FROZEN, "phases": "lp-ft", "train": {"epochs": 2}},
    }.items():
        small = {"data": {"max_rows": 48}, "shard": {"strategy": "ddp"}, "cache": "off"}
        jobs.append(Job(name, material.text(**sections, **small)))
    return runs(jobs, 2)


@pytest.fixture(scope="module")
def phased(trained: dict[str, Run]) -> dict[str, Run]:
    """The runs of `PHASES`."""
    return {name: trained[name] for name in (*STRATEGIES, "cached")}


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


def test_a_run_in_two_phases_of_one_freeze_is_the_run_in_one(trained: dict[str, Run]) -> None:
    """The second phase goes on with the first one's moments: from nothing, Adam's first step would be another."""
    whole, split = trained["whole"], trained["split"]
    assert [phase["name"] for phase in split.summary["phases"]] == ["first", "second"]
    assert len(whole.series("train/loss")) == 6
    assert split.series("train/loss") == whole.series("train/loss")
    for name, value in split.weights().items():
        torch.testing.assert_close(value, whole.weights()[name], rtol=0, atol=0, msg=name)


def test_each_phase_trains_at_its_own_rate_and_schedule(phased: dict[str, Run]) -> None:
    expected = [1e-3 * lr_factor(step, 10, 0, "linear") for step in range(10)]
    expected += [2e-4 * lr_factor(step, 10, 2, "cosine") for step in range(10)]
    expected += [2e-4 * lr_factor(step, 10, 0, "linear") for step in range(10)]
    for name, run in phased.items():
        assert run.series("train/lr") == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("gradual", {"head": "012", "top-2": "0", "top-3": ""}),
        ("lp-ft", {"linear-probe": "012", "fine-tune": "0"}),
    ],
)
def test_the_ready_words_train_what_they_thaw(
    trained: dict[str, Run], material: Material, name: str, frozen: dict[str, str]
) -> None:
    run, base = trained[name], load_file(material.bert / "model.safetensors")
    done = run.summary["phases"]
    assert [(p["name"], p["last_step"]) for p in done] == [(phase, 3 * i) for i, phase in enumerate(frozen, 1)]
    weights = {block: f"encoder.layer.{block}.output.dense.weight" for block in "012"}
    phases = read_json(run.folder / "freeze.json")["phases"]
    held = {phase: {t["name"] for t in content["tensors"] if t["frozen"]} for phase, content in phases.items()}
    assert {p: "".join(b for b in "012" if f"bert.{weights[b]}" in held[p]) for p in held} == frozen
    unmoved = [b for b in "012" if torch.equal(run.weights()[f"bert.{weights[b]}"], base[weights[b]])]
    assert "".join(unmoved) == [*frozen.values()][-1]
