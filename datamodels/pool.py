"""`python -m datamodels.pool`: keep workers running until no row of the store is left to do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import numpy as np
from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError
from datamodels.executors.base import Executor, Exit
from datamodels.executors.local import LocalExecutor, cores
from datamodels.store import Status, Store
from datamodels.store import commit as commits
from datamodels.worker import GAVE_UP, POOL_VARIABLE
from datamodels.worker import SECTIONS as WORKER

_ONE_ROW = ("index", "do_if_complete", "dry_run", "smoke")  # options of the worker that make no sense for many
SECTIONS = {
    "pool": {
        "workers": Option(int, "copies of the worker; 0 means one per core", default=0, min=0),
        "executor": Option(str, "where the workers run", default="local", choices=("local",)),
    },
    "worker": {
        name: option
        for name, option in WORKER["worker"].items()
        if name not in _ONE_ROW
    },
}
_STOP_SECONDS = 4.0
_BARREN_LIMIT = 5
_HOPELESS = 20


class Interrupted(Exception):
    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_pool(
    store: Store, executor: Executor, workers: int, *, say: Callable[[str], None] = _say, progress: bool = True
) -> int:
    """Start `workers` copies, restart those that die, until no row is left; the exit code.

    0: every row is complete. 1: rows are left undone, `say` tells which. 2: the workers cannot be configured; a copy
    that finds so after others have begun with rows, as when somebody edits the module, is left out.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for stop in before:  # once is enough: what follows takes seconds
            signal.signal(stop, signal.SIG_IGN)
        raise Interrupted(number)

    watch = Watch(store, progress)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for stop in before:
            signal.signal(stop, interrupt)
        barren, judge = 0, Judge(store)
        for number in range(workers):
            executor.start(number)
        while executor.running():
            time.sleep(0.2)
            if judge.hopeless(executor.running(), watch.look()):
                _stop(executor, store)
                watch.close()
                say(
                    f"stopped: every worker fails, {_HOPELESS} rows or more, and none was finished; try one "
                    f"with --worker.smoke before you run them all"
                )
                return _report(store, say)
            for end in executor.ended():
                if end.code in (0, GAVE_UP) and (executor.running() or not _left_behind(store)):
                    continue
                if end.code == 2 and judge.begun():
                    watch.write(
                        f"worker {end.number} cannot start any more, was a file changed? It is left out; start the "
                        f"pool again to have it back:\n{_last_words(end)}"
                    )
                    continue
                if end.code == 2:
                    _stop(executor, store)
                    watch.close()
                    say(end.words)
                    return 2
                barren = 0 if judge.moved() else barren + 1
                if barren >= _BARREN_LIMIT:
                    _stop(executor, store)
                    watch.close()
                    say(
                        f"{barren} workers in a row died before any row was finished; the last one {_cause(end)}:\n"
                        f"{_last_words(end)}"
                    )
                    return _report(store, say)
                watch.write(f"worker {end.number} {_cause(end)}; starting it again (it prints to {end.log})")
                executor.start(end.number)
        watch.close()
        return _report(store, say)
    except Interrupted as interrupted:
        _stop(executor, store)
        watch.close()
        status = store.status(failures=3)
        safe = f"stopped: {status.completed} of {status.num_models} rows are complete and safe"
        say("\n".join([f"{safe}; run the same command again to go on", *_failures(status)]))
        return 128 + interrupted.number
    finally:
        executor.stop(0)
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _stop(executor: Executor, store: Store) -> None:
    """Stop every worker. What the pool itself had to kill says nothing against its rows, so they are uncounted."""
    held = store.held()  # not those of workers that died by themselves
    if not executor.stop(_STOP_SECONDS):
        return
    records = store.layout.row_records()
    for row in sorted(held):
        if records["state"][row] == commits.RUNNING and store.run.take(row):  # nobody alive holds it
            store.give_back(row, int(records["attempts"][row]))
            store.run.release(row, done=False)


