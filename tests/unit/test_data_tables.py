"""From a data section to tables: every kind of source, columns found, and bad input refused in full sentences."""

import csv
import io
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

from dist_finetune.data.builtin import read_builtin
from dist_finetune.data.columns import Columns
from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.errors import UserError
from dist_finetune.spec import DataSpec
from dist_finetune.tasks.names import TaskName

needs_corpus = pytest.mark.skipif(
    find_spec("chatterbot_corpus") is None, reason="chatterbot-corpus (demo extra) is absent"
)
HYMENOPTERA = Path(__file__).parents[3] / "shared" / "data" / "hymenoptera"


def rows(count: int = 40, classes: tuple[str, ...] = ("neg", "pos")) -> list[dict[str, Any]]:
    return [{"text": f"row {i}", "label": classes[i % len(classes)]} for i in range(count)]


def write_csv(path: Path, table: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def write_images(folder: Path, classes: tuple[str, ...] = ("ants", "bees"), count: int = 6) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            # Noise, so that the file is long enough to be cut in the middle.
            Image.effect_noise((40, 30), 50 + 40 * number + i).convert("RGB").save(folder / name / f"{i}.jpg")
    return folder


def read(task: TaskName | None = None, **data: Any) -> Tables:
    return read_tables(DataSpec(**data), seed=0, task=task)


def refusal(**data: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(**data)
    return str(caught.value)


def test_a_file_becomes_train_and_validation(tmp_path: Path) -> None:
    tables = read(train=write_csv(tmp_path / "a.csv", rows()), validation=0.2)
    assert tables.classes == ("neg", "pos")
    assert tables.modality == "text"
    assert tables.test is None
    assert tables.columns == Columns("text", ("text",), None, ("label",), "classification")
    assert tables.train.column_names == ["text", "label"]
    assert len(tables.train) == 32
    assert Counter(tables.validation["label"]) == {0: 4, 1: 4}
    everything = [*tables.train, *tables.validation]
    assert sorted((r["text"], tables.classes[r["label"]]) for r in everything) == sorted(
        (r["text"], r["label"]) for r in rows()
    )


def test_explicit_splits_pairs_and_max_rows(tmp_path: Path) -> None:
    pairs = [{"a": f"first {i}", "b": f"second {i}", "entailed": i % 2, "id": i} for i in range(40)]
    paths = [write_csv(tmp_path / f"{name}.csv", pairs[i * 10 : i * 10 + 10]) for i, name in enumerate("pqrs")]
    tables = read(train=paths[:2], validation=paths[2], test=paths[3], text=["a", "b"], label="entailed", max_rows=12)
    assert tables.train.column_names == ["text", "text_pair", "label"]
    assert [len(split) for split in (tables.train, tables.validation, tables.test or [])] == [12, 10, 10]
    assert tables.validation[3] == {"text": "first 23", "text_pair": "second 23", "label": 1}


def test_classes_are_sorted_as_numbers_or_kept_as_declared(tmp_path: Path) -> None:
    numbers = rows(60, ("10", "9", "2"))
    assert read(train=write_csv(tmp_path / "a.csv", numbers)).classes == ("2", "9", "10")
    floats = Dataset.from_list([{**row, "label": float(row["label"])} for row in numbers])
    floats.to_parquet(tmp_path / "a.parquet")
    assert read(train=str(tmp_path / "a.parquet")).classes == ("2", "9", "10")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    declared = Dataset.from_list([{"text": f"row {i}", "label": i % 2} for i in range(40)], features=features)
    declared.to_parquet(tmp_path / "b.parquet")
    tables = read(train=str(tmp_path / "b.parquet"))
    assert tables.classes == ("yes", "no")
    assert set(tables.train["label"]) == {0, 1}


def test_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    first = read(train=write_csv(tmp_path / "a.csv", rows()))
    Dataset.from_list(rows()).to_parquet(tmp_path / "other.parquet")
    changed = rows()
    changed[7]["text"] += "."
    relabelled = [{**row, "label": {"neg": "pos", "pos": "neg"}[row["label"]]} for row in rows()]
    assert read(train=str(tmp_path / "other.parquet")).fingerprint == first.fingerprint
    assert read(train=write_csv(tmp_path / "b.csv", changed)).fingerprint != first.fingerprint
    assert read(train=write_csv(tmp_path / "c.csv", relabelled)).fingerprint != first.fingerprint
    assert read(train=str(tmp_path / "a.csv"), validation=0.3).fingerprint != first.fingerprint
    assert len(first.fingerprint) == 64


def test_repeats_do_not_leak_and_overlaps_are_noted(tmp_path: Path) -> None:
    repeated = [{**row, "text": f"Text {i // 4}{' ' * (i % 4)}x"} for i, row in enumerate(rows(400))]
    tables = read(train=write_csv(tmp_path / "a.csv", repeated))
    split = [{text.split()[1] for text in table["text"]} for table in (tables.train, tables.validation)]
    assert split[1]
    assert not split[0] & split[1]
    assert tables.notes == ()
    again = read(train=str(tmp_path / "a.csv"), validation=write_csv(tmp_path / "b.csv", repeated[:8]))
    assert "8 of 8 validation rows repeat" in again.notes[0]


def test_a_folder_of_classes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "here")
    (folder / "ants" / ".DS_Store").write_bytes(b"x")
    (folder / "bees" / "deeper").mkdir()
    shutil.copy(folder / "bees" / "0.jpg", folder / "bees" / "deeper" / "copy.jpg")
    tables = read(train=str(folder), validation=0.25)
    assert (tables.modality, tables.columns.image, tables.classes) == ("image", "image", ("ants", "bees"))
    assert len(tables.train) + len(tables.validation) == 13
    assert tables.train[0]["image"].size == (40, 30)
    # The copy stays on its original's side, and a moved folder is the same data.
    names = [{Path(cell["path"]).name for cell in cells} for cells in map(storage, (tables.train, tables.validation))]
    assert ("copy.jpg" in names[0]) == any(Path(c["path"]) == folder / "bees" / "0.jpg" for c in storage(tables.train))
    shutil.move(folder, tmp_path / "there")
    assert read(train=str(tmp_path / "there"), validation=0.25).fingerprint == tables.fingerprint


def storage(table: Dataset) -> list[dict[str, Any]]:
    return list(table.cast_column("image", ImageFeature(decode=False))["image"])


def test_image_paths_in_a_csv_count_from_its_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    listed = [{"file": f"images/{name}/{i}.jpg", "kind": name} for name in ("ants", "bees") for i in range(6)]
    tables = read(train=write_csv(tmp_path / "a.csv", listed), image="file", label="kind", validation=0.2)
    assert tables.modality == "image"
    assert tables.train[0]["image"].size == (40, 30)
    write_csv(tmp_path / "a.csv", [*listed, {"file": "images/ants/9.jpg", "kind": "ants"}])
    message = refusal(train=str(tmp_path / "a.csv"), image="file", label="kind")
    assert "9.jpg: can't be read: No such file" in message
    paths = pa.array([row["file"] for row in listed], pa.large_string())  # as polars writes them
    pyarrow.parquet.write_table(
        pa.table({"file": paths, "kind": [row["kind"] for row in listed]}), tmp_path / "a.parquet"
    )
    again = read(train=str(tmp_path / "a.parquet"), image="file", label="kind", validation=0.2)
    assert again.fingerprint == tables.fingerprint


def test_saved_folders_and_their_splits(tmp_path: Path) -> None:
    splits = {
        "train": Dataset.from_list(rows()),
        "dev": Dataset.from_list(rows(10)),
        "odd": Dataset.from_list(rows(12)),
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    tables = read(train=folder, validation=folder, test=f"{folder}[odd]")
    assert [len(table) for table in (tables.train, tables.validation, tables.test or [])] == [40, 10, 12]
    message = refusal(train=folder, validation=f"{folder}[od]")
    assert "no split 'od'. Did you mean odd?" in message
    assert "It has: train, dev, odd" in message
    splits["odd"].save_to_disk(tmp_path / "one")
    assert len(read(train=str(tmp_path / "one"), validation=0.5).validation) == 6


def test_a_hub_set_comes_from_the_cache_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = refusal(train="some/set", validation="some/set[dev]")
    assert "data.train: some/set" in message
    assert "HF_HOME" in message
    assert "prepare" in message
    assert "save_to_disk" in message
    table = Dataset.from_list(rows())
    folder = tmp_path / "some___set" / "default" / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / "set-train.arrow"), table.data.table.schema) as stream:
        stream.write_table(table.data.table)
    split = {"name": "train", "num_bytes": 1, "num_examples": 40, "dataset_name": "set"}
    datasets.DatasetInfo(
        features=table.features,
        builder_name="csv",
        dataset_name="set",
        config_name="default",
        version="0.0.0",
        splits=datasets.SplitDict.from_split_dict([split]),
    ).write_to_directory(str(folder))
    assert len(read(train="some/set").train) == 36
    assert "no split 'validation'" in refusal(train="some/set", validation="some/set")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True


