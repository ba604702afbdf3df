"""`python -m datamodels.pool`: keep workers running until no row of the store is left to do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError
from datamodels.executors.base import Executor, Exit
from datamodels.executors.local import LocalExecutor, cores
from datamodels.store import Status, Store
from datamodels.worker import POOL_VARIABLE
from datamodels.worker import SECTIONS as WORKER

SECTIONS = {
    "pool": {
        "workers": Option(int, "copies of the worker; 0 means one per core", default=0, min=0),
        "executor": Option(str, "where the workers run", default="local", choices=("local",)),
    },
    "worker": {
        name: option
        for name, option in WORKER["worker"].items()
        if name not in ("index", "do_if_complete", "dry_run", "smoke")
    },
}
_STOP_SECONDS = 4.0
_BARREN_LIMIT = 5


class Interrupted(Exception):
    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_pool(
    store: Store, executor: Executor, workers: int, *, say: Callable[[str], None] = print, progress: bool = True
) -> int:
    """Start `workers` copies, restart those that die, until no row is left; the exit code.

    0: every row is complete. 1: rows are left undone, `say` tells which. 2: the workers cannot be configured.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    watch = Watch(store, progress)
    try:
        barren = 0
        for number in range(workers):
            executor.start(number)
        while executor.running():
            time.sleep(0.2)
            watch.look()
            for end in executor.ended():
                if end.code in (0, 1):  # nothing left for it; 1: rows among them are given up
                    continue
                if end.code == 2:
                    executor.stop(_STOP_SECONDS)
                    watch.close()
                    say(_last_words(end))
                    return 2
                barren = 0 if watch.moved() else barren + 1
                if barren >= _BARREN_LIMIT:
                    executor.stop(_STOP_SECONDS)
                    watch.close()
                    say(
                        f"{barren} workers in a row died before they finished a row; the last one {_cause(end)}:\n"
                        f"{_last_words(end)}"
                    )
                    return _report(store, say)
                watch.write(f"worker {end.number} {_cause(end)}; starting it again")
                executor.start(end.number)
        watch.close()
        return _report(store, say)
    except Interrupted as interrupted:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        executor.stop(_STOP_SECONDS)
        watch.close()
        done = int(store.completed().sum())
        say(f"stopped: {done} of {store.num_models} rows are complete and safe; run the same command again to go on")
        return 130 if interrupted.number == signal.SIGINT else 143
    finally:
        executor.stop(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _cause(end: Exit) -> str:
    if end.code >= 0:
        return f"ended with code {end.code} after {end.seconds:.0f} s"
    hint = " (out of memory?)" if end.code == -signal.SIGKILL else ""
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
    lines += [f"  row {f.row}: {f.attempts} attempts, {f.error or 'no traceback'}" for f in status.failures]
    if status.failed > len(status.failures):
        lines.append(f"  … and {status.failed - len(status.failures)} more")
    if status.failures:
        lines.append(
            f"tracebacks: {store.path}/workers/<row>/attempt-*.json; when the cause is gone, "
            f"--worker.index=<row> runs a row again, or a larger --worker.retries all of them"
        )
    return "\n".join(lines)


class Watch:
    """One progress bar for the store; off a terminal, a line every fifteen seconds."""

    def __init__(self, store: Store, progress: bool):
        self._store = store
        self._done = self._mark = int(store.completed().sum())
        terminal = sys.stderr.isatty()
        self._lines = progress and not terminal
        self._started, self._first, self._next = time.monotonic(), self._done, time.monotonic() + 15
        self._failed_at = 0.0
        self._bar = tqdm(
            total=store.num_models,
            initial=self._done,
            unit="row",
            smoothing=0.1,
            disable=not (progress and terminal),
            dynamic_ncols=True,
        )

    def look(self) -> None:
        now = time.monotonic()
        done = int(self._store.completed().sum())
        if done != self._done:
            self._bar.update(done - self._done)
            self._done = done
        if now - self._failed_at > 2:
            self._failed_at = now
            failed = self._store.status(failures=0).failed
            if failed:
                self._bar.set_postfix_str(f"{failed} failed")
        if self._lines and now > self._next:
            self._next = now + 15
            self._line(now)

    def _line(self, now: float) -> None:
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = f", {(self._store.num_models - self._done) / rate:.0f} s left" if rate else ""
        print(f"{self._done}/{self._store.num_models} rows, {rate:.1f} rows/s{left}", file=sys.stderr, flush=True)

    def moved(self) -> bool:
        """Whether rows were finished since this was last asked."""
        self._done = int(self._store.completed().sum())
        moved, self._mark = self._done != self._mark, self._done
        return moved

    def write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        done = int(self._store.completed().sum())
        self._bar.update(done - self._done)
        self._done = done
        self._bar.close()
        if self._lines:
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
    workers = args["pool.workers"] or cores()
    with Store.open(args["worker.logdir"]) as store:
        if bool(store.completed().all()):
            print(f"all {store.num_models} rows are complete")
            return 0
        command = [sys.executable, "-m", "datamodels.worker", *_for_worker(args, argv)]
        executor = LocalExecutor(
            command,
            workers=workers,
            logs=Path(store.path) / "runs" / f"pool-{os.getpid()}",
            environment={POOL_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        )
        code = run_pool(store, executor, workers)
        if code == 0:
            print(f"all {store.num_models} rows are complete")
        if code == 2:
            raise ConfigError("the workers cannot start; see above")
        return code


def _for_worker(args: cli.Arguments, argv: Sequence[str]) -> list[str]:
    """The worker's command line: its own options as resolved here, then whatever the pool does not know."""
    options = [
        f"--worker.{name}={value}"
        for name, value in args.section("worker").items()
        if args.given(f"worker.{name}") and value is not None
    ]
    return [*options, *args.rest]


if __name__ == "__main__":
    cli.run(main)
