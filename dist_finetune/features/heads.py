"""Heads on fixed features with scikit-learn: softmax (multinomial logistic regression), linear SVM, RBF SVM.

Features are standardised, C is chosen by cross-validation, and the scores are scaled by one temperature, fitted on
held-out folds (Guo et al. 2017, arXiv:1706.04599), so that their softmax is a calibrated probability and no prediction
changes.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from dist_finetune.errors import UserError
from dist_finetune.spec_features import HeadKind

Matrix = NDArray[Any]  # (N, D) features or (N, C) scores
Labels = NDArray[np.int64]
ClassWeight = Literal["balanced"] | None

MAX_RBF_ROWS = 5_000  # its cost grows with the square of the rows
MAX_EXACT_ROWS = 200_000  # beyond, `minibatch` fits
MAX_CV_ROWS = 5_000  # C hardly depends on rows beyond that; the head itself is fitted on all of them
NUM_FOLDS = 5
PATIENCE = 2
GRIDS: dict[HeadKind, tuple[float, ...]] = {
    "softmax": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "svm": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # at 1.0 liblinear takes ten times as long as at 0.1
    "rbf-svm": (0.3, 3.0, 30.0),
}


@dataclass(frozen=True)
class LinearHead:
    """float64 `weight` (C, D) and `bias` (C,) on features as they are extracted: standardisation and temperature are
    inside."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def scores(self, features: Matrix) -> Matrix:
        """Logits (N, C) of features (N, D)."""
        return features.astype(np.float64) @ self.weight.T + self.bias


@dataclass(frozen=True)
class HeadFit:
    """A head on the features of one depth, and how it was found."""

    depth: str
    kind: HeadKind
    regularisation: float
    """scikit-learn's C; weight decay for a head that was fitted in minibatches."""
    cv_accuracy: float
    """Accuracy on training rows that were held out in turn: what heads are compared by."""
    fit_s: float
    converged: bool
    linear: LinearHead | None
    """None for an RBF SVM."""
    estimator: Any
    """scikit-learn's pipeline; None for a head that was fitted in minibatches, and where it is no longer needed."""
    temperature: float

    def scores(self, features: Matrix) -> Matrix:
        """Logits (N, C) of features (N, D); their softmax is a probability."""
        if self.linear is not None:
            return self.linear.scores(features)
        return self.temperature * class_scores(self.estimator, features, len(self.estimator.classes_))


def fit_head(
    kind: HeadKind, depth: str, features: Matrix, labels: Labels, num_classes: int, weight: ClassWeight, seed: int
) -> HeadFit:
    """Fits one head on features (N, D) and labels (N,) in which every class occurs."""
    started_s = time.perf_counter()
    best, accuracy, held_scores, held_labels = choose_c(kind, features, labels, num_classes, weight, seed)
    estimator = make_head(kind, best, weight, seed)
    # In float32, standardised features and so scikit-learn's predictions would carry rounding errors of their own.
    converged = _fit(estimator, features.astype(np.float64), labels)
    temperature = fit_temperature(held_scores, held_labels)
    linear = None if kind == "rbf-svm" else as_linear(estimator, temperature)
    fit_s = time.perf_counter() - started_s
    return HeadFit(depth, kind, best, accuracy, fit_s, converged, linear, estimator, temperature)


def choose_c(
    kind: HeadKind,
    features: Matrix,
    labels: Labels,
    num_classes: int,
    weight: ClassWeight,
    seed: int,
    grid: Sequence[float] | None = None,
) -> tuple[float, float, Matrix, Labels]:
    """The best C of `grid` (left out: the kind's own), its out-of-fold accuracy, and those scores (n, C) with labels.

    Uses at most MAX_CV_ROWS rows. Of equally good values the smallest (the most regularised) wins.
    """
    rows = _cv_rows(labels, seed)
    features, labels = features[rows].astype(np.float64), labels[rows]
    found: list[tuple[float, float, Matrix]] = []
    for value in grid or GRIDS[kind]:
        scores = out_of_fold(make_head(kind, value, weight, seed), features, labels, num_classes, seed)
        found.append((float(np.mean(scores.argmax(1) == labels)), value, scores))
        if len(found) > PATIENCE and max(f[0] for f in found[-PATIENCE:]) < max(f[0] for f in found):
            break  # accuracy falls, and less regularised heads only take longer
    accuracy, value, scores = max(found, key=lambda item: (item[0], -item[1]))
    return value, accuracy, scores, labels


