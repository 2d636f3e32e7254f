"""What loading costs a rank, and whether it gives the same model: load_worker.py FOLDER RESULTS.json

FOLDER/good is a large BERT whose weights are stored in bf16, FOLDER/damaged the same with its file cut short. Each rank
writes RESULTS.json.RANK. `tied_model` is a model of a user's own.
"""

import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dist_finetune.errors import DistFinetuneError
from dist_finetune.load_once import change_once_a_node, load_once_a_node
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import build_model, describe_model
from dist_finetune.spec import LaunchSpec, ModelSpec
from dist_finetune.world import World, join_world

CLASSES = ("a", "b")


class Tied(nn.Module):
    """Two layers with one weight, a buffer that is not saved, and a parameter that never trains."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, num_classes)
        self.fixed = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("scale", torch.full((3, 1), 0.5), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(image.flatten(1)[:, :8] * self.fixed)) * self.scale.sum())


def tied_model(num_classes: int) -> nn.Module:
    return Tied(num_classes)


def hidden_model(num_classes: int) -> nn.Module:
    """A model with a tensor that is neither parameter nor buffer: it can't be shared."""
    model = Tied(num_classes)
    model.table = torch.arange(3.0)
    return model


def load(name: str, world: World, weights: str = "pretrained") -> dict[str, Any]:
    """What a rank sees of one load, beside a load by itself."""
    spec = ModelSpec(name=name, weights=weights)
    card = describe_model(spec)
    before, resident = _private_bytes(), _status_bytes("VmRSS")
    try:
        model, provenance, problem = load_once_a_node(
            lambda: load_model(card, spec, CLASSES, seed=3), lambda: build_model(card, spec, CLASSES), world
        )
    except DistFinetuneError as error:
        return {"error": str(error)}
    grown, at_most = _private_bytes() - before, _status_bytes("VmHWM") - resident
    before = _private_bytes()
    alone, provenance_alone = load_model(card, spec, CLASSES, seed=3)
    grown_alone = _private_bytes() - before
    tensors, expected = _tensors(model), _tensors(alone)
    return {
        "grown": grown,
        "grown at most": at_most,
        "grown alone": grown_alone,
        "bytes": sum(t.nbytes for t in expected.values()),
        "problem": problem,
        "same names": list(tensors) == list(expected),
        "differ": [n for n, t in expected.items() if t.dtype != tensors[n].dtype or not torch.equal(t, tensors[n])],
        "flags differ": [n for n, t in expected.items() if t.requires_grad != tensors[n].requires_grad],
        "same provenance": provenance == provenance_alone,
        "training": all(module.training for module in model.modules()),
        "tied": hasattr(model, "second") and model.first.weight is model.second.weight,
    }


def resume(name: str, world: World) -> dict[str, Any]:
    """What a rank sees where half of a loaded model gets other values, as from a checkpoint."""
    spec = ModelSpec(name=name, weights="pretrained" if "/" in name else "none")
    card = describe_model(spec)
    model, _, _ = load_once_a_node(
        lambda: load_model(card, spec, CLASSES, seed=3), lambda: build_model(card, spec, CLASSES), world
    )
    tensors = dict(model.named_parameters())
    changed = list(tensors)[::2]

    def change() -> list[str]:
        with torch.no_grad():
            for name in changed:
                tensors[name].copy_(torch.full_like(tensors[name], 1.0 + changed.index(name)))
        return changed

    kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in changed}
    before = _private_bytes()
    change_once_a_node(model, change, world)
    return {
        "grown": _private_bytes() - before,
        "bytes": sum(tensors[name].nbytes for name in changed),
        "same objects": all(tensor is tensors[name] for name, tensor in model.named_parameters()),
        "differ": [name for i, name in enumerate(changed) if not bool((tensors[name] == 1.0 + i).all())],
        "moved": [name for name, tensor in kept.items() if not torch.equal(tensor, tensors[name])],
    }


def _private_bytes() -> int:
    return psutil.Process().memory_full_info().uss


def _status_bytes(key: str) -> int:
    """Memory of this process as Linux counts it: VmRSS, what is resident, or VmHWM, the most that ever was."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def main() -> None:
    folder, results = Path(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, str(Path(__file__).parent))
    (folder / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "tmp")
    with join_world(LaunchSpec()) as world:
        found = {
            "good": load(str(folder / "good"), world),
            "damaged": load(str(folder / "damaged"), world),
            "tied": load("load_worker:tied_model", world, "none"),
            "hidden": load("load_worker:hidden_model", world, "none"),
            "resumed": resume(str(folder / "good"), world),
            "resumed tied": resume("load_worker:tied_model", world),
            "resumed hidden": resume("load_worker:hidden_model", world),
        }
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a file for `fixed`, not one for the layers
        found["full"] = load("load_worker:tied_model", world, "none")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        found["left"] = {"files": [path.name for path in (folder / "tmp").iterdir()]}
        tempfile.tempdir = str(folder / "not-there")
        found["no folder"] = load("load_worker:tied_model", world, "none")
        Path(f"{results}.{world.rank}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
