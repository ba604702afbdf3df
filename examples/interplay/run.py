"""Which property of a model goes with which benefit: python -m examples.interplay.run [--smoke]

Trains 128 small networks that differ in width, length of training, learning rate, weight decay, label smoothing and
noise; measures properties of each on its training digits (norms, sharpness, the local learning coefficient, geometry
of its features) and benefits on others (accuracy, calibration, robustness); then fits the one to the other. Every step
is a command that is printed before it runs. Stop it anywhere and run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import steps
from examples.steps import command, step

SPEC, OUT = Path("examples/interplay/spec.json"), Path("out/interplay")
# Of the corruptions their mean: at five strengths each they would be fifteen columns more.
BENEFITS = "digits_test_accuracy,digits_test_nll,digits_test_calibration_error,digits_test_corruption," \
    "digits_test_adversarial,*_accuracy_drop"  # fmt: skip


def main(spec: Path = SPEC, out: Path = OUT, options: Sequence[str] = (), draws: int = 200, smoke: bool = False) -> int:
    """Run what is not there yet; `options` go to the pool and the worker."""
    started, store = time.monotonic(), out / "store"
    step("1. A store: one row per network; its measurements become keys")
    steps.store(
        store, out / "store.json", small(json.loads(spec.read_text())) if smoke else json.loads(spec.read_text())
    )
    step("2. Each row trains its network and measures it")
    command("datamodels.pool", f"--worker.logdir={store}", "--worker.main_import=examples.interplay.train", *options)
    step("3. The sparse regression from properties to benefits, with intervals")
    command("datamodels.evaluation.effects", str(store), f"--benefits={BENEFITS}", f"--draws={draws}",
            f"--plot={out / 'effects.png'}")  # fmt: skip
    print(f"\nDone in {time.monotonic() - started:.0f} s. Remove {out} to start over.")
    return 0


def small(spec: dict[str, Any]) -> dict[str, Any]:
    """Of such a spec, twelve networks that are trained for an epoch or three, and a short LLC."""
    shorter = {
        "llc?strict=true&draws=3000@digits/train": "llc?draws=20&burn_in=20&chains=2@digits/train",
        "sharpness@digits/train": "sharpness?tolerance=0.1@digits/train",
    }
    (block,) = spec["design"]
    choices = {name: levels[:1] for name, levels in block["choices"].items()}
    choices |= {"width": [4, 8, 16], "epochs": [1, 3], "lr": [0.1, 0.4]}
    return {
        **spec,
        "measurements": {"names": [shorter.get(name, name) for name in spec["measurements"]["names"]]},
        "design": [{**block, "count": 12, "choices": choices}],
    }


def cli() -> int:
    parser = argparse.ArgumentParser("python -m examples.interplay.run", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, and nothing to learn from it")
    parser.add_argument("--out", type=Path, help="folder of the results; out/interplay, or out/interplay-smoke")
    parser.add_argument("--workers", type=int, help="processes at the same time; left out: the pool decides")
    given = parser.parse_args()
    out = given.out or Path("out/interplay-smoke" if given.smoke else OUT)
    pool = [] if given.workers is None else [f"--pool.workers={given.workers}"]
    return main(SPEC, out, pool, draws=20 if given.smoke else 200, smoke=given.smoke)


if __name__ == "__main__":
    steps.run(cli)
