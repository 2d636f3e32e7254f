"""Lengths of time and sizes as people write them: "30 min", "90s", "1.5 h", "100GiB"."""

import math
import re
from typing import Any

SECONDS_PER_UNIT = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}
LONGEST_S = 100 * 365 * 86400  # timers that count nanoseconds in 64 bits overflow at 292 years


def parse_duration_s(value: Any) -> Any:
    """Seconds of a duration such as "30 min"; a plain number is seconds. Raises ValueError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value <= 0:
            raise ValueError(f"a duration must be above 0, not {value}")
        if value > LONGEST_S:
            raise ValueError(f"a duration must be at most {LONGEST_S:,} s (100 years), not {value}")
        return float(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*?)s?\s*", str(value).lower())
    if not found or (found[2] or "s") not in SECONDS_PER_UNIT or float(found[1]) <= 0:
        raise ValueError(f'{value!r} is no duration; write a number and s, min, h or day, such as "30 min"')
    return parse_duration_s(float(found[1]) * SECONDS_PER_UNIT[found[2] or "s"])


BINARY_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
BYTES_PER_UNIT = {"b": 1, "mb": 10**6, "gb": 10**9, "tb": 10**12} | BINARY_UNITS


def parse_bytes(value: Any) -> Any:
    """Bytes of a size such as "80GiB"; a plain number is bytes. Raises ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(value).lower())
    unit = BYTES_PER_UNIT.get(found[2]) if found else None
    size = float(found[1]) * unit if found and unit else 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"{value!r} is no size; write a number and MiB, GiB, MB or GB, such as 80GiB")
    return int(size)


def parse_interval(value: Any) -> tuple[float, str]:
    """`(200, "steps")` of "200 steps", `(1, "epochs")` of "1 epoch", `(1800, "s")` of "30 min"."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = value[0] if value[1] == "s" else f"{value[0]} {value[1]}"  # as a written-out config holds it
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(step|epoch)s?\s*", str(value).lower())
    if not found:
        return float(parse_duration_s(value)), "s"
    number = float(found[1])
    if number <= 0 or (found[2] == "step" and not number.is_integer()):
        raise ValueError(f'{value!r} is no interval; write a whole number of steps, such as "200 steps"')
    return number, f"{found[2]}s"
