"""What a worker finds at each strategy, in one process group: WORKER CONFIG RESULTS.json STRATEGY..."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_finetune.cli import leave_at_once
from dist_finetune.spec_file import load_spec
from dist_finetune.world import World, join_world


def write_found(look: Callable[[str, str, World], Any]) -> None:
    """Writes what `look(config, strategy, world)` returns for each strategy to RESULTS.json.RANK, and ends the rank."""
    config, results, *strategies = sys.argv[1:]
    with join_world(load_spec(config, []).launch) as world:
        found = {strategy: look(config, strategy, world) for strategy in strategies}
        Path(f"{results}.{world.rank}").write_text(json.dumps(found), encoding="utf-8")
    leave_at_once(0)
