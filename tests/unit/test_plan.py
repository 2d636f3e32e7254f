"""The plan of a run: what fits, which strategy and micro-batch follow, and what the command line says of it."""

import json
from pathlib import Path

import pytest
from transformers import BertConfig

from dist_finetune.cli import main
from dist_finetune.data.tables import read_tables
from dist_finetune.plan import Plan, Topology, make_plan, plan_run
from dist_finetune.plan_text import cost_lines, plan_notes
from dist_finetune.spec import Spec

MIB = 2**20


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
        make_plan(spec_of(folder, freeze=f)) for f in ({"embeddings": True, "layers": "first 6"}, "none")
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
    lightest = min(m.state.peak(m.activations) for s, m in roomy.memory.items() if s == "zero3") / MIB
    tight = make_plan(spec_of(folder, freeze="none"), gpus(4, peaks_mib(roomy)["ddp"] / 0.92 - 8))
    assert tight.batches.micro_batch_size < 16 or tight.strategy != "ddp"
    assert tight.misfit is None
    assert tight.memory[tight.strategy].peak <= 0.92 * tight.topology.device_memory_bytes
    assert lightest < peaks_mib(roomy)["ddp"]


def test_a_micro_batch_is_the_largest_divisor_that_fits(folder):
    spec = spec_of(folder, shard={"strategy": "ddp"})
    whole = make_plan(spec, gpus(1, 10_000)).memory["ddp"]
    assert whole.micro_batch_size == 64
    plan = make_plan(spec, gpus(1, (whole.peak - whole.activations / 3) / 0.92 / MIB))
    assert plan.batches.micro_batch_size == 32
    assert plan.batches.gradient_accumulation_steps == 2
    assert plan.memory["ddp"].activations < whole.activations
    assert plan.deepspeed == (None,)


def test_a_strategy_that_does_not_fit_ends_with_code_1_and_a_way_out(folder, capsys):
    arguments = ["plan", str(folder / "plan.yaml"), "--gpus-per-node", "8", "--gpu-memory", "22MiB"]
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
