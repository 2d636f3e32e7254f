"""A run's model as an ONNX file with batch (and sequence) left open, compared with the model it was made from."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.export import Dim

from dist_finetune.data.arrow import in_memory
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.inference.saved_run import SavedRun
from dist_finetune.models.sources import forward_logits
from dist_finetune.models.weights import first_line

TOLERANCE = 1e-4  # relative and absolute, of the logits
EXAMPLE_ROWS, CHECKED_ROWS = 2, 3
WORDS = "a few words of some length to try the model with"


class _Logits(nn.Module):
    """Takes inputs by position, as ONNX names them in order, and returns logits alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        is_image = self.names == ("image",)
        return forward_logits(self.model, tensors[0] if is_image else dict(zip(self.names, tensors, strict=True)))


def require_onnx() -> None:
    """Raises UserError that says what to install where torch's exporter lacks its packages."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install 'dist-finetune[onnx]'")


def export_onnx(run: SavedRun, folder: Path) -> tuple[str, ...]:
    """Writes model.onnx, model.json (inputs, task, classes, image or length) and the tokenizer; returns what was
    checked.

    Inputs are those of the run's batches: input_ids, attention_mask and perhaps token_type_ids, int64 (B, T), or image,
    float32 (B, C, H, W); the output is logits, float32 (B, num_classes), of words (B, T, num_classes). Raises UserError
    where torch can't export the model, TrainingError where onnxruntime gives other logits than torch.
    """
    example = _inputs(run, EXAMPLE_ROWS, 1)
    model = _Logits(run.module, tuple(example)).eval()
    batch, sequence = Dim("batch"), Dim("sequence")
    shapes: tuple[Any, ...] = tuple({0: batch} if name == "image" else {0: batch, 1: sequence} for name in example)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=list(example),
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        # The exporter passes on whatever the model's own code raises, wrapped in advice for who wrote that code.
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--to onnx: torch.onnx can't export {run.folder / 'model'}: {reason}") from error
    assert program is not None
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / "model.onnx")
    if run.tokenizer is not None:
        run.tokenizer.save_pretrained(folder)
    _describe(run, tuple(example), folder / "model.json")
    return _check(run, model, folder / "model.onnx")


def _inputs(run: SavedRun, num_rows: int, repeats: int) -> dict[str, Tensor]:
    """A batch such as evaluation makes, of made-up rows; the texts have different lengths."""
    if run.image is not None:
        generator = torch.Generator().manual_seed(repeats)
        return {"image": torch.randn(num_rows, len(run.image.mean), *run.image.size, generator=generator)}
    texts = [" ".join([WORDS] * (repeats + row)) for row in range(num_rows)]
    if run.data.task == "token-classification":
        words = [text.split() for text in texts]
        table = in_memory(pa.table({"words": words, "label": [[0] * len(row) for row in words]}))
    else:
        columns = dict.fromkeys(("text", "text_pair")[: len(run.columns.text)], texts)
        table = in_memory(pa.table({**columns, "label": [0] * num_rows}))
    inputs: dict[str, Tensor] = run.encode(table).first_batch(num_rows)["inputs"]
    return inputs


def _describe(run: SavedRun, names: tuple[str, ...], path: Path) -> None:
    whole = {
        "inputs": list(names),
        "output": "logits",
        "task": run.data.task,
        "classes": list(run.data.classes),
        "max_length": run.data.max_length,
        "image": asdict(run.image) if run.image else None,
    }
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(run: SavedRun, model: nn.Module, path: Path) -> tuple[str, ...]:
    """Compares the file with the model on a batch of another size and length than it was exported with."""
    if find_spec("onnxruntime") is None:
        return ("not compared with the model: onnxruntime is not installed",)
    import onnxruntime

    inputs = _inputs(run, CHECKED_ROWS, 2)
    with torch.inference_mode():
        expected = model(*inputs.values())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    difference = float((found - expected).abs().max())
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise TrainingError(f"{path}: onnxruntime's logits differ from the model's by {difference:.2g}; don't use it")
    return (f"onnxruntime gives the model's logits, largest difference {difference:.1e}",)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words, which a user can do nothing about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
