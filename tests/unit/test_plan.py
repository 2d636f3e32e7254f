"""The plan of a run: what fits, which strategy and micro-batch follow, and what the command line says of it."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import BertConfig, FlaubertConfig

from dist_finetune.batch_plan import rows_per_rank
from dist_finetune.cli import main
from dist_finetune.data.tables import read_tables
from dist_finetune.errors import UserError
from dist_finetune.plan import Plan, make_plan, plan_run
from dist_finetune.plan_text import cost_lines, plan_lines, plan_notes, render_plan, room_notes
from dist_finetune.report import Reporter
from dist_finetune.run import _tried
from dist_finetune.spec import LaunchSpec, Spec
from dist_finetune.topology import Topology, least_of
from dist_finetune.world import join_world

MIB = 2**20
WHOLE = {"global_batch_size": 64, "skip_unread": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 8 blocks, as a folder with nothing but config.json, and a table of rows."""
    place = tmp_path_factory.mktemp("plan")
    config = BertConfig(
        vocab_size=2000, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    config.save_pretrained(place / "bert")
    rows = [f"row {i},{'abc'[i % 3]}" for i in range(400)]
    (place / "rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (place / "plan.yaml").write_text(
        f"model: {{name: {place / 'bert'}}}\ndata: {{train: {place / 'rows.csv'}, max_length: 64}}\n"
        "freeze: {embeddings: true, layers: first 6}\ntrain: {global_batch_size: 64}\n"
    )
    return place


def spec_of(folder: Path, **changes: dict) -> Spec:
    base = {
        "model": {"name": str(folder / "bert")},
        "data": {"train": str(folder / "rows.csv"), "max_length": 64},
        "freeze": {"embeddings": True, "layers": "first 6"},
        "train": {"global_batch_size": 64},
        "name": "planned",
    }
    return Spec.model_validate({**base, **changes})


def gpus(count: int, memory_mib: float | None, nodes: int = 1) -> Topology:
    return Topology(nodes, count, "cuda", None if memory_mib is None else int(memory_mib * MIB))


def peaks_mib(plan: Plan) -> dict[str, float]:
    return {strategy: memory.needed / MIB for strategy, memory in plan.memory.items()}


def test_what_is_frozen_shows_in_every_kind_of_bytes(folder):
    half, everything = (
        make_plan(spec_of(folder, freeze=f, train=WHOLE)) for f in ({"embeddings": True, "layers": "first 6"}, "none")
    )
    for strategy, memory in half.memory.items():
        other = everything.memory[strategy]
        assert memory.state.gradients < other.state.gradients / 2
        assert memory.state.optimizer < other.state.optimizer / 2
        assert memory.activations < other.activations / 2
        assert memory.peak < other.peak
    assert half.costs.checkpoint_bytes == 12 * half.widest.manifest.num_trainable
    assert half.costs.forecast.frozen_prefix_share == pytest.approx(0.75, abs=0.01)
    assert everything.costs.forecast.speedup == 1.0
    assert half.costs.forecast.speedup == pytest.approx(3 / 1.5, rel=0.03)


def test_what_no_head_reads_costs_nothing(folder):
    """Of the last block little more than keys and values: here it is one of two that train, below them six of eight."""
    first, whole = (make_plan(spec_of(folder, train={**WHOLE, "skip_unread": skip})) for skip in (True, False))
    assert (first.skips_unread, whole.skips_unread) == (True, False)
    above = 1 - whole.costs.forecast.frozen_prefix_share  # two blocks of eight
    left = above / 2 * (1 + 1 / 6)
    share = 1 - left / (left + 1 - above)
    assert first.costs.forecast.frozen_prefix_share == pytest.approx(share, abs=0.01)
    for strategy, memory in first.memory.items():
        assert memory.activations < 0.7 * whole.memory[strategy].activations
        assert memory.state == whole.memory[strategy].state
    assert "the last block computes no other token" in plan_lines(first)
    assert "the last block computes no other token" not in plan_lines(whole)


def test_sharding_more_holds_less(folder):
    memory = make_plan(spec_of(folder), gpus(8, None)).memory
    totals = [memory[strategy].total for strategy in ("ddp", "zero1", "zero2", "zero3")]
    assert totals == sorted(totals, reverse=True)
    assert memory["zero2"].state.frozen_weights == memory["ddp"].state.frozen_weights
    assert memory["zero3"].state.frozen_weights < memory["ddp"].state.frozen_weights / 7.9
    assert memory["ddp"].traffic < memory["zero3"].traffic


def test_auto_takes_ddp_where_it_fits_and_what_fits_where_it_does_not(folder):
    roomy = make_plan(spec_of(folder, freeze="none"), gpus(4, 10_000))
    assert roomy.strategy == "ddp"
    assert roomy.batches.micro_batch_size == 16
    assert roomy.misfit is None
    tight = make_plan(spec_of(folder, freeze="none"), gpus(4, peaks_mib(roomy)["ddp"] / 0.92 - 8))
    assert tight.batches.micro_batch_size < 16 or tight.strategy != "ddp"
    assert tight.misfit is None
    assert tight.memory[tight.strategy].peak <= 0.92 * tight.topology.device_memory_bytes
    assert peaks_mib(roomy)["fsdp"] < peaks_mib(roomy)["ddp"]


def test_offloading_is_shown_and_named_where_nothing_else_fits(folder):
    def planned(topology: Topology, **changes: object) -> Plan:
        return plan_run(spec_of(folder, freeze="none", **changes), topology, tables)

    tables = read_tables(spec_of(folder).data, 0)
    tiny = planned(gpus(2, 1))  # where nothing fits, at one row each
    zero3, offloaded = tiny.memory["zero3"], tiny.costs.offloaded
    assert offloaded.state.optimizer == offloaded.state.trainable_weights == offloaded.state.gradients == 0
    # weight, master copy, gradient and two moments of each
    assert zero3.total - offloaded.total == pytest.approx(20 * tiny.widest.manifest.num_trainable / 2, rel=0.01)
    assert "offload" not in tiny.misfit
    eight_rows = {"global_batch_size": 16, "micro_batch_size": 8}
    assert "a smaller train.micro_batch_size" not in planned(gpus(2, 1), train=eight_rows).misfit  # state is too large
    between = (min(m.needed for m in tiny.memory.values()) + offloaded.needed) / 2
    assert "shard: {strategy: zero3, offload: parameters}" in planned(gpus(2, between / 0.92 / MIB)).misfit
    for section in ({"strategy": "zero3", "offload": "parameters"}, {"strategy": "zero2", "offload": "optimizer"}):
        assert planned(gpus(2, None), shard=section).costs.offloaded is None
    assert planned(Topology(1, 2, "cpu")).costs.offloaded is None


def test_a_micro_batch_that_divides_nothing_names_those_that_do_at_once(folder):
    spec = spec_of(folder, train={"global_batch_size": 2**30, "micro_batch_size": 3})
    with pytest.raises(UserError, match=rf"does not divide the {2**29} samples .* use one of 1, 2, 4, .*, {2**29}$"):
        rows_per_rank(spec, gpus(2, None))


def test_more_gpus_are_offered_where_they_would_share_what_does_not_fit(folder):
    def ways(count: int, strategy: str) -> str:
        return str(make_plan(spec_of(folder, shard={"strategy": strategy}), gpus(count, 1)).misfit)

    for count in (1, 2):
        assert "or more GPUs" in ways(count, "auto")
        assert "more GPUs" not in ways(count, "ddp")  # each would hold as much
    assert "or more GPUs" in ways(1, "zero3")


def test_ranks_of_different_devices_plan_for_the_weakest(folder):
    ranks = [
        Topology(1, 2, "cuda", 80 * 1024 * MIB, supports_bf16=True),
        Topology(1, 2, "cuda", 40 * 1024 * MIB, supports_bf16=False),
    ]
    first, second = (make_plan(spec_of(folder), least_of(rank, ranks)) for rank in ranks)
    assert first.digest() == second.digest()
    assert (first.topology.device_memory_bytes, first.precision) == (40 * 1024 * MIB, "fp32")
    cpus = [Topology(has_amx=True), Topology(has_amx=False)]
    assert least_of(cpus[0], cpus) == least_of(cpus[1], cpus) == cpus[1]


def test_an_evaluation_takes_no_more_rows_than_training_would_have_room_for(folder):
    spec = spec_of(folder, freeze="none", data={"train": str(folder / "rows.csv"), "max_length": 512})
    assert make_plan(spec, gpus(1, None)).batches.eval_batch_size == 128
    assert make_plan(spec, gpus(1, 80 * 1024)).batches.eval_batch_size == 128
    small = make_plan(spec, gpus(1, 200))
    batches, found = small.batches, small.memory["ddp"]
    assert batches.micro_batch_size <= batches.eval_batch_size < 64
    room = 0.92 * 200 * MIB - found.state.total - found.state.communication
    assert small.costs.activations.at(batches.eval_batch_size) <= room
    few = spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch_size": 1})})
    assert make_plan(few, gpus(1, 80 * 1024)).batches.eval_batch_size == 64


def test_a_micro_batch_is_the_largest_divisor_that_fits(folder):
    spec = spec_of(folder, shard={"strategy": "ddp"})
    roomy = make_plan(spec, gpus(1, 10_000))
    whole = roomy.memory["ddp"]
    assert (whole.micro_batch_size, roomy.batches.eval_batch_size) == (64, 128)
    plan = make_plan(spec, gpus(1, (whole.peak - whole.activations / 3) / 0.92 / MIB))
    assert plan.batches.micro_batch_size == 32
    assert plan.batches.gradient_accumulation_steps == 2
    assert plan.memory["ddp"].activations < whole.activations
    assert plan.deepspeed == (None,)


def test_a_run_takes_the_micro_batch_that_ran_when_it_was_tried(folder, monkeypatch, capsys):
    """And the strategy that it was tried with, where the plan of so few rows alone takes one that holds more."""
    spec = spec_of(folder, freeze="none")
    tables = read_tables(spec.data, 0)
    plan, tried = plan_run(spec, gpus(4, 56), tables), []
    with join_world(LaunchSpec()) as world:
        for rows in (8, 4):
            monkeypatch.setattr("dist_finetune.run.tried_micro_batch", lambda plan, world, rows=rows: (rows, None))
            tried.append(_tried(plan, tables, world, Reporter(True)))
    whole, half = tried
    assert whole is plan
    assert (plan.batches.micro_batch_size, plan.batches.gradient_accumulation_steps) == (8, 2)
    changed = {"micro_batch_size": 4, "gradient_accumulation_steps": 4, "micro_batch_tokens": 4 * 64}
    assert half.batches == replace(plan.batches, **changed, eval_batch_size=half.batches.eval_batch_size)
    assert (half.strategy, half.strategy_reason) == (plan.strategy, plan.strategy_reason)
    ddp = plan.memory["ddp"]
    assert (ddp.micro_batch_size, ddp.fits, ddp.peak > plan.memory[plan.strategy].peak) == (4, True, True)
    assert half.memory[plan.strategy].peak < plan.memory[plan.strategy].peak
    assert capsys.readouterr().out == "note: micro-batch 4: the planned 8 ran out of memory when tried\n"


def test_a_run_that_nothing_tries_says_what_the_plan_says(folder):
    tables = read_tables(spec_of(folder).data, 0)
    eight_rows = {"global_batch_size": 16, "micro_batch_size": 8}
    tight = plan_run(spec_of(folder, train=eight_rows), gpus(2, 1), tables)
    assert room_notes(tight) == [f"this run may end for lack of memory: {tight.misfit}"]
    assert room_notes(plan_run(spec_of(folder, train=eight_rows), gpus(2, 80 * 1024), tables)) == []
    assert room_notes(plan_run(spec_of(folder), gpus(2, 1), tables)) == [], "which is tried"


def test_layers_that_are_left_out_at_random_are_for_one_process(folder, tmp_path):
    """Other processes would leave out others, and wait for each other."""
    config = FlaubertConfig(vocab_size=2000, emb_dim=16, n_layers=2, n_heads=2, layerdrop=0.2)
    config.save_pretrained(tmp_path / "flaubert")
    model = {"name": str(tmp_path / "flaubert")}
    tables = read_tables(spec_of(folder).data, 0)
    plan_run(spec_of(folder, model=model, freeze="none"), Topology(1, 1), tables)
    with pytest.raises(UserError, match=r"leaves out layers at random \(transformer.layerdrop is 0.2\), each of 2"):
        plan_run(spec_of(folder, model=model, freeze="none"), Topology(1, 2), tables)
    plan_run(spec_of(folder, model=model, freeze="backbone"), Topology(1, 2), tables)
    plan_run(spec_of(folder, model=model | {"dropout": 0.0}, freeze="none"), Topology(1, 2), tables)
    plan_run(spec_of(folder, model=model, freeze="none", task="features"), Topology(1, 2), tables)


def test_a_plan_is_for_the_gpus_that_a_run_would_take(folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    for asked, expected in (([], 4), (["--gpus-per-node", "2"], 2), (["--gpu-memory", "40GiB"], 4)):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(folder / "plan.yaml"), "--json", *asked])
        assert ended.value.code == 0
        assert json.loads(capsys.readouterr().out)["topology"]["processes_per_node"] == expected


