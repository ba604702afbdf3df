"""Claims rows of a store, calls the user's functions with them, commits what is right and records what is not."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from datamodels.design import Assignment, check_index
from datamodels.errors import ClaimLost, ConfigError, RowError, StoreError
from datamodels.ranks import Ranks
from datamodels.running.ends import Deadline, JobTimeout, Stopped, last_line
from datamodels.running.output import Output, printed
from datamodels.running.routine import Routine, seed_everything
from datamodels.store import Store, describe
from datamodels.store import commit as commits

_AHEAD = 256  # rows looked at together where others have been
_CLAIMING = 1.0  # seconds that another worker may take from claiming rows until it has begun with them


@dataclass
class Tally:
    """What one worker did."""

    committed: int = 0
    failed: int = 0  # attempts that failed
    given_up: int = 0  # rows among them that will not be tried again
    keys_failed: int = 0  # optional ones, of rows that were committed
    rows_without: int = 0  # rows among these that miss any


class Worker:
    """Runs rows of one store with one module's `main` and `main_many`."""

    def __init__(
        self,
        store: Store,
        main: Routine | None,
        main_many: Routine | None,
        *,
        batch: int = 1,
        retries: int = 2,
        job_timeout: int | None = None,
        rows: np.ndarray | None = None,
        ranks: Ranks | None = None,
        committed: Callable[[int, Mapping[str, bytes]], None] = lambda row, blobs: None,
    ):
        self.store, self.main, self.main_many = store, main, main_many
        self.batch, self.retries = batch, retries
        self._mine = np.ones(store.num_models, bool) if rows is None else rows  # those that it may run, bool (rows,)
        self._limit = retries  # a row whose attempts are more is not tried again
        self.tally = Tally()
        self._attempts: dict[int, int] = {}  # rows claimed now -> number of this attempt
        self._deadline = Deadline(store, job_timeout)
        self._output = Output(store)
        self._ranks, self._committed = ranks, committed
        self._interruptible = True
        self._stop: int | None = None  # the signal that asked this process to end
        self._last = False  # asked to end after the rows in hand
        self.broken = False  # a row failed on one rank of several: what they have in common may be of no use
        self._replace = False  # what is complete is run again, for its new values
        self._pid = os.getpid()

    # ------------------------------------------------------------- which rows

    def run_all(self, bar: Callable[[int], object] = lambda rows: None) -> None:
        """Claim and run pending rows until none is left that this worker could claim."""
        self._output.open()
        while True:
            moved = False
            fresh, again = self._pending()
            # A row that took its process down would take the others of a batch with it, so it is tried again alone.
            for queue, size in ((deque(fresh), self.batch), (deque(again), 1)):
                while rows := self._claim_some(queue, size):
                    before = self.tally.committed
                    self._run_claimed(rows)
                    bar(self.tally.committed - before)
                    moved = True
            # What others failed, gave back or left behind meanwhile is found by another look.
            if self._last or (not moved and not self._wait([*fresh, *again])):
                return

    def _pending(self) -> tuple[list[int], list[int]]:
        """Incomplete rows never tried, and those tried but not too often; from a place of this worker's own onwards."""
        completed, records = self.store.completed(), self.store.layout.row_records()
        rows = np.flatnonzero(self._mine & ~completed & ~self._spent(records))
        offset = int(self.store.run.id[-8:], 16) % self.store.num_models
        rows = np.roll(rows, -int(np.searchsorted(rows, offset)))
        tried = records["attempts"][rows] > 0
        return rows[~tried].tolist(), rows[tried].tolist()

    def _spent(self, records: np.ndarray) -> np.ndarray:
        spent: np.ndarray = (records["state"] == commits.FAILED) & (records["attempts"] > self.retries)
        return spent

    def given_up(self) -> int:
        """How many rows are incomplete and will not be tried again, whoever failed them."""
        return int((self._mine & ~self.store.completed() & self._spent(self.store.layout.row_records())).sum())

    def neglected(self) -> list[int]:
        """Rows that others hold who do not fill in all that this worker is for."""
        if not self.store.keys:
            return []
        first = self.store.neglected(self._mine, self.retries)
        if not len(first):
            return []
        time.sleep(_CLAIMING)
        again = set(first.tolist()) & set(self.store.neglected(self._mine, self.retries).tolist())
        return sorted(again.intersection(self.store.held()))

    def _claim_some(self, queue: deque[int], size: int) -> list[int]:
        rows: list[int] = []
        while queue and len(rows) < size and not self._last:
            some = sorted(queue.popleft() for _ in range(min(len(queue), size - len(rows))))
            done = self.store.layout.completed(some)  # by another worker; far cheaper to see before claiming
            rows += self._claim([row for row, flag in zip(some, done, strict=True) if not flag])
            if done.any():
                self._skip(queue)
        return sorted(rows)

    def _skip(self, queue: deque[int]) -> None:
        """Drop rows from the front of a queue that are complete: another worker may be many rows ahead of this one."""
        while queue:
            ahead = [queue.popleft() for _ in range(min(len(queue), _AHEAD))]
            order = sorted(ahead)
            done = dict(zip(order, self.store.layout.completed(order), strict=True))
            left = [row for row in ahead if not done[row]]
            queue.extendleft(reversed(left))
            if left:
                return

    def _claim(self, rows: list[int], *, anew: bool = False, complete_too: bool = False) -> list[int]:
        """Claim rows and count an attempt of each; those where there is something (left) to do for this worker."""
        with self._uninterrupted():
            taken = [row for row in rows if self.store.run.take(row)]
            completed, records = self.store.layout.completed(taken), self.store.layout.row_records(taken)
            ready = []
            for place, (row, complete, record) in enumerate(zip(taken, completed, records, strict=True)):
                if complete and not complete_too:
                    self.store.run.release(row, done=True)
                elif not complete and record["attempts"] > self.retries and not anew:
                    if record["state"] != commits.FAILED:
                        self._record_death(row, record)
                    self.store.run.release(row, done=False)
                else:
                    ready.append(place)
            rows = [taken[place] for place in ready]
            retries = None if anew else self.retries
            begun = self.store.begin(rows, complete=completed[ready], records=records[ready], retries=retries)
            self._attempts.update(zip(rows, begun, strict=True))
            return rows

    def _record_death(self, row: int, record: np.void) -> None:
        attempts, run, place = int(record["attempts"]), self.store.run_id(record), ""
        try:
            self.store.fail(
                row,
                attempts,
                f"The process that ran this row died without leaving a word, {attempts} times (killed, out of memory, "
                f"or the machine went down); the last one was runs/{run}.json",
                finished=float(record["started"]),  # it is known when it began
                run=run,
                log=printed(self.store.path, run, row),
            )
        except StoreError as full:
            place = f" (which could not be noted in its folder: {full})"
        print(
            f"row {row}: its process died {attempts} times{place}; it will not be tried again",
            file=sys.stderr,
            flush=True,
        )

    def _wait(self, rows: Iterable[int]) -> bool:
        """Wait while another host may have died holding one of these rows; whether to look again."""
        if not any(self.store.run.undecided(row) for row in rows):
            return False
        time.sleep(self.store.run.time_to_live / 12)
        return True

    def run_one(self, row: int, *, do_if_complete: bool = False) -> bool:
        """Run one row, and again while it fails and may be retried; whether it is complete at the end."""
        row = check_index(row, self.store.num_models)
        self._output.open()
        replace = do_if_complete and bool(self.store.layout.completed([row])[0])
        tried, self._replace = 0, do_if_complete
        while not self.tally.committed and not self.tally.given_up and not self._last:
            if not self._claim([row], anew=tried == 0, complete_too=do_if_complete):
                if self.store.layout.completed([row])[0]:
                    print(f"row {row}: {self.store.already(row)}")
                    return True
                if tried:
                    return False
                raise RowError(f"row {row}: another worker is running it; wait for it, or stop it")
            if replace:  # a complete row's record stays that of the values it holds, so its attempts are counted here
                self._limit = self._attempts[row] + self.retries - 1
                self._attempts[row] += tried
            tried += 1
            self._run_claimed([row], replace=do_if_complete)
        return self.tally.committed > 0

    # ---------------------------------------------------------------- run them

    def _run_claimed(self, rows: list[int], *, replace: bool = False) -> None:
        """Run rows that are claimed, commit what is right, record what is not, and give all of them back.

        A ConfigError of the user's functions ends the worker: it would be that of every row, and says nothing against
        this one, which `close` gives back.
        """
        if self.routine_for(len(rows)) is self.main:
            for row in rows:
                try:
                    with self._watched([row]):
                        result = self.call(row)
                except ConfigError:
                    raise
                except (Exception, JobTimeout) as error:
                    self._failed(row, error)
                else:
                    self._commit({row: result}, replace=replace)
            return
        try:
            with self._watched(rows):
                results = self.call_many(rows)
        except ConfigError:
            raise
        except (Exception, JobTimeout) as error:
            if len(rows) == 1 or self._ranks is not None:
                for row in rows:
                    self._failed(row, error)
                return
            print(
                f"rows {rows[0]}…{rows[-1]}: main_many failed for the batch ({last_line(error)}); running its "
                f"{len(rows)} rows one by one",
                file=sys.stderr,
                flush=True,
            )
            for row in rows:
                self._run_claimed([row], replace=replace)
        else:
            self._commit(results, replace=replace)

    def routine_for(self, rows: int) -> Routine:
        """Which function runs so many rows at once: main_many several, and one where there is no main."""
        routine = self.main if self.main is not None and (rows == 1 or self.main_many is None) else self.main_many
        assert routine is not None  # the entry point refuses a module with neither
        return routine

    def call(self, row: int, *, smoke: bool = False, logdir: str | None = None) -> Mapping[str, Any]:
        """What main returns for a row, with the design's own values filled in."""
        if self.main is None:
            (result,) = self.call_many([row], smoke=smoke, logdir=logdir).values()
            return result
        routine = self.main
        assignment = self.store.design.assignment(row)
        with self._folders(routine, "logdir", [row], logdir) as folders:
            result = self._call(routine, [assignment], smoke, folders)
        if not isinstance(result, Mapping):
            raise RowError(
                f"row {row}: {routine.name} must return a dict from key to value, got "
                f"{type(result).__name__}; return "
                f"{{{', '.join(f'{k!r}: …' for k in self.store.spec.schema)}}}"
            )
        return self._filled(assignment, result)

    def call_many(
        self, rows: list[int], *, smoke: bool = False, logdir: str | None = None
    ) -> dict[int, Mapping[str, Any]]:
        """What main_many returns for rows, taken apart by row."""
        routine = self.main_many
        assert routine is not None
        assignments = [self.store.design.assignment(row) for row in rows]
        with self._folders(routine, "logdirs", rows, logdir) as folders:
            result = self._call(routine, assignments, smoke, folders)
        if not isinstance(result, Mapping):
            raise RowError(
                f"rows {rows[0]}…{rows[-1]}: {routine.name} must return a dict from key to an array with a "
                f"leading axis of {len(rows)}, got {type(result).__name__}"
            )
        result = {
            key: [values] * len(rows) if isinstance(values, BaseException) else values for key, values in result.items()
        }
        for key, values in result.items():
            if not hasattr(values, "__len__") or len(values) != len(rows):
                got = list(values.shape) if hasattr(values, "shape") else type(values).__name__
                raise RowError(
                    f"rows {rows[0]}…{rows[-1]}, {key!r}: {routine.name} must return a leading axis of "
                    f"{len(rows)}, one entry per row of `indices`, got {got}"
                )
        return {
            a.row: self._filled(a, {key: values[i] for key, values in result.items()})
            for i, a in enumerate(assignments)
        }

    def _call(self, routine: Routine, assignments: Sequence[Assignment], smoke: bool, folders: list[str]) -> Any:
        keys = self.store.asked(assignments, replace=self._replace)
        if self._ranks is None:
            return self._invoke(routine, assignments, smoke, folders, keys)
        attempts = [(a.row, self._attempts.get(a.row, 0)) for a in assignments]
        many = routine is self.main_many
        with self._ranks.together(attempts, many=many, smoke=smoke, folders=folders, keys=keys):
            return self._invoke(routine, assignments, smoke, folders, keys)

    def follow(self, rows: list[int], *, many: bool, smoke: bool, folders: list[str], keys: list[str]) -> None:
        """The same call on another rank, whose result nobody asks for."""
        routine = self.main_many if many else self.main
        assert routine is not None
        self._invoke(routine, [self.store.design.assignment(row) for row in rows], smoke, folders, tuple(keys))

    def _invoke(
        self,
        routine: Routine,
        assignments: Sequence[Assignment],
        smoke: bool,
        folders: list[str],
        keys: tuple[str, ...],
    ) -> Any:
        """What a function returns for what the design gives to rows; main has one, main_many a leading axis."""
        seed_everything(assignments[0].seed)
        asked = {"keys": keys, "measurements": dict(self.store.spec.measurements or {})}
        if routine is self.main:
            (one,) = assignments
            given = {"index": one.row, "seed": one.seed, "mask": one.mask, "smoke": smoke, "logdir": folders[0]}
            return routine({**one.choices, **given, **asked})
        arguments: dict[str, Any] = {
            **asked,
            "indices": np.array([a.row for a in assignments], np.int64),
            "seeds": np.array([a.seed for a in assignments], np.int64),
            "smoke": smoke,
            "logdirs": folders,
        }
        if "masks" in routine.wanted:
            unmasked = [a.row for a in assignments if a.mask is None]
            if unmasked:
                raise RowError(f"row {unmasked[0]}: {routine.name} asks for masks, and the design gives this row none")
            arguments["masks"] = np.stack([a.mask for a in assignments if a.mask is not None])
        for factor in self.store.design.factors:
            arguments[factor] = [a.choices.get(factor) for a in assignments]
        return routine(arguments)

    def _filled(self, assignment: Assignment, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The result with masks and factors of the design where main left them out, and checked where it did not."""
        audit = self.store.audit(assignment)
        for key, value in audit.items():
            if key in result:
                field, where = self.store.spec.schema[key], f"row {assignment.row}"
                if field.encode(result[key], where=where).tobytes() != field.encode(value, where=where).tobytes():
                    raise RowError(
                        f"{where}, {key!r}: main returned something else than the design gives this row; "
                        f"train on the `mask` (or factor) that main is given, or leave it out of the design"
                    )
        return {**audit, **result}

    @contextlib.contextmanager
    def _folders(self, routine: Routine, name: str, rows: list[int], logdir: str | None) -> Iterator[list[str]]:
        """The rows' own folders, made when the routine takes them, gone again where nothing was put in."""
        if name not in routine.wanted:
            yield [""] * len(rows)
            return
        folders = [Path(logdir) / str(row) if logdir else self.store.path / "workers" / str(row) for row in rows]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            yield [str(folder) for folder in folders]
        finally:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    @contextlib.contextmanager
    def _watched(self, rows: list[int]) -> Iterator[None]:
        self._output.begin({row: self._attempts[row] for row in rows})
        with self._deadline.over([(row, self._attempts[row]) for row in rows]):
            yield
        if self._stop is not None:  # main went on in spite of it
            raise Stopped(self._stop)

    # -------------------------------------------------------- what came of them

    def _commit(self, results: Mapping[int, Mapping[str, Any]], *, replace: bool) -> None:
        encoded: dict[int, dict[str, bytes]] = {}
        for row, values in results.items():
            try:
                encoded[row] = self.store.encode(row, values, replace=replace)
            except RowError as error:
                self._failed(row, error)
        _forget_frames([value for values in results.values() for value in values.values()])
        with self._uninterrupted():
            try:
                self.store.commit_encoded(encoded, replace=replace)
            except StoreError as error:
                if len(encoded) == 1:
                    self._failed(next(iter(encoded)), error)
                    return
                for row, blobs in encoded.items():
                    self._commit_one(row, blobs, replace=replace)
            except ClaimLost:
                for row, blobs in encoded.items():
                    self._commit_one(row, blobs, replace=replace)
            else:
                for row, blobs in encoded.items():
                    self._done(row, blobs, replace=replace)

    def _commit_one(self, row: int, blobs: Mapping[str, bytes], *, replace: bool) -> None:
        if not replace and self.store.layout.completed([row])[0]:  # the batch got as far as this row
            self._done(row, blobs, replace=replace)
            return
        try:
            self.store.commit_encoded({row: blobs}, replace=replace)
        except ClaimLost as error:
            if self.store.run.holds(row):  # the lease had run out and nobody has come for the row
                self._failed(row, error)
                return
            self._attempts.pop(row, None)
            self.store.run.release(row, done=False)
            print(f"{error}", file=sys.stderr)
        except StoreError as error:
            self._failed(row, error)
        else:
            self._done(row, blobs, replace=replace)

    def _done(self, row: int, blobs: Mapping[str, bytes], *, replace: bool) -> None:
        failed = {key: blob.why for key, blob in blobs.items() if isinstance(blob, commits.Failed)}
        if failed and self.store.keys:  # it was for them alone
            key, words = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} keys more)" if len(failed) > 1 else ""
            self._failed_with(row, words, f"{key}: {_end(words)}{more}", errors=failed)
            return
        if failed:
            self._keys_failed(row, blobs)
        self.tally.committed += 1
        self._note()
        self._attempts.pop(row, None)
        self.store.run.release(row, done=not replace)
        self._committed(row, blobs)

    def _failed(self, row: int, error: BaseException) -> None:
        if self._ranks is not None:
            self._last = self.broken = True
        self._failed_with(row, "".join(traceback.format_exception(error)), last_line(error))

    def _failed_with(self, row: int, words: str, line: str, errors: Mapping[str, str] | None = None) -> None:
        """Record an attempt that failed, and why: in words, in a line, and of each key where they differ."""
        with self._uninterrupted():
            attempts = self._attempts.pop(row)
            again = attempts <= self._limit
            try:
                where = self.store.fail(row, attempts, words, log=self._output.kept(), errors=errors)
                place = f"; traceback in {where}"
            except StoreError as full:
                place = f"; and its traceback could not be kept ({full})"
            print(
                f"row {row}: attempt {attempts} failed: {line}{place}"
                f"{'; it will be tried again' if again and not self._last else ''}",
                file=sys.stderr,
                flush=True,
            )
            self.tally.failed += 1
            self.tally.given_up += not again
            self._note()
            self.store.run.release(row, done=False)

    def _keys_failed(self, row: int, blobs: Mapping[str, bytes]) -> None:
        try:
            place = f"; traceback in {self.store.failed_keys(row, blobs)}"
        except StoreError as full:
            place = f"; and its traceback could not be kept ({full})"
        self.tally.rows_without += 1
        for key, blob in blobs.items():
            if isinstance(blob, commits.Failed):
                self.tally.keys_failed += 1
                print(
                    f"row {row}: {key} failed: {_end(blob.why)}{place}; the row is complete without it",
                    file=sys.stderr,
                    flush=True,
                )

    def _note(self) -> None:
        self.store.run.note(rows_done=self.tally.committed, rows_failed=self.tally.failed, **describe.software())

    # ------------------------------------------------------------------ signals

    def _in_child(self, number: int) -> bool:
        if os.getpid() == self._pid:
            return False
        signal.signal(number, signal.SIG_DFL)  # a process that main forked ends as if we had never been there
        os.kill(os.getpid(), number)
        return True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._in_child(number):
            return
        self._stop = number
        if self._interruptible:  # a commit takes milliseconds; what it holds is weeks of work
            raise Stopped(number)

    def on_last_row(self, number: int, frame: FrameType | None) -> None:
        """The time is nearly up: finish what is in hand, and claim nothing more."""
        if self._in_child(number) or self._last:
            return
        self._last = True
        os.write(2, b"asked to end: the rows in hand are finished, no other is begun\n")  # print may be at work already

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        if before and self._stop is not None:
            raise Stopped(self._stop)

    def close(self) -> None:
        """Give back the rows in hand, uncounted: that this process ends says nothing against them."""
        self._interruptible = False
        for row, attempts in self._attempts.items():
            with contextlib.suppress(StoreError):
                self.store.give_back(row, attempts)
            self.store.run.release(row, done=False)
        self._attempts.clear()
        self._deadline.close()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _end(words: str) -> str:
    """The last line of a traceback."""
    return (words.strip().splitlines() or [""])[-1]


def _forget_frames(values: Iterable[object]) -> None:
    """Have exceptions let go of their frames, which hold all that main had in hand, and main's result holds them."""
    left = [value for value in values if isinstance(value, BaseException)]
    seen: set[int] = set()
    while left:
        error = left.pop()
        if id(error) not in seen:
            seen.add(id(error))
            error.__traceback__ = None
            inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
            left += [each for each in (error.__cause__, error.__context__, *inside) if each is not None]
