"""How far a lasso's weights are from the optimum: duality gap and violation of the optimality conditions."""

from __future__ import annotations

from threading import Event

import numpy as np

from datamodels.regression.threads import each_chunk

TARGETS = 64  # at a time
BASES = 4  # sets of unpenalised columns that are remembered; each takes as much memory as the columns in float64
COMPILED = [np.dtype(kind) for kind in "?bBhHiIlLqQfd"]  # what numba takes: not float16, long double or foreign bytes


def certify(
    x: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    weight: np.ndarray,
    lam: np.ndarray,
    sd: np.ndarray,
    use_bias: bool,
    penalty: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    workers: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Relative duality gap (T,) and KKT violation / lam (T,) of these weights, from a fresh float64 residual.

    With r = y − o − X w and r0 = y − o, each less its mean if there is a bias, both less their projections on the
    columns with v_j = 0, g = Xᵀr / n and s the largest number ≤ 1 with s |g_j| ≤ lam v_j sd_j for all other j:

        P = ‖y − o − X w‖²/2n + lam Σ v_j sd_j |w_j|,   D = (‖r0‖² − ‖r0 − s r‖²) / 2n,   gap = (P − D) / (‖r0‖²/2n)

    and the absolute P − D where r0 = 0. The violation is the distance of Xᵀ(y − o − X w)/n sd_j from
    lam v_j sign(w_j), or from [−lam v_j, lam v_j] where w_j = 0, at its largest over the columns; absolute where
    lam = 0. Products with 0/1 columns are those of products.py, which round no more than float64 does.
    """
    from datamodels.regression import descent, products

    n, T = len(rows), weight.shape[1]
    gap, kkt = np.zeros(T), np.zeros(T)
    own = x if n == len(x) and (rows == np.arange(n)).all() else x[rows]
    if own.dtype not in COMPILED:
        own = own.astype(np.float32 if own.itemsize == 2 else np.float64)
    penalty = np.ones(len(weight)) if penalty is None else penalty
    bases: dict[bytes, np.ndarray] = {}

    def basis(free: np.ndarray) -> np.ndarray:
        """Orthonormal columns (n, r) that span those of x which are not shrunk."""
        found = bases.get(free.tobytes())
        if found is None:
            part = own[:, free].astype(np.float64)
            part = part - part.mean(axis=0) if use_bias else part
            left, size, _ = np.linalg.svd(part / np.sqrt((part**2).sum(axis=0)), full_matrices=False)
            found = left[:, size > 1e-7 * size[0]]
            if len(bases) >= BASES:
                bases.clear()
            bases[free.tobytes()] = found
        return found

    def chunk(some: slice) -> tuple[int, int]:
        # Outcomes are rows here: their sums then do not depend on how many targets there are.
        w = np.ascontiguousarray(weight[:, some].T, dtype=np.float64)
        r0 = y[rows, some].astype(np.float64)
        r0 = np.ascontiguousarray((r0 if offset is None else r0 - offset[rows, some]).T)
        highest = np.abs(r0).max(axis=1)
        r = r0 - products.rows_times(own, w)
        if use_bias:
            for _ in range(2):  # what the first mean leaves by rounding counts where columns are far from 0
                r0 -= r0.mean(axis=1, keepdims=True)
                r -= r.mean(axis=1, keepdims=True)
        own_v = penalty.ndim == 2 and penalty.shape[1] > 1
        v = np.ascontiguousarray(np.atleast_2d((penalty[:, some] if own_v else penalty).T), dtype=np.float64)
        plain, of_plain = r, products.times_columns(r, own)
        g = of_plain
        unshrunk = np.broadcast_to((v == 0) & (sd > 0), w.shape)
        if unshrunk.any():
            plain, r = r, r.copy()
            for b in range(len(r)):
                free = np.flatnonzero(unshrunk[b])
                if len(free):
                    q = basis(free)
                    r0[b] -= q @ (q.T @ r0[b])
                    r[b] -= q @ (q.T @ r[b])
            g = products.times_columns(r, own)
        over, size, violation = descent.optimality(g, of_plain, w, v, n * sd, sd, lam[some])
        s = 1 / np.maximum(over, 1.0)
        rr, r0r0 = (r**2).sum(axis=1), (r0**2).sum(axis=1)
        primal = (plain**2).sum(axis=1) / (2 * n) + size
        dual = s * (r0 * r).sum(axis=1) / n - s**2 * rr / (2 * n)
        fitted = r0r0 > (1e-12 * highest) ** 2 * n  # else r0 is 0 but for rounding
        gap[some] = np.where(fitted, (primal - dual) / np.where(fitted, r0r0 / (2 * n), 1.0), primal - dual)
        kkt[some] = violation / np.where(lam[some] > 0, lam[some], 1.0)
        return 0, 0

    for _ in each_chunk(chunk, T, workers, TARGETS, Event()):
        pass
    return gap, kkt