def test_a_strategy_that_does_not_fit_ends_with_code_1_and_a_way_out(folder, capsys):
    arguments = ["plan", str(folder / "plan.yaml"), "--gpus-per-node", "8", "--gpu-memory", "17MiB"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "shard.strategy=ddp", "train.micro_batch_size=8"])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert "ddp needs" in message
    assert "zero" in message or "fsdp" in message
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(folder / "plan.yaml"), "--gpus-per-node", "8", "--gpu-memory", "8GiB", "shard.strategy=ddp"])
    assert ended.value.code == 0
    assert "fits" in capsys.readouterr().out


def test_json_holds_every_strategy_and_4096_ranks_are_planned(folder, capsys):
    arguments = ["--nodes", "512", "--gpus-per-node", "8", "--gpu-memory", "80GiB", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(folder / "plan.yaml"), *arguments, "train.global_batch_size=4096"])
    assert ended.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["topology"]["num_nodes"] * plan["topology"]["processes_per_node"] == 4096
    assert {"ddp", "zero1", "zero2", "zero3"} <= plan["memory"].keys()
    for memory in plan["memory"].values():
        assert memory["fits"] is True
        assert memory["peak"] > memory["state"]["frozen_weights"] > 0
    trainable = 4 * plan["phases"][0]["manifest"]["num_trainable"]
    assert plan["memory"]["zero1"]["state"]["optimizer"] == pytest.approx(2 * trainable / 4096, rel=0.05)
    assert plan["costs"]["host_bytes_per_node"] > 8 * trainable
    assert plan["costs"]["forecast"]["speedup"] > 1.5


