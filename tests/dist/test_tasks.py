"""Multilabel, regression and token classification: the same numbers in every way, right ones, and models that load."""

import json
import sys
from pathlib import Path

import pytest
import torch
from harness import Job, Run, RunJobs, finish, read_json
from material import NUM_TASK_TRAIN, NUM_TASK_VALIDATION, NUM_VALIDATION_IMAGES, Material
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForTokenClassification, AutoTokenizer

from dist_finetune.tasks.names import METRICS

pytestmark = pytest.mark.dist

TASKS = {"tags": "token-classification", "topics": "multilabel", "score": "regression"}
STRATEGIES = ("zero2", "zero3", "fsdp")
SHORT = {"epochs": 1, "lr": 1e-3}
ONE_BATCH = {**SHORT, "global_batch_size": NUM_TASK_TRAIN + 3}


@pytest.fixture(scope="module")
def alone(material: Material, runs: RunJobs) -> dict[str, Run]:
    """Runs on one process without accumulation; their last global batch has 13 rows of 16."""
    train = {**SHORT, "micro_batch_size": 16}
    jobs = [Job(label, material.task(label, cache="off", train=train)) for label in TASKS]
    return runs([*jobs, Job("colours", material.image_task("colours", cache="off", train=train))], 1)


@pytest.fixture(scope="module")
def both(material: Material, runs: RunJobs, alone: dict[str, Run]) -> dict[str, Run]:
    """Runs on two processes that accumulate; `again` goes on with the model of a run of `alone`."""
    jobs = []
    for label in TASKS:
        for strategy in STRATEGIES:
            config = material.task(label, cache="off", train=SHORT, shard={"strategy": strategy})
            jobs.append(Job(f"{label}-{strategy}", config))
    jobs.append(Job("tags-cached", material.task("tags", cache="on", train=SHORT, shard={"strategy": "zero2"})))
    phases = [{"name": "head", "freeze": "backbone", "epochs": 1}, {"name": "all", "freeze": "none", "epochs": 1}]
    best = {"best": "eval/mae"}
    jobs.append(Job("score-phases", material.task("score", freeze=None, phases=phases, checkpoint=best)))
    base = {"name": str(alone["tags"].folder / "model"), "dropout": 0.0}
    jobs.append(Job("again", material.task("tags", model=base, train=ONE_BATCH, shard={"strategy": "zero2"})))
    for name, strategy in (("colours", "zero2"), ("brightness", "fsdp")):
        config = material.image_task(name, train=SHORT, cache="off", shard={"strategy": strategy})
        jobs.append(Job(f"{name}-{strategy}", config))
    return runs(jobs, 2)


