"""Whole rows, read and held against their checksums: what merge, compact and export are made of."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodels.spec import Field
from datamodels.store import commit as commits
from datamodels.store.store import Store

_BYTES, _ROWS = 1 << 25, 1 << 13


@dataclass(frozen=True)
class Rows:
    """Rows of a store that are as they were committed, ascending, and what is wrong with those that are not.

    `blobs` holds per key one entry per row: its bytes, or None where the row does not have that optional key.
    `records` are theirs in `_rows.npy`, (len(rows),).
    """

    rows: list[int]
    blobs: dict[str, list[memoryview | None]]
    records: np.ndarray
    damaged: dict[int, str]

    @property
    def nbytes(self) -> int:
        return sum(len(blob) for blobs in self.blobs.values() for blob in blobs if blob is not None)


def batches(store: Store, rows: np.ndarray, keys: Sequence[str]) -> Iterator[list[int]]:
    """Rows in pieces whose bytes fit into memory several times over."""
    width = sum(store.spec.schema[key].nbytes for key in keys)
    step = min(_ROWS, max(1, _BYTES // max(1, width)))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].tolist()


def read_rows(store: Store, rows: Sequence[int], keys: Sequence[str]) -> Rows:
    """Some keys of complete rows, which ascend. What is read of one row is of one commit, also while it is replaced."""
    before = store.layout.row_records(rows)
    damaged = dict.fromkeys(_damaged_records(rows, before), "its record in _rows.npy is damaged")
    found: dict[str, list[memoryview | None]] = {}
    for key in keys:
        found[key] = _read_key(store, store.field(key), rows, damaged)
    # The record is written behind the values: where it is the same as before, so were they.
    words, again = before.view("u1"), store.layout.row_records(rows).view("u1")
    changed = (words != again).reshape(-1, before.itemsize).any(axis=1) | ~store.layout.completed(rows)
    for i in np.flatnonzero(changed).tolist():
        damaged.setdefault(rows[i], "it changed while it was read; run this again")
    kept = [i for i, row in enumerate(rows) if row not in damaged]
    if len(kept) < len(rows):
        found = {key: [blobs[i] for i in kept] for key, blobs in found.items()}
    return Rows([rows[i] for i in kept], found, before[kept], damaged)


def _damaged_records(rows: Sequence[int], records: np.ndarray) -> Iterator[int]:
    raw, size, crc, name = records.tobytes(), records.dtype.itemsize, zlib.crc32, commits.ROWS_FILE.encode()
    states, checks = records["state"].tolist(), records["check"].tolist()
    for i, row in enumerate(rows):
        intact = checks[i] == crc(raw[i * size : (i + 1) * size - 4], crc(name, crc(struct.pack("<q", row))))
        if not intact or states[i] != commits.DONE:
            yield row


def _read_key(store: Store, field: Field, rows: Sequence[int], damaged: dict[int, str]) -> list[memoryview | None]:
    records, blobs = store.layout.records(field.name, rows).copy(), store.blobs(field, list(rows))
    there = np.ones(len(rows), bool) if field.required else records["status"] == commits.VALID
    for i in np.flatnonzero(~there).tolist():
        if not commits.key_record_intact(records[i], field.name, rows[i]):
            damaged.setdefault(rows[i], f"{field.name!r}: its record is damaged")
    left = np.flatnonzero(there).tolist()
    while problem := commits.first_problem(
        records[left], field.name, [rows[i] for i in left], [blobs[i] for i in left]
    ):
        row = problem[0]
        place = rows.index(row)
        records[place], blobs[place], what = store.reread(field, row)
        if what:
            damaged.setdefault(row, f"{field.name!r}: {what}")
        left = left[left.index(place) + bool(what) :]
    return [blob if flag else None for blob, flag in zip(blobs, there.tolist(), strict=True)]
