"""What a run reads from elsewhere: fetched where there is internet, and proved to be enough where there is none.

Large data sets are tokenised too, once for all runs; smaller ones take a run less than a second at its start.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from dist_finetune.cache.entries import cache_root
from dist_finetune.cache.tokens import TokenStore, is_large
from dist_finetune.data.arrow import column_values
from dist_finetune.data.encode import encode_splits
from dist_finetune.data.sources import expand, hub_parts
from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.errors import UserError
from dist_finetune.features.bare import without_training
from dist_finetune.home import expand_home
from dist_finetune.models.card import ModelCard
from dist_finetune.models.custom_model import custom_tokenizer_location
from dist_finetune.models.demo import EFFICIENTNET
from dist_finetune.models.fetch import count_tensors, weight_files
from dist_finetune.models.hub import TIMM_HUB
from dist_finetune.models.saved import saved_folder
from dist_finetune.models.sources import build_model, describe_model, for_task, load_tokenizer
from dist_finetune.models.transformers_config import source_folder
from dist_finetune.plan import plan_run
from dist_finetune.spec import DataSpec, Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.tasks.names import outputs_in_words
from dist_finetune.topology import Topology

NETWORK_EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Item:
    """One thing that a run reads: what it is, what was found in it, and its files."""

    about: str
    text: str
    files: tuple[Path, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def prepare(config: str, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Fetches what the run of `config` reads, and proves in a process without network that all of it is there.

    What is there already is not fetched again. Raises UserError for what can't be had.
    """
    spec = load_spec(config, overrides)
    remote = remote_names(spec)
    say(f"fetching {', '.join(remote)}" if remote else "nothing is to be fetched: the run reads only what is here")
    if remote:
        find_all(spec)
    command = [sys.executable, "-m", "dist_finetune", "prepare", config, *overrides, "--check"]
    done = subprocess.run(command, env={**os.environ, **OFFLINE}, check=False)
    if done.returncode != 0:
        raise UserError("a run without network would not find everything; the message above says what is missing")
    if remote:
        _say_next(spec, say)


