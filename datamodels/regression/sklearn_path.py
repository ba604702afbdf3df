"""The lasso path by scikit-learn: coordinate descent on a shared Gram matrix, with warm starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from datamodels.regression.gram import Gram
from datamodels.regression.lasso import PathOptions, Solution

CHUNK = 4  # lambdas per call: few enough that little is solved past the stop, enough to pay for the call
PATH_TOL = 1e-4  # of the path's solutions, which only choose a lambda; the refit is solved to options.tol
MAX_ITER = 100_000


def solve(
    train: Gram, val: Gram, full: Gram, options: PathOptions, workers: int, progress: Callable[[int], None]
) -> Solution:
    """Path on `train`, lambda by `val` (in train's units), refit on `full`; threads share the matrices."""
    from threadpoolctl import threadpool_limits

    T = len(train.power)
    solution = Solution.empty(len(train.sd), T, options.k)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Objective did not converge")  # the certificate says it, by name
        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(_solve_target, t, train, val, full, options, solution) for t in range(T)]
            try:
                for task in as_completed(tasks):
                    task.result()
                    progress(1)
            except BaseException:  # Ctrl-C must not wait for the targets still in the queue
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return solution


def _solve_target(t: int, train: Gram, val: Gram, full: Gram, options: PathOptions, into: Solution) -> None:
    lam_max = np.abs(train.xy[t]).max()
    if train.constant[t] or lam_max == 0:  # nothing to select: weight 0 is the solution at the lambda_max of all rows
        into.lam[t] = 0.0 if full.constant[t] else _float32_at_least(np.abs(full.xy[t]).max())
        return
    grid = options.grid(lam_max)
    best, best_at, best_error = np.zeros(len(train.sd)), 0, val.power[t]
    into.path_lam[0, t], into.path_mse[0, t], into.path_nnz[0, t] = (
        grid[0],
        best_error,
        0,
    )  # zeros solve lambda_max

    last, at = best, 1
    while at < len(grid) and not into.turned[t]:
        weights = _lasso(train, t, grid[at : at + CHUNK], last, PATH_TOL)
        for i, error in enumerate(_mean_squares(val, t, weights), start=at):
            into.path_lam[i, t], into.path_mse[i, t] = grid[i], error
            into.path_nnz[i, t] = np.count_nonzero(weights[:, i - at])
            if error < best_error:
                best, best_at, best_error = weights[:, i - at], i, error
            elif i - best_at >= options.patience:
                into.turned[t] = True
                break
        last = weights[:, -1]
        at += CHUNK

    into.best[t], into.lam[t] = best_at, np.float32(grid[best_at])
    into.r2_train[t] = 1 - _mean_squares(train, t, best[:, None])[0] / train.power[t]
    into.r2_val[t] = 1 - best_error / val.power[t] if val.power[t] > 0 else np.nan
    start = best * np.divide(full.sd, train.sd, out=np.zeros_like(full.sd), where=train.sd > 0)
    into.weight[:, t] = _lasso(full, t, into.lam[t : t + 1], start, options.tol / 4)[:, 0]


def _lasso(gram: Gram, t: int, lams: np.ndarray, start: np.ndarray, tol: float) -> np.ndarray:
    """Minimisers (p, len(lams)) of ½ wᵀGw − qᵀw + lam ‖w‖₁ in standardised columns."""
    from sklearn import config_context
    from sklearn.linear_model import lasso_path

    # Once it has G and q, scikit-learn needs X only for the number of rows and y only for its norm. One row
    # of the right norm, with G and q divided by n already, keeps the (n, p) matrix out of every call.
    one_row = np.zeros((1, len(start)), order="F")
    with config_context(skip_parameter_validation=True):  # it holds the interpreter lock longer than all else here
        return lasso_path(
            one_row,
            np.sqrt(gram.power[t : t + 1]),
            alphas=lams,
            precompute=gram.gram,
            Xy=gram.xy[t],
            coef_init=start,
            check_input=False,
            tol=tol,
            max_iter=MAX_ITER,
        )[1]


def _mean_squares(gram: Gram, t: int, weights: np.ndarray) -> np.ndarray:
    """Mean squared residual of each column of weights (p, m), from the Gram matrix alone."""
    used = np.flatnonzero(weights.any(axis=1))
    w = weights[used]
    return gram.power[t] - 2 * gram.xy[t, used] @ w + np.einsum("jm,jm->m", w, gram.gram[np.ix_(used, used)] @ w)


def _float32_at_least(value: float) -> np.float32:
    rounded = np.float32(value)
    return rounded if rounded >= value else np.nextafter(rounded, np.float32(np.inf))
