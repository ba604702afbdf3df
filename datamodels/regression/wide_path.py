"""The lasso without a Gram matrix, for many more columns than rows: only pairs of columns that matter are multiplied.

The steps are those of descent.py. The products of two 0/1 columns are counted in bits when both are in the working set,
and the gradient of all columns is one product with the residuals of a chunk of targets, in int8. A chunk's targets
walk their paths side by side, so that this product is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import numba
import numpy as np

from datamodels.regression import descent, products
from datamodels.regression.lasso import PathOptions, Solution, float32_at_least
from datamodels.regression.problem import Problem
from datamodels.regression.scale import Scale
from datamodels.regression.threads import each_chunk

NAME = "wide"
TARGETS = 64  # a chunk
PATH_TOL = 1e-3  # largest violation / lam on the path, which only chooses a lambda; the refit goes to options.tol
PATH_LIMBS = 3  # digits of a residual whose product with the columns only screens
ROUNDS = 100  # of descent and check at one lambda


@dataclass(frozen=True, eq=False)
class Part:
    """The first n rows, as far as a fit sees them: mu (p,) means of coded columns, norm (p,) = n sd'."""

    n: int
    words: int
    mu: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of all rows, training rows first. x' = (x − origin) / unit is −1 and 1, or 0 and 1 without a bias.

    x (n, p): bool, or float64 coded.  coded (p, n): x' as rows, int8 or float64.  bits (p, words): x packed, the
    training rows filled up to whole words; or nothing.
    """

    x: np.ndarray
    coded: np.ndarray
    bits: np.ndarray
    origin: np.ndarray
    unit: np.ndarray
    train: Part
    full: Part

    def gradient(self, r: np.ndarray, n: int, limbs: int = products.LIMBS) -> np.ndarray:
        """X'ᵀr (B, p) over the first n rows of residuals r (B, ≥ n)."""
        r, x = np.ascontiguousarray(r[:, :n]), self.x[:n]
        g = products.times_columns(r, x, limbs)
        if x.dtype == bool:
            g -= r.sum(axis=1)[:, None] * self.origin
            g /= self.unit
        return g


class Target:
    """Where one target stands in one fit: a working set W of m columns, their weights w, residual r and gradient g."""

    def __init__(self, columns: Columns, part: Part, thr: np.ndarray, r: np.ndarray, kind: type):
        self.columns, self.part, self.thr = columns, part, thr
        self.r, self.g = r, np.zeros(0)
        self.last_r, self.last_g = r, self.g
        self.outside = thr.copy()  # infinite for the members of W
        self.m = 0
        self.W = np.zeros(0, dtype=np.int32)
        self.w, self.last_w = np.zeros(0), np.zeros(0)
        self.own, self.thr_w, self.norm_w, self.mu_w = np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0)
        self.H: np.ndarray = np.zeros((0, 0), dtype=kind)

    def join(self, which: np.ndarray, w: np.ndarray | None = None) -> None:
        """Take these columns into W."""
        if not len(which):
            return
        columns, part, m = self.columns, self.part, self.m
        self.m += len(which)
        if self.m > len(self.H):
            room = self.m + self.m // 2 + 30
            bigger = np.empty((room, room), dtype=self.H.dtype)
            bigger[:m, :m] = self.H[:m, :m]
            self.H = bigger
        self.W = np.concatenate([self.W, which.astype(np.int32)])
        self.outside[which] = np.inf
        if columns.bits.size:
            signed = columns.unit[0] != 1.0
            squares = _pack_bits(columns.bits, part.words, part.n, signed, self.W, m, len(which), self.H)
        else:
            squares = _pack_real(columns.coded, part.n, self.W, m, len(which), self.H)
        mu = part.mu[which]
        add = np.zeros(len(which)) if w is None else w
        self.w, self.last_w = np.concatenate([self.w, add]), np.concatenate([self.last_w, add])
        self.own = np.concatenate([self.own, squares - part.n * mu**2])
        self.thr_w = np.concatenate([self.thr_w, self.thr[which]])
        strict = np.where(self.thr[which] == 0, descent.FREE, 1.0)
        self.norm_w = np.concatenate([self.norm_w, strict * part.norm[which]])
        self.mu_w = np.concatenate([self.mu_w, mu])

    def go_on(self, ahead: float) -> None:
        """Move on along the line through the last two solutions; the gradient is to be computed before descend."""
        self.w, self.last_w = self.w + ahead * (self.w - self.last_w), self.w
        self.r, self.last_r = self.r + ahead * (self.r - self.last_r), self.r
        self.g, self.last_g = self.g + ahead * (self.g - self.last_g), self.g

    def beyond(self, bound: float) -> np.ndarray:
        """Columns outside W that violate optimality at the lambda `bound`."""
        return _beyond(self.g, self.outside, bound)

    def descend(self, lam: float, tol: float) -> None:
        """To optimality on W; r follows, and g is left to be computed."""
        before, gl = self.w.copy(), self.g[self.W]
        descent.descend(
            self.H, self.m, self.w, gl, self.own, self.mu_w, float(self.part.n), self.thr_w, self.norm_w, lam, tol
        )
        self.move(self.w - before)

    def move(self, by: np.ndarray) -> None:
        moved = np.flatnonzero(by)
        self.r = self.r.copy()  # the last one is kept
        descent.slide(self.columns.coded, self.part.mu, self.W[moved], by[moved], len(moved), self.r)

    @property
    def support(self) -> tuple[np.ndarray, np.ndarray]:
        on = self.w != 0
        return self.W[on], self.w[on]


