"""Put a damaged store right without ever inventing a value.

A row is touched only where `verify` would complain, under its claim, and then in one of four ways: a record is put back
of which a single bit flipped; a flag or a row's record is rebuilt where the checksums of all keys agree with their
bytes; an optional key that is damaged is taken back; or the flag is taken back, and the row is run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from datamodels.errors import ClaimLost, StoreError
from datamodels.store import commit as commits
from datamodels.store.check import look, verify
from datamodels.store.claims import who
from datamodels.store.commit import COMPLETED_FILE, JOURNAL, ROWS_FILE, Layout
from datamodels.store.store import Store


@dataclass(frozen=True)
class Repair:
    """What was done to a row, or, where `done` is false, why it was left as it is."""

    row: int
    what: str
    done: bool = True

    def __str__(self) -> str:
        return f"row {self.row}: {self.what}"


@dataclass(frozen=True)
class _Step:
    what: str
    take: Callable[[Callable[[], None]], None]  # given the guard to call before each write


def repair(
    store: Store, *, dry_run: bool = False, progress: Callable[[int], object] = lambda count: None
) -> Iterator[Repair]:
    """Repair what `verify` finds; what was done, row by row. With `dry_run`, what would be done.

    A row that is held by a worker that lives is left alone, and named.
    """
    for row in sorted({problem.row for problem in verify(store, progress)}):
        if dry_run:
            for step in _steps(store.layout, row, store.design.seed(row)):
                yield Repair(row, step.what)
        elif not store.run.take(row):
            run = store.holders().get(row)
            by = who(store.path, run) if run else "a worker"
            yield Repair(row, f"left as it is: held by {by}; repair again when it has ended", done=False)
        else:
            try:
                with store.run.committing([row]) as guard:
                    for step in _steps(store.layout, row, store.design.seed(row)):
                        step.take(guard)
                        yield Repair(row, step.what)
            except ClaimLost as error:
                yield Repair(row, f"left as it is: {error}", done=False)
            finally:
                store.run.release(row, done=False)
    with contextlib.suppress(StoreError):  # a damaged journal kept those behind it from being applied
        store.recover()


def mend(layout: Layout, row: int, seed: int, guard: Callable[[], None] = lambda: None) -> list[str]:
    """Repair one row that nobody else can touch; what was done."""
    done = []
    for step in _steps(layout, row, seed):
        step.take(guard)
        done.append(step.what)
    return done


def _steps(layout: Layout, row: int, seed: int) -> Iterator[_Step]:
    """What is to be done, in order; a crash between two steps leaves a row that can be repaired again."""
    if row in commits.journals(layout):
        try:
            commits.read_journal(layout, row)
        except StoreError:
            yield _Step(
                "removed the damaged journal of a replacement that was cut short", partial(_forget, layout, row)
            )
    seen = look(layout, row)
    kept = {key: whole for key in seen.problems if (whole := _key_record(layout, key, row))}
    lost = [key for key in seen.problems if key not in kept and layout.fields[key].required]
    record = seen.record if seen.intact else commits.restored(seen.record, partial(_intact, row))
    mended = "put back a flipped bit of its record"
    if record is None and seen.flag == 1 and not lost:  # the flag is the last word, and the keys agree with it
        record, mended = _rebuilt(layout, row, seed, kept), "rebuilt its damaged record, without its times and run"
    damaged = record is None
    if record is None:
        record, mended = bytes(commits.ROW_RECORD.itemsize), "its record was damaged: it counts as never tried"
    done = _state(record) == commits.DONE

    if seen.flag and lost and (done or damaged):
        why = "; ".join(f"{key!r}: {seen.problems[key]}" for key in lost)
        yield _Step(f"cleared, it will be run again: {why}", partial(commits.clear, layout, [row]))
        return
    if seen.flag and not done:
        what = f"its completed flag was {seen.flag}: taken back, as its record does not say that it is done"
        yield _Step(what, partial(_write, layout, COMPLETED_FILE, row, b"\0"))
    if done and not lost:
        for key, problem in seen.problems.items():
            if key in kept:
                step = partial(_write, layout, commits.record_file(key), row, kept[key])
                yield _Step(f"{key!r}: put back a flipped bit of its record; its bytes agree", step)
            else:
                step = partial(commits.clear_keys, layout, [row], [key])
                yield _Step(f"{key!r}: {problem}; it is optional: taken back, the row stays complete", step)
    if record != seen.record:
        yield _Step(mended, partial(_write, layout, ROWS_FILE, row, record))
    if seen.flag != 1 and done and not lost:
        was = f"was {seen.flag}" if seen.flag else "was not set"
        what = f"its completed flag {was}: set, as its record says so and the checksums of all keys agree"
        yield _Step(what, partial(_mark, layout, row))


def _intact(row: int, record: bytes) -> bool:
    return commits.row_record_intact(record, row)


def _state(record: bytes) -> int:
    return int(np.frombuffer(record, commits.ROW_RECORD)["state"][0])


def _forget(layout: Layout, row: int, guard: Callable[[], None]) -> None:
    guard()
    layout.disk.remove(f"{JOURNAL}/{row}")


def _key_record(layout: Layout, key: str, row: int) -> bytes | None:
    """A key's record without the one bit that flipped in it, or None; if it says valid, its bytes agree."""
    raw = layout.records(key, [row])[0].tobytes()
    if commits.key_record_intact(raw, key, row):
        return None
    field = layout.fields[key]
    whole = commits.restored(raw, lambda raw: commits.key_record_intact(raw, key, row))
    if whole is None:
        return None
    record = np.frombuffer(whole, commits.KEY_RECORD)[0]
    if record["status"] != commits.VALID:
        return None if field.required else whole
    blob = layout.read(commits.key_file(key), row, 1, field.nbytes)
    return whole if commits.problem(record, key, row, blob) is None else None


def _rebuilt(layout: Layout, row: int, seed: int, kept: Mapping[str, bytes]) -> bytes:
    """The record of a complete row from what else is known of it."""
    records = [kept.get(key) or layout.records(key, [row])[0].tobytes() for key in layout.fields]
    attempts = max(int(np.frombuffer(raw, commits.KEY_RECORD)["attempt"][0]) for raw in records)
    return commits.row_record(row, state=commits.DONE, attempts=attempts, started=0.0, finished=0.0, seed=seed, run="")


def _write(layout: Layout, name: str, row: int, record: bytes, guard: Callable[[], None]) -> None:
    layout.write(name, [row], [record], guard)
    layout.disk.sync([name])


def _mark(layout: Layout, row: int, guard: Callable[[], None]) -> None:
    # What was read may have been written by a process that died before it was synced.
    layout.disk.sync([name for key in layout.fields for name in (commits.key_file(key), commits.record_file(key))])
    layout.disk.sync([ROWS_FILE])
    _write(layout, COMPLETED_FILE, row, b"\1", guard)
