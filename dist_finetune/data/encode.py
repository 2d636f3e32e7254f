"""From tables to the encoded rows of each split, as the plan says."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from datasets import Dataset

from dist_finetune.data.image_input import ImageInput
from dist_finetune.data.loading import Rows
from dist_finetune.data.tables import Tables
from dist_finetune.data.text import TextRows, collate_text, encode_text
from dist_finetune.data.words import count_labelled, encode_words
from dist_finetune.errors import UserError
from dist_finetune.plan import DataPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_TOKENS = 512  # of a pass on a CPU core: more is no faster a token, and batches of fewer rows have less padding

Keep = Callable[[str, Dataset, Callable[[], TextRows]], TextRows]
"""`keep(split, table, encode)`: the tokens of a table, from where they are kept or from `encode`."""


def encode_splits(
    plan: Plan, tables: Tables, tokenizer: "PreTrainedTokenizerBase | None", keep: Keep | None = None
) -> dict[str, Rows]:
    """Rows of "train", "validation" and, where there is one, "test". A tokenizer is needed for text only."""
    seed = plan.spec.train.seed if plan.spec.data.augment else None
    encoded = {
        name: encode_table(
            table,
            plan.data,
            plan.card.image,
            plan.topology.device,
            tokenizer,
            seed if name == "train" else None,
            partial(keep, name, table) if keep else None,
            plan.topology.processes_per_node,
        )
        for name, table in tables.splits.items()
    }
    for name, rows in encoded.items():
        if rows.num_targets is not None and not rows.num_targets.all():
            first = tables.splits[name][int(rows.num_targets.argmin())]["words"]
            raise UserError(
                f"data.{name}: {(rows.num_targets == 0).sum()} rows have no word that the tokenizer gives a token, or "
                f"data.max_length leaves none; the first is {first!r:.200}. Remove them"
            )
    return encoded


def encode_table(
    table: Dataset,
    data: DataPlan,
    image: ImageInput | None,
    device: Literal["cpu", "cuda"],
    tokenizer: "PreTrainedTokenizerBase | None",
    augment_seed: int | None = None,
    keep: Callable[[Callable[[], TextRows]], TextRows] | None = None,
    num_ranks: int = 1,
    keep_pixels: bool = True,
) -> Rows:
    """Rows of one table as tokens, or for a model that takes `image`s; augmented where a seed is given. `num_ranks`
    share the memory of this machine, which without `keep_pixels`, for a single pass, holds none of used images."""
    if tokenizer is not None:
        return _text_rows(table, data, device, tokenizer, keep)
    from dist_finetune.data.images import CACHE_BYTES, ImageRows, collate_images  # which take seconds to import

    assert image is not None
    augment = augment_seed is not None
    encoded = ImageRows(
        table,
        image,
        augment,
        augment_seed or 0,
        # each process keeps pixels of its own
        CACHE_BYTES // (num_ranks * max(1, data.num_workers)) if keep_pixels else 0,
        data.task,
        len(data.classes),
    )
    return Rows(
        encoded,
        collate_images,
        None,
        pass_epoch=augment,
        num_workers=data.num_workers,
        task=data.task,
        classes=data.classes,
    )


def _text_rows(
    table: Dataset,
    data: DataPlan,
    device: Literal["cpu", "cuda"],
    tokenizer: "PreTrainedTokenizerBase",
    keep: Callable[[Callable[[], TextRows]], TextRows] | None,
) -> Rows:
    max_length = data.max_length or tokenizer.model_max_length
    is_tagged = data.task == "token-classification"
    num_special = tokenizer.num_special_tokens_to_add("text_pair" in table.column_names)
    if max_length <= num_special:
        raise UserError(
            f"data.max_length: {max_length} leaves no room for text: the tokenizer adds {num_special} tokens to each "
            "row; give more"
        )
    encode = (
        partial(encode_words, table, tokenizer, max_length)
        if is_tagged
        else partial(encode_text, table, tokenizer, max_length, data.task, len(data.classes))
    )
    encoded = keep(encode) if keep else encode()
    pad_token_id = tokenizer.pad_token_id
    collate = partial(
        collate_text,
        pad_token_id=pad_token_id if isinstance(pad_token_id, int) else 0,
        multiple_of=8 if device == "cuda" else 1,  # tensor cores want multiples of 8, a CPU does not
        max_length=max_length,
        padding_side="left" if tokenizer.padding_side == "left" else "right",
    )
    return Rows(
        encoded,
        collate,
        encoded.lengths,
        num_workers=data.num_workers,
        task=data.task,
        classes=data.classes,
        num_targets=count_labelled(encoded) if is_tagged else None,
        pass_tokens=CPU_TOKENS if device == "cpu" else None,
    )
