"""Tokenizers: read without the modelling code of transformers, whose import takes seconds that not every run needs."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_finetune.errors import UserError
from dist_finetune.models.card import ModelCard
from dist_finetune.models.transformers_config import source_folder
from dist_finetune.models.weights import first_line

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tokenizer_config.json")


def read_tokenizer(card: ModelCard, location: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or hub repository. Raises UserError where there is none."""
    folder = source_folder(location, card.revision, card.trust_remote_code)
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise UserError(
            f"model.name {card.name}: {folder} has no tokenizer; copy tokenizer.json (or its vocabulary) there"
        )
    options = {"trust_remote_code": card.trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if card.task == "token-classification" and getattr(tokenizer, "add_prefix_space", None) is False:
            # byte-level tokenizers, such as RoBERTa's, read a word that stands after a space from its space on
            tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=True, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"model.name {card.name}: the tokenizer in {folder} can't be read: {first_line(error)}"
        ) from None
    return tokenizer
