"""What a run and the job script that started it tell each other.

The run says in a word how it ends, as torchrun turns every exit code into 1. The script says why the job starts again.

Only what stopped with its checkpoint saved may be queued again; what failed would fail again, for hours.
"""

import contextlib
import os
from pathlib import Path
from typing import Literal

VARIABLE = "DIST_FINETUNE_VERDICT"  # names the file; set by a job script
AFTER = "DIST_FINETUNE_AFTER"


def tell_job_script(word: Literal["running", "stopped", "failed"]) -> None:
    """Called by the first rank. A file without "stopped" means failure, also where a full disk leaves it empty."""
    path = os.environ.get(VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{word}\n", encoding="utf-8")


def why_again() -> str | None:
    """Why the attempt before this one ended, such as "the time limit" or "PREEMPTION"; None in a first one."""
    return os.environ.get(AFTER) or None
