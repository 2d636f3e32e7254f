"""Models of timm: an architecture by name, a hub repository or a folder in timm's format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import Tensor, nn

from dist_finetune.data.image_input import ImageInput
from dist_finetune.errors import UserError, did_you_mean, nearest
from dist_finetune.home import expand_home
from dist_finetune.models.card import CNN_LR, TRANSFORMER_LR, ModelCard, Provenance
from dist_finetune.models.config_json import PROBLEM_TYPES, task_of_problem
from dist_finetune.models.demo import EFFICIENTNET, efficientnet_file, efficientnet_state
from dist_finetune.models.dropout import set_dropout
from dist_finetune.models.hub import TIMM_HUB, commit_of, fetch_url, hub_file, hub_folder
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.weights import (
    files_sha256,
    head_tensors,
    load_body,
    read_weights,
    restart_heads,
    seeded,
    tensors_sha256,
    weights_file,
    write_weights,
)
from dist_finetune.spec import ModelSpec
from dist_finetune.tasks.names import TaskName

ATTENTION_SEGMENTS = {"attn", "attention", "self_attention", "qkv"}
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


def describe_timm(spec: ModelSpec, location: str, data_image_size: int | None) -> ModelCard:
    """The card of a timm model. Raises UserError for an unknown name or tag, or where no weights were published."""
    if not _is_folder_like(location):
        _check_name(location)
    config = _pretrained_config(location, spec.revision)
    if spec.weights == "pretrained" and not (config.has_weights or spec.name == EFFICIENTNET):
        tags = timm.list_pretrained(f"{location.partition('.')[0]}*")[:5]
        raise UserError(
            f"model.name {spec.name}: timm has no pre-trained weights of it. Set model.weights to none or to a file"
            + (f", or take one of {', '.join(f'timm:{t}' for t in tags)}" if tags else "")
        )
    height, width = (data_image_size, data_image_size) if data_image_size else config.input_size[-2:]
    card = ModelCard(
        source="timm",
        name=spec.name,
        location=location,
        modality="image",
        image=ImageInput(
            size=(height, width),
            mean=tuple(config.mean),
            std=tuple(config.std),
            interpolation=config.interpolation if config.interpolation in ("bicubic", "bilinear") else "bicubic",
            crop_fraction=config.crop_pct,
        ),
        max_length=None,
        pretrained=spec.weights != "none",
        default_lr=CNN_LR,
        revision=spec.revision,
    )
    with on_meta():
        names = [name for name, _ in build_timm(card, spec, ("0", "1")).named_parameters()]
    attends = any(ATTENTION_SEGMENTS & set(name.split(".")) for name in names)
    return ModelCard(**{**vars(card), "default_lr": TRANSFORMER_LR if attends else CNN_LR})


def build_timm(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> nn.Module:
    """A randomly initialised model with a head for `classes`, on the current default device."""
    return _create(card, spec, len(classes))


def load_timm(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Provenance]:
    """The model with its weights in fp32 on the CPU, and where they came from; new tensors start from `seed`."""
    head = head_tensors(lambda n: _create(card, spec, n), len(classes))
    file, commit, head_kept = weights_file(spec.weights), None, False
    with seeded(seed):
        if spec.weights == "none":
            model = _create(card, spec, len(classes))
            state = model.state_dict()
            return model, Provenance(card.name, None, tensors_sha256(state), (), tuple(state), False)
        if file is None and not _is_folder_like(card.location) and card.name != EFFICIENTNET:
            file, commit = _published_file(card)
            model = _create(card, spec, len(classes), file)
            missing = head
        else:
            model = _create(card, spec, len(classes))
            if file is None and card.name == EFFICIENTNET:
                file = efficientnet_file()
                state = efficientnet_state(file, model)
            else:
                folder = _folder(card.location, card.revision, weights=file is None)
                if file is None and folder is not None:
                    commit, head_kept = (
                        commit_of(folder),
                        timm_labels(folder) == classes and timm_task(folder) == card.task,
                    )
                    file = _weights_in(folder)
                assert file is not None
                state = read_weights(file)
            missing = load_body(model, state, head, head_kept, f"model.name {card.name}: {file}")
    restart_heads(model, missing, seed)
    return model, Provenance(card.name, commit, files_sha256([file]), (file.name,), missing, head_kept)


def files_timm(card: ModelCard) -> list[Path]:
    """The published weights, fetched where that is needed and possible. Raises UserError where they can't be had."""
    if card.name == EFFICIENTNET:
        return [efficientnet_file()]
    folder = _folder(card.location, card.revision, weights=True)
    return [_weights_in(folder) if folder else _published_file(card)[0]]