def test_what_gradient_checkpointing_would_change_is_told_in_numbers(folder):
    train = {"global_batch_size": 64, "micro_batch_size": 16}
    plain, recomputed = (
        make_plan(spec_of(folder, freeze="none", train={**train, "gradient_checkpointing": on})) for on in (False, True)
    )
    for plan, other, way in ((plain, recomputed, "with"), (recomputed, plain, "without")):
        ours, theirs = (f"{p.costs.activations.at(16) / MIB:,.1f}" for p in (plan, other))
        (line,) = [line for line in cost_lines(plan) if line.startswith("activations")]
        assert line.startswith(f"activations {ours} MiB for 16 rows (")
        assert line.endswith(f", {theirs} {way} train.gradient_checkpointing")
    assert recomputed.costs.activations.at(16) < 0.6 * plain.costs.activations.at(16)


def test_frozen_weights_that_every_rank_keeps_are_named(folder):
    plan = make_plan(spec_of(folder, shard={"strategy": "zero2"}), gpus(8, 80_000))
    note = next(note for note in plan_notes(plan) if "zero2 keeps all frozen weights on every rank" in note)
    assert f"{plan.memory['zero3'].state.frozen_weights / MIB:,.1f}" in note
    for strategy, topology in (("zero3", gpus(8, 80_000)), ("ddp", gpus(1, 80_000))):
        other = make_plan(spec_of(folder, shard={"strategy": strategy}), topology)
        assert not any("on every rank" in note for note in plan_notes(other))


