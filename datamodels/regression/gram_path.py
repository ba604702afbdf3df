"""The lasso on a Gram matrix that all targets share: exact sums once, then each target alone on one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, local

import numpy as np

from datamodels.regression import descent
from datamodels.regression.gram import TILE, Columns, Gram, code_columns, multiply
from datamodels.regression.kept import kept
from datamodels.regression.lasso import PathOptions, Solution, float32_at_least
from datamodels.regression.problem import Problem
from datamodels.regression.products import times_columns
from datamodels.regression.scale import Scale
from datamodels.regression.threads import each_chunk

NAME = "gram"
TARGETS = 64  # products with the columns are made for so many at a time
PATH_TOL = 1e-3  # largest violation / lam on the path, which only chooses a lambda; the refit goes to options.tol
FAR = 0.5  # a coded mean beyond it leaves float32 too few digits for the path; so do columns that are not centred
FLOAT32_END = 5e-4  # times lambda_max: what float32 rounds is no longer small beside a lambda below it
FLOAT32_RANGE = 1e-25, 1e25  # of sums of outcomes


@dataclass(frozen=True, eq=False)
class Side:
    """One fit's rows, all of it times their number n: mu (p,) means of coded columns, own (p,) = n sd'²."""

    n: int
    gram: np.ndarray
    diag: np.ndarray
    mu: np.ndarray
    norm: np.ndarray


def solve(
    problem: Problem,
    options: PathOptions,
    use_bias: bool,
    workers: int,
    progress: Callable[[int, int], None],
    keep: Path | None = None,
) -> Solution:
    """Path on training rows, lambda by validation rows (in their units), refit on both; threads share the matrices.

    keep: a folder for the matrices, for other processes that fit other targets of the same columns and rows.
    """
    columns = code_columns(problem.x, problem.train, problem.val, use_bias)
    products = Gram(**kept(keep, lambda: vars(multiply(columns, workers))))
    train, full = _sides(columns, products, use_bias)
    T, p = problem.y.shape[1], problem.x.shape[1]
    scales = [Scale.of_coded(columns.origin, columns.unit, s.mu, s.norm, s.n, T) for s in (train, full)]
    solution = Solution.empty(p, T, options.k, *scales)
    job = Job(problem, options, use_bias, columns, train, full, solution, Event())
    size = max(1, min(TARGETS, -(-T // workers)))
    for done in each_chunk(job.run, T, workers, size, job.stop):
        progress(*done)
    return solution


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int) -> int:
    """Bytes that solve takes at its largest, beside the problem and the weights."""
    binary = np.dtype(dtype).kind == "b"
    entry = (2 if n <= np.iinfo(np.int16).max else 4) if binary else 8
    tile = 12 * min(TILE, p) * p
    chunk = min(T, TARGETS) * (n * 24 + p * 96) + 100 * p
    return 2 * entry * p * p + (1 if binary else 16) * n * p + workers * max(tile, chunk)


def _sides(columns: Columns, products: Gram, use_bias: bool) -> tuple[Side, Side]:
    n, n_train = len(columns.x), columns.num_train
    on = 1.0 if use_bias else 0.0
    sums = columns.sums_train + columns.sums_val
    return (
        Side(
            n_train, products.train, products.diag_train, on * columns.sums_train / n_train, n_train * columns.sd_train
        ),
        Side(n, products.full, products.diag_full, on * sums / n, n * columns.sd_full),
    )


@dataclass(frozen=True, eq=False)
class Job:
    problem: Problem
    options: PathOptions
    use_bias: bool
    columns: Columns
    train: Side
    full: Side
    into: Solution
    stop: Event
    room: local = field(default_factory=local)  # each thread's

    def packed(self) -> np.ndarray:
        """Room for packed columns, as large as this thread's last target needed."""
        return getattr(self.room, "H", np.empty((60, 60), dtype=self.train.gram.dtype))

    def run(self, targets: slice) -> tuple[int, int]:
        """Fill in these targets, unless told to stop; how many they are, and the lambdas they took."""
        problem, train, full, columns = self.problem, self.train, self.full, self.columns
        rows = np.concatenate([problem.train, problem.val])
        y = np.ascontiguousarray(problem.outcomes(rows, targets).T)
        names = range(*targets.indices(problem.y.shape[1]))
        at = np.array(names)
        for side, scale in ((train, self.into.train), (full, self.into.full)):
            scale.take(at, y[:, : side.n], self.use_bias)
        y -= self.into.train.y_mean[at, None]  # r0 of the path's rows; the others about the same mean
        on_train, on_val = y[:, : train.n], y[:, train.n :]
        total = on_train.sum(axis=1), on_val.sum(axis=1)
        q = gradient(columns, on_train, slice(0, train.n), total[0])
        q_full = q + gradient(columns, on_val, slice(train.n, None), total[1])
        q -= np.outer(total[0], train.mu)
        q_full -= np.outer(total[0] + total[1], full.mu)
        power, power_full = self.into.train.power[at] * train.n, self.into.full.power[at] * full.n
        power_val = (on_val**2).sum(axis=1)
        penalty = np.ascontiguousarray(problem.penalty_of(targets).T)
        thr, thr_full = descent.thresholds(train.norm, penalty), descent.thresholds(full.norm, penalty)
        for b, t in enumerate(names):
            if self.stop.is_set():
                return 0, 0
            powers = float(power[b]), float(power_val[b]), float(power_full[b])
            self._solve_target(t, thr[b], thr_full[b], q[b], on_val[b], q_full[b], *powers)
        return len(names), int((self.into.path_nnz[:, at] >= 0).sum())

    def _solve_target(
        self,
        t: int,
        thr: np.ndarray,
        thr_full: np.ndarray,
        q: np.ndarray,
        r_val: np.ndarray,
        q_full: np.ndarray,
        power: float,
        power_val: float,
        power_full: float,
    ) -> None:
        into, options, train, full = self.into, self.options, self.train, self.full
        near = self.use_bias and train.gram.dtype != np.float64 and np.abs(train.mu).max() <= FAR
        near = near and FLOAT32_RANGE[0] < np.abs(q).max() < FLOAT32_RANGE[1]
        start = unpenalised(train, thr, q)
        start_full = unpenalised(full, thr_full, q_full)
        top = 0.0 if into.train.constant[t] else lambda_max(train, thr, q, *start)
        W, w, lam = *start_full, 0.0
        if not into.train.constant[t]:
            grid = options.grid(top) if top > 0 else np.zeros(1)
            short = grid[grid >= FLOAT32_END * top]
            for kind, some in ((np.float32, short), (np.float64, grid))[0 if near else 1 :]:
                errors, nnz = np.full(len(grid), np.nan), np.full(len(grid), -1, dtype=np.int64)
                best, turned, rr, chosen, chosen_w, active, self.room.H = descent.path(
                    train.gram, train.diag, train.mu, float(train.n), q, power, self.columns.x_val, r_val, thr,
                    train.norm, train.mu.astype(kind), start[0], start[1], some, options.patience, PATH_TOL,
                    self.packed(), errors, nnz,
                )  # fmt: skip
                if turned or len(some) == len(grid):
                    break
            into.r2_train[t] = 1 - max(rr, 0.0) / power
            into.r2_val[t] = 1 - errors[best] / power_val if power_val > 0 else np.nan
        if top > 0:
            seen = np.flatnonzero(nnz >= 0)
            into.path_lam[seen, t], into.path_mse[seen, t] = grid[seen], errors[seen] / (full.n - train.n)
            into.path_nnz[seen, t] = nnz[seen]
            into.best[t], into.turned[t] = best, turned
            lam = float(np.float32(grid[best]))
            weight = np.zeros(len(thr))
            weight[chosen] = chosen_w
            W = np.union1d(chosen, active)
            w = weight[W]
        elif not into.full.constant[t]:  # nothing to select: the lambda_max of all rows selects nothing either
            lam = float(float32_at_least(lambda_max(full, thr_full, q_full, W, w)))
        into.lam[t] = lam
        if lam == 0 and not len(W):
            return
        left = power_full - float(q_full[start_full[0]] @ start_full[1])
        strict = np.where(thr_full == 0, descent.FREE * full.norm, full.norm) if len(start_full[0]) else full.norm
        denominator = left if left > 1e-24 * max(power_full, 1e-300) else 2.0 * full.n
        W, w, _, self.room.H = descent.refit(
            full.gram, full.diag, full.mu, float(full.n), q_full, power_full, thr_full, strict, lam,
            W.astype(np.int32), w, options.tol / 4, denominator, self.packed(),
        )  # fmt: skip
        into.weight[W, t] = w / self.columns.unit[W]


