"""Datamodels by lasso: a path per target, the lambda by validation, a refit on all rows, a certificate.

For each target, with sd_j the population standard deviation of column j over the rows of the fit, the problem
is

    minimise over (w, b)   1/(2n) ‖y − X w − b‖² + lam · Σ_j sd_j |w_j|

This file states the problem, chooses a solver and checks the answer. A solver is one other file: `sklearn_path`, on a
Gram matrix, and `wide_path`, for fewer rows than columns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from datamodels.errors import RegressionError
from datamodels.regression import memory
from datamodels.regression.datamodel import CONSTANT, END_OF_PATH, TURNED, Datamodel, RegularizationPath
from datamodels.regression.problem import Problem
from datamodels.regression.scale import BLOCK_VALUES, Scale, row_blocks

# On digits (1,000 columns, 797 targets) twice the lambdas and twice the patience gave the same LDS to .0002 for 1.7
# times the work; eps is so far down that no path from 500 to 4,000 rows came to its end.
DEFAULT_K = 50
DEFAULT_EPS = 1e-3
DEFAULT_PATIENCE = 3
DEFAULT_TOL = 1e-5
CERTIFY_VALUES = 1 << 22  # weights whose gradients are held at a time


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
    progress: Callable[[int], None] | None = None,
    _solver: str | None = None,
) -> Datamodel:
    """Datamodel of every target: path on training rows, lambda by validation rows, refit on both.

    k, eps, patience, tol: see PathOptions; weights are float32, which ends what tol can ask for near 1e-7.
    workers: threads, None for one per usable core.
    progress: called with the number of targets that were just finished.

    Constant columns get weight 0, constant targets weight 0 and their value as the bias. Warns
    (RegressionWarning), by name, of constant targets, of targets whose validation minimum lies at an end of
    the path, and of targets that miss `tol`. Raises RegressionError for options out of range.
    """
    options = PathOptions(k=k, eps=eps, patience=patience, tol=tol)
    x, y = problem.x, problem.y
    workers = _count_workers(workers)
    solver = _choose_solver(problem, workers, only=_solver)
    found = solver.solve(problem, options, use_bias, workers, progress or (lambda done: None))

    full, weight = found.full, found.weight
    bias = (full.y_mean - _predictions_at(full.mean, weight)).astype(np.float32)
    rows = np.sort(np.concatenate([problem.train, problem.val]))
    gap, kkt = certify(x, y, rows, weight, found.lam, full.sd, use_bias)
    ended = tuple(
        CONSTANT if constant else TURNED if turned else END_OF_PATH
        for constant, turned in zip(found.train.constant, found.turned, strict=True)
    )
    _warn(problem, options, found, gap)
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
            "solver": solver.NAME,
        },
        path=RegularizationPath(lam=found.path_lam, val_mse=found.path_mse, nnz=found.path_nnz),
    )


def certify(
    x: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    weight: np.ndarray,
    lam: np.ndarray,
    sd: np.ndarray,
    use_bias: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Relative duality gap (T,) and KKT violation / lam (T,) of these weights, from a fresh float64 residual.

    With r = y − X w and r0 = y, each less its mean if there is a bias, g = Xᵀr / n and s the largest number ≤
    1 with s |g_j| ≤ lam sd_j for all j:

        P = ‖r‖²/2n + lam Σ sd_j |w_j|,   D = (‖r0‖² − ‖r0 − s r‖²) / 2n,   gap = (P − D) / (‖r0‖²/2n)

    and the absolute P − D where r0 = 0. The violation is the distance of g_j / sd_j from lam · sign(w_j), or
    from [−lam, lam] where w_j = 0, at its largest over the columns; absolute where lam = 0.
    """
    n, T = len(rows), weight.shape[1]
    gap, kkt = np.zeros(T), np.zeros(T)
    varies = sd > 0
    blocks = list(row_blocks(np.arange(n), len(weight)))
    step = _certified_at_a_time(len(weight))
    for first in range(0, T, step):
        some = slice(first, first + step)
        w = weight[:, some].astype(np.float64)
        residual = y[rows, some].astype(np.float64)
        residual0 = residual - residual.mean(axis=0) if use_bias else residual.copy()
        for block in blocks:
            residual[block] -= x[rows[block]].astype(np.float64) @ w
        if use_bias:
            residual -= residual.mean(axis=0)
        gradient = np.zeros_like(w)
        for block in blocks:
            gradient += x[rows[block]].astype(np.float64).T @ residual[block]
        g = gradient[varies] / (n * sd[varies, None])
        u = w[varies] * sd[varies, None]

        bound = lam[some]
        top = np.abs(g).max(axis=0, initial=0.0)
        s = np.divide(bound, top, out=np.ones_like(top), where=top > bound)
        rr, r0r0 = (residual**2).sum(axis=0), (residual0**2).sum(axis=0)
        primal = rr / (2 * n) + bound * np.abs(u).sum(axis=0)
        dual = s * (residual0 * residual).sum(axis=0) / n - s**2 * rr / (2 * n)
        fitted = r0r0 > (1e-12 * np.abs(y[rows, some]).max(axis=0)) ** 2 * n  # else r0 is 0 but for rounding
        gap[some] = np.where(fitted, (primal - dual) / np.where(fitted, r0r0 / (2 * n), 1.0), primal - dual)
        violation = np.where(u != 0, np.abs(g - bound * np.sign(u)), np.maximum(np.abs(g) - bound, 0.0))
        kkt[some] = violation.max(axis=0, initial=0.0) / np.where(bound > 0, bound, 1.0)
    return gap, kkt


