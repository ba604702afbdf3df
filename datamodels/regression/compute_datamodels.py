"""Fit datamodels, from a store or a .beton file: python -m datamodels.regression.compute_datamodels -C FILE"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodels import cli, pool
from datamodels.cli import Option
from datamodels.errors import ConfigError, RegressionError
from datamodels.regression import lasso, result
from datamodels.regression.beton import Beton
from datamodels.regression.datamodel import Datamodel
from datamodels.regression.problem import Problem, problem_from_beton, problem_from_store

GRADIENT_STEPS = "the solver is exact coordinate descent; it takes no gradient steps"

OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "data": {
        "logdir": Option(str, "the store to read"),
        "data_path": Option(str, "the .beton file to read in place of a store; see regression.write_dataset"),
        "engine": Option(
            str,
            "what reads a .beton file: numpy, or FFCV's own Loader; auto is numpy",
            default="auto",
            choices=["auto", "numpy", "ffcv"],
        ),
        "x_name": Option(
            list,
            "keys of the columns, side by side: masks, choices (the design's factors, one column per level), or any "
            "number or vector per row; left out: masks, or what the file holds",
        ),
        "y_name": Option(str, "key of the outcomes; left out: margins, or what the file holds"),
        "offset_name": Option(str, "key of a part of the outcomes that is given and not fitted, of their shape"),
        "penalty": Option(
            dict,
            "how strongly a key's columns are shrunk, 0 for not at all; 1, or what the file says, for keys left out",
        ),
        "num_train": Option(int, "rows that fit the path; left out: all complete rows but num_val", min=2),
        "num_val": Option(int, "rows that choose the lambda; left out: a fifth of the rows", min=1),
        "seed": Option(int, "draws which rows validate", default=0, min=0),
        "target_start_ind": Option(int, "first target", default=0, min=0),
        "target_end_ind": Option(int, "target after the last one; -1: to the end", default=-1, min=-1),
    },
    "cfg": {
        "out_dir": Option(str, "where the result goes; a result already there is refused", required=True),
        "k": Option(int, "number of lambdas on a path", default=lasso.DEFAULT_K, min=1),
        "eps": Option(float, "smallest lambda / largest lambda", default=lasso.DEFAULT_EPS),
        "tol": Option(float, "relative duality gap that the result must reach", default=lasso.DEFAULT_TOL),
        "use_bias": Option(bool, "fit a bias; false (or 0): fix it at 0", default=True),
        "shards": Option(
            int,
            "fit the targets in so many parts, each a row of the store out_dir/shards that a pool fills (pool.*), and "
            "merge them; given again, the command goes on from the parts that are done",
            min=1,
        ),
        "solver": Option(
            str,
            "auto is cpu, which chooses by the shape; gpu (not yet tried on one) and fast_l1 need CUDA",
            default="auto",
            choices=["auto", "cpu", "gpu", "fast_l1"],
        ),
        "device": Option(str, "where the gpu solver runs, in torch's words; left out: cuda"),
        "num_workers": Option(int, "threads, at most one per core; 0: one per core", default=0, min=0),
        "lr": Option(float, "learning rate", ignored=GRADIENT_STEPS),
        "batch_size": Option(int, "batch size", ignored=GRADIENT_STEPS),
    },
    "early_stopping": {
        "patience": Option(
            int,
            "a target's path stops when validation had no new minimum for so many lambdas",
            default=lasso.DEFAULT_PATIENCE,
            min=1,
        ),
        "check_every": Option(
            int, "how often to check", ignored="every lambda is checked; see early_stopping.patience"
        ),
        "eps": Option(float, "tolerance of the inner loop", ignored="each fit ends at a duality gap; see cfg.tol"),
    },
    "pool": {
        **pool.SECTIONS["pool"],
        "workers": Option(int, "with cfg.shards: workers that share the cores; 0 means one per core", default=1, min=0),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.regression.compute_datamodels",
        "Fit sparse linear datamodels from the training rows of a store or of a .beton file.",
        OPTIONS,
        argv,
    )
    data, cfg = args.section("data"), args.section("cfg")
    if data["logdir"] is None and data["data_path"] is None:
        raise ConfigError("data.logdir is missing: the store to read (or data.data_path, a .beton file)")
    if data["logdir"] is not None and data["data_path"] is not None:
        print("note: data.data_path is not read, because data.logdir is given", file=sys.stderr)
        data["data_path"] = None
    if data["logdir"] is not None and data["engine"] == "ffcv":
        raise ConfigError(
            "data.engine=ffcv: FFCV reads .beton files and no stores; leave it out, or write a file with python -m "
            "datamodels.regression.write_dataset and name it with --data.data_path in place of --data.logdir"
        )
    paths = {key: Path(data[key]) for key in ("logdir", "data_path") if data[key] is not None}
    source = {
        **paths,
        "engine": data["engine"],
        "x_name": data["x_name"],
        "y_name": data["y_name"],
        "offset_name": data["offset_name"],
        "penalty": data["penalty"],
        "num_train": data["num_train"],
        "num_val": data["num_val"],
        "seed": data["seed"],
        "target_start": data["target_start_ind"],
        "target_end": data["target_end_ind"],
    }
    options = {
        "k": cfg["k"],
        "eps": cfg["eps"],
        "tol": cfg["tol"],
        "patience": args["early_stopping.patience"],
        "use_bias": cfg["use_bias"],
        "workers": cfg["num_workers"] or None,
        "solver": cfg["solver"],
        "device": cfg["device"],
    }
    given = [key for key in OPTIONS["pool"] if args.given(f"pool.{key}")]
    if cfg["shards"] is not None:
        from datamodels.regression import shard

        settings = [f"--pool.{name}={args[f'pool.{name}']}" for name in dict.fromkeys(["workers", *given])]
        return shard.run(Path(cfg["out_dir"]), cfg["shards"], source, options, settings)
    if given:
        print(f"note: pool.{given[0]} does nothing: a pool runs shards, and cfg.shards is not set", file=sys.stderr)
    compute(out_dir=Path(cfg["out_dir"]), **source, **options)
    return 0


def read(
    *,
    logdir: Path | None = None,
    data_path: Path | None = None,
    engine: str = "auto",
    x_name: str | Sequence[str] | None = None,
    y_name: str | None = None,
    **chosen: Any,
) -> tuple[Problem, str]:
    """The problem that a configuration names, and a few words on the rows that it was taken from.

    logdir: a store.  data_path: a .beton file, read by `engine`.  chosen: what problem_from_store and
    problem_from_beton both take.
    """
    if data_path is not None:
        with Beton(data_path) as beton:
            problem = problem_from_beton(beton, x_name=x_name, y_name=y_name, engine=engine, **chosen)
            return problem, f"of {beton.samples} in {data_path}"
    if logdir is None:
        raise RegressionError("neither logdir nor data_path: name the store or the .beton file to read")
    from datamodels.store import Store

    with Store.open(logdir) as store:
        problem = problem_from_store(store, x_name=x_name or "masks", y_name=y_name or "margins", **chosen)
        training = store.design.roles == "train"
        complete, planned = int((store.completed() & training).sum()), int(training.sum())
    return problem, f"of {complete} complete and {planned} planned training rows"


def compute(
    *,
    out_dir: Path,
    k: int = lasso.DEFAULT_K,
    eps: float = lasso.DEFAULT_EPS,
    tol: float = lasso.DEFAULT_TOL,
    patience: int = lasso.DEFAULT_PATIENCE,
    use_bias: bool = True,
    workers: int | None = None,
    solver: str = "auto",
    device: str | None = None,
    keep: Path | None = None,
    check: Callable[[Problem], object] = lambda problem: None,
    picture: bool = True,
    **source: Any,
) -> Datamodel:
    """Read the problem, fit, and leave the result in out_dir; one line per step and warning goes to stderr.

    `source` is what `read` takes; `keep`: see lasso.fit; `check` may refuse the problem before it is fitted; `picture`:
    whether to draw the path of some targets.
    Raises RegressionError for an out_dir that holds a result, and what `read` and `fit` raise.
    """
    options: dict[str, Any] = {
        "k": k,
        "eps": eps,
        "tol": tol,
        "patience": patience,
        "use_bias": use_bias,
        "workers": workers,
        "solver": solver,
        "device": device,
    }

    result.refuse(out_dir)
    started = time.time()
    problem, rows = read(**source)
    check(problem)
    reading = time.time() - started
    p, T = problem.x.shape[1], problem.y.shape[1]
    say(f"{len(problem.train)} rows to fit, {len(problem.val)} to validate, {rows}; {p} columns, {T} targets")
    if solver != "gpu":
        from datamodels.regression import descent

        if not descent.is_compiled():
            say("compiling the solver for this processor, once: about 15 s")
    started = time.time()
    with (
        warnings.catch_warnings(record=True) as raised,
        tqdm(total=T, unit="target", desc="regression", disable=not sys.stderr.isatty()) as bar,
    ):
        warnings.simplefilter("always", lasso.RegressionWarning)
        model = lasso.fit(problem, **options, keep=keep, progress=_Rate(bar))
    fitting = time.time() - started
    for warning in raised:
        say(f"warning: {warning.message}")
    report = result.report(
        model,
        config={"out_dir": out_dir} | source | options,
        rows={"train": problem.rows[problem.train], "val": problem.rows[problem.val]},
        warnings=[str(warning.message) for warning in raised],
        seconds={"read": reading, "fit": fitting},
    )
    result.write(out_dir, model, report, draw(model) if picture else lambda path: None)
    say(result.describe(out_dir, model, fitting))
    return model


class _Rate:
    """Moves the bar over the targets and says beside it how many lambdas a second were solved."""

    def __init__(self, bar: Any):
        self._bar, self._lambdas, self._started = bar, 0, time.monotonic()

    def __call__(self, targets: int, lambdas: int = 0) -> None:
        self._lambdas += lambdas
        if self._lambdas:
            rate = self._lambdas / max(time.monotonic() - self._started, 1e-9)
            self._bar.set_postfix_str(f"{rate:.0f} lambdas/s", refresh=False)
        self._bar.update(targets)


def draw(model: Datamodel) -> Callable[[Path], None]:
    """Draws the regularization path of some targets; what goes wrong is one line, the numbers are what counts."""

    def at(path: Path) -> None:
        try:
            from datamodels.report import figures

            figures.save(figures.regularization_path(model), path)
        except Exception as error:
            say(f"warning: no picture of the path: {type(error).__name__}: {error}")

    return at


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
