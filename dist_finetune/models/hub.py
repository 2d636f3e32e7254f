"""Files that may have to come over the network: one quick look whether it can be reached, then the local cache."""

import functools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dist_finetune.errors import UserError
from dist_finetune.models.suggest import suggestions
from dist_finetune.models.weights import first_line

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHT_FILES = ["model*.safetensors", "pytorch_model*.bin"]
REACH_TIMEOUT_S = 5.0
# What breaks a download: the base of HfHubHTTPError is that of all errors of the hub's HTTP client, httpx or httpx2,
# and hf_xet, which moves large files, raises RuntimeError.
TRANSFER_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError, RuntimeError)
TIMM_HUB = "hf-hub:"  # before the id of a hub repository in timm's format


@functools.cache
def is_reachable(url: str) -> bool:
    """True when any HTTP answer comes from `url` within five seconds; proxies from the environment are used.

    The clients' own retries take most of a minute on a machine without internet, for each file.
    """
    answered: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_TIMEOUT_S).close()
            answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)
        except (OSError, ValueError):
            pass

    # A thread, because name resolution has no timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_TIMEOUT_S)
    return bool(answered)


def is_hub_reachable() -> bool:
    """False when the environment asks for offline work or the hub does not answer."""
    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in {
        "1",
        "ON",
        "YES",
        "TRUE",
    }
    return not offline and is_reachable(constants.ENDPOINT)


def hub_folder(repo: str, revision: str | None, patterns: list[str], weights: bool = False) -> Path:
    """The local folder that holds `repo`'s files matching `patterns`, fetched where the hub can be reached.

    With `weights`, also its safetensors file(s), or the older .bin where it has no other. Raises UserError that
    says how to bring the model to a machine without internet.
    """
    online = is_hub_reachable()
    try:
        folder = _snapshot(repo, revision, patterns, online)
        for pattern in WEIGHT_FILES if weights else ():
            # Asked for even where the cache holds some: an earlier download may have stopped between two files.
            folder = _snapshot(repo, revision, [*patterns, pattern], online)
            if has_weights(folder):
                break
    except LocalEntryNotFoundError:
        raise UserError(_how_to_bring(repo, online)) from None
    except GatedRepoError:
        raise UserError(
            f"model.name {repo}: its owner must grant you access; ask on its page, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"model.revision {revision}: {repo} has no such branch, tag or commit") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"model.name {repo}: the Hugging Face hub has no such model. {suggestions(repo)}") from None
    except TRANSFER_ERRORS as error:
        raise UserError(f"model.name {repo}: can't be fetched: {first_line(error)}") from None
    if not any(folder.iterdir()) or (weights and not online and not has_weights(folder)):
        raise UserError(_how_to_bring(repo, online))
    return folder


def hub_file(repo: str, names: Sequence[str], what: str) -> Path:
    """The first of `names` that the hub repository has. Raises UserError saying how to bring it."""
    online = is_hub_reachable()
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, local_files_only=not online))
        except (LocalEntryNotFoundError, EntryNotFoundError):
            continue
        except TRANSFER_ERRORS as error:
            raise UserError(f"{what}: {repo} can't be fetched: {first_line(error)}") from None
    why = "" if online else f", and {constants.ENDPOINT} can't be reached (or offline mode is set)"
    raise UserError(
        f"{what}: its weights ({names[0]} of {repo}) are not in the Hugging Face cache "
        f"{constants.HF_HUB_CACHE}{why}. Where there is internet run `dist-finetune prepare CONFIG` with HF_HOME on a "
        f"disk that this machine sees, and set it here too; or run\n"
        f"  huggingface-cli download {repo} {names[0]} --local-dir .   (or `hf download`)\n"
        f"copy the file here and write its path as model.weights."
    )


def _snapshot(repo: str, revision: str | None, patterns: list[str], online: bool) -> Path:
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=not online))


def has_weights(folder: Path) -> bool:
    """Whether `folder` itself holds a file of weights."""
    return any(next(folder.glob(pattern), None) is not None for pattern in WEIGHT_FILES)


def commit_of(folder: Path) -> str | None:
    """The hub commit, where `folder` lies in the hub's cache (.../snapshots/COMMIT)."""
    return folder.name if folder.parent.name == "snapshots" else None


def fetch_url(url: str, what: str) -> Path:
    """The file behind `url` in torch's own cache, downloaded where needed and checked by the hash in its name."""
    name = Path(urlsplit(url).path).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if cached.is_file():
        return cached
    how = f"Download {url} on a machine with internet and copy it to {cached}, or point model.weights at the file."
    if not is_reachable(f"https://{urlsplit(url).netloc}"):
        raise UserError(f"{what}: its weights are not in the cache, and {urlsplit(url).netloc} can't be reached. {how}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    match = torch.hub.HASH_REGEX.search(name)
    try:
        torch.hub.download_url_to_file(url, str(cached), match.group(1) if match else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{what}: its weights can't be downloaded: {error}. {how}") from None
    return cached


def _how_to_bring(repo: str, online: bool) -> str:
    why = "" if online else f", and {constants.ENDPOINT} can't be reached (or offline mode is set)"
    return (
        f"model.name {repo}: not a local folder, not (completely) in the Hugging Face cache "
        f"{constants.HF_HUB_CACHE}{why}. Where there is internet run `dist-finetune prepare CONFIG` with HF_HOME on a "
        f"disk that this machine sees, and set it here too; or run\n"
        f"  huggingface-cli download {repo} --local-dir {repo.split('/')[-1]}   (or `hf download`)\n"
        f"copy that folder here and write its path as model.name. {suggestions(repo, otherwise='')}".rstrip()
    )
