"""Datamodels by lasso: a path per target, the lambda by validation, a refit on all rows, a certificate.

For each target, with sd_j the population standard deviation of column j over the rows of the fit, the problem
is

    minimise over (w, b)   1/(2n) ‖y − o − X w − b‖² + lam · Σ_j v_j sd_j |w_j|

where o is the target's offset and v_j the penalty of the column. This file states the problem, chooses a solver and
has the answer checked (certificate.py). A solver is one other file: `gram_path`, on a Gram matrix, `wide_path`, for
fewer rows than columns, `gpu_path`, and `fast_l1`, which calls the released code's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from datamodels.errors import RegressionError
from datamodels.regression import memory
from datamodels.regression.certificate import TARGETS, certify
from datamodels.regression.datamodel import CONSTANT, END_OF_PATH, TURNED, Datamodel, RegularizationPath
from datamodels.regression.problem import Problem
from datamodels.regression.scale import Scale, row_blocks

# On digits (1,000 columns, 797 targets) twice the lambdas and twice the patience gave the same LDS to .0002 for 1.7
# times the work; eps is so far down that no path from 500 to 4,000 rows came to its end.
DEFAULT_K = 50
DEFAULT_EPS = 1e-3
DEFAULT_PATIENCE = 3
DEFAULT_TOL = 1e-5
SOLVERS = ("auto", "cpu", "gpu", "fast_l1", "gram", "wide")
WIDE = 20_000, 20  # more columns than that, or than that many per row, and more than rows: a Gram matrix does not pay


class RegressionWarning(UserWarning):
    """Something about named targets or columns that a reader of the result should know."""


@dataclass(frozen=True)
class PathOptions:
    """k lambdas from lambda_max down to eps · lambda_max, equally far apart in the logarithm.

    The path of a target stops when validation had no new minimum for `patience` lambdas. tol: the relative
    duality gap that the refit must reach.
    """

    k: int = DEFAULT_K
    eps: float = DEFAULT_EPS
    patience: int = DEFAULT_PATIENCE
    tol: float = DEFAULT_TOL

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RegressionError(f"k={self.k}: at least one lambda is needed")
        if not 0 < self.eps < 1:
            raise RegressionError(f"eps={self.eps}: the smallest lambda over the largest, it must lie between 0 and 1")
        if self.patience < 1:
            raise RegressionError(f"patience={self.patience}: at least 1 lambda without a new minimum is needed")
        if not 0 < self.tol < 1:
            raise RegressionError(f"tol={self.tol}: a relative duality gap between 0 and 1 is needed")

    def grid(self, lam_max: float) -> np.ndarray:
        """The lambdas of a path, float64, descending; the first is lam_max itself."""
        grid = lam_max * self.eps ** (np.arange(self.k) / max(self.k - 1, 1))
        grid[0] = lam_max
        return grid


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver fills in, target by target.

    weight (p, T): float32, in the units of the columns.  best (T,): place of the chosen lambda.  lam (T,), that lambda
    rounded to float32, the precision in which it is kept, before the refit; turned (T,); r2_train, r2_val (T,);
    path_lam, path_mse, path_nnz (k, T).  train, full: means and sd on the rows of the path, and on all.
    """

    weight: np.ndarray
    best: np.ndarray
    lam: np.ndarray
    turned: np.ndarray
    r2_train: np.ndarray
    r2_val: np.ndarray
    path_lam: np.ndarray
    path_mse: np.ndarray
    path_nnz: np.ndarray
    train: Scale
    full: Scale

    @classmethod
    def empty(cls, p: int, T: int, k: int, train: Scale, full: Scale) -> Solution:
        return cls(
            weight=np.zeros((p, T), dtype=np.float32),
            best=np.zeros(T, dtype=np.int64),
            lam=np.zeros(T),
            turned=np.zeros(T, dtype=bool),
            r2_train=np.full(T, np.nan),
            r2_val=np.full(T, np.nan),
            path_lam=np.full((k, T), np.nan),
            path_mse=np.full((k, T), np.nan),
            path_nnz=np.full((k, T), -1, dtype=np.int64),
            train=train,
            full=full,
        )