def _cause(end: Exit) -> str:
    if end.code >= 0:
        return f"ended with code {end.code} after {end.seconds:.0f} s"
    hint = " (out of memory, or past --worker.job_timeout)" if end.code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-end.code).name}{hint} after {end.seconds:.0f} s"


def _last_words(end: Exit) -> str:
    return "\n".join(end.words.splitlines()[-15:])


def _report(store: Store, say: Callable[[str], None]) -> int:
    status = store.status(failures=10)
    if status.completed == status.num_models:
        return 0
    say(undone(store, status))
    return 1


def undone(store: Store, status: Status) -> str:
    """What is left of a store that should be full, and what to do about it."""
    lines = [
        f"{status.completed} of {status.num_models} rows are complete; {status.failed} failed, {status.running} "
        f"held by other workers, {status.pending} not done"
    ]
    lines += _failures(status)
    if status.failures:
        lines.append(
            f"tracebacks: {store.path}/workers/<row>/attempt-*.json; when the cause is gone, "
            f"--worker.index=<row> runs a row again, or a larger --worker.retries all of them"
        )
    return "\n".join(lines)


def _failures(status: Status) -> list[str]:
    lines = [
        f"  row {f.row}: {f.attempts} attempt{'s' * (f.attempts != 1)}, {f.error or 'no traceback'}"
        for f in status.failures
    ]
    if status.failed > len(status.failures):
        lines.append(f"  … and {status.failed - len(status.failures)} more that failed")
    return lines


def _left_behind(store: Store) -> bool:
    """Whether a row is free to be claimed after a worker said that none is: main ended its process with that code."""
    open_rows = ~store.completed() & (store.layout.row_records()["state"] != commits.FAILED)
    for row in map(int, np.flatnonzero(open_rows)):
        if store.run.take(row):
            store.run.release(row, done=False)
            return True
    return False


class Judge:
    """Whether starting dead workers again leads anywhere."""

    def __init__(self, store: Store):
        self._store = store
        self._completed, self._attempts, _ = self._count()
        self._began, self._began_with = time.time(), self._completed
        self._next, self._doubts = time.monotonic(), 0

    def hopeless(self, workers: int, completed: int) -> bool:
        """Whether, since the pool began, every worker has failed rows, many in all, and none was finished.

        `completed`: how many rows of the store are complete now. A row that has been in hand for longer than any took
        to fail may well be finished: rows of one kind stand together, and those that are no good are often the first to
        end. Asked twice, for what fails in less than a second costs little.
        """
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 1
        if completed > self._began_with:
            self._next = float("inf")  # never again
            return False
        records = self._store.layout.row_records()
        failed = records[(records["state"] == commits.FAILED) & (records["finished"] >= self._began)]
        if len(failed) < _HOPELESS or len(np.unique(failed["run"])) < workers:
            return False
        longest = float((failed["finished"] - failed["started"]).max())
        held = records[self._store.held()]
        lasting = time.time() - held["started"][held["state"] == commits.RUNNING]
        self._doubts = 0 if bool((lasting > longest).any()) else self._doubts + 1
        return self._doubts > 1

    def begun(self) -> bool:
        """Whether a row has been begun since the pool was: then its workers could be configured."""
        return bool((self._store.layout.row_records()["started"] >= self._began).any())

    def _count(self) -> tuple[int, int, bool]:
        completed, attempts = self._store.completed(), self._store.layout.row_records()["attempts"]
        return int(completed.sum()), int(attempts.sum()), bool((attempts[~completed] == 0).any())

    def moved(self) -> bool:
        """Whether, since this was last asked, rows were finished; or, where each has been tried, tried again.

        Retries are counted and come to an end by themselves; but a main that has finished nothing yet, or a worker that
        dies before it claims a row, is not going to get better.
        """
        completed, attempts, untried = self._count()
        moved = completed != self._completed or (not untried and attempts != self._attempts)
        self._completed, self._attempts = completed, attempts
        return moved


