"""Promises 1, 2 and 7: kill -9 at random moments of processes that commit, replace and reset the same rows."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from datamodels.store import Store
from tests.faults.bench import Experiment, check
from tests.faults.rows import ROWS, SPEC, Writers

LONGEST = {True: 0.25, False: 0.1}  # seconds until the next one is killed, by whether commits are synced


def killed(folder: Path, kills: int) -> int:
    """A quarter of the kills each: one writer or three, with syncs and without, where more happens."""
    unheard = 0
    for sync in (True, False):
        for writers in (1, 3):
            unheard += _kill(folder / f"{sync}-{writers}", -(-kills // 4), writers, sync=sync)
    check(kills < 500 or unheard > kills / 100, "hardly any kill came between a commit and the word of it")
    return 4 * -(-kills // 4)


def _kill(path: Path, kills: int, count: int, *, sync: bool) -> int:
    Store.create(path, SPEC).close()
    rng = random.Random(f"{count} {sync}")
    with Writers(path, sync=sync) as writers:
        while kills > 0:
            pids = [writers.start() for _ in range(count)]
            rng.shuffle(pids)
            for pid in pids:  # one goes, the others take over its rows, then the next
                time.sleep(rng.random() * LONGEST[sync])
                writers.kill(pid)
                kills -= 1
            writers.settle()
            check(not writers.errors, "; ".join(writers.errors))
            writers.check()
        check(writers.done > (3 if sync else 10), f"the writers hardly got to commit: {writers.done}")
        unheard = writers.unheard
    with Store.open(path) as store:  # what the dead left behind goes as the living come by
        for row in range(ROWS):
            check(store.run.take(row), f"row {row} is held by nobody who lives, and cannot be had")
            store.run.release(row, done=False)
        left = [name for name in os.listdir(path / "claims") if not name.endswith(".lock")]
        check(not left and len(os.listdir(path / "claims")) <= 20, f"claims of the dead are left: {left}")
    return unheard


KILLS = Experiment("kill -9 at random moments", killed, fast=16, slow=80, full=1200)
