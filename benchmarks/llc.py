"""LLC steps per second and chain against plain SGD steps on the same model, and against devinterp where it is there.

    python benchmarks/llc.py [--repeats 5] [--quick]

A step of SGLD is a step of SGD, and noise: the floor of the ratio is 1, below which only several chains in one call can
come. All methods take batches of the same size from tensors in memory, in one thread, and are interleaved. A step's
time is that of a run of twice the steps minus that of a run; what a run costs once (copies, the loss at the start) is
apart. devinterp is the `estimate_learning_coeff_with_summary` of its releases before 2 (`pip install 'devinterp<2'`),
with a DataLoader of the same batches, as its tutorials use it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import processor  # noqa: E402
from datamodels.learning.resnet import resnet18  # noqa: E402
from datamodels.measurements.samplers import Settings, sample  # noqa: E402

EPSILON, GAMMA = 1e-7, 100.0
Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model, the shape of its inputs, and how many steps are timed."""

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    batch: int
    steps: int
    at_once: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def cases(quick: bool) -> list[Case]:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    found = [Case("MLP 64-32-10", small, (64,), 64, 400, (4, 16, 64))]
    if quick:
        return found
    wide = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    return [
        *found,
        Case("MLP 784-256-256-10", wide, (784,), 256, 40, (4, 16)),
        Case("conv net, 28 x 28", convolutions, (1, 28, 28), 128, 20, (4,)),
        Case("ResNet-18, 32 x 32", resnet18(10, "cifar"), (3, 32, 32), 16, 2, ()),
    ]


def sgd(case: Case, data: Data, steps: int) -> None:
    """Plain SGD, as one would write it: a random batch, forward, backward, step."""
    model = case.model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    for _ in range(steps):
        batch = torch.randint(len(data[0]), (case.batch,))
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
        optimizer.step()


def ours(case: Case, data: Data, steps: int, sampler: str = "sgld", chains: int = 1, kept: int = 1) -> None:
    """`chains` chains; `kept` of each ten steps are draws, with the loss of w* on the same batch."""
    draws = max(1, steps * kept // 10)
    settings = Settings(EPSILON, GAMMA, sampler=sampler, chains=chains, draws=draws, burn_in=max(1, steps - draws),
                        batch_size=case.batch, checks=max(1, steps // 50))  # fmt: skip
    sample(case.model, functional.cross_entropy, data, settings, seed=0, at_once=chains)


def devinterp(case: Case, data: Data, steps: int) -> None:
    """One chain of devinterp's SGLD."""
    from devinterp.optim.sgld import SGLD
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary
    from devinterp.utils import evaluate_ce

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=case.batch, shuffle=True)
    estimate_learning_coeff_with_summary(
        case.model, loader=loader, evaluate=evaluate_ce, sampling_method=SGLD, num_chains=1, num_draws=steps,
        optimizer_kwargs={"lr": EPSILON, "localization": GAMMA, "nbeta": 100.0}, init_loss=1.0, device="cpu",
        verbose=False, online=False,
    )  # fmt: skip


def measure(case: Case, repeats: int) -> None:
    torch.manual_seed(1)
    data = (torch.randn(512, *case.shape), torch.randint(0, 10, (512,)))
    methods: dict[str, tuple[int, Callable[[int], None]]] = {
        "plain SGD": (1, lambda steps: sgd(case, data, steps)),
        "sgld, one chain": (1, lambda steps: ours(case, data, steps)),
        "sgld, one chain, every step a draw": (1, lambda steps: ours(case, data, steps, kept=10)),
        "sgnht, one chain": (1, lambda steps: ours(case, data, steps, "sgnht")),
        "rmsprop, one chain": (1, lambda steps: ours(case, data, steps, "rmsprop")),
    }
    for count in case.at_once:
        methods[f"sgld, {count} chains at once"] = (
            count,
            lambda steps, count=count: ours(case, data, steps, "sgld", count),
        )
    if importlib.util.find_spec("devinterp") is not None:
        name = f"devinterp {importlib.metadata.version('devinterp')}, one chain"
        methods[name] = 1, lambda steps: devinterp(case, data, steps)
    for _, work in methods.values():
        work(1)
    taken: dict[str, list[float]] = {name: [] for name in methods}
    once: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, (count, work) in methods.items():
            short, long = (seconds(work, steps) for steps in (case.steps, 2 * case.steps))
            taken[name].append((long - short) / count / case.steps)
            once[name].append(2 * short - long)
    floor = statistics.median(taken["plain SGD"])
    print(f"\n{case.name}, {case.parameters:,} parameters, batch {case.batch}, {case.steps} steps")
    print(f"  {'':36}{'steps/s/chain':>14}{'slowest':>10}{'fastest':>10}{'x SGD step':>12}{'once, ms':>10}")
    for name, each in taken.items():
        middle = statistics.median(each)
        print(
            f"  {name:36}{1 / middle:14,.1f}{1 / max(each):10,.1f}{1 / min(each):10,.1f}{middle / floor:12.2f}"
            f"{1000 * statistics.median(once[name]):10,.0f}"
        )
    sys.stdout.flush()


def seconds(work: Callable[[int], None], steps: int) -> float:
    """CPU seconds of so many steps."""
    start = time.process_time()
    work(steps)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the smallest network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(f"python {platform.python_version()}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})")
    print(f"one thread, float32, CPU seconds, medians of n={arguments.repeats}; not measured: GPU, several threads")
    if importlib.util.find_spec("devinterp") is None:
        print("devinterp is not installed here, so it was not run")
    for case in cases(arguments.quick):
        measure(case, arguments.repeats)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