@needs_corpus
def test_topics_are_distinct_unambiguous_and_many_enough() -> None:
    tables = read(train="builtin:topics")
    texts = [*tables.train["text"], *tables.validation["text"]]
    assert len(tables.classes) == 11
    # The first three stand in several topics; "What is AI?" repeats inside one.
    assert not {"yes", "no", "cancer"} & {text.casefold().strip(" .!?") for text in texts}
    assert texts.count("What is AI?") == 1
    assert len(texts) == len({text.casefold() for text in texts}) > 1400
    assert min(Counter(tables.train["label"]).values()) >= 36
    assert min(Counter(tables.validation["label"]).values()) >= 4


def test_digits_are_images() -> None:
    tables = read(train="builtin:digits", validation=0.2, max_rows=200)
    assert tables.classes == tuple("0123456789")
    assert len(tables.train) == 200
    assert abs(len(tables.validation) - 359) <= 5
    image = tables.train[0]["image"]
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    assert max(high for _, high in image.getextrema()) == 255
    shown = np.stack([np.asarray(image)[..., 0] for image in read_builtin("digits")["image"]])
    assert np.array_equal(shown, (load_digits().images * (255 / 16)).round())


def test_digits_have_traits_and_a_slant() -> None:
    tables = read(train="builtin:digits", label="traits", validation=0.2)
    assert (tables.task, tables.classes) == ("multilabel", ("even", "prime", "round"))
    digits = [str(label) for label in read_builtin("digits")["label"]]
    traits = [set(row) for row in read_builtin("digits")["traits"]]
    assert dict(zip(digits, traits, strict=True))["1"] == set()
    assert all(("even" in names) == (int(digit) % 2 == 0) for digit, names in zip(digits, traits, strict=True))
    assert digits == [str(digit) for digit in load_digits().target]
    tables = read(train="builtin:digits", label="slant")
    slants = np.asarray(tables.train["label"])
    assert tables.task == "regression"
    assert 5 < slants.std() < 10
    assert abs(slants).max() < 30


