"""Bytes and operations of a plan, by hand on small numbers and against real passes of tiny models."""

import dataclasses
import random

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from dist_finetune.freeze import Manifest, compile_freeze, train_mode
from dist_finetune.memory.activations import Activations, Pass, fake_pass, measured_pass, telling_rows
from dist_finetune.memory.choice import Limits, choose_strategy, memory_of
from dist_finetune.memory.forecast import forecast
from dist_finetune.memory.state import Layout, StateBytes, kept_in_bf16, layout_of, state_bytes
from dist_finetune.memory.traffic import checkpoint_bytes, step_traffic
from dist_finetune.models.structure import Structure, structure_of
from dist_finetune.recompute import called_modules, recomputed, recomputed_blocks
from dist_finetune.spec import FreezeSpec

ZERO = {
    "reduce_bucket_size": 100,
    "overlap_comm": False,
    "stage3_max_reuse_distance": 20,
    "stage3_prefetch_bucket_size": 5,
}
SMALL = Layout(groups=((5, 3), (7,)), frozen=(9, 2), buffer_bytes=24, num_reduced_in_bf16=0)


def tiny_bert(**changes: object) -> BertForSequenceClassification:
    sizes = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**{**sizes, "intermediate_size": 20, "num_labels": 3, **changes}))


def text_inputs(rows: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, 16, dtype=torch.int64)
    mask[0, 9:] = 0
    return {"input_ids": torch.ones(rows, 16, dtype=torch.int64), "attention_mask": mask}


def images(rows: int) -> torch.Tensor:
    return torch.ones(rows, 3, 32, 32)


def frozen_by(model: nn.Module, **rules: object) -> tuple[Structure, Manifest]:
    structure = structure_of(model)
    manifest = compile_freeze(FreezeSpec(**rules), structure, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in manifest.frozen)
    train_mode(model, manifest)
    return structure, manifest


def test_ddp_holds_everything_on_every_rank():
    state = state_bytes(SMALL, "ddp", 4, None, False)
    assert (state.trainable_weights, state.frozen_weights, state.gradients) == (60, 44, 60)
    assert (state.optimizer, state.masters, state.buffers) == (2 * 60 + 3 * 4, 0, 24)
    assert state.communication == 0  # gradients lie in DDP's buckets
    assert state_bytes(SMALL, "ddp", 4, None, True).communication == 60
    assert state_bytes(SMALL, "ddp", 1, None, True).communication == 0


def test_zero_1_and_2_pad_each_group_to_twice_the_world_size():
    for strategy in ("zero1", "zero2"):
        state = state_bytes(SMALL, strategy, 4, ZERO, False)
        # groups of 8 and 7 elements become 8 and 8, a rank has 2 of each
        assert (state.trainable_weights, state.masters, state.padding) == (64, 16, 4)
        assert state.optimizer == 2 * 16 + 2 * 4
        assert state.frozen_weights == 44
    # rank 2 has a part of each parameter; their gradients are kept whole
    assert state_bytes(SMALL, "zero2", 4, ZERO, False).gradients == 4 * 15
    assert state_bytes(SMALL, "zero1", 4, ZERO, False).gradients == 4 * 15


def test_zero2_has_a_second_bucket_where_one_is_on_its_way():
    one, two = (state_bytes(SMALL, "zero2", 4, {**ZERO, "overlap_comm": flag}, False) for flag in (False, True))
    assert two.communication - one.communication == 4 * 100
    assert dataclasses.replace(two, communication=one.communication) == one


