"""Sums of products that all targets share, exact for 0/1 columns and additive over row blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 8192  # rows per matrix product; counts up to it are exact in float32


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows of x, y and their products, about fixed origins; `a + b` has the rows of both.

    x_sum (p,), xx (p, p), y_sum (T,), xy (p, T), yy (T,): float64.  low, high: (p,), range of each column;
    y_low, y_high: (T,), range of each outcome.
    """

    n: int
    x_origin: np.ndarray
    y_origin: np.ndarray
    x_sum: np.ndarray
    xx: np.ndarray
    y_sum: np.ndarray
    xy: np.ndarray
    yy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    y_low: np.ndarray
    y_high: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            n=self.n + other.n,
            x_origin=self.x_origin,
            y_origin=self.y_origin,
            x_sum=self.x_sum + other.x_sum,
            xx=self.xx + other.xx,
            y_sum=self.y_sum + other.y_sum,
            xy=self.xy + other.xy,
            yy=self.yy + other.yy,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            y_low=np.minimum(self.y_low, other.y_low),
            y_high=np.maximum(self.y_high, other.y_high),
        )


@dataclass(frozen=True, eq=False)
class Gram:
    """The least-squares part of the problem, in centred outcomes and centred columns divided by sd.

    gram (p, p) = ZᵀZ / n, xy (T, p) = Zᵀr0 / n, power (T,) = ‖r0‖² / n, where z_j = (x_j − mean_j) / sd_j and
    r0 = y − y_mean. Without a bias, mean and y_mean are 0. A constant column has sd 0 and zero rows here.
    constant (T,): the outcome has one value in all rows.
    """

    n: int
    mean: np.ndarray
    sd: np.ndarray
    y_mean: np.ndarray
    gram: np.ndarray
    xy: np.ndarray
    power: np.ndarray
    constant: np.ndarray


def origins(x: np.ndarray, y: np.ndarray, use_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points to measure from: near the data, so that no digits cancel; 0 for counts and without bias."""
    if not use_bias:
        return np.zeros(x.shape[1]), np.zeros(y.shape[1])
    x_origin = np.zeros(x.shape[1]) if x.dtype == bool else x.mean(axis=0, dtype=np.float64)
    return x_origin, y.mean(axis=0, dtype=np.float64)


def moments(x: np.ndarray, y: np.ndarray, rows: np.ndarray, x_origin: np.ndarray, y_origin: np.ndarray) -> Moments:
    """Moments of x[rows], y[rows] about the origins; the products of bool columns are exact counts."""
    p, T = x.shape[1], y.shape[1]
    xx, xy, x_sum = np.zeros((p, p)), np.zeros((p, T)), np.zeros(p)
    y_sum, yy = np.zeros(T), np.zeros(T)
    low, high = np.full(p, np.inf), np.full(p, -np.inf)
    y_low, y_high = np.full(T, np.inf), np.full(T, -np.inf)
    for first in range(0, len(rows), BLOCK):
        block = rows[first : first + BLOCK]
        raw, out = x[block], y[block].astype(np.float64)
        y_low, y_high = np.minimum(y_low, out.min(axis=0)), np.maximum(y_high, out.max(axis=0))
        out -= y_origin
        low, high = np.minimum(low, raw.min(axis=0)), np.maximum(high, raw.max(axis=0))
        columns = raw.astype(np.float64) - x_origin
        if x.dtype == bool:
            counts = raw.astype(np.float32)
            xx += counts.T @ counts
        else:
            xx += columns.T @ columns
        xy += columns.T @ out
        x_sum += columns.sum(axis=0)
        y_sum += out.sum(axis=0)
        yy += np.einsum("it,it->t", out, out)
    return Moments(
        n=len(rows),
        x_origin=x_origin,
        y_origin=y_origin,
        x_sum=x_sum,
        xx=xx,
        y_sum=y_sum,
        xy=xy,
        yy=yy,
        low=low,
        high=high,
        y_low=y_low,
        y_high=y_high,
    )


def standardise(m: Moments, use_bias: bool, like: Gram | None = None) -> Gram:
    """Gram of these moments in their own means and sd, or in those of `like` (validation rows)."""
    shift = m.x_sum / m.n
    if like is None:
        sd = np.sqrt(np.maximum(np.diagonal(m.xx) / m.n - shift**2, 0.0))
        sd[m.low == m.high] = 0.0  # rounding may leave a constant real column a tiny sd
        centre = shift if use_bias else np.zeros_like(shift)
        y_centre = m.y_sum / m.n if use_bias else np.zeros_like(m.y_sum)
    else:
        sd, centre, y_centre = like.sd, like.mean - m.x_origin, like.y_mean - m.y_origin
        if not use_bias:
            centre, y_centre = np.zeros_like(shift), np.zeros_like(m.y_sum)
    inverse = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    y_shift = m.y_sum / m.n

    # sum (x−c)(x−c)ᵀ / n = xx/n − shift cᵀ − c shiftᵀ + c cᵀ; with c = shift it is xx/n − c cᵀ
    gram = m.xx / m.n
    gram -= np.outer(shift, centre)
    gram -= np.outer(centre, shift - centre)
    gram *= inverse[:, None]
    gram *= inverse
    xy = m.xy / m.n
    xy -= np.outer(shift, y_centre)
    xy -= np.outer(centre, y_shift - y_centre)
    xy *= inverse[:, None]
    power = np.maximum(m.yy / m.n - 2 * y_shift * y_centre + y_centre**2, 0.0)
    constant = (m.y_low == m.y_high) if use_bias else (m.y_low == 0) & (m.y_high == 0)
    return Gram(
        n=m.n,
        mean=m.x_origin + centre,
        sd=sd,
        y_mean=m.y_origin + y_centre,
        gram=gram,
        xy=np.ascontiguousarray(xy.T),
        power=power,
        constant=constant,
    )
