"""A checkpoint is whole or not there: damage by kind, death at every moment of a save, full and read-only disks."""

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_finetune.checkpoint.layout import COMPLETE, FORMAT_VERSION, STATE, checkpoint_folders, folder_name
from dist_finetune.checkpoint.read import damage, newest_complete, open_checkpoint
from dist_finetune.checkpoint.verify import verify_path
from dist_finetune.checkpoint.write import CheckpointWriter, snapshot_share
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.hold import LostHold
from dist_finetune.report import Reporter
from dist_finetune.run_folder import write_text
from dist_finetune.spec import LaunchSpec
from dist_finetune.spec_file import load_spec
from dist_finetune.summary import in_run_folder, write_end
from dist_finetune.world import World, join_world

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def world() -> Iterator[World]:
    with join_world(LaunchSpec()) as joined:
        yield joined


def tensors(step: int, num_elements: int = 1000) -> dict[str, torch.Tensor]:
    return {f"{kind}:layer.weight@0": torch.full((num_elements,), float(step)) for kind in ("weight", "exp_avg")}


def write(run: Path, world: World, *steps: int, keep: int = 9, best: int | None = None) -> list[str]:
    """Saves a checkpoint of each step, one of them as the best; what was said meanwhile."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").touch()
    said: list[str] = []
    writer = CheckpointWriter(run, keep, None, world, 60, said.append)
    for step in steps:
        writer.save(step, tensors(step), {"world_size": 1, "strategy": "ddp", "step": step}, step == best)
    writer.wait()
    return said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SHARD = "rank-00000.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / SHARD, 100), "has 100 bytes instead of"),
    "flipped": (lambda f: flip(f / SHARD), "rank-00000.safetensors was changed: its sha256 differs"),
    "missing": (lambda f: (f / SHARD).unlink(), "rank-00000.safetensors is missing"),
    "longer": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + bytes(9)), "bytes instead of"),
    "stranger": (lambda f: shutil.copy(f / SHARD, f / "rank-00001.safetensors"), "does not belong to it"),
    "state": (lambda f: flip(f / STATE), "state.json was changed"),
    "no state": (lambda f: (f / STATE).unlink(), "state.json is missing"),
    "manifest": (lambda f: (f / COMPLETE).write_text("{"), "COMPLETE is not what was written"),
    "list": (lambda f: (f / COMPLETE).write_text("[]"), "COMPLETE is not what was written"),
    "later format": (lambda f: rewrite(f / COMPLETE, format=FORMAT_VERSION + 1), "this version reads"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, world: World, kind: str) -> None:
    run, said = tmp_path / "run", list[str]()
    assert write(run, world, 5, 10, 15) == []
    spoil, words = DAMAGES[kind]
    newest = checkpoint_folders(run)[0]
    assert (newest.name, damage(newest)) == ("step-000015", None)
    spoil(newest)
    assert words in (damage(newest) or "")
    assert newest_complete(run, said.append) == run / "checkpoints" / "step-000010"
    assert len(said) == 1
    assert said[0].startswith("WARNING step-000015 is damaged (")
    lines, is_good = verify_path(run)
    assert is_good
    assert any(line.startswith("step-000015: damaged: ") and words in line for line in lines)
    assert lines[-1] == "resuming would go on from step-000010"


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    write(run, world, 5, 10)
    (run / "checkpoints" / "step-000010" / COMPLETE).unlink()
    assert newest_complete(run, lambda _: pytest.fail("it is not there at all")) == run / "checkpoints" / "step-000005"
    lines, _ = verify_path(run)
    assert "step-000010: incomplete, never used" in lines
    assert verify_path(run / "checkpoints" / "step-000010") == (
        ["step-000010: damaged: COMPLETE is missing: it was never finished"],
        False,
    )
    with pytest.raises(UserError, match="neither a run"):
        verify_path(tmp_path)


def test_order_is_by_step_whatever_the_clock_said(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    write(run, world, 5, 10)
    future = time.time() + 10 * 365 * 86400
    for path in [checkpoint_folders(run)[1], *checkpoint_folders(run)[1].iterdir()]:
        os.utime(path, (future, future))
    assert newest_complete(run, print) == run / "checkpoints" / "step-000010"
    write(run, world, 15, keep=2)
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-000015", "step-000010"]


def test_hidden_files_of_a_file_system_do_no_harm(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    write(run, world, 5)
    (run / "checkpoints" / "step-000005" / ".nfs000000000a1b2c3d").touch()
    assert damage(run / "checkpoints" / "step-000005") is None


def test_nothing_in_it_is_a_pickle(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    write(run, world, 5)
    files = sorted((run / "checkpoints" / "step-000005").iterdir())
    assert [file.name for file in files] == ["COMPLETE", "rank-00000.safetensors", "state.json"]
    for file in (files[0], files[2]):
        json.loads(file.read_text(encoding="utf-8"))
    header = int.from_bytes(files[1].read_bytes()[:8], "little")
    assert set(json.loads(files[1].read_bytes()[8 : 8 + header])) == set(tensors(5))
    checkpoint = open_checkpoint(run / "checkpoints" / "step-000005")
    assert torch.equal(checkpoint.read("weight", "layer.weight"), torch.full((1000,), 5.0))


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    write(run, world, *range(1, 8), keep=2, best=3)
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-000007", "step-000006", "step-000003"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000003", "step-000006", "step-000007",
    ]  # fmt: skip


def test_damaged_ones_of_later_steps_go_once_a_good_one_is_there(tmp_path: Path, world: World) -> None:
    """The run went on from step 10; a damaged step 20 must not count among those that are kept."""
    run = tmp_path / "run"
    write(run, world, 10, 20)
    flip(run / "checkpoints" / "step-000020" / SHARD)
    write(run, world, 12, keep=2)
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-000012", "step-000010"]


def test_a_damaged_one_of_the_same_step_is_replaced_and_a_good_one_stays(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    write(run, world, 10)
    folder = run / "checkpoints" / "step-000010"
    inode = folder.stat().st_ino
    write(run, world, 10)
    assert folder.stat().st_ino == inode
    flip(folder / SHARD)
    write(run, world, 10)
    assert damage(folder) is None
    assert folder.stat().st_ino != inode


DEATHS = """
import os, shutil, sys
from pathlib import Path
import torch
from dist_finetune.checkpoint.write import CheckpointWriter
from dist_finetune.spec import LaunchSpec
from dist_finetune.summary import write_end
from dist_finetune.world import join_world

