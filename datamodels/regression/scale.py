"""Means, spreads and ranges of columns and outcomes, from sums that are additive over row blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 8192  # rows at a time; counts up to it are exact in float32
BLOCK_VALUES = 1 << 25  # and, of wide rows, at most so many values


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over rows, about fixed origins; `a + b` has the rows of both.

    x_sum, xx (p,): of x and x².  y_sum, yy (T,).  low, high (p,), y_low, y_high (T,): ranges, not about the origins.
    """

    n: int
    x_origin: np.ndarray
    y_origin: np.ndarray
    x_sum: np.ndarray
    xx: np.ndarray
    y_sum: np.ndarray
    yy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    y_low: np.ndarray
    y_high: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            n=self.n + other.n,
            x_origin=self.x_origin,
            y_origin=self.y_origin,
            x_sum=self.x_sum + other.x_sum,
            xx=self.xx + other.xx,
            y_sum=self.y_sum + other.y_sum,
            yy=self.yy + other.yy,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            y_low=np.minimum(self.y_low, other.y_low),
            y_high=np.maximum(self.y_high, other.y_high),
        )


@dataclass(frozen=True, eq=False)
class Scale:
    """What turns raw rows into standardised ones: z_j = (x_j − mean_j) / sd_j and r0 = y − y_mean.

    Without a bias, mean and y_mean are 0. A constant column has sd 0. power (T,) = ‖r0‖² / n.
    constant (T,): the outcome has one value in all rows.
    """

    n: int
    mean: np.ndarray
    sd: np.ndarray
    y_mean: np.ndarray
    power: np.ndarray
    constant: np.ndarray

    @classmethod
    def of_coded(cls, origin: np.ndarray, unit: np.ndarray, mu: np.ndarray, norm: np.ndarray, n: int, T: int) -> Scale:
        """That of n rows of columns (x − origin) / unit with means mu and sd norm / n, and T outcomes not yet known."""
        return cls(n, origin + unit * mu, unit * norm / n, np.zeros(T), np.zeros(T), np.zeros(T, dtype=bool))

    def take(self, targets: np.ndarray, y: np.ndarray, use_bias: bool) -> None:
        """Fill in these targets from their outcomes y (B, n)."""
        self.constant[targets] = y.min(axis=1) == y.max(axis=1) if use_bias else ~y.any(axis=1)
        if use_bias:
            self.y_mean[targets] = y.mean(axis=1)
        self.power[targets] = ((y - self.y_mean[targets, None]) ** 2).mean(axis=1)

    @property
    def inverse_sd(self) -> np.ndarray:
        """1 / sd, and 0 for constant columns."""
        return np.divide(1.0, self.sd, out=np.zeros_like(self.sd), where=self.sd > 0)


def row_blocks(rows: np.ndarray, p: int) -> Iterator[np.ndarray]:
    """The rows, some at a time: as many as fit into memory easily when each has p columns."""
    step = max(1, min(BLOCK, BLOCK_VALUES // p))
    return (rows[first : first + step] for first in range(0, len(rows), step))


def scale_of(s: Sums, use_bias: bool) -> Scale:
    """Means, sd and power of these rows."""
    shift, y_shift = s.x_sum / s.n, s.y_sum / s.n
    sd = np.sqrt(np.maximum(s.xx / s.n - shift**2, 0.0))
    sd[s.low == s.high] = 0.0  # rounding may leave a constant real column a tiny sd
    centre, y_centre = (shift, y_shift) if use_bias else (np.zeros_like(shift), np.zeros_like(y_shift))
    return Scale(
        n=s.n,
        mean=s.x_origin + centre,
        sd=sd,
        y_mean=s.y_origin + y_centre,
        power=power(s, y_centre),
        constant=(s.y_low == s.y_high) if use_bias else (s.y_low == 0) & (s.y_high == 0),
    )


def power(s: Sums, y_centre: np.ndarray) -> np.ndarray:
    """‖y − y_centre‖² / n (T,), y and y_centre about the origin."""
    y_shift = s.y_sum / s.n
    return np.maximum(s.yy / s.n - 2 * y_shift * y_centre + y_centre**2, 0.0)
