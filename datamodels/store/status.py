"""How far a store is, how fast it gets on, and who is at work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datamodels.store import commit as commits
from datamodels.store.arrays import NEXT_FILE
from datamodels.store.claims import claimants, life, who
from datamodels.store.store import Failure, Status, Store

_AT_ONCE = 1 << 15  # rows read together: what stays in the processor's cache is not paid for twice
_LATELY = 10.0  # seconds
_WINDOWS, _ENOUGH = (60.0, 600.0, 3600.0, 6 * 3600.0, 24 * 3600.0), 20


@dataclass(frozen=True)
class Stale:
    """A row that is claimed by a run which is gone, or of which nothing has been heard for its time to live."""

    row: int
    run: str
    state: str


@dataclass(frozen=True)
class FailedKey:
    """An optional key that was tried and failed in `rows` complete rows; the first of these, and its error."""

    rows: int
    first: int
    error: str


@dataclass(frozen=True)
class Progress(Status):
    """`Status`, and what there is to say of rows that are under way.

    `pending` counts the `stale` rows too: the next worker takes them. `rate` is in rows per second over the last
    `rate_seconds`, None where none was finished in a day; `seconds_left` is None where nobody is at work. `keys` counts
    per optional key the complete rows that have it, and `failed_keys` has those that failed in complete rows: in how
    many, the first of them, and its error. `unfinished`: a change of the store was cut short.
    """

    stale: int
    stale_rows: tuple[Stale, ...]
    workers: int
    rate: float | None
    rate_seconds: float | None
    seconds_left: float | None
    keys: Mapping[str, int]
    failed_keys: Mapping[str, FailedKey]
    unfinished: bool


def progress(store: Store, *, failures: int = 20) -> Progress:
    """How far the store is now; at most `failures` failed rows, and as many stale ones, are described."""
    now, count = time.time(), store.num_models
    completed = store.completed()
    claims = {row: run for row, run in claimants(store.path, store.disk.list("claims")).items() if row < count}
    states = {run: life(store.path, run) for run in set(claims.values())}
    state, started, finished = _times(store)
    failed = np.flatnonzero((state == commits.FAILED) & ~completed)
    under_way = [row for row in sorted(claims) if not completed[row] and state[row] != commits.FAILED]
    stale = [row for row in under_way if states[claims[row]] not in ("running", "unknown")]
    attempts = store.layout.row_records(failed[:failures].tolist())["attempts"]
    done, running = int(completed.sum()), len(under_way) - len(stale)
    pending = count - done - running - len(failed)
    workers = len({claims[row] for row in under_way} - {claims[row] for row in stale})
    rate, span = _rate(started[completed], finished[completed], now)
    keys, failed_keys = {}, {}
    for key, field in store.spec.schema.items():
        if not field.required:
            status = np.where(completed, _statuses(store, key), 0)
            keys[key] = int((status == commits.VALID).sum())
            if len(bad := np.flatnonzero(status == commits.KEY_FAILED)):
                failed_keys[key] = FailedKey(len(bad), int(bad[0]), store.key_error(int(bad[0]), key))
    at_work = workers or (completed & (finished > now - _LATELY)).any()  # a fast worker may hold nothing just now
    return Progress(
        count,
        done,
        running,
        len(failed),
        pending,
        tuple(
            Failure(row, int(times), store.last_error(row))
            for row, times in zip(failed[:failures].tolist(), attempts, strict=True)
        ),
        len(stale),
        tuple(Stale(row, who(store.path, claims[row]), states[claims[row]]) for row in stale[:failures]),
        workers,
        rate,
        span,
        (pending + running) / rate if rate and at_work else None,
        keys,
        failed_keys,
        (store.path / NEXT_FILE).exists(),
    )


def _times(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """State, and times of begin and end in seconds since 1970, of each row; (num_models,) each."""
    state = np.empty(store.num_models, "<u4")
    started, finished = np.empty(store.num_models), np.empty(store.num_models)
    size = commits.ROW_RECORD.itemsize
    for first in range(0, store.num_models, _AT_ONCE):
        some = slice(first, min(first + _AT_ONCE, store.num_models))
        raw = store.layout.read(commits.ROWS_FILE, first, some.stop - first, size)
        records = np.frombuffer(raw, commits.ROW_RECORD)
        state[some], started[some], finished[some] = records["state"], records["started"], records["finished"]
    return state, started, finished


def _statuses(store: Store, key: str) -> np.ndarray:
    """Status of a key in each row, (num_models,)."""
    status = np.empty(store.num_models, "<u4")
    for first in range(0, store.num_models, _AT_ONCE):
        stop = min(first + _AT_ONCE, store.num_models)
        raw = store.layout.read(commits.record_file(key), first, stop - first, commits.KEY_RECORD.itemsize)
        status[first:stop] = np.frombuffer(raw, commits.KEY_RECORD)["status"]
    return status


def _rate(started: np.ndarray, finished: np.ndarray, now: float) -> tuple[float | None, float | None]:
    """Rows per second, and over how many seconds: the shortest time in which enough rows were finished."""
    recent = finished > now - _WINDOWS[-1]
    started, finished = started[recent], finished[recent]
    if not len(finished):
        return None, None
    for window in _WINDOWS:
        inside = finished > now - window
        if inside.sum() >= _ENOUGH:
            break
    # Who has just begun has not had the whole of it.
    span = max(1.0, min(window, now - float(started[inside].min())))
    return float(inside.sum()) / span, span