def fit(
    problem: Problem,
    *,
    k: int = DEFAULT_K,
    eps: float = DEFAULT_EPS,
    patience: int = DEFAULT_PATIENCE,
    tol: float = DEFAULT_TOL,
    use_bias: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    solver: str = "auto",
    device: str | None = None,
    keep: Path | None = None,
) -> Datamodel:
    """Datamodel of every target: path on training rows, lambda by validation rows, refit on both.

    k, eps, patience, tol: see PathOptions; weights are float32, which ends what tol can ask for near 1e-7.
    workers: threads, None for one per usable core.
    progress: called with the numbers of targets that were just finished, and of lambdas that they took.
    solver: one of SOLVERS; "cpu" is "gram" or "wide", whichever suits the shape.  device: of "gpu", None for "cuda".
    keep: a folder where fits of other targets of the very same columns, rows and split find the Gram matrix again.

    Constant columns get weight 0, constant targets weight 0 and their value as the bias. Warns
    (RegressionWarning), by name, of constant targets, of targets whose validation minimum lies at an end of
    the path, and of targets that miss `tol`, by their weights or by the rounding of their bias. Raises
    RegressionError for options out of range.
    """
    options = PathOptions(k=k, eps=eps, patience=patience, tol=tol)
    problem = _as_masks(problem)
    workers = _count_workers(workers)
    chosen, workers = _choose_solver(problem, workers, solver)
    if device is not None and chosen.NAME != "gpu":
        raise RegressionError(f"device={device!r} is for solver='gpu', not for {chosen.NAME!r}; leave it out")
    extra: dict[str, Any] = {} if device is None else {"device": device}
    if keep is not None and chosen.NAME == "gram":
        extra["keep"] = keep

    def tell(targets: int, lambdas: int = 0) -> None:
        if progress is not None:
            progress(targets, lambdas)

    found = chosen.solve(problem, options, use_bias, workers, tell, **extra)

    full, weight = found.full, found.weight
    exact = full.y_mean - _predictions_at(full.mean, weight) if use_bias else np.zeros(weight.shape[1])
    bias = exact.astype(np.float32)
    rows = np.sort(np.concatenate([problem.train, problem.val]))
    if chosen.NAME == "gpu":  # where the columns are on the card already, and a host would take minutes
        gap, kkt = chosen.certify(problem, weight, found.lam, use_bias, device or "cuda")
    else:
        gap, kkt = certify(
            problem.x, problem.y, rows, weight, found.lam, full.sd, use_bias, problem.penalty, problem.offset, workers
        )
    ended = tuple(
        CONSTANT if constant else TURNED if turned else END_OF_PATH
        for constant, turned in zip(found.train.constant, found.turned, strict=True)
    )
    _warn(problem, options, found, gap, exact - bias)
    return Datamodel(
        weight=weight,
        bias=bias,
        lam=found.lam.astype(np.float32),
        gap=gap,
        kkt=kkt,
        nnz=sum((weight[block] != 0).sum(axis=0) for block in row_blocks(np.arange(len(weight)), weight.shape[1])),
        r2_train=found.r2_train,
        r2_val=found.r2_val,
        ended=ended,
        columns=problem.columns,
        targets=problem.targets,
        about={
            "num_train": len(problem.train),
            "num_val": len(problem.val),
            "seed": problem.seed,
            "k": k,
            "eps": eps,
            "patience": patience,
            "tol": tol,
            "use_bias": use_bias,
            "solver": chosen.NAME,
        },
        path=RegularizationPath(lam=found.path_lam, val_mse=found.path_mse, nnz=found.path_nnz),
    )


def _as_masks(problem: Problem) -> Problem:
    """The same problem; integers that are all 0 or 1 are masks, for which everything is faster and exact."""
    x = problem.x
    if x.dtype.kind in "iu" and x.min() >= 0 and x.max() <= 1:
        return replace(problem, x=x.astype(bool))
    return problem


