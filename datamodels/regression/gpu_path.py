"""The lasso path of all targets at once on a GPU: an exact shared Gram matrix, small problems gathered from it.

The path of a target needs little of the p × p Gram matrix G: per lambda the few columns that may matter (its support
and what the sequential strong rule lets in), and once the gradient of all columns, q − G u, which proves that none was
missed. So a round, for all targets that are still under way, each at its own lambda, is

    gather   local Gram matrices, (B, m, m) for targets of about equal m                      T m² reads
    solve    accelerated proximal gradient on them (gpu_prox), some tens of iterations        T m² per iteration
    update   g ← g − G Δu for all columns, one matrix product                                 2 p² T, twice in half
    check    the duality gap of the whole problem; those that pass go on to their next lambda, those whose validation
             error has turned leave, and the arrays close up behind them

A target whose local problem would be larger than about p / 12 iterates on G itself (`engine="prox"` does so for all:
first-order lockstep over all targets, the simplest exact method; kept because it is the better one there).

Counts. G in exact integers: C_jk = Σ_i x_ij x_ik comes from int8 products, and what is kept is E = C − a aᵀ, off the
diagonal, with integers a_j = round(√n mean_j). So |E| is within √n of n times the covariance, for any means; float16
holds it exactly up to 2,048 (at n=100,000, alpha=½: 22 standard deviations of chance), and where a pair of columns
exceeds that (copies of each other) a second float16 matrix holds the rest. With m the means and e = a/√n − m, exactly

    G = D⁻¹ (E/n + diag + m eᵀ + e (m + e)ᵀ) D⁻¹,   D = diag(sd)

and without a bias the same with m = 0. Real columns: G itself, in two float16 limbs. In a product, weights are split
into two float16 limbs scaled per target, 22 bits; sums are float32. Only changes of weights are multiplied, so the
rounding is relative to the changes. Where lambda has fallen 32-fold, and in the refit before the start and at the end,
gradients are computed afresh from the columns in float64.

Counted on a CPU (float32, n=8,000, p=3,000, T=64, 100 and 375 columns that matter, medians of 310 and 711 non-zeros):
21 to 23 lambdas until validation turned, one round for each, 7 to 9 iterations in a round; lockstep on G took 8 per
lambda. With these counts, at n=100,000 (a fifth validates), p=50,000, T=10,000 on one H200, at rates assumed here (int8
1,000 TOP/s, float16 600 TFLOP/s, float64 50 TFLOP/s, memory 3.5 TB/s). These are projections, not measurements; `make
bench-gpu` measures.

    columns, outcomes, weights from and to the host            13 GB              4 s
    Gram, train then validation   n p² · 2, half by symmetry   2.5e14 int8        .3 s
    XᵀY on the training rows      2 · .8 n p T                 8e13 float64       1.6 s
    path, active set, 23 rounds
        update                    2 · 2 p² T                   1e14 float16       .17 s each, 4 s
        gather, m=1,500           T m² entries of 2 bytes      32-byte sectors    .2 s each, 5 s
        iterations                8 · 4 T m² bytes             720 GB             .2 s each, 5 s
        passes over p × T         30 of 2 GB                                      .02 s each, .5 s
    path, lockstep instead        23 · 8 updates               1.8e16 float16     31 s, and passes 4 s
    validation errors, 23 times   2 · 2 · .2 n p T             9e14 float16       1.5 s
    refit: a round; fresh gradients before and after, 2 · 4 n p T each in float64 8 s
    certificate                   4 n p T                      2e14 float64       4 s
    whole job                     active set 34 s, lockstep 55 s
    device memory                 X .6, E 5, outcomes 8, p × T arrays 30 GB, scratch 25 GB
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from datamodels.errors import RegressionError
from datamodels.regression import memory as machine
from datamodels.regression.gpu_columns import (
    COLUMNS,
    LOW,
    ROWS,
    TILE_BYTES,
    Columns,
    Group,
    OnDevice,
    Span,
    Units,
    added,
    as_slice,
    certify,
    fresh,
    gap_of,
    groups,
    half_product,
    has_half_product,
    is_binary,
    limbs,
    open_device,
    padded,
    predictions,
    slices,
    standardised,
)
from datamodels.regression.gpu_prox import minimise
from datamodels.regression.lasso import PathOptions, Solution, float32_at_least
from datamodels.regression.problem import Problem

__all__ = ["NAME", "certify", "memory", "solve"]

NAME = "gpu"
PATH_TOL = 1e-4  # relative duality gap of the path's solutions, which only choose a lambda
MAX_ROUNDS = 50  # at one lambda; then the path goes on, and the refit stops, with what there is
LOCAL_ITERATIONS, GLOBAL_ITERATIONS = 400, 64  # a round
FRESH_EVERY = 32.0  # how far lambda may fall before the gradient is computed afresh
REFRESHES = 5  # of the refit's gradients, at most
EXACT_IN_HALF = 2048
SIZES = np.array([16 * 2**i * (2 + j) // 2 for i in range(16) for j in range(2)])  # 16, 24, 32, 48, …
SMALL = 256  # local problems up to this size are always gathered
DENSE = 12  # and larger ones while they have less than a 12th of the columns
FINISHED_AT_ONCE = 256  # targets that are refitted in float64
FEWEST = 32  # targets at a time; with room for fewer, gpu_tiles is asked
WORK = {"half": torch.float32, "single": torch.float32, "double": torch.float64}
VALUES = {"cuda": 1 << 29, "cpu": 1 << 23}  # of local Gram matrices, or of the rows of p × T arrays, at a time


class Gram:
    """G = ZᵀZ / n of standardised columns on a device, exact for 0/1 columns: see the head of the file.

    entries: E without its diagonal in 1 or 2 matrices, times `factors`; precision "half" (float16, sums in float32),
    "single" or "double".  scale, diagonal, norms (of G's diagonal) (width,); left, right (width, 0 or 2).
    """

    def __init__(self, parts: list[Columns], units: Units, precision: str) -> None:
        """Of the rows of these parts together; `units` are theirs."""
        self.units, self.precision, self.work = units, precision, WORK[precision]
        self.columns, self.device = parts[0], parts[0].device
        self.width = width = parts[0].width
        kept = {"half": torch.float16, "single": torch.float32, "double": torch.float64}[precision]
        self.entries = [torch.zeros((width, width), dtype=kept, device=self.device)]
        self.largest = 0.0
        self.ones = self.a = torch.zeros(width, dtype=torch.float64, device=self.device)
        if parts[0].bits is not None:
            self._count(parts)
        else:
            self._multiply(parts)

    @property
    def factors(self) -> list[float]:
        return [1.0, 1.0 if self.columns.bits is not None else LOW][: len(self.entries)]

    def add(self, part: Columns, units: Units) -> None:
        """Add the rows of another part; `units` are those of all rows then."""
        self.units = units
        if part.bits is None:
            raise AssertionError("real columns are multiplied anew")
        self._count([part], self.counts)

    def counts(self, i: slice, j: slice) -> torch.Tensor:
        """C (int32) of these rows and columns, exactly as it was counted."""
        entries = added(part[i, j].double() * factor for part, factor in zip(self.entries, self.factors, strict=True))
        counts = (entries * self.per_count).round() + torch.outer(self.a[i], self.a[j])
        if i == j:
            counts.diagonal().copy_(self.ones[i])
        return counts.to(torch.int32)

    def _count(self, parts: list[Columns], before: Callable[[slice, slice], torch.Tensor] | None = None) -> None:
        n, width = self.units.n, self.width
        rows = max(part.rows for part in parts)
        step = min(TILE_BYTES // rows, math.isqrt(TILE_BYTES // 4)) // COLUMNS * COLUMNS
        tiles = list(slices(width, 1, max(COLUMNS, step)))
        ones = torch.cat([added(part.tile(i, torch.int8).sum(1, dtype=torch.int64) for part in parts) for i in tiles])
        if before is not None:
            ones += self.ones.long()
        a = (ones.double() / math.sqrt(n)).round()
        per_count = 2.0 ** max(0, math.ceil(math.log2(n / 32768)))  # float16 ends at 65504
        self.largest, second = 0.0, len(self.entries) > 1
        for at, i in enumerate(tiles):
            left = [part.tile(i, torch.int8) for part in parts]
            for j in tiles[at:]:
                count = added(
                    int_product(one, one if i == j else part.tile(j, torch.int8))
                    for one, part in zip(left, parts, strict=True)
                )
                if before is not None:
                    count += before(i, j)
                if i == j:
                    count.diagonal().zero_()
                entries = count.double() if self.precision == "double" else count.float()
                entries -= torch.outer(a[i], a[j]).to(entries.dtype)  # both below 2²⁴: exact in float32
                if i == j:
                    entries.diagonal().zero_()
                self.largest = max(self.largest, float(entries.abs().amax()))
                second = self._keep(i, j, entries / per_count, 1.0) or second
        self.a, self.ones, self.per_count = a, ones.double(), per_count
        self.unit = per_count / n
        self.scale = self.units.inverse_sd.to(self.work)
        self.diagonal = ((ones.double() - a.square()) / n).to(self.work)
        shift = self.units.shift
        self.norms = (ones.double() / n - shift.square()) * self.units.inverse_sd.square()
        e = a / math.sqrt(n) - shift
        self.left, self.right = torch.stack([shift, e], 1).to(self.work), torch.stack([e, shift + e], 1).to(self.work)

    def _multiply(self, parts: list[Columns]) -> None:
        tiles = list(slices(self.width, 8 * max(part.rows for part in parts)))
        diagonal = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for at, i in enumerate(tiles):
            left = [standardised(part, self.units, i) for part in parts]
            for j in tiles[at:]:
                entries = added(
                    one @ (one if i == j else standardised(part, self.units, j)).T
                    for one, part in zip(left, parts, strict=True)
                )
                entries = entries / self.units.n
                if i == j:
                    diagonal[i] = entries.diagonal()
                    entries.diagonal().zero_()
                self._keep(i, j, entries, LOW, always=True)
        self.unit = 1.0
        self.scale = (self.units.inverse_sd > 0).to(self.work)
        self.norms = diagonal
        self.diagonal = diagonal.to(self.work)
        self.left = self.right = torch.zeros((self.width, 0), dtype=self.work, device=self.device)

    def _keep(self, i: slice, j: slice, entries: torch.Tensor, factor: float, always: bool = False) -> bool:
        """Write a tile and its mirror image; whether there is a second limb."""
        high = entries.to(self.entries[0].dtype)
        values = [high]
        if self.precision == "half":
            rest = entries - high.to(entries.dtype)
            if len(self.entries) == 1 and (always or bool(rest.any())):
                self.entries.append(torch.zeros_like(self.entries[0]))
            if len(self.entries) == 2:
                values.append((rest / factor).half())
        for into, part in zip(self.entries, values, strict=True):
            into[i, j] = part
            if i != j:
                into[j, i] = part.T
        return len(self.entries) == 2

    def product(self, d: torch.Tensor, span: Span | None) -> torch.Tensor:
        """G d, (B, width), of standardised d (B, width); without what the unpenalised columns explain."""
        w = d * self.scale
        columns = w.any(0).nonzero()[:, 0]
        count = len(columns)
        if 2 * count < self.width:  # few targets, or few changes
            columns = torch.nn.functional.pad(columns, (0, padded(max(1, count), COLUMNS) - count))
            part = w[:, columns]
            part[:, count:] = 0
            out = self._entries_times(part, [entries[columns] for entries in self.entries])
        else:
            out = self._entries_times(w, self.entries)
        out *= self.unit
        out += w * self.diagonal
        out += (w @ self.right) @ self.left.T
        out *= self.scale
        if span is not None:
            cross = span.cross.to(self.work)
            out -= (d @ cross) @ cross.T
        return out

    def _entries_times(self, w: torch.Tensor, entries: list[torch.Tensor]) -> torch.Tensor:
        if self.precision != "half":
            return w @ entries[0]
        high, low, scale = limbs(w)
        out = torch.zeros((len(w), self.width), dtype=self.work, device=self.device)
        for part, factor in zip(entries, self.factors, strict=True):
            out.add_(half_product(high, part), alpha=factor)
            out.add_(half_product(low, part), alpha=factor * LOW)
        return out.mul_(scale)

    def local(self, which: torch.Tensor, valid: torch.Tensor, span: Span | None) -> Local:
        """The Gram matrices (B, m, m) of columns `which` (B, m); where not `valid` there is no column."""
        rows, columns = which[:, :, None], which[:, None, :]
        entries = self.entries[0][rows, columns].to(self.work)
        for part, factor in zip(self.entries[1:], self.factors[1:], strict=True):
            entries += part[rows, columns].to(self.work) * factor
        if self.left.shape[1]:
            entries = torch.baddbmm(entries, self.left[which], self.right[which].mT, beta=self.unit)
        else:
            entries *= self.unit
        entries.diagonal(dim1=1, dim2=2).add_(self.diagonal[which])
        cross = None if span is None else span.cross.to(self.work)[which] * valid[:, :, None]
        return Local(entries, self.scale[which] * valid, cross)


@dataclass(eq=False)
class Local:
    """Products with small Gram matrices: diag(scale) entries diag(scale) − cross crossᵀ, for the rows at work."""

    entries: torch.Tensor
    scale: torch.Tensor
    cross: torch.Tensor | None

    def product(self, d: torch.Tensor) -> torch.Tensor:
        out = torch.bmm(self.entries, (d * self.scale)[:, :, None])[:, :, 0] * self.scale
        if self.cross is not None:
            out -= torch.bmm(self.cross, torch.bmm(self.cross.mT, d[:, :, None]))[:, :, 0]
        return out

    def narrow(self, rows: torch.Tensor) -> None:
        self.entries, self.scale = self.entries[rows], self.scale[rows]
        self.cross = None if self.cross is None else self.cross[rows]


def int_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a bᵀ, int32, of int8 matrices (rows, n) of 0 and 1 with rows and n multiples of 32."""
    if has_int_product(a.device):
        return torch._int_mm(a, b.T)
    return (a.float() @ b.float().T).to(torch.int32)  # exact below 2²⁴ rows


@functools.cache
def has_int_product(device: torch.device) -> bool:
    """Whether this torch multiplies int8 matrices there; errors of a real product are not taken for an answer."""
    ones = torch.ones(32, 64, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(ones, ones.T) == 64).all())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@dataclass(eq=False)
