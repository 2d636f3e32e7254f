"""Linear heads for more rows than scikit-learn's solvers should take: softmax or hinge loss in minibatches from disk.

Several weight decays are trained side by side as one stacked weight, so that choosing costs no extra reading.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dist_finetune.features.heads import ClassWeight, HeadFit, LinearHead, fit_temperature
from dist_finetune.features.store import Store
from dist_finetune.spec_features import HeadKind

WEIGHT_DECAYS = (1e-5, 1e-3, 1e-1)
BATCH_SIZE = 1024
MIN_EPOCHS, MIN_STEPS = 8, 1000
LR = 1e-2
SHARDS_AT_ONCE = 4  # rows are shuffled within so many shards
HELD_OUT = 10  # one row of ten chooses the weight decay


def fit_minibatch(
    kind: HeadKind, depth: str, store: Store, num_rows: int, num_classes: int, weight: ClassWeight, seed: int
) -> HeadFit:
    """Fits a softmax or linear SVM head (one-against-rest squared hinge, as LinearSVC's) on the stored train split."""
    started_s = time.perf_counter()
    mean, scale, counts = _moments(store, depth, num_classes)
    class_weights = torch.ones(num_classes)
    if weight == "balanced":
        class_weights = torch.from_numpy(num_rows / (num_classes * np.maximum(counts, 1))).float()
    stacked = torch.zeros(len(WEIGHT_DECAYS), num_classes, len(mean), requires_grad=True)
    bias = torch.zeros(len(WEIGHT_DECAYS), num_classes, requires_grad=True)
    decays = torch.tensor(WEIGHT_DECAYS)[:, None, None]
    optimizer = torch.optim.Adam([stacked, bias], lr=LR)
    num_steps = max(num_rows // BATCH_SIZE, -(-len(store.paths("train")) // SHARDS_AT_ONCE))  # of an epoch
    num_epochs = max(MIN_EPOCHS, -(-MIN_STEPS // num_steps))
    total = num_epochs * num_steps
    # Drawn, not counted off: classes may follow each other in turn.
    is_held = np.random.default_rng(seed).permutation(num_rows) % HELD_OUT == 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.01, 1 - step / total))
    for epoch in range(num_epochs):
        for features, labels in _batches(store, depth, mean, scale, is_held, seed * 1000 + epoch):
            scores = torch.einsum("nd,kcd->nkc", features, stacked) + bias
            losses = _losses(kind, scores, labels, class_weights)
            loss = losses.sum() + (decays * stacked.square()).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    heads = [
        _unstandardised(w, b, mean, scale) for w, b in zip(stacked.detach().numpy(), bias.detach().numpy(), strict=True)
    ]
    best, accuracy, temperature = _choose(heads, store, depth, is_held)
    head = LinearHead(temperature * heads[best].weight, temperature * heads[best].bias)
    fit_s = time.perf_counter() - started_s
    return HeadFit(depth, kind, WEIGHT_DECAYS[best], accuracy, fit_s, True, head, None, temperature)


def _moments(store: Store, depth: str, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (D,) and standard deviation (D,) of the features, and rows of each class (C,), in one pass.

    Sums are taken around the first shard's mean: squares of large means would eat the digits of small deviations.
    """
    count, counts = 0, np.zeros(num_classes)
    centre = total = squares = np.zeros(0)
    for _, features, labels in store.shards("train", depth):
        if not count:
            centre = features.mean(axis=0, dtype=np.float64)
            total, squares = np.zeros_like(centre), np.zeros_like(centre)
        shifted = features - centre
        total = total + shifted.sum(axis=0)
        squares = squares + np.square(shifted).sum(axis=0)
        counts = counts + np.bincount(labels, minlength=num_classes)
        count += len(labels)
    offset = total / count
    scale = np.sqrt(np.maximum(squares / count - np.square(offset), 0))
    return centre + offset, np.where(scale > 0, scale, 1.0), counts


def _batches(
    store: Store, depth: str, mean: np.ndarray, scale: np.ndarray, is_held: np.ndarray, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Standardised float32 features (B, D) and labels (B,) of the rows that are not held out, shuffled."""
    rng = np.random.default_rng(seed)
    num_shards = len(store.paths("train"))
    order = rng.permutation(num_shards)
    for start in range(0, num_shards, SHARDS_AT_ONCE):
        group = [store.shard("train", int(n), depth) for n in order[start : start + SHARDS_AT_ONCE]]
        ids, features, labels = (np.concatenate(parts) for parts in zip(*group, strict=True))
        kept = rng.permutation(np.flatnonzero(~is_held[ids]))
        for first in range(0, len(kept), BATCH_SIZE):
            rows = kept[first : first + BATCH_SIZE]
            yield torch.from_numpy((features[rows] - mean) / scale).float(), torch.from_numpy(labels[rows])


def _losses(kind: HeadKind, scores: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Mean loss (K,) of scores (B, K, C) for each of the K stacked heads."""
    weights = class_weights[labels]
    if kind == "softmax":
        rows = nn.functional.cross_entropy(
            scores.transpose(1, 2), labels[:, None].expand(-1, scores.shape[1]), reduction="none"
        )
    else:
        signs = 2 * nn.functional.one_hot(labels, scores.shape[2]).to(scores.dtype) - 1
        rows = (1 - signs[:, None] * scores).clamp(min=0).square().sum(dim=2)
    return (rows * weights[:, None]).mean(dim=0)


def _unstandardised(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> LinearHead:
    weight = weight.astype(np.float64) / scale
    return LinearHead(weight, bias - weight @ mean)


def _choose(heads: list[LinearHead], store: Store, depth: str, is_held: np.ndarray) -> tuple[int, float, float]:
    """The best head on the held-out rows (the most regularised of equals), its accuracy and temperature."""
    held: list[list[np.ndarray]] = [[] for _ in heads]
    labels = []
    for ids, features, targets in store.shards("train", depth):
        rows = is_held[ids]
        labels.append(targets[rows])
        for scores, head in zip(held, heads, strict=True):
            scores.append(head.scores(features[rows]))
    truth = np.concatenate(labels)
    accuracies = [float(np.mean(np.concatenate(scores).argmax(1) == truth)) for scores in held]
    best = max(range(len(heads)), key=lambda k: (accuracies[k], k))
    return best, accuracies[best], fit_temperature(np.concatenate(held[best]), truth)
