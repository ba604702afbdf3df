"""A process that forks what it is asked for by lines of JSON on standard input, with a mutant where one is named.

Writers fill, replace and reset rows of a store until they are killed; each says "start ROW VERSION" before it touches a
row and "done ROW VERSION" when that was reported done, while it still holds the row; version 0 is no row at all. One
commit, and one run of the worker, wait at a gate first, so that they can be traced from their first call on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from datamodels import cli, worker
from datamodels.store import Store, disk
from datamodels.store.reset import _clear
from tests.faults import mutants
from tests.faults.rows import ROWS, values


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())  # one write, so that lines of several never mix


def write(path: str, seed: int, *, sync: bool, first: int) -> None:
    rng = random.Random(seed)
    store = Store.open(path, sync=sync)
    store.run  # noqa: B018  it is made when asked for
    say("ready", os.getpid())
    for count in range(1, 10**6):
        version = seed * 10_000 + count
        begin, size = rng.randrange(first, ROWS), rng.choice((1, 1, 2, 4))
        rows = [row for row in range(begin, min(ROWS, begin + size)) if store.run.take(row)]
        if rows and rng.random() < 0.2:
            version = 0
        for row in rows:
            say("start", row, version)
        if rows and version:
            commit(store, rows, version)
        elif rows:
            with store.run.committing(rows) as guard:
                _clear(store, rows, (), guard)
        for row in rows:
            say("done", row, version)
            store.run.release(row, done=False)


def commit(store: Store, rows: Sequence[int], version: int) -> None:
    batch = [values(row, version) for row in rows]
    store.commit_many(rows, {key: [row[key] for row in batch] for key in batch[0]}, replace=True)


def wait_at_the_gate() -> None:
    """Say that all is ready, and wait for a signal: no file has to be opened for it."""
    say("ready", os.getpid())
    signal.sigwait([signal.SIGUSR1])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def once(path: str, rows: list[int], version: int, *, time_to_live: float) -> None:
    store = Store.open(path, time_to_live=time_to_live)
    for row in rows:
        assert store.run.take(row)
    wait_at_the_gate()
    commit(store, rows, version)
    say("done", os.getpid())
    store.close()


def hold(path: str, row: int) -> None:
    """Take a row, and die with it."""
    assert Store.open(path).run.take(row)
    os._exit(0)


def take(path: str, row: int) -> None:
    """Take a row, from the gate on."""
    store = Store.open(path)
    store.run  # noqa: B018  it is made when asked for
    wait_at_the_gate()
    say("took" if store.run.take(row) else "left", row)
    store.close()


def work(argv: list[str], *, out: str) -> None:
    """A run of the worker, whose main is in this file; what it prints goes to the file `out`."""
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    wait_at_the_gate()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    cli.run(lambda: worker.main(argv))


def main(index: int) -> dict[str, object]:
    return values(index, 1)


def child(kind: str, asked: dict) -> int:
    if asked.pop("network", False):
        disk.filesystem = lambda path: "nfs"
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # of threads, too: it is for the gate
    if kind != "write":
        disk._SYNCS = 1  # strace follows one thread
    if asked.pop("short", False):
        whole = os.pwrite
        os.pwrite = lambda fd, data, offset: whole(fd, data[: max(1, len(data) // 2)], offset)
    try:
        {"write": write, "once": once, "hold": hold, "take": take, "work": work}[kind](**asked)
    except SystemExit as error:
        sys.stdout.flush()
        return int(error.code or 0)
    except BaseException as error:
        say("error", os.getpid(), type(error).__name__, error)
        return 1
    return 0


def serve() -> None:
    np.random.default_rng(0)  # what is slow the first time is done before the forks
    with mutants.apply(os.environ.get(mutants.VARIABLE)):
        for line in sys.stdin:
            asked = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os._exit(child(asked.pop("kind"), asked))
            if asked["kind"] != "write":
                say("exit", pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


if __name__ == "__main__":
    serve()