def test_a_worker_leaves_out_the_pass_where_it_decides_nothing(folder):
    spec = spec_of(folder)
    tables = read_tables(spec.data, 0)
    worker = plan_run(spec, Topology(1, 2, "cpu"), tables)
    assert worker.costs.forecast is None
    assert worker.memory["ddp"].peak is None
    assert plan_run(spec, gpus(2, 80_000), tables).memory["ddp"].peak is not None
    full = plan_run(spec, Topology(1, 2, "cpu"), tables, measure=True)
    assert full.memory["ddp"].state == worker.memory["ddp"].state
    assert full.batches == worker.batches
    assert any("forecast" in line for line in cost_lines(full))


def test_a_model_that_needs_data_is_planned_without_activations(folder, monkeypatch, tmp_path):
    (tmp_path / "peeking_model.py").write_text(
        "from torch import nn\n"
        "class Peeks(nn.Module):\n"
        "    def __init__(self, n):\n"
        "        super().__init__()\n"
        "        self.embed, self.fc = nn.Embedding(30600, 8), nn.Linear(8, n)\n"
        "    def forward(self, input_ids, attention_mask, **more):\n"
        "        x = self.embed(input_ids)[:, : int(attention_mask.sum())]\n"
        "        return self.fc(x.mean(1))\n"
        "def make(num_classes):\n"
        "    return Peeks(num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = make_plan(
        spec_of(folder, model={"name": "peeking_model:make", "weights": "none"}, freeze="none"), gpus(2, 800)
    )
    assert plan.memory["ddp"].peak is None
    assert plan.memory["ddp"].fits is True
    assert any("activations unknown" in line for line in cost_lines(plan))


