"""The main job on real images: python -m examples.digits.run, or `make demo`.

4,500 small networks, each trained on its own half of 1,000 handwritten digits; from those halves a sparse linear model
of every test digit's margin; and on masks that nobody trained on, how well it predicts. Every step is a command that is
printed before it runs and that works by itself. Stop it anywhere and run it again: it goes on where it was.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

SIZES = (500, 1000, 2000, 4000)  # training rows of the table; the last one is the datamodel that is kept
OUT = Path("out/digits")


def main() -> int:
    started = time.monotonic()
    store = OUT / "store"

    step("1. A store: one row per network to train", f"its masks follow from {spec()} alone")
    if not (store / "spec.json").exists():
        command("datamodels.initialize_logdir", f"--logging.logdir={store}", f"--logging.spec={spec()}")

    step("2. Training: every worker claims rows, 64 at a time, until none is left")
    command("datamodels.pool", f"--worker.logdir={store}", "--worker.main_import=worker_scripts.train_mlp",
            "--worker.batch=64", "--data.name=digits")

    step("3. Regression: from masks to margins, one lasso per test digit")
    result = OUT / "datamodels"
    if not (result / "datamodels.pt").exists():
        command("datamodels.regression.compute_datamodels", "-C", "regression/digits.yaml",
                f"--data.logdir={store}", f"--cfg.out_dir={result}")

    step("4. How far to believe it", "on 100 masks × 5 runs that chose nothing")
    scores = score(store, result)

    step("5. A picture")
    for path in pictures(store, result, scores):
        print(f"   {path}")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Weights in the units of the masks: {result}/datamodels.pt. "
          f"Remove {OUT} to start over.")
    return 0


def spec() -> Path:
    return Path("specs/digits.json")


def score(store_path: Path, result: Path) -> dict:
    """LDS with its interval against the number of training rows, beside the noise ceiling."""
    from datamodels.evaluation.lds import lds_of_store
    from datamodels.regression import Datamodel, fit, problem_from_store
    from datamodels.store import Store

    scores = {}
    print("     rows   LDS    95 % interval")
    with Store.open(store_path) as store:
        for size in SIZES:
            if size == SIZES[-1]:
                model = Datamodel.load(result / "datamodels.pt")
            else:
                model = fit(problem_from_store(store, num_train=size * 9 // 10, num_val=size // 10))
            scores[size] = found = lds_of_store(model, store)
            print(f"   {size:6,}   {found.value:.3f}  [{found.low:.3f}, {found.high:.3f}]", flush=True)
        print(f"  ceiling   {found.ceiling:.3f}  [{found.ceiling_low:.3f}, {found.ceiling_high:.3f}]   "
              f"what a perfect model of the expected margin would score")
    return scores


def pictures(store_path: Path, result: Path, scores: dict) -> list[Path]:
    from datamodels.learning.data import load
    from datamodels.regression import Datamodel
    from datamodels.report import figures
    from datamodels.store import Store

    digits, model = load("digits"), Datamodel.load(result / "datamodels.pt")
    with Store.open(store_path) as store:
        margins = store.rows("margins").mean(axis=0)
    final = scores[SIZES[-1]]
    return [
        figures.influential_examples(OUT / "influential.png", model.weight, digits, margins, score=final),
        figures.lds_curve(OUT / "lds.png", scores),
    ]


def step(title: str, more: str = "") -> None:
    print(f"\n{title}" + (f"\n   {more}" if more else ""), flush=True)


def command(module: str, *options: str) -> None:
    """Run `python -m module …`, shown; end this script where it fails."""
    print(f"   $ python -m {shlex.join([module, *options])}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *options], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