def export_timm(
    card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], state: Mapping[str, Tensor], folder: Path
) -> None:
    """Writes what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    assert card.image is not None
    with on_meta():
        model: Any = build_timm(card, spec, classes)
    config = {k: v for k, v in model.pretrained_cfg.items() if v is not None}
    # What says where the source's weights were, or holds for its classes only.
    for key in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "label_offset", "architecture"):
        config.pop(key, None)
    for key in ("label_names", "label_descriptions", "test_input_size", "test_crop_pct", "pool_size", "num_classes"):
        config.pop(key, None)
    config |= {
        "custom_load": False,
        "num_classes": len(classes),
        "input_size": [3, *card.image.size],
        "mean": list(card.image.mean),
        "std": list(card.image.std),
        "interpolation": card.image.interpolation,
        "crop_pct": card.image.crop_fraction,
    }
    source = _folder(card.location, card.revision)
    arguments = dict((_folder_config(source).get("model_args") if source else None) or {})
    # transformers, which loads this folder too, takes the number of classes and nothing else from the rest.
    arguments.pop("num_classes", None)
    if config.get("fixed_input_size"):
        arguments["img_size"] = list(card.image.size)
    whole = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": len(classes),
        "num_features": model.num_features,
        "label_names": list(classes),
        # timm has no word for it; transformers, which loads this folder too, reads its own
        **({"problem_type": PROBLEM_TYPES[card.task]} if card.task != "classification" else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": config,
    }
    write_weights(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def timm_labels(folder: Path) -> tuple[str, ...]:
    """Class names in a folder of timm's format, in the order of the logits; empty where it has none."""
    config = _folder_config(folder)
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names") or ()
    return tuple(str(n) for n in (names.values() if isinstance(names, dict) else names))


def timm_task(folder: Path) -> TaskName:
    """The task that a model in a folder of timm's format is for."""
    return task_of_problem(_folder_config(folder).get("problem_type"))


def _create(card: ModelCard, spec: ModelSpec, num_classes: int, file: Path | None = None) -> nn.Module:
    folder = _folder(card.location, card.revision)
    config = _pretrained_config(card.location, card.revision)
    options: dict[str, Any] = {"num_classes": num_classes}
    if config.fixed_input_size and card.image is not None:
        options["img_size"] = card.image.size
    if file is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "source": None}}
    try:
        model = timm.create_model(f"local-dir:{folder}" if folder else card.location, **options)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        size, version = card.image.size if card.image else None, timm.__version__
        raise UserError(
            f"model.name {card.name}: timm {version} can't build it for images of {size} pixels: {error}"
        ) from None
    if file is not None and num_classes == config.num_classes:
        # As many classes by chance: theirs are not ours.
        model.reset_classifier(num_classes)
    if spec.dropout is not None:
        set_dropout(model, spec.dropout)
    return model.float()


def _check_name(location: str) -> None:
    architecture, _, tag = location.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        raise UserError(
            f"model.name timm:{location}: timm {timm.__version__} has no such model. "
            f"{did_you_mean(location, near) if near else 'timm.list_models() lists them.'}"
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"model.name timm:{location}: {architecture} has no weights {tag!r}. {did_you_mean(tag, tags)}")


def _pretrained_config(location: str, revision: str | None) -> PretrainedCfg:
    folder = _folder(location, revision)
    if folder is None:
        return timm.get_pretrained_cfg(location) or PretrainedCfg()
    config = dict(_folder_config(folder)["pretrained_cfg"])
    known = set(PretrainedCfg.__dataclass_fields__)
    return PretrainedCfg(**{k: v for k, v in config.items() if k in known} | {"file": str(folder)})


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json: can't be read as timm's config of a model: {error}") from None
    if "pretrained_cfg" not in config:
        # The older format keeps everything on one level.
        return {"architecture": config.get("architecture"), "pretrained_cfg": config}
    return config


def _is_folder_like(location: str) -> bool:
    return location.startswith(TIMM_HUB) or expand_home(location).is_dir()


def _folder(location: str, revision: str | None, weights: bool = False) -> Path | None:
    """The local folder of a location that is one, or a hub repository; None for an architecture's name."""
    if location.startswith(TIMM_HUB):
        return hub_folder(location.removeprefix(TIMM_HUB), revision, ["config.json"], weights)
    return expand_home(location) if _is_folder_like(location) else None


def _weights_in(folder: Path) -> Path:
    file = next((folder / n for n in WEIGHT_NAMES if (folder / n).is_file()), None)
    if file is None:
        raise UserError(
            f"model.name {folder}: holds no weights ({' or '.join(WEIGHT_NAMES)}); model.weights can name a file"
        )
    return file


def _published_file(card: ModelCard) -> tuple[Path, str | None]:
    """The file of the weights that timm names for an architecture, and its hub commit."""
    config = timm.get_pretrained_cfg(card.location)
    if config.hf_hub_id:
        names = (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHT_NAMES
        file = hub_file(config.hf_hub_id, names, f"model.name {card.name}")
        return file, commit_of(file.parent)
    url = config.url if isinstance(config.url, str) else config.url[0]
    return fetch_url(url, f"model.name {card.name}"), None
