"""The regression problem: columns, outcomes, and which rows choose the weights and which the lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datamodels.errors import RegressionError
from datamodels.regression import memory
from datamodels.regression.columns import (
    BLOCK_BYTES,
    Groups,
    Part,
    StoreSource,
    Targets,
    chunks,
    penalties,
    split_names,
    with_penalties,
)

if TYPE_CHECKING:
    from datamodels.regression.beton import Beton
    from datamodels.store import Store

# Of the rows, where nobody says num_val. On digits .1 cost .014 LDS at 500 rows, .005 at 1,000 and .001 at 4,000;
# .3 was no better beyond .0015.
VAL_SHARE = 0.2
LARGEST = 1e38  # value of a column or an outcome; float32 ends at 3.4e38


@dataclass(frozen=True, eq=False)
class Problem:
    """`n` rows of `p` columns and `T` outcomes, split into rows that fit and rows that choose the lambda.

    x: (n, p), bool or real.  y: (n, T), float.  train, val: positions in 0..n-1, disjoint, ascending.
    columns, targets: p and T names.  rows: (n,), what a row is called in messages (its number in the store).
    penalty: (p,) or (p, T), how strongly each column is shrunk, 0 for not at all; None: 1 everywhere.
    offset: (n, T), a part of the outcomes that is given and not fitted; None: 0.

    Raises RegressionError for shapes that do not fit together and for values that are not finite.
    """

    x: np.ndarray
    y: np.ndarray
    train: np.ndarray
    val: np.ndarray
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    rows: np.ndarray
    seed: int = 0
    penalty: np.ndarray | None = None
    offset: np.ndarray | None = None

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if x.ndim != 2 or y.ndim != 2:
            raise RegressionError(
                f"columns and outcomes must be matrices, one row per run; got shapes {x.shape} and "
                f"{y.shape}; reshape each row to a vector first"
            )
        if len(x) != len(y) or len(x) != len(self.rows):
            raise RegressionError(
                f"columns have {len(x)} rows, outcomes {len(y)}, row numbers {len(self.rows)}: they "
                f"must be the same runs in the same order"
            )
        if x.shape[1] == 0 or y.shape[1] == 0:
            raise RegressionError(f"nothing to fit: {x.shape[1]} columns and {y.shape[1]} targets")
        if x.dtype.kind not in "biuf":
            raise RegressionError(f"columns must be bool or real numbers, got dtype {x.dtype}; encode them as numbers")
        if y.dtype.kind not in "biuf":
            raise RegressionError(f"outcomes must be real numbers, got dtype {y.dtype}")
        for what, names, width in (
            ("column", self.columns, x.shape[1]),
            ("target", self.targets, y.shape[1]),
        ):
            if len(names) != width:
                raise RegressionError(f"{len(names)} {what} names for {width} {what}s")
        _refuse_nonfinite(x, self.rows, self.columns, "column")
        _refuse_nonfinite(y, self.rows, self.targets, "target")
        if self.penalty is not None:
            self._check_penalty(self.penalty)
        if self.offset is not None:
            if self.offset.shape != y.shape or self.offset.dtype.kind not in "biuf":
                raise RegressionError(
                    f"offset: expected real numbers of the outcomes' shape {y.shape}, got {self.offset.dtype} of "
                    f"{self.offset.shape}"
                )
            _refuse_nonfinite(self.offset, self.rows, self.targets, "offset of target")
        both = np.concatenate([self.train, self.val])
        if len(self.train) < 2 or len(self.val) < 1:
            raise RegressionError(
                f"{len(self.train)} training and {len(self.val)} validation rows: no split possible; "
                f"at least 2 and 1 are needed"
            )
        if both.min() < 0 or both.max() >= len(x) or len(np.unique(both)) != len(both):
            raise RegressionError(
                f"training and validation rows must be different positions in 0..{len(x) - 1}, each used once"
            )

    def penalty_of(self, targets: slice) -> np.ndarray:
        """(p, B), float64: how strongly these targets' columns are shrunk."""
        p, width = self.x.shape[1], len(range(*targets.indices(self.y.shape[1])))
        if self.penalty is None:
            return np.ones((p, width))
        chosen = self.penalty[:, targets] if self.penalty.ndim == 2 else self.penalty[:, None]
        return np.broadcast_to(chosen, (p, width)).astype(np.float64)

    def outcomes(self, rows: np.ndarray | slice, targets: slice) -> np.ndarray:
        """(rows, B), float64: outcomes less their offsets, which is what the columns are to explain."""
        y = self.y[rows, targets].astype(np.float64)
        return y if self.offset is None else y - self.offset[rows, targets]

    def _check_penalty(self, penalty: np.ndarray) -> None:
        p, T = self.x.shape[1], self.y.shape[1]
        if penalty.shape not in ((p,), (p, T)) or penalty.dtype.kind not in "biuf":
            raise RegressionError(
                f"penalty: expected real numbers of shape ({p},), one per column, or ({p}, {T}), one per column and "
                f"target; got {penalty.dtype} of {penalty.shape}"
            )
        bad = ~(np.isfinite(penalty) & (penalty >= 0))
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise RegressionError(
                f"penalty of column {self.columns[at[0]]!r} is {penalty[at]}; it must be finite and at least 0 "
                f"(0: the column is not shrunk)"
            )