class State:
    """Where the targets under way stand, one row each, in standardised units; close_up keeps some of them.

    number (B,): their rows in the group.  u, g (B, width): weights, and the gradient of the fit, without what the
    unpenalised columns explain.  rr, yy (B,): ‖r‖²/n and ‖r0‖²/n likewise.  lipschitz (B, 2): of local and of whole
    problems.  penalty, inverse: as in Group.
    """

    number: torch.Tensor
    u: torch.Tensor
    g: torch.Tensor
    rr: torch.Tensor
    yy: torch.Tensor
    lipschitz: torch.Tensor
    penalty: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def at(
        cls, group: Group, number: torch.Tensor, u: torch.Tensor, g: torch.Tensor, rr: torch.Tensor, yy: torch.Tensor
    ) -> State:
        group = group.some(number).to(u.dtype)
        guess = torch.full((len(u), 2), 1.05, dtype=torch.float64, device=u.device)
        return cls(number, u, g, rr, yy, guess, group.penalty, group.inverse)

    def keep(self, rows: torch.Tensor) -> State:
        """These rows alone."""
        wide = self.penalty.ndim == 2
        return State(
            self.number[rows],
            self.u[rows],
            self.g[rows],
            self.rr[rows],
            self.yy[rows],
            self.lipschitz[rows],
            self.penalty[rows] if wide else self.penalty,
            self.inverse[rows] if wide else self.inverse,
        )

    def penalties(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.penalty[rows], self.inverse[rows]) if self.penalty.ndim == 2 else (self.penalty, self.inverse)