@pytest.mark.parametrize(
    ("topology", "asked", "precision", "reason"),
    [
        (Topology(), "auto", "fp32", "auto: this CPU has no AMX"),
        (Topology(has_amx=True), "auto", "fp32", "it has AMX, so train.precision=bf16 would be much faster"),
        (Topology(has_amx=True), "bf16", "bf16", "asked for"),
        (Topology(device="cuda"), "auto", "bf16", "auto: this GPU has it"),
        (Topology(device="cuda", supports_bf16=False), "auto", "fp32", "auto: this GPU has no bf16"),
        (Topology(device="cuda", is_seen=False), "auto", "bf16", "auto: taken to be there; a V100 or T4 has none"),
    ],
)
def test_the_plan_says_why_a_precision(folder, topology, asked, precision, reason):
    plan = make_plan(spec_of(folder, train={"precision": asked}), topology)
    assert plan.precision == precision
    assert reason in plan.precision_reason
    assert f"precision {precision} on {topology.device}, {plan.precision_reason}" in plan_lines(plan)


def test_short_texts_share_a_micro_batch_only_where_auto_accumulates(folder):
    def tokens(**train: object) -> int | None:
        return make_plan(spec_of(folder, train=train), Topology(1, 2)).batches.micro_batch_tokens

    assert tokens(global_batch_size=256) == 32 * 64  # micro-batches of 32 rows of at most 64 tokens, four of them
    assert tokens(global_batch_size=64) is None
    assert tokens(global_batch_size=256, micro_batch_size=32) is None