@needs_corpus
def test_punctuation_is_a_tag_for_each_word() -> None:
    tables = read(train="builtin:punctuation")
    assert (tables.task, tables.classes) == ("token-classification", ("O", "comma", "period", "question"))
    rows = [*tables.train, *tables.validation]
    assert len(rows) == len({tuple(row["words"]) for row in rows}) > 1000
    assert all(len(row["words"]) == len(row["label"]) >= 3 for row in rows)
    found = {" ".join(row["words"]): [tables.classes[tag] for tag in row["label"]] for row in rows}
    assert found["what is ai"] == ["O", "O", "question"]


def test_hymenoptera_reads_as_it_is() -> None:
    if not HYMENOPTERA.is_dir():
        pytest.skip("the shared hymenoptera images are absent")
    tables = read(train=str(HYMENOPTERA / "train"), validation=str(HYMENOPTERA / "val"))
    assert (len(tables.train), len(tables.validation), tables.classes) == (245, 153, ("ants", "bees"))


@pytest.mark.parametrize(
    ("table", "data", "words"),
    [
        ([{"sentence": f"row {i}", "stars": i % 3, "id": i} for i in range(30)], {}, None),
        ([{"sentence": f"row {i}", "stars": i % 3, "labels": i % 2} for i in range(30)], {"label": "stars"}, None),
        (
            [{"sentence": f"row {i}", "stars": i % 3, "helpful": i % 2} for i in range(30)],
            {},
            ["stars and helpful could each be the label", "data.label=COLUMN", "Columns: sentence (string), stars"],
        ),
        (
            [{"title": f"row {i}", "body": f"long {i}", "label": i % 2} for i in range(30)],
            {},
            ["title and body could each be the text", "data.text=COLUMN", "data.text=[title,body] for a pair"],
        ),
        ([{"n": i, "label": i % 2} for i in range(30)], {}, ["no column holds text", "n (numbers as text)"]),
        (rows(), {"text": "txet"}, ["data.text=txet", "Did you mean text?", "Columns: text (string), label (string)"]),
        (rows(), {"label": "x", "text": "y"}, ["data.label=x", "data.text=y"]),
        (rows(), {"text": "label", "label": "label"}, ["column of its own"]),
        (rows(), {"text": ["text", "text"]}, ["column of its own"]),
    ],
)
def test_columns(tmp_path: Path, table: list[dict[str, Any]], data: dict[str, Any], words: list[str] | None) -> None:
    path = write_csv(tmp_path / "a.csv", table)
    if words is None:
        tables = read(train=path, **data)
        assert (tables.columns.text, tables.columns.label) == (("sentence",), ("stars",))
    else:
        message = refusal(train=path, **data)
        assert [word for word in words if word not in message] == [], message