def check_same(reference: Run, other: Run, num_steps: int) -> None:
    for key, tolerance in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
        assert other.series(key) == pytest.approx(reference.series(key), rel=tolerance), key
    assert len(reference.series("train/loss")) == num_steps
    assert reference.series("train/lr") == other.series("train/lr")
    for key, value in reference.summary["metrics"].items():
        assert other.summary["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    mine, theirs = other.predictions(), reference.predictions()
    torch.testing.assert_close(mine["logits"], theirs["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(mine["labels"], theirs["labels"])
    assert torch.equal(mine["rows"], theirs["rows"])


@pytest.mark.parametrize("label", TASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_texts_in_every_way(alone: dict[str, Run], both: dict[str, Run], label: str, strategy: str) -> None:
    losses = alone[label].series("train/loss")
    assert max(losses) - min(losses) > 1e-3
    check_same(alone[label], both[f"{label}-{strategy}"], num_steps=3)


def test_images_with_several_labels(alone: dict[str, Run], both: dict[str, Run]) -> None:
    check_same(alone["colours"], both["colours-zero2"], num_steps=3)


def test_tags_from_the_cache(both: dict[str, Run]) -> None:
    plan = read_json(both["tags-cached"].folder / "plan.json")
    assert plan["cache"][0]["use"]
    assert "no cache" not in (both["tags-cached"].folder / "log.txt").read_text(encoding="utf-8")
    check_same(both["tags-zero2"], both["tags-cached"], num_steps=3)


def test_the_best_is_that_of_the_named_metric(both: dict[str, Run]) -> None:
    run = both["score-phases"]
    assert run.summary["metrics"]["eval/mae"] == pytest.approx(min(run.series("eval/mae")[1:]), rel=1e-5)
    assert [phase["name"] for phase in run.summary["phases"]] == ["head", "all"]


@pytest.mark.parametrize("label", TASKS)
def test_each_row_and_word_is_evaluated_once(both: dict[str, Run], material: Material, label: str) -> None:
    lines = (material.folder / "tasks_validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    run = both[f"{label}-zero3"]
    assert set(run.summary["metrics"]) == {f"eval/{name}" for name in METRICS[TASKS[label]]}
    data = read_json(run.folder / "plan.json")["data"]
    labels, numbers = run.predictions()["labels"], run.predictions()["rows"]
    if label == "tags":
        assert set(numbers.tolist()) == set(range(NUM_TASK_VALIDATION))
        for i, row in enumerate(rows):
            found = [data["classes"][tag] for tag in labels[numbers == i]]
            assert found == row["tags"][: len(found)]
        assert len(labels) > 0.9 * sum(len(row["tags"]) for row in rows)  # a long row is cut to 64 tokens
    else:
        assert numbers.tolist() == list(range(NUM_TASK_VALIDATION))
    if label == "topics":
        assert [[n for n, y in zip(data["classes"], row, strict=True) if y] for row in labels.tolist()] == [
            row["topics"] for row in rows
        ]
    if label == "score":
        torch.testing.assert_close(labels, torch.tensor([row["score"] for row in rows]))


def test_the_loss_of_a_step_is_the_mean_over_all_words_of_the_global_batch(
    alone: dict[str, Run], both: dict[str, Run], material: Material
) -> None:
    """One global batch on two processes, 12 micro-batches of uneven words each, against plain torch row by row."""
    folder = alone["tags"].folder / "model"
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums, counts = [], []
    for line in (material.folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        batch = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=64, return_tensors="pt")
        first = {word: position for position, word in reversed(list(enumerate(batch.word_ids()))) if word is not None}
        true = torch.tensor([model.config.label2id[row["tags"][word]] for word in first])
        with torch.no_grad():
            logits = model(**batch).logits[0, list(first.values())]
        sums.append(functional.cross_entropy(logits, true, reduction="sum").item())
        counts.append(len(first))
    run = both["again"]
    assert read_json(run.folder / "freeze.json")["source"]["head_kept"]
    (loss,) = run.series("train/loss")
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    mean_of_rows = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
    assert abs(mean_of_rows - loss) > 1e-3 * loss  # which a mean over rows, or over ranks, would have given


FRESH = """
import json, sys
import timm, torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer

rows, images, out, tags, topics, score, colours, brightness = sys.argv[1:]
rows = [json.loads(line) for line in open(rows, encoding="utf-8")]
files = [json.loads(line)["file"] for line in open(images, encoding="utf-8")]
logits, configs = {}, {}
with torch.inference_mode():
    for name, folder in (("tags", tags), ("topics", topics), ("score", score)):
        kind = AutoModelForTokenClassification if name == "tags" else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = []
        for row in rows:
            inputs = row["words"] if name == "tags" else row["text"]
            options = dict(is_split_into_words=name == "tags", truncation=True, max_length=64)
            batch = tokenizer(inputs, return_tensors="pt", **options)
            values = model.eval()(**batch).logits[0]
            if name == "tags":
                words = batch.word_ids()
                values = values[[i for i, w in enumerate(words) if w is not None and w != words[i - 1]]]
            found.append(values.reshape(-1, model.config.num_labels))
        logits[name] = torch.cat(found)
        configs[name] = [model.config.problem_type, list(model.config.id2label.values())]
    from PIL import Image
    for name, folder in (("colours", colours), ("brightness", brightness)):
        model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
        pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        logits[name] = model(pixels).clone()
        wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.allclose(wrapped(pixels).logits, logits[name], atol=1e-5)
        configs[name] = [wrapped.config.problem_type, list(wrapped.config.id2label.values())]
assert "dist_finetune" not in sys.modules
save_file(logits, out)
print(json.dumps(configs))
"""


def test_models_load_elsewhere_with_the_logits_that_evaluation_saw(
    both: dict[str, Run], material: Material, tmp_path: Path
) -> None:
    names = {
        "tags": "tags-zero3",
        "topics": "topics-fsdp",
        "score": "score-zero2",
        "colours": "colours-zero2",
        "brightness": "brightness-fsdp",
    }
    out = tmp_path / "logits.safetensors"
    rows = [str(material.folder / name) for name in ("tasks_validation.jsonl", "validation_images.jsonl")]
    folders = [str(both[name].folder / "model") for name in names.values()]
    done = finish([sys.executable, "-c", FRESH, *rows, str(out), *folders], 120, tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-3000:]
    configs, logits = json.loads(done.stdout.splitlines()[-1]), load_file(out)
    tags = [f"{prefix}-{topic}" for prefix in "BI" for topic in ("food", "music", "weather")]
    assert configs == {
        "tags": [None, [*tags, "O"]],
        "topics": ["multi_label_classification", ["food", "music", "weather"]],
        "score": ["regression", ["score"]],
        "colours": ["multi_label_classification", ["blue", "bright", "green", "red"]],
        "brightness": ["regression", ["brightness"]],
    }
    assert len(logits["colours"]) == NUM_VALIDATION_IMAGES
    for kind, name in names.items():
        seen = both[name].predictions()["logits"]
        assert seen.std(0).min() > 1e-4, kind  # rows differ, so that their order is compared too
        torch.testing.assert_close(logits[kind], seen, rtol=1e-4, atol=1e-5, msg=lambda text, k=kind: f"{k}: {text}")