def test_memory_is_that_of_the_phase_that_needs_most(folder):
    """Biases alone train few numbers, and need the activations of every block; the top block the other way round."""
    phases = {
        "top": {"name": "top", "freeze": "all-but-last 1", "epochs": 1},
        "bias": {"name": "bias", "freeze": "bias-only", "epochs": 1},
    }
    rows = {"train": {"global_batch_size": 64, "micro_batch_size": 64}}

    def planned(*names: str) -> Plan:
        return make_plan(spec_of(folder, freeze=None, phases=[phases[n] for n in names], **rows), gpus(1, 10_000))

    both, top, bias = planned("top", "bias"), planned("top"), planned("bias")
    assert both.widest.name == "top"
    assert top.memory["ddp"].phase is bias.memory["ddp"].phase is None
    assert both.memory["ddp"].phase == "bias"
    assert both.memory["ddp"].peak == bias.memory["ddp"].peak > top.memory["ddp"].peak * 1.5
    assert [states["ddp"] for states in both.costs.by_phase] == [top.memory["ddp"].state, bias.memory["ddp"].state]
    tight = gpus(1, (bias.memory["ddp"].peak + top.memory["ddp"].peak) / 2 / 0.92 / MIB)
    spec = spec_of(folder, freeze=None, phases=list(phases.values()), train={"global_batch_size": 64})
    assert make_plan(spec, tight).batches.micro_batch_size < 64  # what the top phase alone could have
    nested = make_plan(spec_of(folder, freeze=None, phases="gradual", train={"global_batch_size": 64}), gpus(1, None))
    assert nested.memory["ddp"].phase is None  # the last phase trains all that others train


def test_what_is_offloaded_is_counted_in_host_memory(folder):
    shard = {"strategy": "zero2", "offload": "optimizer"}
    there, plain = (make_plan(spec_of(folder, shard=s), gpus(2, None)) for s in (shard, {"strategy": "zero2"}))
    state, whole = there.memory["zero2"].state, plain.memory["zero2"].state
    assert state.offloaded == whole.optimizer + whole.masters == whole.total - state.total > 0
    line = next(line for line in cost_lines(there) if line.startswith("offload"))
    assert f"{2 * state.offloaded / MIB:,.1f} on a node" in line
    on_cpu = make_plan(spec_of(folder, shard=shard), Topology(1, 2, "cpu")).memory["zero2"].state
    assert on_cpu.offloaded == 0  # a CPU's own memory is host memory
    assert on_cpu.optimizer == whole.optimizer


def test_json_tells_by_part_and_phase_what_is_frozen_and_the_rates(folder):
    plan = make_plan(spec_of(folder, train={"global_batch_size": 64, "lr": 1e-4, "head_lr": 1e-3}))
    parts = {part["part"]: part["phases"]["train"] for part in plan.to_json()["parts"]}
    assert parts["block 0"]["lr"] == []
    assert parts["block 0"]["num_frozen"] > 0
    assert parts["block 7"] == {"num_frozen": 0, "lr": [1e-4]}
    assert parts["head"] == {"num_frozen": 0, "lr": [1e-3]}


