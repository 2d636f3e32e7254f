"""What a finished run leaves for others: a complete model and the predictions of its last evaluation."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from dist_finetune.engine import Engine
from dist_finetune.evaluate import Evaluation
from dist_finetune.models.export import export_model
from dist_finetune.plan import Plan
from dist_finetune.world import World, on_first


def save_model(
    engine: Engine, plan: Plan, tokenizer: object, evaluations: dict[str, Evaluation], folder: Path, world: World
) -> None:
    """Writes model/ and predictions/ from rank 0. Collective: sharded weights are gathered tensor by tensor."""
    state = gather_state(engine, world)
    on_first(
        world, lambda: export_model(plan.card, plan.spec.model, plan.data.classes, state, folder / "model", tokenizer)
    )
    on_first(world, lambda: save_predictions(evaluations, folder / "predictions"))


def gather_state(engine: Engine, world: World) -> dict[str, torch.Tensor]:
    """The complete state dict on the CPU of rank 0 (empty elsewhere), with the keys of the model's own state dict."""
    state = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with engine.gathered(tensor):
            if world.is_first:
                state[name] = tensor.detach().to("cpu", copy=True)
    return state


def save_predictions(evaluations: dict[str, Evaluation], folder: Path) -> None:
    """One safetensors file a split: logits (N, num_classes) and labels (N,), in dataset order."""
    folder.mkdir(exist_ok=True)
    for name, evaluation in evaluations.items():
        tensors = {"logits": evaluation.logits.contiguous(), "labels": evaluation.labels.contiguous()}
        save_file(tensors, folder / f"{name}.safetensors")
