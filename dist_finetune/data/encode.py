"""From tables to the encoded rows of each split, as the plan says."""

from functools import partial

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dist_finetune.data.loading import Rows
from dist_finetune.data.tables import Tables
from dist_finetune.data.text import collate_text, encode_text
from dist_finetune.plan import Plan


def encode_splits(plan: Plan, tables: Tables, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Rows]:
    """Rows of "train", "validation" and, where there is one, "test". A tokenizer is needed for text only."""
    splits = {"train": tables.train, "validation": tables.validation, "test": tables.test}
    rows = {}
    for name, table in splits.items():
        if table is not None:
            rows[name] = _image_rows(plan, table, name) if tokenizer is None else _text_rows(plan, table, tokenizer)
    return rows


def _text_rows(plan: Plan, table: Dataset, tokenizer: PreTrainedTokenizerBase) -> Rows:
    max_length = plan.data.max_length or tokenizer.model_max_length
    encoded = encode_text(table, tokenizer, max_length)
    pad_token_id = tokenizer.pad_token_id
    collate = partial(
        collate_text,
        pad_token_id=pad_token_id if isinstance(pad_token_id, int) else 0,
        multiple_of=8 if plan.topology.device == "cuda" else 1,  # tensor cores want multiples of 8, a CPU does not
        max_length=max_length,
        padding_side="left" if tokenizer.padding_side == "left" else "right",
    )
    return Rows(encoded, collate, encoded.lengths, num_workers=plan.data.num_workers)


def _image_rows(plan: Plan, table: Dataset, split: str) -> Rows:
    from dist_finetune.data.images import ImageRows, collate_images  # which take seconds to import

    assert plan.card.image is not None
    augment = plan.spec.data.augment and split == "train"
    encoded = ImageRows(table, plan.card.image, augment, plan.spec.train.seed)
    return Rows(encoded, collate_images, None, pass_epoch=augment, num_workers=plan.data.num_workers)