def test_the_plan_shows_what_each_rule_took(folder: Path) -> None:
    freeze = {"embeddings": True, "layers": "first 6", "except": ["*.bias"]}
    plan = make_plan(spec_of(folder, freeze=freeze, train={"global_batch_size": 64, "lr": 2e-5, "head_lr": 1e-3}))
    console = Console(width=200, file=io.StringIO(), markup=False)
    console.print(render_plan(plan))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    embeddings, layers, excepted = plan.phases[0].manifest.rules
    assert "parameters by rule: embeddings: 5 tensors, " in shown
    assert f"embeddings: {embeddings.num_tensors} tensors, {embeddings.num_params:,}" in shown
    assert f'layers "first 6": {layers.num_tensors} tensors, {layers.num_params:,}' in " ".join(shown.split())
    assert f"except *.bias: {excepted.num_tensors} tensors, {excepted.num_params:,}" in " ".join(shown.split())
    rows = {row[0]: row[2:] for row in (re.split(r" *[│┃] *", line)[1:-1] for line in shown.splitlines()) if row}
    assert rows["block 5"] == ["198,272", "196,864", "2e-05"]  # of 128 and 512 features: 1,408 are biases
    assert rows["block 6"] == ["198,272", "0", "2e-05"]
    assert rows["head"] == ["387", "0", "0.001"]


def test_what_trains_below_frozen_blocks_is_told_with_what_freezing_it_would_gain(folder):
    classic, filled = (
        make_plan(spec_of(folder, freeze=freeze))
        for freeze in ({"layers": "1,2,3"}, {"embeddings": True, "layers": "0-3"})
    )
    assert filled.costs.forecast_filled_up is None
    assert classic.costs.forecast_filled_up == filled.costs.forecast
    assert classic.costs.forecast.speedup < filled.costs.forecast.speedup
    assert f"{filled.costs.forecast.speedup:.2f}x, and" in "\n".join(cost_lines(classic))
    more = classic.widest.manifest.num_trainable - filled.widest.manifest.num_trainable
    note = next(note for note in plan_notes(classic) if "below frozen" in note)
    assert f"{more:,} more parameters out of training, {12 * more / MIB:,.1f} MiB" in note


def test_plan_imports_no_library_that_it_does_not_need_and_ends_at_once(folder):
    """Of images first: what it imports counts for the plan of texts, in the same process, too."""
    digits = folder / "digits.yaml"
    digits.write_text("model: {name: timm:resnet10t, weights: none}\ndata: {train: builtin:digits, image_size: 32}\n")
    code = f"""
import atexit, gc, sys
from dist_finetune.cli import main
atexit.register(lambda: print("left aside at the end:", gc.get_freeze_count() > 100_000))  # comes after main's own
unneeded = ["sklearn", "deepspeed", "matplotlib", "torchmetrics", "aiohttp", "onnx"]
for config, names in (({str(digits)!r}, ["transformers", *unneeded]), ({str(folder / "plan.yaml")!r}, unneeded)):
    try:
        main(["plan", config])
    except SystemExit as end:
        assert end.code in (0, None), end.code
    print("unneeded:", [name for name in names if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unneeded: []") == 2, done.stdout
    assert done.stdout.endswith("left aside at the end: True\n")


def test_epochs_beside_phases_that_have_their_own_are_noted(folder: Path) -> None:
    phases = [{"name": "head", "freeze": "backbone", "epochs": 1}]
    said = "train.epochs: 5 has no effect: each phase has its own epochs"
    given, left_out = (spec_of(folder, freeze="none", phases=phases, train=train) for train in ({"epochs": 5}, {}))
    assert said in plan_notes(make_plan(given, gpus(1, None)))
    assert not any("train.epochs" in note for note in plan_notes(make_plan(left_out, gpus(1, None))))


def test_a_plan_names_the_pixels_of_images(folder):
    model, data = {"name": "timm:resnet10t", "weights": "none"}, {"train": "builtin:digits", "image_size": 32}
    plan = make_plan(spec_of(folder, model=model, data=data, freeze={}), Topology())
    assert "rows, 32 x 32 pixels" in plan_lines(plan)


def test_a_plan_refuses_images_that_the_model_can_not_take(folder):
    model, data = {"name": "torchvision:alexnet", "weights": "none"}, {"train": "builtin:digits", "image_size": 33}
    with pytest.raises(UserError, match=r"data\.image_size: .* 33x33 pixels"):
        make_plan(spec_of(folder, model=model, data=data, freeze="none"))
