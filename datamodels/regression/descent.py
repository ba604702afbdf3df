"""Coordinate descent on the columns that matter, for one target: kernels compiled by numba.

They see coded columns x' (see gram.py) and weights in their units, with everything multiplied by n:

    minimise  1/2 ‖r0 − X'w‖² + lam · Σ_j thr_j |w_j|,   thr_j = n v_j sd'_j

    q = X'ᵀ r0,   H = X'ᵀX',   g = q − H w        X' centred: H_jk = M_jk − n mu_j mu_k, of which M is stored

M is exact: counts in int16 or float32, or float64. A working set W of columns grows along the path; its part of H is
packed, so that descent runs in cache. Only when descent has ended is g of all p columns brought up to date, by the
columns whose weight moved, eight at a time: that is where the time goes.

Between breakpoints the lasso path is linear in lam (Osborne, Presnell and Turlach 2000), and g with it. So each lambda
starts where the line through the last two solutions leads, and a column moves only if that point violates its
optimality condition by more than tol · lam.
"""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

SWEEPS = 20_000  # of one descent; a certificate tells when they did not suffice
ROUNDS = 100  # of descent and check at one lambda
NEAR = 1e-4  # the first tolerance of a refit; it falls until the gap is small enough
NEVER = 1e300  # the threshold of a column that must not be chosen
FREE = 0.01  # of it for unpenalised columns: the gap, which takes them as solved, does not see theirs


