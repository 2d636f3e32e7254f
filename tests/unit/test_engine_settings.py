"""What engines are told: combinations refused with a way out, DeepSpeed's config, FSDP's cut, precision, checksums."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from dist_finetune import deepspeed_settings
from dist_finetune.deepspeed_settings import BUCKET_ELEMENTS
from dist_finetune.drift import checksums
from dist_finetune.engine.blocks import prepare_blocks
from dist_finetune.engine.ddp import DdpEngine
from dist_finetune.engine.precision import FIRST_SCALE, LossScale, round_frozen
from dist_finetune.engine.statistics import moving_statistics, synchronise_batchnorm
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.freeze import apply_freeze, compile_freeze, train_mode
from dist_finetune.fsdp_layout import block_groups, fsdp_section
from dist_finetune.models.load import load_model
from dist_finetune.models.structure import structure_of
from dist_finetune.plan import Plan, make_plan
from dist_finetune.plan_text import plan_lines
from dist_finetune.spec import FreezeSpec, Strategy
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import Topology

GIB = 2**30


SCALED = """
import torch
from torch import nn
class Scaled(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embed, self.head, self.scale = nn.Embedding(7, 8), nn.Linear(8, num_classes), nn.Parameter(torch.ones(()))
    def forward(self, input_ids, attention_mask):
        return self.head(self.embed(input_ids).mean(1)) * self.scale
def scaled(num_classes):
    return Scaled(num_classes)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("settings")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(folder / "bert").save_pretrained(folder / "bert")
    sizes = BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=30,
        max_position_embeddings=16, hidden_dropout_prob=0.5,
    )  # fmt: skip
    BertModel(sizes).save_pretrained(folder / "bert")
    rows = "".join(f"{'good' if i % 2 else 'bad'} {i},{i % 2}\n" for i in range(40))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    (folder / "c.yaml").write_text(
        f"model: {{name: {folder / 'bert'}}}\ndata: {{train: {folder / 'rows.csv'}}}\n"
        'freeze: {embeddings: true, layers: "0"}\ntrain: {precision: fp32}\n'
    )
    (folder / "settings_model.py").write_text(SCALED)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        yield folder / "c.yaml"


def plan_of(config: Path, *overrides: str, world_size: int = 2, **topology: Any) -> Plan:
    return make_plan(load_spec(config, list(overrides)), Topology(1, world_size, **topology))


