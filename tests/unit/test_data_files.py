"""Reading one file: quoting, encodings, every suffix, and errors that name file and row."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from dist_finetune.data.files import read_file, read_pieces
from dist_finetune.errors import UserError

ROWS = [
    {"text": "good, really", "label": "pos"},
    {"text": 'so "bad"', "label": "neg"},
    {"text": "null", "label": "neg"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, content: str | bytes, columns: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_file(write(path, content), columns)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_kind_gives_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    files = [
        write(tmp_path / "a.csv", '\ufefftext,label\r\n"good, really",pos\r\n"so ""bad""",neg\r\nnull,neg\r\n'),
        write(tmp_path / "a.tsv", 'text\tlabel\ngood, really\tpos\nso "bad"\tneg\nnull\tneg\n'),
        write(tmp_path / "b.tsv", 'text\tlabel\ngood, really\tpos\n"so ""bad"""\tneg\nnull\tneg'),
        write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        write(tmp_path / "lines.json", "\n".join(map(json.dumps, ROWS))),
        write(tmp_path / "list.json", json.dumps(ROWS, indent=1)),
        write(tmp_path / "columns.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
    ]
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    files += [tmp_path / name for name in ("a.parquet", "stream.arrow", "file.arrow")]
    assert [read_file(path).to_pylist() for path in files] == [ROWS] * 10
    for path in files:
        pieces = list(read_pieces(path, num_rows=2))
        assert [len(piece) for piece in pieces] == [2, 1], path
        assert pa.concat_tables(pieces).to_pylist() == ROWS


def test_bare_quotes_of_a_tsv_do_not_swallow_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"The Office" is back\t1\nfine\t0\nsaid "yes"\t1\n')
    assert [row["text"] for row in read_file(path).to_pylist()] == ['"The Office" is back', "fine", 'said "yes"']


def test_headerless_and_quoted_line_breaks_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 60_000
    path = write(tmp_path / "a.csv", f'"two\nlines",a\n\n{long},b\n')
    assert read_file(path, ["text", "label"]).to_pylist() == [
        {"text": "two\nlines", "label": "a"},
        {"text": long, "label": "b"},
    ]
    # Only a line feed ends a row of a .tsv file: U+2028 and others that str.splitlines knows are text.
    assert read_file(write(tmp_path / "a.tsv", "a\u2028b\x0bc\t1\n"), ["text", "label"]).num_rows == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", ["empty"]),
        ("a.csv", "text,label\n", ["no rows"]),
        ("a.csv", "text,label\na,1\nb,c,0\n", ["row 2 has 3 columns", "the header has 2"]),
        ("a.csv", 'text,label\na,1\n"b" c,0\n', [":3: malformed row", "double the quotes"]),
        ("a.csv", 'text,label\na,1\n"b,0\n', ["malformed row"]),
        ("a.csv", "text,text\na,1\n", ["two columns are called 'text'"]),
        ("a.tsv", "text\tlabel\na\n", ["row 1 has 1 columns", "A tab separates"]),
        ("a.tsv", 'text\tlabel\n"two\nlines"\t1\n', ["row 1 has 1 columns", "that hold either as .csv or .jsonl"]),
        ("a.csv", "text,label\ncaf\u00e9,1\n".encode("latin-1"), ["byte 14 is not UTF-8"]),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ["a.jsonl:2:", "not valid JSON"]),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 99_999, ["a.jsonl:2: lists or objects within each other, too deep"]),
        ("a.jsonl", '{"text": "a"}\n{"n": ' + "9" * 5000 + "}", ["a.jsonl:2: a number of thousands of digits"]),
        ("a.json", '[{"text": ' + "[" * 99_999, ["a.json: lists or objects within each other, too deep"]),
        ("a.json", '[{"n": ' + "9" * 5000 + "}]", ["a.json: a number of thousands of digits"]),
        ("a.jsonl", '{"text": "a"}\n[1]\n', ["row 2 is not an object"]),
        ("a.json", '[{"text": "a"},\n {"text": "b"]', ["a.json:2:", "not valid JSON"]),
        ("a.json", "[]", ["no rows"]),
        ("a.json", '{"text": ["a", "b"], "label": [1]}', ["different lengths: text 2, label 1"]),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', ["column 'text' mixes", "row 2 holds 3"]),
        ("a.jsonl", '{"t": ["a"]}\n{"t": ["b"]}\n{"t": ["c", 3]}\n', ["column 't' mixes", "row 3 holds ['c', 3]"]),
        ("a.jsonl", '{"text": ["a"]}\n{"text": [3]}\n', ["column 'text' mixes", "row 2 holds [3]", "such as ['a']"]),
        ("a.jsonl", '{"id": null}\n{"id": 18446744073709551616}\n', ["row 2 holds 18446744073709551616", "64 bits"]),
        ("a.jsonl", '{"text": "a"}\n{"text": "cut \\ud83d"}\n', ["row 2 holds 'cut ", "half of a character"]),
        ("a.parquet", "nonsense", ["not a readable .parquet file"]),
        ("a.arrow", "nonsense", ["not a readable .arrow file"]),
        ("a.xlsx", "x", [".xlsx", ".parquet"]),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    message = refused(tmp_path / name, content)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\na,1\nb,2\nc,3\nd\n", "row 4 has 1 columns"),
        ("a.csv", b"text,label\na,1\nb,2\nc,3\n\xff,4\n", "byte 23 is not UTF-8"),
        ("a.jsonl", '{"t": 1}\n{"t": 2}\n{"t": 3}\n[4]\n', "row 4 is not an object"),
        ("a.jsonl", '{"t": 1}\n{"t": 2}\n{"t": 3}\n{"t": "4"}\n', "column 't' mixes kinds of values: row 4"),
    ],
)
def test_pieces_come_before_what_is_wrong_later_which_is_named_by_its_row(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    pieces = read_pieces(write(tmp_path / name, content), num_rows=2)
    assert len(next(pieces)) == 2
    with pytest.raises(UserError, match=words):
        next(pieces)


def test_columns_are_for_delimited_files(tmp_path: Path) -> None:
    assert "data.columns" in refused(tmp_path / "a.jsonl", '{"text": "a"}', ["text"])


def test_a_file_of_datasets_keeps_its_features(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert Dataset(read_file(tmp_path / "a.parquet")).features == features


def test_columns_that_datasets_can_not_hold_are_named(tmp_path: Path) -> None:
    """As other tools write them, such as DuckDB's UUID and MAP."""
    path = tmp_path / "a.parquet"
    meta = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    pyarrow.parquet.write_table(pa.table({"text": ["a"], "meta": meta}), path)
    with pytest.raises(UserError, match=r"a\.parquet: column 'meta' holds map<string, int64.*leave it out"):
        read_file(path)
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), twice.schema) as file:
        file.write_table(twice)
    with pytest.raises(UserError, match="two columns are called 'text'"):
        read_file(tmp_path / "a.arrow")