def make_problem(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    groups: np.ndarray | None = None,
    columns: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    penalty: np.ndarray | None = None,
    offset: np.ndarray | None = None,
) -> Problem:
    """Problem of the first num_train + num_val rows; all rows of one group on one side of the split.

    x: (n, p) or (n,).  y: (n, T) or (n,).  num_val=None: a fifth of the rows.  num_train=None: all the
    others.
    groups: (n,), equal for the rows that share a mask; None: every row stands alone.
    penalty: (p,) or (p, T), 0 for columns that must not be shrunk.  offset: (n, T) or (n,).
    With groups of several rows the validation side is as close to num_val as whole groups come, never above
    it.

    Raises RegressionError when there are fewer rows than asked for, or no split is possible.
    """
    x, y = np.asarray(x), np.asarray(y)
    x = x[:, None] if x.ndim == 1 else x
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise RegressionError(
            f"columns of shape (rows, p) and outcomes of shape (rows, T) are needed, with the same "
            f"rows; got {x.shape} and {y.shape}"
        )
    count, num_val = count_rows(len(x), num_train, num_val)
    x, y = x[:count], y[:count]
    if offset is not None:
        offset = np.asarray(offset)
        offset = (offset[:, None] if offset.ndim == 1 else offset)[:count]
    groups = np.arange(count) if groups is None else np.asarray(groups)[:count]
    if groups.shape != (count,):
        raise RegressionError(f"groups: expected one entry per row, shape ({count},), got {groups.shape}")
    train, val = split_rows(groups, num_val, seed)
    return Problem(
        x=x,
        y=y,
        train=train,
        val=val,
        seed=seed,
        columns=tuple(columns) if columns is not None else tuple(f"x[{j}]" for j in range(x.shape[1])),
        targets=tuple(targets) if targets is not None else tuple(f"y[{t}]" for t in range(y.shape[1])),
        rows=np.arange(count) if rows is None else np.asarray(rows)[:count],
        penalty=None if penalty is None else np.asarray(penalty),
        offset=offset,
    )


def count_rows(available: int, num_train: int | None, num_val: int | None, where: str = "the data") -> tuple[int, int]:
    """How many rows take part and how many of them validate; RegressionError if there are too few."""
    for name, value in (("num_train", num_train), ("num_val", num_val)):
        if value is not None and value < 1:
            raise RegressionError(f"{name}={value}: at least 1 is needed; leave it out for the default")
    if num_val is None:
        base = available if num_train is None else min(available, round(num_train / (1 - VAL_SHARE)))
        num_val = max(1, round(VAL_SHARE * base)) if num_train is None else max(1, base - num_train)
    count = available if num_train is None else num_train + num_val
    if count > available:
        raise RegressionError(
            f"num_train + num_val = {num_train} + {num_val} = {count} rows asked for, but {where} has "
            f"{available} complete training rows; train more models, or ask for fewer rows"
        )
    if count - num_val < 2:
        raise RegressionError(
            f"no split possible: {where} has {available} complete training rows and num_val={num_val} "
            f"of them would validate; at least 2 must be left to fit"
        )
    return count, num_val


