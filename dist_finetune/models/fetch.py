"""A model's weight files, brought here without reading them into memory."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dist_finetune.errors import UserError
from dist_finetune.models.card import ModelCard
from dist_finetune.models.sources import of_source
from dist_finetune.models.weights import first_line, read_weights, weights_file
from dist_finetune.spec import ModelSpec

SHARD = re.compile(r".*-(\d+)-of-(\d+)")


def weight_files(card: ModelCard, spec: ModelSpec) -> list[Path]:
    """The files that the run will read weights from, fetched where they are not here yet; empty where it reads none.

    Raises UserError where they are not here and can't be fetched, or where a shard is missing.
    """
    file = weights_file(spec.weights)
    if file is not None or spec.weights == "none":
        return [file] if file is not None else []
    files: list[Path] = of_source(card.source, "files")(card)
    shards = [match for path in files if (match := SHARD.fullmatch(path.stem))]
    if shards and len(shards) != int(shards[0][2]):
        there = ", ".join(str(int(match[1])) for match in shards)
        raise UserError(
            f"model.name {card.name}: of {int(shards[0][2])} files of its weights only {there} are in "
            f"{files[0].parent}; fetch or copy the others"
        )
    return files


def count_tensors(path: Path) -> int:
    """Tensors that a weight file holds, by its header: no weights are read. Raises UserError for a damaged file."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return len(list(file.keys()))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable weight file (truncated?): {first_line(error)}") from None
    return len(read_weights(path, "meta"))
