"""The lasso path on a GPU for so many columns that no p × p Gram matrix fits: tiles of packed columns pass by.

The columns stay packed (n p / 8 bytes: 15 GB at n=100,000, p=1.2 million), on the device where they fit and else in the
machine's memory, from where their tiles are sent. Nothing of size p × T is kept. Per target there are its candidates,
the columns that may get a weight at the next lambdas, with weights and residual. A round is

    solve    the next `AHEAD` lambdas one after another on the local Gram matrix of the candidates, made from their
             columns (gpu_prox); a residual of all rows for each
    scan     one pass over the tiles: Zᵀ r / n for all those residuals at once, of which only max_j |g_j| / v_j is kept
             (it gives the duality gap of the whole problem) and the names of the columns that reach the strong rule's
             bound for the lambdas to come, 2 lam[i + AHEAD] − lam[i]
    decide   lambdas whose gap holds are validated and done; the first that fails is where the next round starts, with
             the columns that were missed among its candidates

The refit does the same at one lambda, with its scans and local problems in float64.

Operations at n=100,000 (a fifth validates), p=1.2 million, T=1,000, m=1,000 candidates, AHEAD=2, and what they would
take on one H200 at rates assumed here (float16 600 TFLOP/s, float64 50 TFLOP/s, memory 3.5 TB/s; over PCIe 25 GB/s).
These are projections, not measurements.

    a scan: unpack 9.6e10 bits, 12 GB read, .19 TB of float16 written, read once          .15 s
            2 limbs · 2 · .8 n p · 2 T                                   7.7e14 float16   1.3 s
    (columns in the machine's memory: 12 GB over PCIe per scan           .5 s more, overlapped only in part)
    local Gram matrices: unpack T m .8 n, 1.6e11 bytes of float16        .15 s
            2 · .8 n m² T                                                1.6e14 float16   .3 s
    residuals and local gradients: T m .8 n in float32, 3 times .32 TB                    .3 s
    a round                                                                               2.2 s
    path: 30 lambdas, 2 a round, .3 of the rounds repeated               20 rounds        44 s
    lambda_max exactly: 2 · .8 n p T                                     1.9e14 float64   4 s
    refit: 2 to 3 scans in float64, 2 n p T each                         2.4e14 float64   5 s each
    local problems of the refit, 2 n m² T                                2e14 float64     4 s
    whole job                                                                             about 65 s
    device memory: columns 15 GB, tiles 2 GB, per target 3 residuals and outcomes 4 MB, local Gram matrix 4 MB: 8 GB
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from datamodels.errors import RegressionError
from datamodels.regression import gpu_columns
from datamodels.regression.gpu_columns import (
    COLUMNS,
    LOW,
    ROWS,
    Columns,
    Group,
    OnDevice,
    Span,
    Units,
    added,
    gap_of,
    groups,
    half_product,
    has_half_product,
    is_binary,
    limbs,
    open_device,
    padded,
    standardised,
)
from datamodels.regression.gpu_path import (
    LOCAL_ITERATIONS,
    MAX_ROUNDS,
    PATH_TOL,
    REFRESHES,
    SIZES,
    VALUES,
    WORK,
    Local,
    available,
    default_precision,
    explained,
)
from datamodels.regression.gpu_prox import minimise
from datamodels.regression.lasso import PathOptions, Solution, float32_at_least
from datamodels.regression.problem import Problem

NAME = "gpu tiles"
AHEAD = 2  # lambdas that are solved between two scans
REFIT_SCREEN = 0.9  # of lambda, for the refit's candidates


@dataclass(eq=False)
class Candidates:
    """The columns each target may use, a row each: which (B, m), and u, their weights in standardised units; where not
    `valid` there is none."""

    which: torch.Tensor
    valid: torch.Tensor
    u: torch.Tensor

    @classmethod
    def of(
        cls, keys: torch.Tensor, count: int, width: int, before: Candidates | None, dtype: torch.dtype
    ) -> Candidates:
        """Of keys = row · width + column, which may repeat; with the weights they had `before`, else 0."""
        keys = torch.unique(keys)
        row = keys // width
        size = torch.bincount(row, minlength=count)
        m = max(1, int(size.max())) if count else 1
        place = torch.arange(len(keys), device=keys.device) - (size.cumsum(0) - size)[row]
        which = torch.zeros((count, m), dtype=torch.int64, device=keys.device)
        which[row, place] = keys % width
        valid = torch.arange(m, device=keys.device) < size[:, None]
        u = torch.zeros((count, m), dtype=dtype, device=keys.device)
        if before is not None:
            held, values = before.keys(width), before.u[before.u != 0].to(dtype)
            at = torch.searchsorted(keys, held)
            u[row[at], place[at]] = values
        return cls(which, valid, u)

    def keys(self, width: int) -> torch.Tensor:
        """row · width + column of the columns with a weight, ascending."""
        row, place = (self.u != 0).nonzero(as_tuple=True)
        return row * width + self.which[row, place]

    def keep(self, rows: torch.Tensor) -> Candidates:
        return Candidates(self.which[rows], self.valid[rows], self.u[rows])


class Rows:
    """Some parts' rows with their units: what the candidates' columns predict there, and scans over all columns."""

    def __init__(
        self, parts: Sequence[Columns], units: Units, span: Span | None, group: Group, precision: str, use_bias: bool
    ) -> None:
        self.parts, self.units, self.span, self.group = list(parts), units, span, group
        self.precision, self.work, self.use_bias = precision, WORK[precision], use_bias
        self.width, self.device = parts[0].width, parts[0].device
        self.free = [standardised(part, units, span.which) for part in parts] if span is not None else []

    def share(self, residual: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the unpenalised columns explain of residuals, (B, r): coordinates in their span."""
        assert self.span is not None
        products = added(r.double() @ z.T for r, z in zip(residual, self.free, strict=True))
        return products / self.units.n @ self.span.root

    def power(self, residual: Sequence[torch.Tensor]) -> torch.Tensor:
        """‖r‖²/n (B,), less what the unpenalised columns explain."""
        power = added(r.square().sum(1, dtype=torch.float64) for r in residual) / self.units.n
        return power if self.span is None else power - self.share(residual).square().sum(1)

    def blocks(self, candidates: Candidates) -> list[tuple[torch.Tensor, int]]:
        """Rows of candidates of about the same number, with that number: as many as may be unpacked at a time."""
        size = candidates.valid.sum(1).cpu().numpy()
        place = np.searchsorted(SIZES, size)
        longest = max(part.rows for part in self.parts)
        out = []
        for c in np.unique(place):
            m = min(int(SIZES[c]), candidates.which.shape[1])
            members = np.flatnonzero(place == c)
            step = max(1, VALUES[self.device.type] // (m * longest))
            out += [(torch.from_numpy(members[i : i + step]).to(self.device), m) for i in range(0, len(members), step)]
        return out

    def columns(self, part: Columns, which: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B, m, rows), less their origin; not standardised."""
        return part.tile(which.reshape(-1), dtype).unflatten(0, which.shape)

    def residuals(self, r0: Sequence[torch.Tensor], candidates: Candidates) -> list[torch.Tensor]:
        """r0 − Z u, centred over the rows of r0 if there is a bias and they are all that the units are of."""
        out = [r.clone() for r in r0]
        for rows, m in self.blocks(candidates):
            which = candidates.which[rows, :m]
            w = candidates.u[rows, :m] * self.units.inverse_sd[which].to(candidates.u.dtype)
            at = (w * self.units.shift[which].to(w.dtype)).sum(1, keepdim=True)
            for r, part in zip(out, self.parts, strict=True):
                moved = torch.bmm(w[:, None, :], self.columns(part, which, w.dtype))[:, 0] - at
                moved[:, part.n :] = 0
                r[rows] -= moved
        return out

    def gradient(self, residual: Sequence[torch.Tensor], candidates: Candidates) -> torch.Tensor:
        """Zᵀ r / n of the candidates, (B, m), without what the unpenalised columns explain."""
        out = torch.zeros_like(candidates.u)
        for rows, m in self.blocks(candidates):
            which = candidates.which[rows, :m]
            g = added(
                torch.bmm(self.columns(part, which, r.dtype), r[rows][:, :, None])[:, :, 0]
                for r, part in zip(residual, self.parts, strict=True)
            )
            total = added(r[rows].sum(1, keepdim=True) for r in residual)
            g = (g - total * self.units.shift[which].to(g.dtype)) * (self.units.inverse_sd[which] / self.units.n).to(
                g.dtype
            )
            out[rows, :m] = g.to(out.dtype)
        if self.span is not None:
            share = self.share(residual)
            out -= torch.einsum("bmr,br->bm", self.span.cross[candidates.which], share).to(out.dtype)
        return out * candidates.valid

    def grams(self, candidates: Candidates, rows: torch.Tensor, m: int) -> Local:
        """Local Gram matrices of these rows of the candidates; counts of 0/1 columns are exact."""
        units, dtype = self.units, candidates.u.dtype
        out = torch.empty((len(rows), m, m), dtype=dtype, device=self.device)
        step = max(1, VALUES[self.device.type] // (m * max(max(part.rows for part in self.parts), m)))
        for first in range(0, len(rows), step):
            which = candidates.which[rows[first : first + step], :m]
            shift = units.shift[which]
            products = added(self._products(part, which).double() for part in self.parts) / units.n
            if self.parts[0].bits is not None:
                products -= shift[:, :, None] * shift[:, None, :]
            out[first : first + step] = products.to(dtype)
        which, valid = candidates.which[rows, :m], candidates.valid[rows, :m]
        cross = None if self.span is None else self.span.cross[which].to(dtype) * valid[:, :, None]
        return Local(out, units.inverse_sd[which].to(dtype) * valid, cross)

    def _products(self, part: Columns, which: torch.Tensor) -> torch.Tensor:
        if part.bits is None:
            z = self.columns(part, which, torch.float64) - self.units.shift[which][:, :, None]
            z[:, :, part.n :] = 0
            return torch.bmm(z, z.mT)
        if self.device.type == "cuda" and has_half_product(self.device):
            x = self.columns(part, which, torch.float16)
            return torch.bmm(x, x.mT, out_dtype=torch.float32)  # exact below 2²⁴ rows
        x = self.columns(part, which, torch.float32)
        return torch.bmm(x, x.mT)

    def scan(
        self, residual: Sequence[torch.Tensor], target: torch.Tensor, screen: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """max |g_j| / v_j (K,) of residuals (K, rows), and row · width + column of all that reach screen (K,).

        target (K,): the row of the group that each residual belongs to, whose penalties count.
        """
        units, inverse = self.units, self.group.inverse
        top = torch.zeros(len(target), dtype=torch.float64, device=self.device)
        found = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        half = self.precision == "half" and dtype != torch.float64 and self.parts[0].bits is not None
        split = [limbs(r) for r in residual] if half else []
        held = [r.to(dtype) for r in residual]
        total = added(r.sum(1) for r in residual).to(dtype)
        share = None if self.span is None else self.share(residual).to(dtype)
        bound = screen.to(dtype)[:, None]
        for some in self.parts[0].tiles(dtype):
            if half:
                g = torch.zeros((len(target), some.stop - some.start), dtype=dtype, device=self.device)
                for (high, low, scale), part in zip(split, self.parts, strict=True):
                    tile = part.tile(some, torch.float16).T
                    g += (half_product(high, tile) + LOW * half_product(low, tile)) * scale
            else:
                g = added(r @ part.tile(some, dtype).T for r, part in zip(held, self.parts, strict=True))
            g -= torch.outer(total, units.shift[some].to(dtype))
            g *= (units.inverse_sd[some] / units.n).to(dtype)
            if self.span is not None and share is not None:
                g -= share @ self.span.cross[some].to(dtype).T
            g = g.abs_() * (inverse[some] if inverse.ndim == 1 else inverse[target, some]).to(dtype)
            top = torch.maximum(top, g.amax(1).double())
            row, column = ((g >= bound) & (g > 0)).nonzero(as_tuple=True)
            found.append(row * self.width + column + some.start)
        return top, torch.cat(found)

    def solve(
        self,
        candidates: Candidates,
        residual: Sequence[torch.Tensor],
        target: torch.Tensor,
        lam: torch.Tensor,
        enough: torch.Tensor,
        iterations: int = LOCAL_ITERATIONS,
    ) -> list[torch.Tensor]:
        """Weights (B, m) at each of the lambdas lam (B, h), one after another, on the candidates alone.

        residual: of the candidates' weights.  enough (B,): the gaps at which to stop, absolute.
        """
        g, rr = self.gradient(residual, candidates), self.power(residual)
        penalty, inverse = penalties(self.group, target, candidates)
        out = [torch.zeros_like(candidates.u) for _ in range(lam.shape[1])]
        size = candidates.valid.sum(1).cpu().numpy()
        place = np.searchsorted(SIZES, size)
        for c in np.unique(place):
            m = min(int(SIZES[c]), candidates.which.shape[1])
            members, step = np.flatnonzero(place == c), max(1, VALUES[self.device.type] // m**2)
            for first in range(0, len(members), step):
                rows = torch.from_numpy(members[first : first + step]).to(self.device)
                gram = self.grams(candidates, rows, m)
                norms = gram.entries.diagonal(dim1=1, dim2=2) * gram.scale.square()
                bound = norms.sum(1, dtype=torch.float64)
                at, at_g, power = candidates.u[rows, :m], g[rows, :m], rr[rows]
                step_size = torch.full_like(bound, 1.05)
                for i, into in enumerate(out):
                    local = Local(gram.entries, gram.scale, gram.cross)  # minimise narrows it
                    at, at_g, power, step_size = minimise(
                        at,
                        at_g,
                        power,
                        lam[rows, i],
                        penalty[rows, :m],
                        inverse[rows, :m],
                        local.product,
                        local.narrow,
                        enough[rows],
                        step_size,
                        bound,
                        iterations,
                    )
                    into[rows, :m] = at
        return out

    def gaps(
        self,
        candidates: Candidates,
        residual: Sequence[torch.Tensor],
        target: torch.Tensor,
        lam: torch.Tensor,
        top: torch.Tensor,
    ) -> torch.Tensor:
        """Duality gaps (B,), absolute, where top (B,) is the largest |g_j| / v_j of all columns."""
        found = self.gradient(residual, candidates), self.power(residual), lam
        return gap_of(candidates.u, *found, *penalties(self.group, target, candidates), top)


def penalties(group: Group, target: torch.Tensor, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """Penalty and its inverse of the candidates (B, m)."""
    dtype = candidates.u.dtype
    if group.penalty.ndim == 1:
        found = group.penalty[candidates.which], group.inverse[candidates.which]
    else:
        found = tuple(v[target[:, None], candidates.which] for v in (group.penalty, group.inverse))  # type: ignore[assignment]
    return (found[0] * candidates.valid).to(dtype), (found[1] * candidates.valid).to(dtype)


def solve(
    problem: Problem,
    options: PathOptions,
    use_bias: bool,
    workers: int,
    progress: Callable[[int], None],
    device: str = "cuda",
    *,
    precision: str | None = None,
    ahead: int = AHEAD,
    stage: Callable[[str], None] | None = None,
) -> Solution:
    """As gpu_path.solve, without a p × p matrix. ahead: lambdas that are solved between two scans."""
    where = open_device(device)
    precision = precision or default_precision(where)
    if precision not in WORK or ahead < 1:
        raise RegressionError(
            f"precision={precision!r}, ahead={ahead}: expected one of {', '.join(WORK)}, and 1 or more"
        )
    n, p, T = len(problem.train) + len(problem.val), problem.x.shape[1], problem.y.shape[1]
    binary, there = is_binary(problem.x), available(where)
    rows, width = padded(n, ROWS) + ROWS, padded(p, COLUMNS)
    columns = width * rows // 8 if binary else width * rows * 8
    fixed, each = 4 * gpu_columns.TILE_BYTES + 48 * VALUES[where.type], 8 * rows * (6 + 2 * ahead)
    keep = torch.device("cpu") if there is not None and columns + fixed + each * min(T, 32) > there else where
    fixed += columns if keep == where else 0
    at_once = T if there is None else max(1, min(T, int((there - fixed) // each)))
    with torch.no_grad():
        data = OnDevice(problem, use_bias, where, binary, keep)
        fit = TiledFit(data, options, precision, ahead, progress, stage or (lambda name: None))
        for group in groups(problem, at_once, data.width, where):
            fit.path(group)
            fit.refit(group)
        fit.stage("end")
    return fit.solution


def memory(n: int, p: int, T: int, dtype: np.dtype, workers: int, device: str = "cuda") -> int:
    """Bytes that solve takes of the machine's memory at its largest, without the weights."""
    rows = padded(n, ROWS) + ROWS
    columns = padded(p, COLUMNS) * rows // (8 if dtype.kind == "b" else 1) * (1 if dtype.kind == "b" else 8)
    held = 8 * rows * (6 + 2 * AHEAD) * T + 48 * VALUES["cpu"] + 4 * gpu_columns.TILE_BYTES if device == "cpu" else 0
    return columns + held + 3 * 8192 * 8 * max(min(p, 1 << 15), T)


class TiledFit:
    """Path and refit of one group of targets after another."""

    def __init__(
        self,
        data: OnDevice,
        options: PathOptions,
        precision: str,
        ahead: int,
        progress: Callable[[int], None],
        stage: Callable[[str], None],
        solution: Solution | None = None,
    ) -> None:
        """solution: where the answer goes, None for a new one."""
        self.data, self.options, self.precision, self.ahead = data, options, precision, ahead
        self.progress, self.stage, self.device, self.work = progress, stage, data.device, WORK[precision]
        shape = data.problem.x.shape[1], data.problem.y.shape[1]
        self.solution = solution or Solution.empty(*shape, options.k, data.train, data.full)
        self.starts: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of targets: columns and weights, train's units

    def _keys(self, candidates: Candidates, found: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """Keys of the support, and of what a scan found for row of[b] of its residuals."""
        width = self.data.width
        row_of = torch.full((int(of.max()) + 1 if len(of) else 1,), -1, device=self.device)
        row_of[of] = torch.arange(len(of), device=self.device)
        found = found[found // width < len(row_of)]
        row = row_of[found // width]
        return torch.cat([candidates.keys(width), (row * width + found % width)[row >= 0]])

    def path(self, group: Group) -> None:
        options, into, targets, data, width = self.options, self.solution, group.targets, self.data, self.data.width
        self.stage("outcomes")
        y = data.outcomes(targets)
        units, _ = data.units(group, y)
        span, group = data.span(group, data.parts[:1], units), group.on(units)
        train = Rows(data.parts[:1], units, span, group, self.precision, data.use_bias)
        val = Rows(data.parts[1:], units, span, group, self.precision, data.use_bias)

        self.stage("lambda_max")
        every = torch.arange(len(targets), device=self.device)
        r0 = _centred(y[0], units, data.parts[0])
        power, yy = r0.square().sum(1) / units.n, train.power([r0])
        lam_max, _ = train.scan([r0], every, torch.full_like(power, torch.inf), torch.float64)
        nothing = (lam_max <= 1e-12 * power.sqrt()) | (yy <= 1e-20 * power)
        nothing |= torch.from_numpy(data.train.constant[targets]).to(self.device)
        val_r0 = _centred(y[1], units, data.parts[1])
        val_power = (val_r0.square().sum(1) / data.parts[1].n).cpu().numpy()
        grid = np.stack([options.grid(float(value)) for value in lam_max.cpu().numpy()])

        self.stage("path")
        number = (~nothing).nonzero()[:, 0]
        here = number.cpu().numpy()
        r0, val_r0 = r0.to(self.work), val_r0.to(self.work)
        empty = Candidates.of(every[:0], len(number), width, None, self.work)
        residual = r0[number]
        error = self._validate(val, train, val_r0[number], residual, empty)
        best_error, at, rounds = error.copy(), np.ones(len(number), dtype=int), np.zeros(len(number), dtype=int)
        into.path_lam[0, targets[here]], into.path_mse[0, targets[here]] = grid[here, 0], error
        free = 0 if span is None else ((train.share([residual]) @ span.root.T) != 0).sum(1).cpu().numpy()
        into.path_nnz[0, targets[here]] = free
        into.r2_train[targets[here]] = (1 - yy[number] / power[number]).cpu().numpy()
        into.r2_val[targets[here]] = explained(best_error, val_power[here])
        if options.k == 1:
            number, at = number[:0], at[:0]
        else:
            bound = self._tensor(self._screen(grid[here], at - 1))
            _, found = train.scan([residual], number, bound, self.work)
            candidates = Candidates.of(
                self._keys(empty, found, every[: len(number)]), len(number), width, None, self.work
            )
        while len(at):
            here, B = number.cpu().numpy(), len(at)
            steps = np.minimum(at[:, None] + np.arange(self.ahead), options.k - 1)
            lam = np.take_along_axis(grid[here], steps, axis=1)
            enough = 0.3 * PATH_TOL * yy[number] / 2
            solved = [
                replace(candidates, u=u) for u in train.solve(candidates, [residual], number, self._tensor(lam), enough)
            ]
            after = [train.residuals([r0[number]], one)[0] for one in solved]
            to_come = np.concatenate([self._screen(grid[here], steps[:, i]) for i in range(self.ahead)])
            top, found = train.scan([torch.cat(after)], number.repeat(self.ahead), self._tensor(to_come), self.work)
            rounds += 1
            going, moved, last = np.ones(B, dtype=bool), np.zeros(B, dtype=int), np.zeros(B, dtype=int)
            trusted = np.ones(B, dtype=bool)  # no lambda has failed yet in this round
            for i, (one, r) in enumerate(zip(solved, after, strict=True)):
                gap = train.gaps(one, [r], number, self._tensor(lam[:, i]), top[i * B : (i + 1) * B]) / (yy[number] / 2)
                new = going & trusted & (at + i < options.k)
                last[new] = i
                holds = gap.cpu().numpy() <= PATH_TOL
                trusted &= holds | ((rounds >= MAX_ROUNDS) & (i == 0))
                new &= trusted
                if not new.any():
                    continue
                rows = self._tensor(np.flatnonzero(new))
                error = self._validate(val, train, val_r0[number[rows]], r[rows], one.keep(rows))
                named, step = targets[here[new]], steps[new, i]
                into.path_lam[step, named], into.path_mse[step, named] = lam[new, i], error
                into.path_nnz[step, named] = (one.u[rows] != 0).sum(1).cpu().numpy()
                if span is not None:
                    into.path_nnz[step, named] += ((train.share([r[rows]]) @ span.root.T) != 0).sum(1).cpu().numpy()
                better = error < best_error[new]
                chosen = np.flatnonzero(new)[better]
                best_error[chosen] = error[better]
                into.best[named[better]] = step[better]
                rr = train.power([r[self._tensor(chosen)]]) / power[number[self._tensor(chosen)]]
                into.r2_train[named[better]] = 1 - rr.cpu().numpy()
                into.r2_val[named[better]] = explained(error[better], val_power[here[chosen]])
                for b in chosen:
                    on = one.u[b] != 0
                    self.starts[int(targets[here[b]])] = one.which[b][on].cpu().numpy(), one.u[b][on].cpu().numpy()
                turned = step - into.best[named] >= options.patience
                into.turned[named[turned]] = True
                moved[new] += 1
                going[new] = ~turned & (step + 1 < options.k)
            at, rounds = at + moved, np.where(moved > 0, 0, rounds)
            left = np.flatnonzero(going)
            from_row = self._tensor(last[left] * B + left)
            u = torch.stack([one.u for one in solved]).flatten(0, 1)[from_row]
            before = replace(candidates.keep(self._tensor(left)), u=u)
            residual = torch.cat(after)[from_row]
            number, at, rounds, best_error = number[self._tensor(left)], at[left], rounds[left], best_error[left]
            candidates = Candidates.of(self._keys(before, found, from_row), len(left), width, before, self.work)
        into.lam[targets] = np.float32(grid[np.arange(len(targets)), into.best[targets]])
        into.lam[targets[nothing.cpu().numpy()]] = np.nan

    def _screen(self, grid: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The strong rule's bound from the lambdas `at` for the `ahead` next ones."""
        now = np.take_along_axis(grid, at[:, None], axis=1)[:, 0]
        to = np.minimum(at + self.ahead, grid.shape[1] - 1)
        then = np.take_along_axis(grid, to[:, None], axis=1)[:, 0]
        return np.maximum(2 * then - now, then / 2)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _validate(
        self, val: Rows, train: Rows, r0: torch.Tensor, residual: torch.Tensor, candidates: Candidates
    ) -> np.ndarray:
        """Mean squared errors (B,) on the validation rows; r0: outcomes there, residual: on the training rows."""
        r = val.residuals([r0], candidates)[0].double()
        if train.span is not None:
            r -= train.share([residual]) @ train.span.root.T @ val.free[0]
        return (r.square().sum(1) / val.parts[0].n).cpu().numpy()

    def refit(self, group: Group) -> None:
        options, into, targets, data, width = self.options, self.solution, group.targets, self.data, self.data.width
        y = data.outcomes(targets)
        train, units = data.units(group, y)
        span, group = data.span(group, data.parts, units), group.on(units)
        full = Rows(data.parts, units, span, group, self.precision, data.use_bias)
        self.stage("refit")
        number = torch.arange(len(targets), device=self.device)
        r0 = [_centred(out, units, part) for out, part in zip(y, data.parts, strict=True)]
        yy = full.power(r0)
        yy = torch.where(yy > 0, yy, torch.ones_like(yy))
        lam = self._tensor(into.lam[targets].copy())
        scaled = units.sd * train.inverse_sd
        starts = [self.starts.pop(int(t), (np.zeros(0, dtype=np.int64), np.zeros(0))) for t in targets]
        keys = np.concatenate([b * width + columns for b, (columns, _) in enumerate(starts)]).astype(np.int64)
        values = self._tensor(np.concatenate([weights for _, weights in starts])).double()
        candidates = Candidates.of(self._tensor(keys), len(targets), width, None, torch.float64)
        order = torch.argsort(self._tensor(keys))
        row, place = candidates.valid.nonzero(as_tuple=True)
        candidates.u[row, place] = values[order] * scaled[candidates.which[row, place]]

        last = torch.full_like(lam, torch.inf)
        for again in range(REFRESHES):
            # the weights that will be kept, float32 in the units of the columns
            inverse_sd, sd = units.inverse_sd[candidates.which], units.sd[candidates.which]
            weight = (candidates.u * inverse_sd).float()
            candidates = replace(candidates, u=weight.double() * sd)
            residual = full.residuals([r[number] for r in r0], candidates)
            bound = torch.where(lam[number] > 0, REFIT_SCREEN * lam[number], torch.inf)
            top, found = full.scan(residual, number, bound, torch.float64)
            if again == 0:  # nothing to select on the training rows: 0 is the solution at the lambda_max of all rows
                for b in lam.isnan().nonzero()[:, 0].tolist():
                    constant = data.full.constant[targets[b]]
                    lam[b] = 0.0 if constant else float(float32_at_least(np.float64(top[b].item())))
                    into.lam[targets[b]] = lam[b].item()
            gap = full.gaps(candidates, residual, number, lam[number], top) / (yy[number] / 2)
            self._keep(candidates, weight, residual, full, targets[number.cpu().numpy()])
            missed = (gap > options.tol) & (gap < 0.5 * last[number]) & (lam[number] > 0)
            last[number] = gap
            rows = missed.nonzero()[:, 0]
            if not len(rows) or again == REFRESHES - 1:
                break
            before = candidates.keep(rows)
            candidates = Candidates.of(self._keys(before, found, rows), len(rows), width, before, torch.float64)
            residual, number = [r[rows] for r in residual], number[rows]
            enough = 0.3 * options.tol / (1 + again) * yy[number] / 2
            (u,) = full.solve(candidates, residual, number, lam[number][:, None], enough, 10 * LOCAL_ITERATIONS)
            candidates = replace(candidates, u=u)
        self.progress(len(targets))

    def _keep(
        self,
        candidates: Candidates,
        weight: torch.Tensor,
        residual: list[torch.Tensor],
        full: Rows,
        targets: np.ndarray,
    ) -> None:
        """Write these weights, and those that the unpenalised columns get beside them."""
        into = self.solution.weight
        row, place = ((candidates.u != 0) & candidates.valid).nonzero(as_tuple=True)
        into[:, targets] = 0
        into[candidates.which[row, place].cpu().numpy(), targets[row.cpu().numpy()]] = weight[row, place].cpu().numpy()
        if full.span is not None:
            free = full.share(residual) @ full.span.root.T * full.units.inverse_sd[full.span.which]
            into[full.span.which.cpu().numpy()[:, None], targets] = free.T.float().cpu().numpy()


def _centred(y: torch.Tensor, units: Units, part: Columns) -> torch.Tensor:
    r = y - units.y_mean[:, None]
    r[:, part.n :] = 0
    return r
