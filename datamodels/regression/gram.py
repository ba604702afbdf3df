"""Sums of products that all targets share, exact for 0/1 columns and additive over row blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from datamodels.regression.scale import Scale, Sums, power, row_blocks, scale_of, sums


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows of products, about the origins of `sums`; `a + b` has the rows of both.

    xx (p, p), xy (p, T): float64.
    """

    sums: Sums
    xx: np.ndarray
    xy: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sums + other.sums, self.xx + other.xx, self.xy + other.xy)


@dataclass(frozen=True, eq=False)
class Gram:
    """The least-squares part of the problem, in centred outcomes and centred columns divided by sd.

    gram (p, p) = ZᵀZ / n, xy (T, p) = Zᵀr0 / n, where Z and r0 are those of `scale`. A constant column has zero rows.
    """

    scale: Scale
    gram: np.ndarray
    xy: np.ndarray


def moments(x: np.ndarray, y: np.ndarray, rows: np.ndarray, x_origin: np.ndarray, y_origin: np.ndarray) -> Moments:
    """Moments of x[rows], y[rows] about the origins; the products of bool columns are exact counts."""
    p, T = x.shape[1], y.shape[1]
    xx, xy = np.zeros((p, p)), np.zeros((p, T))
    for block in row_blocks(rows, max(p, T)):
        raw, out = x[block], y[block] - y_origin
        columns = raw.astype(np.float64)
        columns -= x_origin
        if x.dtype == bool:
            counts = raw.astype(np.float32)
            xx += counts.T @ counts
        else:
            xx += columns.T @ columns
        xy += columns.T @ out
    return Moments(sums(x, y, rows, x_origin, y_origin), xx, xy)


def standardise(m: Moments, use_bias: bool, like: Gram | None = None) -> Gram:
    """Gram of these moments in their own means and sd, or in those of `like` (validation rows)."""
    s = m.sums
    scale = scale_of(s, use_bias) if like is None else like.scale
    shift, y_shift = s.x_sum / s.n, s.y_sum / s.n
    if like is None and use_bias:
        centre, y_centre = shift, y_shift
    elif use_bias:
        centre, y_centre = scale.mean - s.x_origin, scale.y_mean - s.y_origin
    else:
        centre, y_centre = np.zeros_like(shift), np.zeros_like(y_shift)
    inverse = scale.inverse_sd

    # sum (x−c)(x−c)ᵀ / n = xx/n − shift cᵀ − c shiftᵀ + c cᵀ; with c = shift it is xx/n − c cᵀ
    gram = m.xx / s.n
    gram -= np.outer(shift, centre)
    gram -= np.outer(centre, shift - centre)
    gram *= inverse[:, None]
    gram *= inverse
    xy = m.xy / s.n
    xy -= np.outer(shift, y_centre)
    xy -= np.outer(centre, y_shift - y_centre)
    xy *= inverse[:, None]
    if like is not None:
        scale = replace(scale, n=s.n, power=power(s, y_centre))
    return Gram(scale=scale, gram=gram, xy=np.ascontiguousarray(xy.T))
