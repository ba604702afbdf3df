"""The lasso path by scikit-learn: coordinate descent on a shared Gram matrix, with warm starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from datamodels.regression.gram import Gram, moments, standardise
from datamodels.regression.lasso import PathOptions, Solution, float32_at_least
from datamodels.regression.problem import Problem
from datamodels.regression.scale import BLOCK_VALUES, origins

NAME = "gram"
CHUNK = 4  # lambdas per call: few enough that little is solved past the stop, enough to pay for the call
PATH_TOL = 1e-4  # of the path's solutions, which only choose a lambda; the refit is solved to options.tol
MAX_ITER = 100_000


def solve(
    problem: Problem, options: PathOptions, use_bias: bool, workers: int, progress: Callable[[int], None]
) -> Solution:
    """Path on training rows, lambda by validation rows (in their units), refit on both; threads share the matrices."""
    from threadpoolctl import threadpool_limits

    x, y = problem.x, problem.y
    at = origins(x, y, use_bias)
    on_train, on_val = moments(x, y, problem.train, *at), moments(x, y, problem.val, *at)
    train = standardise(on_train, use_bias)
    val = standardise(on_val, use_bias, like=train)
    full = standardise(on_train + on_val, use_bias)
    del on_train, on_val

    T = y.shape[1]
    solution = Solution.empty(x.shape[1], T, options.k, train.scale, full.scale)
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


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int) -> int:
    """Bytes that solve takes at its largest, without the weights: seven p × p matrices, as many p × T, and a block."""
    block = min(n * max(p, T), BLOCK_VALUES)
    return 56 * p * p + 56 * p * T + 13 * block + 8 * p * (CHUNK + 2) * workers


def _solve_target(t: int, train: Gram, val: Gram, full: Gram, options: PathOptions, into: Solution) -> None:
    lam_max = np.abs(train.xy[t]).max()
    if train.scale.constant[t] or lam_max == 0:  # nothing to select: 0 is the solution at the lambda_max of all rows
        into.lam[t] = 0.0 if full.scale.constant[t] else float32_at_least(np.abs(full.xy[t]).max())
        return
    grid = options.grid(lam_max)
    best, best_at, best_error = np.zeros(len(train.gram)), 0, val.scale.power[t]
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
    into.r2_train[t] = 1 - _mean_squares(train, t, best[:, None])[0] / train.scale.power[t]
    into.r2_val[t] = 1 - best_error / val.scale.power[t] if val.scale.power[t] > 0 else np.nan
    start = best * full.scale.sd * train.scale.inverse_sd
    weight = _lasso(full, t, into.lam[t : t + 1], start, options.tol / 4)[:, 0]
    into.weight[:, t] = weight * full.scale.inverse_sd


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
            np.sqrt(gram.scale.power[t : t + 1]),
            alphas=lams,
            precompute=gram.gram,
            Xy=gram.xy[t],
            coef_init=start.copy(),  # it is written to
            check_input=False,
            tol=tol,
            max_iter=MAX_ITER,
        )[1]


def _mean_squares(gram: Gram, t: int, weights: np.ndarray) -> np.ndarray:
    """Mean squared residual of each column of weights (p, m), from the Gram matrix alone."""
    used = np.flatnonzero(weights.any(axis=1))
    w = weights[used]
    return gram.scale.power[t] - 2 * gram.xy[t, used] @ w + np.einsum("jm,jm->m", w, gram.gram[np.ix_(used, used)] @ w)
