"""A run's model for other tools. model/ is already what its own library loads: that is copied, never built again."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_finetune.errors import UserError
from dist_finetune.features.headed import BODY, BestHead, read_best
from dist_finetune.inference.saved_run import find_model, open_run
from dist_finetune.models import saved
from dist_finetune.models.card import ModelCard, Source
from dist_finetune.models.export import exported_for
from dist_finetune.models.sources import describe_model
from dist_finetune.spec import ModelSpec
from dist_finetune.spec_file import load_spec
from dist_finetune.tasks.names import TaskName

Format = Literal["hf", "timm", "onnx"]
FITS: dict[Format, tuple[Source, ...]] = {
    "hf": ("transformers", "timm"),
    "timm": ("timm",),
    "onnx": ("transformers", "timm", "torchvision", "custom"),
}


@dataclass(frozen=True)
class Exported:
    """Where the model now is, how it is loaded, and what was checked."""

    folder: Path
    how_to_load: str
    notes: tuple[str, ...] = ()


def export_run(run: Path, to: Format, out: Path | None = None) -> Exported:
    """The model of the run in folder `run` in a format that others load, in the new folder `out`.

    Left out, `out` is model/ itself where that is of the format, else RUN/onnx. Raises UserError where the format does
    not suit the model (with the reason and what would work), or `out` is not empty.
    """
    model = find_model(run)
    trusted = load_spec(run / "config.yaml").model.trust_remote_code
    card = describe_model(ModelSpec(name=str(model), trust_remote_code=trusted))
    best = read_best(run)
    if card.source not in FITS[to]:
        raise UserError(_unfit(model, card, to))
    if best and (to == "onnx" or model.name == BODY):
        _require_fit(best, to, run)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; name a new folder, or remove it first")
    try:
        if to == "onnx":
            return _onnx(run, out)
        if out is not None:
            shutil.copytree(model, out, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"{out or run}: can't be written: {error.strerror or error}") from None
    task, _ = exported_for(card, model)
    notes = (f"this is not the best head of the run, {best.name}, which predict and evaluate run",) if best else ()
    return Exported(out or model, _how_to_load(card, task, to, out or model), notes)


def _require_fit(best: BestHead, to: Format, run: Path) -> None:
    """Raises UserError where the best head can't be part of a model of the format, and no other head is."""
    if to != "onnx":
        library = {"hf": "transformers", "timm": "timm"}[to]
        other = "use --to onnx, or " if best.is_linear else ""
        raise UserError(
            f"--to {to}: the best head of {run} is {best.name}, and {library} has no model with a head there; {other}"
            "run features with head in features.at and softmax or svm in features.heads"
        )
    if not best.is_linear:
        raise UserError(
            f"--to onnx: the best head of {run} is {best.name}, which scikit-learn computes; run features with "
            "heads: [softmax, svm] for one that can be exported"
        )


def _onnx(run: Path, out: Path | None) -> Exported:
    from dist_finetune.inference.onnx import (
        export_onnx,
        require_onnx,
    )  # with torch's exporter, which the rest can spare

    require_onnx()
    folder = out or run / "onnx"
    if out is None and folder.exists():
        shutil.rmtree(folder)  # of an earlier export
    checked = export_onnx(open_run(run), folder)
    return Exported(folder, f"onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})", checked)


def _how_to_load(card: ModelCard, task: TaskName, to: Format, folder: Path) -> str:
    if to == "timm":
        return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"
    kind, with_it = ("SequenceClassification", "AutoTokenizer")
    if task == "token-classification":
        kind = "TokenClassification"
    if card.modality == "image":
        kind, with_it = ("ImageClassification", "AutoImageProcessor")
    needs = " (needs the package timm)" if card.source == "timm" else ""
    where = f".from_pretrained({str(folder)!r})"
    return f"transformers.AutoModelFor{kind}{where} and {with_it}{where}{needs}"


def _unfit(model: Path, card: ModelCard, to: Format) -> str:
    """Why a format does not suit a model, and which do."""
    library = {"hf": "transformers", "timm": "timm"}[to]
    kind = "a model of your own" if card.source == "custom" else f"a {card.source} model"
    fitting = " or ".join(f"--to {name}" for name, sources in FITS.items() if card.source in sources)
    how = ""
    if card.source in saved.HOW_TO_LOAD:
        how = f"; or load it as {model / saved.FILE} says"
    return f"--to {to}: {model} is {kind}, and {library} has no class that its weights fit. Use {fitting}{how}"
