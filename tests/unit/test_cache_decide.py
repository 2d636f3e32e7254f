"""Whether a phase is cached, and what the plan says of it; batches of images lie with their channels last."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig

from dist_finetune.cache.build import _key
from dist_finetune.cache.cut import Cut, StandIn
from dist_finetune.cache.rows import CachedCollate, CachedRows
from dist_finetune.cache.store import Layout, ShardWriter, StoredRows
from dist_finetune.data.image_input import ImageInput
from dist_finetune.data.images import ImageRows, collate_images
from dist_finetune.data.loading import Rows
from dist_finetune.data.text import TextRows
from dist_finetune.errors import UserError
from dist_finetune.job import Job
from dist_finetune.plan import Plan, make_plan
from dist_finetune.plan_text import cost_lines, plan_lines
from dist_finetune.report import Reporter
from dist_finetune.signals import StopSignals
from dist_finetune.spec_file import load_spec
from dist_finetune.world import World

BELOW_2 = {"embeddings": True, "layers": "0-1"}
TRAIN_MODE = "freeze.mode is train: dropout and batch statistics would differ from epoch to epoch"
CROPS = "data.augment makes new images each epoch; cache.views=4 would store four versions of each and cycle"
Planned = Callable[..., Plan]
NOTHING_BELOW = "nothing frozen lies below the first trainable part"
WORLD = World("none", 0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Plans of a BERT of 3 blocks and of a small ResNet, of which two are frozen."""
    folder = tmp_path_factory.mktemp("decide")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    BertConfig(num_hidden_layers=3, architectures=["BertModel"], **sizes).save_pretrained(folder / "bert")
    lines = ["text,label", *(f"row {i},{'ab'[i % 2]}" for i in range(100))]
    (folder / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    base: dict[str, dict[str, Any]] = {
        "text": {
            "model": {"name": str(folder / "bert")},
            "data": {"train": str(folder / "rows.csv"), "max_length": 64},
        },
        "image": {
            "model": {"name": "timm:test_resnet", "weights": "none"},
            "data": {"train": "builtin:digits", "image_size": 32, "max_rows": 100},
        },
    }

    def planned(kind: str = "text", **changes: Any) -> Plan:
        data = {**base[kind]["data"], "validation": 0.2, **changes.pop("data", {})}
        return make_plan(load_spec({**base[kind], "freeze": BELOW_2, "name": "x", **changes, "data": data}))

    return planned


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("text", {"freeze": {**BELOW_2, "mode": "train"}}, TRAIN_MODE),
        ("image", {"data": {"augment": True}}, CROPS),
        ("text", {"freeze": {"layers": "1,2"}}, NOTHING_BELOW),
        ("text", {"freeze": "none"}, NOTHING_BELOW),
    ],
)
def test_auto_goes_without_and_on_is_refused_with_the_same_reason(
    plan_of: Planned, kind: str, changes: dict[str, Any], reason: str
) -> None:
    plan = plan_of(kind, **changes)
    assert (plan.cache[0].use, plan.cache[0].reason) == (False, reason)
    assert f"cache     off: {reason}" in plan_lines(plan)
    assert not [line for line in cost_lines(plan) if line.startswith("cache ")]
    with pytest.raises(UserError) as refused:
        plan_of(kind, **changes, cache="on")
    assert f"cache: on can't work: {reason}" in str(refused.value)


def test_versions_of_images_that_are_not_augmented_are_refused(plan_of: Planned) -> None:
    with pytest.raises(UserError, match=r"cache\.views has no effect without data\.augment"):
        plan_of("image", cache={"views": 2})
    with pytest.raises(UserError, match=r"cache\.views has no effect beside cache: off"):
        plan_of("image", data={"augment": True}, cache={"mode": "off", "views": 2})


def test_one_pass_repays_nothing(plan_of: Planned) -> None:
    assert plan_of(train={"epochs": 1}).cache[0].reason == "1 passes over the data don't repay the one that fills it"
    assert plan_of(train={"epochs": 2}).cache[0].reason == "2 passes share one through the parts below block 2"
    assert plan_of(train={"epochs": 1}, cache="on").cache[0].reason == "asked for"