def solve(
    problem: Problem, options: PathOptions, use_bias: bool, workers: int, progress: Callable[[int, int], None]
) -> Solution:
    """Path on the training rows, lambda by the validation rows, refit on both; chunks of targets in parallel."""
    columns = _columns(problem, use_bias)
    T, p = problem.y.shape[1], problem.x.shape[1]
    parts = columns.train, columns.full
    scales = [Scale.of_coded(columns.origin, columns.unit, part.mu, part.norm, part.n, T) for part in parts]
    solution = Solution.empty(p, T, options.k, *scales)
    stop = Event()
    size = max(1, min(TARGETS, -(-T // workers)))

    def chunk(targets: slice) -> tuple[int, int]:
        return _solve_chunk(targets, problem, columns, options, use_bias, solution, stop)

    for done in each_chunk(chunk, T, workers, size, stop):
        progress(*done)
    return solution


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int) -> int:
    """Bytes that solve takes at its largest, beside the problem: columns twice, and per thread its chunk of targets."""
    binary = np.dtype(dtype).kind == "b"
    block = min(T, TARGETS)
    gradients = 8 * block * p * 13
    working = block * (2 if n <= np.iinfo(np.int16).max else 4 if binary else 8) * 9 * min(n, p) ** 2 // 4
    return (3 if binary else 24) * n * p + min(workers, -(-T // block)) * (gradients + working)


def _columns(problem: Problem, use_bias: bool) -> Columns:
    from datamodels.regression.gram import code_columns

    c = code_columns(problem.x, problem.train, problem.val, use_bias)
    n, n_train, p = len(c.x), c.num_train, c.x.shape[1]
    on = 1.0 if use_bias else 0.0
    bits = np.zeros((p, 0), dtype=np.uint64)
    if c.x.dtype == bool:
        coded = c.x.view(np.int8).T.copy()  # always: one column would be x itself
        bits = np.concatenate([_bits(coded[:, :n_train]), _bits(coded[:, n_train:])], axis=1)
        if use_bias:
            coded *= 2
            coded -= 1
    else:
        coded = np.ascontiguousarray(c.x.T)
    words = -(-n_train // 64)
    train = Part(n_train, words, on * c.sums_train / n_train, n_train * c.sd_train)
    full = Part(n, bits.shape[1], on * (c.sums_train + c.sums_val) / n, n * c.sd_full)
    return Columns(c.x, coded, bits, c.origin, c.unit, train, full)


def _bits(x: np.ndarray) -> np.ndarray:
    """(p, words) uint64 of 0/1 columns (p, n); what is beyond n is 0."""
    packed = np.packbits(x, axis=1, bitorder="little")
    padded = np.zeros((len(x), -(-x.shape[1] // 64) * 8), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def _solve_chunk(
    targets: slice,
    problem: Problem,
    columns: Columns,
    options: PathOptions,
    use_bias: bool,
    into: Solution,
    stop: Event,
) -> tuple[int, int]:
    """Fill in these targets, unless told to stop; how many they are, and the lambdas they took."""
    train, full = columns.train, columns.full
    y = np.ascontiguousarray(problem.outcomes(np.concatenate([problem.train, problem.val]), targets).T)
    at = np.arange(*targets.indices(problem.y.shape[1]))
    for part, scale in ((train, into.train), (full, into.full)):
        scale.take(at, y[:, : part.n], use_bias)
    penalty = np.ascontiguousarray(problem.penalty_of(targets).T)
    kind: type = np.int16 if len(columns.x) <= np.iinfo(np.int16).max else np.float32
    if not columns.bits.size:
        kind = np.float64

    def begin(part: Part, scale: Scale) -> list[Target]:
        """Every target at the least-squares fit of its unpenalised columns, with its gradient."""
        begun = []
        thr = descent.thresholds(part.norm, penalty)
        for b, t in enumerate(at):
            target = Target(columns, part, thr[b], y[b] - scale.y_mean[t], kind)
            free = np.flatnonzero(thr[b] == 0)
            if len(free):
                z = columns.coded[free, : part.n].T - part.mu[free]
                size = np.sqrt((z**2).sum(axis=0))
                target.join(free, np.linalg.lstsq(z / size, target.r[: part.n], rcond=1e-7)[0] / size)
                target.move(target.w)
                target.last_r = target.r
            begun.append(target)
        for target, g in zip(begun, columns.gradient(np.stack([t.r for t in begun]), part.n), strict=True):
            target.g = target.last_g = g
        return begun

    points = begin(train, into.train)
    r2_scale = ((y[:, train.n :] - into.train.y_mean[at, None]) ** 2).sum(axis=1)
    grids, going, best, then = {}, [], {}, {}
    best_error = np.full(len(at), np.inf)
    for b, t in enumerate(at):
        point = points[b]
        if into.train.constant[t]:
            continue
        best_error[b] = (point.r[train.n :] ** 2).sum()
        into.r2_train[t] = 1 - (point.r[: train.n] ** 2).mean() / into.train.power[t]
        top = descent.lambda_max(point.g, point.thr)
        if top == 0:
            continue
        grids[b] = options.grid(top)
        going.append(b)
        best[b] = then[b] = point.support
        n_val = full.n - train.n
        into.path_lam[0, t], into.path_mse[0, t], into.path_nnz[0, t] = top, best_error[b] / n_val, len(best[b][0])

    for i in range(1, options.k):
        if not going:
            break
        for b in going:
            if i > 1:
                points[b].go_on((grids[b][i - 1] - grids[b][i]) / (grids[b][i - 2] - grids[b][i - 1]))
        lam = {b: float(grids[b][i]) for b in going}
        _settle([points[b] for b in going], [lam[b] for b in going], columns, stop)
        if stop.is_set():
            return 0, 0
        for b in list(going):
            t, point = at[b], points[b]
            error = (point.r[train.n :] ** 2).sum()
            support = point.support
            into.path_lam[i, t], into.path_mse[i, t] = lam[b], error / (full.n - train.n)
            into.path_nnz[i, t] = len(support[0])
            if error < best_error[b]:
                best_error[b], into.best[t], best[b] = error, i, support
                into.r2_train[t] = 1 - (point.r[: train.n] ** 2).mean() / into.train.power[t]
            if i <= into.best[t] + 1:
                then[b] = support
            if i - into.best[t] >= options.patience:
                into.turned[t] = True
                going.remove(b)
                points[b] = None  # type: ignore[call-overload]

    del points
    ends = begin(full, into.full)
    todo, lams, denominator = [], [], []
    for b, t in enumerate(at):
        target = ends[b]
        if not into.train.constant[t] and r2_scale[b] > 0:
            into.r2_val[t] = 1 - best_error[b] / r2_scale[b]
        if b in grids:
            into.lam[t] = np.float32(grids[b][into.best[t]])
        else:  # nothing to select: the lambda_max of all rows selects nothing either
            into.lam[t] = 0.0 if into.full.constant[t] else float32_at_least(descent.lambda_max(target.g, target.thr))
        left, power = (target.r**2).sum(), into.full.power[t] * full.n
        if b in grids:
            W, w = best[b]
            more = np.setdiff1d(then[b][0], W)
            start = np.zeros(len(columns.unit))
            start[W] = w
            new = np.sort(np.concatenate([W, more]))
            new = new[np.isfinite(target.outside[new])]
            by = start[target.W] - target.w  # of unpenalised columns
            target.w = start[target.W]
            target.join(new, start[new])
            target.move(np.concatenate([by, start[new]]))
        if into.lam[t] > 0 or target.m:
            todo.append(target)
            lams.append(float(into.lam[t]))
            denominator.append(left if left > 1e-24 * max(power, 1e-300) else 2.0 * full.n)
    _refit(todo, lams, denominator, columns, options.tol / 4, stop)
    if stop.is_set():
        return 0, 0
    for b, t in enumerate(at):
        W, w = ends[b].support
        into.weight[W, t] = w / columns.unit[W]
    return len(at), int((into.path_nnz[:, at] >= 0).sum())


def _settle(points: list[Target], lams: list[float], columns: Columns, stop: Event) -> None:
    """Bring each point to optimality at its lambda, to PATH_TOL."""
    todo = [(point, lam, lam) for point, lam in zip(points, lams, strict=True)]
    for _ in range(ROUNDS):
        if not todo or stop.is_set():
            return
        for point, lam, bound in todo:
            point.join(point.beyond(bound))
            point.descend(lam, PATH_TOL)
        gradients = columns.gradient(np.stack([point.r for point, _, _ in todo]), columns.train.n, PATH_LIMBS)
        for (point, _, _), g in zip(todo, gradients, strict=True):
            point.g = g
        again = [(point, lam, lam * (1 + PATH_TOL)) for point, lam, _ in todo]
        todo = [item for item in again if len(item[0].beyond(item[2]))]


def _refit(
    points: list[Target], lams: list[float], denominator: list[float], columns: Columns, tol: float, stop: Event
) -> None:
    """Bring each point to a relative duality gap of tol at its lambda."""
    todo = [(i, descent.NEAR) for i in range(len(points))]
    n = columns.full.n
    fresh = True
    for _ in range(ROUNDS):
        if not todo or stop.is_set():
            return
        if not fresh:
            for i, near in todo:
                points[i].descend(lams[i], near)
        gradients = columns.gradient(np.stack([points[i].r for i, _ in todo]), n)
        again = []
        for (i, near), g in zip(todo, gradients, strict=True):
            point, lam = points[i], lams[i]
            point.g = g
            new = point.beyond(lam)
            if not fresh:
                if _gap(point, lam) <= tol * denominator[i] / 2:
                    continue
                if not len(new):
                    near = max(near * 0.2, 1e-13)
            point.join(new)
            again.append((i, near))
        todo, fresh = again, False


def _gap(point: Target, lam: float) -> float:
    """The duality gap, times n."""
    r, shrunk = point.r, (point.thr > 0) & (point.thr < descent.NEVER)
    over = np.abs(point.g[shrunk]) / (lam * point.thr[shrunk]) if lam > 0 else np.full(int(shrunk.any()), np.inf)
    s = 1 / max(1.0, over.max(initial=0.0))
    rr = float(r @ r)
    r0r = rr + float(point.w @ point.g[point.W])
    return rr / 2 + lam * float(point.thr_w @ np.abs(point.w)) - s * r0r + s * s * rr / 2


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _beyond(g, outside, bound):  # type: ignore[no-untyped-def]
    count = 0
    for j in range(len(g)):
        count += abs(g[j]) > outside[j] * bound
    out = np.empty(count, dtype=np.int32)
    if count > 0:
        at = 0
        for j in range(len(g)):
            if abs(g[j]) > outside[j] * bound:
                out[at] = j
                at += 1
    return out


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack_bits(bits, words, n, signed, W, m, count, H):  # type: ignore[no-untyped-def]
    """Rows and columns m to m + count of the packed products; their diagonal is returned."""
    squares = np.empty(count)
    for a in range(m, m + count):
        one = bits[W[a]]
        for i in range(a + 1):
            other = bits[W[i]]
            total = np.uint64(0)
            for k in range(words):
                v = one[k] ^ other[k] if signed else one[k] & other[k]
                v = v - ((v >> np.uint64(1)) & np.uint64(0x5555555555555555))
                v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
                v = (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
                total += (v * np.uint64(0x0101010101010101)) >> np.uint64(56)
            value = np.int64(total)
            if signed:
                value = n - 2 * value
            H[a, i] = value
            H[i, a] = value
        squares[a - m] = H[a, a]
    return squares


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack_real(coded, n, W, m, count, H):  # type: ignore[no-untyped-def]
    squares = np.empty(count)
    for a in range(m, m + count):
        one = coded[W[a]]
        for i in range(a + 1):
            other = coded[W[i]]
            sums = np.zeros(8)
            whole = n - n % 8
            for k in range(0, whole, 8):
                for b in range(8):
                    sums[b] += one[k + b] * other[k + b]
            total = 0.0
            for k in range(whole, n):
                total += one[k] * other[k]
            for b in range(8):
                total += sums[b]
            H[a, i] = total
            H[i, a] = total
        squares[a - m] = H[a, a]
    return squares
