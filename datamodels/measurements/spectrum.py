"""Singular values of features, and the labels of each class in their left singular vectors.

With F = U diag(√sigma) Vᵀ and y the 0/1 indicator of a class, LogME and the H-score need no more of F than sigma and
(Uᵀy)². The Gram matrix of the shorter side gives both in one pass over F; it squares the condition number, so that a
caller for whom the smallest directions matter takes `exact`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from datamodels.measurements.arrays import Features, Labels

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is left of features (n, d) and labels.

    sigma: (k,) squared singular values that are not 0, ascending.  power: (c, k), (u_iᵀ y)² for each class.
    rest: (c,) ‖y‖² − Σ_i power.  smallest: the least of all min(n, d) squared singular values, not below 0.
    """

    n: int
    d: int
    sigma: np.ndarray
    power: np.ndarray
    rest: np.ndarray
    smallest: float


def by_gram(features: Features, labels: Labels) -> Spectrum:
    """From the eigenvectors of FᵀF or FFᵀ; sigma has an error of some roundings of the largest."""
    n, d = features.shape
    if n > d:
        gram = np.zeros((d, d))
        sums = np.zeros((labels.num_classes, d))
        for rows, block in features.rows():
            gram += block.T @ block
            sums += labels.indicator(rows) @ block
    else:
        gram = np.zeros((n, n))
        for block in features.columns():
            gram += block @ block.T
    sigma, vectors = np.linalg.eigh(gram)
    keep = sigma > EPS * max(sigma[-1], 0)
    smallest = max(float(sigma[0]), 0.0)
    if n > d:
        power = (sums @ vectors[:, keep]) ** 2 / sigma[keep]
        rest = labels.counts - power.sum(axis=1)
    else:
        every = (labels.indicator(slice(None)) @ vectors) ** 2
        power, rest = every[:, keep], every[:, ~keep].sum(axis=1)
    return Spectrum(n, d, sigma[keep], power, rest, smallest)


def exact(features: Features, labels: Labels) -> Spectrum:
    """From orthogonal transformations of F itself: some ten times slower, and right in directions of any size.

    Singular values up to max(n, d) roundings of the largest count as 0, as in numpy's matrix_rank.
    """
    n, d = features.shape
    if n > d:
        # F and the labels Y in one triangle: [F Y] = Q [[A, B], [0, C]], so that Uᵀy is that of A and B, and what F
        # cannot reach of y is C's column.
        triangle = np.zeros((0, d + labels.num_classes))
        for stacked in _stacks(features, labels, triangle.shape[1]):
            triangle = np.asarray(np.linalg.qr(np.vstack([triangle, stacked]), mode="r"))
        left, values, _ = np.linalg.svd(triangle[:d, :d], full_matrices=False)
        every = (triangle[:d, d:].T @ left) ** 2
        beyond = (triangle[d:, d:] ** 2).sum(axis=0)
    else:
        left, values, _ = np.linalg.svd(features.whole(), full_matrices=False)
        every = (labels.indicator(slice(None)) @ left) ** 2
        beyond = np.zeros(labels.num_classes)
    keep = values > max(n, d) * EPS * values[0]
    order = np.arange(len(values))[keep][::-1]
    rest = every[:, ~keep].sum(axis=1) + beyond
    return Spectrum(n, d, values[order] ** 2, every[:, order], rest, float(values[-1]) ** 2)


def _stacks(features: Features, labels: Labels, width: int) -> Iterator[np.ndarray]:
    """[F Y] in stacks of at least four times its width of rows, for which one more triangle is little work."""
    parts: list[np.ndarray] = []
    for rows, block in features.rows():
        parts.append(np.hstack([block, labels.indicator(rows).T.toarray()]))
        if sum(map(len, parts)) >= 4 * width:
            yield np.vstack(parts)
            parts = []
    if parts:
        yield np.vstack(parts)