def split_rows(groups: np.ndarray, num_val: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (train, val), ascending; whole groups go to validation in an order drawn from the seed."""
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(sizes), dtype=bool)
    left = num_val
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= left:
            chosen[group] = True
            left -= sizes[group]
        if left == 0:
            break
    is_val = chosen[members.reshape(-1)]
    if not is_val.any() or is_val.all():
        raise RegressionError(
            f"no split possible: {len(groups)} rows have {len(sizes)} different masks, and none of "
            f"them fits into num_val={num_val} rows whole; raise num_val, or train on more masks"
        )
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def problem_from_store(
    store: Store,
    *,
    x_name: str | Sequence[str] = "masks",
    y_name: str = "margins",
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    target_start: int = 0,
    target_end: int = -1,
    penalty: Mapping[str, float] | None = None,
    offset_name: str | None = None,
) -> Problem:
    """Problem from the complete training rows of a store; evaluation rows are never read.

    x_name: a key of masks, `choices` (the design's factors, one column per level), any other key with a number or a
    vector per row, or several of these, whose columns then lie side by side.  penalty: {key of x_name: how strongly
    its columns are shrunk}, 0 for not at all; 1 for those left out.  offset_name: a key of the outcomes' shape, whose
    values are a part of the outcomes that is given.

    Rows are taken in ascending order. Two rows share a mask when the design says so, or, where the design
    gives no masks or one for all, when their columns are equal. target_end=-1: to the end.

    Raises RegressionError for keys the store does not have, too few complete rows and a slice out of range.
    """
    source = StoreSource(store, x_name=x_name, y_name=y_name, penalty=penalty, offset_name=offset_name)
    start, end = slice_targets(source.targets.width, target_start, target_end)
    count, _ = count_rows(len(source.rows), num_train, num_val, source.where)
    source.take(count)
    p = sum(part.width for part in source.parts)
    T = end - start
    shift = source.offset_dtype
    what = f"rows of {', '.join(repr(part.key) for part in source.parts)} and {y_name!r}"
    x, y = _allocate(count, p, T, source.x_dtype, source.y_dtype, what, T * shift.itemsize if shift else 0)
    offset = np.empty((count, T), dtype=shift) if shift else None
    source.targets = source.targets.part(start, end)
    groups = Groups(source.mask_ids)
    row_bytes = p * x.itemsize + T * y.itemsize
    for first, last in chunks(count, row_bytes):
        some = slice(first, last)
        source.fill(first, last, x[some], y[some], None if offset is None else offset[some])
        groups.add(x[some])
    return make_problem(
        x,
        y,
        num_train=num_train,
        num_val=num_val,
        seed=seed,
        groups=groups.ids(),
        columns=[name for part in source.parts for name in part.columns()],
        targets=source.targets.names(),
        rows=source.rows,
        penalty=penalties(source.parts),
        offset=offset,
    )


def problem_from_beton(
    beton: Beton,
    *,
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    target_start: int = 0,
    target_end: int = -1,
    penalty: Mapping[str, float] | None = None,
    x_name: str | Sequence[str] | None = None,
    y_name: str | None = None,
    offset_name: str | None = None,
    engine: str = "numpy",
    workers: int | None = None,
) -> Problem:
    """Problem from the rows of a .beton file, in its order; that of the store it was written from, to the bit.

    engine: `numpy`, or `ffcv` for FFCV's own Loader, with `workers` threads.  penalty: in place of those that the file
    names.  x_name, y_name, offset_name: None, or what must have been written. A file that has no names, as the released
    code wrote it, takes these, and in it rows with equal columns are taken to share a mask.

    Raises RegressionError for too few rows, a slice out of range, another file than was asked for, and a damaged one.
    """
    parts, targets = _names(beton, x_name, y_name, offset_name)
    parts = with_penalties(parts, penalty, "data")
    start, end = slice_targets(beton.targets, target_start, target_end)
    where = f"the file {beton.path}"
    count, _ = count_rows(beton.samples, num_train, num_val, where)
    x, y = _allocate(count, beton.columns, end - start, beton.x_dtype, beton.y_dtype, f"rows of {where}")
    groups = Groups(np.full(count, -1) if beton.side is None else beton.side.groups[:count])

    def take(first: int, some_x: np.ndarray, some_y: np.ndarray) -> None:
        last = first + len(some_x)
        x[first:last], y[first:last] = some_x, some_y[:, start:end]
        groups.add(x[first:last])

    if engine == "ffcv":
        from datamodels.regression import ffcv_engine

        ffcv_engine.read(beton, count, take, workers)
    else:
        for first, last in chunks(count, beton.columns * x.itemsize + beton.targets * y.itemsize):
            take(first, *beton.read(first, last))
    return make_problem(
        x,
        y,
        num_train=num_train,
        num_val=num_val,
        seed=seed,
        groups=groups.ids(),
        columns=[name for part in parts for name in part.columns()],
        targets=targets.part(start, end).names(),
        rows=beton.rows[:count],
        penalty=penalties(parts),
    )


def _names(
    beton: Beton, x_name: str | Sequence[str] | None, y_name: str | None, offset_name: str | None
) -> tuple[tuple[Part, ...], Targets]:
    """What the columns and targets of a file are called; RegressionError if that is not what was asked for."""
    asked = None if x_name is None else split_names(x_name, "data")
    if beton.side is None:
        if offset_name is not None or (asked is not None and len(asked) > 1):
            raise RegressionError(
                f"{beton.path}: does not say what its columns are, so neither several keys (data.x_name) nor an "
                f"offset (data.offset_name) can be told apart in it; write it again, or name the store (data.logdir)"
            )
        return (Part(asked[0] if asked else "mask", beton.columns),), Targets(y_name or "targets", beton.targets)
    about = beton.side.about
    parts, targets = tuple(Part.from_json(part) for part in about["parts"]), Targets(**about["targets"])
    for option, wanted, held in (
        ("x_name", asked, tuple(part.key for part in parts)),
        ("y_name", y_name, targets.key),
        ("offset_name", offset_name, about["offset"]),
    ):
        if wanted is not None and wanted != held:
            told = [value if isinstance(value, str) else ",".join(value or ["none"]) for value in (held, wanted)]
            raise RegressionError(
                f"{beton.path}: was written with {option} {told[0]}, and data.{option} asks for {told[1]}; leave it "
                f"out, or write another file with --cfg.{option}={told[1]}"
            )
    if sum(part.width for part in parts) != beton.columns or targets.width != beton.targets:
        raise RegressionError(f"{beton.path}: names other columns than it holds; it is damaged, write it again")
    return parts, targets


def _allocate(
    n: int, p: int, T: int, x_dtype: np.dtype, y_dtype: np.dtype, what: str, others: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (n, p) and (n, T), yet to be filled; RegressionError where they, and a block, do not fit into memory."""
    needed = n * (p * x_dtype.itemsize + T * y_dtype.itemsize + others)
    memory.require(
        needed + min(needed, BLOCK_BYTES),
        f"reading {n} {what}",
        "read fewer rows (data.num_train, data.num_val) or fewer targets (data.target_start_ind, data.target_end_ind)",
    )
    return np.empty((n, p), dtype=x_dtype), np.empty((n, T), dtype=y_dtype)


def slice_targets(num_targets: int, start: int, end: int) -> tuple[int, int]:
    """(start, end) with end=-1 resolved; RegressionError if the slice is empty or leaves the targets."""
    stop = num_targets if end == -1 else end
    if not 0 <= start < stop <= num_targets:
        raise RegressionError(
            f"targets {start} to {end}: out of range, there are {num_targets} targets; "
            f"0 <= target_start_ind < target_end_ind <= {num_targets} is needed (-1: to the end)"
        )
    return start, stop


def _refuse_nonfinite(values: np.ndarray, rows: np.ndarray, names: Sequence[str], what: str) -> None:
    if values.dtype.kind != "f":
        return
    for first in range(0, len(values), 4096):  # never a second copy of a large matrix
        block = values[first : first + 4096]
        bad = ~np.isfinite(block)
        if not bad.any() and max(float(block.max()), -float(block.min())) > LARGEST:
            at, column = np.argwhere(np.abs(block) > LARGEST)[0]
            raise RegressionError(
                f"row {rows[first + at]}, {what} {names[column]!r}: {block[at, column]} is beyond {LARGEST}, and "
                f"weights are kept in float32; divide all of them by a power of ten"
            )
        if bad.any():
            at, column = np.argwhere(bad)[0]
            total = int((~np.isfinite(values)).sum())
            raise RegressionError(
                f"row {rows[first + at]}, {what} {names[column]!r}: {values[first + at, column]} is not "
                f"finite ({total} such values in all); leave the row out, or train it again"
            )
