"""Histograms of all pairs' correlations, those of one class and those of two, for PARC."""

from __future__ import annotations

import numba
import numpy as np

FINE, COARSE = 1 << 22, 1 << 17  # bins on [−1, 1]; coarse ones stay in a core's cache
MANY = 5_000  # examples, beyond which the coarse ones tell enough pairs apart
PRODUCTS = 1 << 20  # held at a time


def histograms(units: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs i < j of rows have which inner product: (bins + 1,) within a class, and between classes.

    units: (n, d), rows of length 1 or 0. Bin b is centred on 2b/bins − 1, so that 0 and ±1 do not lie on an edge.
    """
    n = len(units)
    bins = FINE if n <= MANY else COARSE
    same, different = np.zeros(bins + 1, np.int64), np.zeros(bins + 1, np.int64)
    step = max(1, min(n, PRODUCTS // n))
    for first in range(0, n, step):
        products = units[first : first + step] @ units[first:].T
        _count(products, codes[first:], same, different)
    return same, different


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _count(products: np.ndarray, codes: np.ndarray, same: np.ndarray, different: np.ndarray) -> None:
    """Row i of products (m, r) is example i, column j example j; only j > i counts."""
    half = (len(same) - 1) // 2
    for i in range(products.shape[0]):
        for j in range(i + 1, products.shape[1]):
            b = int(min(max(products[i, j], -1.0), 1.0) * half + half + 0.5)
            if codes[i] == codes[j]:
                same[b] += 1
            else:
                different[b] += 1
