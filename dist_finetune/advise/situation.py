"""From measurements to one of the four situations of transfer learning, with the reasons in words, and what to do.

The four are those of the classic guide (CS231n's notes, after Yosinski et al. 2014, arXiv:1411.1792): is the data large
or small, and is it like what the network was pre-trained on or not. Size is counted; likeness is read off where probe
accuracy peaks over depth: features that get better up to the last layer suit the data.
"""

from dataclasses import dataclass
from typing import Any, Literal

from dist_finetune.advise.probes import Evidence, Probe
from dist_finetune.features.depths import HEAD
from dist_finetune.features.results import Z_95
from dist_finetune.models.structure import Structure

Situation = Literal["small and similar", "small and different", "large and similar", "large and different"]

LARGE_ROWS = 1_000
LARGE_ROWS_A_CLASS = 100
SOLVED = 0.99  # probe accuracy, by its lower bound, that leaves fine-tuning nothing to win
HEAD_LR = 1e-3
ROWS_TO_SEE = 6_400  # by the main phase of fine-tuning: 200 steps of 32; fewer leave it half trained
MAX_EPOCHS = 10


@dataclass(frozen=True)
class Verdict:
    """The situation, why, and the part of a config that follows from it."""

    situation: Situation
    reasons: tuple[str, ...]
    choice: str
    """Key of `choices`."""
    config: dict[str, Any]


def judge(evidence: Evidence, structure: Structure, default_lr: float) -> Verdict:
    """The verdict on a network of this structure whose pre-trained weights usually take `default_lr`."""
    large = evidence.num_rows >= LARGE_ROWS and evidence.median_class >= LARGE_ROWS_A_CLASS
    similar = is_similar(evidence)
    size: Literal["large", "small"] = "large" if large else "small"
    likeness: Literal["similar", "different"] = "similar" if similar else "different"
    situation: Situation = f"{size} and {likeness}"  # type: ignore[assignment]
    solved = evidence.best.accuracy - Z_95 * evidence.best.standard_error >= SOLVED
    if not large or solved:
        choice = "features-last" if similar else "features-best"
    else:
        choice = "fine-tune-top" if similar else "fine-tune-all"
    reasons = (_size_reason(evidence, large), _curve_reason(evidence, similar), _gain_reason(evidence, large, solved))
    return Verdict(situation, reasons, choice, choices(evidence, structure, default_lr)[choice])


def is_similar(evidence: Evidence) -> bool:
    """True where the last features are as good as any earlier ones, within 1.96 standard errors."""
    best, last = evidence.best, evidence.last
    return last.accuracy >= best.accuracy - Z_95 * best.standard_error


def choices(evidence: Evidence, structure: Structure, default_lr: float) -> dict[str, dict[str, Any]]:
    """The four things to do, as parts of a config, by name."""
    head_lr = max(HEAD_LR, default_lr)
    epochs = max(2, min(MAX_EPOCHS, -(-ROWS_TO_SEE // evidence.num_rows)))
    first = {"name": "head", "freeze": "backbone", "epochs": 1, "lr": head_lr}
    top = {"name": "top", "freeze": _lower_half(structure), "epochs": epochs, "lr": default_lr}
    whole = {"name": "all", "freeze": "none", "epochs": epochs, "lr": default_lr}
    return {
        "features-last": {"task": "features", "features": _features(evidence, evidence.last)},
        "features-best": {"task": "features", "features": _features(evidence, evidence.best)},
        "fine-tune-top": {"phases": [first, top]},
        "fine-tune-all": {"phases": [first, whole]},
    }


def _features(evidence: Evidence, probe: Probe) -> dict[str, Any]:
    """The probe's depth, and the head where there is one: what is fitted there can leave as a plain model."""
    head = [found.word for found in evidence.probes if found.word == HEAD]
    return {"at": list(dict.fromkeys([probe.word, *head])), "heads": ["softmax", "svm"]}


def _lower_half(structure: Structure) -> dict[str, Any] | Literal["none"]:
    """What is frozen below the upper half. Blocks that run the same weights train together, with the upper ones."""
    half = structure.depth // 2
    half = next((group[0] for group in structure.shared_blocks if group[0] < half <= group[-1]), half)
    stem = {"embeddings": True} if structure.of_kind("embeddings") else {}
    return stem | ({"layers": f"first {half}"} if half else {}) or "none"


def _size_reason(evidence: Evidence, large: bool) -> str:
    skew = evidence.largest_class / max(evidence.smallest_class, 1)
    uneven = f", the largest {skew:.1f} times the smallest" if skew >= 1.5 else ""
    return (
        f"{'large' if large else 'small'}: {evidence.num_rows:,} training rows in {evidence.num_classes} classes, "
        f"{evidence.median_class:.0f} in the middle one{uneven} "
        f"(large is {LARGE_ROWS:,} rows and {LARGE_ROWS_A_CLASS} there)"
    )


def _curve_reason(evidence: Evidence, similar: bool) -> str:
    best, last = evidence.best, evidence.last
    spread = f"{100 * Z_95 * best.standard_error:.1f}"
    second = max(evidence.probes, key=lambda probe: probe.logme)
    agrees = f"LogME is highest at {second.depth}"
    if similar:
        return (
            f"similar: a linear probe on the last features ({last.depth}) gets {last.accuracy:.1%}, and no earlier "
            f"depth is better by more than chance ({best.depth}: {best.accuracy:.1%} +- {spread}); {agrees}"
        )
    return (
        f"different: probe accuracy peaks at {best.depth} with {best.accuracy:.1%} +- {spread} and is "
        f"{last.accuracy:.1%} on the last features ({last.depth}): these were shaped for other data; {agrees}"
    )


def _gain_reason(evidence: Evidence, large: bool, solved: bool) -> str:
    gain = evidence.best.accuracy - evidence.half_accuracy
    more = f"half of the {evidence.num_sampled:,} sampled rows gave {evidence.half_accuracy:.1%}, all {gain:+.1%} more"
    if solved:
        return f"the probe already gets {evidence.best.accuracy:.1%}: fine-tuning has next to nothing to win; {more}"
    if large:
        left = f"{1 - evidence.best.accuracy:.1%}"
        return f"there are rows enough to train layers with, and the probe leaves {left} to win; {more}"
    return f"too few rows to train layers with: a linear head on fixed features can't overfit them as much; {more}"
