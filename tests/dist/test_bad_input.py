"""Bad input on the command line: what is wrong, where, what to do; exit 2, no traceback, nothing half-made."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness import finish, write_config
from material import Material
from PIL import Image

from dist_finetune.cli import main

Change = Callable[[dict[str, Any], Path], None]
ROWS = "text,label\n" + "".join(f"a good text {i},{'yes' if i % 2 else 'no'}\n" for i in range(40))


def setting(section: str, **values: Any) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        config[section] = {**config.get(section, {}), **values}

    return change


def rows(text: str, key: str = "train", name: str = "rows.csv") -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        (folder / name).write_text(text)
        config["data"][key] = str(folder / name)
        if key == "train":
            config["data"]["validation"] = 0.2

    return change


def several(*changes: Change) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        for each in changes:
            each(config, folder)

    return change


def folder_of_images(config: dict[str, Any], folder: Path) -> Path:
    for i in range(12):
        (folder / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(folder / "images" / f"class{i % 2}" / f"{i}.png")
    config["model"] = {"name": "timm:test_resnet", "weights": "none"}
    config["data"] = {"train": str(folder / "images"), "validation": 0.2, "image_size": 32}
    config["freeze"] = {}
    return folder / "images"


def truncated_image(config: dict[str, Any], folder: Path) -> None:
    path = folder_of_images(config, folder) / "class1" / "7.png"
    path.write_bytes(path.read_bytes()[:40])


def text_for_an_image(config: dict[str, Any], folder: Path) -> None:
    (folder_of_images(config, folder) / "class0" / "4.png").write_text("this is no image")


def one_class_folder(config: dict[str, Any], folder: Path) -> None:
    shutil.rmtree(folder_of_images(config, folder) / "class1")


def no_class_folders(config: dict[str, Any], folder: Path) -> None:
    folder_of_images(config, folder)
    config["data"]["train"] = str(folder / "images" / "class0")


CASES: dict[str, tuple[Change, list[str]]] = {
    "all problems at once": (
        several(setting("train", epocs=3, lr=-1), setting("freeze", layer="0"), setting("shard", strategy="zero4")),
        ["train.epocs", "epochs", "train.lr", "freeze.layer", "layers", "shard.strategy", "zero3"],
    ),
    "ready word": (lambda config, _: config.update(freeze="backbon"), ["backbon", "backbone"]),
    "file missing": (setting("data", train="no/such/rows.csv"), ["data.train", "no/such/rows.csv"]),
    "folder missing": (setting("data", train="no/such/folder/"), ["data.train", "no/such/folder"]),
    "validation missing": (setting("data", validation="no/val.csv"), ["data.validation", "no/val.csv"]),
    "column missing": (
        several(rows(ROWS), setting("data", text="sentence")), ["data.text", "sentence", "text, label", "rows.csv"]
    ),
    "label column missing": (several(rows(ROWS), setting("data", label="lable")), ["data.label", "lable", "label"]),
    "label missing in rows": (rows(ROWS.replace("text 7,yes", "text 7,")), ["rows.csv", "label", "row 8"]),
    "one class": (rows(ROWS.replace("yes", "no")), ["one class", "no"]),
    "class that training lacks": (
        several(rows(ROWS), rows(ROWS.replace("text 3,yes", "text 3,perhaps"), "validation", "val.csv")),
        ["perhaps", "validation"],
    ),
    "empty text": (rows(ROWS.replace("a good text 5,", " ,")), ["rows.csv", "empty text", "row 6"]),
    "no rows": (rows("text,label\n"), ["rows.csv"]),
    "empty file": (rows(""), ["rows.csv"]),
    "broken json": (
        lambda config, folder: (
            (folder / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", \n'),
            config.update(data={"train": str(folder / "rows.jsonl")}),
        )[1],
        ["rows.jsonl", "2"],
    ),
    "unknown kind of file": (rows(ROWS, name="rows.doc"), ["rows.doc", ".csv"]),
    "truncated image": (truncated_image, ["class1/7.png"]),
    "non-image": (text_for_an_image, ["class0/4.png"]),
    "one class folder": (one_class_folder, ["class0"]),
    "no class folders": (no_class_folders, ["class0", "folder"]),
    "pattern without a match": (
        setting("freeze", patterns=["bert.encoder.layer.1.atention.*"]), ["atention", "attention", "matches"]
    ),
    "index out of range": (setting("freeze", layers="0-3"), ["0-3", "3 blocks", "2"]),
    "nothing left": (
        setting("freeze", layers="all", embeddings=True, patterns=["bert.pooler.*", "classifier.*"]),
        ["nothing is left to train", "backbone"],
    ),
    "model not to be had": (
        setting("model", name="some-org/no-such-bert"),
        ["some-org/no-such-bert", "Where there is internet run `dist-finetune prepare CONFIG`", "HF_HOME"],
    ),
    "model folder missing": (setting("model", name="./models/bert"), ["model.name", "./models/bert"]),
    "timm name": (setting("model", name="timm:resnet5O"), ["resnet5O", "resnet50"]),
    "demo name": (setting("model", name="demo:minlm"), ["demo:minlm", "minilm"]),
    "micro batch": (setting("train", micro_batch_size=5), ["micro_batch_size", "5", "1, 2, 4, 8, 16"]),
    "warm-up": (setting("train", warmup=500), ["train.warmup", "500", "steps"]),
    "image model, texts": (setting("model", name="timm:test_resnet", weights="none"), ["image", "text"]),
    "no effect": (setting("data", image_size=64), ["data.image_size", "without effect"]),
    "contradiction": (
        setting("shard", strategy="zero2", deepspeed={"train_batch_size": 7}), ["shard.deepspeed.train_batch_size", "7"]
    ),
    "no login": (setting("track", wandb="online"), ["track.wandb: online needs a login", "WANDB_API_KEY"]),
    "output that can not be": (
        lambda config, _: config.update(output="x" * 300), ["xx/c: File name too long", "another output=..."]
    ),
    "deepspeed with ddp": (
        setting("shard", strategy="ddp", deepspeed={"prescale_gradients": True}), ["shard.deepspeed", "no effect"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_refused_in_words(
    material: Material, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = CASES[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    config = material.text()
    change(config, tmp_path)
    write_config(tmp_path / "c.yaml", config)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["train", "c.yaml"])
    said = capsys.readouterr()
    assert end.value.code == 2, said.err
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.out + said.err
    for word in words:
        assert word in said.err, f"{word!r} is not in:\n{said.err}"
    assert set(tmp_path.rglob("*")) == before
    assert not dist.is_initialized()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "2", "train.global_batch_size=15"], ["train.global_batch_size", "2 processes", "14 or 16"]),
        (["--gpus", "2"], ["--gpus 2: no GPU is visible", "--processes 2"]),
        (["--processes", "2", "freeze.layers=7"], ["7", "3 blocks"]),
        (["--processes", "2", "train.epoch=3"], ["train.epoch", "epochs"]),
    ],
    ids=["global batch", "gpus", "freeze", "key"],
)
def test_refused_once_through_processes(
    material: Material, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    write_config(tmp_path / "c.yaml", material.text())
    command = [sys.executable, "-m", "dist_finetune", "run", "c.yaml", *arguments]
    done = finish(command, 120, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr}"
    assert done.stderr.count("error: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["c.yaml"]),
        ("", ["model", "data"]),
        ("model: {name: [", ["c.yaml:1:16", "not valid YAML"]),
        ("- a\n- b\n", ["c.yaml"]),
    ],
    ids=["missing", "empty", "not YAML", "a list"],
)
def test_no_config(
    text: str | None,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["train", "c.yaml"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said
