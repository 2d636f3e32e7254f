"""What of features is held at once: a batch's tokens while they are computed, all rows while a head is fitted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import stored_features
from material import NUM_VALIDATION, Material, write_material
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dist_finetune.data.loading import Rows
from dist_finetune.features import minibatch, run
from dist_finetune.features.extract import plan_shards
from dist_finetune.features.room import VERSION_1, VERSION_2, available_bytes, fits
from dist_finetune.features.store import Store
from dist_finetune.report import Reporter
from dist_finetune.spec import LaunchSpec
from dist_finetune.spec_file import load_spec
from dist_finetune.world import join_world


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


def test_features_beyond_memory_are_not_fitted_in_memory() -> None:
    """10,000 rows of 4,096 features are 0.33 GB in float64, three times that while a head is fitted."""
    assert fits(10_000, 4_096, 1, 10**9)
    assert not fits(10_000, 4_096, 2, 10**9)
    assert not fits(40_000, 4_096, 1, 10**9)


@pytest.mark.parametrize(
    ("groups", "place", "limit", "expected_mib"),
    [
        ("0::/", ".", "max", 8),
        ("0::/", ".", str(4 * 2**20), 3),
        ("0::/slurm/job_7/step_0", "slurm/job_7", str(4 * 2**20), 3),  # not the step's own, but the job's
        ("0::/../kubepods/pod", ".", str(4 * 2**20), 3),  # as a container's is seen from outside
        ("4:cpu:/\n3:memory:/job", "memory/job", str(4 * 2**20), 3),
        ("0::/", "elsewhere", str(4 * 2**20), 8),
    ],
)
def test_memory_is_the_machines_or_the_jobs(
    tmp_path: Path, groups: str, place: str, limit: str, expected_mib: int
) -> None:
    """Of 2 MiB in use 1 is cached files."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(f"{groups}\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable: 8192 kB\n")
    names = VERSION_1 if "memory" in groups else VERSION_2
    group = tmp_path / "groups" / place
    group.mkdir(parents=True)
    (group / names[0]).write_text(limit)
    (group / names[1]).write_text(str(2 * 2**20))
    (group / "memory.stat").write_text(f"anon 1\n{names[2]} {2**20}\n")
    assert available_bytes(tmp_path, tmp_path / "groups") == expected_mib * 2**20


def test_batches_are_cut_by_tokens_as_well_as_rows() -> None:
    lengths = np.full(40, 100, np.int32)
    rows = Rows(list(range(40)), list, lengths, pass_tokens=800)  # type: ignore[arg-type]
    shards = plan_shards(rows, batch_size=16)
    assert {len(batch) for shard in shards for batch in shard.batches} == {8}
    assert sorted(np.concatenate([shard.ids for shard in shards])) == list(range(40))


@pytest.mark.parametrize(
    ("limit", "value", "kind"), [("MAX_EXACT_ROWS", 10, "softmax"), ("available_bytes", lambda: 0, "svm")]
)
def test_the_model_of_a_head_fitted_from_disk_predicts_as_that_head(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: Any, kind: str
) -> None:
    """Beyond so many rows, and beyond memory."""
    monkeypatch.setattr(run, limit, value)
    monkeypatch.setattr(minibatch, "MIN_STEPS", 100)
    monkeypatch.setattr(minibatch, "WEIGHT_DECAYS", (2e-4, 2e-2))  # none of scikit-learn's values
    config = material.text(task="features", freeze="none", features={"at": ["head"], "heads": [kind]})
    summary = run.compare_heads(load_spec({**config, "output": str(tmp_path), "name": "large"}))
    assert summary.best == summary.folded == summary.results[0]
    assert summary.best.regularisation in minibatch.WEIGHT_DECAYS
    assert summary.num_rows_predicted_alike == NUM_VALIDATION
    head = load_file(summary.folder / "heads" / "linear.safetensors")
    features, labels = stored_features(Path(summary.features), "validation", "head")
    scores = torch.from_numpy(features).double() @ head[f"head/{kind}/weight"].T + head[f"head/{kind}/bias"]
    predicted = scores.argmax(1).numpy()
    assert summary.metrics == {"eval/accuracy": pytest.approx(np.mean(predicted == labels))}
    assert set(predicted) == {0, 1, 2}
    model = AutoModelForSequenceClassification.from_pretrained(summary.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(summary.folder / "model")
    texts = [line.rsplit(",", 1)[0] for line in material.validation.read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(logits.double(), scores, rtol=1e-4, atol=1e-4)
    assert np.array_equal(logits.argmax(1), predicted)


def test_of_the_rbf_svms_only_the_best_goes_to_the_other_processes(tmp_path: Path) -> None:
    labels, draw = torch.arange(40) % 2, torch.Generator().manual_seed(0)
    noise = torch.randn(40, 3, generator=draw)
    store = Store(tmp_path, None)  # type: ignore[arg-type]
    for split in ("train", "validation"):
        tensors = {"ids": torch.arange(40), "labels": labels, "block 0": noise, "head": noise + 4 * labels[:, None]}
        store.write(split, 0, tensors)
    spec = load_spec({"model": {"name": "m"}, "data": {"train": "rows.csv"}, "name": "x"})
    with join_world(LaunchSpec()) as world:
        job: Any = SimpleNamespace(
            world=world, store=store, num_classes=2, plan=SimpleNamespace(spec=spec), report=Reporter(False),
            splits={"train": SimpleNamespace(num_rows=40)},
            depths=[SimpleNamespace(label="block 0"), SimpleNamespace(label="head")],
        )  # fmt: skip
        found = run.fit_heads(job, ["svm", "rbf-svm"])
    assert [(fit.depth, fit.kind) for fit, _ in found if fit.estimator] == [("head", "rbf-svm")]
    best, result = found[3]
    features, _ = store.read("validation", "head", 40)
    assert np.mean(best.scores(features).argmax(1) == labels.numpy()) == result.accuracy
