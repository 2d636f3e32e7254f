"""Stored activations: what is written comes back, a half-written shard goes on, the quota evicts what is used least."""

import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_finetune.cache import fill
from dist_finetune.cache.cut import ACTIVATION, NoCut
from dist_finetune.cache.entries import META, clear, list_entries, make_room
from dist_finetune.cache.fill import Entry
from dist_finetune.cache.rows import CachedCollate, CachedRows
from dist_finetune.cache.store import Layout, ShardWriter, StoredRows
from dist_finetune.cli import main
from dist_finetune.data.text import TextRows, collate_text

LENGTHS = np.asarray([3, 1, 5, 2, 4, 1, 7], np.int32)
WIDTH = 6
MIB = 2**20


def layout(dtype: str, num_shards: int, lengths: np.ndarray | None = LENGTHS) -> Layout:
    shard_of = np.asarray([0, 3, 0, 1, 2, 2, 1]) % num_shards  # with 8 shards some have none
    return Layout(len(LENGTHS), (WIDTH,), dtype, num_shards, lengths, shard_of.astype(np.uint16))


def activations() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(int(length), WIDTH) for length in LENGTHS]


def write(folder: Path, made: Layout, rows: list[torch.Tensor]) -> None:
    for shard in range(made.num_shards):
        writer = ShardWriter(folder, "train", shard, made)
        for index in reversed(np.flatnonzero(made.shard_of == shard)):  # any order
            writer.write(index, rows[index])
        writer.note(made.num_rows)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "relative"), [("fp32", 0.0), ("bf16", 2**-8)])
def test_rows_come_back_as_stored(tmp_path: Path, dtype: str, relative: float, num_shards: int) -> None:
    """fp32 to the bit; bf16 within half a unit of its 8 bits. With 8 shards of 7 rows, one has none."""
    made, rows = layout(dtype, num_shards), activations()
    write(tmp_path, made, rows)
    stored = StoredRows(tmp_path, "train", made)
    for index, row in enumerate(rows):
        out = np.empty((len(row), WIDTH), np.float32)
        stored.read_into(index, out)
        if dtype == "fp32":
            assert torch.equal(torch.from_numpy(out), row)
        else:
            assert torch.equal(torch.from_numpy(out), row.bfloat16().float())
            assert np.abs(out - row.numpy()).max() <= relative * row.abs().max()
    size = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert size == made.num_bytes == LENGTHS.sum() * WIDTH * (4 if dtype == "fp32" else 2)


