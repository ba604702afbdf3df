"""`python -m datamodels.worker`: claim a row, call the user's main, check what came back, commit it.

Exit codes: 0 when every row that it could claim is done; 1 when the row of --worker.index failed, or the store did; 2
for a mistake in the configuration, which main too may find (where it raises ConfigError the row is given back), or an
import that fails; 3 when rows are left that failed too often, or, with --worker.keys, that are held by who fills in
other keys; 130 and 143 when it was stopped. SIGUSR1, which SLURM sends before a time limit, ends it with 0 after the
row in hand; under SLURM SIGTERM does so at once, and the row is given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError, DatamodelsError, RowError
from datamodels.ranks import Ranks, joined
from datamodels.row_filter import select
from datamodels.running import snapshot
from datamodels.running.ends import Stopped
from datamodels.running.routine import Routine, available, check_factors, import_main
from datamodels.running.show import dry_run, smoke
from datamodels.running.tracking import Tracker
from datamodels.running.worker import Worker
from datamodels.store import Store
from datamodels.store.keys import opened
from datamodels.store.reset import clearing

POOL_VARIABLE = "DATAMODELS_POOL_PID"
MISCONFIGURED, GAVE_UP = 2, 3
_STOPS, _LAST_ROW = (signal.SIGTERM, signal.SIGINT), signal.SIGUSR1

SECTIONS = {
    "worker": {
        "logdir": Option(str, "the store", required=True),
        "main_import": Option(
            str,
            "dotted module with main(), found from the current folder or the Python path, as in "
            "examples.minimal.train_minimal",
            required=True,
        ),
        "index": Option(int, "run this row and no other; without it, claim pending rows until none is left", min=0),
        "keys": Option(
            list,
            "fill in only these optional keys (a,b), of rows that are complete and lack them, as after python -m "
            "datamodels.store add-key; other keys that main returns are left as they are",
        ),
        "rows": Option(list, "only rows like these: lr=0.1,depth>=3,backbone=vit_s|vit_b,0-99"),
        "batch": Option(int, "rows per call of main_many()", default=1, min=1),
        "retries": Option(int, "how often a row that failed, or whose process died, is tried again", default=2, min=0),
        "job_timeout": Option(int, "seconds after which a call of main is ended and its rows count as failed", min=1),
        "do_if_complete": Option(
            bool,
            "with --worker.index: run a complete row again and replace it once the new values are checked",
            default=False,
        ),
        "sync": Option(
            bool,
            "wait until each commit is on the disk; false is faster and may lose the last seconds to a "
            "power cut, never to a killed process",
            default=True,
        ),
        "time_to_live": Option(
            float, "seconds without a heartbeat after which another host may take over a row", default=120.0, min=1
        ),
        "snapshot": Option(str, "run the code of this copy, as --pool.snapshot makes them, not what is here now"),
        "dry_run": Option(bool, "show what a row would be called with, and stop", default=False),
        "smoke": Option(
            bool,
            "run one row on three batches of data (main's argument `smoke`), check what it returns, write nothing",
            default=False,
        ),
    },
    "wandb": {
        "entity": Option(str, "log each row to Weights & Biases, for this user or team"),
        "project": Option(str, "and in this project"),
        "job_type": Option(str, "and as this type of job"),
        "name": Option(str, "and with this name, before the end of the run's id"),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    with joined() as ranks:
        return _main(sys.argv[1:] if argv is None else argv, ranks)


def _main(argv: Sequence[str], ranks: Ranks | None) -> int:
    args = cli.parse(
        "python -m datamodels.worker",
        "Run rows of a store: call main() of a module of yours, check what it returns, and commit it.",
        SECTIONS,
        argv,
        passthrough=True,
        help_later="worker.main_import",
        elsewhere=("pool",),
    )
    program = sys.argv[0]
    sys.argv = [program, *args.rest]  # what the user's module sees, from its import on
    if args.help_requested:
        import_main(args["worker.main_import"])
        cli.collect_user(args)
    one, index = args.get("worker.index") is not None, args.get("worker.index")
    if args["worker.do_if_complete"] and not one:
        raise ConfigError("--worker.do_if_complete: replaces one complete row; name it with --worker.index=ROW")
    if one and args.given("worker.rows"):
        raise ConfigError("--worker.rows: chooses among many rows, and --worker.index names one; leave one of them out")
    leave_with_parent()
    copied: dict[str, object] = {}
    if args.given("worker.snapshot"):
        copied = snapshot.enter(Path(args["worker.logdir"]), args["worker.snapshot"], argv)
    keys = args["worker.keys"]
    store = opened(args["worker.logdir"], keys, sync=args["worker.sync"], time_to_live=args["worker.time_to_live"])
    showing = args["worker.dry_run"] or args["worker.smoke"]
    follows = ranks is not None and ranks.rank > 0
    if one and not follows:  # before anything is imported or trained
        try:
            store.check_row(index)
        except RowError as error:
            raise ConfigError(f"--worker.index ({args.where('worker.index')}): {error}") from None
        if not args["worker.do_if_complete"] and not showing and store.layout.completed([index])[0]:
            print(f"row {index}: {store.already(index)}")
            return 0
    rows: np.ndarray | None = None
    if args.given("worker.rows"):
        rows = select(store.design, args["worker.rows"], where=f"--worker.rows ({args.where('worker.rows')})")
    rows = store.within(rows)
    if rows is not None and not rows.any() and not follows:
        print(f"none of these rows is complete, so there is nothing to add {', '.join(keys)} to")
        return 0
    module = import_main(args["worker.main_import"])
    if not showing and getattr(module, "__file__", None):
        file = Path(str(module.__file__)).resolve()
        store.describe_code(file, main=module.__name__, **copied)
    cli.collect_user(args)
    single = Routine.find(module, "main", available(store, many=False))
    many = Routine.find(module, "main_many", available(store, many=True))
    if single is not None:
        single.check_blocks(store)  # main_many is given a list, with None where a row does not have a factor
    if single is None and many is None:
        raise ConfigError(f"{module.__name__} ({getattr(module, '__file__', '?')}): has neither main() nor main_many()")
    if args["worker.batch"] > 1 and many is None:
        raise ConfigError(
            f"--worker.batch: {module.__name__} has no main_many() that could run several rows at once; "
            f"write one, or leave the option out"
        )
    if follows:
        assert ranks is not None
        return _follow(store, single, many, ranks)
    routines = [routine for routine in (single, many) if routine is not None]
    for sentence in check_factors(module, routines, store):
        print(f"note: {sentence}", file=sys.stderr)
    for routine in routines:
        if keys is None and _blind(routine, store):
            print(
                f"note: the design gives rows masks, and {routine.name} does not ask for `mask`: unless it returns the "
                f"mask itself, rows are recorded with masks that it may not have trained on",
                file=sys.stderr,
            )
    if showing:
        with Worker(store, single, many, ranks=ranks) as worker:
            row = index if one else _first_pending(store, rows)
            batch = 1 if one else args["worker.batch"]
            if args["worker.dry_run"]:
                print("\n".join([dry_run(worker, row, batch=batch, rest=args.rest), *cli.user_values()]))
            else:
                print(smoke(worker, row, batch=batch))
        return 0
    wanted = {name: value for name, value in args.section("wandb").items() if value is not None}
    tracker = Tracker(store, wanted) if wanted else None
    exit_status = 1
    before = {number: signal.getsignal(number) for number in (*_STOPS, _LAST_ROW)}
    try:
        with contextlib.suppress(OSError), open(store.path / "cmds.txt", "a", encoding="utf-8") as commands:
            commands.write(shlex.join([program, *argv]) + "\n")
        exit_status = _work(store, single, many, args, one, index, rows, ranks, tracker)
    except ConfigError:
        exit_status = MISCONFIGURED
        raise
    finally:
        for number in before:  # it is ending already
            signal.signal(number, signal.SIG_IGN)
        store.close(exit_status)
        if tracker is not None:
            tracker.close(exit_status)
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_status


def _follow(store: Store, single: Routine | None, many: Routine | None, ranks: Ranks) -> int:
    """A rank of torchrun's beside the first."""
    store.run.note(rank=ranks.rank)
    exit_status = 1
    with Worker(store, single, many) as worker:
        try:
            for number in _STOPS:
                signal.signal(number, worker.on_signal)
            signal.signal(_LAST_ROW, lambda number, frame: None)  # for rank 0 to heed
            exit_status = ranks.follow(store, worker.follow)
        except Stopped as stop:
            exit_status = 128 + stop.number
        finally:
            store.close(exit_status)
    return exit_status


