"""The lasso path for wide problems, fewer rows than columns: scikit-learn on a few columns, no p × p matrix.

For each lambda of a target, coordinate descent runs on a working set of columns; then the gradient of all columns,
one matrix product for a block of targets, gives the duality gap of the whole problem and the columns to add.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event

import numpy as np

from datamodels.regression.lasso import PathOptions, Solution, float32_at_least
from datamodels.regression.problem import Problem
from datamodels.regression.scale import BLOCK_VALUES, Scale, origins, row_blocks, scale_of, sums

NAME = "wide"
TARGETS = 32  # a block; the product then reads the matrix from memory about as fast as it computes
PATH_TOL = 2e-4  # relative duality gap of the path's solutions, which only choose a lambda
MAX_ITER = 100_000


@dataclass(frozen=True, eq=False)
class Design:
    """Standardised columns over the first `scale.n` rows, made where they are used.

    columns (p, rows): raw, less `origin`; 0 and 1 in float32, where products lose nothing that screening needs, and
    float64 for other values.  gradient and take are in the units of `scale`.
    """

    columns: np.ndarray
    origin: np.ndarray
    scale: Scale

    def gradient(self, residual: np.ndarray) -> np.ndarray:
        """Zᵀr / n, (B, p), of residuals (B, n); they are centred if there is a bias, so the means drop out."""
        n = self.scale.n
        out = residual.astype(self.columns.dtype) @ self.columns[:, :n].T
        out *= (self.scale.inverse_sd / n).astype(out.dtype)
        return out

    def take(self, which: np.ndarray, first: int = 0) -> np.ndarray:
        """Columns `which` of Z, (len(which), rows from `first` on), float64; first=0 gives the n rows of the scale."""
        rows = slice(0, self.scale.n) if first == 0 else slice(first, None)
        z = self.columns[which, rows].astype(np.float64)
        z -= (self.scale.mean[which] - self.origin[which])[:, None]
        z *= self.scale.inverse_sd[which][:, None]
        return z

    def lambda_max(self, r0: np.ndarray, gradient: np.ndarray) -> float:
        """Largest |z_jᵀ r0| / n, to float64; `gradient` (p,) is it to the precision of the columns."""
        size = np.abs(gradient)
        if not size.any():
            return 0.0
        near = np.flatnonzero(size >= size.max() * (1 - 1e-4))
        return float(max(np.abs(self.take(near[i : i + 256]) @ r0).max() for i in range(0, len(near), 256)) / len(r0))


@dataclass(eq=False)
class Point:
    """Where a target stands: weights (len(support),) of the columns `support`, both in a Design's units."""

    support: np.ndarray
    weight: np.ndarray

    @classmethod
    def zero(cls) -> Point:
        return cls(np.zeros(0, dtype=np.intp), np.zeros(0))