torch.set_num_threads(1)
template, folder = Path(sys.argv[1]), Path(sys.argv[2])
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir")
left, armed = 0, False

def die_at_the_last(event, args):
    global left
    if armed and event in EVENTS:
        left -= 1
        if left == 0:
            os._exit(9)

sys.addaudithook(die_at_the_last)
for moment in range(1, 1000):
    run = folder / f"{moment:03}"
    shutil.copytree(template, run)
    child = os.fork()
    if child == 0:
        left = moment
        world = join_world(LaunchSpec()).__enter__()  # its threads would not outlive a fork
        writer = CheckpointWriter(run, 1, None, world, 60, print)
        armed = True
        writer.save(20, {"weight:layer.weight@0": torch.full((1000,), 20.0)}, {"world_size": 1, "strategy": "ddp"})
        writer.wait(must_succeed=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(moment)
"""


@pytest.mark.slow
def test_death_at_every_moment_of_a_save_leaves_the_old_or_the_new_one(tmp_path: Path, world: World) -> None:
    """A process that is gone before the n-th file operation of a save, for every n: replacing a damaged one of the same
    step, and deleting the one before, are among them."""
    template = tmp_path / "template"
    write(template, world, 10, 20)
    flip(template / "checkpoints" / "step-000020" / SHARD)
    runs = tmp_path / "runs"
    runs.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DEATHS, str(template), str(runs)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_moments = int(done.stdout.split()[-1])
    assert num_moments > 15
    newest = []
    for run in sorted(runs.iterdir()):
        found = newest_complete(run, lambda _: None)
        assert found is not None, f"{run.name}: nothing is left"
        newest.append(int(found.name.removeprefix("step-")))
        assert torch.equal(
            open_checkpoint(found).read("weight", "layer.weight"), torch.full((1000,), float(newest[-1]))
        )
        write(run, world, 30, keep=1)  # the next start finds its way, and clears what was left
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000030"]
    assert newest == sorted(newest), "once the new one is there, it stays"
    assert set(newest) == {10, 20}


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory; skips where this user can't mount one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"needs root to mount a tmpfs: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path, world: World) -> None:
    with mounted(tmp_path / "small", "size=20m") as disk:
        run = disk / "run"
        write(run, world, 5)
        said: list[str] = []
        writer = CheckpointWriter(run, 1, 5, world, 60, said.append)
        writer.save(10, tensors(10, 2_000_000), {}, best=True)
        assert writer.protected() == 5, "the best that was saved stays"
        assert "MiB free, a checkpoint needs 31 MiB" in said[0]
        assert "checkpoints before it are untouched" in said[0]
        with pytest.raises(TrainingError, match="MiB free"):
            writer.wait(must_succeed=True)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"]
        assert damage(run / "checkpoints" / "step-000005") is None


def test_a_disk_that_fills_up_in_the_middle_of_a_save(tmp_path: Path, world: World) -> None:
    """No more files can be made, at ever later moments of a save, until there is just enough room."""
    failed, num_files = 0, 7  # the tmpfs itself, the run, its config, checkpoints/, step-000005/ and 3 files, less one
    for num_more in range(1, 12):
        with mounted(tmp_path / str(num_more), f"size=100m,nr_inodes={num_files + num_more}") as disk:
            run = disk / "run"
            if write(run, world, 5):
                continue  # not even the first
            said = write(run, world, 10, keep=1)
            newest = newest_complete(run, lambda _: pytest.fail("nothing half-done may bear a checkpoint's name"))
            assert newest == run / "checkpoints" / ("step-000005" if said else "step-000010")
            failed += bool(said)
            assert all("No space left on device" in line for line in said)
            assert [path.name for path in (run / "checkpoints").iterdir()] == [newest.name]
    assert failed >= 3


def test_a_read_only_run_folder(tmp_path: Path, world: World) -> None:
    with mounted(tmp_path / "disk", "size=100m") as disk:
        run = disk / "run"
        write(run, world, 5)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
        assert damage(run / "checkpoints" / "step-000005") is None
        said: list[str] = []
        writer = CheckpointWriter(run, 1, None, world, 60, said.append)
        writer.save(10, tensors(10), {})
        assert "can't be written: Read-only file system" in said[0]


@pytest.mark.parametrize(("number", "is_saved"), [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, number: int, is_saved: bool
) -> None:
    sync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    said = write(tmp_path / "run", world, 5)
    assert (said == []) == is_saved
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == (["step-000005"] if is_saved else [])


def test_the_second_save_waits_for_the_first(tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    run.mkdir()
    writer = CheckpointWriter(run, 9, None, world, 60, lambda _: None)
    big = tensors(1, 30_000_000)
    began = time.monotonic()
    writer.save(1, big, {})
    pause_s = time.monotonic() - began
    assert not (run / "checkpoints" / folder_name(1)).exists(), "it is being written beside the training"
    writer.save(2, tensors(2), {})
    waited_s = time.monotonic() - began
    assert damage(run / "checkpoints" / folder_name(1)) is None
    writer.wait(must_succeed=True)
    assert damage(run / "checkpoints" / folder_name(2)) is None
    assert pause_s < waited_s / 3


def test_replicas_share_the_writing_evenly() -> None:
    sizes = [5, 100, 30, 30, 40, 1, 1]
    shares = [snapshot_share(sizes, rank, 3) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(7))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) == 100
    assert min(loads) >= 46


def test_pieces_of_any_cut_make_one_tensor(tmp_path: Path) -> None:
    """What four ranks wrote, with pieces out of order, is read as one flat tensor."""
    whole = torch.arange(100, dtype=torch.float32)
    cuts = [(0, 37), (37, 38), (38, 90), (90, 100)]
    files = {}
    for rank, (start, stop) in enumerate(reversed(cuts)):
        save_file({f"weight:a.b@{start}": whole[start:stop].clone()}, tmp_path / f"rank-{rank:05d}.safetensors")
        files[f"rank-{rank:05d}.safetensors"] = {}
    (tmp_path / STATE).write_text("{}")
    (tmp_path / COMPLETE).write_text(json.dumps({"files": {**files, STATE: {}}}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names("weight") == ["a.b"]
    assert torch.equal(checkpoint.read("weight", "a.b"), whole)


def test_a_full_disk_does_not_hide_what_ended_a_run(tmp_path: Path, world: World) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / f".summary.json.{socket.gethostname()}.{os.getpid()}").mkdir()  # so that writing fails
    write_end(tmp_path, TrainingError("checkpoint not saved: no space"), world)
    assert not (tmp_path / "summary.json").exists()


def test_ranks_of_two_containers_write_a_summary_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may be process 7, each in its own."""
    path, to_disk = tmp_path / "summary.json", os.fsync
    monkeypatch.setattr(socket, "gethostname", lambda: "node0")

    def write_on_node1(descriptor: int) -> None:
        to_disk(descriptor)
        if socket.gethostname() == "node0":
            monkeypatch.setattr(socket, "gethostname", lambda: "node1")
            write_text(path, "of node 1, which is longer")

    monkeypatch.setattr(os, "fsync", write_on_node1)
    write_text(path, "of node 0")
    assert path.read_text() == "of node 0"
    assert list(tmp_path.iterdir()) == [path]


def test_no_rank_marks_a_run_that_another_job_has_taken_over(tmp_path: Path, world: World) -> None:
    """The first rank finds out and tells the others, which see no hold of their own."""
    spec = load_spec(
        {"model": {"name": "demo:minilm"}, "data": {"train": "x.csv"}, "output": str(tmp_path), "name": "a"}
    )
    run, second = tmp_path / "a", replace(world, rank=1, world_size=2)

    def fail(error: TrainingError) -> None:
        report = Reporter(is_first=False)
        with in_run_folder(spec, False, "none", second, report, ""):
            run.mkdir(exist_ok=True)
            (run / "plan.json").write_text("{}")
            report.open_files(run)
            raise error

    for error, marked in ((LostHold("another job"), False), (TrainingError("its own fault"), True)):
        with pytest.raises(TrainingError, match=str(error)):
            fail(error)
        assert (run / "summary.json").exists() is marked
