"""Clear rows, or some optional keys of rows, so that they are run again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datamodels.design import check_index
from datamodels.errors import RowError, StoreError
from datamodels.store import commit as commits
from datamodels.store.claims import who
from datamodels.store.store import Store

_AT_ONCE = 256  # claims are files
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
FAILED = "failed"


@dataclass(frozen=True)
class Reset:
    """How many rows were cleared, how many of them had been complete, and how many there was nothing to clear of."""

    rows: int
    complete: int
    untouched: int


def parse_rows(text: str, num_models: int) -> list[int]:
    """Rows of `3,7-9`, ascending, each once. `RowError` for anything else, or a row that there is not."""
    rows: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise RowError(f"rows: expected numbers and ranges as in 3,7-9, got {part!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RowError(f"rows: the range {part} ends before it begins")
        rows.update(range(check_index(first, num_models), check_index(last, num_models) + 1))
    return sorted(rows)


def failed_rows(store: Store, keys: Sequence[str] = ()) -> list[int]:
    """Rows whose last attempt failed; with `keys`, complete rows in which any of these failed."""
    if keys:
        tried = [store.layout.records(store.field(key).name)["status"] == commits.KEY_FAILED for key in keys]
        failed = store.completed() & np.any(tried, axis=0)
    else:
        failed = (store.layout.row_records()["state"] == commits.FAILED) & ~store.completed()
    return np.flatnonzero(failed).tolist()


def clearing(store: Store) -> str:
    """The command that clears the rows that failed, or, where the store is open for some keys, these keys in them."""
    keys = f" --keys={','.join(store.keys)}" if store.keys else ""
    return f"python -m datamodels.store reset {store.path} --rows={FAILED}{keys}"


def reset(
    store: Store,
    rows: Sequence[int],
    *,
    keys: Sequence[str] = (),
    progress: Callable[[int], object] = lambda rows: None,
) -> Reset:
    """Clear rows: not complete, never tried, attempts counted from 0. With `keys`, which are optional, clear those
    alone, of complete rows, which stay complete.

    `StoreError` names the holder where a worker that lives holds one of the rows; then nothing is changed. The rows'
    folders in workers/ stay.
    """
    for key in keys:
        if store.field(key).required:
            raise StoreError(
                f"{store.path}: key {key!r} is required, so a row without it cannot stay complete; reset the rows whole"
            )
    rows = sorted({check_index(row, store.num_models) for row in rows})
    if taken := set(rows).intersection(store.holders()):
        raise _held(store, min(taken), len(taken), 0)
    cleared = complete = 0
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        try:
            for row in some:
                if not store.run.take(row):
                    raise _held(store, row, 1, cleared)
            flags = store.layout.completed(some)
            written = _written(store, some, keys) & (flags if keys else True)
            dirty = [row for row, wrote in zip(some, written, strict=True) if wrote]
            if dirty:
                with store.run.committing(dirty) as guard:
                    _clear(store, dirty, keys, guard)
            cleared += len(dirty)
            complete += int((flags & written).sum())
        finally:
            for row in some:
                store.run.release(row, done=False)
        progress(len(some))
    return Reset(cleared, complete, len(rows) - cleared)


def _written(store: Store, rows: list[int], keys: Sequence[str]) -> np.ndarray:
    """Which rows have anything to clear, bool (len(rows),)."""
    records = [store.layout.records(key, rows) for key in keys or store.layout.fields]
    if not keys:
        flags = b"".join(store.layout.pick(commits.COMPLETED_FILE, rows, 1))
        journals = np.isin(rows, commits.journals(store.layout))
        records += [store.layout.row_records(rows), np.frombuffer(flags, "u1"), journals]
    found = np.zeros(len(rows), bool)
    for record in records:
        found |= np.ascontiguousarray(record).view("u1").reshape(len(rows), -1).any(axis=1)
    return found


def _clear(store: Store, rows: list[int], keys: Sequence[str], guard: Callable[[], None]) -> None:
    left = set(commits.journals(store.layout)).intersection(rows)  # applied later, they bring back what is cleared
    if keys:
        for row in left:
            commits.apply_journal(store.layout, row, guard)
        commits.clear_keys(store.layout, rows, keys, guard)
        return
    commits.clear(store.layout, rows, guard)
    for row in left:
        store.disk.remove(f"{commits.JOURNAL}/{row}")


def _held(store: Store, row: int, held: int, cleared: int) -> StoreError:
    run = store.holders().get(row)
    others = f" (and {held - 1} of the others too)" if held > 1 else ""
    so_far = f"{cleared} rows are cleared" if cleared else "nothing is changed"
    return StoreError(
        f"{store.path}: row {row} is held by {who(store.path, run) if run else 'a worker'}{others}; {so_far}; stop it, "
        f"or reset other rows"
    )