OWN_MODEL = ["model={name: 'settings_model:scaled', weights: none}", "freeze=none"]
REFUSED = [
    (["shard.strategy=ddp", "shard.offload=optimizer"], ["can't work with ddp", "zero1 to zero3 or fsdp"]),
    (["shard.strategy=fsdp", "shard.offload=optimizer"], ["can't work with fsdp", "shard.offload: parameters"]),
    (["shard.strategy=zero1", "shard.offload=parameters"], ["can't work with zero1", "zero3 or fsdp"]),
    (["shard.strategy=zero2", "shard.offload=parameters"], ["can't work with zero2", "shard.offload: optimizer"]),
    (["shard.strategy=zero2", "shard.frozen=shard"], ["can't work with zero2", "use fsdp or zero3"]),
    (["shard.strategy=ddp", "shard.frozen=shard"], ["can't work with ddp"]),
    (["shard.strategy=zero3", "shard.frozen=replicate"], ["can't work with zero3", "fsdp, zero2 or ddp"]),
    (["shard.strategy=zero3", "train.compile=true"], ["can't work with zero3", "fsdp"]),
    (["shard.strategy=fsdp", "shard.deepspeed={steps_per_print: 5}"], ["no effect on strategy fsdp"]),
    (["shard.strategy=zero2", "shard.frozen=replicate"], ["no effect, zero2 always", "choose fsdp"]),
    (["shard.strategy=zero3", "shard.frozen=shard"], ["no effect, zero3 always"]),
    (["shard.strategy=zero2", "shard.deepspeed={bf16: {enabled: true}}"], ["deepspeed.bf16", "train.precision: bf16"]),
    (["shard.strategy=zero2", "shard.deepspeed={optimizer: {type: Adam}}"], ["deepspeed.optimizer", "train.lr"]),
    (["shard.strategy=zero2", "shard.deepspeed={scheduler: {type: WarmupLR}}"], ["deepspeed.scheduler", "warmup"]),
    (
        ["shard.strategy=zero2", "shard.deepspeed={steps_per_print: 0}"],
        ["shard.deepspeed.steps_per_print: 0 is not a whole number, such as"],
    ),
    (
        ["shard.strategy=zero2", "shard.deepspeed={steps_per_prnt: 5}"],
        ["Did you mean steps_per_print"],
    ),
    (
        ["shard.strategy=zero2", "shard.deepspeed={nonsense: 5}"],
        ["deepspeed.nonsense", "steps_per_print"],
    ),
    (
        ["shard.strategy=zero2", "shard.deepspeed={reduce_bucket_size: 5}"],
        ["Did you mean shard.deepspeed.zero_optimization.reduce_bucket_size?"],
    ),
    (
        ["shard.strategy=zero2", "shard.deepspeed={zero_optimization: {stage: 3}}"],
        ["zero_optimization.stage", "3 contradicts the plan, which needs 2", "shard.strategy"],
    ),
    (["shard.strategy=zero2", "shard.deepspeed={zero_optimization: 2}"], ["zero_optimization", "contradicts"]),
    (
        ["shard.strategy=zero2", "shard.deepspeed={zero_optimization: {reduce_bucket_size: auto}}"],
        ["shard.deepspeed.zero_optimization.reduce_bucket_size: 'auto' is not a whole number", "leave the key out"],
    ),
    (
        ["shard.strategy=zero2", "shard.deepspeed={zero_optimization: {contiguous_gradients: 1}}"],
        ["contiguous_gradients: 1 is not true or false"],
    ),
    (
        ["shard.strategy=zero2", "shard.deepspeed={zero_optimization: {stage3_max_live_parameters: 5}}"],
        ["stage3_max_live_parameters", "no effect", "remove it"],
    ),
    (
        ["shard.strategy=zero1", "shard.deepspeed={zero_optimization: {overlap_comm: true}}"],
        ["overlap_comm", "no effect", "remove it"],
    ),
    (["freeze.dtype=bf16"], ["needs train.precision: bf16", "it is fp32"]),
    (["freeze.dtype=bf16", "freeze.embeddings=false", "freeze.layers=null"], ["no effect", "nothing is frozen"]),
    (["shard.frozen=shard", "freeze.embeddings=false", "freeze.layers=null"], ["no effect", "nothing is frozen"]),
    (["freeze.dtype=bf16", "train.precision=bf16", "checkpoint.full=true"], ["checkpoint.full", "leave one"]),
    ([*OWN_MODEL, "shard.strategy=fsdp"], ["fsdp can't share out scale, a single number", "zero1 to zero3"]),
    ([*OWN_MODEL, "train.gradient_checkpointing=true"], ["train.gradient_checkpointing", "no blocks", "remove it"]),
    ([*OWN_MODEL, "train.compile=true"], ["train.compile", "no blocks", "remove it"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda v: " ".join(v) if v[0].count("=") else "")
def test_combinations_that_cannot_work(config: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        plan_of(config, *overrides)
    for word in words:
        assert word in str(error.value)


def test_compiling_without_a_compiler(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where this machine has it: another one may have a compiler."""
    for name, value in {"PATH": str(tmp_path), "CXX": "", "CC": ""}.items():
        monkeypatch.setenv(name, value)
    for device, language in (("cpu", r"C\+\+ compiler \(g\+\+\)"), ("cuda", r"C compiler \(gcc\)")):
        with pytest.raises(UserError, match=rf"needs a {language}, and there is none; .* leave it out"):
            plan_of(config, "train.compile=true", device=device)
    assert plan_of(config, "train.compile=true", device="cuda", is_seen=False).spec.train.compile


def test_bf16_on_a_gpu_that_has_none(config: Path) -> None:
    with pytest.raises(UserError, match=r"train\.precision: this GPU has no bf16; use fp16 or fp32"):
        plan_of(config, "train.precision=bf16", device="cuda", supports_bf16=False)


def test_sizes_that_change_no_result_may_be_tuned(config: Path) -> None:
    tuned = (
        "shard.deepspeed={steps_per_print: 7, wall_clock_breakdown: true, "
        "zero_optimization: {stage: 2, reduce_bucket_size: 5e3}}"
    )
    (settings,) = plan_of(config, "shard.strategy=zero2", tuned).deepspeed
    assert settings is not None
    assert settings["steps_per_print"] == 7
    assert settings["zero_optimization"]["reduce_bucket_size"] == 5000
    assert settings["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("overrides", "possible"),
    [
        ([], {"ddp", "zero1", "zero2", "zero3", "fsdp"}),
        (["shard.offload=optimizer"], {"zero1", "zero2", "zero3"}),
        (["shard.offload=parameters"], {"zero3", "fsdp"}),
        (["shard.frozen=shard"], {"zero3", "fsdp"}),
        (["train.compile=true"], {"ddp", "zero1", "zero2", "fsdp"}),
    ],
)
def test_auto_chooses_among_what_can_work(config: Path, overrides: list[str], possible: set[str]) -> None:
    plan = plan_of(config, *overrides)
    assert set(plan.memory) == possible
    assert plan.strategy in possible


def test_steps_are_not_left_out_where_batchnorm_has_seen_them() -> None:
    cnn = Path(__file__).parents[2] / "configs" / "quickstart_cnn.yaml"
    with pytest.raises(UserError, match="with BatchNorm that trains"):
        plan_of(cnn, "freeze=none", "train.max_skipped=3")
    assert plan_of(cnn, "freeze=backbone", "train.max_skipped=3").spec.train.max_skipped == 3


def test_all_problems_are_told_at_once(config: Path) -> None:
    with pytest.raises(UserError) as error:
        plan_of(config, "shard.strategy=ddp", "shard.offload=parameters", "shard.frozen=shard")
    assert str(error.value).count("can't work with ddp") == 2


@pytest.mark.parametrize(
    ("strategy", "offload", "sections"),
    [
        ("zero1", "optimizer", {"offload_optimizer"}),
        ("zero3", "optimizer", {"offload_optimizer"}),
        ("zero3", "parameters", {"offload_optimizer", "offload_param"}),
        ("zero3", "none", set()),
    ],
)
def test_offload_in_deepspeeds_config(config: Path, strategy: str, offload: str, sections: set[str]) -> None:
    plan = plan_of(config, f"shard.strategy={strategy}", f"shard.offload={offload}")
    (settings,) = plan.deepspeed
    assert settings is not None
    assert {key for key in settings["zero_optimization"] if key.startswith("offload")} == sections
    assert settings.get("zero_force_ds_cpu_optimizer", "unset") == (False if sections else "unset")
    on_gpu = plan_of(config, f"shard.strategy={strategy}", f"shard.offload={offload}", device="cuda")
    mine = on_gpu.memory[plan.strategy].state
    assert (mine.optimizer == 0) == (offload != "none")
    assert (mine.trainable_weights == 0) == (offload == "parameters")


def test_sizes_for_a_cnn_come_from_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would take what is "auto" from `hidden_size`, which no CNN has."""
    cnn = Path(__file__).parents[2] / "configs" / "quickstart_cnn.yaml"
    resnet = ["model={name: 'timm:test_resnet', weights: none}", "freeze={embeddings: true, layers: '0'}"]
    plan = plan_of(cnn, *resnet, "data.max_rows=100")
    manifest = plan.phases[0].manifest
    sizes = {r.name: r.num_elements for r in manifest.records if r.kind == "parameter"}
    trained = [sizes[name] for name in manifest.trainable]

    def settings_at(strategy: Strategy) -> dict[str, Any] | None:
        return deepspeed_settings.deepspeed_settings(plan.spec, strategy, plan.batches, plan.precision, manifest)

    assert plan.deepspeed == (settings_at("zero1"),)
    for most, bucket in ((BUCKET_ELEMENTS, sum(trained)), (max(trained) // 2, max(trained))):
        monkeypatch.setattr(deepspeed_settings, "BUCKET_ELEMENTS", most)
        for strategy in ("zero1", "zero2", "zero3"):
            settings = settings_at(strategy)
            assert settings is not None
            assert "auto" not in json.dumps(settings)
            zero = settings["zero_optimization"]
            assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket + bucket % 2
            assert zero.get("overlap_comm", False) == (strategy != "zero1")  # which DeepSpeed refuses it
            assert strategy != "zero3" or zero["stage3_prefetch_bucket_size"] >= max(sizes.values())


def frozen_line(plan: Plan) -> list[str]:
    return [line for line in plan_lines(plan).splitlines() if line.startswith("frozen ")]


def test_frozen_weights_are_copied_where_that_fits_and_shared_out_where_not(config: Path) -> None:
    roomy = plan_of(config, "shard.strategy=fsdp", device="cuda", device_memory_bytes=GIB, world_size=4)
    tight = plan_of(config, "shard.strategy=fsdp", device="cuda", device_memory_bytes=60_000, world_size=4)
    asked = plan_of(config, "shard.strategy=fsdp", "shard.frozen=shard", world_size=4)
    unlimited = plan_of(config, "shard.strategy=fsdp", world_size=4)
    assert [p.costs.frozen_layout for p in (roomy, tight, asked)] == ["replicate", "shard", "shard"]
    why = "and a copy has no gradient and need not be gathered at each pass"
    assert frozen_line(roomy) == [f"frozen    copied to every rank: it fits, {why}"]
    assert frozen_line(unlimited) == [f"frozen    copied to every rank: no memory limit is known, {why}"]
    assert frozen_line(tight) == ["frozen    shared out over ranks: copies on every rank would not fit"]
    assert frozen_line(asked) == ["frozen    shared out over ranks: asked for"]
    assert frozen_line(dataclasses.replace(asked, strategy="zero2")) == []
    whole, shared = (p.memory["fsdp"].state.frozen_weights for p in (roomy, asked))
    assert whole == 4 * roomy.phases[0].manifest.num_frozen
    assert whole / 4 <= shared < whole / 3


def test_fsdp_counts_the_rows_that_rank_0_gets(config: Path) -> None:
    plan = plan_of(config, "shard.strategy=fsdp", "shard.frozen=shard")
    manifest = plan.phases[0].manifest
    section = fsdp_section(manifest, 4, "shard", offload=False)
    share = {True: 0, False: 0}
    for record in manifest.records:
        if record.kind == "parameter":
            share[record.frozen] += torch.empty(record.shape, device="meta").chunk(4)[0].numel()
    assert (section["frozen_share"], section["trainable_share"]) == (share[True], share[False])


def test_fsdp_groups_are_blocks_and_leave_tied_ones_to_the_root(config: Path) -> None:
    plan = plan_of(config)
    groups = block_groups(plan.structure, containers=())
    assert groups == tuple((f"bert.encoder.layer.{i}",) for i in range(3))
    name = plan.structure.blocks[1].parameters[0]
    tied = dataclasses.replace(plan.structure, aliases=((name, "classifier.weight"),))
    assert len(block_groups(tied, containers=())) == 2
    assert block_groups(plan.structure, containers={"bert.encoder.layer.2"}) == groups[:2]


def count_passes(module: nn.Module) -> list[int]:
    """A list that grows by one with each forward pass of a module."""
    passes: list[int] = []
    module.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_only_blocks_that_backward_passes_are_recomputed_and_gradients_stay(config: Path) -> None:
    """Blocks 1 and 2 run twice in a step, the frozen block 0 once; dropout draws the same again."""
    found = {}
    for checkpointing in ("false", "true"):
        plan = plan_of(config, f"train.gradient_checkpointing={checkpointing}")
        model, _ = load_model(plan.card, plan.spec.model, plan.data.classes, seed=0)
        apply_freeze(model, plan.phases[0].manifest)
        train_mode(model, plan.phases[0].manifest)
        prepare_blocks(model, plan, plan.phases[0])
        passes = [count_passes(model.get_submodule(f"bert.encoder.layer.{i}.attention")) for i in range(3)]
        torch.manual_seed(3)
        ids = torch.tensor([[2, 5, 6, 3], [2, 6, 5, 3]])
        model(input_ids=ids).logits.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found[checkpointing] = ([len(p) for p in passes], grads)
    assert found["false"][0] == [1, 1, 1]
    assert found["true"][0] == [1, 2, 2]
    assert all(grad is not None for grad in found["true"][1].values())
    for name, grad in found["false"][1].items():
        torch.testing.assert_close(found["true"][1][name], grad, rtol=0, atol=0, msg=name)


def test_checkpointing_without_a_block_above_is_said(config: Path) -> None:
    plan = plan_of(config, "train.gradient_checkpointing=true", "freeze.layers=all", "freeze.patterns=[bert.pooler.*]")
    assert "checkpointing-without-effect" in {note.code for note in plan.phases[0].notes}


@pytest.mark.parametrize(("limit", "is_touched"), [("null", False), ("0.5", True)])
def test_ddp_without_a_limit_on_the_norm_leaves_gradients_alone(config: Path, limit: str, is_touched: bool) -> None:
    plan = plan_of(config, f"train.max_grad_norm={limit}", "shard.strategy=ddp", world_size=1)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = DdpEngine(model, model, SimpleNamespace(optimizer=optimizer), plan, None)
    before = model.weight.detach().clone()
    model.weight.grad = gradient = torch.tensor([[3.0, 4.0]])
    version = gradient._version
    assert float(engine.step()) == 5.0
    assert (gradient._version > version) is is_touched
    expected = torch.tensor([[0.3, 0.4]] if is_touched else [[3.0, 4.0]])
    torch.testing.assert_close(before - model.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_loss_scale_falls_on_overflow_and_grows_after_good_steps(config: Path) -> None:
    scale = LossScale(plan_of(config, "train.precision=fp16", "shard.strategy=ddp"))
    grads = [torch.full((2,), FIRST_SCALE)]
    scale.unscale(grads)
    assert grads[0].tolist() == [1.0, 1.0]
    assert scale.allows_step(torch.tensor(1.0))
    assert not scale.allows_step(torch.tensor(float("inf")))
    assert not scale.allows_step(torch.tensor(float("nan")))
    assert scale.scale == FIRST_SCALE / 4
    assert all(scale.allows_step(torch.tensor(1.0)) for _ in range(2000))
    assert scale.scale == FIRST_SCALE / 2
    with pytest.raises(TrainingError, match="use bf16 or fp32"):
        [scale.allows_step(torch.tensor(float("inf"))) for _ in range(20)]


def test_no_loss_scale_without_fp16(config: Path) -> None:
    scale = LossScale(plan_of(config, "train.precision=bf16"))
    loss = torch.tensor(3.0)
    assert scale.apply(loss) is loss
    assert scale.allows_step(torch.tensor(float("inf")))  # the loop reports it; nothing is skipped in silence


def test_only_frozen_matrices_that_a_source_has_are_rounded(config: Path) -> None:
    plan = plan_of(config)
    manifest = plan.phases[0].manifest
    model, _ = load_model(plan.card, plan.spec.model, plan.data.classes, seed=0)
    apply_freeze(model, manifest)
    trained = "bert.encoder.layer.0.output.dense.weight"
    names = round_frozen(model, manifest, trained={trained})
    in_bf16 = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert set(names) == in_bf16 == {n for n in manifest.frozen if model.get_parameter(n).dim() > 1} - {trained}
    assert len(in_bf16) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_flipped_bit_changes_the_checksum_of_its_tensor(dtype: torch.dtype) -> None:
    tensors = [torch.ones(3, 5).to(dtype), torch.ones((), dtype=dtype), torch.ones(2, 3, 4, 4).to(dtype)]
    tensors[2] = tensors[2].contiguous(memory_format=torch.channels_last)
    before = checksums(tensors)
    assert torch.equal(before, checksums([t.clone() for t in tensors]))
    for i, tensor in enumerate(tensors):
        changed = [t.clone() for t in tensors]
        raw = changed[i].view(-1).view(torch.uint8) if i < 2 else changed[i].untyped_storage()
        raw[0] = int(raw[0]) ^ 1
        assert (checksums(changed) != before).nonzero().view(-1).tolist() == [i], tensor.shape


def test_statistics_that_move_are_those_of_batchnorm_that_is_not_held() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    model.append(nn.Linear(4, 2))
    manifest = compile_freeze(FreezeSpec(patterns=("1.*",)), structure_of(model), model)
    found = moving_statistics(model, manifest)
    assert [id(b) for b in found] == [id(model[3].running_mean), id(model[3].running_var)]
    thawed = dataclasses.replace(manifest, mode="train")
    assert len(moving_statistics(model, thawed)) == 4


def test_on_gpus_exactly_the_batchnorm_that_trains_is_synchronised() -> None:
    """With the same parameters, which the optimizer has already, and names; also timm's, which holds an activation."""
    model = timm.create_model("test_resnet", num_classes=2)
    manifest = compile_freeze(FreezeSpec(layers="0"), structure_of(model), model)
    train_mode(model, manifest)
    before, kinds = model.state_dict(keep_vars=True), {path: type(module) for path, module in model.named_modules()}
    norms = {path for path, kind in kinds.items() if issubclass(kind, nn.BatchNorm2d)}
    held = {path for path in norms if not model.get_submodule(path).training}
    synchronise_batchnorm(model, manifest)
    after = model.state_dict(keep_vars=True)
    changed = {path for path, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    assert changed == norms - held
    assert held
    assert changed
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in after if isinstance(before[name], nn.Parameter))
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert all(model.get_submodule(path).training for path in changed)
    assert moving_statistics(model, manifest) == []
