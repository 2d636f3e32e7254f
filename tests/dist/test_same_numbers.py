"""The same losses, rates, samples and weights at every world size and strategy; partial windows; each sample once."""

import csv
from itertools import pairwise

import pytest
import torch
from harness import STRATEGIES, Job, Matrix, Run, RunJobs, read_json
from material import NUM_TRAIN, Material, write_sentences

pytestmark = pytest.mark.dist

NOISE = "key.bias"  # its true gradient is zero, so Adam makes steps of rounding noise


def largest_relative(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def check_same(reference: Run, other: Run, num_steps: int) -> None:
    """Losses within 1e-5 at every step; rates equal; gradient norms, weights and logits to what fp32 sums allow."""
    assert len(reference.series("train/loss")) == num_steps
    assert largest_relative(reference.series("train/loss"), other.series("train/loss")) < 1e-5
    assert reference.series("train/lr") == other.series("train/lr")
    assert reference.series("progress/samples") == other.series("progress/samples")
    assert largest_relative(reference.series("train/grad_norm"), other.series("train/grad_norm")) < 5e-5
    assert largest_relative(reference.series("eval/loss"), other.series("eval/loss")) < 1e-5
    assert reference.series("eval/accuracy") == other.series("eval/accuracy")
    a, b = reference.weights(), other.weights()
    assert list(a) == list(b)
    for name in a:
        if NOISE not in name:
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(other.predictions()["logits"], reference.predictions()["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(other.predictions()["labels"], reference.predictions()["labels"])


@pytest.mark.parametrize("way", ["1-zero2", *(f"2-{strategy}" for strategy in STRATEGIES)])
def test_bert_in_every_way(matrix: Matrix, way: str) -> None:
    check_same(matrix.text["1-ddp"], matrix.text[way], num_steps=20)


@pytest.mark.parametrize("way", ["1-zero2", *(f"2-{strategy}" for strategy in STRATEGIES)])
def test_cnn_in_every_way(matrix: Matrix, way: str) -> None:
    check_same(matrix.image["1-ddp"], matrix.image[way], num_steps=21)


@pytest.mark.slow
def test_bert_at_four_processes(matrix: Matrix, material: Material, runs: RunJobs) -> None:
    jobs = [Job(strategy, material.text(shard={"strategy": strategy})) for strategy in ("ddp", "zero2", "zero3")]
    for run in runs(jobs, 4).values():
        assert run.summary["world_size"] == 4
        check_same(matrix.text["1-ddp"], run, num_steps=20)


def test_rate_is_a_function_of_the_step(matrix: Matrix) -> None:
    """Linear decay after a warm-up of one step (6 % of 20): half the peak, the peak, then a straight line down."""
    expected = [1e-4, *(2e-4 * (1 - i / 19) for i in range(19))]
    for way, run in matrix.text.items():
        assert run.series("train/lr") == pytest.approx(expected, rel=1e-9), way


def test_each_training_sample_counts_once_an_epoch(matrix: Matrix) -> None:
    for run in matrix.text.values():
        samples = run.series("progress/samples")
        assert (samples[9], samples[19]) == (NUM_TRAIN, 2 * NUM_TRAIN)
        assert run.series("progress/epoch")[9::10] == [1, 2]


WHOLE_BATCH = {"global_batch_size": 152, "micro_batch_size": 4, "max_steps": 1}
EVALUATED = (1, 5)
"""Numbers of validation rows; with batches of 4 at 2 processes, some ranks have none."""
ACCUMULATING = ("ddp", "zero3")
"""The invariance suite has windows that are cut short under all of them."""


@pytest.fixture(scope="module")
def more(material: Material, runs: RunJobs) -> dict[int, dict[str, Run]]:
    """Runs at 1 and 2 processes of other batch sizes and data, by number of processes and name."""
    common = [Job("whole", material.text(data={"validation": str(material.train)}, train=WHOLE_BATCH))]
    for num_rows in EVALUATED:
        path = material.folder / f"validation-{num_rows}.csv"
        write_sentences(path, num_rows, seed=7)
        data, train = {"validation": str(path)}, {"max_steps": 1, "eval_batch_size": 4, "warmup": 0}
        common.append(Job(f"rows-{num_rows}", material.text(data=data, train=train, shard={"strategy": "zero3"})))
    alone = [Job(f"micro-{n}", material.text(train={"micro_batch_size": n})) for n in (16, 2)]
    alone.append(Job("other-seed", material.text(train={"seed": 1})))
    both = [
        Job(f"micro-2-{strategy}", material.text(shard={"strategy": strategy}, train={"micro_batch_size": 2}))
        for strategy in ACCUMULATING
    ]
    large = {"global_batch_size": 128, "warmup": 0}
    both += [Job(f"large-{micro}", material.text(train={**large, "micro_batch_size": micro})) for micro in ("auto", 8)]
    return {1: runs([*common, *alone], 1), 2: runs([*common, *both], 2)}


def test_training_moves_the_weights(matrix: Matrix, more: dict[int, dict[str, Run]]) -> None:
    """The comparisons above would also hold for runs that do nothing."""
    losses = matrix.text["1-ddp"].series("train/loss")
    assert any(abs(a - b) > 1e-3 for a, b in pairwise(losses))
    assert largest_relative(losses, more[1]["other-seed"].series("train/loss")) > 1e-3


@pytest.mark.parametrize(("num_processes", "name"), [(1, "micro-2"), *((2, f"micro-2-{s}") for s in ACCUMULATING)])
def test_partial_windows_are_divided_by_their_real_count(
    more: dict[int, dict[str, Run]], num_processes: int, name: str
) -> None:
    """The last global batch has 7 rows of 16: as one big batch, or as a window that is cut short."""
    check_same(more[1]["micro-16"], more[num_processes][name], num_steps=20)


def test_micro_batches_by_tokens_train_as_those_by_rows(more: dict[int, dict[str, Run]]) -> None:
    """At `auto` short texts share a pass, as many as have the tokens that were planned for."""
    by_tokens, by_rows = more[2]["large-auto"], more[2]["large-8"]
    batches = read_json(by_tokens.folder / "plan.json")["batches"]
    assert batches["gradient_accumulation_steps"] > 1
    assert batches["micro_batch_tokens"] == batches["micro_batch_size"] * 64
    check_same(by_tokens, by_rows, num_steps=4)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_loss_is_the_mean_over_the_global_batch(more: dict[int, dict[str, Run]], num_processes: int) -> None:
    """One global batch of all rows, nothing moved yet: the loss of step 1 is the validation loss on the same rows."""
    run = more[num_processes]["whole"]
    assert run.series("train/loss")[0] == pytest.approx(run.series("eval/loss")[0], rel=1e-6)


@pytest.mark.parametrize("num_rows", EVALUATED)
def test_evaluation_counts_each_sample_once(more: dict[int, dict[str, Run]], num_rows: int, material: Material) -> None:
    alone, both = (more[num_processes][f"rows-{num_rows}"] for num_processes in (1, 2))
    with (material.folder / f"validation-{num_rows}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in csv.DictReader(material.train.read_text().splitlines())})
    predictions = both.predictions()
    assert [classes[i] for i in predictions["labels"]] == [row["label"] for row in rows]
    assert predictions["logits"].shape == (num_rows, 3)
    torch.testing.assert_close(predictions["logits"], alone.predictions()["logits"], rtol=1e-4, atol=1e-5)
    right = (predictions["logits"].argmax(1) == predictions["labels"]).float().mean().item()
    assert both.summary["metrics"]["eval/accuracy"] == pytest.approx(right)
    loss = torch.nn.functional.cross_entropy(predictions["logits"], predictions["labels"]).item()
    assert both.summary["metrics"]["eval/loss"] == pytest.approx(loss, rel=1e-5)
