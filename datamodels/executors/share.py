"""The rows of a store that a pool is to fill, and whether starting workers again leads anywhere."""

from __future__ import annotations

import time

import numpy as np

from datamodels.store import Status, Store
from datamodels.store import commit as commits

HOPELESS = 20
"""So many rows must have failed, and none be finished, before a main counts as one that always fails."""


class Share:
    """Rows of a store, all of them or those of a mask, bool (num_models,); counts and records are of these alone."""

    def __init__(self, store: Store, rows: np.ndarray | None = None):
        self.store = store
        self.rows = np.ones(store.num_models, bool) if rows is None else rows
        self.count = int(self.rows.sum())
        self.kind = "" if rows is None else " asked for"

    def completed(self) -> np.ndarray:
        """Which of the rows are complete, bool (count,)."""
        flags: np.ndarray = self.store.completed()[self.rows]
        return flags

    def records(self) -> np.ndarray:
        """The rows' records, (count,)."""
        records: np.ndarray = self.store.layout.row_records()[self.rows]
        return records

    def status(self, failures: int) -> Status:
        return self.store.status(failures=failures, rows=self.rows)

    def free(self) -> bool:
        """Whether a row is left that has not failed and that nobody holds, so that a worker could claim it."""
        open_rows = self.rows & ~self.store.completed() & (self.store.layout.row_records()["state"] != commits.FAILED)
        for row in map(int, np.flatnonzero(open_rows)):
            if self.store.run.take(row):
                self.store.run.release(row, done=False)
                return True
        return False

    def give_back(self, held: list[int]) -> None:
        """Uncount the attempts of rows whose holders were killed, though the rows had done nothing wrong."""
        records = self.store.layout.row_records()
        for row in sorted(held):
            if records["state"][row] == commits.RUNNING and self.store.run.take(row):  # nobody alive holds it
                self.store.give_back(row, int(records["attempts"][row]))
                self.store.run.release(row, done=False)


class Judge:
    """Whether starting dead workers again leads anywhere."""

    def __init__(self, share: Share):
        self._share = share
        self._completed, self._attempts, _ = self._count()
        self._began, self._began_with = time.time(), self._completed
        self._next, self._doubts = time.monotonic(), 0

    def hopeless(self, workers: int, completed: int) -> bool:
        """Whether, since the pool began, every worker has failed rows, many in all, and none was finished.

        `completed`: how many rows of the share are complete now. A row that has been in hand for longer than any took
        to fail may well be finished: rows of one kind stand together, and those that are no good are often the first to
        end. Asked twice, for what fails in less than a second costs little.
        """
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 1
        if completed > self._began_with:
            self._next = float("inf")  # never again
            return False
        records = self._share.records()
        failed = records[(records["state"] == commits.FAILED) & (records["finished"] >= self._began)]
        if len(failed) < HOPELESS or len(np.unique(failed["run"])) < workers:
            return False
        longest = float((failed["finished"] - failed["started"]).max())
        held = self._share.store.layout.row_records()[self._share.store.held()]
        lasting = time.time() - held["started"][held["state"] == commits.RUNNING]
        self._doubts = 0 if bool((lasting > longest).any()) else self._doubts + 1
        return self._doubts > 1

    def begun(self) -> bool:
        """Whether a row has been begun since the pool was: then its workers could be configured."""
        return bool((self._share.records()["started"] >= self._began).any())

    def _count(self) -> tuple[int, int, bool]:
        completed, attempts = self._share.completed(), self._share.records()["attempts"]
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
