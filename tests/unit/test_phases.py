"""Phases of a run, planned on the meta device."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from dist_finetune.errors import UserError
from dist_finetune.models.sources import build_model, describe_model
from dist_finetune.models.structure import structure_of
from dist_finetune.phases import LINEAR_PROBE_LR, PhasePlan, plan_phases
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec

STEPS_PER_EPOCH = 10


def spec_of(**sections: object) -> Spec:
    return load_spec({"model": {"name": "demo:minilm"}, "data": {"train": "x.csv"}, "name": "run", **sections})


def plan(spec: Spec) -> tuple[PhasePlan, ...]:
    with torch.device("meta"):
        model = build_model(describe_model(spec.model), spec.model, ("a", "b"))
    return plan_phases(spec, structure_of(model), model, STEPS_PER_EPOCH, default_lr=5e-5)


def test_without_phases_there_is_one_with_the_configs_freeze() -> None:
    (phase,) = plan(spec_of(freeze={"embeddings": True, "layers": "0-3"}, train={"epochs": 2, "warmup": 0.1}))
    assert (phase.first_step, phase.num_steps, phase.warmup_steps) == (0, 20, 2)
    assert phase.manifest.num_frozen > 0


def test_each_phase_has_its_own_freeze_rate_and_schedule() -> None:
    phases = plan(
        spec_of(
            train={"lr": 2e-5, "schedule": "cosine"},
            phases=[
                {"name": "head", "freeze": "backbone", "epochs": 1, "lr": 1e-3, "schedule": "constant", "warmup": 0},
                {"name": "top", "freeze": {"embeddings": True, "layers": "0-3"}, "epochs": 2, "until": "plateau"},
            ],
        )
    )
    assert [(p.name, p.first_step, p.num_steps, p.schedule, p.until) for p in phases] == [
        ("head", 0, 10, "constant", None),
        ("top", 10, 20, "cosine", "plateau"),
    ]
    assert [{g.lr for g in p.groups} for p in phases] == [{1e-3}, {2e-5}]
    assert phases[0].manifest.num_trainable < phases[1].manifest.num_trainable


def test_groups_are_split_by_the_phase_since_which_they_train() -> None:
    """ZeRO keeps one Adam step count a group, so what a later phase thaws must not share one with what goes on."""
    head, top = plan(
        spec_of(
            phases=[
                {"name": "head", "freeze": "backbone", "epochs": 1},
                {"name": "top", "freeze": {"embeddings": True, "layers": "0-3"}, "epochs": 1},
            ]
        )
    )
    assert {g.since_phase for g in head.groups} == {0}
    since = {name: g.since_phase for g in top.groups for name in g.names}
    assert {name for name, phase in since.items() if phase == 0} == set(head.manifest.trainable)
    assert since["bert.encoder.layer.5.output.dense.weight"] == 1


def test_gradual_thaws_from_the_top_until_nothing_is_frozen() -> None:
    phases = plan(spec_of(phases="gradual", train={"epochs": 4}))
    frozen_blocks = [{n.split(".")[3] for n in p.manifest.frozen if ".layer." in n} for p in phases]
    assert frozen_blocks == [set("012345"), set("0123"), set("01"), set()]
    assert phases[-1].manifest.num_frozen == 0


def test_lp_ft_probes_first_and_then_keeps_the_configs_freeze() -> None:
    probe, tuned = plan(spec_of(phases="lp-ft", freeze={"embeddings": True}, train={"epochs": 3}))
    assert {name.split(".")[0] for name in probe.manifest.trainable} == {"classifier"}
    assert {g.lr for g in probe.groups} == {LINEAR_PROBE_LR}
    assert {n.split(".")[1] for n in tuned.manifest.frozen} == {"embeddings"}
    assert (probe.num_steps, tuned.num_steps) == (10, 20)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"phases": "gradual", "freeze": "backbone"}, "freeze and phases are both set"),
        ({"phases": "gradual", "freeze": {"dtype": "bf16"}}, "freeze and phases are both set"),
        ({"phases": "gradual", "train": {"epochs": 1.5}}, "needs a whole number of epochs from 2"),
        (
            {
                "phases": [
                    {"name": "a", "freeze": "backbone", "epochs": 1},
                    {"name": "a", "freeze": "none", "epochs": 1},
                ]
            },
            "share a name",
        ),
        (
            {"phases": [{"name": "a", "freeze": {"layers": "9"}, "epochs": 1}]},
            "phases.0 (a): freeze: 1 problem",
        ),
        (
            {"phases": "gradual", "train": {"epochs": 3, "max_steps": 15}},
            "train.max_steps: 15 leaves no step for phase 'top-6'",
        ),
        (
            {"freeze": {"embeddings": True}, "train": {"pattern_lr": {"*.word_embeddings.*": 1e-4}}},
            "takes only frozen parameters",
        ),
        ({"train": {"warmup": 500}}, "train.warmup: 500 steps leave nothing of the 30 steps; use fewer"),
        ({"phases": "gradual", "train": {"warmup": 20}}, "train.warmup: 20 steps leave nothing of the 10 steps of"),
        (
            {"phases": [{"name": "a", "freeze": "backbone", "epochs": 1, "warmup": 10}]},
            "phases (a): warmup: 10 steps leave nothing of the 10 steps of phase 'a'",
        ),
    ],
)
def test_refusals(sections: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(spec_of(**sections))
    assert message in str(error.value)


def test_gradual_with_more_epochs_than_blocks_lets_epochs_of_one_freeze_be_one_phase() -> None:
    phases = plan(spec_of(phases="gradual", train={"epochs": 13}))
    names = [p.name for p in phases]
    assert names == ["head", "top-1", "top-2", "top-3", "top-4", "top-5", "top-6", "all"]
    assert len({p.manifest.digest for p in phases}) == len(phases)
    assert sum(p.num_steps for p in phases) == 13 * STEPS_PER_EPOCH


def test_gradual_is_refused_where_blocks_share_their_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("albert"))
    with pytest.raises(UserError, match=r"gradual can't work with this model: blocks 0-11 run one set.*lp-ft"):
        plan_phases(spec_of(phases="gradual"), structure_of(model), model, STEPS_PER_EPOCH, default_lr=5e-5)


def test_lp_ft_takes_the_epochs_that_it_is_given() -> None:
    probe, tuned = plan(spec_of(phases="lp-ft", train={"epochs": 1.5}))
    assert (probe.num_steps, tuned.num_steps) == (10, 5)


HEAD = {"name": "a", "freeze": "backbone", "epochs": 1}
BODY = {"name": "b", "freeze": {"patterns": ["classifier"]}, "epochs": 1}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"phases": "lp-ft", "train": {"epochs": 1}}, "has nothing left for that. Give it more than 1"),
        ({"freeze": "backbone", "train": {"layer_decay": 0.9}}, "train.layer_decay: 0.9 has no effect, neither"),
        (
            {"freeze": {"embeddings": True, "layers": "all"}, "train": {"layer_decay": 0.9}},  # pooler and head train
            "train.layer_decay: 0.9 has no effect, neither blocks nor embeddings train",
        ),
        ({"freeze": "backbone", "train": {"lr": 1e-5, "head_lr": 1e-3}}, "train.lr: 1e-05 has no effect beside"),
        ({"freeze": {"patterns": ["classifier"]}, "train": {"head_lr": 1e-3}}, "train.head_lr: 0.001 has no effect"),
        ({"phases": [HEAD | {"lr": 1e-5, "head_lr": 1e-3}]}, "phases (a): lr: 1e-05 has no effect beside"),
        ({"phases": [HEAD, BODY | {"head_lr": 1e-3}]}, "phases (b): head_lr: 0.001 has no effect"),
        ({"freeze": {"mode": "train"}}, "mode: train has no effect: nothing is frozen"),
        ({"freeze": {"layers": "0", "except": ["*.layer.0"]}}, "except undoes all that the other rules freeze"),
    ],
)
def test_settings_without_effect_are_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(spec_of(**sections))
    assert message in str(error.value)


def test_rates_that_some_phase_uses_are_none_without_effect() -> None:
    head, body = plan(spec_of(phases=[HEAD, BODY], train={"lr": 1e-5, "head_lr": 1e-3, "layer_decay": 0.9}))
    assert {g.lr for g in head.groups} == {1e-3}
    assert max(g.lr for g in body.groups) == 1e-5
