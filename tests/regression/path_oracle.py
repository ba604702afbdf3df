"""The whole job for one target at a time by scikit-learn on explicit standardised columns: slow, and independent.

Penalty weights are a scaling of the columns; unpenalised columns are projected out of everything by least squares.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import lasso_path


@dataclass
class Fitted:
    """weight (p,), bias, lam of one target; path_lam, path_mse (k,), NaN after the path ended; best, turned."""

    weight: np.ndarray
    bias: float
    lam: float
    best: int
    turned: bool
    path_lam: np.ndarray
    path_mse: np.ndarray
    r2_train: float


class Columns:
    """Standardised columns of some rows, each divided by its penalty, without what `free` columns explain."""

    def __init__(self, x, penalty, use_bias):
        x = x.astype(float)
        self.sd, self.mean = x.std(axis=0), x.mean(axis=0) * use_bias
        self.sd[np.ptp(x, axis=0) == 0] = 0
        self.inverse = np.divide(1, self.sd, out=np.zeros_like(self.sd), where=self.sd > 0)
        self.z = (x - self.mean) * self.inverse
        self.free, self.penalised = np.flatnonzero(penalty == 0), (penalty > 0) & (self.sd > 0)
        self.penalty = penalty
        self.scaled = self.without(self.z[:, self.penalised]) / penalty[self.penalised]

    def without(self, columns):
        if not len(self.free):
            return columns
        return columns - self.z[:, self.free] @ np.linalg.lstsq(self.z[:, self.free], columns, rcond=None)[0]

    def lambda_max(self, r0):
        return np.abs(self.scaled.T @ self.without(r0)).max(initial=0) / len(r0)

    def solve(self, r0, lams, tol):
        """Weights (p, len(lams)) in the units of the columns."""
        out = np.zeros((len(self.sd), len(lams)))
        if self.penalised.any():
            found = lasso_path(self.scaled, self.without(r0), alphas=lams, precompute=False, tol=tol, max_iter=10**6)[1]
            out[self.penalised] = found / self.penalty[self.penalised, None]
        if len(self.free):
            rest = r0[:, None] - self.z @ out
            out[self.free] = np.linalg.lstsq(self.z[:, self.free], rest, rcond=None)[0]
        return out * self.inverse[:, None]


def fit(problem, t, options, use_bias=True, *, tol=1e-12):
    x, penalty = problem.x, problem.penalty_of(slice(t, t + 1))[:, 0]
    train, val = problem.train, problem.val
    y = problem.outcomes(slice(None), slice(t, t + 1))[:, 0]
    columns = Columns(x[train], penalty, use_bias)
    mean = y[train].mean() * use_bias
    grid = options.grid(columns.lambda_max(y[train] - mean))
    weights = columns.solve(y[train] - mean, grid, tol)
    predicted = (x[val] - columns.mean) @ weights + mean
    errors = ((y[val, None] - predicted) ** 2).mean(axis=0)
    best, last, turned = 0, len(grid) - 1, False
    for i, error in enumerate(errors):
        if error < errors[best]:
            best = i
        elif i - best >= options.patience:
            last, turned = i, True
            break
    path_lam, path_mse = grid.copy(), errors.copy()
    path_lam[last + 1 :] = path_mse[last + 1 :] = np.nan
    lam = float(np.float32(grid[best]))
    rows = np.sort(np.concatenate([train, val]))
    all_columns, all_mean = Columns(x[rows], penalty, use_bias), y[rows].mean() * use_bias
    weight = all_columns.solve(y[rows] - all_mean, np.array([lam]), tol)[:, 0]
    residual = y[train] - mean - (x[train] - columns.mean) @ weights[:, best]
    return Fitted(
        weight,
        all_mean - all_columns.mean @ weight,
        lam,
        best,
        turned,
        path_lam,
        path_mse,
        1 - (residual**2).mean() / ((y[train] - mean) ** 2).mean(),
    )
