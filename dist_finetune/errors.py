"""The errors a user can meet, and the exit code each ends the process with.

Every message says what is wrong, where, what to do, and the nearest valid name.
"""

import difflib
from collections.abc import Iterable


class DistFinetuneError(Exception):
    """Base of every error whose message is written for the user; carries the process exit code."""

    exit_code = 1


class UserError(DistFinetuneError):
    """The user's input (config, data, command line, environment) is wrong. Exit code 2, without a traceback."""

    exit_code = 2


class PlanError(DistFinetuneError):
    """The input is valid, but the plan says that the run cannot work, such as not enough memory. Exit code 1."""


class TrainingError(DistFinetuneError):
    """Training broke a promise: a frozen tensor moved, a loss is not finite, ranks disagree. Exit code 1."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` valid names that look most like `name` in any case of letters, best first."""
    names: dict[str, list[str]] = {}
    for valid_name in map(str, valid):
        names.setdefault(valid_name.lower(), []).append(valid_name)
    close = difflib.get_close_matches(str(name).lower(), names, n=count, cutoff=0.5)
    return [valid_name for lower in close for valid_name in names[lower]][:count]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence that offers the nearest valid names, or lists the valid ones when none is near."""
    valid = [str(v) for v in valid]
    close = nearest(name, valid)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    shown = ", ".join(valid[:20])
    return f"Valid: {shown}{', ...' if len(valid) > 20 else ''}." if valid else ""
