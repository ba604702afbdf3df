"""Models per second of one core: many at once, torch.func.vmap, a loop of single models, one process per row.

    python benchmarks/throughput.py [--repeats 5] [--quick]

A model here is a row's whole work: initialise, train on half of the examples, margins of the test examples. Every
figure is K models / CPU seconds of this process (or of the child), one thread, median of the repeats, which are
interleaved over the methods. The floor is the matrix products alone, at the rate of a 512 x 512 product that is
measured in this process beside them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datamodels.learning import data, ensemble, loop, outputs  # noqa: E402
from datamodels.learning.loop import Recipe  # noqa: E402
from datamodels.learning.models import MLP, Seeded  # noqa: E402

AT_ONCE = (1, 4, 16, 32, 64, 128, 256)
SLOWEST = 4  # models of the loop and of the fresh processes that are timed in one repeat


@dataclass(frozen=True)
class Case:
    """One network, trained on half of `examples` and tested on 797."""

    sizes: tuple[int, ...]
    examples: int
    recipe: Recipe

    def __str__(self) -> str:
        network = "-".join(map(str, self.sizes))
        data = f"{self.examples // 2} of {self.examples} examples"
        return f"{network}, {data}, {self.recipe.epochs} epochs, batch {self.recipe.batch_size}"

    def flop(self, *, inputs_too: bool = False) -> float:
        """Multiply-adds of the products, twice: forward, the weights' gradient, and back through all but the first."""
        products = [i * o for i, o in zip(self.sizes[:-1], self.sizes[1:], strict=True)]
        backward = sum(products) if inputs_too else sum(products[1:])
        return 2 * (2 * sum(products) + backward) * (self.examples // 2) * self.recipe.epochs


def cases(quick: bool) -> list[Case]:
    digits = [Case((64, 32, 10), 1000, Recipe(batch_size=batch)) for batch in ((32,) if quick else (32, 50, 100))]
    if quick:
        return digits
    return digits + [
        Case((64, 128, 10), 1000, Recipe(batch_size=50)),
        Case((64, 64, 64, 10), 1000, Recipe(batch_size=50)),
        Case((784, 64, 10), 4000, Recipe(epochs=3, batch_size=100)),
    ]


@dataclass(frozen=True)
class Tensors:
    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def tensors(case: Case) -> Tensors:
    """Digits where they fit, else noise of the right shape: the time does not depend on the values."""
    if case.sizes[0] == 64 and case.examples == 1000:
        digits = data.load("digits")
        x, test_x = (torch.from_numpy(s.inputs).flatten(1) for s in (digits.train, digits.test))
        return Tensors(x, torch.from_numpy(digits.train.labels), test_x, torch.from_numpy(digits.test.labels))
    rng = np.random.default_rng(0)
    x, test_x = (torch.from_numpy(rng.random((n, case.sizes[0]), np.float32)) for n in (case.examples, 797))
    y, test_y = (torch.from_numpy(rng.integers(0, case.sizes[-1], n)) for n in (case.examples, 797))
    return Tensors(x, y, test_x, test_y)


def many(case: Case, given: Tensors, architecture, count: int) -> None:
    masks = np.random.default_rng(count).random((count, case.examples)) < 0.5
    models = ensemble.train(architecture, given.x, given.y, masks, case.recipe, seeds=range(count), at_once=count)
    outputs.margins(models.logits(given.test_x), given.test_y)


def one_by_one(case: Case, given: Tensors, count: int) -> None:
    masks = np.random.default_rng(count).random((count, case.examples)) < 0.5
    for seed, mask in enumerate(masks):
        model = loop.train(MLP(case.sizes)(seed), given.x, given.y, mask, case.recipe, seed=seed)
        with torch.no_grad():
            outputs.margins(model(given.test_x), given.test_y)


def plain(case: Case) -> Seeded:
    """The same network as a module that the ensemble knows nothing about, so that it takes the vmap path."""

    def build() -> nn.Module:
        layers = [part for i, o in MLP(case.sizes).layers for part in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    return Seeded(build)


def fresh_process(number: int) -> None:
    """One row in a process of its own, as a job array would run it."""
    code = f"import benchmarks.throughput as t; c = t.cases(False)[{number}]; t.one_by_one(c, t.tensors(c), 1)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process and of the children it waited for."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    start = used()
    work()
    return used() - start


def product_rate() -> float:
    """FLOP per second of a float32 512 x 512 product."""
    a, b = torch.rand(512, 512), torch.rand(512, 512)

    def work() -> None:
        for _ in range(10):
            torch.mm(a, b)

    work()
    return 10 * 2 * 512**3 / statistics.median(seconds(work) for _ in range(7))


def measure(case: Case, number: int, repeats: int) -> None:
    given = tensors(case)
    methods: dict[str, tuple[int, Callable[[], None]]] = {}
    for count in AT_ONCE:
        methods[f"many at once, K={count}"] = count, lambda count=count: many(case, given, MLP(case.sizes), count)
    for count in (64, 256):
        methods[f"torch.func.vmap, K={count}"] = count, lambda count=count: many(case, given, plain(case), count)
    methods["loop of single models"] = SLOWEST, lambda: one_by_one(case, given, SLOWEST)
    methods["one fresh process per row"] = 1, lambda: fresh_process(number)

    many(case, given, MLP(case.sizes), 4)  # what the first call pays is no model's
    taken: dict[str, list[float]] = {name: [] for name in methods}
    rates = []
    for _ in range(repeats):
        rates.append(product_rate())
        for name, (count, work) in methods.items():
            taken[name].append(seconds(work) / count)
    rate = statistics.median(rates)
    floor = case.flop() / rate
    print(f"\n{case}")
    print(
        f"  {case.flop() / 1e9:.4f} GFLOP per model ({case.flop(inputs_too=True) / 1e9:.4f} with the inputs' gradient, "
        f"which nobody needs); products at {rate / 1e9:.0f} GFLOP/s; floor {1 / floor:.0f} models/s"
    )
    print(f"  {'':28}{'models/s':>10}{'slowest':>10}{'fastest':>10}{'of floor':>10}{'x loop':>8}")
    loops = statistics.median(taken["loop of single models"])
    for name, each in taken.items():
        middle = statistics.median(each)
        print(
            f"  {name:28}{1 / middle:10.1f}{1 / max(each):10.1f}{1 / min(each):10.1f}"
            f"{floor / middle:10.1%}{loops / middle:8.2f}"
        )
    sys.stdout.flush()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the demo's network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(
        f"python {platform.python_version()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), "
        f"numpy {np.__version__}"
    )
    print(
        f"one thread, float32, CPU seconds, median of n={arguments.repeats}; "
        f"not measured: GPU, float64, several threads"
    )
    for number, case in enumerate(cases(arguments.quick)):
        measure(case, number, arguments.repeats)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end; CPU seconds grow where other work shares the caches")


if __name__ == "__main__":
    main()
