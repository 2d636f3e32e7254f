"""What strategies share beyond equal numbers: mixed precision, rounded frozen weights, BatchNorm that trains, drift."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, Run, RunJobs, command, read_json, read_lines, run_ranks, train_jobs, write_config
from material import Material
from safetensors.torch import load_file

pytestmark = pytest.mark.dist

OVERFLOW_WORKER = Path(__file__).with_name("overflow_worker.py")
MIXED = ("ddp", "zero2", "zero3", "fsdp")
FP16 = ("ddp", "zero3")
"""Those that overflow are compared under each strategy."""


def config_of(material: Material, strategy: str, frozen: str = "auto", **train: Any) -> dict[str, Any]:
    sections = {"shard": {"strategy": strategy, "frozen": frozen}, "cache": "off"}
    return material.text(train={"max_steps": 8, **train}, **sections)


@pytest.fixture(scope="module")
def mixed(material: Material, runs: RunJobs) -> dict[str, Run]:
    """Eight steps of a BERT on 2 processes, in bf16 and fp16, with frozen weights in bf16, recomputed; and of a CNN."""
    rounded = {"freeze": {"embeddings": True, "layers": "0", "dtype": "bf16"}}
    jobs = [Job("fp32", config_of(material, "ddp"))]
    jobs += [Job(f"bf16-{s}", config_of(material, s, precision="bf16")) for s in MIXED]
    jobs += [Job(f"fp16-{s}", config_of(material, s, precision="fp16")) for s in FP16]
    jobs += [Job(f"rounded-{s}", {**config_of(material, s, precision="bf16"), **rounded}) for s in MIXED]
    jobs += [Job(f"recomputed-{s}", config_of(material, s, gradient_checkpointing=True)) for s in MIXED]
    jobs += [Job("rounded-fsdp-shard", {**config_of(material, "fsdp", "shard", precision="bf16"), **rounded})]
    for strategy, precision in (("ddp", "fp32"), *((s, "bf16") for s in MIXED)):
        train = {"max_steps": 8, "precision": precision}
        jobs.append(
            Job(f"cnn-{precision}-{strategy}", material.image(train=train, shard={"strategy": strategy}, cache="off"))
        )
    return runs(jobs, 2)


@pytest.fixture(scope="module")
def overflowing(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Sixteen steps in fp16 whose first ones overflow, under each strategy and offload, on 2 processes."""
    ways = {"ddp": {}, "zero1": {}, "zero2": {}, "zero3": {}, "fsdp": {}, "zero2 offload": {"offload": "optimizer"}}
    jobs = []
    for name, more in (*ways.items(), ("zero3 offload", {"offload": "parameters"})):
        config = config_of(material, name.split()[0], precision="fp16", max_steps=16)
        jobs.append(Job(name, {**config, "shard": {**config["shard"], **more}}))
    return train_jobs(jobs, 2, tmp_path_factory.mktemp("overflowing"), worker=OVERFLOW_WORKER)


def test_an_overflow_in_fp16_is_left_out_alike_by_every_strategy(overflowing: dict[str, Run]) -> None:
    skipped = {
        name: [row["step"] for row in read_lines(run.folder / "metrics.jsonl") if "train/skipped" in row]
        for name, run in overflowing.items()
    }
    reference = overflowing["ddp"]
    assert 2 < len(skipped["ddp"]) < 12
    assert set(map(tuple, skipped.values())) == {tuple(skipped["ddp"])}
    for name, run in overflowing.items():
        assert run.series("train/loss") == pytest.approx(reference.series("train/loss"), rel=2e-3), name
        assert run.series("train/grad_norm") == pytest.approx(reference.series("train/grad_norm"), rel=2e-2), name


@pytest.mark.parametrize("strategy", MIXED)
def test_recomputing_changes_no_number(mixed: dict[str, Run], strategy: str) -> None:
    plain, recomputed = mixed["fp32"], mixed[f"recomputed-{strategy}"]
    assert recomputed.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5)
    assert recomputed.series("train/grad_norm") == pytest.approx(plain.series("train/grad_norm"), rel=5e-5)


@pytest.mark.parametrize("name", [*(f"bf16-{s}" for s in MIXED), *(f"fp16-{s}" for s in FP16)])
def test_mixed_precision_is_near_fp32_and_not_it(mixed: dict[str, Run], name: str) -> None:
    plain, losses = mixed["fp32"].series("train/loss"), mixed[name].series("train/loss")
    assert losses == pytest.approx(plain, rel=0.05)
    assert losses != plain
    weights = mixed[name].weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # fp32 masters, and the frozen as they were


