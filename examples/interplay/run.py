"""Which property of a model goes with which benefit: python -m examples.interplay.run

Trains 128 small networks that differ in width, length of training, learning rate, weight decay, label smoothing and
noise; measures properties of each on its training digits (norms, sharpness, the local learning coefficient, geometry
of its features) and benefits on others (accuracy, calibration, robustness); then fits the one to the other. Every step
is a command that is printed before it runs. Stop it anywhere and run it again: it goes on where it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.steps import command, step

SPEC, OUT = Path("examples/interplay/spec.json"), Path("out/interplay")


def main(spec: Path = SPEC, out: Path = OUT, options: Sequence[str] = (), draws: int = 500) -> int:
    """Run what is not there yet; `options` go to the pool and the worker."""
    started, store = time.monotonic(), out / "store"
    step("1. A store: one row per network; its measurements become keys")
    if not (store / "spec.json").exists():
        command("datamodels.initialize_logdir", f"--logging.logdir={store}", f"--logging.spec={spec}")
    step("2. Each row trains its network and measures it")
    command("datamodels.pool", f"--worker.logdir={store}", "--worker.main_import=examples.interplay.train", *options)
    step("3. The sparse regression from properties to benefits, with intervals")
    command("datamodels.evaluation.effects", str(store), f"--draws={draws}", f"--plot={out / 'effects.png'}")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Remove {out} to start over.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
