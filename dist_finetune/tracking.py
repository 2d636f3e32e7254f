"""The one file that talks to Weights & Biases: one run per job, made by one process, never in the way of training."""

import json
import logging
import os
import secrets
import shlex
import threading
from pathlib import Path
from typing import Any, Literal

from dist_finetune.errors import UserError
from dist_finetune.run_folder import write_json
from dist_finetune.spec import TrackSpec

INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60
ID_FILE = "wandb.json"  # keeps the run's id in the run folder, so that a restarted job goes on in the same run

logger = logging.getLogger(__name__)

is_stuck = False
"""True once a run was left unfinished: the client would wait for it again, without end, where the process ends."""


class WandbRun:
    """A W&B run that ends within a deadline; every failure after the start is a warning, never an error."""

    def __init__(self, run: Any, mode: str) -> None:
        self._run, self.mode = run, mode
        self.url: str | None = run.url if mode == "online" else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics at optimizer step `step`."""
        try:
            self._run.log({**metrics, "step": step}, step=step)
        except Exception as error:  # the client's own failure, of whatever kind, must not end training
            logger.warning("W&B: %s", error)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Uploads what is left, for at most FINISH_TIMEOUT_S seconds; the files stay for `wandb sync` otherwise."""

        def close() -> None:
            try:
                self._run.summary.update(summary)
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                logger.warning("W&B: %s", error or type(error).__name__)

        global is_stuck
        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT_S)
        if thread.is_alive():
            is_stuck = True
            folder = shlex.quote(str(Path(self._run.dir).parent))
            logger.warning(
                "W&B: not finished after %s s; upload the rest with: wandb sync %s", FINISH_TIMEOUT_S, folder
            )


def require_login(track: TrackSpec) -> None:
    """Raises UserError for `wandb: online` without a login."""
    if track.wandb == "online" and not has_login():
        raise UserError("track.wandb: online needs a login: run `wandb login`, or set WANDB_API_KEY; or use offline")


def has_login() -> bool:
    """Whether there is a key. The server is not asked: a compute node may have no way to it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    wandb = _wandb()
    settings = wandb.setup().settings
    before, settings.mode = settings.mode, "online"  # where WANDB_MODE is offline, it looks for no key
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error:  # what is there is no key
        return False
    finally:
        settings.mode = before


def _wandb() -> Any:
    """The client, which says nothing by itself."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def start_wandb(track: TrackSpec, folder: Path, name: str, config: dict[str, Any]) -> WandbRun | None:
    """The W&B run of a run folder: the same id at every start; offline where not logged in. None for `wandb: off`, and
    for `auto` where WANDB_MODE is disabled."""
    wanted = os.environ.get("WANDB_MODE") if track.wandb == "auto" else track.wandb
    if wanted in ("off", "disabled"):
        return None
    wandb = _wandb()
    is_online = wanted != "offline" and has_login()
    mode: Literal["online", "offline"] = "online" if is_online else "offline"
    saved = folder / ID_FILE
    if not saved.exists():
        write_json(saved, {"id": secrets.token_hex(4)})
    run_id = json.loads(saved.read_text(encoding="utf-8"))["id"]
    common: dict[str, Any] = {
        "project": track.project,
        "entity": track.entity,
        "name": name,
        "id": run_id,
        "resume": "allow",
        "dir": str(folder),
        "config": config,
    }
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off")
    try:
        return WandbRun(wandb.init(mode=mode, settings=settings, **common), mode)
    except Exception as error:  # no server, no network, a refused key: the run itself must go on
        logger.warning("W&B: %s; going on offline", error)
        wandb.teardown()  # its process keeps the id of the run that failed
        return WandbRun(wandb.init(mode="offline", settings=settings, **common), "offline")
