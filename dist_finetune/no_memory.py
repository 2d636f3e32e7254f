"""Lack of memory told in words: torch says what it could not get, but neither on which rank nor what to do about it."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from dist_finetune.errors import TrainingError
from dist_finetune.run_folder import resume_command
from dist_finetune.world import World

WORDS = (
    "out of memory",
    "can't allocate memory",
    "could not create a memory object",
    "status_alloc_failed",  # of cuBLAS or cuDNN
    "unable to find an engine",  # cuDNN, where no convolution's workspace fits
)
FEWER_ROWS = "Use a smaller train.eval_batch_size: so many rows are run at once"
"""What to do where features are extracted."""
SENTENCES = 2  # of torch's: what was asked for and what is free; advice on its allocator follows


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's, or of Python's own, says that a GPU or this machine has no memory left."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in WORDS)


def needs_less(run: Path) -> str:
    """What to do where training finds no memory."""
    return (
        "Use a smaller train.micro_batch_size or train.eval_batch_size, train.gradient_checkpointing=true, or another "
        "shard.strategy; `dist-finetune plan CONFIG` shows what each needs. A run that has begun goes on with, for "
        f"example: {resume_command(run)} train.micro_batch_size=1"
    )


@contextlib.contextmanager
def lack_of_memory_told(world: World, todo: str) -> Iterator[None]:
    """Raises TrainingError, which names the rank and says what `todo`, in place of torch's error for lack of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        what = ". ".join(" ".join(str(error).split()).split(". ")[:SENTENCES]).rstrip(".") or type(error).__name__
        where = "the GPU" if world.device.type == "cuda" else "the machine"
        raise TrainingError(
            f"rank {world.rank} on {socket.gethostname()}: {where} has no memory left: {what}. {todo}"
        ) from error