def out_of_fold(estimator: Any, features: Matrix, labels: Labels, num_classes: int, seed: int) -> Matrix:
    """Scores (N, C), each row's from a head that was fitted without it."""
    scores = np.full((len(labels), num_classes), -np.inf)
    sizes = np.bincount(labels, minlength=num_classes)[np.unique(labels)]
    if sizes.max() == 1:  # as in half of two rows a class: without a row nothing is known of its class
        scores[:] = 0.0
        scores[np.arange(len(labels)), labels] = -np.inf
        return scores
    folds = StratifiedKFold(min(NUM_FOLDS, max(2, int(sizes.min()))), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class of one row is in one fold only; its rows count as errors, which is what they would be.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splits = list(folds.split(features, labels))
    for rest, held in splits:
        known = np.unique(labels[rest])
        if len(known) == 1:  # the other class has one row, which is held out: there is nothing to tell apart
            scores[held, known[0]] = 0.0
            continue
        _fit(estimator, features[rest], labels[rest])
        scores[held] = class_scores(estimator, features[held], num_classes)
    return scores


def require_rows(labels: Sequence[int]) -> None:
    """Raises UserError where cross-validation has nothing to compare: it takes two classes with two rows or more."""
    if np.sum(np.bincount(labels) > 1) < 2:
        raise UserError(
            f"data.train: heads are compared by cross-validation, which takes two classes with two rows or more; of "
            f"{len(np.unique(labels))} classes in {len(labels)} rows, {int(np.sum(np.bincount(labels) > 1))} have that"
        )


def _cv_rows(labels: Labels, seed: int) -> NDArray[np.int64]:
    """Numbers of at most MAX_CV_ROWS rows, shuffled; of many rows some of each class, however rare it is."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if len(order) <= MAX_CV_ROWS:
        return order
    by_class = np.argsort(labels[order], kind="stable")
    starts = np.searchsorted(labels[order][by_class], labels[order])
    rank = np.empty(len(order), np.int64)
    rank[by_class] = np.arange(len(order))
    return order[np.argsort(rank - starts >= NUM_FOLDS, kind="stable")][:MAX_CV_ROWS]


def make_head(kind: HeadKind, value: float, weight: ClassWeight, seed: int) -> Pipeline:
    """An unfitted pipeline: standardisation, then the classifier with C = `value`."""
    classifier: Any
    if kind == "softmax":
        classifier = LogisticRegression(C=value, class_weight=weight, max_iter=1000)
    elif kind == "svm":
        classifier = LinearSVC(C=value, class_weight=weight, dual="auto", tol=1e-3, max_iter=2000, random_state=seed)
    else:
        # With break_ties the prediction is the class of the highest score, as for the other heads.
        classifier = SVC(C=value, class_weight=weight, break_ties=True)
    return make_pipeline(StandardScaler(), classifier)


def class_scores(estimator: Any, features: Matrix, num_classes: int) -> Matrix:
    """Decision values (N, C); two classes' one value f becomes (0, f), a class that was not in training gets -inf."""
    values = estimator.decision_function(features.astype(np.float64))
    if values.ndim == 1:
        values = np.stack([np.zeros_like(values), values], axis=1)
    scores = np.full((len(values), num_classes), -np.inf)
    scores[:, estimator.classes_] = values
    return scores


def as_linear(estimator: Any, temperature: float) -> LinearHead:
    """Standardisation, weights and temperature of a fitted linear pipeline as one linear map."""
    scaler, classifier = estimator[0], estimator[-1]
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros(1), bias])
    weight = weight / scaler.scale_
    return LinearHead(temperature * weight, temperature * (bias - weight @ scaler.mean_))


def fit_temperature(scores: Matrix, labels: Labels) -> float:
    """The factor on scores (N, C) that makes their softmax likeliest for `labels`; between 1/100 and 100."""
    known = np.isfinite(scores).all(axis=1)
    if not known.any():
        return 1.0
    scores, labels = scores[known], labels[known]

    def loss(log_factor: float) -> float:
        scaled = np.exp(log_factor) * scores
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(100), np.log(100)), method="bounded").x))


def _fit(estimator: Any, features: Matrix, labels: Labels) -> bool:
    """Fits, and returns whether the solver came to its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(features, labels)
    return not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def heads_for(kinds: Sequence[HeadKind], num_rows: int) -> tuple[tuple[HeadKind, ...], tuple[str, ...]]:
    """The heads that so many training rows allow, and a note for each that they don't. Raises UserError where none is
    left."""
    if "rbf-svm" not in kinds or num_rows <= MAX_RBF_ROWS:
        return tuple(kinds), ()
    limit = f"{num_rows:,} training rows, it takes up to {MAX_RBF_ROWS:,}"
    left = tuple(kind for kind in kinds if kind != "rbf-svm")
    if not left:
        raise UserError(f"features.heads: rbf-svm: {limit}; add softmax or svm, or set data.max_rows")
    return left, (f"rbf-svm left out: {limit}",)
