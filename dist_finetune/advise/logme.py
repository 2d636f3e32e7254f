"""LogME: how well features explain labels, as an evidence with nothing to tune (You et al. 2021, arXiv:2102.11005).

A second opinion beside the probes: it fits no classifier and holds no row out.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_STEPS = 100
TOLERANCE = 1e-3


def logme(features: NDArray[Any], labels: NDArray[np.int64], num_classes: int) -> float:
    """Mean over classes of the maximum log evidence per row of a linear model; higher is better, comparable between
    features (N, D) of the same rows.

    Features are centred and scaled to unit mean square first, so that models of other scale compare.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    centred /= np.sqrt(np.mean(np.square(centred))) or 1.0
    basis, singular, _ = np.linalg.svd(centred, full_matrices=False)
    found = []
    for label in range(num_classes):
        target = (labels == label).astype(np.float64)
        found.append(_evidence(basis, np.square(singular), target - target.mean(), centred.shape[1]))
    return float(np.mean(found))


def _evidence(basis: NDArray[Any], eigenvalues: NDArray[Any], target: NDArray[Any], num_features: int) -> float:
    """Log evidence per row of `target` (N,), maximised over the precisions of weights and noise (MacKay's fixed point).

    `basis` (N, K) and `eigenvalues` (K,) are the left singular vectors and squared singular values of the features.
    """
    num_rows = len(target)
    projected = np.square(basis.T @ target)
    outside = max(float(target @ target) - projected.sum(), 0.0)
    weight_precision, noise_precision = 1.0, 1.0
    for _ in range(MAX_STEPS):
        ratio = weight_precision / noise_precision
        effective = np.sum(eigenvalues / (eigenvalues + ratio))
        weight_square = max(np.sum(eigenvalues * projected / np.square(eigenvalues + ratio)), 1e-12)
        residual = max(np.sum(projected / np.square(1 + eigenvalues / ratio)) + outside, 1e-12)
        weight_precision = max(effective, 1e-12) / weight_square
        noise_precision = max(num_rows - effective, 1e-12) / residual
        if abs(weight_precision / noise_precision - ratio) <= TOLERANCE * ratio:
            break
    determinant = np.sum(np.log(weight_precision + noise_precision * eigenvalues))
    determinant += (num_features - len(eigenvalues)) * np.log(weight_precision)
    evidence = (
        num_features * np.log(weight_precision)
        + num_rows * np.log(noise_precision)
        - determinant
        - noise_precision * residual
        - weight_precision * weight_square
        - num_rows * np.log(2 * np.pi)
    )
    return float(evidence / (2 * num_rows))
