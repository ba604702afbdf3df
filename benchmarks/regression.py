"""The CPU regression beside scikit-learn, adelie, celer and fast_l1's algorithm; its floor, early stopping and growth.

    python benchmarks/regression.py [--peers] [--floor] [--stopping] [--growth] [--wide] [--small]

Without a section all of them run. One process, one thread, CPU seconds. Data are 0/1 columns, alpha=½, and two kinds
of outcomes with R²=½: "sparse", 50 columns matter, with normal weights; "heavy", all matter, with weights of Student's
t with 1.5 degrees of freedom. A job is a path on the training rows, the lambda by validation MSE, and the refit of that
lambda on all rows. Ours does all targets, peers a few random ones, which is extrapolated to all; ours runs again before
each of these, so that what else the machine does falls on both. Peers are spared what ours pays: their columns come
standardised; the Gram matrices that scikit-learn is given are counted once. Every refit's relative
duality gap is that of certificate.certify.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datamodels.regression import certify, descent, gram_path, make_problem, products, wide_path  # noqa: E402
from datamodels.regression.gram import TILE  # noqa: E402
from datamodels.regression.lasso import PathOptions, Solution  # noqa: E402
from datamodels.regression.problem import Problem  # noqa: E402

KINDS = ("sparse", "heavy")
MATTER = 50
clock = time.process_time


class Size(NamedTuple):
    n: int
    p: int
    T: int

    def __str__(self) -> str:
        return f"n={self.n:,}, p={self.p:,}, T={self.T:,}"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    targets: of each peer.  budget: CPU seconds after which a peer gets no further target.  saga: those after which
    fast_l1's algorithm is cut off.  full: targets of our path with the early stop off.  judged: against the goals.
    """

    size: Size
    options: PathOptions
    targets: int
    budget: float
    saga: float
    full: int
    repeats: int
    wide: Size
    growth: tuple[tuple[str, tuple[Size, ...]], ...]
    large: Size
    judged: bool


WHOLE = Plan(
    size=Size(10_000, 5_000, 256),
    options=PathOptions(k=100, eps=1e-3, patience=3),
    targets=8,
    budget=60,
    saga=60,
    full=16,
    repeats=7,
    wide=Size(2_000, 60_000, 64),
    growth=(
        ("n", tuple(Size(n, 2_500, 64) for n in (2_500, 5_000, 10_000, 20_000))),
        ("p", tuple(Size(10_000, p, 64) for p in (1_250, 2_500, 5_000, 10_000))),
        ("T", tuple(Size(10_000, 2_500, T) for T in (64, 128, 256, 512))),
    ),
    large=Size(20_000, 10_000, 1_000),
    judged=True,
)


SMALL = Plan(
    size=Size(400, 60, 8),
    options=PathOptions(k=20, eps=1e-3, patience=3),
    targets=2,
    budget=60,
    saga=0.3,
    full=4,
    repeats=3,
    wide=Size(60, 400, 4),
    growth=(("n", (Size(200, 40, 4), Size(400, 40, 4))),),
    large=Size(500, 80, 8),
    judged=False,
)


