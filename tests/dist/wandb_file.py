"""What W&B's own client wrote about a run, read back from its files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: protobuf messages in LevelDB's log format, in pieces with crc, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little is left in the block for a piece's header
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def run_ids(folder: Path) -> list[str]:
    """The W&B run that each file in a run folder belongs to: one file for each start."""
    return [record.run.run_id for path in folder.rglob("*.wandb") for record in records(path) if record.HasField("run")]