def test_a_first_row_is_not_taken_for_a_header_unsaid(tmp_path: Path) -> None:
    lines = [f"a text of {i}\t{('pos', 'neg')[i % 2]}\n" for i in range(30)]
    path = tmp_path / "rows.tsv"
    path.write_text("".join(lines))
    told = refusal(train=str(path))
    assert "the first line is read as the names of columns, but 'pos' is also a value" in told
    assert "data.columns=[text,label]" in told
    assert len(read(train=str(path), columns=["text", "label"], validation=str(path)).train) == 30
    assert len(read(train=str(path), label="pos", validation=str(path)).train) == 29, "the user says that it is a name"
    path.write_text("0\t1\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(30)))
    assert len(read(train=str(path), validation=str(path)).train) == 30, "as pandas numbers columns without names"


def test_what_is_no_file_is_not_said_to_be_absent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to("nothing.csv")
    for name in ("pipe.csv", "link.csv"):
        assert "is neither a file nor a folder" in refusal(train=str(tmp_path / name))


def test_other_separators_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text;label\n" + "".join(f"text {i};{i % 2}\n" for i in range(30)))
    assert "Are they separated by ';'? A .csv file needs commas" in refusal(train=str(path))


def test_all_bad_rows_of_all_splits_are_told_at_once(tmp_path: Path) -> None:
    train, validation = rows(), rows(10, ("pos", "Pos", "great"))
    train[4]["text"] = " "
    for i in range(20, 40):
        train[i]["label"] = ""
    more = rows()
    more[2]["label"] = ""
    paths = [write_csv(tmp_path / "a.csv", train), write_csv(tmp_path / "b.csv", more)]
    message = refusal(train=paths, validation=write_csv(tmp_path / "v.csv", validation))
    assert f"data.train: empty text (column 'text'): {paths[0]} row 5;" in message
    assert f"data.train: label missing (column 'label'): {paths[0]} row 21, row 22" in message
    assert "and 13 more" in message
    assert "data.validation: classes that the training rows lack: 'Pos' (first at" in message
    assert "'great'" in message
    assert "Training has: neg, pos" in message
    few = refusal(train=[write_csv(tmp_path / "c.csv", rows()), paths[1]])
    assert few == f"data.train: label missing (column 'label'): {paths[1]} row 3; fill it in or remove the rows"


def test_one_class_fractions_ids_and_unlabelled_tests(tmp_path: Path) -> None:
    assert "one class only, 'pos'" in refusal(train=write_csv(tmp_path / "a.csv", rows(9, ("pos",))))
    Dataset.from_list([{"text": f"row {i}", "label": i / 8} for i in range(30)]).to_parquet(tmp_path / "b.parquet")
    message = refusal(train=str(tmp_path / "b.parquet"), task="classification")
    assert "column 'label' holds real numbers such as 0.0" in message
    assert "task: regression would work" in message
    whole = Dataset.from_list([{"text": f"row {i}", "label": float(i % 3)} for i in range(30)])
    whole.to_parquet(tmp_path / "e.parquet")
    message = refusal(train=str(tmp_path / "e.parquet"), validation=str(tmp_path / "b.parquet"))
    assert "row 2: label 0.125 is a fraction" in message
    ids = [{"text": f"row {i}", "label": f"id-{i}"} for i in range(60)]
    message = refusal(train=write_csv(tmp_path / "c.csv", ids))
    assert "60 different values in 60 rows: no class label. No other column could be one" in message
    message = refusal(train=write_csv(tmp_path / "f.csv", [{**row, "kind": "a"} for row in ids]), text="text")
    assert "Write data.label=COLUMN; other columns: kind" in message
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features).to_parquet(tmp_path / "t.parquet")
    train = write_csv(tmp_path / "d.csv", rows(20, ("no", "yes")))
    assert "data.test" in (message := refusal(train=train, test=str(tmp_path / "t.parquet")))
    assert "unlabelled" in message