def _choose_solver(problem: Problem, workers: int, only: str | None = None) -> ModuleType:
    """The faster solver for this shape, or the other where that alone fits into memory; RegressionError if none does.

    With fewer rows than columns a Gram matrix is more work than the columns themselves: on two kinds of 0/1 problems
    (20 columns that matter, and half of all) wide_path took 1/2 to 1/5 of the time at 2 columns a row and 1/13 at 4 to
    6; at one column a row they were equal, and at a row and more per column the Gram matrix was up to 8 times faster.
    """
    from datamodels.regression import sklearn_path, wide_path

    n, p, T = len(problem.train) + len(problem.val), problem.x.shape[1], problem.y.shape[1]
    solvers = [wide_path, sklearn_path] if n < p else [sklearn_path, wide_path]
    if only is not None:
        solvers = [solver for solver in solvers if only == solver.NAME]
    there = memory.available()
    if there is None:
        return solvers[0]
    for solver in solvers:
        if _needed(solver, problem, T, workers) <= there:
            return solver

    needs = {solver: _needed(solver, problem, T, workers) for solver in solvers}
    least = min(solvers, key=lambda solver: needs[solver])
    some = T
    while some > 1 and _needed(least, problem, some, workers) > there:
        some //= 2
    advice = "fit fewer rows (data.num_train, data.num_val)"
    if _needed(least, problem, some, workers) <= there:
        advice = (
            f"fit fewer targets at a time (data.target_start_ind, data.target_end_ind): {some} need "
            f"{memory.gigabytes(_needed(least, problem, some, workers))}, and no target's answer depends on the "
            f"others; or {advice}"
        )
    memory.require(needs[least], f"the fit of {n} rows, {p} columns and {T} targets", advice)
    return least


def _needed(solver: ModuleType, problem: Problem, T: int, workers: int) -> int:
    """Bytes that the fit of T targets takes at its largest, beside the problem: weights, and solver or certificate."""
    n, p = len(problem.train) + len(problem.val), problem.x.shape[1]
    block = min(n * p, BLOCK_VALUES)
    certificate = 8 * (10 * p * min(T, _certified_at_a_time(p)) + 4 * n * min(T, 256)) + 10 * block
    return 4 * p * T + max(solver.memory(n, p, T, problem.x.dtype, workers), certificate)


def _certified_at_a_time(p: int) -> int:
    """Targets; it bounds the gradients that are held."""
    return max(16, min(256, CERTIFY_VALUES // p))


def _warn(problem: Problem, options: PathOptions, found: Solution, gap: np.ndarray) -> None:
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
    path = ~train.constant
    tell(path & (found.best == 0), "validation is best at the start of the path, where no column is selected")
    tell(
        path & (found.best == options.k - 1) & (options.k > 1),
        f"validation is best at the end of the path, a smaller lambda may be better; lower eps={options.eps}",
    )
    tell(
        ~(gap <= options.tol),
        f"not converged to a relative duality gap of {options.tol}; raise tol or scale the columns",
    )


def float32_at_least(value: float) -> np.float32:
    """The smallest float32 that is not below value."""
    rounded = np.float32(value)
    return rounded if rounded >= value else np.nextafter(rounded, np.float32(np.inf))


def _predictions_at(mean: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """mean @ weight (T,), in float64 without a second matrix of weights in it."""
    out = np.zeros(weight.shape[1])
    for block in row_blocks(np.arange(len(weight)), weight.shape[1]):
        out += mean[block] @ weight[block].astype(np.float64)
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