@pytest.mark.parametrize("num_shards", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_without_a_length_come_many_at_once(tmp_path: Path, dtype: str, num_shards: int) -> None:
    made = replace(layout(dtype, num_shards, lengths=None), piece_shape=(2, WIDTH))
    rows = list(torch.randn(made.num_rows, 2, WIDTH, generator=torch.Generator().manual_seed(0)))
    write(tmp_path, made, rows)
    wanted = [6, 0, 0, 3, 5]
    kept = torch.stack([rows[index] for index in wanted])
    kept = kept if dtype == "fp32" else kept.bfloat16().float()
    assert torch.equal(torch.from_numpy(StoredRows(tmp_path, "train", made).read(wanted)), kept)


def assert_stored(folder: Path, made: Layout, rows: list[torch.Tensor]) -> None:
    """Every row comes back to the bit."""
    stored = StoredRows(folder, "train", made)
    for index, row in enumerate(rows):
        out = np.empty((len(row), WIDTH), np.float32)
        stored.read_into(index, out)
        assert torch.equal(torch.from_numpy(out), row)


def test_a_half_written_shard_goes_on(tmp_path: Path) -> None:
    made, rows = layout("fp32", 1), activations()
    first = ShardWriter(tmp_path, "train", 0, made)
    for index in range(4):
        first.write(index, rows[index])
    first.note(4)
    first.write(4, rows[4])  # and then the process is killed: not noted, so it counts as not done
    second = ShardWriter(tmp_path, "train", 0, made)
    assert second.num_done == 4
    for index in range(4, 7):
        second.write(index, rows[index])
    second.note(7)
    assert_stored(tmp_path, made, rows)


def test_two_writers_of_one_shard_do_each_other_no_harm(tmp_path: Path) -> None:
    """A job that wakes up after it was taken for gone: the other's file is not cut off under it."""
    made, rows = layout("fp32", 1), activations()
    first = ShardWriter(tmp_path, "train", 0, made)
    for index in range(3):
        first.write(index, rows[index])
    ShardWriter(tmp_path, "train", 0, made).write(5, rows[5])
    for index in (3, 4, 6):
        first.write(index, rows[index])
    first.note(7)
    assert_stored(tmp_path, made, rows)


def test_a_shard_has_its_room_on_the_disk_before_its_first_row(tmp_path: Path) -> None:
    made = Layout(1, (MIB,), "fp32", 1, None, np.zeros(1, np.uint16))
    ShardWriter(tmp_path, "train", 0, made)
    found = (tmp_path / "train-00000.bin").stat()
    assert found.st_size == 4 * MIB
    assert found.st_blocks * 512 >= 4 * MIB


def test_a_disk_that_is_too_small_says_so_before_anything_is_written(tmp_path: Path) -> None:
    """Whatever the disk is: the system refuses a file beyond the process's limit, as it refuses one beyond the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            ShardWriter(tmp_path, "train", 0, Layout(1, (MIB,), "fp32", 1, None, np.zeros(1, np.uint16)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_disk_without_the_room_is_seen_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fill that was stopped has there already is not asked for again."""
    part, made = tmp_path / ".abc.1x64", Layout(1, (MIB,), "fp32", 1, None, np.zeros(1, np.uint16))
    wanted, free = Entry(tmp_path / "abc", {}, {"train": made}), [3 * MIB]
    monkeypatch.setattr(fill.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    with pytest.raises(NoCut, match="has 3 MiB free, the cache needs 4 MiB"):
        fill._begin(part, wanted, quota=10 * MIB)
    assert list(tmp_path.iterdir()) == []
    free[0] = 5 * MIB
    fill._begin(part, wanted, quota=10 * MIB)
    ShardWriter(part, "train", 0, made)
    free[0] = 0
    fill._begin(part, wanted, quota=10 * MIB)
    assert [path.name for path in part.iterdir()] == ["train-00000.bin"]


@pytest.mark.parametrize("pads_left", [False, True])
def test_batches_have_activations_where_their_tokens_are(tmp_path: Path, pads_left: bool) -> None:
    made, rows = layout("fp32", 2), activations()
    write(tmp_path, made, rows)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    texts = TextRows(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, None, np.arange(7), 0)

    def collate(batch: list) -> dict:
        return collate_text(batch, 0, multiple_of=8, padding_side="left" if pads_left else "right")

    cached = CachedRows(texts, reads_text=True)
    batch = CachedCollate(StoredRows(tmp_path, "train", made), made, True, collate, pads_left)(
        [cached[i] for i in (2, 1, 6)]
    )
    inputs = batch["inputs"]
    assert batch["labels"].tolist() == [2, 1, 6]
    assert inputs[ACTIVATION].shape == (3, 8, WIDTH)
    mask = inputs["attention_mask"].bool()
    assert torch.equal(inputs[ACTIVATION][mask], torch.cat([rows[2], rows[1], rows[6]]))
    assert not inputs[ACTIVATION][~mask].any()


def test_views_of_a_row_take_turns(tmp_path: Path) -> None:
    """Row i has `views` versions, `num_rows` apart; epochs go through them and begin again."""

    class Labelled:
        labels = np.asarray([7, 8, 9])

        def __len__(self) -> int:
            return 3

    rows = CachedRows(Labelled(), reads_text=False, views=2)
    assert [rows[epoch, 1][0] for epoch in range(5)] == [1, 4, 1, 4, 1]
    assert rows[2] == (2, {"label": 9})


OLD, NEWER, NEWEST = "0" * 20, "1" * 20, f"tokens-{'2' * 20}"


def entry(root: Path, key: str, num_bytes: int, used: float) -> None:
    (root / key).mkdir(parents=True)
    (root / key / "train-00000.bin").write_bytes(bytes(num_bytes))
    (root / key / META).write_text(json.dumps({"source": f"model of {key}"}))
    os.utime(root / key / META, (used, used))


def test_the_quota_evicts_what_was_used_longest_ago(tmp_path: Path) -> None:
    for key, used in ((OLD, 1e9), (NEWER, 1.1e9), (NEWEST, 1.2e9)):
        entry(tmp_path, key, MIB, used)
    make_room(tmp_path, MIB, quota=10 * MIB)
    assert [e.key for e in list_entries(tmp_path)] == [OLD, NEWER, NEWEST]
    make_room(tmp_path, MIB, quota=int(3.5 * MIB))
    assert [e.key for e in list_entries(tmp_path)] == [NEWER, NEWEST]
    make_room(tmp_path, MIB, quota=MIB)
    assert list_entries(tmp_path) == []


def test_what_could_never_keep_within_the_quota_evicts_nothing(tmp_path: Path) -> None:
    entry(tmp_path, OLD, MIB, 1e9)
    with pytest.raises(OSError, match=r"5 MiB are more than cache\.quota, which is 4 MiB"):
        make_room(tmp_path, 5 * MIB, quota=4 * MIB)
    assert [e.key for e in list_entries(tmp_path)] == [OLD]


def test_what_a_job_may_still_read_is_not_evicted(tmp_path: Path) -> None:
    entry(tmp_path, OLD, MIB, 1e9)
    entry(tmp_path, NEWER, MIB, time.time() - 3600)
    with pytest.raises(OSError, match=r"2 MiB and the 1 MiB of entries that were used within a day are more than"):
        make_room(tmp_path, 2 * MIB, quota=int(2.5 * MIB))
    assert [e.key for e in list_entries(tmp_path)] == [OLD, NEWER]
    make_room(tmp_path, MIB, quota=int(2.5 * MIB))
    assert [e.key for e in list_entries(tmp_path)] == [NEWER]


def test_an_entry_that_goes_while_entries_are_listed_is_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry(tmp_path, OLD, MIB, 1e9)
    entry(tmp_path, NEWER, MIB, 1e9)
    read_text = Path.read_text

    def evicted_before(path: Path, **options: str) -> str:
        if path.parent.name == OLD:
            shutil.rmtree(path.parent)
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", evicted_before)
    assert [e.key for e in list_entries(tmp_path)] == [NEWER]


@pytest.mark.parametrize("garbled", [b"{", b"[]", b"{}", b"\xff"])
def test_an_entry_that_is_damaged_is_listed_and_evicted_as_others_are(tmp_path: Path, garbled: bytes) -> None:
    entry(tmp_path, OLD, MIB, 1e9)
    entry(tmp_path, NEWER, MIB, 1.1e9)
    (tmp_path / OLD / META).write_bytes(garbled)
    os.utime(tmp_path / OLD / META, (1e9, 1e9))
    assert [(e.key, e.source) for e in list_entries(tmp_path)] == [
        (OLD, "damaged: meta.json can't be read"),
        (NEWER, f"model of {NEWER}"),
    ]
    make_room(tmp_path, MIB, quota=int(2.5 * MIB))
    assert [e.key for e in list_entries(tmp_path)] == [NEWER]


def test_what_was_begun_and_given_up_is_removed(tmp_path: Path) -> None:
    for name, age_s in ((f".{OLD}.2x64", 8 * 86400), (f".{OLD}.turn-0", 8 * 86400), (f".{NEWEST}.0123abcd", 60)):
        (tmp_path / name).mkdir()
        then = (tmp_path / name).stat().st_mtime - age_s
        os.utime(tmp_path / name, (then, then))
    make_room(tmp_path, 0, quota=MIB)
    assert [path.name for path in tmp_path.iterdir()] == [f".{NEWEST}.0123abcd"]


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    """`cache.folder` may be a home folder, or one that holds runs."""
    strange = {".ssh/id", ".conda/meta.json", "run/meta.json", "notes.txt", f"{OLD}-mine/meta.json"}
    for name in strange:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        os.utime((tmp_path / name).parent, (1e9, 1e9))
    entry(tmp_path, OLD, MIB, 1e9)
    make_room(tmp_path, MIB, quota=MIB)
    entry(tmp_path, NEWER, MIB, 1e9)
    assert [e.key for e in list_entries(tmp_path)] == [NEWER]
    assert clear(tmp_path) > MIB
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == strange


def test_the_command_lists_and_clears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    entry(tmp_path, OLD, 2 * MIB, 1e9)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["cache", "ls", f"--folder=~/{tmp_path.name}"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(OLD)
    assert "2.0 MiB" in line
    assert line.endswith(f"model of {OLD}")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["cache", "clear", "--folder", str(tmp_path)])
    assert "2.0 MiB freed" in capsys.readouterr().out
    assert clear(tmp_path) == 0
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["cache", "ls", "--folder", str(tmp_path)])
    assert capsys.readouterr().out == f"no stored activations in {tmp_path}\n"
    assert not tmp_path.exists()
