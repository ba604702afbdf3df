"""The GPU solver: is it right, and how long does it take; beside fast_l1 where that is installed.

    python benchmarks/gpu.py [--device cuda] [--small] [--budget 540]         (make bench-gpu)

Prints what can be saved in benchmarks/results: answers against float64 on the CPU at several shapes, then seconds by
CUDA events (wall clock on a CPU) of every stage of whole fits at growing sizes, up to n=100,000, p=50,000, T=10,000,
of the products by themselves with the rates they reach, and the largest memory. Data are drawn on the card: 0/1
columns, alpha=½, targets of which `MATTER` columns and noise of the same size explain half each. One fit per size; a
size that would not end within the budget (seconds, judged by the one before) is left out and said to be.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datamodels.errors import RegressionError  # noqa: E402
from datamodels.regression import certify, fast_l1, gpu_columns, gpu_path, gpu_tiles, make_problem  # noqa: E402
from datamodels.regression.lasso import PathOptions  # noqa: E402
from datamodels.regression.problem import Problem  # noqa: E402

MATTER = 100  # columns per target, at most an eighth of them
OPTIONS = PathOptions()
Size = tuple[int, int, int]  # n, p, T
SIZES: list[Size] = [(10_000, 5_000, 256), (20_000, 10_000, 1_000), (50_000, 20_000, 4_000), (100_000, 50_000, 10_000)]
TILES: list[Size] = [(10_000, 20_000, 100), (20_000, 200_000, 200)]
SMALL: list[Size] = [(500, 120, 8), (600, 200, 12)]
SMALL_TILES: list[Size] = [(300, 400, 6)]


@dataclass
class Clock:
    """Seconds and calls per stage: CUDA events on a GPU, read once at the end, the wall clock elsewhere."""

    device: torch.device
    marks: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(self, stage: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((stage, event))
        else:
            self.marks.append((stage, time.perf_counter()))

    def stages(self) -> dict[str, tuple[float, int]]:
        """Seconds and calls of each, in the order in which they came up."""
        wait(self.device)
        out: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for (name, start), (_, end) in zip(self.marks[:-1], self.marks[1:], strict=True):
            seconds = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            out[name] = out[name][0] + seconds, out[name][1] + 1
        return out


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call, after one that warms up."""
    call()
    found = []
    for _ in range(repeats):
        clock = Clock(device)
        clock("call")
        call()
        clock("end")
        found.append(clock.stages()["call"][0])
    return float(np.median(found))


