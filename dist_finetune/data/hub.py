"""A data set of the Hugging Face hub: from the hub, or from its cache where there is no internet."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import huggingface_hub
from datasets import DatasetDict
from datasets.exceptions import DatasetsError

from dist_finetune.errors import UserError, nearest

PROBE_TIMEOUT_S = 5.0
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def load_from_hub(hub_id: str, config: str | None, key: str) -> DatasetDict:
    """All splits of a hub data set. Raises UserError that says how to bring it when it can't be had."""
    offline = _is_out_of_reach()
    try:
        with _quiet(offline):
            return datasets.load_dataset(hub_id, config)
    except ValueError as error:
        # Raised for a config that is missing or unknown; the message lists the valid ones.
        raise UserError(f"{key}: {hub_id}: {_first_lines(error)}. A config is written {hub_id}:CONFIG") from None
    except (OSError, RuntimeError, DatasetsError) as error:
        reason = "the hub can't be reached and the data is not in its cache" if offline else _first_lines(error)
        near = nearest(hub_id, ["builtin", *(path.name for path in Path.cwd().iterdir())])
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"{key}: {hub_id}: neither a file or folder here, nor to be had from the hub: {reason}.{meant}\n"
            "To bring it: run `dist-finetune prepare CONFIG` on a machine with internet and the same HF_HOME (now "
            f"{os.environ.get('HF_HOME', '~/.cache/huggingface')}), or save it there with "
            f"datasets.load_dataset({hub_id!r}).save_to_disk(FOLDER), copy the folder and write {key}: FOLDER"
        ) from None


def _is_out_of_reach() -> bool:
    """Whether the hub is switched off or doesn't answer: its client alone would retry for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in PROXY_VARIABLES):
        return False  # behind a proxy a direct connection says nothing
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=PROBE_TIMEOUT_S):
            return False
    except OSError:
        return True


@contextmanager
def _quiet(offline: bool) -> Iterator[None]:
    """No progress bars, and no attempts at a hub that doesn't answer; both as before afterwards."""
    had_bars = not datasets.utils.are_progress_bars_disabled()
    was_offline = huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_OFFLINE = was_offline or offline
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = was_offline
        if had_bars:
            datasets.enable_progress_bars()


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400].rstrip(".")
