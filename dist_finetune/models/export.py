"""How a model leaves: a folder that the library it came from loads without us, and `load_exported` for us."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dist_finetune.errors import UserError
from dist_finetune.models import saved
from dist_finetune.models.card import ModelCard
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import describe_model, for_task, of_source
from dist_finetune.models.weights import write_weights
from dist_finetune.spec import ModelSpec
from dist_finetune.tasks.names import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(
    card: ModelCard,
    spec: ModelSpec,
    classes: tuple[str, ...],
    state_dict: dict[str, Tensor],
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Writes a complete model into `folder`, tensors bit for bit; `state_dict` must be whole and on the CPU.

    transformers: `from_pretrained(folder)`. timm: `create_model("local-dir:FOLDER", pretrained=True)`. Others:
    model.safetensors and a JSON that says how to load it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if card.source == "transformers":
        of_source("transformers", "export")(card, spec, classes, state_dict, folder, tokenizer)
    elif card.source == "timm":
        of_source("timm", "export")(card, spec, classes, state_dict, folder)
    else:
        options: dict[str, Any] = {"num_classes": len(classes)}
        if card.source == "torchvision":
            from dist_finetune.models.torchvision_model import torchvision_options

            options = torchvision_options(card, len(classes))
        write_weights(state_dict, folder / saved.WEIGHTS)
        saved.write_saved(card, classes, options, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def exported_for(card: ModelCard, folder: Path) -> tuple[TaskName, tuple[str, ...]]:
    """The task and the names of the outputs of the model in `folder`."""
    if card.source == "transformers":
        from dist_finetune.models.transformers_config import labels, read_config, task_in

        config = read_config(folder, ModelSpec(name=str(folder), trust_remote_code=card.trust_remote_code))
        return task_in(config), labels(config)
    if card.source == "timm":
        from dist_finetune.models.timm_model import timm_labels, timm_task

        return timm_task(folder), timm_labels(folder)
    return saved.saved_for(folder)


def load_exported(folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, ModelCard, tuple[str, ...]]:
    """The model in `folder`, in eval mode, fp32, with its card (for its task) and classes.

    Raises UserError where the folder holds no classifier with class names, or its weights are not whole.
    """
    spec = ModelSpec(name=str(folder), trust_remote_code=trust_remote_code)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of a model")
    card = describe_model(spec)
    task, classes = exported_for(card, folder)
    card = for_task(card, task)
    if not classes:
        raise UserError(f"{folder}: its config names no classes")
    model, provenance = load_model(card, spec, classes, seed=0)
    if provenance.initialized:
        raise UserError(f"{folder}: not a finished classifier; it lacks {', '.join(provenance.initialized[:5])}")
    return model.eval(), card, classes
