"""Products with the columns: the same to the bit for any number of threads and whatever other targets there are.

With 0/1 columns they are exact, in int8. A real matrix is written in fixed point: signed digits to the base 256, one
power of two per row; each digit's product with a 0/1 matrix is an integer that int32 holds, and sums of integers do not
depend on their order. What is lost is the rounding to 2**-46 of a row's largest value, once. Processors that multiply
int8 matrices do this several times faster than a float32 product would be. Products with real columns are plain loops:
BLAS rounds a row differently among others.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    import torch

LIMBS = 6  # nothing less than float64 has
BITS = 8 * LIMBS - 2  # of a row's largest value; one more would overflow the highest digit
ROWS = 1 << 16  # summed at a time: 2**16 · 2**7 is far from the end of int32


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, int8 (m, k) and (k, n) to int32 (m, n), exactly; k ≤ ROWS."""
    import torch

    if not _int8_is_exact():
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32)
    if 1 in a.shape or 1 in b.shape:  # torch 2.13 reads beyond one that is not laid out as a new one
        a, b = a.copy(order="C"), b.copy(order="C")
    return torch._int_mm(_tensor(a), _tensor(b)).numpy()


@cache
def _int8_is_exact() -> bool:
    """Whether this processor's int8 product neither saturates nor wraps; some older ones do on the way."""
    import torch

    a = np.resize(np.array([127, -128, 1, 127, -1], dtype=np.int8), (33, 130))
    b = np.resize(np.array([127, 127, -128, 1, 127, -128, -1], dtype=np.int8), (130, 65))
    try:
        found = torch._int_mm(_tensor(a), _tensor(b)).numpy()
    except (RuntimeError, AttributeError):
        return False
    return bool((found == a.astype(np.int64) @ b.astype(np.int64)).all())


def _tensor(a: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(a)


def limbs(values: np.ndarray, count: int = LIMBS) -> tuple[np.ndarray, np.ndarray]:
    """Fixed point of values (m, k): digits (count · m, k) int8, lowest first, and the unit (m,) of the lowest."""
    values = np.ascontiguousarray(values, dtype=np.float64)
    digits = np.empty((count, *values.shape), dtype=np.int8)
    unit = np.empty(len(values))
    _digits(values, digits, unit)
    return digits.reshape(-1, values.shape[1]), unit


def join(products: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(m, n) float64 from the products (limbs · m, n) of the digits."""
    out = np.empty((len(unit), products.shape[1]))
    _join(np.ascontiguousarray(products).reshape(-1, *out.shape), unit, out)
    return out


def times_columns(values: np.ndarray, x: np.ndarray, count: int = LIMBS) -> np.ndarray:
    """values (m, k) float64 @ x (k, n): (m, n) float64; where x is bool, with `count` digits of each value."""
    if x.dtype != bool:
        return _times_real(np.ascontiguousarray(values, dtype=np.float64), x)
    digits, unit = limbs(values, count)
    if len(x) <= ROWS:
        return join(matmul(digits, x.view(np.int8)), unit)
    total: np.ndarray = np.zeros((len(digits), x.shape[1]), dtype=np.int64)
    for first in range(0, len(x), ROWS):
        some = slice(first, first + ROWS)
        total += matmul(np.ascontiguousarray(digits[:, some]), x[some].view(np.int8))
    return join(total, unit)


def rows_times(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """x (k, n) @ values (m, n)ᵀ float64: (m, k) float64."""
    if x.dtype != bool:
        return _real_times(x, np.ascontiguousarray(values, dtype=np.float64))
    digits, unit = limbs(values)
    if x.shape[1] <= ROWS:
        return join(matmul(digits, x.view(np.int8).T), unit)
    total: np.ndarray = np.zeros((len(digits), len(x)), dtype=np.int64)
    for first in range(0, x.shape[1], ROWS):
        some = slice(first, first + ROWS)
        columns = np.ascontiguousarray(x[:, some]).view(np.int8)
        total += matmul(np.ascontiguousarray(digits[:, some]), columns.T)
    return join(total, unit)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _digits(values, digits, unit):  # type: ignore[no-untyped-def]
    count, m, k = digits.shape
    for i in range(m):
        top = 0.0
        for j in range(k):
            top = max(top, abs(values[i, j]))
        unit[i] = 1.0
        if top > 0.0:
            unit[i] = 2.0 ** max(np.ceil(np.log2(top)) - (8 * count - 2), -1000.0)
        scale = 1.0 / unit[i]
        for j in range(k):
            left = np.int64(np.rint(values[i, j] * scale))
            for limb in range(count):
                digit = ((left + 128) & 255) - 128
                digits[limb, i, j] = digit
                left = (left - digit) >> 8


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _join(products, unit, out):  # type: ignore[no-untyped-def]
    highest = len(products) - 1
    for i in range(out.shape[0]):
        row = out[i]
        top = products[highest, i]
        for j in range(len(row)):
            row[j] = np.float64(top[j])
        for limb in range(highest - 1, 0, -1):
            digit = products[limb, i]
            for j in range(len(row)):
                row[j] = row[j] * 256.0 + np.float64(digit[j])
        lowest, scale = products[0, i], unit[i]
        if highest > 0:
            for j in range(len(row)):
                row[j] = (row[j] * 256.0 + np.float64(lowest[j])) * scale
        else:
            for j in range(len(row)):
                row[j] *= scale


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _times_real(values, x):  # type: ignore[no-untyped-def]
    out = np.zeros((len(values), x.shape[1]))
    for i in range(len(x)):
        row = x[i]
        for t in range(len(values)):
            value, into = values[t, i], out[t]
            for j in range(len(row)):
                into[j] += value * np.float64(row[j])
    return out


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _real_times(x, values):  # type: ignore[no-untyped-def]
    out = np.empty((len(values), len(x)))
    whole = x.shape[1] - x.shape[1] % 8
    sums = np.empty(8)
    for i in range(len(x)):
        row = x[i]
        for t in range(len(values)):
            own = values[t]
            sums[:] = 0.0
            for j in range(0, whole, 8):
                for a in range(8):
                    sums[a] += np.float64(row[j + a]) * own[j + a]
            total = 0.0
            for j in range(whole, len(row)):
                total += np.float64(row[j]) * own[j]
            for a in range(8):
                total += sums[a]
            out[t, i] = total
    return out
