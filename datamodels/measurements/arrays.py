"""Features and labels as measurements take them: numpy or torch, any dtype, checked once, read in float64 blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datamodels.errors import MeasurementError

BLOCK_BYTES = 1 << 26  # of float64, read at a time


def to_numpy(values: Any) -> np.ndarray:
    """A numpy array, or a torch tensor on any device, as a numpy array; bfloat16 becomes float32."""
    if hasattr(values, "detach"):  # a tensor says so itself, and torch need not be loaded to ask
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes counted from 0 in sorted order, only those present: codes (n,) and counts (c,), c ≥ 2."""

    codes: np.ndarray
    counts: np.ndarray

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    def indicator(self, rows: slice, weights: np.ndarray | None = None) -> Any:
        """(c, rows), sparse: 1, or the row's weight, where the row is of the class."""
        from scipy.sparse import csr_array

        codes = self.codes[rows]
        values = np.ones(len(codes)) if weights is None else weights
        return csr_array((values, (codes, np.arange(len(codes)))), shape=(self.num_classes, len(codes)))


def encode(labels: Any, where: str, name: str = "labels", *, num: int | None = None, least: int = 2) -> Labels:
    """Labels (n,) of any integers, text or booleans as classes 0, 1, …

    Raises MeasurementError unless there is one label for each of `num` examples and `least` classes at least.
    """
    values = to_numpy(labels)
    if values.ndim != 1:
        raise MeasurementError(
            f"{where}: expected {name} of shape (n,), one for each example; got {values.shape}; of logits or "
            f"one-hot rows take argmax(1)"
        )
    if num is not None and len(values) != num:
        raise MeasurementError(f"{where}: expected {num} {name}, one for each example; got {len(values)}")
    if values.dtype.kind not in "biufUSO":
        raise MeasurementError(f"{where}: expected {name} that are integers or text; got {values.dtype}")
    if values.dtype.kind == "O":
        missing = _missing(values)
        if missing.any():
            raise MeasurementError(
                f"{where}: expected {name} that name classes; got {values[missing][0]} at position "
                f"{int(missing.argmax())}, {int(missing.sum())} times in all; leave out examples without one"
            )
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        bad = int(np.argmax(~np.isfinite(values) | (values != np.floor(values))))
        raise MeasurementError(
            f"{where}: expected {name} that name classes; got {values[bad]} at position {bad}; number the classes, and "
            f"leave out examples without one"
        )
    try:
        _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    except TypeError as error:
        raise MeasurementError(f"{where}: {name} of several types cannot be told apart ({error})") from None
    if len(counts) < least:
        raise MeasurementError(
            f"{where}: expected at least {least} classes among the {name}; got {len(counts)}"
            + (f", {values[0]!r} {len(values)} times" if len(values) else "")
        )
    return Labels(codes.astype(np.intp), counts.astype(np.float64))


def _missing(values: np.ndarray) -> np.ndarray:
    """(n,), bool: which objects are not equal to themselves, as NaN, NaT and pandas.NA are not."""

    def one(value: Any) -> bool:
        try:
            return bool(value != value)
        except TypeError:  # pandas.NA says neither yes nor no
            return True

    return np.array([one(value) for value in values], bool)


def check_finite(values: np.ndarray, where: str, name: str) -> np.ndarray:
    """The values (n, …) as they are; MeasurementError that says of how many examples some are not finite."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if bad.any():
        raise MeasurementError(
            f"{where}: {name} of {int(bad.sum())} of {len(values)} examples are not finite, first of example "
            f"{int(bad.argmax())}; training may have diverged, or a float16 model overflowed: run that in float32"
        )
    return values


@dataclass(frozen=True, eq=False)
class Features:
    """Checked features (n, d) of any dtype; blocks come as (values · scale − mean) · factor in float64.

    scale: a power of two that brings the largest value near 1, so that squares neither overflow nor vanish.
    """

    values: np.ndarray
    scale: float
    mean: np.ndarray | None = None
    factor: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of rows, each with its slice of the n rows."""
        n, d = self.shape
        step = max(1, BLOCK_BYTES // (8 * d))
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            yield part, self._block(self.values[part], slice(None))

    def columns(self) -> Iterator[np.ndarray]:
        """Blocks of columns, (n, some)."""
        n, d = self.shape
        step = max(1, BLOCK_BYTES // (8 * n))
        for first in range(0, d, step):
            part = slice(first, first + step)
            yield self._block(self.values[:, part], part)

    def whole(self) -> np.ndarray:
        """All of it, (n, d) float64."""
        return self._block(self.values, slice(None))

    def centred(self) -> Features:
        """With every column's mean taken off; columns that do not vary become 0.

        A column whose values differ by no more than a few roundings of its largest counts as one that does not vary.
        """
        n, d = self.shape
        total, low, high = np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)
        for _, block in self.rows():
            total += block.sum(axis=0)
            low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        varies = high - low > 8 * np.finfo(np.float64).eps * np.maximum(-low, high)
        return replace(self, mean=total / n, factor=None if varies.all() else varies.astype(np.float64))

    def standardised(self) -> Features:
        """Centred, and every column that varies of population standard deviation 1."""
        n, d = self.shape
        centred = self.centred()
        squares = np.zeros(d)
        for _, block in centred.rows():
            squares += np.einsum("ij,ij->j", block, block)
        varies = squares > 0
        return replace(centred, factor=np.where(varies, 1 / np.sqrt(np.where(varies, squares, 1) / n), 0))

    def _block(self, values: np.ndarray, columns: slice) -> np.ndarray:
        block = values.astype(np.float64)
        if self.scale != 1:
            block *= self.scale
        if self.mean is not None:
            block -= self.mean[columns]
        if self.factor is not None:
            block *= self.factor[columns]
        return block


def check_features(features: Any, where: str, name: str = "features") -> Features:
    """Features (n, d), n ≥ 2, d ≥ 1, of real finite numbers.

    Raises MeasurementError for anything else; it names the first row that is not finite.
    """
    values = to_numpy(features)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise MeasurementError(
            f"{where}: expected {name} of shape (n, d) with at least two examples; got {values.shape}; pool or flatten "
            f"what has more axes"
        )
    if values.dtype.kind not in "biuf":
        raise MeasurementError(f"{where}: expected {name} of real numbers; got {values.dtype}")
    largest = 0.0
    step = max(1, BLOCK_BYTES // (8 * values.shape[1]))
    for first in range(0, len(values), step):
        block = values[first : first + step]
        low, high = float(block.min()), float(block.max())
        if not math.isfinite(high - low) and not np.isfinite(block).all():
            row = first + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise MeasurementError(
                f"{where}: {name} of example {row} are not finite; a float16 model may have overflowed: run it in "
                f"float32 or bfloat16, or leave these examples out"
            )
        largest = max(largest, -low, high)
    exponent = math.frexp(largest)[1] if largest else 0
    return Features(values, scale=math.ldexp(1.0, -max(-1000, min(1000, exponent))))
