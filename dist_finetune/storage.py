"""Keeps a run folder in storage that outlives the machine: `python -m dist_finetune.storage URL FOLDER -- COMMAND ...`.

The storage is first tried with a small object. What it holds comes next, then the command runs, and what it writes goes
out while it runs and once more at its end. URL is any that fsspec reads, such as s3://bucket/runs/name; its own package
(s3fs, gcsfs) must be there.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dist_finetune.errors import UserError

PUSH_EVERY_S = 30.0
MANIFEST = "COMPLETE"  # written last into a checkpoint, and so sent last
CHECKPOINTS = "checkpoints"
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def pull(url: str, folder: Path, sent: dict[str, tuple[int, int]] | None = None) -> int:
    """Copies the files of `url` that `folder` lacks or has older, and returns their number. Checkpoints without
    manifest stay out. Notes them in `sent`: the storage has them.

    Raises UserError where the storage can't be read.
    """
    files, root = _open(url)
    with _worded(url):
        found = _remote_sizes(files, root)
        complete = {name.rpartition("/")[0] for name in found if name.endswith(f"/{MANIFEST}")}
        missing = [
            name
            for name, size in found.items()
            if _wanted(name, complete) and not _is_as_good(folder / name, size, files, f"{root}/{name}")
        ]
        for name in sorted(missing, key=_manifest_last):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            part = (folder / name).with_name(f".{Path(name).name}.part")  # half of one would look new
            files.get_file(f"{root}/{name}", str(part))
            part.replace(folder / name)
            state = _state(folder / name)
            if sent is not None and state:
                sent[name] = state
    return len(missing)


def push(url: str, folder: Path, sent: dict[str, tuple[int, int]]) -> int:
    """Copies files of `folder` that changed since they were `sent`, and returns how many; removes old checkpoints.

    A checkpoint goes out once it is complete, its manifest last: storage never holds half a one that looks whole.
    """
    files, root = _open(url)
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    # hidden are files that are being written, and checkpoints that are, or are being deleted
    present = {str(name): p for name, p in found.items() if not any(part.startswith(".") for part in name.parts)}
    complete = {name.rpartition("/")[0] for name in present if name.endswith(f"/{MANIFEST}")}
    count = 0
    with _worded(url):
        for name in sorted((n for n in present if _wanted(n, complete)), key=_manifest_last):
            state = _state(present[name])
            if state is None or sent.get(name) == state:
                continue
            try:
                files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                files.put_file(str(present[name]), f"{root}/{name}")
            except FileNotFoundError:
                if present[name].exists():  # so it is the storage that is not there
                    raise
                continue
            sent[name] = state
            count += 1
        stored = {_checkpoint(name) for name in _remote_sizes(files, root)} - {None}
        for checkpoint in stored - {_checkpoint(name) for name in present}:
            files.rm(f"{root}/{checkpoint}", recursive=True)
    return count


def _is_as_good(here: Path, size: int, files: Any, there: str) -> bool:
    """Whether the file that is here is the one of the storage, or was written after that: on a disk that outlived its
    machine's restart, by what had not gone out yet."""
    state = _state(here)
    if state is None or state[0] == size:
        return state is not None
    try:
        return state[1] > files.modified(there).timestamp() * 1e9
    except NotImplementedError:  # not every storage tells
        return False


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of a file; None for one of a checkpoint that was rotated away meanwhile."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def probe(url: str) -> None:
    """Writes and removes a small object. Raises UserError where that fails: a run must not find out at its end."""
    files, root = _open(url)
    name = f"{root}/.dist-finetune-{uuid.uuid4().hex}"
    try:
        files.makedirs(root, exist_ok=True)
        files.pipe_file(name, b"dist-finetune")
        files.rm_file(name)
    except Exception as error:  # each storage has errors of its own
        raise UserError(
            f"{url} can't be written: {type(error).__name__}: {error}. Nothing was started, as its result would be "
            "lost. Check the URL, the login of this machine, and its right to write and delete there"
        ) from None


def _open(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}. Install the package that fsspec names, or use another storage") from None
    return files, root.rstrip("/")


@contextlib.contextmanager
def _worded(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{url}: {error}. Check its name, and the login of this machine") from None


def _remote_sizes(files: Any, root: str) -> dict[str, int]:
    if not files.exists(root):
        return {}
    found = files.find(root, detail=True)
    return {path.removeprefix(root).lstrip("/"): entry["size"] for path, entry in found.items()}


def _wanted(name: str, complete: set[str]) -> bool:
    checkpoint = _checkpoint(name)
    return checkpoint is None or checkpoint in complete


def _checkpoint(name: str) -> str | None:
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == CHECKPOINTS and len(parts) > 2 else None


def _manifest_last(name: str) -> tuple[bool, str]:
    return name.endswith(f"/{MANIFEST}"), name


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Its exit code. Looks up now and then: a signal that comes just before a wait begins, or to another thread, is
    handled only when the wait ends."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1.0)


def keep(url: str, folder: Path, command: Sequence[str], push_every_s: float = PUSH_EVERY_S) -> int:
    """Runs `command` between a pull and a last push, with pushes meanwhile; returns its exit code. Signals go to it.

    Raises UserError, before `command` starts, where the storage can't be written, and for `--fresh`: what that keeps
    aside here would go from the storage.
    """
    if "--fresh" in command:
        raise UserError(
            f"--fresh would remove the checkpoints of the run that {url} may hold, and start over where a machine is "
            "replaced: leave it out, and use another URL and name=... for a new run"
        )
    probe(url)
    sent: dict[str, tuple[int, int]] = {}
    pull(url, folder, sent)
    folder.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(push_every_s):
            try:
                push(url, folder, sent)
            except Exception as error:  # a storage that is away for a while must end neither training nor this thread
                print(f"warning: {error}", file=sys.stderr, flush=True)

    child = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        code = _wait(child)
    finally:
        ended.set()
        follower.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    push(url, folder, sent)
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) < 4 or arguments[2] != "--":
        print("usage: python -m dist_finetune.storage URL FOLDER -- COMMAND ...", file=sys.stderr)
        return 2
    try:
        return keep(arguments[0], Path(arguments[1]), arguments[3:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