def draw(size: Size, kind: str, seed: int = 0) -> Problem:
    """Columns depend on seed and shape alone. Drawn in blocks of rows, which takes less memory than the fit."""
    n, p, T = size
    rng = np.random.default_rng((seed, n, p))
    x = np.empty((n, p), dtype=bool)
    for first in range(0, n, 1000):
        x[first : first + 1000] = rng.integers(0, 2, (min(1000, n - first), p), dtype=np.uint8)
    if kind == "sparse":
        weight = np.zeros((p, T), dtype=np.float32)
        count = min(MATTER, p // 4)
        for t in range(T):
            weight[rng.choice(p, count, replace=False), t] = rng.standard_normal(count)
    else:
        weight = rng.standard_t(1.5, (p, T)).astype(np.float32)
    y = np.empty((n, T), dtype=np.float32)
    for first in range(0, n, 1000):
        y[first : first + 1000] = x[first : first + 1000].astype(np.float32) @ weight
    y -= y.mean(axis=0)
    y /= y.std(axis=0)
    y += rng.standard_normal((n, T), dtype=np.float32)
    return make_problem(x, y, num_val=n // 5, seed=seed)


def ours(problem: Problem, options: PathOptions, solver: ModuleType = gram_path) -> tuple[Solution, float]:
    """The whole job but the certificate, and its seconds."""
    start = clock()
    solution = solver.solve(problem, options, True, 1, lambda *done: None)
    return solution, clock() - start


def gaps(problem: Problem, weight: np.ndarray, lam: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Relative duality gaps of weights (p, len(targets)) in the units of the columns."""
    share = problem.x[rows].mean(axis=0, dtype=np.float64)
    sd = np.sqrt(share * (1 - share))
    y = np.ascontiguousarray(problem.y[:, targets])
    return certify(problem.x, y, rows, weight, np.asarray(lam, dtype=np.float64), sd, True)[0]


def warm_up() -> None:
    """What is compiled or loaded once is no job's."""
    problem = draw(Size(400, 60, 3), "sparse")
    for solver in (gram_path, wide_path):
        solution, _ = ours(problem, PathOptions(k=10, eps=1e-2, patience=2), solver)
    gaps(problem, solution.weight, solution.lam, np.arange(400), np.arange(3))


# ---------------------------------------------------------------------------------------------------------------- peers


class Design:
    """Standardised columns as peers want them, and what they share; both kinds of outcomes have the same."""

    def __init__(self, problem: Problem):
        self.x, self.train, self.val = problem.x, problem.train, problem.val
        rows = self.x[self.train].astype(np.float64)
        self.mean, self.sd = rows.mean(axis=0), rows.std(axis=0)
        self.path = np.asfortranarray((rows - self.mean) / self.sd)
        self.check = (self.x[self.val] - self.mean) / self.sd
        everything = self.x.astype(np.float64)
        self.sd_full = everything.std(axis=0)
        self.full = np.asfortranarray((everything - everything.mean(axis=0)) / self.sd_full)

    def _grams(self, *parts: np.ndarray) -> tuple[list[np.ndarray], float]:
        start = clock()
        return [np.ascontiguousarray(part.T @ part) for part in parts], clock() - start

    @cached_property
    def single(self) -> tuple[np.ndarray, np.ndarray]:
        return self.path.astype(np.float32, order="F"), self.full.astype(np.float32, order="F")

    @cached_property
    def grams(self) -> tuple[list[np.ndarray], float]:
        return self._grams(self.path, self.full)

    @cached_property
    def grams_single(self) -> tuple[list[np.ndarray], float]:
        return self._grams(*self.single)


@dataclass
class Record:
    """What a peer took for each of its targets."""

    shared: float = 0.0
    seconds: list[float] = field(default_factory=list)
    path_seconds: list[float] = field(default_factory=list)
    weight: list[np.ndarray] = field(default_factory=list)
    lam: list[float] = field(default_factory=list)
    warned: int = 0

    def extrapolated(self, T: int, path_only: bool = False) -> float:
        return self.shared + T * float(np.mean(self.path_seconds if path_only else self.seconds))


class Peer(ABC):
    """path: coefficients (p, k) of standardised columns.  refit: (p,) at one lambda, from a start.  y is centred."""

    name = ""
    cut = False

    def __init__(self, design: Design):
        self.design = design
        self.shared = 0.0

    @abstractmethod
    def path(self, y: np.ndarray, grid: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def refit(self, y: np.ndarray, lam: float, start: np.ndarray) -> np.ndarray: ...

    def job(self, y_all: np.ndarray, grid: np.ndarray, record: Record) -> None:
        design = self.design
        y_path, y_check = y_all[design.train], y_all[design.val]
        centre = y_path.mean()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = clock()
            coefs = self.path(y_path - centre, grid)
            errors = ((y_check[:, None] - centre - design.check @ coefs.astype(np.float64)) ** 2).sum(axis=0)
            record.path_seconds.append(clock() - start)
            best = int(errors.argmin())
            lam = float(np.float32(grid[best]))
            first = coefs[:, best] / design.sd * design.sd_full
            w = self.refit(y_all - y_all.mean(), lam, first)
            record.seconds.append(clock() - start)
        record.warned += any("onverge" in str(each.message) for each in caught)
        record.weight.append(w.astype(np.float64) / design.sd_full)
        record.lam.append(lam)


class ScikitLearn(Peer):
    """Given a Gram matrix in float64, counted once."""

    name = "scikit-learn's full path"

    def __init__(self, design: Design):
        super().__init__(design)
        from sklearn.linear_model import lasso_path

        self.solve = lasso_path
        self.x = design.path, design.full
        self.grams, self.shared = self._grams()

    def _grams(self) -> tuple[list[np.ndarray], float]:
        return self.design.grams

    def _run(self, which: int, y: np.ndarray, grid: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        x, gram = self.x[which], self.grams[which]
        y = np.ascontiguousarray(y, dtype=x.dtype)
        first = None if start is None else start.astype(x.dtype)
        found = self.solve(
            x, y, alphas=grid, precompute=gram, Xy=x.T @ y, coef_init=first, copy_X=False, check_input=False
        )
        return found[1]

    def path(self, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
        return self._run(0, y, grid)

    def refit(self, y: np.ndarray, lam: float, start: np.ndarray) -> np.ndarray:
        return self._run(1, y, np.array([lam]), start)[:, 0]


class ScikitLearnCut(ScikitLearn):
    """In float32, and only the lambdas that ours walked."""

    name = "scikit-learn, float32 Gram, our lambdas"
    cut = True

    def _grams(self) -> tuple[list[np.ndarray], float]:
        self.x = self.design.single
        return self.design.grams_single


class Adelie(Peer):
    name = "adelie's full path"

    def __init__(self, design: Design):
        super().__init__(design)
        # It reads options from sys.argv as it is imported.
        kept, sys.argv = sys.argv, sys.argv[:1]
        try:
            import adelie
        finally:
            sys.argv = kept
        self.adelie = adelie
        self.x = [adelie.matrix.dense(x, method="naive", n_threads=1) for x in (design.path, design.full)]

    def _run(self, which: int, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
        state = self.adelie.grpnet(
            X=self.x[which],
            glm=self.adelie.glm.gaussian(y=np.ascontiguousarray(y, dtype=np.float64)),
            lmda_path=grid,
            early_exit=False,
            progress_bar=False,
        )
        return np.asarray(state.betas.todense()).T

    def path(self, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
        return self._run(0, y, grid)

    def refit(self, y: np.ndarray, lam: float, start: np.ndarray) -> np.ndarray:
        return self._run(1, y, np.array([lam]))[:, 0]


class Celer(Peer):
    name = "celer's full path"

    def __init__(self, design: Design):
        super().__init__(design)
        from celer import celer_path

        self.solve = celer_path

    def path(self, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
        return self.solve(self.design.path, y, "lasso", alphas=grid)[1]

    def refit(self, y: np.ndarray, lam: float, start: np.ndarray) -> np.ndarray:
        return self.solve(self.design.full, y, "lasso", alphas=np.array([lam]), coef_init=start)[1][:, 0]


PEERS: dict[type[Peer], int] = {ScikitLearnCut: 45, ScikitLearn: 100, Adelie: 300, Celer: 500}  # and the goals


@dataclass(frozen=True)
class Saga:
    """Where fast_l1's algorithm stood at its end, or when it was cut off.

    weight (p, T), standardised, bias, lam, place (T,): the last.  best (T,): the lambda of the least validation error.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    lam: torch.Tensor
    place: torch.Tensor
    best: torch.Tensor
    ended: torch.Tensor
    epochs: int


@dataclass(frozen=True)
class Step:
    """lr, batch, stop and check_every as fast_l1 has them where nothing is said."""

    lr: float = 0.01
    batch: int = 1000
    stop: float = 1e-5
    check_every: int = 2


def saga(design: Design, y: np.ndarray, options: PathOptions, limit: float, step: Step) -> tuple[Saga, Saga | None]:
    """fast_l1's path, and its refit if that was begun within `limit` CPU seconds."""
    torch.manual_seed(0)
    x, x_full, check = (
        torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
        for part in (design.path, design.full, design.check)
    )
    y_all = torch.from_numpy(y.astype(np.float32))
    y_path, y_check = y_all[torch.from_numpy(design.train)], y_all[torch.from_numpy(design.val)]
    sd = torch.from_numpy(design.sd.astype(np.float32))
    until = clock() + limit
    b = y_path.mean(dim=0)
    lam = (x.T @ (y_path - b)).abs().amax(dim=0) / len(x)
    decay = options.eps ** (1 / max(options.k - 1, 1))
    path = walk(x, y_path, torch.zeros(x.shape[1], len(b)), b, lam, decay, options.k, sd, step, until, (check, y_check))
    if not path.ended.all():
        return path, None
    sd_full = torch.from_numpy(design.sd_full.astype(np.float32))
    return path, walk(x_full, y_all, path.weight, path.bias, path.best, 1.0, 1, sd_full, step, until, None)


def walk(
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    lam: torch.Tensor,
    decay: float,
    k: int,
    sd: torch.Tensor,
    step: Step,
    until: float,
    check: tuple[torch.Tensor, torch.Tensor] | None,
) -> Saga:
    """Proximal SAGA (Defazio, Bach and Lacoste-Julien 2014) on minibatches of all targets, as fast_l1 walks a path.

    A table holds the residual of each row at its last visit. A step of a batch of B of n rows, residuals r, table a:

        g = X_Bᵀ (r − a) / B,   w ← soft(w − lr (g + G), lr lam),   G ← G + B/n · g,   a ← r

    A target takes its next lambda when, at a check, the last epoch changed no weight by more than sqrt(stop) / sd_j; it
    ends when that made validation worse (from the tenth lambda on). Ended targets leave the products. fast_l1 begins
    with lam=0, an empty table, and lambda_max after that; here it begins at lambda_max with the residuals.
    """
    n, T = y.shape
    lr, batch = step.lr, step.batch if n % step.batch == 0 else n // 8
    sd2 = sd[:, None] ** 2
    table = x @ w + (b - y)
    mean_g, mean_gb = x.T @ table / n, table.mean(dim=0)
    target, place, best = torch.arange(T), torch.zeros(T, dtype=torch.long), lam.clone()
    last, least = torch.full((T,), torch.inf), torch.full((T,), torch.inf)
    of = Saga(torch.zeros(len(w), T), b.clone(), lam.clone(), place.clone(), best.clone(), place > 0, 0)
    epochs, over = 0, False

    def put(which: torch.Tensor, ended: bool) -> None:
        at = target[which]
        for into, now in ((of.bias, b), (of.lam, lam), (of.place, place), (of.best, best)):
            into[at] = now[which]
        of.weight[:, at], of.ended[at] = w[:, which], ended

    while len(target) and not over:
        before = w
        for rows in torch.randperm(n).split(batch):
            part = x[rows]
            r = part @ w + (b - y[rows])
            change = r - table[rows]
            g, gb = part.T @ change / len(rows), change.mean(dim=0)
            w = w - lr * (g + mean_g)
            b = b - lr * (gb + mean_gb)
            mean_g += g * (len(rows) / n)
            mean_gb += gb * (len(rows) / n)
            table[rows] = r
            w = w.sign() * (w.abs() - lr * lam).clamp_(min=0)
            if clock() > until:
                over = True
                break
        epochs += 1
        if over or epochs % step.check_every:
            continue
        solved = (sd2 * (w - before) ** 2).amax(dim=0) < step.stop
        end = solved & (place + 1 >= k)
        if check is not None:
            error = ((check[0] @ w + b - check[1][:, target]) ** 2).mean(dim=0)
            end |= solved & (error > last) & (place + 1 >= 10) & ((w != 0).sum(dim=0) > 1)
            better = solved & (error <= least)
            best, least = torch.where(better, lam, best), torch.where(better, error, least)
            last = torch.where(solved, error, last)
        put(end, True)
        going = solved & ~end
        place, lam = place + going.long(), torch.where(going, lam * decay, lam)
        if end.any():
            keep = ~end
            w, mean_g, table, y = (a[:, keep] for a in (w, mean_g, table, y))
            b, mean_gb, lam, place, last, least, best, target = (
                a[keep] for a in (b, mean_gb, lam, place, last, least, best, target)
            )
    put(torch.ones(len(target), dtype=torch.bool), False)
    return replace(of, epochs=epochs)


def compare(plan: Plan, peers: list[type[Peer]]) -> None:
    size = plan.size
    first = draw(size, KINDS[0])
    design = Design(first)
    ready: list[Peer] = []
    for peer in peers:
        try:
            ready.append(peer(design))
        except Exception as error:
            print(f"not measured: {peer.name}: {type(error).__name__}: {error}")
    shared = ready[0].shared if ready else 0.0
    print(
        f"peers: n={plan.targets} random targets each, fewer after {plan.budget:.0f} CPU s; what they share took "
        f"{shared:.1f} CPU s in float32, once"
    )
    chosen = chosen_targets(plan)
    for kind in KINDS:
        problem = first if kind == KINDS[0] else draw(size, kind)
        _compare(plan, kind, problem, design, ready, chosen)


def _compare(plan: Plan, kind: str, problem: Problem, design: Design, ready: list[Peer], chosen: np.ndarray) -> None:
    size, options = plan.size, plan.options
    n, _, T = size
    everything = np.arange(n)
    records = {peer.name: Record(shared=peer.shared) for peer in ready}
    solved, certified = [], []
    for t in chosen[: plan.targets]:
        solution, seconds = ours(problem, options)
        solved.append(seconds)
        start = clock()
        gap = gaps(problem, solution.weight, solution.lam, everything, np.arange(T))
        certified.append(clock() - start)
        seen = int((solution.path_nnz[:, t] >= 0).sum())
        grid = options.grid(float(solution.path_lam[0, t]))
        for peer in ready:
            record = records[peer.name]
            if not record.seconds or sum(record.seconds) < plan.budget:
                peer.job(problem.y[:, t].astype(np.float64), grid[:seen] if peer.cut else grid, record)

    took = float(np.median(solved))
    print(f"\n{kind}, {size}, {len(problem.val):,} of the rows validate, k={options.k}, eps={options.eps:g}")
    nonzero, walked = (solution.weight != 0).sum(axis=0), (solution.path_nnz >= 0).sum(axis=0)
    print(
        f"  ours: chosen lambda number {np.median(solution.best) + 1:.0f} (to {solution.best.max() + 1}), walked "
        f"{np.median(walked):.0f}, non-zeros {np.median(nonzero):.0f} (to {nonzero.max()}), validation R² "
        f"{np.median(solution.r2_val):.3f}; medians of targets"
    )
    print(f"  {'':42}{'n':>4}{'CPU s each':>22}{'CPU s, all':>12}{'x ours':>9}  {'gap: median':>11}{'worst':>9}")
    print(
        f"  {'ours, all targets':42}{len(solved):>4}{_spread(solved):>22}{took:>12.2f}{1:>9}  "
        f"{np.median(gap):>11.1e}{gap.max():>9.1e}"
    )
    print(f"  {'its certificates':42}{len(certified):>4}{_spread(certified):>22}{np.median(certified):>12.2f}")
    ratios = {}
    for peer in ready:
        record = records[peer.name]
        at = chosen[: len(record.seconds)]
        found = gaps(problem, np.stack(record.weight, axis=1), np.array(record.lam), everything, at)
        total = record.extrapolated(T)
        ratios[type(peer)] = total / took
        agree = np.isclose(record.lam, solution.lam[at], rtol=1e-3).sum()
        print(
            f"  {peer.name:42}{len(at):>4}{_spread(record.seconds):>22}{total:>12.0f}{total / took:>9.0f}  "
            f"{np.median(found):>11.1e}{found.max():>9.1e}  extrapolated; same lambda in {agree} of {len(at)}"
            + (f", {record.warned} not converged by its own word" if record.warned else "")
        )

    start = clock()
    end, refit = saga(design, problem.y, options, plan.saga, Step())
    theirs = clock() - start
    last = refit or end
    done = bool(last.ended.all()) and refit is not None
    rows, sd = (everything, design.sd_full) if refit else (np.sort(problem.train), design.sd)
    far = gaps(problem, last.weight.numpy() / sd[:, None], last.lam.numpy(), rows, np.arange(T))
    sign = "" if done else "> "
    print(
        f"  {'fast_l1 and its defaults, written in torch':42}{1:>4}{f'{sign}{theirs:.1f}':>22}"
        f"{f'{sign}{theirs:.0f}':>12}{f'{sign}{theirs / took:.0f}':>9}  {np.median(far):>11.1e}{far.max():>9.1e}  "
        + ("" if done else "cut off; ")
        + f"path: {end.epochs} epochs, to lambda {end.place.min() + 1}–{end.place.max() + 1}, {end.ended.sum()} "
        + (
            f"targets ended; refit: {refit.epochs} epochs"
            if refit
            else "targets ended; gap on the training rows, where it stood"
        )
    )
    if not done:
        lambdas = int(end.place.max()) + 1
        reach = options.eps ** (max(lambdas - 1, 1) / (options.k - 1))
        same = replace(options, k=max(lambdas, 2), eps=reach, patience=options.k)
        as_far = [ours(problem, same)[1] for _ in range(min(3, plan.repeats))]
        print(
            f"  {'ours, as far, and refits':42}{len(as_far):>4}{_spread(as_far):>22}{np.median(as_far):>12.2f}"
            f"   its {theirs:.0f} s are {theirs / np.median(as_far):.0f} times that"
        )

    few, off, gram_seconds, own = full_path(plan, kind)
    ours_full = gram_seconds + own * T / plan.full
    gap_off = gaps(few, off.weight, off.lam, everything, np.arange(plan.full))
    print(
        f"  {'ours, early stop off':42}{plan.full:>4}{own / plan.full:>22.2f}{ours_full:>12.0f}"
        f"{ours_full / took:>9.0f}  {np.median(gap_off):>11.1e}{gap_off.max():>9.1e}  extrapolated"
    )
    if plan.judged:
        print("  goals:")
        goal("fast_l1's algorithm" + ("" if done else ", at least"), theirs / took, 30)
        goal("fast_l1's gap / ours, medians", float(np.median(far) / np.median(gap)), 1000)
        goal("fast_l1's gap / ours, worst", float(far.max() / gap.max()), 1000)
        for peer in ready:
            goal(peer.name, ratios[type(peer)], PEERS[type(peer)])
        equal = {peer.name: records[peer.name].extrapolated(T) for peer in ready if not peer.cut}
        if equal:
            best = min(equal, key=equal.__getitem__)
            goal(f"early stop off, against the best, {best}", equal[best] / ours_full, 6)
    sys.stdout.flush()


@cache
def full_path(plan: Plan, kind: str) -> tuple[Problem, Solution, float, float]:
    """Ours with the early stop off for some targets: seconds for the Gram matrix, and for all else."""
    problem = draw(plan.size, kind)
    some = chosen_targets(plan)[: plan.full]
    few = replace(problem, y=problem.y[:, some], targets=problem.targets[: plan.full])
    with stages() as spent:
        off, seconds = ours(few, replace(plan.options, patience=plan.options.k))
    return few, off, spent["Gram"], seconds - spent["Gram"]


def chosen_targets(plan: Plan) -> np.ndarray:
    return np.random.default_rng(1).permutation(plan.size.T)


def goal(what: str, ratio: float, wanted: float) -> None:
    print(f"    {'met   ' if ratio >= wanted else 'MISSED'} {what}: {ratio:,.1f}x, goal {wanted:,}x")


def _spread(seconds: list[float]) -> str:
    """Mean, for what is extrapolated, and the range."""
    if len(seconds) == 1:
        return f"{seconds[0]:.2f}"
    return f"{np.mean(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


# ---------------------------------------------------------------------------------------------------------------- floor

STAGES: dict[str, list[tuple[ModuleType, str]]] = {
    "Gram": [(gram_path, "code_columns"), (gram_path, "multiply")],
    "XᵀY": [(gram_path, "gradient")],
    "path": [(descent, "path")],
    "refit": [(descent, "refit")],
}


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """CPU seconds of the solver's parts, by timing its calls from outside."""
    spent = dict.fromkeys(STAGES, 0.0)
    kept = []

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **given: Any) -> Any:
            start = clock()
            try:
                return call(*args, **given)
            finally:
                spent[stage] += clock() - start

        return run

    for stage, calls in STAGES.items():
        for module, name in calls:
            if hasattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, timed(stage, getattr(module, name)))
    try:
        yield spent
    finally:
        for module, name, call in kept:
            setattr(module, name, call)


@dataclass(frozen=True)
class Counts:
    """Multiply-adds and calls by kind of work; first row of each in float32 (path), second in float64 (refit)."""

    work: np.ndarray
    calls: np.ndarray


KERNELS = {"move": "count * len(g)", "slide": "count * len(r)", "_pack": "count * M.shape[1]"}
WORK = ("move", "slide", "_pack", "descend")


@numba.extending.intrinsic
def _address(context, number):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], numba.core.cgutils.voidptr_t)

    return numba.types.voidptr(number), generate


@contextmanager
def counted() -> Iterator[Counts]:
    """The solver on a copy of descent.py that counts what it does; KeyError where that has changed too much."""
    counts = Counts(np.zeros((4, 2), dtype=np.int64), np.zeros((4, 2), dtype=np.int64))
    here = [counts.work.ctypes.data, counts.calls.ctypes.data]

    @numba.njit
    def tally(which, wide, amount):  # type: ignore[no-untyped-def]
        for address, more in ((here_work, amount), (here_calls, 1)):
            numba.carray(_address(address), 8, dtype=np.int64)[2 * which + wide] += more

    tree = ast.parse(Path(descent.__file__).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name, amount in KERNELS.items():
        wide = {"move": "g", "slide": "r", "_pack": "H"}[name]
        functions[name].body.insert(0, ast.parse(f"tally({WORK.index(name)}, {wide}.itemsize // 8, {amount})").body[0])
    told = 0
    for node in ast.walk(functions["descend"]):
        for attribute in ("body", "orelse"):
            lines = getattr(node, attribute, None)
            if not isinstance(lines, list):
                continue
            for i, line in enumerate(list(lines)):
                if isinstance(line, ast.Assign) and ast.unparse(line) == "moved = True":
                    lines.insert(i, ast.parse(f"tally({WORK.index('descend')}, g.itemsize // 8, m)").body[0])
                    told += 1
                    break
    if told != 1:
        raise KeyError("descend's `moved = True`")
    functions["_compiled"].body = ast.parse("return numba.njit(nogil=True, error_model='numpy')(function)").body
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counting_descent.py"
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        here_work, here_calls = here
        module.tally = tally  # type: ignore[attr-defined]
        spec.loader.exec_module(module)
        gram_path.descent = module  # type: ignore[attr-defined]
        try:
            yield counts
        finally:
            gram_path.descent = descent  # type: ignore[attr-defined]


@numba.njit(error_model="numpy")
def _subtract(H, m, order, g):  # type: ignore[no-untyped-def]
    """What a step of coordinate descent cannot do without."""
    kind = g.dtype.type
    for i in order:
        step, row = kind(1e-9 * (i + 1)), H[i]
        for j in range(m):
            g[j] -= step * kind(row[j])


def rate(work: Callable[[], None], amount: float, repeats: int) -> float:
    """Amount per second, median; each timing lasts 20 ms or more."""
    work()
    start = clock()
    work()
    again = max(1, round(0.02 / max(clock() - start, 1e-6)))
    taken = []
    for _ in range(repeats):
        start = clock()
        for _ in range(again):
            work()
        taken.append((clock() - start) / again)
    return amount / max(float(np.median(taken)), 1e-9)


def product_rates(problem: Problem, repeats: int) -> tuple[float, float]:
    """Operations per second of the int8 products that make a Gram matrix, and of those with the digits of outcomes."""
    x = problem.x[problem.train].view(np.int8)
    block = min(problem.y.shape[1], gram_path.TARGETS)
    digits = np.random.default_rng(3).integers(-128, 128, (products.LIMBS * block, len(x)), dtype=np.int8)
    tile = np.ascontiguousarray(x[:, :TILE])
    return tuple(  # type: ignore[return-value]
        rate(partial(products.matmul, a, x), 2.0 * a.size * x.shape[1], repeats) for a in (tile.T, digits)
    )


def measured_rates(problem: Problem, counts: Counts, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Multiply-adds per second of each kind of work at its mean length, and that length, in the order of `counts`."""
    rng = np.random.default_rng(2)
    p, n_val = problem.x.shape[1], len(problem.val)
    M = rng.integers(-300, 300, (p, p), dtype=np.int16)
    M = np.triu(M) + np.triu(M, 1).T
    ones, mu = np.ones(p), np.full(p, 0.01)
    x_val = 2 * np.ascontiguousarray(problem.x[problem.val].view(np.int8).T) - np.int8(1)
    rates, length = np.zeros((4, 2)), np.zeros((4, 2))

    def many(kernel: Callable[..., None], *before: Any, picks: list[np.ndarray], into: np.ndarray) -> None:
        for which in picks:
            kernel(*before, which, ones, len(which), into)

    for wide, real in enumerate((np.float32, np.float64)):
        for what, row in (("move", p), ("slide", n_val), ("descend", 1)):
            k = WORK.index(what)
            if not counts.calls[k, wide]:
                continue
            length[k, wide] = counts.work[k, wide] / counts.calls[k, wide] / row
            count = max(1, min(round(length[k, wide]), p))
            into = np.zeros(count if what == "descend" else row, dtype=real)
            if what == "descend":
                packed = np.ascontiguousarray(M[:count, :count])
                rates[k, wide] = rate(partial(_subtract, packed, count, np.arange(count), into), count**2, repeats)
                continue
            picks = [rng.choice(p, count, replace=False).astype(np.int32) for _ in range(50)]
            before = (M, ones, mu.astype(real), 1.0) if what == "move" else (x_val, mu)
            kernel = descent.move if what == "move" else descent.slide
            work = partial(many, kernel, *before, picks=picks, into=into)
            rates[k, wide] = rate(work, 50.0 * count * row, repeats)
    return rates, length


def floor(plan: Plan) -> None:
    size, repeats = plan.size, plan.repeats
    n, p, T = size
    for kind in KINDS:
        problem = draw(size, kind)
        try:
            with counted() as counts:
                ours(problem, plan.options)
        except (KeyError, numba.core.errors.NumbaError) as error:
            print(f"not measured: the floor, since descent.py has changed: {error}")
            return
        taken, parts, certificates = [], [], []
        for _ in range(repeats):
            with stages() as spent:
                solution, seconds = ours(problem, plan.options)
            taken.append(seconds)
            parts.append(dict(spent))
            start = clock()
            gaps(problem, solution.weight, solution.lam, np.arange(n), np.arange(T))
            certificates.append(clock() - start)

        rates, length = measured_rates(problem, counts, repeats)
        gram_rate, limb_rate = product_rates(problem, repeats)
        gram_work, limb_work = float(n) * p * (p + 1), 2.0 * products.LIMBS * n * p * T
        lines = [
            ("Gram: half of a symmetric one, int8", gram_work / 1e9, "GOP", gram_rate / 1e9, ""),
            (f"XᵀY: {products.LIMBS} digits of float64, int8", limb_work / 1e9, "GOP", limb_rate / 1e9, ""),
        ]
        for k, what in ((0, "gradient of all columns"), (3, "descent within the working set"), (1, "validation rows")):
            for wide, real in enumerate(("float32", "float64")):
                if counts.calls[k, wide]:
                    unit = "columns a call" if k != 3 else "columns in the set"
                    note = f"{counts.calls[k, wide]:,} calls or steps, mean {length[k, wide]:.0f} {unit}"
                    lines.append((f"{what}, {real}", counts.work[k, wide] / 1e9, "Gmadd", rates[k, wide] / 1e9, note))
        print(f"\nfloor, {kind}, {size}: counted work at measured rates, one thread, medians of n={repeats}")
        print(f"  {'':42}{'work':>9} {'':5}{'per s':>8}{'floor s':>9}")
        total = 0.0
        for what, amount, unit, speed, note in lines:
            total += amount / speed
            print(f"  {what:42}{amount:>9.1f} {unit:5}{speed:>8.1f}{amount / speed:>9.3f}  {note}".rstrip())
        took = float(np.median(taken))
        print(f"  {'floor':42}{total:>32.2f}")
        packed = counts.work[WORK.index("_pack")].sum() / 1e9
        print(
            f"  beside it: {packed:.1f} G entries of rows are read to pack working sets, and columns looked at in vain"
        )
        split = {stage: float(np.median([part[stage] for part in parts])) for stage in STAGES}
        split["else"] = took - sum(split.values())
        print(
            f"  ours {took:.2f} ({min(taken):.2f}–{max(taken):.2f}) CPU s: "
            + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in split.items())
            + f"; certificates beside it {np.median(certificates):.2f}"
        )
        by_part = {
            "Gram": gram_work / gram_rate,
            "XᵀY": limb_work / limb_rate,
            "path": sum(counts.work[k, 0] / rates[k, 0] for k in (0, 1, 3) if rates[k, 0]),
            "refit": sum(counts.work[k, 1] / rates[k, 1] for k in (0, 1, 3) if rates[k, 1]),
        }
        print("  of the floor, by part: " + ", ".join(f"{part} {split[part] / by_part[part]:.2f}x" for part in by_part))
        if plan.judged:
            good = took <= 1.4 * total
            print(f"    {'met   ' if good else 'MISSED'} {took / total:.2f} times the floor, goal at most 1.4 times")
        sys.stdout.flush()


# ------------------------------------------------------------------------------------------------------- early stopping


def stopping(plan: Plan) -> None:
    n, p, _ = plan.size
    print(f"\nearly stopping, n={n:,}, p={p:,}, {plan.full} random targets, against the full path's minimum")
    print(f"  {'':10}{'patience':>9}{'misses':>8}{'of':>4}{'R² lost: mean':>16}{'largest':>10}{'lambdas walked':>16}")
    for kind in KINDS:
        few, solution, _, _ = full_path(plan, kind)
        errors = solution.path_mse
        power = ((few.y[few.val] - few.y[few.train].mean(axis=0)) ** 2).mean(axis=0)
        for patience in (2, 3, 5):
            lost, walked = [], []
            for t in range(plan.full):
                best, at = 0, 0
                for at in range(1, len(errors)):
                    if errors[at, t] < errors[best, t]:
                        best = at
                    if at - best >= patience:
                        break
                walked.append(at + 1)
                lost.append((errors[best, t] - errors[:, t].min()) / power[t])
            print(
                f"  {kind:10}{patience:>9}{np.count_nonzero(lost):>8}{plan.full:>4}{np.mean(lost):>16.1e}"
                f"{np.max(lost):>10.1e}{np.mean(walked):>16.1f}",
                flush=True,
            )


# --------------------------------------------------------------------------------------------------------------- growth


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def point(size: Size, options: PathOptions, repeats: int) -> None:
    """In a process of its own: one JSON line of seconds, bytes at the peak, and bytes that were there before."""
    warm_up()
    problem = draw(size, "sparse")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    taken = []
    for _ in range(repeats):
        start = clock()
        solution = ours(problem, options)[0]
        solved = clock()
        gap = gaps(problem, solution.weight, solution.lam, np.arange(size.n), np.arange(size.T))
        taken.append((solved - start, clock() - solved))
    seconds = np.median(taken, axis=0)
    print(json.dumps([*seconds.tolist(), _status("VmHWM"), before, float(gap.max())]))


def _point(size: Size, plan: Plan, repeats: int) -> list[float]:
    args = [sys.executable, __file__, "--point", *map(str, size), "--repeats", str(repeats)]
    args += [] if plan.judged else ["--small"]
    done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{size}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def growth(plan: Plan) -> None:
    print(
        "\ngrowth, sparse outcomes, a process for each point, medians of n=3; memory is what the fit added at its peak"
    )
    for name, sizes in plan.growth:
        table = []
        for size in sizes:
            solve_s, certify_s, peak, before, _ = _point(size, plan, 3)
            table.append((getattr(size, name), solve_s, certify_s, peak - before))
            more = (peak - before) / 2**20
            print(f"  {size!s:30}{solve_s:>8.2f} CPU s, certificates {certify_s:.2f}, {more:>6.0f} MiB", flush=True)
        logs = np.log(np.maximum(np.array(table, dtype=float), 1e-9))
        slopes = [np.polyfit(logs[:, 0], logs[:, column], 1)[0] for column in (1, 2, 3)]
        print("    log-log slope in {}: time {:.2f}, certificates {:.2f}, memory {:.2f}".format(name, *slopes))
    solve_s, certify_s, peak, before, gap = _point(plan.large, plan, 1)
    total = solve_s + certify_s
    print(
        f"  {plan.large}, once: {total:.1f} CPU s ({solve_s:.1f} and certificates {certify_s:.1f}), the process at "
        f"most {peak / 2**30:.2f} GiB, of which {before / 2**30:.2f} before the fit; worst gap {gap:.1e}"
    )
    if plan.judged:
        print(f"    {'met   ' if total <= 20 else 'MISSED'} {total:.1f} CPU s, goal at most 20")
        print(f"    {'met   ' if peak <= 4 << 30 else 'MISSED'} {peak / 2**30:.2f} GiB, goal at most 4")
    sys.stdout.flush()


def wide(plan: Plan) -> None:
    for kind in KINDS:
        problem = draw(plan.wide, kind)
        solution, seconds = ours(problem, plan.options, wide_path)
        start = clock()
        gap = gaps(problem, solution.weight, solution.lam, np.arange(plan.wide.n), np.arange(plan.wide.T))
        print(
            f"\nwide, {kind}, {plan.wide}, no Gram matrix, once: {seconds:.1f} CPU s, certificates "
            f"{clock() - start:.1f}; gap {np.median(gap):.1e}, worst {gap.max():.1e}; chosen lambda number "
            f"{np.median(solution.best) + 1:.0f}, non-zeros {np.median((solution.weight != 0).sum(axis=0)):.0f}",
            flush=True,
        )


def header() -> None:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].partition(":")[2].strip() if names else platform.machine()
    cores = len(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}  {model}, {cores} cores, load {os.getloadavg()[0]:.1f} at the start")
    found = []
    for package in ("numpy", "scipy", "numba", "torch", "scikit-learn", "adelie", "celer"):
        try:
            found.append(f"{package} {version(package)}")
        except ImportError:
            found.append(f"{package} not installed")
    print(f"Python {platform.python_version()}, {', '.join(found)}; {torch.backends.cpu.get_cpu_capability()}")
    print("one process, one thread, CPU seconds; other work may share the cores and their caches", flush=True)


def main() -> None:
    sections: dict[str, Callable[[Plan], None]] = {
        "peers": lambda plan: compare(plan, list(PEERS)),
        "floor": floor,
        "stopping": stopping,
        "growth": growth,
        "wide": wide,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in sections:
        parser.add_argument(f"--{name}", action="store_true", help="only this, and others that are named")
    parser.add_argument("--small", action="store_true", help="tiny problems, to see that it runs; no goals")
    parser.add_argument(
        "--budget", type=float, help=f"CPU s after which a peer gets no new target ({WHOLE.budget:.0f})"
    )
    parser.add_argument("--full", type=int, help=f"targets of our own full path ({WHOLE.full})")
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--point", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = SMALL if arguments.small else WHOLE
    if arguments.budget is not None:
        plan = replace(plan, budget=arguments.budget)
    if arguments.full is not None:
        plan = replace(plan, full=arguments.full)
    if arguments.point:
        point(Size(*arguments.point), plan.options, arguments.repeats)
        return
    header()
    warm_up()
    start = clock()
    named = [name for name in sections if getattr(arguments, name)]
    for name in named or sections:
        sections[name](plan)
    print(f"\n{clock() - start:.0f} CPU s and the processes of growth; load {os.getloadavg()[0]:.1f} at the end")
    print("not measured: several threads, real columns, penalty weights, offsets")


if __name__ == "__main__":
    main()
