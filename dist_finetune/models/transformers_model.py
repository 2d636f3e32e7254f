"""Models of transformers: built, loaded and written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import logging as transformers_logging

from dist_finetune.errors import UserError
from dist_finetune.models.card import ModelCard, Provenance
from dist_finetune.models.config_json import read_json
from dist_finetune.models.dropout import set_dropout
from dist_finetune.models.head import find_head
from dist_finetune.models.hub import WEIGHT_FILES, commit_of
from dist_finetune.models.transformers_config import (
    card_from_config,
    classifier_config,
    height_width,
    labels,
    plain_processor,
    read_config,
    resized_processor,
    source_folder,
    task_in,
)
from dist_finetune.models.weights import (
    files_sha256,
    first_line,
    head_tensors,
    raise_differences,
    read_weights,
    seeded,
    tensors_sha256,
    weights_file,
)
from dist_finetune.spec import ModelSpec


def describe_transformers(spec: ModelSpec, location: str, data_image_size: int | None) -> ModelCard:
    """The card of a transformers model, checked against the image size that the data section asks for."""
    card = card_from_config(spec, location, data_image_size)
    if data_image_size and card.image:
        check_image_size(card, spec)
    return card


def build_transformers(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> nn.Module:
    """A randomly initialised fp32 model with a head for `classes`, on the current default device."""
    return _build(card, spec, classifier_config(card, spec, classes))


def load_transformers(
    card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], seed: int
) -> tuple[nn.Module, Provenance]:
    """The model with its weights in fp32 on the CPU, and where they came from; new tensors start from `seed`."""
    folder = source_folder(card.location, card.revision, card.trust_remote_code)
    config = classifier_config(card, spec, classes)
    if spec.weights == "none":
        with seeded(seed), plain_loading():
            model = _build(card, spec, config)
        state = model.state_dict()
        return model, Provenance(card.name, commit_of(folder), tensors_sha256(state), (), tuple(state), False)
    file = weights_file(spec.weights)
    files = [file] if file is not None else files_transformers(card)
    head = head_tensors(
        lambda n: _build(card, spec, classifier_config(card, spec, tuple(map(str, range(n))))), len(classes)
    )
    source = read_config(folder, spec)
    head_kept = file is None and labels(source) == classes and task_in(source) == card.task
    with seeded(seed), plain_loading():
        model, info = _from_pretrained(card, spec, config, folder if file is None else None, file)
        initialized = _new_tensors(model, info, head, card.name if file is None else str(file))
        if not head_kept:
            initialized |= _reinitialize(model, set(head) - initialized)
    if spec.dropout is not None:
        set_dropout(model, spec.dropout)
    ordered = tuple(name for name in model.state_dict() if name in initialized)
    names = tuple(path.name for path in files)
    return model, Provenance(card.name, commit_of(folder), files_sha256(files), names, ordered, head_kept)


def check_image_size(card: ModelCard, spec: ModelSpec) -> None:
    """Raises UserError where learned positions fix the image size and the data asks for another."""
    config = read_config(source_folder(card.location, card.revision, card.trust_remote_code), spec)
    own = height_width(getattr(config, "image_size", None))
    if card.image is None or own is None or own == card.image.size or not card.pretrained:
        return
    with torch.device("meta"):
        given = _build(card, spec, config)
        config.image_size = card.image.size[0]
        asked = _build(card, spec, config).state_dict()
    if any(asked[name].shape != tensor.shape for name, tensor in given.state_dict().items()):
        raise UserError(
            f"data.image_size {card.image.size[0]}: {card.name} has learned positions for {own[0]}x{own[1]} pixels "
            f"only; leave data.image_size out"
        )


def export_transformers(
    card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], state: dict[str, Tensor], folder: Path, tokens: Any
) -> None:
    """Writes what `from_pretrained` reads: weights, config with labels, tokenizer, image processor."""
    with torch.device("meta"):
        model = build_transformers(card, spec, classes)
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # type: ignore[operator]
    with plain_loading():
        model.save_pretrained(folder)  # type: ignore[operator]
    if tokens is not None:
        tokens.save_pretrained(folder)
    source = source_folder(card.location, card.revision, card.trust_remote_code)
    if card.trust_remote_code:
        for module in source.glob("*.py"):
            (folder / module.name).write_bytes(module.read_bytes())
    if card.image:
        found = read_json(source / "preprocessor_config.json")
        processor = resized_processor(found, card.image) if found else plain_processor(card.image)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


@contextmanager
def plain_loading() -> Iterator[None]:
    """Inside, transformers builds and loads whole models on every rank, in silence.

    A live DeepSpeed ZeRO-3 config would make it partition weights while it builds, and accelerate's FSDP variables
    would make it leave weights out on all ranks but one: both before the frozen set is known.
    """
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    zero_config = deepspeed_integration._hf_deepspeed_config_weak_ref
    fsdp = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed_integration._hf_deepspeed_config_weak_ref = None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = zero_config
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
        if fsdp is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp


def _auto_class(card: ModelCard) -> Any:
    if card.modality == "image":
        return AutoModelForImageClassification
    is_tagger = card.task == "token-classification"
    return AutoModelForTokenClassification if is_tagger else AutoModelForSequenceClassification


def _build(card: ModelCard, spec: ModelSpec, config: Any) -> nn.Module:
    try:
        with plain_loading():
            model = _auto_class(card).from_config(config, trust_remote_code=spec.trust_remote_code, dtype=torch.float32)
    except Exception as error:  # its code raises whatever meets values that don't go together
        raise UserError(
            f"model.name {card.name}: transformers can't build a {config.model_type} classifier from its config.json "
            f"({type(error).__name__}: {first_line(error)}); correct the config, or use another model"
        ) from error
    if spec.dropout is not None:
        set_dropout(model, spec.dropout)
    return model


def _from_pretrained(
    card: ModelCard, spec: ModelSpec, config: Any, folder: Path | None, file: Path | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    options: dict[str, Any] = {
        "config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True,
    }  # fmt: skip
    try:
        if folder is not None:
            return _auto_class(card).from_pretrained(
                folder, trust_remote_code=spec.trust_remote_code, local_files_only=True, **options
            )
        with torch.device("meta"):
            model_class: Any = type(_build(card, spec, config))
        return model_class.from_pretrained(None, state_dict=read_weights(file), **options)  # type: ignore[arg-type]
    except UserError:
        raise
    except Exception as error:
        # Damaged files come up as whatever the reader of that format raises.
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
            raise
        raise UserError(
            f"model.name {card.name}: the weights in {folder or file} can't be read: {first_line(error)}"
        ) from None


def _new_tensors(model: PreTrainedModel, info: dict[str, Any], head: tuple[str, ...], what: str) -> set[str]:
    """Names of tensors the weights did not bring; raises UserError where one of them is part of the backbone."""
    prefix = f"{model.base_model_prefix}."
    # CLIP, SigLIP and HGNet-V2 have no module of that name in their classifiers
    has_base = isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    own_head = tuple(f"{path}." for path in find_head(model))

    def is_body(name: str) -> bool:
        return "pooler" not in name and (name.startswith(prefix) if has_base else not name.startswith(own_head))

    mismatched = {entry[0]: entry[1:] for entry in info["mismatched_keys"]}
    missing = set(info["missing_keys"])
    body = {n for n in model.state_dict() if is_body(n) and n not in head}
    raise_differences(
        what,
        sorted(missing & body),
        sorted(filter(is_body, info["unexpected_keys"])) if missing & body else [],
        [f"{n} {mismatched[n]}" for n in sorted(set(mismatched) - set(head))],
    )
    return missing | set(mismatched)


def _reinitialize(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Starts the modules that own `names` anew, with the model's own initialisation; returns all their tensors."""
    renewed: set[str] = set()
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(path)
        for part in (module, *module.parameters(recurse=False)):
            part._is_hf_initialized = False
        with torch.no_grad():
            model._init_weights(module)
        renewed |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return renewed


def files_transformers(card: ModelCard) -> list[Path]:
    """The published weights, one file or all shards, fetched where the hub can be reached. Raises UserError where there
    are none.
    """
    folder = source_folder(card.location, card.revision, card.trust_remote_code, weights=True)
    for pattern in WEIGHT_FILES:
        files = sorted(folder.glob(pattern))
        if files:
            whole = [f for f in files if f.stem in ("model", "pytorch_model")]
            return whole or files
    raise UserError(
        f"model.name {card.name}: {folder} holds a config but no weights ({', '.join(WEIGHT_FILES)}). "
        f"Copy them there, or set model.weights to none or to a file."
    )