def test_zero3_pads_each_parameter_to_the_world_size_and_shards_what_is_frozen():
    state = state_bytes(SMALL, "zero3", 4, ZERO, False)
    assert state.trainable_weights == state.gradients == state.masters == 4 * (2 + 1 + 2)
    assert state.frozen_weights == 4 * (3 + 1)
    assert state.optimizer == 2 * 20 + 2 * 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_gradients_that_zero2_keeps_whole_are_those_that_a_share_touches(world_size: int):
    draw = random.Random(world_size)
    sizes = tuple(draw.randint(1, 50) for _ in range(40))
    share = -(-sum(sizes) // (2 * world_size)) * 2
    worst = 0
    for rank in range(world_size):
        touched, start = 0, 0
        for size in sizes:
            touched += size * (start < (rank + 1) * share and start + size > rank * share)
            start += size
        worst = max(worst, touched)
    layout = Layout((sizes,), (), 0, 0)
    assert state_bytes(layout, "zero2", world_size, ZERO, False).gradients == 4 * worst


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_frozen_tensor_costs_its_weights_only(strategy):
    more = Layout(SMALL.groups, (*SMALL.frozen, 4096), SMALL.buffer_bytes, 0)
    small, large = (state_bytes(layout, strategy, 4, ZERO, False) for layout in (SMALL, more))
    assert large.frozen_weights - small.frozen_weights == 4096 * 4 // (4 if strategy == "zero3" else 1)
    for name in ("trainable_weights", "gradients", "optimizer", "masters", "buffers", "update"):
        assert getattr(large, name) == getattr(small, name)


def test_the_world_can_have_4096_ranks():
    layout = Layout(((30_000_000, 1024, 4_000_000),), (100_000_000,), 0, 0)
    shares = [
        state_bytes(layout, s, 4096, ZERO | {"reduce_bucket_size": 1000}, False) for s in ("zero1", "zero2", "zero3")
    ]
    assert all(
        2 * layout.trainable * 4 // 4096 <= s.optimizer < 2 * layout.trainable * 4 // 4096 * 1.01 for s in shares
    )


def test_layout_counts_what_autocast_sends_in_bf16():
    model = tiny_bert()
    _, manifest = frozen_by(model, rule="backbone")
    groups = [manifest.trainable]
    assert layout_of(model, manifest, groups, autocast=False).num_reduced_in_bf16 == 0
    layout = layout_of(model, manifest, groups, autocast=True)
    assert layout.num_reduced_in_bf16 == layout.trainable == 12 * 3 + 3  # the classifier is a Linear
    assert layout.buffer_bytes == sum(b.nbytes for b in model.buffers()) > 0


MODELS = {
    "bert": (tiny_bert, text_inputs),
    "bert without dropout": (
        lambda: tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), text_inputs
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=40, dim=12, n_layers=2, n_heads=2, hidden_dim=20)
        ),
        text_inputs,
    ),
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=3), images),
}  # fmt: skip


