"""A run that left a model: what it takes to give the model other rows exactly as training gave it its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from torch import nn

from dist_finetune.data.columns import Columns
from dist_finetune.data.encode import encode_table
from dist_finetune.data.image_input import ImageInput
from dist_finetune.data.loading import Rows
from dist_finetune.engine.base import Inputs
from dist_finetune.engine.precision import autocast_in
from dist_finetune.errors import UserError
from dist_finetune.features.headed import BODY, HEADS, BestHead, read_best, with_best_head
from dist_finetune.models.export import load_exported
from dist_finetune.models.order import structure_for
from dist_finetune.models.saved import image_of
from dist_finetune.models.sources import forward_logits, load_tokenizer
from dist_finetune.models.unread import can_skip_unread, skip_unread
from dist_finetune.no_memory import lack_of_memory_told
from dist_finetune.plan import DataPlan
from dist_finetune.run_folder import read_summary, resume_command
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import has_bf16
from dist_finetune.world import World, join_world, together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Precision = Literal["fp32", "bf16", "fp16"]
MORE_ROOM = "Start it where more is free, such as on the CPU: CUDA_VISIBLE_DEVICES= (empty)"


@dataclass(frozen=True)
class SavedRun:
    """The model of a run, in eval mode and fp32, with what plan.json says of its rows. A `Predictor` where it lies."""

    folder: Path
    spec: Spec
    data: DataPlan
    image: ImageInput | None
    module: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    eval_batch_size: int
    planned_precision: Precision
    planned_device: Literal["cpu", "cuda"]
    best_head: BestHead | None = None
    """Of a feature run whose best head is not the last layer of model/: `module` has it."""

    @property
    def columns(self) -> Columns:
        """The columns that the run's rows had."""
        data = self.data
        text, image = (data.columns, None) if data.modality == "text" else ((), data.columns[0])
        return Columns(data.modality, text, image, data.label, data.task)

    @property
    def device(self) -> torch.device:
        """Where the model lies now."""
        return next(self.module.parameters()).device

    @property
    def precision(self) -> Precision:
        """That of the run on the kind of device it ran on, fp32 on another."""
        same = self.device.type == self.planned_device
        cannot = self.planned_precision == "bf16" and self.device.type == "cuda" and not has_bf16()
        return self.planned_precision if same and not cannot else "fp32"

    def encode(self, table: Dataset) -> Rows:
        """The rows of a table (see `Tables`) as evaluation encoded those of the run."""
        device: Literal["cpu", "cuda"] = "cuda" if self.device.type == "cuda" else "cpu"
        return encode_table(table, self.data, self.image, device, self.tokenizer, keep_pixels=False)

    def predict(self, inputs: Inputs) -> torch.Tensor:
        """Logits (B, C), of words (B, T, C), in fp32 of inputs on the model's device."""
        with torch.inference_mode(), autocast_in(self.precision, self.device.type)():
            return forward_logits(self.module, inputs).float()


def open_run(folder: Path) -> SavedRun:
    """The run in `folder`, its model on the CPU.

    Raises UserError where it has no model yet, saying what to do, or where files of it are missing or damaged.
    """
    model_folder = find_model(folder)
    spec = load_spec(folder / "config.yaml")
    plan = _read_plan(folder)
    module, card, classes = load_exported(model_folder, spec.model.trust_remote_code)
    if plan.get("skips_unread") and can_skip_unread(module):  # by the packages that are here now
        skip_unread(module)
    best = read_best(folder)
    data = _data_plan(plan["data"])
    if (card.task, classes) != (data.task, data.classes):
        raise UserError(
            f"{model_folder}: its task and classes ({card.task}: {', '.join(classes[:5])}) are not those of plan.json "
            f"({data.task}: {', '.join(data.classes[:5])}): it is of another run"
        )
    return SavedRun(
        folder=folder,
        spec=spec,
        data=data,
        image=image_of(plan["card"]["image"]),
        module=with_best_head(folder, best, module, structure_for(module, card)) if best else module,
        tokenizer=load_tokenizer(card) if card.modality == "text" else None,
        eval_batch_size=plan["batches"]["eval_batch_size"],
        planned_precision=plan["precision"],
        planned_device=plan["topology"]["device"],
        best_head=best,
    )


@contextmanager
def opened_run(folder: Path) -> Iterator[tuple[SavedRun, World]]:
    """The run in `folder` with its model on this rank's device, in the job that this process finds itself in (alone: a
    job of one). Collective. Raises UserError as `open_run` does, on every rank."""
    find_model(folder)
    with join_world(load_spec(folder / "config.yaml").launch) as world, lack_of_memory_told(world, MORE_ROOM):
        run = together(lambda: open_run(folder))
        run.module.to(world.device)
        yield run, world


def find_model(folder: Path) -> Path:
    """RUN/model, or the network that the heads of a feature run are for. Raises UserError where the run has none,
    saying what to do."""
    model, body = folder / "model", folder / HEADS / BODY
    if not (folder / "config.yaml").exists():
        inside = folder.name == "model" and (folder.parent / "config.yaml").exists()
        hint = f"Write {folder.parent}." if inside else "Name the folder that `run` printed."
        raise UserError(f"{folder} is no run of this tool: it has no config.yaml. {hint}")
    if model.is_dir() or body.is_dir():
        return model if model.is_dir() else body
    summary = read_summary(folder)
    if summary.get("status") == "finished":
        why = str(summary.get("folded_note", "it was taken away")).removeprefix("none: ")
        raise UserError(f"{folder} is finished, and has no model/: {why}")
    state = summary.get("status", "unfinished")
    raise UserError(f"{folder} has no model/ yet: the run is {state}. Go on with: {resume_command(folder)}")


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / "plan.json"
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}; the run's rows can't be encoded without it") from None
    if "data" not in plan:
        raise UserError(f"{path}: written by an earlier version, which did not say how rows were encoded")
    return plan


def _data_plan(saved: dict[str, Any]) -> DataPlan:
    """What `Plan.to_json` wrote, with tuples again where JSON has lists."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    if isinstance(values["label"], str):
        values["label"] = (values["label"],)  # as runs wrote it that knew classifications only
    return DataPlan(**values)
