"""What a transformers config says: the kind of model, what it takes, how long a text may be."""

import difflib
from pathlib import Path
from typing import Any, Literal

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from dist_finetune.data.image_input import ImageInput
from dist_finetune.errors import UserError
from dist_finetune.home import expand_home
from dist_finetune.models.card import CNN_LR, TRANSFORMER_LR, ModelCard
from dist_finetune.models.config_json import PROBLEM_TYPES, read_json, task_of_problem
from dist_finetune.models.dropout import set_config_dropout
from dist_finetune.models.hub import CONFIG_FILES, hub_folder
from dist_finetune.models.weights import first_line
from dist_finetune.spec import ModelSpec
from dist_finetune.tasks.names import TaskName

DEFAULT_MAX_LENGTH = 512
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
# Their positions start after the padding id, as in fairseq: two rows of the table belong to no token.
OFFSET_POSITIONS = {
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
RESAMPLING = {2: "bilinear", 3: "bicubic"}
UNLIMITED = 1_000_000


def card_from_config(spec: ModelSpec, location: str, data_image_size: int | None) -> ModelCard:
    """The card of a hub model or local folder, from its configs alone. Raises UserError where it can't classify."""
    folder = source_folder(location, spec.revision, spec.trust_remote_code)
    config = read_config(folder, spec)
    modality = _modality(config, spec.name)
    attends = any(getattr(config, n, None) for n in ("num_attention_heads", "num_heads"))
    return ModelCard(
        source="transformers",
        name=spec.name,
        location=location,
        modality=modality,
        image=_image_input(config, folder, data_image_size) if modality == "image" else None,
        max_length=_max_length(config, folder) if modality == "text" else None,
        pretrained=spec.weights != "none",
        default_lr=TRANSFORMER_LR if modality == "text" or attends else CNN_LR,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )


def source_folder(location: str, revision: str | None, trust_remote_code: bool, weights: bool = False) -> Path:
    """The local folder of a hub id or path; hub files are fetched where the hub can be reached."""
    if expand_home(location).is_dir():
        return expand_home(location)
    return hub_folder(location, revision, [*CONFIG_FILES, "*.py"] if trust_remote_code else CONFIG_FILES, weights)


def read_config(folder: Path, spec: ModelSpec) -> Any:
    """The config of `folder`. Raises UserError where transformers can't read it or it needs code of its own."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    except StrictDataclassError as error:
        words = " ".join(str(error).split())
        raise UserError(f"model.name {spec.name}: {folder}/config.json: {words}; correct it") from None
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raw = read_json(folder / "config.json") or {}
        if "auto_map" in raw and not spec.trust_remote_code:
            raise UserError(
                f"model.name {spec.name}: its repository brings its own Python code. Read it, and if you trust it set "
                f"model.trust_remote_code to true (`inspect` takes --trust-remote-code)."
            ) from None
        kinds = sorted(
            {*MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
        )
        kind = str(raw.get("model_type", ""))
        close = difflib.get_close_matches(kind, kinds, n=3, cutoff=0.7) if kind not in kinds else []
        hint = f"Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(
            f"model.name {spec.name}: {folder}/config.json is no config that transformers "
            f"{transformers.__version__} can read: {first_line(error)} {hint}".rstrip()
        ) from None


def classifier_config(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> Any:
    """The config of the model to build: labels, dropout and image size as this run has them."""
    config = read_config(source_folder(card.location, card.revision, card.trust_remote_code), spec)
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: i for i, label in enumerate(classes)}
    config.problem_type = PROBLEM_TYPES.get(card.task)
    if card.image and hasattr(config, "image_size"):
        height, width = card.image.size
        one_number = height == width and not isinstance(config.image_size, list | tuple)
        config.image_size = height if one_number else [height, width]
    config.architectures = config.architectures or []  # transformers looks for its own class in it, also where none is
    if spec.dropout is not None:
        set_config_dropout(config, spec.dropout)
    return config


def labels(config: Any) -> tuple[str, ...]:
    """Class names in the order of the logits."""
    return tuple(str(config.id2label[i]) for i in sorted(config.id2label))


def task_in(config: Any) -> TaskName:
    """The task that a published or exported model is for; classification where its config does not say."""
    if any(name.endswith("ForTokenClassification") for name in config.architectures or ()):
        return "token-classification"
    return task_of_problem(config.problem_type)


def require_tagger(card: ModelCard) -> None:
    """Raises UserError where transformers has no model of this kind that gives a tag for each token."""
    spec = ModelSpec(name=card.name, revision=card.revision, trust_remote_code=card.trust_remote_code)
    config = read_config(source_folder(card.location, card.revision, card.trust_remote_code), spec)
    own_code = getattr(config, "auto_map", None) or {}
    known = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    if config.model_type not in known and "AutoModelForTokenClassification" not in own_code:
        raise UserError(
            f"task: token-classification: transformers has no {config.model_type} that tags words; "
            "use a BERT-like model, such as bert, roberta, electra, deberta-v2 or modernbert"
        )


def _modality(config: Any, name: str) -> Literal["text", "image"]:
    own_code = getattr(config, "auto_map", None) or {}
    text = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES or (
        "AutoModelForSequenceClassification" in own_code
    )
    image = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or (
        "AutoModelForImageClassification" in own_code
    )
    if text and image:
        return "image" if any("Image" in a for a in config.architectures or ()) else "text"
    if text or image:
        return "text" if text else "image"
    raise UserError(
        f"model.name {name}: transformers has no classifier of text or images for the model type "
        f"{config.model_type!r}. Use a BERT-like or vision model, or write module:function that returns your own"
    )


def _max_length(config: Any, folder: Path) -> int:
    positions = next(
        (v for f in POSITION_FIELDS if isinstance(v := getattr(config, f, None), int) and v > 0), UNLIMITED
    )
    if config.model_type in OFFSET_POSITIONS and getattr(config, "position_embedding_type", "absolute") == "absolute":
        positions -= (config.pad_token_id if config.pad_token_id is not None else 1) + 1
    stated = (read_json(folder / "tokenizer_config.json") or {}).get("model_max_length")
    limit = min(positions, int(stated)) if isinstance(stated, int | float) and stated > 0 else positions
    # Relative positions have no end; memory has.
    return limit if limit < UNLIMITED else DEFAULT_MAX_LENGTH


def _image_input(config: Any, folder: Path, data_image_size: int | None) -> ImageInput:
    processor = read_json(folder / "preprocessor_config.json") or {}
    resized = height_width(processor.get("size"))
    cropped = height_width(processor.get("crop_size")) if processor.get("do_center_crop") else None
    size = cropped or resized or height_width(getattr(config, "image_size", None)) or (224, 224)
    crop_fraction = processor.get("crop_pct") or (min(1.0, cropped[0] / resized[0]) if cropped and resized else 1.0)
    return ImageInput(
        size=(data_image_size, data_image_size) if data_image_size else size,
        mean=tuple(processor.get("image_mean") or ImageInput.mean),
        std=tuple(processor.get("image_std") or ImageInput.std),
        interpolation=RESAMPLING.get(processor.get("resample", 3), "bicubic"),
        crop_fraction=float(crop_fraction),
    )


def resized_processor(processor: dict[str, Any], image: ImageInput) -> dict[str, Any]:
    """The image processor's settings for the size that the model was trained at."""
    height, width = image.size
    if processor.get("do_center_crop") and "crop_size" in processor:
        short = round(min(height, width) / image.crop_fraction)
        return {**processor, "crop_size": {"height": height, "width": width}, "size": {"shortest_edge": short}}
    if isinstance(processor.get("size"), dict) and "shortest_edge" in processor["size"]:
        return {**processor, "size": {"shortest_edge": min(height, width)}}
    return {**processor, "size": {"height": height, "width": width}}


def plain_processor(image: ImageInput) -> dict[str, Any]:
    """Settings of an image processor for a model whose source has none: short side resized, centre crop, normalised."""
    height, width = image.size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / image.crop_fraction)},
        "resample": {name: number for number, name in RESAMPLING.items()}[image.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def height_width(size: Any) -> tuple[int, int] | None:
    """(H, W) of the ways in which configs write a size: 224, [224, 224], {height, width}, {shortest_edge}."""
    if isinstance(size, dict):
        size = [size[k] for k in ("height", "width") if k in size] or size.get("shortest_edge")
    if isinstance(size, list | tuple):
        return (int(size[0]), int(size[-1])) if size else None
    return (int(size), int(size)) if size else None
