"""Which task a label column is for, and what is wrong with its rows."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.errors import UserError
from dist_finetune.spec import DataSpec
from dist_finetune.tasks.names import TaskName

WORDS = {"tokens": ["In", "Oslo", "today"], "tags": ["O", "B-place", "O"]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A .csv or .jsonl file."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(*labels: Any, times: int = 8) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}", "label": labels[i % len(labels)]} for i in range(times * len(labels))]


def tagged(num_rows: int = 8, **changes: Any) -> list[dict[str, Any]]:
    return [{**WORDS, "tokens": ["In", "Oslo", f"day{i}"]} | changes for i in range(num_rows)]


def read(file: str, task: TaskName | None = None, **data: Any) -> Tables:
    return read_tables(DataSpec(train=file, **data), 0, task=task)


def refusal(file: str, task: TaskName | None = None, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(file, task, **data)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [
        (("good", "bad"), "classification", ("bad", "good")),
        ((1, 0, 10), "classification", ("0", "1", "10")),
        ((0.5, 1.0, 2.25), "regression", ("label",)),
        ((-1e-3, 2), "regression", ("label",)),
    ],
)
def test_the_task_is_found_from_the_label(
    tmp_path: Path, suffix: str, labels: tuple[Any, ...], task: str, classes: tuple[str, ...]
) -> None:
    # a JSON column of whole and real numbers together is one of real numbers
    tables = read(write(tmp_path / f"a{suffix}", labelled(*labels)))
    assert (tables.task, tables.classes) == (task, classes)
    assert any("task: regression was chosen" in note for note in tables.notes) == (task == "regression")


def test_lists_are_labels_or_tags(tmp_path: Path) -> None:
    tables = read(write(tmp_path / "a.jsonl", labelled(["b", "a"], [], ["c"])))
    assert (tables.task, tables.classes) == ("multilabel", ("a", "b", "c"))
    rows = {text: sorted(label) for text, label in zip(tables.train["text"], tables.train["label"], strict=True)}
    assert rows["text number 0"] == [0, 1]
    assert rows["text number 1"] == []
    tables = read(write(tmp_path / "b.jsonl", tagged()))
    assert (tables.task, tables.classes) == ("token-classification", ("B-place", "O"))
    assert tables.columns.text == ("tokens",)
    assert tables.train["label"][0] == [1, 0, 1]
    assert (len(tables.train), len(tables.validation)) == (7, 1)
    words = pa.array([row["tokens"] for row in tagged()], pa.large_list(pa.string_view()))  # as polars writes them
    pyarrow.parquet.write_table(
        pa.table({"tokens": words, "tags": [row["tags"] for row in tagged()]}), tmp_path / "c.parquet"
    )
    assert read(str(tmp_path / "c.parquet")).fingerprint == tables.fingerprint


def test_a_conll_file_is_one_of_tags(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("".join(f"In O\nOslo B-place\nday{i} O\n\n" for i in range(8)), encoding="utf-8")
    tables = read(str(tmp_path / "a.conll"))
    assert (tables.task, tables.classes) == ("token-classification", ("B-place", "O"))
    assert tables.fingerprint == read(write(tmp_path / "b.jsonl", tagged())).fingerprint
    assert len(tables.train) + len(tables.validation) == 8


def test_class_labels_in_lists_have_their_names_and_order(tmp_path: Path) -> None:
    tags = ClassLabel(names=["O", "B-place", "I-place"])
    features = Features({"words": List(Value("string")), "ner_tags": List(tags)})
    rows = {"words": [["a", f"b{i}"] for i in range(6)], "ner_tags": [[0, 1]] * 5 + [[0, 2]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    tables = read(str(tmp_path / "a.parquet"), validation=str(tmp_path / "a.parquet"))
    assert tables.classes == ("O", "B-place", "I-place")
    assert list(tables.train["label"]) == [[0, 1]] * 5 + [[0, 2]]


def test_several_columns_of_0_and_1(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "spam": i % 2, "rude": int(i % 3 == 0)} for i in range(12)]
    for name in ("a.csv", "a.jsonl"):
        tables = read(write(tmp_path / name, rows), label=["spam", "rude"], validation=write(tmp_path / name, rows))
        assert (tables.task, tables.classes) == ("multilabel", ("spam", "rude"))
        assert list(tables.train["label"])[:4] == [[1], [0], [], [0, 1]]
    rows[4]["rude"] = 2
    message = refusal(write(tmp_path / "b.jsonl", rows), label=["spam", "rude"])
    assert (
        f"column 'rude' holds '2' where one of several data.label has 0 or 1: {tmp_path / 'b.jsonl'} row 5" in message
    )
    message = refusal(write(tmp_path / "c.jsonl", rows), "regression", label=["spam", "rude"])
    assert "several columns of 0 and 1 are task: multilabel" in message


def test_whole_numbers_stay_classes_and_a_note_says_so(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", labelled(*range(30)))
    tables = read(file)
    assert (tables.task, len(tables.classes)) == ("classification", 30)
    assert any("30 different whole numbers: they were taken as classes" in note for note in tables.notes)
    tables = read(file, "regression")
    assert (tables.task, tables.classes, tables.notes) == ("regression", ("label",), ())
    assert sorted(set(tables.train["label"])) == [float(i) for i in range(30)]
    message = refusal(write(tmp_path / "b.jsonl", labelled(*range(300), times=1)))
    assert "300 different values in 300 rows" in message
    assert "task: regression" in message
    few = read(write(tmp_path / "c.jsonl", labelled(0, 1, 2)))
    assert (few.task, few.notes) == ("classification", ())


@pytest.mark.parametrize(
    ("task", "labels", "found", "works"),
    [
        ("regression", ("good", "bad"), "texts such as 'good'", "task: classification"),
        ("multilabel", ("good", "bad"), "texts such as 'good'", "task: classification"),
        ("multilabel", (0.5, 1.5), "real numbers such as 0.5", "task: regression"),
        ("classification", (0.5, 1.5), "real numbers such as 0.5", "task: regression"),
        ("classification", (["a"], ["b"]), "lists such as ['a']", "task: multilabel"),
        ("regression", (["a"], ["b"]), "lists such as ['a']", "task: multilabel"),
    ],
)
def test_a_task_that_the_column_cannot_be(
    tmp_path: Path, task: TaskName, labels: tuple[Any, ...], found: str, works: str
) -> None:
    message = refusal(write(tmp_path / "a.jsonl", labelled(*labels)), task, label="label")
    assert f"column 'label' holds {found}" in message
    assert f"task: {task} needs" in message
    assert f"{works} would work" in message


def test_tags_need_lists_which_a_csv_file_cannot_hold(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", [{"tokens": "In Oslo", "tags": "O B-place"}] * 4)
    message = refusal(file, "token-classification", label="tags")
    assert "no column of words" in message
    assert ".jsonl, .parquet or .arrow" in message
    message = refusal(write(tmp_path / "b.jsonl", labelled("a", "b")), "token-classification", text="text")
    assert '{"tokens": ["In", "Oslo"]' in message


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (labelled(0.5, None, 1.5, times=1), "label missing (column 'label'): FILE row 2"),
        (labelled(0.5, float("nan"), 1.5, times=1), "no finite number (column 'label'): FILE row 2"),
        (labelled(0.5, float("inf"), 1.5, times=1), "no finite number (column 'label'): FILE row 2"),
        (labelled(["a"], ["a", "b"], None, times=1), "label missing (column 'label'): FILE row 3"),
        (labelled(["a"], ["a", None], ["b"], times=1), "an empty label in the list (column 'label'): FILE row 2"),
        (labelled(["a"], ["b", "b"], times=1), "a label twice in one row"),
        (
            [*tagged(3), *tagged(1, tags=["O", "O"])],
            "not as many tags as words (columns 'tokens' and 'tags', 3 words and",
        ),
        ([*tagged(3), *tagged(1, tags=["O", None, "O"])], "a word without a tag (column 'tags'): FILE row 4"),
        ([*tagged(3), *tagged(1, tags=None)], "label missing (column 'tags'): FILE row 4"),
        ([*tagged(3), *tagged(1, tokens=[], tags=[])], "no words (column 'tokens'): FILE row 4"),
        ([*tagged(3), *tagged(1, tokens=["a", " ", "c"])], "an empty word (column 'tokens'): FILE row 4"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    file = write(tmp_path / "a.jsonl", rows)
    message = refusal(file)
    assert f"data.train: {told.replace('FILE', file)}" in message


def test_numbers_in_a_csv_file(tmp_path: Path) -> None:
    rows = labelled(0.5, "nan", "", times=2)
    message = refusal(write(tmp_path / "a.csv", rows))
    assert f"no finite number (column 'label'): {tmp_path / 'a.csv'} row 2, row 5" in message
    assert f"label missing (column 'label'): {tmp_path / 'a.csv'} row 3, row 6" in message
    assert "row 2, row 4, row 6" in refusal(write(tmp_path / "c.csv", labelled(0.5, " ", times=3)))
    message = refusal(write(tmp_path / "b.csv", labelled(0.5, "NA", times=3)), "regression")
    assert f"no number (column 'label'): {tmp_path / 'b.csv'} row 2, row 4, row 6" in message


def test_a_tag_or_label_that_training_lacks(tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", [*tagged(1), *tagged(1, tags=["O", "B-person", "O"])])
    message = refusal(write(tmp_path / "a.jsonl", tagged()), validation=other)
    assert f"classes that the training rows lack: 'B-person' (first at {other} row 2)" in message
    same = refusal(write(tmp_path / "c.jsonl", tagged(4, tags=["O", "O", "O"])))
    assert "holds one tag only, 'O'; token-classification needs two tags at least" in same


def test_the_label_column_is_found_by_what_it_holds(tmp_path: Path) -> None:
    rows = [{"review": f"long enough {i}", "stars": i / 4} for i in range(20)]
    for name in ("a.csv", "a.jsonl"):
        tables = read(write(tmp_path / name, rows))
        assert (tables.task, tables.columns.label, tables.columns.text) == ("regression", ("stars",), ("review",))
    several = [{**row, "pos": row["tags"]} for row in tagged()]
    message = refusal(write(tmp_path / "b.jsonl", several))
    assert "tags and pos could each be the label; write data.label=COLUMN" in message
    assert read(write(tmp_path / "b.jsonl", several), label="pos").columns.label == ("pos",)


def test_the_fingerprint_tells_tasks_and_labels_apart(tmp_path: Path) -> None:
    numbers = write(tmp_path / "a.jsonl", labelled(0, 1, 2))
    prints = {read(numbers, task).fingerprint for task in (None, "classification", "regression")}
    assert len(prints) == 2
    prints = {
        read(write(tmp_path / f"{i}.jsonl", labelled(*labels))).fingerprint
        for i, labels in enumerate(([["a"], ["b", "c"]], [["a", "b"], ["c"]], [["a"], ["c", "b", "d"]]))
    }
    assert len(prints) == 3
