"""Every checksum of a store, held against the bytes."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from datamodels.errors import StoreError
from datamodels.spec import Field
from datamodels.store import commit as commits
from datamodels.store.commit import Layout
from datamodels.store.store import Store

T = TypeVar("T")
R = TypeVar("R")

_CHUNK_BYTES, _CHUNK_ROWS = 1 << 22, 1 << 16
_WIDE = 8192  # bytes of a row
_LOOKS, _LOOK_SECONDS = 4, 0.1


@dataclass(frozen=True)
class Problem:
    """A row whose bytes or records are not what was committed; `key` is None for the row's own record."""

    row: int
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"row {self.row}{'' if self.key is None else f', {self.key!r}'}: {self.what}"


@dataclass(frozen=True)
class Look:
    """What the files say of one row: its flag's byte, its record, and per key what is wrong with it as a complete
    row's."""

    row: int
    flag: int
    record: bytes
    problems: dict[str, str]

    @property
    def intact(self) -> bool:
        return commits.row_record_intact(self.record, self.row)

    @property
    def done(self) -> bool:
        """Whether the row's record is whole and says that all keys have been written."""
        return self.intact and bool(np.frombuffer(self.record, commits.ROW_RECORD)["state"][0] == commits.DONE)


def look(layout: Layout, row: int) -> Look:
    """One row, read afresh."""
    problems = {}
    for key, field in layout.fields.items():
        record, blob = layout.records(key, [row])[0], layout.read(commits.key_file(key), row, 1, field.nbytes)
        what = _problem(record, field, row, blob)
        if what:
            problems[key] = what
    flag = layout.read(commits.COMPLETED_FILE, row, 1, 1)[0]
    return Look(row, flag, layout.row_records([row])[0].tobytes(), problems)


def _problem(record: np.void, field: Field, row: int, blob: bytes | memoryview) -> str | None:
    absent = not field.required and record["status"] != commits.VALID
    if absent and commits.key_record_intact(record, field.name, row):
        return None
    return commits.problem(record, field.name, row, blob)


def verify(
    store: Store, progress: Callable[[int], object] = lambda count: None, *, threads: int | None = None
) -> Iterator[Problem]:
    """Problems of all complete rows, of journals, and of rows that lost their flag; key by key, rows ascending.

    `progress` is told of bytes as they are checked; `threads` read and check at once, by default one per core where
    rows are long.
    """
    flags = np.frombuffer(store.layout.read(commits.COMPLETED_FILE, 0, store.num_models, 1), "u1")
    for flag in np.flatnonzero(flags > 1):
        yield Problem(int(flag), None, f"its completed flag is {flags[flag]}, neither 0 nor 1")
    yield from _row_records(store, flags)
    for row in commits.journals(store.layout):
        try:
            commits.read_journal(store.layout, row)
        except StoreError as error:
            if row in commits.journals(store.layout):  # else it has just been applied
                yield Problem(row, None, str(error))
    rows = np.flatnonzero(flags == 1)
    chunks = (
        (field, rows[start : start + step].tolist())
        for field in store.spec.schema.values()
        for step in [min(_CHUNK_ROWS, max(1, _CHUNK_BYTES // max(1, field.nbytes)))]
        for start in range(0, len(rows), step)
    )
    if threads is None:  # the checksum of a short row holds the interpreter's lock
        widest = max(field.nbytes for field in store.spec.schema.values())
        threads = os.cpu_count() or 1 if widest >= _WIDE and len(rows) * widest > _CHUNK_BYTES else 1
    for found, size in in_order(lambda chunk: _check_chunk(store, *chunk), chunks, threads):
        yield from found
        progress(size)


def in_order(call: Callable[[T], R], items: Iterator[T], threads: int) -> Iterator[R]:
    """Results in the order of the items, of which few are under way at a time."""
    if threads == 1:
        yield from map(call, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _row_records(store: Store, flags: np.ndarray) -> Iterator[Problem]:
    """Damaged records, and rows that are not complete though everything else says that they are."""
    records = store.layout.row_records()
    raw, size, crc = records.tobytes(), commits.ROW_RECORD.itemsize, zlib.crc32
    name, check = commits.ROWS_FILE.encode(), records["check"]
    done, complete = records["state"] == commits.DONE, flags == 1
    written = records.view("u8").reshape(len(records), -1).any(axis=1)
    suspects = set(np.flatnonzero((flags <= 1) & (done != complete)).tolist())
    for row in np.flatnonzero(written).tolist():
        if check[row] != crc(raw[row * size : (row + 1) * size - 4], crc(name, crc(struct.pack("<q", row)))):
            suspects.add(row)
    found: dict[int, str] = {}
    for again in range(_LOOKS):  # somebody may be in the middle of a commit, or may just have ended it
        found = {row: what for row in sorted(suspects) if (what := _record_problem(store.layout, row))}
        suspects = set(found) - set(commits.journals(store.layout))  # a journal is finished on the next open
        if not suspects:
            break
        if again and not suspects.intersection(store.held()):
            break
        time.sleep(_LOOK_SECONDS * bool(again))
    yield from (Problem(row, None, found[row]) for row in sorted(suspects))


def _record_problem(layout: Layout, row: int) -> str | None:
    seen = look(layout, row)
    if not seen.intact or (seen.flag == 1 and not seen.done):
        return "its record in _rows.npy is damaged"
    if seen.flag == 0 and seen.done and not seen.problems:
        return "it is not marked complete, though its record and all its keys say that it is"
    return None


def _check_chunk(store: Store, field: Field, rows: list[int]) -> tuple[list[Problem], int]:
    """Problems of one key of some complete rows, and how many bytes were looked at."""
    records, blobs = store.layout.records(field.name, rows), store.blobs(field, rows)
    there = np.arange(len(rows)) if field.required else np.flatnonzero(records["status"] == commits.VALID)
    tried = (records["status"] != commits.VALID) & (records != np.zeros((), commits.KEY_RECORD))
    absent = [] if field.required else np.flatnonzero(tried).tolist()
    if commits.first_problem(
        records[there], field.name, [rows[i] for i in there], [blobs[i] for i in there]
    ) is None and all(commits.key_record_intact(records[i], field.name, rows[i]) for i in absent):
        return [], len(rows) * field.nbytes
    problems = []
    for row, record, blob in zip(rows, records, blobs, strict=True):
        if _problem(record, field, row, blob):
            record, again, what = store.reread(field, row)
            if what and _problem(record, field, row, again):
                problems.append(Problem(row, field.name, what))
    return problems, len(rows) * field.nbytes