def draw(size: Size, device: torch.device, seed: int = 0) -> Problem:
    """A problem of this size, drawn on the device block by block, in this machine's memory."""
    n, p, T = size
    generator = torch.Generator(device).manual_seed(seed)
    x, y = np.empty((n, p), dtype=bool), np.empty((n, T), dtype=np.float32)
    count = max(1, min(MATTER, p // 8))
    weight = torch.zeros((T, p), device=device)
    which = torch.randint(p, (T, count), generator=generator, device=device)
    weight.scatter_(1, which, torch.randn((T, count), generator=generator, device=device))
    step = max(1, (1 << 28) // max(p, T))
    for first in range(0, n, step):
        block = torch.rand((min(step, n - first), p), generator=generator, device=device) < 0.5
        x[first : first + step] = block.cpu().numpy()
        noise = torch.randn((len(block), T), generator=generator, device=device)
        y[first : first + step] = (block.float() @ weight.T + noise * 0.5 * count**0.5).cpu().numpy()
    return make_problem(x, y, seed=seed)


def problems() -> Iterator[tuple[str, Problem, bool]]:
    """What the answers are checked on: a name, the problem, and whether with a bias."""
    rng = np.random.default_rng(0)

    def make(n: int, p: int, T: int, alpha: float = 0.5, **given: Any) -> Problem:
        x = rng.random((n, p)) < alpha
        weight = rng.standard_normal((p, T)) * (rng.random((p, T)) < 0.2)
        return make_problem(x, x @ weight + 3 + 2 * rng.standard_normal((n, T)), **given)

    yield "n > p", make(600, 100, 8), True
    yield "n < p", make(100, 300, 8), True
    yield "alpha=.1, no bias", make(400, 60, 6, alpha=0.1), False
    yield "penalties, 3 free", make(400, 60, 6, penalty=np.r_[np.zeros(3), rng.uniform(0.5, 2, 57)]), True
    yield "offset", make(400, 60, 6, offset=rng.standard_normal((400, 6))), True
    base = make(6000, 60, 4)
    twice = np.concatenate([base.x, base.x[:, :20]], axis=1)
    yield "columns twice", make_problem(twice, base.y), True
    real = rng.standard_normal((300, 50)) * 10.0 ** rng.integers(-2, 3, 50) + 100
    yield "real columns", make_problem(real, (real / real.std(0)) @ rng.standard_normal((50, 4))), True


def check(device: torch.device, small: bool) -> int:
    """Print how far each way of solving is from float64 on the CPU; the number of misses."""
    ways = [("half", "active"), ("half", "prox"), ("single", "active"), ("double", "active")]
    print(f"answers against float64 on the CPU, tol={OPTIONS.tol}: relative duality gap from a fresh float64 residual")
    print("in numpy, weights' largest difference over their largest, targets with the same lambda")
    missed = 0
    for name, problem, use_bias in list(problems())[:: 3 if small else 1]:
        rows = np.sort(np.concatenate([problem.train, problem.val]))
        reference = gpu_path.solve(problem, OPTIONS, use_bias, 1, quiet, "cpu")
        solvers = [(f"{precision}, {engine}", gpu_path.solve, {"precision": precision, "engine": engine})
                   for precision, engine in ways]  # fmt: skip
        for way, solve, given in [*solvers, ("half, tiles", gpu_tiles.solve, {"precision": "half"})]:
            found = solve(problem, OPTIONS, use_bias, 1, quiet, str(device), **given)  # type: ignore[operator]
            gap, kkt = certify(problem.x, problem.y, rows, found.weight, found.lam, found.full.sd, use_bias,
                               problem.penalty, problem.offset)  # fmt: skip
            own = gpu_path.certify(problem, found.weight, found.lam, use_bias, str(device))
            same = found.best == reference.best
            sd = reference.full.sd[:, None]
            largest = np.maximum(np.abs(reference.weight * sd).max(0), 1e-30)
            apart = np.abs((found.weight - reference.weight) * sd).max(0) / largest
            agrees = np.allclose((gap, kkt), own, rtol=1e-4, atol=1e-7)
            ok = gap.max() <= OPTIONS.tol and agrees and same.mean() > 0.5
            missed += not ok
            print(
                f"  {name:20s} {way:16s} gap {gap.max():.1e}  weights {apart[same].max(initial=0):.1e}  lambda "
                f"{same.mean():4.0%}  own certificate {'the same' if agrees else 'DIFFERS'}{'' if ok else '  MISSED'}"
            )
    return missed


def quiet(done: int) -> None:
    pass


def products(problem: Problem, device: torch.device, precision: str) -> None:
    """Print what the products alone take, and the rates they reach."""
    with torch.no_grad():
        data = gpu_columns.OnDevice(problem, True, device, True)
        units = gpu_columns.Units.of(data.train, data.parts[0])
        n, width, T = len(problem.train), data.width, problem.y.shape[1]
        tile = data.parts[0].tile(slice(0, min(width, 8192)), torch.int8)
        taken = seconds(device, lambda: gpu_path.int_product(tile, tile))
        line("int8 product of a tile", taken, 2.0 * len(tile) ** 2 * tile.shape[1], "OP/s")
        line("unpack a tile", seconds(device, lambda: data.parts[0].tile(slice(0, len(tile)), torch.int8)),
             tile.numel(), "B/s")  # fmt: skip
        gram = gpu_path.Gram(data.parts[:1], units, precision)
        print(f"    largest entry of the centred counts {gram.largest:.0f}, {len(gram.entries)} matrix of {precision}")
        B = min(T, 4096)
        d = torch.randn((B, width), device=device, dtype=gram.work)
        taken = seconds(device, lambda: gram.product(d, None))
        line(f"gradient product, {B} targets", taken, 2.0 * width**2 * B * (2 if precision == "half" else 1), "FLOP/s")
        small = d * (torch.rand((1, width), device=device) < 0.05)
        line(f"  of a 20th of the columns, {B} targets", seconds(device, lambda: gram.product(small, None)))
        for m in (256, 1024):
            if m > width // 2:
                continue
            B = max(1, min(T, gpu_path.VALUES[device.type] // m**2))
            which = torch.stack([torch.randperm(width, device=device)[:m].sort().values for _ in range(B)])
            valid = torch.ones_like(which, dtype=torch.bool)
            taken = seconds(device, partial(gram.local, which, valid, None))
            line(f"gather {B} local Gram matrices, m={m}", taken, B * m * m, "entries/s")
            local, v = gram.local(which, valid, None), torch.randn((B, m), device=device, dtype=gram.work)
            taken = seconds(device, partial(local.product, v))
            line("  a product with each", taken, local.entries.numel() * local.entries.element_size(), "B/s")
        y = torch.randn((min(T, 2048), data.parts[0].rows), device=device, dtype=torch.float64)
        zero = torch.zeros((len(y), width), device=device)
        some = gpu_columns.Units(units.n, units.shift, units.sd, units.inverse_sd, torch.zeros(len(y), device=device))
        taken = seconds(device, lambda: gpu_columns.fresh(data.parts[:1], [y], some, zero, True), repeats=1)
        line(f"XᵀY in float64, {len(y)} targets", taken, 2.0 * n * width * len(y), "FLOP/s")


def line(what: str, taken: float, work: float | None = None, unit: str = "") -> None:
    rate = "" if work is None else f"{work / taken / 1e12:10.3f} T{unit}"
    print(f"    {what:44s} {taken * 1e3:10.2f} ms {rate}")


def whole_job(size: Size, device: torch.device, solve: Callable, **given: object) -> tuple[Problem, float]:
    """Fit, certify, print; the problem and the seconds from the host's arrays to certified weights there."""
    problem = draw(size, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    clock, start = Clock(device), time.perf_counter()
    found = solve(problem, OPTIONS, True, 1, quiet, str(device), stage=clock, **given)
    wait(device)
    fitted = time.perf_counter() - start
    gap, _ = gpu_path.certify(problem, found.weight, found.lam, True, str(device))
    total = time.perf_counter() - start
    for name, (taken, calls) in clock.stages().items():
        print(f"    {name:22s} {taken:9.3f} s  in {calls} calls" if calls > 1 else f"    {name:22s} {taken:9.3f} s")
    print(f"    {'certificate':22s} {total - fitted:9.3f} s")
    lambdas = np.isfinite(found.path_lam).sum(0)
    nnz = (found.weight[:, : min(size[2], 256)] != 0).sum(0)
    print(f"    whole job {total:.2f} s wall clock (fit {fitted:.2f} s); gap median {np.median(gap):.1e}, largest "
          f"{gap.max():.1e}; {(gap > OPTIONS.tol).sum()} of {len(gap)} targets beyond {OPTIONS.tol}")  # fmt: skip
    print(f"    lambdas per target {lambdas.mean():.1f}, turned {found.turned.mean():.0%}; non-zeros median "
          f"{np.median(nnz):.0f}, largest {nnz.max()}; validation R² {np.nanmedian(found.r2_val):.3f}")  # fmt: skip
    if device.type == "cuda":
        print(f"    device memory, largest: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    return problem, total


def work(size: Size) -> float:
    n, p, T = size
    return n * p * p + 4.0 * n * p * T + 60.0 * p * p * T


@contextmanager
def cut_off(after: float) -> Iterator[None]:
    """KeyboardInterrupt after so many seconds."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, after))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def beside_fast_l1(problem: Problem, ours: float, device: torch.device, limit: float) -> bool:
    """Print fast_l1's time and gap on the same problem; whether there is any point in trying a larger one."""
    try:
        fast_l1.import_fast_l1()
    except RegressionError as error:
        print(f"    fast_l1: not measured: {error}")
        return False
    start = time.perf_counter()
    try:
        with cut_off(limit):
            found = fast_l1.solve(problem, OPTIONS, True, 1, quiet, str(device))
    except KeyboardInterrupt:
        print(f"    fast_l1: cut off after {limit:.0f} s, {limit / ours:.0f} times ours, without an answer")
        return False
    except (RuntimeError, TypeError, RegressionError) as error:
        print(f"    fast_l1: fails: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    wait(device)
    taken = time.perf_counter() - start
    gap, _ = gpu_path.certify(problem, found.weight, found.lam, True, str(device))
    print(f"    fast_l1, its defaults: {taken:.2f} s, {taken / ours:.1f} times ours; gap median {np.median(gap):.1e}, "
          f"largest {gap.max():.1e}")  # fmt: skip
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:1, cpu; the default is cuda, and nothing to do without one")
    parser.add_argument("--small", action="store_true", help="seconds, not minutes: shows that it runs")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no larger size is begun")
    parser.add_argument("--precision", choices=list(gpu_path.WORK), help="of the timed fits; default: the device's")
    args = parser.parse_args(argv)
    if args.device is None and not torch.cuda.is_available():
        print("no CUDA device, nothing measured; --device cpu --small runs the same steps")
        return 0
    try:
        device = gpu_columns.open_device(args.device or "cuda")
    except RegressionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    begun = time.perf_counter()
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    print(f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, {os.uname().sysname}")
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, numpy {np.__version__}"
    print(f"python {platform.python_version()}, {versions}")
    precision = args.precision or gpu_path.default_precision(device)
    print(f"float16 products with float32 sums: {gpu_columns.has_half_product(device)}; timed fits in {precision}; one "
          f"fit each, products median of 5 (XᵀY of 1); not measured: other cards, several cards")  # fmt: skip
    if cuda:
        free, total = torch.cuda.mem_get_info(device)
        print(f"device memory {total / 2**30:.0f} GiB, free {free / 2**30:.0f} GiB")
    warnings.simplefilter("ignore")

    missed = check(device, args.small)
    sizes, tiles = (SMALL, SMALL_TILES) if args.small else (SIZES, TILES)
    per_work, try_fast_l1 = 0.0, True
    for solve, what, some in ((gpu_path.solve, "Gram matrix", sizes), (gpu_tiles.solve, "tiles", tiles)):
        for size in some:
            left, guess = args.budget - (time.perf_counter() - begun), 1.3 * per_work * work(size)
            print(f"\nn={size[0]}, p={size[1]}, T={size[2]}, {what}")
            if left < 0 or (what == "Gram matrix" and guess > left):
                print(f"    left out: {left:.0f} s of the budget are left, and it might take {guess:.0f} s")
                continue
            try:
                problem, taken = whole_job(size, device, solve, precision=precision)
                per_work = taken / work(size)
                if what == "Gram matrix":
                    products(problem, device, precision)
                    left = args.budget - (time.perf_counter() - begun)
                    if try_fast_l1 and left > 30:
                        try_fast_l1 = beside_fast_l1(problem, taken, device, min(120.0, left / 3))
                del problem
            except (torch.cuda.OutOfMemoryError, MemoryError) as error:
                print(f"    out of memory: {str(error).splitlines()[0] if str(error) else 'of the machine'}")
            if cuda:
                torch.cuda.empty_cache()
    print(f"\n{missed} answers missed; {time.perf_counter() - begun:.0f} s in all")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
