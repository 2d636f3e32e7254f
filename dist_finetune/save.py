"""What a finished run leaves for others: a complete model and the predictions of its last evaluation."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dist_finetune.engine import Engine
from dist_finetune.errors import TrainingError
from dist_finetune.evaluate import Evaluation
from dist_finetune.job import Job, Stage
from dist_finetune.models.export import export_model
from dist_finetune.proof import digest_tensor, verify_frozen
from dist_finetune.stage import load_base
from dist_finetune.tensor_files import write_tensors
from dist_finetune.world import World, on_first


def save_model(job: Job, stage: Stage, evaluations: Mapping[str, Evaluation]) -> tuple[str, ...]:
    """Writes model/ and predictions/ from rank 0, and returns the names of the frozen tensors that were compared with
    their digests: all of them. Collective: sharded weights are gathered tensor by tensor.

    Raises TrainingError where a frozen tensor differs.
    """
    plan, world = job.plan, job.world
    verify_frozen(stage.engine, stage.held_digests, world)
    state = {name: t for name, t in gather_state(stage.engine, world).items() if name not in stage.rounded}
    base = load_base(plan, world, job.report)[0] if stage.has_tail_only or stage.rounded else None

    def export() -> None:
        whole = state if base is None else _with_dropped(stage, base, state)
        folder = job.folder / "model"
        export_model(plan.card, plan.spec.model, plan.data.classes, whole, folder, job.tokenizer)

    on_first(world, export)
    on_first(world, lambda: save_predictions(evaluations, job.folder / "predictions"))
    return tuple(stage.frozen_digests)


def _with_dropped(stage: Stage, base: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the tensors put back that a cached prefix dropped or that were rounded, each compared with its
    digest."""
    whole = base.state_dict() | stage.dropped
    for name, expected in stage.frozen_digests.items():
        if name not in state and digest_tensor(whole[name]) != expected:
            raise TrainingError(f"{name} of the base model is not what it was at the start; nothing was exported")
    return {name: state.get(name, tensor) for name, tensor in whole.items()}


def gather_state(engine: Engine, world: World) -> dict[str, torch.Tensor]:
    """The complete state dict on the CPU of rank 0 (empty elsewhere), with the keys of the model's own state dict."""
    state = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with engine.gathered(tensor) as whole:
            if world.is_first:
                state[name] = whole.detach().to("cpu", copy=True)
    return state


def save_predictions(evaluations: Mapping[str, Evaluation], folder: Path) -> None:
    """One safetensors file a split: logits (M, C), labels (M,) or (M, C) and row numbers (M,) of all rows, or of all
    labelled words, in dataset order."""
    folder.mkdir(exist_ok=True)
    for name, evaluation in evaluations.items():
        tensors = {key: getattr(evaluation, key).contiguous() for key in ("logits", "labels", "rows")}
        write_tensors(tensors, folder / f"{name}.safetensors")