@pytest.mark.parametrize("rules", [{}, {"embeddings": True, "layers": "0"}, {"rule": "backbone"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_on_fake_tensors_counts_the_bytes_of_a_real_one(name, rules):
    make, inputs = MODELS[name]
    real_model = make()
    structure, manifest = frozen_by(real_model, **rules)
    with torch.device("meta"):
        meta_model = make()
    real = measured_pass(real_model, structure.parts, inputs, 4, autocast=False)
    fake = fake_pass(meta_model, manifest, structure.parts, inputs, 4, autocast=False)
    assert isinstance(fake, Pass), fake
    assert fake == real
    assert all(tensor.is_meta for tensor in (*meta_model.parameters(), *meta_model.buffers()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rules", [{"rule": "bias-only"}, {"layers": "1"}, {}], ids=str)
def test_linear_layers_of_stage_3_keep_what_deepspeeds_own_keep(monkeypatch, rules, checkpointing):
    """Of a frozen weight too, whose input nothing needs: bytes of a real pass with DeepSpeed's function for them."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    real_model = tiny_bert()
    structure, manifest = frozen_by(real_model, **rules)
    blocks = recomputed_blocks(manifest, structure) if checkpointing else ()
    with torch.device("meta"):
        meta_model = tiny_bert()
    given = meta_model, manifest, structure.parts, text_inputs, 4, False
    plain, fake = (fake_pass(*given, recompute=blocks, stage3=stage3) for stage3 in (False, True))
    for module in (module for block in blocks for module in called_modules(real_model, block)):
        module.forward = recomputed(module.forward, keep_random_state=False)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    real = measured_pass(real_model, structure.parts, text_inputs, 4, autocast=False)
    assert fake.saved == real.saved
    assert fake.forward_flops == real.forward_flops == plain.forward_flops
    more = [fake.saved_bytes - plain.saved_bytes, fake.peak_bytes - plain.peak_bytes]
    if not rules:
        assert more == [0, 0]
    elif not checkpointing:  # recomputed, blocks keep nothing between the passes
        assert min(more) > 0


def test_autocast_is_counted_within_5_percent_and_saves_less():
    real_model = tiny_bert()
    structure, manifest = frozen_by(real_model)
    with torch.device("meta"):
        meta_model = tiny_bert()
    real = measured_pass(real_model, structure.parts, text_inputs, 4, autocast=True)
    fake = fake_pass(meta_model, manifest, structure.parts, text_inputs, 4, autocast=True)
    plain = fake_pass(meta_model, manifest, structure.parts, text_inputs, 4, autocast=False)
    assert fake.saved_bytes == pytest.approx(real.saved_bytes, rel=0.05)
    assert fake.saved_bytes < plain.saved_bytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_tells_the_bytes_of_any_number_of_rows(name, checkpointing):
    make, inputs = MODELS[name]
    with torch.device("meta"):
        model = make()
    structure, manifest = frozen_by(model, embeddings=True)
    blocks = recomputed_blocks(manifest, structure) if checkpointing else ()

    def run(rows: int) -> Pass:
        found = fake_pass(model, manifest, structure.parts, inputs, rows, False, recompute=blocks)
        assert isinstance(found, Pass), found
        return found

    rows = telling_rows(model, inputs)
    assert rows >= 31
    told = run(rows)
    for asked in (2, 100):
        real = run(asked)
        assert (told.saved.at(asked), told.peak.at(asked)) == (real.saved_bytes, real.peak_bytes)
        assert {k: v // rows * asked for k, v in told.flops_by_part.items()} == real.flops_by_part


def test_telling_rows_divide_no_dimension_of_the_model_or_of_a_row():
    def inputs(rows: int) -> torch.Tensor:
        return torch.zeros(rows, 3, 74)  # 2 x 37

    model = nn.Linear(62, 5)  # 62 is 2 x 31
    model.register_buffer("bank", torch.empty(0, 5))  # to be filled as a user's own code goes along
    assert telling_rows(model, inputs) == 41


def test_activations_are_the_most_of_their_lines():
    found = Activations(((100, 1), (0, 10)))
    assert [found.at(rows) for rows in (1, 11, 12, 20)] == [101, 111, 120, 200]


def test_the_more_is_frozen_below_the_less_is_saved():
    with torch.device("meta"):
        model = tiny_bert()
    saved = []
    for rules in ({}, {"embeddings": True, "layers": "0"}, {"embeddings": True, "layers": "0-1"}, {"rule": "backbone"}):
        structure, manifest = frozen_by(model, **rules)
        saved.append(fake_pass(model, manifest, structure.parts, text_inputs, 16, False).saved_bytes)
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > saved[1] * 1.3 > saved[2] * 1.3


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_gradient_checkpointing_is_counted_as_it_runs(name):
    make, inputs = MODELS[name]
    real_model = make()
    structure, manifest = frozen_by(real_model, embeddings=True, layers="0")
    with torch.device("meta"):
        meta_model = make()
    blocks = recomputed_blocks(manifest, structure)
    assert [block.index for block in blocks] == list(range(1, structure.depth))
    plain, lean, lean_gpu = (
        fake_pass(meta_model, manifest, structure.parts, inputs, 4, False, device, recompute=some)
        for device, some in (("cpu", ()), ("cpu", blocks), ("cuda", blocks))
    )
    for block in blocks:
        for module in called_modules(real_model, block):
            module.forward = recomputed(module.forward)
    assert measured_pass(real_model, structure.parts, inputs, 4, autocast=False) == lean
    assert lean.saved_bytes < plain.saved_bytes / 3
    assert lean_gpu.saved_bytes <= lean.saved_bytes
    assert not any("forward" in vars(module) for module in meta_model.modules())


def test_frozen_weights_in_bf16_take_half():
    model = tiny_bert()
    _, manifest = frozen_by(model, rule="backbone")
    groups, rounded = [manifest.trainable], kept_in_bf16(manifest)
    assert rounded < set(manifest.frozen)
    plain, low = (layout_of(model, manifest, groups, True, names) for names in ((), rounded))
    assert plain.num_frozen == low.num_frozen == manifest.num_frozen
    halved = sum(model.get_parameter(name).numel() for name in rounded)
    for strategy, ranks in (("ddp", 1), ("zero2", 1), ("zero3", 2)):
        states = [state_bytes(layout, strategy, 2, ZERO, False).frozen_weights for layout in (plain, low)]
        assert states[0] - states[1] == 2 * halved // ranks


def test_on_a_gpu_dropout_and_attention_keep_less():
    with torch.device("meta"):
        model = tiny_bert()
    structure, manifest = frozen_by(model)
    cpu, gpu = (fake_pass(model, manifest, structure.parts, text_inputs, 4, False, d) for d in ("cpu", "cuda"))
    assert gpu.saved_bytes < cpu.saved_bytes * 0.8
    assert gpu.flops_by_part.keys() == cpu.flops_by_part.keys()


def test_a_model_that_needs_data_says_so():
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum().item() > 0 else self.fc(-x)

    with torch.device("meta"):
        model = Peeks()
    structure, manifest = frozen_by(model)
    found = fake_pass(model, manifest, structure.parts, lambda rows: torch.ones(rows, 3), 2, False)
    assert isinstance(found, str)
    assert "reads a value of a tensor" in found
    assert all(p.is_meta for p in model.parameters())


def test_operations_and_the_gain_of_a_frozen_prefix():
    with torch.device("meta"):
        model = tiny_bert()
    structure, everything = frozen_by(model)
    measured = fake_pass(model, everything, structure.parts, text_inputs, 4, False)
    tokens, d, ff = 4 * 16, 12, 20
    attention = 2 * 2 * 4 * 16 * 16 * d  # scores and their product with the values
    assert measured.flops_by_part["block 1"] == 2 * tokens * (4 * d * d + 2 * d * ff) + attention
    assert forecast(measured, everything, structure).speedup == 1.0

    _, two_frozen = frozen_by(model, embeddings=True, layers="0-1")
    gain = forecast(measured, two_frozen, structure)
    assert gain.frozen_prefix_share == pytest.approx(2 / 3, abs=0.02)
    p = gain.frozen_prefix_share
    assert gain.speedup == pytest.approx(3 / (1 + 2 * (1 - p)), rel=1e-6)
    assert gain.speedup_cached == pytest.approx(1 / (1 - p), rel=1e-6)

    _, middle_frozen = frozen_by(model, layers="1,2")
    gain = forecast(measured, middle_frozen, structure)
    assert gain.frozen_prefix_share == 0  # embeddings and block 0 train below: backward runs to the bottom
    assert 1 < gain.speedup < 3 / 2


def test_traffic_of_a_step():
    assert step_traffic(SMALL, "ddp", 1, None, 4, 15) == 0
    assert step_traffic(SMALL, "ddp", 4, None, 4, 15) == 2 * 60 * 3 // 4  # whatever the number of micro-batches
    assert step_traffic(SMALL, "zero1", 4, ZERO, 4, 15) == 3 * 60 * 3 // 4
    assert step_traffic(SMALL, "zero2", 4, ZERO, 4, 15) == (4 * 2 * 60 + 60) * 3 // 4
    # all 26 weights on the way up; none again, since the few that there are stay
    assert step_traffic(SMALL, "zero3", 4, ZERO, 1, 15) == (60 + 26 * 4) * 3 // 4


def test_checkpoint_holds_what_trains_and_buffers_that_move():
    model = timm.create_model("test_resnet", num_classes=3)
    moving = sum(b.nbytes for b in model.buffers())
    _, everything = frozen_by(model)
    assert checkpoint_bytes(model, everything, full=False) == 12 * everything.num_trainable + moving
    _, head = frozen_by(model, rule="backbone")
    assert checkpoint_bytes(model, head, full=False) == 12 * head.num_trainable
    assert checkpoint_bytes(model, head, full=True) == 12 * head.num_trainable + 4 * head.num_frozen + moving


def chosen(limit: int | None, states: dict, per_row: int = 10, rows: int = 16, micro="auto", world_size: int = 4):
    limits = Limits(world_size, "cuda", limit, rows)
    memory = {
        name: memory_of(
            lambda accumulates, total=total: StateBytes(total, 0, 0, 0, 0, 0, 0, 0, 0),
            lambda count: count,
            Activations(((0, per_row),)),
            limits,
            micro,
        )
        for name, total in states.items()
    }
    return *choose_strategy("auto", memory, limits), memory


def test_auto_takes_the_cheapest_strategy_that_fits_and_its_largest_micro_batch():
    states = {"ddp": 900, "zero1": 500, "zero2": 300}
    strategy, reason, memory = chosen(10_000, states)
    assert (strategy, memory["ddp"].micro_batch_size) == ("ddp", 16)
    strategy, reason, memory = chosen(800, states)
    assert strategy == "zero1"
    assert "ddp needs" in reason
    assert memory["zero1"].micro_batch_size == 16
    assert memory["ddp"].fits is False
    assert memory["ddp"].micro_batch_size == 1


def test_auto_passes_over_a_strategy_that_leaves_room_for_a_row_or_two():
    strategy, _, memory = chosen(600, {"ddp": 530, "zero1": 300, "zero2": 200})
    assert memory["ddp"].fits
    assert memory["ddp"].micro_batch_size == 2
    assert (strategy, memory["zero1"].micro_batch_size) == ("zero1", 16)


def test_where_nothing_fits_the_strategy_that_needs_least_is_named():
    strategy, reason, memory = chosen(100, {"ddp": 900, "zero1": 500, "zero2": 300})
    assert strategy == "zero2"
    assert "no strategy fits" in reason
    assert not any(found.fits for found in memory.values())


def test_without_a_limit_ddp_and_a_constant_micro_batch():
    strategy, reason, memory = chosen(None, {"ddp": 900, "zero1": 500}, rows=96)
    assert (strategy, memory["ddp"].micro_batch_size, memory["ddp"].fits) == ("ddp", 48, None)
    assert "no memory limit" in reason


def test_a_micro_batch_that_the_user_set_is_kept():
    _, _, memory = chosen(100, {"ddp": 50}, micro=8)
    assert (memory["ddp"].micro_batch_size, memory["ddp"].fits) == (8, False)
    assert memory["ddp"].traffic == 2  # micro-batches