def check(config: str, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Says what a run of `config` reads, where that lies and how large it is, without any network.

    The environment must ask for offline work (`OFFLINE`) since before the first import. Raises UserError for what is
    not there.
    """
    forbid_network()
    items = find_all(load_spec(config, overrides))
    for item in items:
        place = f", {place_of(item.files)}" if item.files else ""
        size = f", {item.num_bytes / 2**20:,.1f} MiB" if item.files else ""
        say(f"{item.about:<11}{item.text}{size}{place}")
    total = sum(path.stat().st_size for path in {path.resolve() for item in items for path in item.files})
    say(f"{'total':<11}{total:,} bytes ({total / 2**20:,.1f} MiB)")
    for name, place in places().items():
        say(f"{name:<11}{place}")
    say(f"{'offline':<11}ok: config, {'tokenizer, ' if _has(items, 'tokenizer') else ''}weights and data were read "
        "without network")  # fmt: skip


def find_all(spec: Spec) -> list[Item]:
    """Model, weights, tokenizer and data of a run, each opened as the run does, weights by their headers only.

    Fetches what is missing where the environment and the network let it. Raises UserError otherwise.
    """
    card = describe_model(spec.model, spec.data.image_size)
    items = [Item("model", f"{card.name} ({card.source})", tuple(_model_files(card)))]
    files = weight_files(card, spec.model)
    if files:
        num_tensors = sum(count_tensors(path) for path in files)
        items.append(Item("weights", f"{num_tensors:,} tensors in {files[0].name}{_more(files)}", tuple(files)))
    else:
        items.append(Item("weights", "none are read"))
    tables = read_tables(spec.data, spec.train.seed, task=spec.label_task)
    # A function of the user's may fetch weights of its own as it builds; all others build without memory.
    with torch.device("cpu" if card.source == "custom" else "meta"):
        card = for_task(card, tables.task)
        build_model(card, spec.model, tables.classes)
    if card.modality == "text" and tables.modality == "text":
        tokenizer = load_tokenizer(card)
        are_words = tables.task == "token-classification"
        first = column_values(tables.train, "words" if are_words else "text")[0]
        num_tokens = len(tokenizer(first, is_split_into_words=are_words)["input_ids"])
        items.append(Item("tokenizer", f"{len(tokenizer):,} tokens; the first row has {num_tokens}"))
        if is_large(tables):
            items.append(_tokens_item(spec, tables, tokenizer))
    return [*items, _data_item(spec.data, tables)]


def _tokens_item(spec: Spec, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> Item:
    # nothing else of the run is planned, since this machine need not be able to do it
    store = TokenStore(plan_run(without_training(spec, 1), Topology(), tables), tokenizer)
    encoded = encode_splits(store.plan, tables, tokenizer, store.rows)
    num_tokens = sum(int(rows.lengths.sum()) for rows in encoded.values() if rows.lengths is not None)
    files = sorted(cache_root(spec).glob("tokens-*/*.npy"))
    return Item("tokens", f"{num_tokens:,} of all rows, encoded for all runs", tuple(files))


def remote_names(spec: Spec) -> list[str]:
    """What of a config comes over a network, by name."""
    card = describe_model(spec.model, spec.data.image_size)
    names = [spec.model.name] if _is_remote(card, spec) else []
    if card.source == "custom" and card.modality == "text":
        location = custom_tokenizer_location(card)
        names += [] if expand_home(location).is_dir() else [location]
    return list(dict.fromkeys([*names, *_hub_data(spec.data)]))


def forbid_network() -> None:
    """Makes every connection of this process fail, also of libraries that don't ask the environment."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in NETWORK_EVENTS and not (event == "socket.connect" and isinstance(arguments[1], str | bytes)):
            raise OSError("this check runs without network")

    sys.addaudithook(refuse)


def places() -> dict[str, str]:
    """The folders that compute nodes must see, with the variables that name them."""
    inside = f"models in {constants.HF_HUB_CACHE}, data in {datasets.config.HF_DATASETS_CACHE}"
    return {"HF_HOME": f"{constants.HF_HOME} ({inside})", "TORCH_HOME": str(Path(torch.hub.get_dir()).parent)}


def _is_remote(card: ModelCard, spec: Spec) -> bool:
    if saved_folder(card.location) or expand_home(card.location).is_dir():
        return False
    if card.source == "transformers" or card.location.startswith(TIMM_HUB):
        return True
    return card.source in ("timm", "torchvision") and spec.model.weights == "pretrained" and card.name != EFFICIENTNET


def _hub_data(spec: DataSpec) -> list[str]:
    named = [names for names in (spec.train, spec.validation, spec.test) if isinstance(names, tuple)]
    return list(dict.fromkeys(item for names in named for item in names if hub_parts(item)))


def _model_files(card: ModelCard) -> Iterable[Path]:
    """Config, tokenizer and processor files."""
    if card.source == "transformers":
        folder = source_folder(card.location, card.revision, card.trust_remote_code)
        return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".jinja", ".py"))
    return ()


def _data_item(spec: DataSpec, tables: Tables) -> Item:
    splits = {"train": tables.train, "validation": tables.validation, "test": tables.test}
    rows = ", ".join(f"{len(table):,} {split}" for split, table in splits.items() if table is not None)
    named = [name for names in (spec.train, spec.validation, spec.test) if isinstance(names, tuple) for name in names]
    items = [one for item in dict.fromkeys(named) for one in expand(item, "data")]
    files = [path for item in items for path in _data_files(item)]
    return Item("data", f"{rows} rows, {outputs_in_words(tables.task, tables.classes)}", tuple(files))


def _data_files(item: str) -> list[Path]:
    """The files behind an item of the data section; of a hub id those that its cache holds."""
    hub = hub_parts(item)
    if hub:
        namespace, _, name = str(hub["id"]).rpartition("/")
        folder = datasets.naming.camelcase_to_snakecase(name)
        item = str(Path(datasets.config.HF_DATASETS_CACHE) / (f"{namespace}___{folder}" if namespace else folder))
    path = expand_home(item.partition("[")[0])
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


def place_of(files: Sequence[Path]) -> str:
    """The file, or the folder that holds all of them."""
    return str(files[0] if len(files) == 1 else os.path.commonpath([path.absolute().parent for path in files]))


def _more(files: Sequence[Path]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""


def _has(items: Iterable[Item], about: str) -> bool:
    return any(item.about == about for item in items)


def _say_next(spec: Spec, say: Callable[[str], None]) -> None:
    say(f"next       let the nodes see these folders (the same HF_HOME; here {constants.HF_HOME})")
    if not spec.launch.slurm.offline:
        say("           and set launch.slurm.offline: true, so that jobs don't look for the hub")
