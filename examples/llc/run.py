"""LLC over training, from a sweep of settings to the curve: python -m examples.llc.run [--smoke]

A small network is trained on digits and its weights are kept at log-spaced steps; then

1. step sizes and localisations are compared on its last checkpoint: acceptance, stationarity, LLC
2. one of them is chosen, and the chains of that one are drawn
3. every checkpoint's LLC is estimated by that setting, and drawn against the training step

Each step is a command that is printed before it runs and works by itself. Stop it anywhere and run it again: no row is
estimated twice. For checkpoints of your own see `cifar.sh` beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from examples import steps
from examples.llc import show, train
from examples.steps import command, step
from worker_scripts import llc

OUT = Path("out/llc")
MODEL = ("--llc.model=examples.llc.train.network", "--llc.data=digits", "--llc.normalise=data", "--llc.flatten=true")
FULL = {"steps": train.STEPS, "chains": 6, "draws": 400, "burn_in": 800, "thin": 3,
        "epsilons": [1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 1e-3], "gammas": [10, 100, 1000]}  # fmt: skip
SMOKE = {"steps": 200, "chains": 2, "draws": 30, "burn_in": 20, "thin": 1,
         "epsilons": [1e-5, 1e-3], "gammas": [100, 1000]}  # fmt: skip


def main(out: Path = OUT, size: dict[str, Any] | None = None, workers: int = 2, smoke: bool = False) -> int:
    """Run what is not there yet; in a smoke run also where no setting of the sweep will do."""
    size = FULL if size is None else size
    started = time.monotonic()
    sweep, curve = out / "sweep/store", out / "curve/store"
    lengths = [f"--llc.{name}={size[name]}" for name in ("chains", "draws", "burn_in", "thin")]
    job = (
        f"--pool.workers={workers}",
        "--worker.main_import=worker_scripts.llc",
        *MODEL,
        "--llc.batch_size=0",
        *lengths,
    )
    last = f"checkpoints/step-{size['steps']:06d}.pt"
    compared = spec({"epsilon": size["epsilons"], "gamma": size["gammas"], "checkpoint": {"files": last}}, size)
    every = spec({"checkpoint": {"files": "checkpoints/*.pt"}}, size)
    steps.check(sweep, out / "sweep.json", compared, steps.options(job))  # before anything is trained
    steps.check(curve, out / "curve.json", every)

    step("0. A network to look at, and its weights at log-spaced steps")
    train.main(out / "checkpoints", size["steps"])

    step("1. Step sizes and localisations, on the last checkpoint")
    steps.store(sweep, out / "sweep.json", compared, steps.options(job))
    command("datamodels.pool", f"--worker.logdir={sweep}", *job)
    choice = show.sweep(sweep, out / "sweep.png")
    if choice.row is None and not smoke:
        print("no setting of the sweep will do, so there is no curve: set other epsilons, or longer chains by draws "
              "and burn_in, in FULL of examples/llc/run.py, and name another --out", file=sys.stderr)  # fmt: skip
        return 1

    step("2. The chains of one setting")
    found = show.table(sweep)
    if choice.row is None:
        print("   None was chosen: this smoke run goes on with the nearest setting, only to show the rest")
    row = choice.row if choice.row is not None else closest(found)
    epsilon, gamma = float(found["epsilon"][row]), float(found["gamma"][row])
    show.trace(sweep, int(found["row"][row]), out / "trace.png")

    step(f"3. Every checkpoint, by epsilon {epsilon:g} and gamma {gamma:g}")
    job += (f"--llc.epsilon={epsilon!r}", f"--llc.gamma={gamma!r}")
    steps.store(curve, out / "curve.json", every, steps.options(job))
    command("datamodels.pool", f"--worker.logdir={curve}", *job)
    show.curve(curve, out / "curve.png")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Remove {out} to start over.")
    return 0


def closest(found: dict[str, np.ndarray]) -> int:
    """Where none can be chosen, as in a smoke run: the entry whose acceptance is nearest to the band."""
    return int(np.nanargmin(np.abs(found["acceptance"] - np.mean(show.BAND))))


def spec(factors: dict[str, Any], size: dict[str, Any]) -> dict[str, Any]:
    """A row for each combination of the factors' levels."""
    design = [{"role": "train", "seed": 0, "choices": factors}]
    return {"schema": llc.schema(size["chains"], size["draws"]), "design": design}


def cli() -> int:
    parser = argparse.ArgumentParser("python -m examples.llc.run", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, and nothing to learn from it")
    parser.add_argument("--out", type=Path, help="folder of the results; out/llc, or out/llc-smoke")
    parser.add_argument("--workers", type=int, default=2, help="processes at the same time")
    given = parser.parse_args()
    folder = given.out or Path("out/llc-smoke" if given.smoke else OUT)
    return main(folder, SMOKE if given.smoke else FULL, given.workers, given.smoke)


if __name__ == "__main__":
    steps.run(cli)
