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
        # Without a key that `--worker.keys` names a row is not done, so none of the complete ones lacks any.
        self.optional = [key for key, field in store.spec.schema.items() if not field.required and not store.keys]

    def completed(self) -> np.ndarray:
        """Which of the rows are complete, bool (count,)."""
        flags: np.ndarray = self.store.completed()[self.rows]
        return flags

    def records(self) -> np.ndarray:
        """The rows' records, (count,)."""
        records: np.ndarray = self.store.layout.row_records()[self.rows]
        return records

    def statuses(self, key: str) -> np.ndarray:
        """Status of an optional key in the rows, (count,)."""
        statuses: np.ndarray = self.store.layout.records(key)["status"][self.rows]
        return statuses

    def failed_keys(self) -> dict[str, np.ndarray]:
        """Optional keys that failed in some of the complete rows, and in which of them, ascending."""
        rows, completed = np.flatnonzero(self.rows), self.completed()
        found = {key: rows[completed & (self.statuses(key) == commits.KEY_FAILED)] for key in self.optional}
        return {key: failed for key, failed in found.items() if len(failed)}

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
    """Whether starting dead workers again leads anywhere. Of times it knows what it has seen: hosts have clocks of
    their own, and records of keys have no times."""

    def __init__(self, share: Share):
        self._share = share
        self._completed, self._attempts, _ = self._count()
        self._before, self._tried = share.completed(), share.records()["attempts"]
        # One that failed before this pool began has been seen; who starts a pool nevertheless goes on without it.
        self._keys = [key for key in share.optional if not share.statuses(key).any()]
        self._next, self._doubts = time.monotonic(), 0
        self._in_hand: dict[tuple[int, int], float] = {}  # row and attempt -> since when
        self._longest = 0.0

    def hopeless(self, workers: int) -> str:
        """Why to stop, or "": since the pool began every worker has failed rows, many in all, and none was finished; or
        many were, and all without the same optional key.

        A row that has been in hand for longer than any that has ended may well be another: rows of one kind stand
        together, and those that are no good are often the first to end. Asked twice, for what fails in less than a
        second costs little.
        """
        now = time.monotonic()
        if now < self._next:
            return ""
        records, fresh = self._share.records(), self._share.completed() & ~self._before
        if fresh.any():
            ended, why = self._without_keys(fresh)
        else:
            ended = (records["state"] == commits.FAILED) & (records["attempts"] > self._tried)
            why = (
                f"every worker fails, {HOPELESS} rows or more, and none was finished; try one with --worker.smoke "
                f"before you run them all"
            )
        bad = ended.sum() >= HOPELESS and len(np.unique(records["run"][ended])) >= workers
        self._doubts = self._doubts + 1 if not self._one_lasts(now) and bad else 0
        self._next = time.monotonic() + max(1.0, 20 * (time.monotonic() - now))
        if fresh.any() and not self._keys:
            self._next = float("inf")  # never again
        return why if self._doubts > 1 else ""

    def _without_keys(self, fresh: np.ndarray) -> tuple[np.ndarray, str]:
        """Which of some finished rows lack the optional keys that failed in many of them and that none has, and why."""
        lost, ended = [], np.zeros(len(fresh), bool)
        for key in list(self._keys):
            status = self._share.statuses(key)
            failed = fresh & (status == commits.KEY_FAILED)
            if (status == commits.VALID).any():
                self._keys.remove(key)
            elif failed.sum() >= HOPELESS:
                lost.append(key)
                ended |= failed
        if not lost:
            return ended, ""
        row = int(np.flatnonzero(self._share.rows)[np.argmax(ended)])
        return ended, (
            f"{', '.join(lost)} failed in every row, {HOPELESS} or more, as in row {row}: "
            f"{self._share.store.key_error(row, lost[0]) or 'no traceback'}; the rows are complete without. When the "
            f"cause is gone, --worker.keys={','.join(lost)} fills them in; a pool that is started again goes on without"
        )

    def _one_lasts(self, now: float) -> bool:
        held = sorted(self._share.store.held())
        attempts = self._share.store.layout.row_records(held)["attempts"].tolist()
        before = self._in_hand
        self._in_hand = {which: before.get(which, now) for which in zip(held, attempts, strict=True)}
        self._longest = max([self._longest, *(now - before[which] for which in before.keys() - self._in_hand.keys())])
        return any(now - since > self._longest for since in self._in_hand.values())

    def begun(self) -> bool:
        """Whether a row has been begun since the pool was: then its workers could be configured."""
        again = self._share.records()["attempts"] != self._tried
        return bool(again.any() or (self._share.completed() != self._before).any())

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