def gradient(columns: Columns, r: np.ndarray, rows: slice, total: np.ndarray) -> np.ndarray:
    """X'ᵀr (B, p) of residuals r (B, rows) whose sums are total (B,)."""
    x = columns.x[rows]
    raw = times_columns(r, x)
    if x.dtype == bool:
        raw -= total[:, None] * columns.origin
        raw /= columns.unit
    return raw


def unpenalised(side: Side, thr: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns that are not shrunk, and their least-squares weights of least norm."""
    free = np.flatnonzero(thr == 0)
    if not len(free):
        return np.zeros(0, dtype=np.int32), np.zeros(0)
    h = side.gram[np.ix_(free, free)].astype(np.float64)
    h[np.arange(len(free)), np.arange(len(free))] = side.diag[free]
    h -= side.n * np.outer(side.mu[free], side.mu[free])
    inverse = 1.0 / np.sqrt(np.diagonal(h))
    h *= inverse
    h *= inverse[:, None]
    values, vectors = np.linalg.eigh(h)
    kept = values > 1e-10 * values[-1]
    inner = vectors[:, kept].T @ (inverse * q[free])
    return free.astype(np.int32), inverse * (vectors[:, kept] @ (inner / values[kept]))


def lambda_max(side: Side, thr: np.ndarray, q: np.ndarray, free: np.ndarray, w: np.ndarray) -> float:
    """The smallest lambda at which no penalised column is chosen."""
    g = q.copy()
    if len(free):
        descent.move(side.gram, side.diag, side.mu, float(side.n), free, w, len(free), g)
    return descent.lambda_max(g, thr)
