"""A network up to one depth, its output pooled, and a head on that: the model of a feature run whose best head is not
the last layer of model/.

heads/best.json says which head of heads/ it is and where the network lies: model/, or heads/body where no head at all
could be put into the network's own classifier.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_finetune.errors import UserError
from dist_finetune.features.depths import Capture, Depth
from dist_finetune.models.structure import Structure
from dist_finetune.spec_features import HeadKind, Pool

HEADS = "heads"
BEST, LINEAR, KERNEL, BODY = "best.json", "linear.safetensors", "rbf-svm.skops", "body"

Scores = Callable[[Tensor], Tensor]
"""float64 (B, C) of features (B, D)."""


@dataclass(frozen=True)
class BestHead:
    """Which head is the best of a run, in heads/best.json; there only where it is not the last layer of model/."""

    head: HeadKind
    depth: str
    index: int | None
    """Block number of the depth; None for stem and head."""
    pool: Pool
    temperature: float
    """Of an RBF SVM's scores; a linear head has it in its weights."""
    accuracy: float
    """On the validation rows."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.head} at {self.depth}"

    @property
    def is_linear(self) -> bool:
        """False where scikit-learn computes it, so that it can't leave Python."""
        return self.head != "rbf-svm"


class HeadedModel(nn.Module):
    """Takes what `body` takes, runs it as far as the depth, and returns the head's logits (B, C), float32.

    The head is computed in float64, as scikit-learn does, so that both call the same class.
    """

    def __init__(self, body: nn.Module, structure: Structure, best: BestHead, scores: Scores) -> None:
        super().__init__()
        self.body = body
        self._scores, self._label = scores, best.depth
        self._capture = Capture(body, structure, [Depth(best.depth, best.index)], best.pool)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = args[0] if args else kwargs
        first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
        features = self._capture.run(inputs, first.shape[0])[self._label]
        return self._scores(features).float()


def linear_scores(weight: Tensor, bias: Tensor) -> Scores:
    """Of a head with float64 `weight` (C, D) and `bias` (C,)."""
    return lambda features: features.double() @ weight.to(features.device).T + bias.to(features.device)


def kernel_scores(estimator: Any, temperature: float) -> Scores:
    """Of scikit-learn's pipeline, on the CPU."""
    from dist_finetune.features.heads import class_scores  # with scikit-learn, which takes seconds to import

    def scores(features: Tensor) -> Tensor:
        found = class_scores(estimator, features.detach().cpu().numpy(), len(estimator.classes_))
        return torch.from_numpy(temperature * found).to(features.device)

    return scores


def write_best(run: Path, best: BestHead) -> None:
    """Writes heads/best.json of the run in folder `run`, beside the heads."""
    text = json.dumps(asdict(best), indent=2) + "\n"
    (run / HEADS / BEST).write_text(text, encoding="utf-8")


def read_best(run: Path) -> BestHead | None:
    """What `write_best` wrote; None of a run whose model/ is its best. Raises UserError where it is damaged."""
    path = run / HEADS / BEST
    if not path.exists():
        return None
    try:
        return BestHead(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: can't be read: {error}; run features again with --fresh") from None


def with_best_head(run: Path, best: BestHead, body: nn.Module, structure: Structure) -> HeadedModel:
    """The model of a run: `body` up to the depth of its best head, and that head from its files. In eval mode.

    Raises UserError where the head's file is missing or damaged.
    """
    path = run / HEADS / (LINEAR if best.is_linear else KERNEL)
    try:
        scores = _stored_linear(path, best) if best.is_linear else kernel_scores(_stored(path), best.temperature)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: can't be read: {error}; run features again with --fresh") from None
    return HeadedModel(body, structure, best, scores).eval()


def _stored_linear(path: Path, best: BestHead) -> Scores:
    with safe_open(path, "pt") as file:
        weight, bias = (file.get_tensor(f"{best.depth}/{best.head}/{part}") for part in ("weight", "bias"))
    return linear_scores(weight, bias)


def _stored(path: Path) -> Any:
    import skops.io

    return skops.io.load(path)  # refuses every type but scikit-learn's and numpy's own