def test_other_columns_in_validation(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", rows())
    other = write_csv(tmp_path / "b.csv", [{"texts": "a", "label": "pos"}])
    message = refusal(train=train, validation=other)
    assert f"data.validation: {other} lacks the column 'text'" in message
    assert "Did you mean texts?" in message
    message = refusal(train=train, validation=write_csv(tmp_path / "d.csv", [{"x": "a", "label": "pos"}]))
    assert message.endswith("lacks the column 'text' of the training rows. Columns: x, label."), message
    Dataset.from_list([{"text": 3, "label": "pos"}]).to_parquet(tmp_path / "c.parquet")
    assert "'text' holds Value('int64'), not text" in refusal(train=train, validation=str(tmp_path / "c.parquet"))
    assert "need the same columns" in refusal(train=[train, other])


def test_damaged_images_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    whole = (folder / "ants" / "1.jpg").read_bytes()
    (folder / "ants" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bees" / "notes.txt").write_text("not an image")
    (folder / "bees" / "2.jpg").write_bytes(b"")
    message = refusal(train=str(folder))
    assert f"{folder}/ants/1.jpg: a damaged image file (image file is truncated" in message
    assert f"{folder}/bees/notes.txt: not an image file" in message
    assert f"{folder}/bees/2.jpg: an empty file" in message
    assert len(message.splitlines()) == 3
    assert len(read_tables(DataSpec(train=str(folder)), 0, decode_images=False).classes) == 2


def test_damaged_images_inside_a_table_are_named_by_row(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(out, format="PNG")
    cells = [{"bytes": out.getvalue() + bytes([i]), "path": None} for i in range(8)]
    cells[5] = {"bytes": out.getvalue()[:300], "path": None}
    features = Features({"photo": ImageFeature(), "label": Value("int64")})
    table = Dataset.from_dict({"photo": cells, "label": [0, 1] * 4}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    assert f"{tmp_path}/a.parquet row 6: a damaged image" in refusal(train=str(tmp_path / "a.parquet"))


def test_wrong_folders_say_what_to_write(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "train")
    write_images(tmp_path / "set" / "val")
    folder = tmp_path / "set"
    assert f"write data.train: {folder}/train, data.validation: {folder}/val" in refusal(train=str(folder))
    assert "Did you mean train?" in refusal(train=str(folder / "trian"))
    write_csv(folder / "val" / "ants" / "a.csv", rows())
    (folder / "train" / "wasps").mkdir()
    assert "no files in class folder wasps" in refusal(train=str(folder / "train"))
    (tmp_path / "empty").mkdir()
    assert "CLASS/IMAGE.jpg" in refusal(train=str(tmp_path / "empty"))
    path = write_csv(tmp_path / "empty" / "a.csv", rows())
    assert f"such as {path}" in refusal(train=str(tmp_path / "empty"))
    assert "Did you mean a.csv?" in refusal(train=str(tmp_path / "empty" / "b.csv"))
    assert len(read(train=str(tmp_path / "empty" / "*.csv")).train) == 36
    assert "no file matches" in refusal(train=str(tmp_path / "empty" / "*.tsv"))
    assert "Did you mean topics?" in refusal(train="builtin:topic")
    for nothing in ("", []):
        assert "data.train is empty; name a file" in refusal(train=nothing)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", rows())
    assert "data.image_size and data.augment: without effect" in refusal(train=path, image_size=32, augment=True)
    assert "data.max_length: without effect" in refusal(train=str(write_images(tmp_path / "i")), max_length=32)
    assert "data.columns" in refusal(train=str(tmp_path / "i"), columns=["text", "label"])