def solve(
    problem: Problem, options: PathOptions, use_bias: bool, workers: int, progress: Callable[[int], None]
) -> Solution:
    """Path on the training rows, lambda by the validation rows, refit on both; blocks of targets in parallel."""
    from threadpoolctl import threadpool_limits

    x, y = problem.x, problem.y
    x_origin, y_origin = origins(x, y, use_bias)
    on_train, on_val = (sums(x, y, rows, x_origin, y_origin) for rows in (problem.train, problem.val))
    train, full = scale_of(on_train, use_bias), scale_of(on_train + on_val, use_bias)
    rows = np.concatenate([problem.train, problem.val])  # so both phases fit a prefix of one matrix
    columns: np.ndarray = np.empty((x.shape[1], len(rows)), _dtype(x.dtype))
    done = 0
    for block in row_blocks(rows, x.shape[1]):
        columns[:, done : done + len(block)] = (x[block] if x.dtype == bool else x[block] - x_origin).T
        done += len(block)
    path, refit = Design(columns, x_origin, train), Design(columns, x_origin, full)

    T = y.shape[1]
    solution = Solution.empty(x.shape[1], T, options.k, train, full)
    stop = Event()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Objective did not converge")  # the certificate says it, by name
        with ThreadPoolExecutor(workers) as pool:
            blocks = [np.arange(first, min(first + TARGETS, T)) for first in range(0, T, TARGETS)]
            tasks = [pool.submit(_solve_block, ts, y, rows, path, refit, options, solution, stop) for ts in blocks]
            try:
                for task in as_completed(tasks):
                    progress(task.result())
            except BaseException:  # Ctrl-C must not wait for the targets still in the queue, nor long for those begun
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return solution


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int) -> int:
    """Bytes that solve takes at its largest, without the weights: the columns, and per thread its block of targets."""
    size = np.dtype(_dtype(dtype)).itemsize
    block = min(T, TARGETS)
    gradients = 4 * block * p * size
    working = 3 * 8 * n * min(p, n)  # float64 columns; seldom more than n of them at once
    return n * p * size + 9 * min(n * max(p, T), BLOCK_VALUES) + min(workers, -(-T // TARGETS)) * (gradients + working)


def _dtype(dtype: np.dtype) -> type:
    return np.float32 if dtype.kind == "b" else np.float64


def _solve_block(
    targets: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    path: Design,
    refit: Design,
    options: PathOptions,
    into: Solution,
    stop: Event,
) -> int:
    """Fill in these targets, unless told to stop; how many they are."""
    train, full, n = path.scale, refit.scale, path.scale.n
    outcomes = np.ascontiguousarray(y[np.ix_(rows, targets)].astype(np.float64).T)
    r0 = np.ascontiguousarray(outcomes[:, :n]) - train.y_mean[targets, None]
    r0_val = outcomes[:, n:] - train.y_mean[targets, None]
    r0_full = outcomes - full.y_mean[targets, None]

    gradient = path.gradient(r0)
    at_zero = refit.gradient(r0_full)
    points = [Point.zero() for _ in targets]
    best, grids, going = list(points), {}, []
    best_error = (r0_val**2).mean(axis=1)
    for b, t in enumerate(targets):
        lam_max = 0.0 if train.constant[t] else path.lambda_max(r0[b], gradient[b])
        if lam_max == 0:  # nothing to select: 0 is the solution at the lambda_max of all rows
            into.lam[t] = 0.0 if full.constant[t] else float32_at_least(refit.lambda_max(r0_full[b], at_zero[b]))
            continue
        grids[b] = options.grid(lam_max)
        into.path_lam[0, t], into.path_mse[0, t], into.path_nnz[0, t] = lam_max, best_error[b], 0
        going.append(b)
    chosen = list(going)
    null_error = best_error.copy()

    for i in range(1, options.k):
        if stop.is_set():
            return 0
        lam = {b: grids[b][i] for b in going}
        # The sequential strong rule: a gradient seldom moves by more than lambda does.
        screen = {b: 2 * grids[b][i] - grids[b][i - 1] for b in going}
        _advance(path, r0, gradient, points, lam, screen, PATH_TOL)
        for b in list(going):
            t, point = targets[b], points[b]
            error = ((r0_val[b] - point.weight @ path.take(point.support, n)) ** 2).mean()
            into.path_lam[i, t], into.path_mse[i, t], into.path_nnz[i, t] = grids[b][i], error, len(point.support)
            if error < best_error[b]:
                best[b], best_error[b], into.best[t] = point, error, i
            elif i - into.best[t] >= options.patience:
                into.turned[t] = True
                going.remove(b)

    del gradient, at_zero
    lam, screen = {}, {}
    residual = r0_full.copy()
    for b in chosen:
        t = targets[b]
        into.lam[t] = np.float32(grids[b][into.best[t]])
        fitted = r0[b] - best[b].weight @ path.take(best[b].support)
        into.r2_train[t] = 1 - (fitted**2).mean() / train.power[t]
        into.r2_val[t] = 1 - best_error[b] / null_error[b] if null_error[b] > 0 else np.nan
        lam[b] = screen[b] = float(into.lam[t])
        support = best[b].support
        points[b] = Point(support, best[b].weight * full.sd[support] * train.inverse_sd[support])
        residual[b] -= points[b].weight @ refit.take(support)
    _advance(refit, r0_full, refit.gradient(residual), points, lam, screen, options.tol / 2)
    for b in chosen:
        support = points[b].support
        into.weight[support, targets[b]] = points[b].weight * full.inverse_sd[support]
    return len(targets)


def _advance(
    design: Design,
    r0: np.ndarray,
    gradient: np.ndarray,
    points: list[Point],
    lam: dict[int, float],
    screen: dict[int, float],
    tol: float,
) -> None:
    """Bring the points of the targets in `lam` to a relative duality gap of tol there; gradient (B, p) follows.

    The working sets start with the columns whose gradient reaches `screen`, and grow by those that exceed lambda.
    """
    working = {b: np.union1d(points[b].support, np.flatnonzero(np.abs(gradient[b]) >= screen[b])) for b in lam}
    todo = list(lam)
    residual = np.empty_like(r0)
    while todo:
        for b in todo:
            z = design.take(working[b])
            start = np.zeros(len(z))
            start[np.searchsorted(working[b], points[b].support)] = points[b].weight
            weight = _lasso(z, r0[b], lam[b], start, tol / 4)
            on = np.flatnonzero(weight)
            points[b] = Point(working[b][on], weight[on])
            residual[b] = r0[b] - weight @ z
        gradient[todo] = design.gradient(residual[todo])
        still = []
        for b in todo:
            size = np.abs(gradient[b])
            size_max = size.max()
            if _gap(r0[b], residual[b], np.abs(points[b].weight).sum(), size_max, lam[b]) <= tol:
                continue
            new = np.setdiff1d(np.flatnonzero(size > lam[b]), working[b], assume_unique=True)
            if len(new):
                working[b] = np.union1d(working[b], new)
                still.append(b)
        todo = still


def _gap(r0: np.ndarray, r: np.ndarray, norm: float, top: float, lam: float) -> float:
    """Relative duality gap as in lasso.certify; norm = Σ |w_j| of standardised columns, top = max |z_jᵀ r| / n."""
    s = min(1.0, lam / top) if top > 0 else 1.0
    rr = r @ r
    return (rr / 2 + len(r) * lam * norm - s * (r0 @ r) + s**2 * rr / 2) / (r0 @ r0 / 2)


def _lasso(z: np.ndarray, r0: np.ndarray, lam: float, start: np.ndarray, tol: float) -> np.ndarray:
    """Minimiser (m,) of ‖r0 − zᵀ w‖² / 2n + lam ‖w‖₁, z (m, n)."""
    from sklearn import config_context
    from sklearn.linear_model import lasso_path

    if not len(z):
        return np.zeros(0)
    with config_context(skip_parameter_validation=True):  # it holds the interpreter lock longer than all else here
        return lasso_path(
            z.T,
            r0,
            alphas=np.array([lam]),
            precompute=False,
            coef_init=start,  # it is written to
            check_input=False,
            tol=tol,
            max_iter=MAX_ITER,
        )[1][:, 0]