@pytest.mark.parametrize(("dtype", "num_bytes"), [("fp32", 4), ("bf16", 2)])
def test_the_plan_says_what_the_cache_takes_and_spares(plan_of: Planned, dtype: str, num_bytes: int) -> None:
    """64 tokens of 32 numbers at most a row; the embeddings and two blocks are dropped."""
    plan = plan_of(cache={"mode": "on", "dtype": dtype})
    (line,) = [line for line in cost_lines(plan) if line.startswith("cache ")]
    rows = sum(plan.data.num_rows.values())
    frozen = 4 * plan.widest.manifest.num_frozen / 2**20
    assert line == (
        f"cache      at most {rows * 64 * 32 * num_bytes / 2**20:,.1f} MiB on disk for {rows} rows; once it is "
        f"filled, each process drops {frozen:,.1f} MiB of frozen weights (the table counts them)"
    )


def test_the_plan_counts_each_version_of_an_augmented_image(plan_of: Planned) -> None:
    one, three = (plan_of("image", data={"augment": True}, cache={"mode": "on", "views": views}) for views in (1, 3))
    train, validation = (one.data.num_rows[split] for split in ("train", "validation"))
    assert f" on disk for {train + validation} rows" in "\n".join(cost_lines(one))
    assert f" on disk for {3 * train + validation} rows" in "\n".join(cost_lines(three))


def test_images_and_their_activations_lie_with_channels_last(tmp_path: Any) -> None:
    images = [torch.randn(3, 5, 4) for _ in range(2)]
    batch = collate_images([{"image": image, "label": 0} for image in images])
    assert batch["inputs"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["inputs"], torch.stack(images))
    layout = Layout(2, (3, 5, 4), "fp32", 1, None, np.zeros(2, np.uint16))
    writer = ShardWriter(tmp_path, "train", 0, layout)
    for index, image in enumerate(images):
        writer.write(index, image)
    writer.note(2)

    class Labelled:
        labels = np.asarray([1, 0])

        def __len__(self) -> int:
            return 2

    rows = CachedRows(Labelled(), reads_text=False)
    cached = CachedCollate(StoredRows(tmp_path, "train", layout), layout, False, None, False)([rows[0], rows[1]])
    assert cached["inputs"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cached["inputs"], torch.stack(images))
    assert cached["labels"].tolist() == [1, 0]


def test_every_part_of_a_key_changes_it_and_nothing_else_does(plan_of: Planned) -> None:
    """A sweep over rates, heads or labels finds one entry; another prefix, data, encoding or precision has its own."""
    plan, cut = plan_of(), Cut(StandIn("bert.encoder.layer.1", (4, 6, 32), True), (), ("bert.a", "bert.b"))
    digests = {"bert.a": "1", "bert.b": "2", "classifier.bias": "3"}
    text = TextRows(np.arange(6, dtype=np.int32), np.asarray([0, 4, 6]), None, np.zeros(2), 0)
    table = Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * 2, "label": [0, 1]})
    images, augmented = (ImageRows(table, ImageInput((8, 8)), augment, seed=1) for augment in (False, True))

    def key(rows: Any = text, cut: Cut = cut, digests: dict[str, str] = digests, views: int = 1, **planned: Any) -> str:
        cache = plan.spec.cache.model_copy(update={"views": views, "dtype": planned.pop("dtype", "fp32")})
        changed = replace(plan, spec=plan.spec.model_copy(update={"cache": cache}), **planned)
        splits = {"train": Rows(rows, list, None)}
        job = Job(changed, WORLD, Reporter(is_first=False), Path(), splits, None, StopSignals())
        return _key(job, cut, digests)[0]

    keys = [
        key(),
        key(digests={**digests, "bert.b": "9"}),
        key(cut=replace(cut, dropped=("bert.a",))),
        key(cut=replace(cut, at=replace(cut.at, path="bert.encoder.layer.0"))),
        key(cut=replace(cut, reads_first_only=True)),
        key(data=replace(plan.data, fingerprint="other rows")),
        key(precision="bf16"),
        key(dtype="bf16"),
        key(replace(text, input_ids=text.input_ids + 1)),
        key(replace(text, offsets=np.asarray([0, 3, 6]))),
        key(replace(text, token_type_ids=np.ones(6, np.uint8))),
        key(images),
        key(ImageRows(table, ImageInput((9, 9)), False, seed=1)),
        key(augmented),
        key(augmented, views=2),
        key(ImageRows(table, ImageInput((8, 8)), True, seed=2)),
    ]
    assert len(set(keys)) == len(keys)
    same = [key(digests={**digests, "classifier.bias": "9"}), key(replace(text, labels=np.ones(2)))]
    assert same == [keys[0]] * 2
