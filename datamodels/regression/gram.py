"""Products of columns that all targets share: exact integers for 0/1 columns, and additive over rows.

Columns are coded first, x' = (x − origin) / unit. With a bias 0 and 1 become −1 and 1, so that products of independent
columns stay small; without one they stay 0 and 1. Real columns are standardised over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np

from datamodels.regression import products

TILE = 1024  # columns of one product


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns in the order of the fit, training rows first, and their sums over either.

    x (n, p): bool, or float64 coded; x' = (x − origin) / unit for raw x.  x_val (p, n_val): x' of the validation rows,
    int8 or float64.  sums_train, sums_val, squares_train, squares_val (p,): of x' and x'².  sd_train, sd_full (p,):
    population sd of x', 0 for constant columns.
    """

    x: np.ndarray
    x_val: np.ndarray
    num_train: int
    origin: np.ndarray
    unit: np.ndarray
    sums_train: np.ndarray
    sums_val: np.ndarray
    squares_train: np.ndarray
    squares_val: np.ndarray
    sd_train: np.ndarray
    sd_full: np.ndarray


@dataclass(frozen=True, eq=False)
class Gram:
    """X'ᵀX' of the training rows, and of all rows, (p, p) int16, float32 or float64; float32 holds integers, exactly.

    diag_train, diag_full (p,), float64: the diagonals, which int16 may not hold.
    """

    train: np.ndarray
    full: np.ndarray
    diag_train: np.ndarray
    diag_full: np.ndarray


def code_columns(x: np.ndarray, train: np.ndarray, val: np.ndarray, use_bias: bool) -> Columns:
    """The columns of x (n, p) in these rows."""
    num_train, p = len(train), x.shape[1]
    rows = np.concatenate([train, val])
    if x.dtype == bool:
        own = x[rows]
        counts = np.stack([own[:num_train].sum(axis=0, dtype=np.int64), own[num_train:].sum(axis=0, dtype=np.int64)])
        sizes = np.array([[num_train], [len(val)]])
        coded = 2 * counts - sizes if use_bias else counts
        squares = np.broadcast_to(sizes, counts.shape) if use_bias else counts
        scale = 2.0 if use_bias else 1.0
        shares = np.stack([counts[0] / num_train, counts.sum(axis=0) / len(rows)])
        sd = scale * np.sqrt(shares * (1 - shares))
        return Columns(
            x=own,
            x_val=_coded(own[num_train:], use_bias),
            num_train=num_train,
            origin=np.full(p, 0.5 if use_bias else 0.0),
            unit=np.full(p, 0.5 if use_bias else 1.0),
            sums_train=coded[0].astype(np.float64),
            sums_val=coded[1].astype(np.float64),
            squares_train=squares[0].astype(np.float64),
            squares_val=squares[1].astype(np.float64),
            sd_train=sd[0],
            sd_full=sd[1],
        )
    raw = x[rows].astype(np.float64)
    origin = raw.mean(axis=0) if use_bias else np.zeros(p)
    raw -= origin
    unit = np.sqrt((raw**2).mean(axis=0))
    unit[unit == 0] = 1.0
    raw /= unit
    parts = (raw[:num_train], raw[num_train:])
    sums = [part.sum(axis=0) for part in parts]
    sd = []
    for part in (parts[0], raw):
        spread = part.std(axis=0)
        spread[part.min(axis=0) == part.max(axis=0)] = 0.0  # rounding may leave a constant column a tiny one
        sd.append(spread)
    power = [(part**2).sum(axis=0) for part in parts]
    x_val = np.ascontiguousarray(parts[1].T)
    return Columns(raw, x_val, num_train, origin, unit, *sums, *power, *sd)


def _coded(x: np.ndarray, use_bias: bool) -> np.ndarray:
    out = x.view(np.int8).T.copy()  # always: one row or one column would be x itself
    if use_bias:
        out *= 2
        out -= 1
    return out


