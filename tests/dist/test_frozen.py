"""What is frozen does not move by a bit on any strategy: weights, BatchNorm statistics; and dropout stays off."""

import pytest
import torch
from harness import MATRIX, STRATEGIES, Job, Matrix, Run, RunJobs, read_json
from material import Material
from safetensors.torch import load_file

from dist_finetune.proof import digest_tensor

pytestmark = pytest.mark.dist

WAYS = [f"{kind}-{num_processes}-{strategy}" for kind in ("text", "image") for num_processes, strategy in MATRIX]
NUM_FROZEN = {"text": (21, 0), "image": (38, 45)}
"""Parameters and buffers: 5 tensors of the embeddings and 16 of a block; 3 convolutions of the stem, the 5 of two
stages, and 2 parameters and 3 buffers of each of the 15 BatchNorms."""


def source_of(material: Material, kind: str) -> dict[str, torch.Tensor]:
    """The weights that the run started from, under the names of the run's model."""
    if kind == "image":
        return load_file(material.cnn_weights)
    return {f"bert.{name}": tensor for name, tensor in load_file(material.bert / "model.safetensors").items()}


@pytest.mark.parametrize("way", WAYS)
def test_frozen_tensors_are_those_of_the_source(matrix: Matrix, material: Material, way: str) -> None:
    kind, run = way.partition("-")[0], matrix.all[way]
    verified = run.summary["frozen_verified"]
    source, exported = source_of(material, kind), run.weights()
    assert len(verified) == len(set(verified)) == sum(NUM_FROZEN[kind])
    for name in verified:
        assert torch.equal(exported[name], source[name]), name
    inherited = [name for name in source if exported[name].shape == source[name].shape]  # all but a new head
    moved = [name for name in inherited if not torch.equal(exported[name], source[name])]
    assert sorted([*verified, *moved]) == sorted(inherited)


@pytest.mark.parametrize("way", WAYS)
def test_freeze_json_names_every_tensor_and_digest(matrix: Matrix, way: str) -> None:
    run = matrix.all[way]
    (phase,) = read_json(run.folder / "freeze.json")["phases"].values()
    exported = run.weights()
    assert [t["name"] for t in phase["tensors"] if t["frozen"]] == run.summary["frozen_verified"]
    assert {t["name"] for t in phase["tensors"]} == set(exported)
    for tensor in phase["tensors"]:
        assert tuple(tensor["shape"]) == exported[tensor["name"]].shape
        assert tensor["sha256"] == (digest_tensor(exported[tensor["name"]]) if tensor["frozen"] else None)


@pytest.fixture(scope="module")
def dropouts(material: Material, runs: RunJobs) -> dict[str, Run]:
    """A BERT of which only the head trains, at dropout 0.4 in its backbone (none in its head), and at 0."""
    jobs, train = [], {"global_batch_size": 32, "micro_batch_size": 8}
    for strategy in STRATEGIES:
        for name, dropout, mode in (("off", 0.0, "eval"), ("held", None, "eval"), ("active", None, "train")):
            shard, freeze = {"strategy": strategy}, {"embeddings": True, "layers": "all"}
            # a cache would hold one dropout's numbers
            config = material.text(shard=shard, freeze=freeze, train=train, cache="off")
            config["model"]["dropout"] = dropout
            config["freeze"] |= {"patterns": ["bert.pooler.*"], "mode": mode}
            jobs.append(Job(f"{strategy}-{name}", config))
    return runs(jobs, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_dropout_stays_off_in_every_epoch(dropouts: dict[str, Run], strategy: str) -> None:
    off, held, active = (dropouts[f"{strategy}-{name}"].series("train/loss") for name in ("off", "held", "active"))
    assert len(off) == 10
    assert held == off
    assert max(abs(a - b) for a, b in zip(off, active, strict=True)) > 1e-3


@pytest.fixture(scope="module")
def norms(material: Material, runs: RunJobs) -> dict[str, Run]:
    """CNNs at 2 processes whose frozen BatchNorm is held, and whose is not, for two epochs."""
    jobs = []
    for mode in ("eval", "train"):
        for strategy in STRATEGIES:
            freeze = {"rule": "backbone", "mode": mode}
            config = material.image(shard={"strategy": strategy}, train={"epochs": 2}, cache="off") | {"freeze": freeze}
            jobs.append(Job(f"{strategy}-{mode}", config))
    return runs(jobs, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_batchnorm_normalises_by_stored_statistics(
    norms: dict[str, Run], material: Material, strategy: str
) -> None:
    source = load_file(material.cnn_weights)
    statistics = [name for name in source if "running_" in name or "num_batches" in name]
    held, free = norms[f"{strategy}-eval"], norms[f"{strategy}-train"]
    assert len(statistics) == 45
    for name in statistics:
        assert torch.equal(held.weights()[name], source[name]), name
        assert not torch.equal(free.weights()[name], source[name]), name
    assert {*statistics} <= {*held.summary["frozen_verified"]}
    assert not {*statistics} & {*free.summary["frozen_verified"]}
    # the first loss is log(3) for both, as the new head is zeros: what it sees differs
    assert held.series("train/grad_norm")[0] != free.series("train/grad_norm")[0]