def thresholds(norm: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """thr (B, p) from n sd' (p,) and penalties (B, p); NEVER for constant columns."""
    return np.where(norm > 0, penalty * norm, NEVER)


def lambda_max(g: np.ndarray, thr: np.ndarray) -> float:
    """The smallest lambda at which no penalised column is chosen; g (p,) with none of them chosen."""
    shrunk = (thr > 0) & (thr < NEVER)
    return float((np.abs(g[shrunk]) / thr[shrunk]).max(initial=0.0))


def _compiled(function):  # type: ignore[no-untyped-def]
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


@_compiled
def _subtract(rows, which, by, count, mu, factor, along, out):  # type: ignore[no-untyped-def]
    """out −= Σ_a by_a · (rows[which_a] − factor · mu[which_a] · along), for the first `count`, eight at a time."""
    kind = out.dtype.type
    a = 0
    while a + 8 <= count:
        r0, r1, r2, r3 = rows[which[a]], rows[which[a + 1]], rows[which[a + 2]], rows[which[a + 3]]
        r4, r5, r6, r7 = rows[which[a + 4]], rows[which[a + 5]], rows[which[a + 6]], rows[which[a + 7]]
        d0, d1, d2, d3 = kind(by[a]), kind(by[a + 1]), kind(by[a + 2]), kind(by[a + 3])
        d4, d5, d6, d7 = kind(by[a + 4]), kind(by[a + 5]), kind(by[a + 6]), kind(by[a + 7])
        shift = 0.0
        for b in range(a, a + 8):
            shift += by[b] * mu[which[b]]
        s = kind(factor * shift)
        for j in range(len(out)):
            out[j] -= (
                (d0 * kind(r0[j]) + d1 * kind(r1[j]) + d2 * kind(r2[j]) + d3 * kind(r3[j]))
                + (d4 * kind(r4[j]) + d5 * kind(r5[j]) + d6 * kind(r6[j]) + d7 * kind(r7[j]))
                - s * along[j]
            )
        a += 8
    while a < count:
        row, d, s = rows[which[a]], kind(by[a]), kind(factor * by[a] * mu[which[a]])
        for j in range(len(out)):
            out[j] -= d * kind(row[j]) - s * along[j]
        a += 1


@_compiled
def move(M, diag, mu, n, which, by, count, g):  # type: ignore[no-untyped-def]
    """g −= H[:, which] @ by, for the first `count` of them."""
    _subtract(M, which, by, count, mu, n, mu, g)
    for a in range(count):  # the diagonal may not fit into M
        k = which[a]
        g[k] -= g.dtype.type(by[a] * (diag[k] - np.float64(M[k, k])))


@_compiled
def descend(H, m, w, g, own, mu, n, thr, norm, lam, tol):  # type: ignore[no-untyped-def]
    """Cyclic coordinate descent in place on (w, g) of m columns, until none violates optimality by more than tol · lam.

    H: rows of M, packed; own: the diagonal of X'ᵀX, centred; norm: n sd', what a violation is measured against.
    """
    kind = g.dtype.type
    centre = 0.0  # g lacks mu · centre while we are here
    for _ in range(SWEEPS):
        moved = False
        for i in range(m):
            old = w[i]
            rho = np.float64(g[i]) + mu[i] * centre + own[i] * old
            t = lam * thr[i]
            new = 0.0
            if rho > t:
                new = (rho - t) / own[i]
            elif rho < -t:
                new = (rho + t) / own[i]
            d = new - old
            if d == 0.0 or (abs(d) * own[i] <= tol * lam * norm[i] and (new != 0.0 or old == 0.0)):
                continue
            moved = True
            w[i] = new
            step, row, here = kind(d), H[i], np.float64(g[i])
            for j in range(m):
                g[j] -= step * kind(row[j])
            centre += n * d * mu[i]
            g[i] = kind(here - d * (own[i] + n * mu[i] * mu[i]))  # the diagonal may not fit into H
        if not moved:
            break
    for j in range(m):
        g[j] += kind(mu[j] * centre)


@_compiled
def _grown(matrix, m):  # type: ignore[no-untyped-def]
    size = 2 * len(matrix) + 60
    bigger = np.empty((size, size), dtype=matrix.dtype)
    bigger[:m, :m] = matrix[:m, :m]
    return bigger


@_compiled
def _pack(M, W, m, count, H):  # type: ignore[no-untyped-def]
    """Rows and columns m to m + count of the packed H = M[W, W]; the diagonal is left to whoever uses it."""
    near = np.empty(M.shape[1], dtype=M.dtype)  # a row is read in order, and picked from where it is near
    for a in range(m, m + count):
        row, into = M[W[a]], H[a]
        for j in range(len(near)):
            near[j] = row[j]
        for i in range(m + count):
            into[i] = near[W[i]]
    for i in range(m):
        into = H[i]
        for a in range(m, m + count):
            into[a] = H[a, i]


@_compiled
def _moved(W, w, start, m, which, by):  # type: ignore[no-untyped-def]
    """The columns whose weight is no longer that of start, and by how much; how many. start follows."""
    count = 0
    for i in range(m):
        if w[i] != start[i]:
            which[count], by[count] = W[i], w[i] - start[i]
            start[i] = w[i]
            count += 1
    return count


@_compiled
def slide(X, mu, which, by, count, r):  # type: ignore[no-untyped-def]
    """r −= (X − mu)[which]ᵀ @ by, for the first `count` of them; X holds columns as rows."""
    _subtract(X, which, by, count, mu, 1.0, np.ones(len(r), dtype=r.dtype), r)


@_compiled
def _square(r):  # type: ignore[no-untyped-def]
    """‖r‖² in float64; eight sums at a time, in an order that does not change."""
    sums = np.zeros(8)
    whole = len(r) - len(r) % 8
    for i in range(0, whole, 8):
        for a in range(8):
            sums[a] += np.float64(r[i + a]) * np.float64(r[i + a])
    total = 0.0
    for i in range(whole, len(r)):
        total += np.float64(r[i]) * np.float64(r[i])
    for a in range(8):
        total += sums[a]
    return total


@_compiled
def path(  # type: ignore[no-untyped-def]
    M, diag, mu, n, q, power, X_v, r_v, thr, norm, mu_g, free, free_w, grid, patience, tol, H, errors, nnz
):
    """Path on the training rows until validation turns.

    X_v (p, n_v), r_v (n_v,): coded columns and outcomes of the validation rows, r_v about the training mean.
    free, free_w: unpenalised columns and their least-squares weights.  mu_g: mu in the dtype that g is to have.
    H: room for the packed matrix, larger when it comes back.  errors, nnz (k,) are filled in as far as the path goes.

    Returns (best, turned, ‖r‖² at best, columns and weights at best, columns that are non-zero one step later, H).
    """
    p = len(q)
    kind = mu_g.dtype.type
    g, outside = np.empty(p, dtype=mu_g.dtype), np.empty(p, dtype=mu_g.dtype)
    for j in range(p):
        g[j], outside[j] = kind(q[j]), kind(thr[j])  # outside: infinite for the members of W
    r = np.empty(len(r_v), dtype=mu_g.dtype)
    for i in range(len(r_v)):
        r[i] = kind(r_v[i])
    W, which = np.empty(p, dtype=np.int32), np.empty(p, dtype=np.int32)
    w, last_w, start, by = np.zeros(p), np.zeros(p), np.zeros(p), np.zeros(p)
    own, thr_w, norm_w, mu_w = np.empty(p), np.empty(p), np.empty(p), np.empty(p)
    gl = np.empty(p, dtype=mu_g.dtype)
    m = len(free)
    while m > len(H):
        H = _grown(H, 0)
    for a in range(m):
        k = free[a]
        W[a], w[a], outside[k] = k, free_w[a], np.inf
        own[a], thr_w[a], norm_w[a], mu_w[a] = diag[k] - n * mu[k] * mu[k], thr[k], norm[k], mu[k]
    _pack(M, W, 0, m, H)
    move(M, diag, mu_g, n, W, w, m, g)
    slide(X_v, mu, W, w, m, r)
    last_g, last_r = g.copy(), r.copy()
    last_w[:m] = w[:m]

    errors[0], nnz[0] = _square(r), m
    best, turned, rr = 0, False, power
    for i in range(m):
        rr -= w[i] * (q[W[i]] + np.float64(g[W[i]]))
    best_W, best_w = W[:m].copy(), w[:m].copy()
    then = best_W

    for step in range(1, len(grid)):
        lam, before = grid[step], grid[step - 1]
        bound = kind(lam)
        if step > 1:
            ahead = (before - lam) / (grid[step - 2] - before)
            go = kind(ahead)
            for j in range(p):
                now = g[j]
                g[j] = now + go * (now - last_g[j])
                last_g[j] = now
            for i in range(len(r)):
                now = r[i]
                r[i] = now + go * (now - last_r[i])
                last_r[i] = now
            for i in range(m):
                now_w = w[i]
                w[i] = now_w + ahead * (now_w - last_w[i])
                last_w[i] = now_w
        start[:m] = w[:m]

        for attempt in range(ROUNDS):
            count = 0  # of columns that may join; to count is quick
            for j in range(p):
                count += abs(g[j]) > outside[j] * bound
            if count == 0 and attempt > 0:
                break
            if count > 0:
                a = m
                for j in range(p):
                    if abs(g[j]) > outside[j] * bound:
                        W[a], w[a], last_w[a], start[a], outside[j] = j, 0.0, 0.0, 0.0, np.inf
                        own[a], thr_w[a], norm_w[a], mu_w[a] = diag[j] - n * mu[j] * mu[j], thr[j], norm[j], mu[j]
                        a += 1
                while a > len(H):
                    H = _grown(H, m)
                _pack(M, W, m, a - m, H)
                m = a
            for i in range(m):
                gl[i] = g[W[i]]
            descend(H, m, w, gl, own, mu_w, n, thr_w, norm_w, lam, tol)
            count = _moved(W, w, start, m, which, by)
            move(M, diag, mu_g, n, which, by, count, g)
            slide(X_v, mu, which, by, count, r)
            bound = kind(lam * (1.0 + tol))

        errors[step] = _square(r)
        count = 0
        for i in range(m):
            count += w[i] != 0.0
        nnz[step] = count
        if errors[step] < errors[best]:
            best = step
            best_W, best_w = W[:m][w[:m] != 0.0], w[:m][w[:m] != 0.0]
            rr = power
            for i in range(m):
                rr -= w[i] * (q[W[i]] + np.float64(g[W[i]]))
        if step <= best + 1:
            then = W[:m][w[:m] != 0.0]
        if step - best >= patience:
            turned = True
            break
    return best, turned, rr, best_W, best_w, then, H


@_compiled
def refit(M, diag, mu, n, q, power, thr, norm, lam, W0, w0, tol, denominator, H):  # type: ignore[no-untyped-def]
    """Minimiser at lam from the start (W0, w0), until the relative duality gap is at most tol; all in float64.

    Returns (columns, weights, gap, H).
    """
    p = len(q)
    m = len(W0)
    while m > len(H):
        H = _grown(H, 0)
    W, which = np.empty(p, dtype=np.int32), np.empty(p, dtype=np.int32)
    w, start, by, gl, g = np.zeros(p), np.zeros(p), np.zeros(p), np.empty(p), q.copy()
    own, thr_w, norm_w, mu_w = np.empty(p), np.empty(p), np.empty(p), np.empty(p)
    outside = thr.copy()  # infinite for the members of W
    for a in range(m):
        k = W0[a]
        W[a], w[a], outside[k] = k, w0[a], np.inf
        own[a], thr_w[a], norm_w[a], mu_w[a] = diag[k] - n * mu[k] * mu[k], thr[k], norm[k], mu[k]
        gl[a] = q[k]
    _pack(M, W, 0, m, H)
    centre = 0.0
    for i in range(m):  # within W the gradient needs W alone
        row, wi, here = H[i], w[i], gl[i]
        if w[i] == 0.0:
            continue
        for j in range(m):
            gl[j] -= wi * np.float64(row[j])
        gl[i] = here - wi * diag[W[i]]
        centre += n * w[i] * mu_w[i]
    for i in range(m):
        gl[i] += mu_w[i] * centre

    near, gap = NEAR, np.inf
    for _ in range(ROUNDS):
        descend(H, m, w, gl, own, mu_w, n, thr_w, norm_w, lam, near)
        count = _moved(W, w, start, m, which, by)
        move(M, diag, mu, n, which, by, count, g)

        size, r0r, rr, highest = 0.0, power, power, 1.0
        for i in range(m):
            size += thr_w[i] * abs(w[i])
            r0r -= w[i] * q[W[i]]
            rr -= w[i] * (q[W[i]] + g[W[i]])
        rr = max(rr, 0.0)
        for j in range(p):
            if thr[j] > 0.0 and abs(g[j]) > lam * thr[j]:
                highest = max(highest, abs(g[j]) / (lam * thr[j]) if lam > 0.0 else np.inf)
        s = 1.0 / highest
        gap = (rr / 2.0 + lam * size - s * r0r + s * s * rr / 2.0) / (denominator / 2.0)
        if gap <= tol:
            break
        count = 0
        for j in range(p):
            if abs(g[j]) > lam * outside[j]:
                a = m + count
                W[a], w[a], start[a], outside[j] = j, 0.0, 0.0, np.inf
                own[a], thr_w[a], norm_w[a], mu_w[a] = diag[j] - n * mu[j] * mu[j], thr[j], norm[j], mu[j]
                count += 1
        while m + count > len(H):
            H = _grown(H, m)
        _pack(M, W, m, count, H)
        m += count
        if count == 0:
            near = max(near * 0.2, 1e-13)
        for i in range(m):
            gl[i] = g[W[i]]
    return W[:m].copy(), w[:m].copy(), gap, H


@_compiled
def optimality(g, of_plain, w, v, scale, sd, lam):  # type: ignore[no-untyped-def]
    """Per target: max |g| / (lam v sd) over what is shrunk, lam Σ v sd |w|, and the largest violation.

    g, of_plain (B, p): Xᵀr less the unpenalised columns, and all of it.  v (B or 1, p).  scale: n sd.
    """
    B, p = g.shape
    over, size, violation = np.zeros(B), np.zeros(B), np.zeros(B)
    for b in range(B):
        shrunk = v[b if len(v) > 1 else 0]
        for j in range(p):
            if sd[j] <= 0.0:
                continue
            bound, u = lam[b] * shrunk[j], w[b, j] * sd[j]
            size[b] += bound * abs(u)
            if shrunk[j] > 0.0:
                slope = abs(g[b, j]) / scale[j]
                over[b] = max(over[b], slope / bound if bound > 0.0 else np.inf if slope > 0.0 else 0.0)
            slope = of_plain[b, j] / scale[j]
            off = abs(slope) - bound if u == 0.0 else abs(slope - bound) if u > 0.0 else abs(slope + bound)
            violation[b] = max(violation[b], off)
    return over, size, violation


def is_compiled() -> bool:
    """Whether an earlier process left these kernels compiled; if not, that takes a while."""
    folder = Path(path._cache.cache_path)
    newest = Path(__file__).stat().st_mtime
    return any(file.stat().st_mtime >= newest for file in folder.glob("descent.refit-*.nbi"))
