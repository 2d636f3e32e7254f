"""Training from stored activations: the same numbers as without, the export complete, the store shared by runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import STRATEGIES, Job, Run, RunJobs, read_json, run_ranks, write_config
from material import NUM_TRAIN, NUM_VALIDATION, Material, write_sentences

from dist_finetune.cache.tokens import STORE_FROM_ROWS

pytestmark = pytest.mark.dist

WAYS = [*(("text", strategy) for strategy in STRATEGIES), ("image", "ddp"), ("image", "zero3")]
BF16_TOLERANCE = 1e-2
"""Of losses, relative, where activations are stored in bf16."""
PHASES = [
    {"name": "head", "freeze": "backbone", "epochs": 2},
    {"name": "top", "freeze": {"embeddings": True, "layers": "0"}, "epochs": 2},
    {"name": "all", "freeze": "none", "epochs": 1},
]

BESIDE = {
    "zero1": {"shard": {"strategy": "zero1", "offload": "optimizer"}},
    "zero3": {"shard": {"strategy": "zero3", "offload": "optimizer"}, "train": {"gradient_checkpointing": True}},
    "fsdp": {"shard": {"strategy": "fsdp", "offload": "parameters", "frozen": "shard"}},
}
"""What a cache has to go with, and must not change a number."""
MOVING = {"freeze": {"patterns": []}, "shard": {"strategy": "ddp"}, "train": {"epochs": 2}}
"""BatchNorm above the cut trains, and its statistics move."""
IN_BF16 = {"train": {"precision": "bf16"}, "freeze": {"dtype": "bf16"}, "shard": {"strategy": "zero2"}}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pairs(material: Material, runs: RunJobs, shared_cache: Path) -> dict[str, Run]:
    jobs = []
    configs = {"text": material.text(), "image": material.image()}
    for kind, strategy in WAYS:
        jobs += [
            Job(f"{kind}-{strategy}-{mode}", {**configs[kind], "shard": {"strategy": strategy}, "cache": mode})
            for mode in ("off", "on")
        ]
    plain = {key: value for key, value in material.text().items() if key != "freeze"}
    jobs += [
        Job(f"phases-{mode}", {**plain, "phases": PHASES, "shard": {"strategy": "zero2"}, "cache": mode})
        for mode in ("off", "auto")
    ]
    all_blocks = material.text(freeze={"embeddings": True, "layers": "all"}, shard={"strategy": "ddp"})
    jobs += [Job(f"first-{mode}", {**all_blocks, "cache": mode}) for mode in ("off", "on")]
    inside = {"embeddings": True, "layers": "0-1", "patterns": ["bert.encoder.layer.2.attention.*"]}
    for name, changes in {"off": {"cache": "off", "train": {"skip_unread": False}}, "on": {"cache": "on"}}.items():
        jobs.append(Job(f"inside-{name}", material.text(freeze=inside, shard={"strategy": "zero2"}, **changes)))
    left = {**all_blocks["model"], "name": str(padding_left(material, shared_cache))}
    jobs.append(Job("left", {**all_blocks, "model": left, "cache": "on"}))
    jobs.append(Job("first-dropout", with_dropout(material, shared_cache, 4)))
    jobs += [Job(f"moving-{mode}", {**material.image(**MOVING), "cache": mode}) for mode in ("off", "on")]
    jobs += [Job(f"beside-{name}", {**material.text(**more), "cache": "on"}) for name, more in BESIDE.items()]
    jobs += [Job(f"bf16-{mode}", {**material.text(**IN_BF16), "cache": mode}) for mode in ("off", "on")]
    half = {"mode": "on", "dtype": "bf16"}
    jobs.append(Job("text-bf16", {**material.text(), "shard": {"strategy": "ddp"}, "cache": half}))
    jobs.append(Job("two", elsewhere(material, shared_cache)))
    augmented = {**material.image(data={"augment": True}, train={"epochs": 3}), "shard": {"strategy": "ddp"}}
    jobs.append(Job("views", {**augmented, "cache": {"mode": "on", "views": 2}}))
    jobs.append(Job("augmented", {**augmented, "cache": "off"}))
    jobs += [Job(f"large-{number}", large(material, shared_cache)) for number in (1, 2)]
    return runs(jobs, 2)


def elsewhere(material: Material, cache: Path) -> dict[str, Any]:
    return {**material.text(), "cache": {"mode": "on", "folder": str(cache)}, "shard": {"strategy": "ddp"}}


def padding_left(material: Material, folder: Path) -> Path:
    """The model with a tokenizer that pads on the left."""
    model = Path(shutil.copytree(material.bert, folder / "padding-left"))
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**read_json(config), "padding_side": "left"}), encoding="utf-8")
    return model


def with_dropout(material: Material, cache: Path, micro: int) -> dict[str, Any]:
    train = {"micro_batch_size": micro}
    config = material.text(model={"dropout": 0.1}, freeze={"embeddings": True, "layers": "all"}, train=train)
    return {**config, "shard": {"strategy": "ddp"}, "cache": {"mode": "on", "folder": str(cache)}}


def large(material: Material, cache: Path) -> dict[str, Any]:
    """Two steps on a data set that is large enough for its tokens to be kept."""
    if not (cache / "rows.csv").exists():
        write_sentences(cache / "rows.csv", STORE_FROM_ROWS, seed=7)
    config = material.text(data={"train": str(cache / "rows.csv")}, train={"max_steps": 2})
    return {**config, "cache": {"mode": "off", "folder": str(cache / "tokens")}, "shard": {"strategy": "ddp"}}


@pytest.mark.parametrize(("kind", "tolerance"), [("text", 1e-6), ("image", 1e-5)])
def test_losses_are_those_of_the_plain_run(pairs: dict[str, Run], kind: str, tolerance: float) -> None:
    for strategy in (way for of_kind, way in WAYS if of_kind == kind):
        plain, cached = pairs[f"{kind}-{strategy}-off"], pairs[f"{kind}-{strategy}-on"]
        assert "cache built" in log_of(cached) or "cache reused" in log_of(cached)
        assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=tolerance)
        assert cached.series("eval/accuracy") == plain.series("eval/accuracy")


@pytest.mark.parametrize("name", BESIDE)
def test_it_goes_with_offload_and_recomputing(pairs: dict[str, Run], name: str) -> None:
    plain, cached = pairs["text-ddp-off"], pairs[f"beside-{name}"]
    assert "cache reused" in log_of(cached)
    assert cached.summary["phases"][0]["cache"].startswith("reused: ")
    assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5)


def test_statistics_above_the_cut_move_as_in_the_plain_run(pairs: dict[str, Run]) -> None:
    plain, cached = pairs["moving-off"], pairs["moving-on"]
    assert "cache reused" in log_of(cached)
    assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5)
    weights = plain.weights()
    moved = [name for name in weights if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(moved) > 20
    for name in moved:
        torch.testing.assert_close(cached.weights()[name], weights[name], rtol=1e-5, atol=1e-6)


def test_it_goes_with_bf16(pairs: dict[str, Run]) -> None:
    """Of which it stores fp32, as the layer above the cut is given it."""
    plain, cached = pairs["bf16-off"], pairs["bf16-on"]
    assert "cache built" in log_of(cached)
    assert plain.summary["phases"][0]["cache"] == "none: off in the config"
    assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=BF16_TOLERANCE)


def test_the_export_is_complete_and_frozen_tensors_are_the_sources(pairs: dict[str, Run]) -> None:
    for name in (f"{kind}-{strategy}" for kind, strategy in WAYS):
        plain, cached = pairs[f"{name}-off"], pairs[f"{name}-on"]
        assert list(plain.weights()) == list(cached.weights())
        assert cached.summary["frozen_verified"] == plain.summary["frozen_verified"]
        exported = plain.weights()
        for key, value in cached.weights().items():
            if key in cached.summary["frozen_verified"]:
                assert torch.equal(value, exported[key]), f"{name}: {key}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_rank_holds_the_cached_prefix(pairs: dict[str, Run], strategy: str) -> None:
    """All that is frozen lies below the cut; what trains takes what it took."""
    plain, cached = (pairs[f"text-{strategy}-{mode}"].summary["memory"]["actual"] for mode in ("off", "on"))
    assert cached["frozen_weights"] == 0 < plain["frozen_weights"]
    for kind in ("trainable_weights", "optimizer", "masters"):
        assert cached[kind] == plain[kind]
    assert cached["total"] <= plain["total"] - plain["frozen_weights"]


def test_nothing_keeps_the_cached_prefix(material: Material, tmp_path: Path) -> None:
    """Whatever the engine counts: the parameters themselves are gone."""
    config = write_config(tmp_path / "c.yaml", material.text(), cache="on", output=str(tmp_path / "runs"))
    ways = ("ddp", "zero3", "fsdp")
    worker = Path(__file__).with_name("engine_worker.py")
    done = run_ranks(2, worker, [config, tmp_path / "found.json", *ways], 300, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = read_json(tmp_path / f"found.json.{rank}")
        assert all(found[way]["dropped"] > 10 for way in ways)
        assert [way for way in ways if found[way]["dropped_left"]] == []


def test_a_phase_that_freezes_less_fills_another_cache_or_has_none(pairs: dict[str, Run]) -> None:
    plain, cached = pairs["phases-off"], pairs["phases-auto"]
    keys = re.findall(r"cache (?:built|reused).* (/\S+)", log_of(cached))
    assert len(set(keys)) == len(keys) == 2  # and the second may be another run's
    assert "no cache" not in log_of(cached)
    assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5)
    assert cached.series("eval/accuracy") == plain.series("eval/accuracy")
    assert [phase["name"] for phase in cached.summary["phases"]] == ["head", "top", "all"]


def test_bf16_halves_the_store_and_stays_within_its_tolerance(pairs: dict[str, Run]) -> None:
    plain, whole, half = (pairs[f"text-{name}"] for name in ("ddp-off", "ddp-on", "bf16"))
    losses = half.series("train/loss")
    assert losses != whole.series("train/loss")
    assert losses == pytest.approx(plain.series("train/loss"), rel=BF16_TOLERANCE)
    assert stored_bytes(half) * 2 == stored_bytes(whole) > 0


def test_of_a_head_on_the_first_token_no_other_is_stored(pairs: dict[str, Run]) -> None:
    plain, cached = pairs["first-off"], pairs["first-on"]
    assert "of the first token at bert.encoder.layer.2" in log_of(cached)
    assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-6)
    assert cached.series("eval/accuracy") == plain.series("eval/accuracy")
    assert stored_bytes(cached) == (NUM_TRAIN + NUM_VALIDATION) * 32 * 4, "rows of 32 fp32 numbers"


def test_of_texts_that_are_padded_on_the_left_no_first_token_is_stored(pairs: dict[str, Run]) -> None:
    """What stands first depends on the other texts of a batch."""
    assert "no cache: texts are padded on the left" in log_of(pairs["left"])


def test_a_cut_within_the_last_block_stores_the_first_token_and_trains_as_one_that_computes_all(
    pairs: dict[str, Run],
) -> None:
    plain, cached = pairs["inside-off"], pairs["inside-on"]
    assert "of the first token at bert.encoder.layer.2.attention.output" in log_of(cached)
    assert cached.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-6)
    assert cached.series("eval/accuracy") == plain.series("eval/accuracy")


def test_a_head_trains_in_whole_steps_that_are_those_of_one_process(
    pairs: dict[str, Run], material: Material, runs: RunJobs, shared_cache: Path
) -> None:
    """Dropout draws as one process does, too; where blocks train, ranks share the step."""
    two = pairs["first-dropout"]
    one = runs([Job("first-dropout", with_dropout(material, shared_cache, 8))], 1)["first-dropout"]
    whole = "each process computes all of a step"
    assert whole in log_of(two)
    assert whole not in log_of(one)
    assert whole not in log_of(pairs["text-ddp-on"])
    assert two.series("train/loss") == one.series("train/loss")
    assert two.series("train/loss") != pairs["first-on"].series("train/loss")
    assert two.series("train/grad_norm") == one.series("train/grad_norm")
    for name, value in one.weights().items():
        assert torch.equal(value, two.weights()[name]), name


def test_a_second_run_reuses_what_the_first_stored(pairs: dict[str, Run]) -> None:
    """One key for every strategy: a sweep pays for the prefix once."""
    logs = [log_of(pairs[f"text-{strategy}-on"]) for strategy in STRATEGIES]
    assert "cache built" in logs[0]
    assert all("cache reused" in log for log in logs[1:])


def test_an_entry_is_readable_at_another_world_size(
    pairs: dict[str, Run], material: Material, runs: RunJobs, shared_cache: Path
) -> None:
    one = runs([Job("one", elsewhere(material, shared_cache))], 1)["one"]
    assert "cache reused" in log_of(one)
    assert one.series("train/loss") == pytest.approx(pairs["two"].series("train/loss"), rel=1e-5)


SLOW_DISK_RUN = """
import sys
from dist_finetune import load_spec, train
from dist_finetune.cache import build, worth

