"""`--sweep key=a,b`: every combination of the values as overrides, and a folder name for each."""

import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_finetune.errors import UserError

MAX_TRIALS = 1000


@dataclass(frozen=True)
class Trial:
    name: str
    """Names the trial's folder: its number, and the values it has, as far as they fit."""
    overrides: tuple[str, ...]


def sweep_trials(sweeps: Sequence[str]) -> tuple[Trial, ...]:
    """One trial for each combination; the last key varies fastest. No sweep gives none.

    A value with a comma stands in double quotes: `freeze.layers=0-3,"1,2,3"`. Raises UserError.
    """
    if not sweeps:
        return ()
    keys, columns = zip(*(_parse(sweep) for sweep in sweeps), strict=True)
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"--sweep {twice[0]}=... is given twice; write all its values in one, with commas")
    combinations = list(itertools.product(*columns))
    if len(combinations) > MAX_TRIALS:
        raise UserError(f"--sweep makes {len(combinations)} runs, more than {MAX_TRIALS}; leave values out")
    return tuple(
        Trial(_name(number, keys, values), tuple(f"{k}={v}" for k, v in zip(keys, values, strict=True)))
        for number, values in enumerate(combinations)
    )


def _parse(sweep: str) -> tuple[str, list[str]]:
    key, equals, text = sweep.partition("=")
    # in one line: csv takes a line break between values for a mistake
    rows = csv.reader([" ".join(text.splitlines())], skipinitialspace=True)
    values = [value.strip() for value in next(rows, [])]
    if not equals or not key or not values or not all(values):
        raise UserError(f"--sweep {sweep}: write key=value,value such as train.lr=1e-5,3e-5")
    if key in ("name", "output"):
        raise UserError(f"--sweep {sweep}: {key} can't be swept; each run of a sweep has a folder of its own already")
    if key.startswith(("launch.slurm", "launch.cloud")):
        raise UserError(f"--sweep {sweep}: {key} can't be swept; all runs of a sweep are one job with one value")
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise UserError(f"--sweep {sweep}: {twice[0]} is given twice, which would train the same run twice")
    return key, values


def _name(number: int, keys: Sequence[str], values: Sequence[str]) -> str:
    shown = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True))
    return f"{number:03}-{re.sub(r'[^A-Za-z0-9=,._+-]', '_', shown)}"[:80]