def _choose_solver(problem: Problem, workers: int, name: str = "auto") -> tuple[ModuleType, int]:
    """The solver, and how many workers memory allows it; RegressionError if none of those in question fits.

    A Gram matrix costs 13 ns per entry and 1.1 µs · p per target; without one a target costs 5 ms + .8 ns · n p (0/1
    columns, one core). For hundreds to thousands of targets they are equal about where WIDE says. The choice does not
    depend on the number of targets, since a target's answer must not.
    """
    if name not in SOLVERS:
        raise RegressionError(f"solver={name!r}: one of {', '.join(SOLVERS)} is needed")
    if name in ("gpu", "fast_l1"):
        return import_module(f"datamodels.regression.{'gpu_path' if name == 'gpu' else name}"), workers
    from datamodels.regression import gram_path, wide_path

    n, p, T = len(problem.train) + len(problem.val), problem.x.shape[1], problem.y.shape[1]
    solvers = [wide_path, gram_path] if p > n and (p > WIDE[0] or p > WIDE[1] * n) else [gram_path, wide_path]
    if name in ("gram", "wide"):
        solvers = [solver for solver in solvers if name == solver.NAME]
    there = memory.available()
    if there is None:
        return solvers[0], workers
    for solver in solvers:
        fewer = workers
        while fewer > 1 and _needed(solver, problem, T, fewer) > there:
            fewer //= 2
        if _needed(solver, problem, T, fewer) <= there:
            return solver, fewer

    needs = {solver: _needed(solver, problem, T, 1) for solver in solvers}
    least = min(solvers, key=lambda solver: needs[solver])
    some = T
    while some > 1 and _needed(least, problem, some, 1) > there:
        some //= 2
    advice = "fit fewer rows (data.num_train, data.num_val)"
    if _needed(least, problem, some, 1) <= there:
        advice = (
            f"fit fewer targets at a time (data.target_start_ind, data.target_end_ind): {some} need "
            f"{memory.gigabytes(_needed(least, problem, some, 1))}, and no target's answer depends on the "
            f"others; or {advice}"
        )
    memory.require(needs[least], f"the fit of {n} rows, {p} columns and {T} targets", advice)
    return least, 1


def _needed(solver: ModuleType, problem: Problem, T: int, workers: int) -> int:
    """Bytes that the fit of T targets takes at its largest, beside the problem: weights, and solver or certificate."""
    n, p = len(problem.train) + len(problem.val), problem.x.shape[1]
    some, busy = min(T, TARGETS), min(workers, -(-T // TARGETS))
    certificate = busy * 8 * some * (12 * p + 12 * n)
    return 4 * p * T + max(solver.memory(n, p, T, problem.x.dtype, workers), certificate)


def _warn(problem: Problem, options: PathOptions, found: Solution, gap: np.ndarray, off: np.ndarray) -> None:
    train, full = found.train, found.full

    def tell(which: np.ndarray, text: str, names: Sequence[str] = problem.targets) -> None:
        if which.any():
            warnings.warn(
                f"{text}: {_listed([names[int(i)] for i in np.flatnonzero(which)])}",
                RegressionWarning,
                stacklevel=4,
            )

    tell(full.sd == 0, "constant columns, weight 0", problem.columns)
    tell(full.constant, "constant targets, weight 0 and the value as bias")
    tell(
        train.constant & ~full.constant,
        "targets constant on the training rows, weight 0 and the mean as bias",
    )
    path = found.path_lam[0] > 0
    tell(path & (found.best == 0), "validation is best at the start of the path, where no column is selected")
    tell(
        path & (found.best == options.k - 1) & (options.k > 1),
        f"validation is best at the end of the path, a smaller lambda may be better; lower eps={options.eps}",
    )
    tell(
        ~(gap <= options.tol),
        f"not converged to a relative duality gap of {options.tol}; raise tol or scale the columns",
    )
    tell(
        # What it adds to the gap; outcomes that vary by rounding alone are as good as constant.
        ~(off**2 <= options.tol * full.power) & ~full.constant & (full.power > 1e-24 * full.y_mean**2),
        "the bias, a float32, is too coarse so far from 0; take the mean out of these outcomes and of real columns",
    )


def float32_at_least(value: float) -> np.float32:
    """The smallest float32 that is not below value."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= float(value) else np.nextafter(rounded, np.float32(np.inf))


def _predictions_at(mean: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """mean @ weight (T,), in float64; each target's sum is the same whatever others there are."""
    out = np.empty(weight.shape[1])
    for first in range(0, len(out), TARGETS):
        some = slice(first, first + TARGETS)
        out[some] = (np.ascontiguousarray(weight[:, some].T) * mean).sum(axis=1)
    return out


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{more}"


def _count_workers(workers: int | None) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        return usable
    if workers < 1:
        raise RegressionError(f"workers={workers}: at least 1 is needed")
    return min(workers, usable)
