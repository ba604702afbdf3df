"""A process whose children fill, replace and reset rows of a store until they are killed; run with -m.

A line of JSON on standard input forks one. Each says "start ROW VERSION" before it touches a row and "done ROW VERSION"
when that was reported done, while it still holds the row; version 0 is no row at all.
"""

from __future__ import annotations

import json
import os
import random
import sys

import numpy as np

from datamodels.store import Store
from datamodels.store.reset import _clear
from tests.faults import mutants
from tests.faults.rows import ROWS, values


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())  # one write, so that lines of several never mix


def write(path: str, seed: int, *, sync: bool, network: bool | None, first: int) -> None:
    rng = random.Random(seed)
    store = Store.open(path, sync=sync)
    if network is not None:
        store.disk.close()
        store.disk.__init__(store.path, sync=sync, network=network)
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
            batch = [values(row, version) for row in rows]
            store.commit_many(rows, {key: [row[key] for row in batch] for key in batch[0]}, replace=True)
        elif rows:
            with store.run.committing(rows) as guard:
                _clear(store, rows, (), guard)
        for row in rows:
            say("done", row, version)
            store.run.release(row, done=False)


def main() -> None:
    np.zeros(1).sum()  # what is slow the first time is done before the forks
    with mutants.apply(os.environ.get(mutants.VARIABLE)):
        for line in sys.stdin:
            if os.fork() == 0:
                try:
                    write(**json.loads(line))
                except BaseException as error:
                    say("error", os.getpid(), type(error).__name__, error)
                finally:
                    os._exit(1)


if __name__ == "__main__":
    main()