def multiply(columns: Columns, workers: int) -> Gram:
    """Both matrices; the same to the bit for any number of workers."""
    x, n_train, (n, p) = columns.x, columns.num_train, columns.x.shape
    diag_train, diag_full = columns.squares_train, columns.squares_train + columns.squares_val
    if x.dtype != bool:
        train, full = np.empty((p, p)), np.empty((p, p))

        def real(first: int) -> None:
            tile = slice(first, first + TILE)
            train[tile, first:] = x[:n_train, tile].T @ x[:n_train, first:]
            full[tile, first:] = train[tile, first:] + x[n_train:, tile].T @ x[n_train:, first:]
            train[first:, tile], full[first:, tile] = train[tile, first:].T, full[tile, first:].T

        _in_parallel(real, range(0, p, TILE), workers)
        return Gram(train, full, diag_train, diag_full)

    scale = 1 if columns.unit[0] == 1.0 else 2  # x' = scale · x − shift
    shift = scale - 1
    counts = [((sums + shift * size) / scale).astype(np.int64) for sums, size in (
        (columns.sums_train, n_train),
        (columns.sums_val, n - n_train),
    )]  # fmt: skip
    kinds: list[type] = [np.int16, np.float32] if n < 1 << 24 else [np.float64]
    for kind in kinds:
        train, full = np.empty((p, p), dtype=kind), np.empty((p, p), dtype=kind)
        largest = np.zeros(-(-p // TILE))

        def whole(first: int, train=train, full=full, largest=largest) -> None:  # type: ignore[no-untyped-def]
            tile = slice(first, first + TILE)
            tiles = []
            for part in (x[:n_train], x[n_train:]):
                blocks = (part[at : at + products.ROWS].view(np.int8) for at in range(0, len(part), products.ROWS))
                product = None
                for block in blocks:
                    more = products.matmul(block[:, tile].T, block[:, first:])
                    product = more if product is None else np.add(product, more, out=product)
                tiles.append(product)
            largest[first // TILE] = _place(
                tiles[0], tiles[1], counts[0], counts[1], n_train, n - n_train, scale, shift, first, train, full
            )

        _in_parallel(whole, range(0, p, TILE), workers)
        if kind is not np.int16 or largest.max() <= np.iinfo(np.int16).max:
            break
    return Gram(train, full, diag_train, diag_full)


def _in_parallel(task: Callable[[int], None], items: range, workers: int) -> None:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(task, items):
            pass


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _place(counts_t, counts_v, s_t, s_v, n_t, n_v, scale, shift, first, train, full):  # type: ignore[no-untyped-def]
    """Write a tile of counts, coded, and its mirror image; the largest entry beside the diagonal."""
    height, width = counts_t.shape
    largest = 0
    small = train.itemsize == 2
    block = 64
    square, cross = np.int32(scale * scale), np.int32(scale * shift)
    s_t32, s_v32 = (cross * s_t[first:]).astype(np.int32), (cross * s_v[first:]).astype(np.int32)
    near = np.empty((block, block), dtype=train.dtype)
    for i in range(height):
        base_t = np.int32(shift * n_t) - s_t32[i]
        base_v = np.int32(shift * n_v) - s_v32[i]
        row_t, row_v, into_t, into_f = counts_t[i], counts_v[i], train[first + i], full[first + i]
        top = np.int32(0)
        for j in range(i + 1, width):
            t = square * row_t[j] + base_t - s_t32[j]
            v = square * row_v[j] + base_v - s_v32[j]
            top = max(top, abs(t), abs(v), abs(t + v))
            into_t[first + j] = t
            into_f[first + j] = t + v
        largest = max(largest, np.int64(top))
        into_t[first + i], into_f[first + i] = 0, 0
        if not small:
            t = square * row_t[i] + base_t - s_t32[i]
            into_t[first + i] = t
            into_f[first + i] = t + square * row_v[i] + base_v - s_v32[i]
    for matrix in (train, full):
        for i0 in range(0, height, block):
            for j0 in range(i0, width, block):
                rows, columns = min(block, height - i0), min(block, width - j0)
                for i in range(rows):
                    for j in range(columns):
                        near[j, i] = matrix[first + i0 + i, first + j0 + j]
                for j in range(columns):
                    for i in range(min(rows, j0 + j - i0) if j0 == i0 else rows):
                        matrix[first + j0 + j, first + i0 + i] = near[j, i]
    return largest
