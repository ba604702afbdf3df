"""Every checksum of a store, held against the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from datamodels.errors import StoreError
from datamodels.store import commit as commits
from datamodels.store.store import Store

_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Problem:
    """A row whose bytes or records are not what was committed; `key` is None for the row's own record."""

    row: int
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"row {self.row}{'' if self.key is None else f', {self.key!r}'}: {self.what}"


def verify(store: Store, progress: Callable[[int], object] = lambda count: None) -> Iterator[Problem]:
    """Problems of all complete rows, in order, and of journals; `progress` is told of bytes as they are checked."""
    flags = np.frombuffer(store.layout.read(commits.COMPLETED_FILE, 0, store.num_models, 1), "u1")
    for flag in np.flatnonzero(flags > 1):
        yield Problem(int(flag), None, f"its completed flag is {flags[flag]}, neither 0 nor 1")
    rows = [int(row) for row in np.flatnonzero(flags == 1)]
    for row, record in zip(rows, store.layout.row_records()[rows], strict=True):
        if not commits.row_record_intact(record, row) or record["state"] != commits.DONE:
            yield Problem(row, None, "its record in _rows.npy is damaged")
    for row in commits.journals(store.layout):
        try:
            commits.read_journal(store.layout, row)
        except StoreError as error:
            if row in commits.journals(store.layout):  # else it has just been applied
                yield Problem(row, None, str(error))
    for key, field in store.spec.schema.items():
        step = max(1, _CHUNK_BYTES // max(1, field.nbytes))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            records = store.layout.records(key, chunk)
            for row, record, blob in zip(chunk, records, store.blobs(field, chunk), strict=True):
                absent = not field.required and record.tobytes() == bytes(16)
                what = None if absent else commits.problem(record, key, row, blob)
                if what:
                    what = store.reread(field, row)[2]
                if what:
                    yield Problem(row, key, what)
            progress(len(chunk) * field.nbytes)