def test_conll_files_hold_sentences(tmp_path: Path) -> None:
    plain = "In O\nOslo B-place\n\n\nRain O\n"
    columns = "-DOCSTART- -X- -X- O\n\nIn IN I-PP O\nOslo NNP I-NP B-place\n\nRain NN I-NP O"
    tabs = "In\tO\nOslo\tB-place\n\nRain\tO\n\n"
    for number, content in enumerate((plain, columns, tabs)):
        table = read_file(write(tmp_path / f"{number}.conll", content))
        assert table.to_pylist() == [
            {"tokens": ["In", "Oslo"], "tags": ["O", "B-place"]},
            {"tokens": ["Rain"], "tags": ["O"]},
        ]
    assert [len(piece) for piece in read_pieces(tmp_path / "0.conll", num_rows=1)] == [1, 1]
    assert ":2: 'Oslo' has no tag" in refused(tmp_path / "a.conll", "In O\nOslo\n")
    assert "no rows" in refused(tmp_path / "b.conll", "\n\n")


@pytest.mark.parametrize(
    ("comments", "word", "gap"),
    [
        ("# sent_id = 7\n# text = # Oslo\n", "{}\t_\t{}\n", ""),
        ("# newpar\n# sent_id = 7\n", "{}\t{}\n", ""),
        ("# sent_id = 7\n", "{} NN I-NP {}\n", ""),  # as many words as columns
        ("# id 5239d808-f300\tdomain=en\n", "{} _ _ {}\n", ""),
        ("#begin document (a/b); part 000\n", "{} {}\n", "\n#end document of a\n"),
        ("-DOCSTART- -X- O O\n\n", "{} NN I-NP {}\n", ""),
        ("-DOCSTART-\tO\n", "{}\t{}\n", ""),
        ("#\n", "{} {}\n", ""),
    ],
)
def test_comments_of_conll_files_are_no_words_and_words_no_comments(
    tmp_path: Path, comments: str, word: str, gap: str
) -> None:
    first = "".join(word.format(*pair) for pair in (("#", "O"), ("Oslo", "B-place"), ("#", "O")))
    second = "".join(word.format(*pair) for pair in (("#Oslo", "B-place"), ("#", "O")))
    table = read_file(write(tmp_path / "a.conll", f"{comments}{first}{gap}\n{comments}{second}{gap}"))
    assert table["tokens"].to_pylist() == [["#", "Oslo", "#"], ["#Oslo", "#"]]
    assert table["tags"].to_pylist() == [["O", "B-place", "O"], ["B-place", "O"]]


def test_a_conll_file_of_nothing_but_hash_words_is_read_and_one_without_a_tag_told(tmp_path: Path) -> None:
    table = read_file(write(tmp_path / "a.conll", "# text = #Oslo\n#Oslo B-place\n# O\n"))
    assert table["tokens"].to_pylist() == [["#Oslo", "#"]]
    assert ":1: '#Oslo' has no tag" in refused(tmp_path / "b.conll", "#Oslo\nIn O\n")
