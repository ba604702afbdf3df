"""The main job on real images: python -m examples.digits.run, or `make demo`.

4,500 small networks, each trained on its own half of 1,000 handwritten digits; from those halves a sparse linear model
of every test digit's margin; and on masks that nobody trained on, how well it predicts. The first three steps are
commands that are printed before they run and that work by themselves. Stop it anywhere and run it again: it goes on
where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from examples import steps
from examples.steps import command, step

SPEC, OUT = Path("specs/digits.json"), Path("out/digits")
SIZES = (500, 1000, 2000, 4000)  # training rows of the table; the last is the datamodel that is kept


def main(spec: Path = SPEC, out: Path = OUT, sizes: Sequence[int] = SIZES, options: Sequence[str] = ()) -> int:
    """Run what is not there yet; `options` go to the pool, the worker and the training script."""
    started = time.monotonic()
    store, result = out / "store", out / "datamodels"

    step("1. A store: one row per network to train")
    if not (store / "spec.json").exists():
        command("datamodels.initialize_logdir", f"--logging.logdir={store}", f"--logging.spec={spec}")

    step("2. Training: every worker claims rows, 64 at a time, until none is left")
    command("datamodels.pool", f"--worker.logdir={store}", "--worker.main_import=worker_scripts.train_mlp",
            "--worker.batch=64", "--data.name=digits", *options)  # fmt: skip

    step("3. Regression: from masks to margins, one lasso per test digit")
    if not (result / "datamodels.pt").exists():
        train, val = split(sizes[-1])
        command("datamodels.regression.compute_datamodels", "-C", "regression/digits.yaml", f"--data.logdir={store}",
                f"--data.num_train={train}", f"--data.num_val={val}", f"--cfg.out_dir={result}")  # fmt: skip

    step("4. How far to believe it: evaluation masks that chose nothing")
    scores = score(store, result, sizes)

    step("5. Pictures")
    for path in pictures(store, result, scores):
        print(f"   {path}")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Weights in the units of the masks: {result}/datamodels.pt. "
          f"Remove {out} to start over.")  # fmt: skip
    return 0


def split(rows: int) -> tuple[int, int]:
    """Rows that fit the path, and rows that choose the lambda."""
    return rows - rows // 5, rows // 5


def score(store_path: Path, result: Path, sizes: Sequence[int]) -> dict:
    """LDS with its interval against the number of training rows, beside the noise ceiling."""
    from tqdm import tqdm

    from datamodels.evaluation import lds_of_store
    from datamodels.regression import Datamodel, RegressionWarning, fit, problem_from_store
    from datamodels.store import Store

    # With few rows some targets are best predicted by their mean; for the table that is no news.
    warnings.simplefilter("ignore", RegressionWarning)
    scores = {}
    print("     rows     LDS   95 % interval")
    with Store.open(store_path) as store:
        for size in sizes:
            kept = result / "datamodels.pt" if size == sizes[-1] else result.parent / f"fits/{size}.pt"
            if kept.exists():
                model = Datamodel.load(kept)
            else:
                train, val = split(size)
                problem = problem_from_store(store, num_train=train, num_val=val)
                with tqdm(total=problem.y.shape[1], desc=f"   {size:,} rows", unit="target", leave=False,
                          disable=not sys.stderr.isatty()) as bar:  # fmt: skip
                    model = fit(problem, progress=lambda targets, lambdas: bar.update(targets))
                kept.parent.mkdir(exist_ok=True)
                model.save(kept)
            with tqdm(total=len(model.targets), desc="   its score", unit="target", leave=False,
                      disable=not sys.stderr.isatty()) as bar:  # fmt: skip
                scores[size] = found = lds_of_store(model, store, progress=bar.update)
            print(f"   {size:6,}   {found.value:.3f}   [{found.low:.3f}, {found.high:.3f}]", flush=True)
        print(f"  ceiling   {found.ceiling:.3f}   [{found.ceiling_low:.3f}, {found.ceiling_high:.3f}]   what a perfect "
              f"prediction would score, the training runs being noisy")  # fmt: skip
    return scores


def pictures(store_path: Path, result: Path, scores: dict) -> list[Path]:
    """Who helps and hurts eight test digits; the score against the number of networks."""
    from datamodels.learning.data import load
    from datamodels.regression import Datamodel
    from datamodels.report import figures
    from datamodels.store import Store

    digits, model, final = load("digits"), Datamodel.load(result / "datamodels.pt"), list(scores.values())[-1]
    with Store.open(store_path) as store:
        margins = store.rows("margins").mean(axis=0)
    train, test = digits.train, digits.test
    influential = figures.influential_examples(
        model.weight, train.inputs, train.labels, test.inputs, test.labels, margins=margins,
        lds=(final.value, final.low, final.high))  # fmt: skip
    curve = figures.lds_curve(list(scores), [(s.value, s.low, s.high) for s in scores.values()],
                              (final.ceiling, final.ceiling_low, final.ceiling_high))  # fmt: skip
    out = result.parent
    return [figures.save(influential, out / "influential.png"), figures.save(curve, out / "lds.png")]


def cli() -> int:
    parser = argparse.ArgumentParser("python -m examples.digits.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the results; {OUT}")
    parser.add_argument("--workers", type=int, help="processes at the same time; left out: the pool decides")
    given = parser.parse_args()
    return main(SPEC, given.out, options=[] if given.workers is None else [f"--pool.workers={given.workers}"])


if __name__ == "__main__":
    steps.run(cli)
