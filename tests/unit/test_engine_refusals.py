"""`shard` refuses every optimizer and model that isn't exactly the plan's, before an engine exists."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from dist_finetune.engine import shard
from dist_finetune.errors import TrainingError
from dist_finetune.freeze import apply_freeze
from dist_finetune.models.load import load_model
from dist_finetune.optim import build_optimizer
from dist_finetune.plan import Plan, make_plan
from dist_finetune.spec_file import load_spec
from dist_finetune.world import World

Groups = list[dict[str, Any]]
WORLD = World("none", 0, 0, 1, 1, torch.device("cpu"))
NO_ACCELERATOR = object()  # every refusal must come before it is asked for anything


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(folder / "bert").save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    rows = "".join(f"{'good' if i % 2 else 'bad'} {i},{i % 2}\n" for i in range(40))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    (folder / "c.yaml").write_text(
        f"model: {{name: {folder / 'bert'}}}\ndata: {{train: {folder / 'rows.csv'}}}\n"
        'freeze: {embeddings: true, layers: "0"}\nshard: {strategy: zero2}\n'
    )
    return make_plan(load_spec(folder / "c.yaml", []))


@pytest.fixture
def model(plan: Plan) -> nn.Module:
    loaded, _ = load_model(plan.card, plan.spec.model, plan.data.classes, seed=0)
    apply_freeze(loaded, plan.phases[0].manifest)
    return loaded


def refusal(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    with pytest.raises(TrainingError) as error:
        shard(model, optimizer, plan, plan.phases[0], NO_ACCELERATOR, WORLD)
    assert error.value.exit_code == 1
    return str(error.value)


def drop_last(groups: Groups, model: nn.Module) -> None:
    groups[-1]["params"].pop()


def add_frozen(groups: Groups, model: nn.Module) -> None:
    groups[0]["params"].append(model.get_parameter("bert.embeddings.word_embeddings.weight"))


def add_stranger(groups: Groups, model: nn.Module) -> None:
    groups[0]["params"].append(nn.Parameter(torch.zeros(3)))


def add_empty_group(groups: Groups, model: nn.Module) -> None:
    groups.append({**groups[0], "params": []})


def keep_first_group(groups: Groups, model: nn.Module) -> None:
    del groups[1:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_last, ["Missing: ['classifier.bias']", "build_optimizer"]),
        (add_frozen, ["Not planned: ['bert.embeddings.word_embeddings.weight']", "Missing: []"]),
        (add_stranger, ["Not planned: ['a tensor that is not in the model']"]),
        (add_empty_group, ["empty parameter group"]),
        (keep_first_group, ["Missing: ["]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_optimizer_that_is_not_the_plans(
    plan: Plan, model: nn.Module, change: Callable[[Groups, nn.Module], None], words: list[str]
) -> None:
    groups = [
        {**group, "params": list(group["params"])}
        for group in build_optimizer(model, plan.phases[0].groups).param_groups
    ]
    change(groups, model)
    message = refusal(plan, model, torch.optim.AdamW(groups))
    for word in words:
        assert word in message


def test_the_plans_own_optimizer_is_not_refused(plan: Plan, model: nn.Module) -> None:
    """Then the accelerator is asked: the refusals above are about the optimizer alone."""
    with pytest.raises(AttributeError, match="prepare"):
        shard(model, build_optimizer(model, plan.phases[0].groups), plan, plan.phases[0], NO_ACCELERATOR, WORLD)


def test_a_flag_that_changed_after_the_freeze(plan: Plan, model: nn.Module) -> None:
    optimizer = build_optimizer(model, plan.phases[0].groups)
    model.get_parameter("bert.encoder.layer.0.output.dense.weight").requires_grad_(True)
    model.get_parameter("classifier.bias").requires_grad_(False)
    message = refusal(plan, model, optimizer)
    assert "bert.encoder.layer.0.output.dense.weight: planned frozen, would train" in message
    assert "classifier.bias: planned to train, is frozen" in message


def test_an_optimizer_is_not_built_for_another_freeze(plan: Plan, model: nn.Module) -> None:
    model.get_parameter("bert.pooler.dense.bias").requires_grad_(False)
    with pytest.raises(TrainingError, match=r"planned but frozen \['bert.pooler.dense.bias'\]"):
        build_optimizer(model, plan.phases[0].groups)