worth.LITTLE_S, worth.SAVED_S, build.SLOW_DISK = 0.0, 0.0, 1.0
build.disk_speed = lambda folder, num_bytes: (1.0, 1.0)  # bytes a second
train(load_spec(sys.argv[1], sys.argv[2:]))
"""


def test_auto_goes_without_where_the_disk_is_too_slow_and_stays_so(material: Material, tmp_path: Path) -> None:
    path = write_config(tmp_path / "slow.yaml", material.text(), name="slow", output=str(tmp_path / "runs"))
    (tmp_path / "slow.py").write_text(SLOW_DISK_RUN, encoding="utf-8")
    done = run_ranks(1, tmp_path / "slow.py", [path], 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "runs" / "slow", ())
    assert re.search(r"note: no cache: it would not pay: .* s is all that it would spare: 2 passes of ", log_of(run))
    assert not list((tmp_path / "runs").rglob(".cache/*/meta.json"))
    state = max((run.folder / "checkpoints").glob("step-*")) / "state.json"
    assert read_json(state)["progress"]["uncached"] == [0]  # what a resumed run goes by, on whatever disk


def test_views_of_augmented_images_cycle(pairs: dict[str, Run]) -> None:
    """Version v is the image of the plain run's epoch v: with two of them, the third epoch sees the first again."""
    cached, plain = (pairs[name].series("train/loss") for name in ("views", "augmented"))
    assert "cache built" in log_of(pairs["views"])
    steps = len(plain) // 3
    assert cached[: 2 * steps] == pytest.approx(plain[: 2 * steps], rel=1e-5)
    assert cached[2 * steps :] != pytest.approx(plain[2 * steps :], rel=3e-5)


def test_tokens_of_a_large_data_set_are_kept(pairs: dict[str, Run], shared_cache: Path) -> None:
    (entry,) = (shared_cache / "tokens").iterdir()
    first, second = pairs["large-1"], pairs["large-2"]
    assert entry.name.startswith("tokens-")
    assert (entry / "input_ids.npy").stat().st_mtime < (first.folder / "plan.json").stat().st_mtime
    assert first.series("train/loss") == second.series("train/loss")
    assert len(first.series("train/loss")) == 2


def stored_bytes(run: Run) -> int:
    """Bytes of the activations that the run trained from, wherever its log says they are."""
    folder = Path(re.findall(r"cache (?:built|reused).* (/\S+)", log_of(run))[-1])
    assert read_json(folder / "meta.json")["splits"]["train"]["dtype"] in ("fp32", "bf16")
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


def log_of(run: Run) -> str:
    return (run.folder / "log.txt").read_text(encoding="utf-8")