def advance(
    gram: Gram, span: Span | None, state: State, lam: torch.Tensor, screen: torch.Tensor, tol: float, engine: str
) -> torch.Tensor:
    """One round, in place: brings each target towards its lam (B,); the relative duality gaps (B,) of all columns.

    Columns whose |g_j| / v_j reaches screen (B,), and the support, make the local problems.
    """
    width, values = gram.width, VALUES[gram.device.type]
    at_once = max(1, values // width)
    mask = torch.empty(state.u.shape, dtype=torch.bool, device=gram.device)
    for some in slices(len(state.u), width * 8, values * 8):
        _, inverse = state.penalties(some)
        mask[some] = (state.g[some].abs() * inverse >= screen.to(gram.work)[some, None]) & (inverse > 0)
        mask[some] |= state.u[some] != 0
    size = mask.sum(1).cpu().numpy()
    largest = min(max(SMALL, width // DENSE), math.isqrt(values)) if engine == "active" else -1
    local, whole = np.flatnonzero((size <= largest) & (size > 0)), np.flatnonzero(size > largest)

    delta = torch.zeros_like(state.u)
    place = np.searchsorted(SIZES, size[local])
    for c in np.unique(place):
        members, m = local[place == c], int(SIZES[c])
        step = max(1, min(values // m**2, at_once))
        for first in range(0, len(members), step):
            rows = torch.from_numpy(members[first : first + step]).to(gram.device)
            _solve_local(gram, span, state, rows, mask, m, lam, tol, delta)
    for first in range(0, len(whole), at_once):
        _solve_whole(gram, span, state, torch.from_numpy(whole[first : first + at_once]).to(gram.device), lam, tol)
    if len(local):
        moved = torch.from_numpy(local).to(gram.device)
        for first in range(0, len(moved), at_once):
            rows = moved[first : first + at_once]
            d, g = delta[rows], state.g[rows]
            change = gram.product(d, span)
            state.rr[rows] -= (d * (2 * g - change)).sum(1, dtype=torch.float64)
            state.g[rows] = g - change
            state.u[rows] += d
    return gaps(state, lam)


def gaps(state: State, lam: torch.Tensor) -> torch.Tensor:
    """Relative duality gaps (B,)."""
    out = torch.empty_like(state.rr)
    for rows in slices(len(state.u), state.u.shape[1] * 8, VALUES[state.u.device.type] * 8):
        out[rows] = gap_of(state.u[rows], state.g[rows], state.rr[rows], lam[rows], *state.penalties(rows))
    return out / (state.yy / 2)


def _solve_local(
    gram: Gram,
    span: Span | None,
    state: State,
    rows: torch.Tensor,
    mask: torch.Tensor,
    m: int,
    lam: torch.Tensor,
    tol: float,
    delta: torch.Tensor,
) -> None:
    """Solve these targets' problems on the columns of their masks, at most m; the change goes to `delta`."""
    chosen = mask[rows]
    row, column = chosen.nonzero(as_tuple=True)
    count = chosen.sum(1)
    first = count.cumsum(0) - count
    which = torch.zeros((len(rows), m), dtype=torch.int64, device=gram.device)
    which[row, torch.arange(len(row), device=gram.device) - first[row]] = column
    valid = torch.arange(m, device=gram.device) < count[:, None]

    start = state.u[rows[:, None], which] * valid
    g = state.g[rows[:, None], which] * valid
    penalty, inverse = state.penalties(rows)
    if penalty.ndim == 1:
        penalty, inverse = penalty[which], inverse[which]
    else:
        penalty, inverse = penalty.gather(1, which), inverse.gather(1, which)
    bound = (gram.norms[which] * valid).sum(1)  # the trace
    grams = gram.local(which, valid, span)
    found, _, _, lipschitz = minimise(
        start,
        g,
        state.rr[rows],
        lam[rows],
        penalty * valid,
        inverse * valid,
        grams.product,
        grams.narrow,
        0.3 * tol * state.yy[rows] / 2,
        torch.minimum(state.lipschitz[rows, 0], bound),
        bound,
        LOCAL_ITERATIONS,
    )
    state.lipschitz[rows, 0] = lipschitz
    change = torch.zeros((len(rows), gram.width), dtype=gram.work, device=gram.device)
    change.scatter_add_(1, which, (found - start) * valid)  # adding: the padding names column 0
    delta[rows] = change


def _solve_whole(
    gram: Gram, span: Span | None, state: State, rows: torch.Tensor, lam: torch.Tensor, tol: float
) -> None:
    """Iterate on all columns; u, g and rr of these targets follow."""
    penalty, inverse = state.penalties(rows)
    found = minimise(
        state.u[rows],
        state.g[rows],
        state.rr[rows],
        lam[rows],
        penalty,
        inverse,
        lambda d: gram.product(d, span),
        lambda kept: None,
        0.5 * tol * state.yy[rows] / 2,
        state.lipschitz[rows, 1],
        gram.norms.sum().expand(len(rows)),
        GLOBAL_ITERATIONS,
    )
    state.u[rows], state.g[rows], state.rr[rows], state.lipschitz[rows, 1] = found


def solve(
    problem: Problem,
    options: PathOptions,
    use_bias: bool,
    workers: int,
    progress: Callable[[int], None],
    device: str = "cuda",
    *,
    precision: str | None = None,
    engine: str = "active",
    stage: Callable[[str], None] | None = None,
) -> Solution:
    """Path on the training rows, lambda by the validation rows, refit on both; all targets together.

    device: "cuda", "cuda:1", "cpu".  precision: of the Gram matrix and the iterations, "half" (CUDA's default),
    "single" or "double" (the CPU's); every fit ends with gradients in float64.  engine: "active" or "prox"
    (see above).  stage: told the name of each stage when it begins.  Where the Gram matrix does not fit, gpu_tiles
    solves.

    Raises RegressionError when the device is not there.
    """
    where = open_device(device)
    precision = precision or default_precision(where)
    if precision not in WORK or engine not in ("active", "prox"):
        raise RegressionError(
            f"precision={precision!r}, engine={engine!r}: expected one of {', '.join(WORK)}, and active or prox"
        )
    n, (_, p), T = len(problem.train) + len(problem.val), problem.x.shape, problem.y.shape[1]
    binary, there = is_binary(problem.x), available(where)
    fixed, each = needs(n, p, binary, precision, problem.penalty is not None and problem.penalty.ndim == 2, where.type)
    if there is not None and fixed + min(T, FEWEST) * each > there:
        from datamodels.regression import gpu_tiles

        return gpu_tiles.solve(problem, options, use_bias, workers, progress, device, precision=precision, stage=stage)
    at_once = T if there is None else max(1, min(T, int((there - fixed) // each)))
    fit = Fit(problem, options, use_bias, where, precision, engine, at_once, progress, stage or (lambda name: None))
    with torch.no_grad():
        return fit.run(binary)


def default_precision(device: torch.device) -> str:
    return "double" if device.type == "cpu" else "half" if has_half_product(device) else "single"


def available(device: torch.device) -> int | None:
    """Bytes that can be had on the device, None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what it frees
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return machine.available()


def needs(n: int, p: int, binary: bool, precision: str, wide_penalty: bool, kind: str) -> tuple[int, int]:
    """Bytes on the device: whatever the number of targets, and per target."""
    width, rows = padded(p, COLUMNS), padded(n, ROWS) + ROWS
    item, work = {"half": (2, 4), "single": (4, 4), "double": (8, 8)}[precision]
    columns = width * (rows // 8 if binary else rows * 8)
    limbs = 2 if precision == "half" and not binary else 1
    scratch = 6 * TILE_BYTES + 12 * work * max(VALUES[kind], width)
    each = width * (4 * work + 48 + (4 * work if wide_penalty else 0)) + rows * 4 * 8
    return columns + limbs * width * width * item + scratch, each


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int, device: str = "cuda") -> int:
    """Bytes that solve takes of the machine's memory at its largest, without the weights."""
    if device != "cpu":
        return 3 * 8192 * 8 * max(min(p, 1 << 15), T) + 4 * p * T
    fixed, each = needs(n, p, dtype.kind == "b", "double", False, "cpu")
    return fixed + T * each


class Fit:
    """The three stages of one problem, and what they share."""

    def __init__(
        self,
        problem: Problem,
        options: PathOptions,
        use_bias: bool,
        device: torch.device,
        precision: str,
        engine: str,
        at_once: int,
        progress: Callable[[int], None],
        stage: Callable[[str], None],
    ) -> None:
        self.problem, self.options, self.use_bias, self.device = problem, options, use_bias, device
        self.precision, self.engine, self.at_once = precision, engine, at_once
        self.progress, self.stage = progress, stage
        self.work = WORK[precision]
        self.starts: dict[int, torch.Tensor] = {}  # of the groups: weights at the chosen lambda, train's units

    def run(self, binary: bool) -> Solution:
        problem, T = self.problem, self.problem.y.shape[1]
        self.stage("columns")
        self.data = OnDevice(problem, self.use_bias, self.device, binary)
        self.parts = self.data.parts
        train, full = (Units.of(scale, self.parts[0]) for scale in (self.data.train, self.data.full))
        p = problem.x.shape[1]
        self.solution = Solution.empty(p, T, self.options.k, self.data.train, self.data.full)

        self.stage("gram")
        gram = Gram(self.parts[:1], train, self.precision)
        for i, group in enumerate(self._groups()):
            self._path(gram, i, group)
        self.stage("gram of all rows")
        if binary:
            gram.add(self.parts[1], full)
        else:
            del gram
            gram = Gram(self.parts, full, self.precision)
        for i, group in enumerate(self._groups()):
            self._refit(gram, i, group)
        self.stage("end")
        return self.solution

    def _groups(self) -> Any:
        return groups(self.problem, self.at_once, self.data.width, self.device)

    def _path(self, gram: Gram, i: int, group: Group) -> None:
        options, into, targets = self.options, self.solution, group.targets
        self.stage("outcomes")
        y = self.data.outcomes(targets)
        units, _ = self.data.units(group, y)
        span, group = self.data.span(group, self.parts[:1], units), group.on(units)

        self.stage("XᵀY")
        width = gram.width
        q, yy = fresh(
            self.parts[:1],
            y[:1],
            units,
            torch.zeros((len(targets), 1), device=self.device).expand(-1, width),
            self.use_bias,
        )
        unpenalised = q[:, span.which].clone() if span is not None else None
        power = yy.clone()
        if span is not None:
            yy = yy - span.project(q)[0]
        lam_max = (q.abs() * group.inverse).amax(1)
        nothing = (lam_max <= 1e-12 * power.sqrt()) | (yy <= 1e-20 * power)
        nothing |= torch.from_numpy(self.data.train.constant[targets]).to(self.device)
        going = (~nothing).nonzero()[:, 0]

        self.stage("path")
        grid = np.stack([options.grid(float(value)) for value in lam_max.cpu().numpy()])
        val_y = y[1] - units.y_mean[:, None]
        val_power = val_y[:, : self.parts[1].n].square().mean(1).cpu().numpy()
        start = torch.zeros((len(targets), width), dtype=torch.float32, device=self._storage(len(targets)))
        self.starts[i] = start
        state = State.at(
            group,
            going,
            torch.zeros((len(going), width), dtype=self.work, device=self.device),
            q[going].to(self.work),
            yy[going].clone(),
            yy[going].clone(),
        )
        del q
        at = np.ones(len(going), dtype=int)
        rounds, fallen = np.zeros(len(going), dtype=int), grid[going.cpu().numpy(), 0]
        error = self._validate(state, units, span, unpenalised, val_y)
        best_error = error.copy()
        named = targets[state.number.cpu().numpy()]
        into.path_lam[0, named], into.path_mse[0, named] = grid[state.number.cpu().numpy(), 0], error
        into.path_nnz[0, named] = 0 if span is None else self._unpenalised_nonzero(state, span, unpenalised)
        into.r2_train[named] = (1 - state.rr / power[state.number]).cpu().numpy()
        into.r2_val[named] = explained(best_error, val_power[state.number.cpu().numpy()])
        if options.k == 1:
            state, at = state.keep(state.number[:0]), at[:0]
        while len(at):
            row = state.number.cpu().numpy()
            lam_now, lam_before = grid[row, at], grid[row, at - 1]
            screen_now = np.maximum(2 * lam_now - lam_before, lam_now / 2)
            lam, screen = (torch.from_numpy(v).to(self.device) for v in (lam_now, screen_now))
            gap = advance(gram, span, state, lam, screen, PATH_TOL, self.engine).cpu().numpy()
            rounds += 1
            arrived = np.flatnonzero((gap <= PATH_TOL) | (rounds >= MAX_ROUNDS))
            if not len(arrived):
                continue
            rows = torch.from_numpy(arrived).to(self.device)
            there = state.keep(rows)
            self.stage("validation")
            error = self._validate(there, units, span, unpenalised, val_y)
            self.stage("path")
            named, step = targets[row[arrived]], at[arrived]
            into.path_lam[step, named], into.path_mse[step, named] = lam_now[arrived], error
            into.path_nnz[step, named] = (there.u != 0).sum(1).cpu().numpy()
            if span is not None:
                into.path_nnz[step, named] += self._unpenalised_nonzero(there, span, unpenalised)
            better = error < best_error[arrived]
            chosen, of_arrived = arrived[better], torch.from_numpy(np.flatnonzero(better)).to(self.device)
            best_error[chosen] = error[better]
            into.best[named[better]] = step[better]
            start[there.number[of_arrived].to(start.device)] = there.u[of_arrived].float().to(start.device)
            into.r2_train[named[better]] = (1 - there.rr[of_arrived] / power[there.number[of_arrived]]).cpu().numpy()
            into.r2_val[named[better]] = explained(error[better], val_power[row[chosen]])
            turned = step - into.best[named] >= options.patience
            into.turned[named[turned]] = True
            at[arrived] += 1
            rounds[arrived] = 0
            ended = np.zeros(len(at), dtype=bool)
            ended[arrived] = turned | (step + 1 == options.k)
            if ended.any():
                left = np.flatnonzero(~ended)
                at, rounds, best_error, fallen = at[left], rounds[left], best_error[left], fallen[left]
                state = state.keep(torch.from_numpy(left).to(self.device))
            if self.precision != "double" and len(at):
                self._renew(state, units, span, y[:1], grid, at, fallen)
        into.lam[targets] = np.float32(grid[np.arange(len(targets)), into.best[targets]])
        into.lam[targets[nothing.cpu().numpy()]] = np.nan

    def _storage(self, count: int) -> torch.device:
        """Where the starts of the refit are kept: on the device while one group is all there is."""
        return self.device if count == self.problem.y.shape[1] else torch.device("cpu")

    def _renew(
        self,
        state: State,
        units: Units,
        span: Span | None,
        y: list[torch.Tensor],
        grid: np.ndarray,
        at: np.ndarray,
        fallen: np.ndarray,
    ) -> None:
        """Fresh gradients for the targets whose lambda has fallen FRESH_EVERY-fold since they last had one."""
        lam = grid[state.number.cpu().numpy(), at]
        due = np.flatnonzero(lam * FRESH_EVERY < fallen)
        if not len(due):
            return
        fallen[due] = lam[due]
        rows = torch.from_numpy(due).to(self.device)
        number = state.number[rows]
        g, rr = fresh(
            self.parts[:1], [y[0][number]], units.some(number), state.u[rows] * units.inverse_sd, self.use_bias
        )
        if span is not None:
            rr = rr - span.project(g)[0]
        state.g[rows], state.rr[rows] = g.to(self.work), rr

    def _weights(self, state: State, units: Units, span: Span | None, unpenalised: torch.Tensor | None) -> torch.Tensor:
        """(B, width) in the units of the columns, those of unpenalised columns included."""
        w = state.u * units.inverse_sd.to(self.work)
        if span is not None and unpenalised is not None:
            share = unpenalised[state.number] @ span.root - state.u.double() @ span.cross
            w[:, span.which] = (share @ span.root.T * units.inverse_sd[span.which]).to(self.work)
        return w

    def _unpenalised_nonzero(self, state: State, span: Span, unpenalised: torch.Tensor | None) -> np.ndarray:
        assert unpenalised is not None
        share = unpenalised[state.number] @ span.root - state.u.double() @ span.cross
        return (share @ span.root.T != 0).sum(1).cpu().numpy()

    def _validate(
        self, state: State, units: Units, span: Span | None, unpenalised: torch.Tensor | None, y: torch.Tensor
    ) -> np.ndarray:
        """Mean squared errors (B,) on the validation rows; y: those outcomes less the training means."""
        part, out = self.parts[1], []
        for rows in slices(len(state.u), max(state.u.shape[1], part.rows) * 8, VALUES[self.device.type] * 8):
            some = replace(state, number=state.number[rows], u=state.u[rows])
            w = self._weights(some, units, span, unpenalised)
            error = y[some.number].to(self.work) - predictions(part, w, self.precision)
            error += (w @ units.shift.to(self.work))[:, None]
            out.append(error[:, : part.n].square().mean(1, dtype=torch.float64))
        return torch.cat(out).cpu().numpy() if out else np.zeros(0)

    def _refit(self, gram: Gram, i: int, group: Group) -> None:
        options, into, targets = self.options, self.solution, group.targets
        self.stage("outcomes")
        y = self.data.outcomes(targets)
        train, units = self.data.units(group, y)
        span, group = self.data.span(group, self.parts, units), group.on(units)
        self.stage("refit")
        weight = (self.starts.pop(i).to(self.device).double() * train.inverse_sd).float()
        lam = torch.from_numpy(into.lam[targets]).to(self.device)
        yy = torch.from_numpy(self.data.full.power[targets].copy()).to(self.device)
        if span is not None:
            yy = yy - span.explained(self.parts, y, units)
        yy = torch.where(yy > 0, yy, torch.ones_like(yy))
        of_span = torch.zeros((len(targets), 0 if span is None else len(span.which)), device=self.device)
        rows = torch.arange(len(targets), device=self.device)  # those that are not certified yet
        last = torch.full_like(lam, torch.inf)
        for again in range(REFRESHES):
            self.stage("fresh gradient")
            g, rr = fresh(self.parts, [out[rows] for out in y], units.some(rows), weight[rows], self.use_bias)
            if span is not None:
                explained, weights = span.project(g)
                rr = rr - explained
                of_span[rows] = (weights * units.inverse_sd[span.which]).float()
            penalties = group.some(rows)
            if again == 0:  # nothing to select on the training rows: 0 is the solution at the lambda_max of all rows
                empty = lam.isnan().nonzero()[:, 0]
                constant = self.data.full.constant[targets]
                inverse = group.some(empty).inverse
                for t, value in zip(empty.tolist(), (g[empty].abs() * inverse).amax(1).tolist(), strict=True):
                    into.lam[targets[t]] = lam[t] = 0.0 if constant[t] else float(float32_at_least(np.float64(value)))
            u = weight[rows].double() * units.sd
            gap = gap_of(u, g, rr, lam[rows], penalties.penalty, penalties.inverse) / (yy[rows] / 2)
            missed = (gap > options.tol) & (gap < 0.5 * last[rows]) & (lam[rows] > 0)
            last[rows] = gap
            going = missed.nonzero()[:, 0]
            if not len(going) or again == REFRESHES - 1:
                break
            self.stage("refit")
            rows = rows[going]
            state = State.at(group, rows, u[going].to(self.work), g[going].to(self.work), rr[going], yy[rows])
            del g, u
            self._settle(gram, span, state, lam[rows], 0.5 * options.tol / (1 + again))
            weight[rows] = (state.u.double() * units.inverse_sd).float()
        if span is not None:
            weight[:, span.which] = of_span
        p = self.problem.x.shape[1]
        self.stage("weights")
        for first in range(0, len(targets), 1024):
            some = as_slice(targets[first : first + 1024])
            into.weight[:, some] = weight[first : first + 1024, :p].T.contiguous().cpu().numpy()
        left = ((last > options.tol) & (lam > 0)).nonzero()[:, 0]
        if self.precision != "double" and len(left):
            self._finish(group, left, weight[left].double() * train.sd)
        self.progress(len(targets))

    def _finish(self, group: Group, rows: torch.Tensor, start: torch.Tensor) -> None:
        """Refit in float64, on columns and without G, what the lower precision could not bring to the tolerance.

        start (len(rows), width): weights, in the training rows' units.
        """
        from datamodels.regression.gpu_tiles import TiledFit

        self.stage("refit in float64")
        targets = group.targets[rows.cpu().numpy()]
        tiled = TiledFit(self.data, self.options, "double", 1, lambda done: None, lambda name: None, self.solution)
        for t, w in zip(targets.tolist(), start, strict=True):
            w[group.unpenalised] = 0
            on = w.nonzero()[:, 0]
            tiled.starts[t] = on.cpu().numpy(), w[on].cpu().numpy()
        for first in range(0, len(targets), FINISHED_AT_ONCE):
            some = targets[first : first + FINISHED_AT_ONCE]
            tiled.refit(Group.of(self.problem, some, group.unpenalised, self.data.width, self.device))

    def _settle(self, gram: Gram, span: Span | None, state: State, lam: torch.Tensor, tol: float) -> None:
        """Rounds until the gaps of all rows of `state` are at most tol, or no longer fall; in place."""
        rows = torch.arange(len(lam), device=self.device)
        moving, before = state, torch.full_like(lam, torch.inf)
        for _ in range(MAX_ROUNDS):
            gap = advance(gram, span, moving, lam[rows], 0.9 * lam[rows], tol, self.engine)
            going = (gap > tol) & (gap < 0.7 * before)  # else its precision is spent
            if moving is not state:
                state.u[rows] = moving.u
            if not going.any():
                return
            keep = going.nonzero()[:, 0]
            before = gap[keep]
            if len(keep) < len(rows) or moving is state:
                rows, moving = rows[keep], moving.keep(keep)


def explained(error: np.ndarray, power: np.ndarray) -> np.ndarray:
    """1 − error / power, NaN where there is no power."""
    return np.where(power > 0, 1 - error / np.where(power > 0, power, 1.0), np.nan)
