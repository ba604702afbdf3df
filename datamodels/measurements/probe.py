"""Multinomial logistic regression on fixed features: many examples, thousands of features, on a few cores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from datamodels.errors import MeasurementError

STEPS = 1000
STOPPED = 99  # scipy's status where a callback ended the search
ERROR = 1e-3  # of the weights, relative to their norm, as the gradient and the mean curvature tell it


def logistic(x: np.ndarray, codes: np.ndarray, num_classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d, c) and biases (c,) that minimise Σ_i −log softmax(x_i W + b)_{y_i} + l2/2 · ‖W‖².

    Of two classes the penalty is l2 · ‖W‖², which is l2/2 · ‖w‖² of the one column w = W₁ − W₀ that a regression of two
    classes has elsewhere; so l2 is 1/C of scikit-learn for any number of classes.

    x: (n, d) float32. codes: (n,) in [0, c). L-BFGS in the coordinates A of W = L⁻ᵀA with L Lᵀ = XᵀX/(cn) + l2/n,
    which is the Hessian where all classes are equally likely: correlated features then cost no further steps. It runs
    in float32, and goes on in float64 where rounding ends it too soon, until the weights are within some 1e-3 of their
    norm.

    Raises MeasurementError when it does not converge.
    """
    from scipy.linalg import cholesky, solve_triangular
    from scipy.optimize import minimize

    n, d = x.shape
    penalty = (2 * l2 if num_classes == 2 else l2) / n
    hessian = (x.T @ x).astype(np.float64) / (n * num_classes)
    hessian[np.diag_indices(d)] += (
        penalty + 1e-6 * np.trace(hessian) / d
    )  # float32's rounding must not make it indefinite
    factor = cholesky(hessian, lower=True, overwrite_a=True, check_finite=False)
    every = np.arange(n)
    error = math.inf

    def parts(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a = a.astype(x.dtype).reshape(d + 1, num_classes)
        return solve_triangular(factor, a[:-1], lower=True, trans=1, check_finite=False), a[-1] * np.sqrt(num_classes)

    def objective(a: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal error
        weight, bias = parts(a)
        scores = x @ weight
        scores += bias
        scores -= scores.max(axis=1, keepdims=True)
        right = scores[every, codes].sum(dtype=np.float64)
        np.exp(scores, out=scores)
        total = scores.sum(axis=1, keepdims=True)
        loss = (np.log(total).sum(dtype=np.float64) - right) / n + penalty / 2 * np.vdot(weight, weight)
        scores /= total
        curvature = (1 - float(np.vdot(scores, scores)) / n) / (1 - 1 / num_classes)  # 1: all are equally likely
        scores[every, codes] -= 1
        scores /= n
        slope = np.empty((d + 1, num_classes))
        slope[:-1] = solve_triangular(factor, x.T @ scores + penalty * weight, lower=True, check_finite=False)
        slope[-1] = scores.sum(axis=0) * np.sqrt(num_classes)
        error = float(np.linalg.norm(slope)) / max(curvature, 1e-6)
        return float(loss), slope.ravel()

    def stop(intermediate_result: Any) -> None:
        if error <= ERROR * np.linalg.norm(intermediate_result.x):
            raise StopIteration

    point = np.zeros((d + 1) * num_classes)
    double = factor
    for dtype, flat in ((np.float32, 1e-9), (np.float64, 1e-14)):
        x, factor = x.astype(dtype, copy=False), double.astype(dtype, copy=False)
        options: Any = {"maxiter": STEPS, "maxcor": 20, "gtol": 1e-7, "ftol": flat}
        found = minimize(objective, point, jac=True, method="L-BFGS-B", callback=stop, options=options)
        if found.status == STOPPED or np.abs(found.jac).max() <= 1e-7 or (found.success and dtype is np.float64):
            return parts(found.x)
        point = found.x
    raise MeasurementError(
        f"linear_probe: the logistic regression did not converge in {found.nit} steps ({found.message}); raise l2"
    )