def _work(
    store: Store,
    single: Routine | None,
    many: Routine | None,
    args: cli.Arguments,
    one: bool,
    index: int | None,
    rows: np.ndarray | None,
    ranks: Ranks | None,
    tracker: Tracker | None,
) -> int:
    started = time.monotonic()
    with Worker(
        store,
        single,
        many,
        batch=args["worker.batch"],
        retries=args["worker.retries"],
        job_timeout=args.get("worker.job_timeout"),
        rows=rows,
        ranks=ranks,
        **({} if tracker is None else {"committed": tracker.log}),
    ) as worker:
        try:
            for number in _STOPS:
                signal.signal(number, worker.on_signal)
            signal.signal(_LAST_ROW, worker.on_last_row)
            if one:
                assert index is not None
                complete = worker.run_one(index, do_if_complete=args["worker.do_if_complete"])
                if complete and worker.tally.committed:
                    print(f"row {index}: complete ({time.monotonic() - started:.1f} s)")
                return 0 if complete else 1
            quiet = not sys.stderr.isatty() or POOL_VARIABLE in os.environ
            mine = np.ones(store.num_models, bool) if rows is None else rows
            done = int((mine & store.completed()).sum())
            with tqdm(total=int(mine.sum()), initial=done, unit="row", disable=quiet) as bar:
                worker.run_all(bar.update)
        except Stopped as stop:
            print(
                f"stopped by {signal.Signals(stop.number).name}; {worker.tally.committed} rows committed, rows in hand "
                f"are given back",
                file=sys.stderr,
            )
            return 0 if stop.number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ else 128 + stop.number
    given_up, left = worker.given_up(), worker.neglected()
    if left:
        print(
            f"rows {', '.join(map(str, left[:5]))}{' …' if len(left) > 5 else ''} are held by others, who do not fill "
            f"in {', '.join(store.keys)}; run this again when they have ended",
            file=sys.stderr,
        )
    tally = worker.tally
    print(
        f"{tally.committed} rows committed, {tally.failed} attempts failed"
        + (f"; {tally.keys_failed} keys failed in {tally.rows_without} of these rows" if tally.keys_failed else "")
        + (
            f"; {given_up} rows of the store failed too often to be tried again; when the cause is gone, "
            f"{clearing(store)} has them run again"
            if given_up
            else ""
        )
    )
    return 1 if worker.broken else GAVE_UP if given_up or left else 0


def leave_with_parent() -> None:
    """Under a pool, be asked to stop when the pool dies, so that no orphan goes on training."""
    parent = os.environ.get(POOL_VARIABLE)
    if parent and hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            raise SystemExit(143)


def _blind(routine: Routine, store: Store) -> bool:
    """Whether the design has masks that the routine does not ask for."""
    return any(block.sampler for block in store.design.blocks) and not {"mask", "masks"} & set(routine.wanted)


def _first_pending(store: Store, rows: np.ndarray | None) -> int:
    mine = np.arange(store.num_models) if rows is None else np.flatnonzero(rows)
    pending = mine[~store.completed()[mine]]
    return int((pending if len(pending) else mine)[0])


if __name__ == "__main__":
    try:
        cli.run(main)
    except DatamodelsError as error:  # raised while a signal ended the process
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