class Watch:
    """One progress bar for the store; off a terminal, a line every fifteen seconds."""

    def __init__(self, store: Store, progress: bool):
        self._store = store
        self._done = int(store.completed().sum())
        terminal = sys.stderr.isatty()
        self._lines = progress and not terminal
        self._started, self._first, self._next = time.monotonic(), self._done, time.monotonic() + 15
        self._failed_at, self._failed = 0.0, store.status(failures=0).failed
        # tqdm shows nothing on a terminal that does not know its size, as under `docker run -t`.
        sized = terminal and all(os.get_terminal_size(sys.stderr.fileno()))
        self._bar = tqdm(
            total=store.num_models,
            initial=self._done,
            unit="row",
            smoothing=0.1,
            disable=not (progress and terminal),
            **({"dynamic_ncols": True} if sized else {"ncols": 80, "nrows": 24}),
        )

    def look(self) -> int:
        """Show what has changed; how many rows are complete."""
        now = time.monotonic()
        done = int(self._store.completed().sum())
        if done != self._done:
            self._bar.update(done - self._done)
            self._done = done
        if now - self._failed_at > 2:
            self._failed_at = now
            status = self._store.status(failures=0)
            if status.failed and not self._failed:  # the first one is news; later ones are counted
                status = self._store.status(failures=1)
                for line in _failures(status)[:1]:
                    self.write(f"{line.strip()}; see {self._store.path}/workers/{status.failures[0].row}")
            self._failed = status.failed
            if status.failed:
                self._bar.set_postfix_str(f"{status.failed} failed")
        if self._lines and now > self._next:
            self._next = now + 15
            self._line(now)
        return done

    def _line(self, now: float) -> None:
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = f", {(self._store.num_models - self._done) / rate:.0f} s left" if rate else ""
        failed = f", {self._failed} failed" if self._failed else ""
        line = f"{self._done}/{self._store.num_models} rows, {rate:.1f} rows/s{left}{failed}"
        print(line, file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        done = int(self._store.completed().sum())
        self._bar.update(done - self._done)
        self._done = done
        self._bar.close()
        if self._lines and done > self._first:
            self._line(time.monotonic())
        self._lines = False


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = cli.parse(
        "python -m datamodels.pool",
        "Run all rows of a store with several workers at once; what neither the "
        "pool nor the worker knows goes to main's own sections.",
        SECTIONS,
        argv,
        passthrough=True,
    )
    for key, where in args.unknown:
        _refuse(key, where)
    for name in _ONE_ROW:
        for variable in (f"worker.{name}", cli.environment_name(f"worker.{name}")):
            if variable in os.environ:
                _refuse(f"worker.{name}", f"environment variable {variable}")
    workers = args["pool.workers"] or cores()
    with Store.open(args["worker.logdir"]) as store:
        if bool(store.completed().all()):
            print(f"all {store.num_models} rows are complete")
            return 0
        command = [sys.executable, "-m", "datamodels.worker", *_for_worker(args)]
        executor = LocalExecutor(
            command,
            workers=workers,
            logs=Path(store.path) / "runs" / f"pool-{os.getpid()}",
            environment={POOL_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        )
        code = run_pool(store, executor, workers)
        if code == 0:
            print(f"all {store.num_models} rows are complete")
        return code


def _refuse(key: str, where: str) -> None:
    section, _, name = key.partition(".")
    if section == "worker" and name in _ONE_ROW:
        raise ConfigError(f"{key} ({where}): a pool runs all rows; use python -m datamodels.worker for one")
    if section == "pool":
        raise ConfigError(cli.unknown_message(key, where, [f"pool.{option}" for option in SECTIONS["pool"]]))


def _for_worker(args: cli.Arguments) -> list[str]:
    """The worker's command line: its own options as resolved here, then whatever the pool does not know."""
    options = [
        f"--worker.{name}={value}"
        for name, value in args.section("worker").items()
        if args.given(f"worker.{name}") and value is not None
    ]
    return [*options, *args.rest]


if __name__ == "__main__":
    cli.run(main)