@pytest.mark.parametrize("strategy", MIXED)
def test_a_cnn_in_bf16_keeps_its_norms_in_fp32(mixed: dict[str, Run], strategy: str, material: Material) -> None:
    """Its convolutions compute in bf16; statistics of BatchNorm, rounded once, would not be those of the source."""
    plain, run = mixed["cnn-fp32-ddp"], mixed[f"cnn-bf16-{strategy}"]
    losses = run.series("train/loss")
    assert losses == pytest.approx(plain.series("train/loss"), rel=0.02)
    assert losses != plain.series("train/loss")
    source, weights = load_file(material.cnn_weights), run.weights()
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    assert {tensor.dtype for tensor in floating.values()} == {torch.float32}
    statistics = [name for name in source if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 30
    assert all(torch.equal(source[name], weights[name]) for name in statistics)
    assert any(not torch.equal(source[name], source[name].bfloat16().float()) for name in statistics)


@pytest.mark.parametrize("name", [*(f"rounded-{s}" for s in MIXED), "rounded-fsdp-shard"])
def test_rounded_frozen_weights_leave_as_they_came(mixed: dict[str, Run], name: str, material: Material) -> None:
    source = load_file(material.bert / "model.safetensors")
    weights = mixed[name].weights()
    key = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(source[key], source[key].bfloat16().float())
    frozen = [n for n in source if n.startswith(("embeddings.", "encoder.layer.0."))]
    assert len(frozen) > 15
    for n in frozen:
        assert torch.equal(weights[f"bert.{n}"], source[n]), n
    assert mixed[name].series("train/loss") == pytest.approx(mixed["fp32"].series("train/loss"), rel=0.05)
    assert len(mixed[name].summary["frozen_verified"]) >= len(frozen)
    whole, half = (mixed[n].summary["memory"]["actual"]["frozen_weights"] for n in (f"bf16-{name.split('-')[1]}", name))
    assert half < 0.6 * whole, "a rank's frozen weights take half as much"


def test_a_parameter_without_a_gradient_is_named_on_every_rank(material: Material, runs: RunJobs) -> None:
    """Also where it takes part on the other rank, and under each strategy; frozen on all, it is no hindrance."""
    free = {"embeddings": False, "layers": None}
    jobs = [
        Job(f"{where}-{strategy}-{frozen}", material.image(
            model={"name": f"unused_model:{where}", "weights": "none"}, shard={"strategy": strategy}, cache="off",
            train={"max_steps": 2, "epochs": 1}, freeze={**free, "patterns": [f"{frozen}.*"]},
        ))
        for where, frozen in (("on_all", "body"), ("on_rank_1", "body"), ("on_all", "spare")) for strategy in MIXED
    ]  # fmt: skip
    for name, run in runs(jobs, 2, may_fail=True).items():
        messages = [rank.get("message") for rank in run.by_rank]
        if name.endswith("spare"):
            assert messages == [None, None], name
        else:
            for message in messages:
                assert "2 trainable parameters have no part in the loss: spare.bias, spare.weight" in message, name
                assert "freeze.patterns=[spare.*]" in message


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_batchnorm_that_trains_has_one_set_of_statistics(material: Material, runs: RunJobs, strategy: str) -> None:
    """They move, and alike: the comparison of replicas, which takes buffers too, would end the run at step 1."""
    free = material.image(
        freeze={"embeddings": False, "layers": None, "patterns": ["fc.bias"]},
        train={"epochs": 2, "micro_batch_size": 8},
        shard={"strategy": strategy},
        cache="off",
    )
    before, after = load_file(material.cnn_weights), runs([Job("moving", free)], 2)["moving"].weights()
    moving = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert len(moving) == 30
    assert not any(torch.equal(before[name], after[name]) for name in moving)


def test_a_cnn_of_depthwise_convolutions_trains_without_a_warning(material: Material, tmp_path: Path) -> None:
    """DDP finds their gradients laid out otherwise than its buckets, and copies them: little, but with a warning."""
    model, train = {"name": "timm:test_convnext", "weights": "none"}, {"max_steps": 2, "epochs": 1}
    config = material.image(model=model, train=train, shard={"strategy": "ddp"}, cache="off", freeze="none")
    path = write_config(tmp_path / "c.yaml", config, name="depthwise", output=str(tmp_path / "runs"))
    done = command("train", path, folder=tmp_path, num_processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr


@pytest.fixture(scope="module")
def drifted(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("drift")
    worker, found = Path(__file__).with_name("drift_worker.py"), {}
    for step in (0, 1):
        config = write_config(
            folder / f"{step}.yaml", config_of(material, "ddp"), name=f"drift-{step}", output=str(folder / "runs")
        )
        done = run_ranks(2, worker, [config, folder / f"{step}.json", step], 300, folder)
        assert done.returncode == 0, done.stderr[-4000:]
        found[step] = [read_json(folder / f"{step}.json.{rank}") for rank in range(2)]
    return found


def test_a_flipped_bit_on_one_rank_ends_the_run_on_all(drifted: dict[int, list[dict[str, Any]]]) -> None:
    for rank in drifted[1]:
        assert rank["error"] == "TrainingError"
        assert "1 tensors differ between ranks, first bert.encoder.layer.2.output.dense.weight" in rank["message"]


def test_replicas_are_compared_at_the_same_steps_on_all_ranks(drifted: dict[int, list[dict[str, Any]]]) -> None:
    one, other = drifted[0]
    assert one["error"] is None
    assert one["compared"] == other["compared"]
    assert one["compared"][0] == 1
