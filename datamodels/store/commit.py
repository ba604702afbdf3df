"""How rows become true: key bytes, then records, then `_completed`; each phase synced before the next begins.

A crash at any instruction therefore leaves a row incomplete or exact. A row that is already complete is replaced
through a journal: its new values are written whole to the side and synced first, so that the crash leaves the old row
or the new one.
"""

from __future__ import annotations

import contextlib
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodels.errors import DatamodelsError, StoreError
from datamodels.spec import COMPLETED, Field
from datamodels.store.disk import Disk

# Of a key record. All zero is absent; an optional key that is being filled in afterwards counts its attempts there.
VALID, KEY_FAILED, KEY_STARTED = 1, 2, 3
PENDING, RUNNING, DONE, FAILED = 0, 1, 2, 3

KEY_RECORD = np.dtype([("status", "<u4"), ("attempt", "<u4"), ("crc32", "<u4"), ("check", "<u4")])
ROW_RECORD = np.dtype(
    [
        ("state", "<u4"),
        ("attempts", "<u4"),
        ("started", "<f8"),
        ("finished", "<f8"),
        ("seed", "<u8"),
        ("run", "S24"),
        ("reserved", "<u4"),
        ("check", "<u4"),
    ]
)
# 16 and 64 bytes, behind headers that are multiples of 64: no record straddles a 512-byte sector, so none can tear.

COMPLETED_FILE, ROWS_FILE, JOURNAL = f"{COMPLETED}.npy", "_rows.npy", "_replace"


class Failed(bytes):
    """What is written where a key of a row was tried and failed: bytes that stand for no value, NaN where that may be.

    `why` is its traceback, and `attempt` counts the attempts at it: that of its row's own commit is the first. `mark`
    is what its record says of the run, where it would have the checksum of a value.
    """

    why: str = ""
    attempt: int = 1
    mark: int = 0

    @classmethod
    def of(cls, field: Field, why: str = "", attempt: int = 1) -> Failed:
        blank = np.zeros(field.disk_shape, field.disk_dtype)
        if field.allow_nonfinite:
            blank.fill(np.nan)
        made = cls(blank.tobytes())
        made.why, made.attempt = why, attempt
        return made


def key_file(key: str) -> str:
    return f"{key}.npy"


def record_file(key: str) -> str:
    return f"_keys/{key}.npy"


@dataclass(frozen=True)
class Layout:
    """Where each row's bytes are: the disk, the fields, and per file the offset behind its header."""

    disk: Disk
    fields: Mapping[str, Field]
    num_models: int
    heads: Mapping[str, int]

    def read(self, name: str, first: int, count: int, itemsize: int) -> bytes:
        return self.disk.read(name, self.heads[name] + first * itemsize, count * itemsize)

    def write(self, name: str, rows: Sequence[int], blobs: Sequence[bytes], guard: Callable[[], None]) -> None:
        """One blob per row, all of one size; adjacent rows in one write. `rows` ascend."""
        size = len(blobs[0])
        if size == 0:
            return
        for start, stop in spans(rows):
            guard()
            self.disk.write(name, self.heads[name] + rows[start] * size, b"".join(blobs[start:stop]))

    def records(self, key: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """Key records (len(rows),) of KEY_RECORD, as they stand on disk."""
        return self._structured(record_file(key), rows, KEY_RECORD)

    def row_records(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """Row records (len(rows),) of ROW_RECORD, as they stand on disk."""
        return self._structured(ROWS_FILE, rows, ROW_RECORD)

    def completed(self, rows: Sequence[int] | None = None) -> np.ndarray:
        flags: np.ndarray = self._structured(COMPLETED_FILE, rows, np.dtype("u1")) == 1
        return flags

    def _structured(self, name: str, rows: Sequence[int] | None, dtype: np.dtype[Any]) -> np.ndarray:
        if rows is None:
            return np.frombuffer(self.read(name, 0, self.num_models, dtype.itemsize), dtype)
        return np.frombuffer(b"".join(self.pick(name, rows, dtype.itemsize)), dtype)

    def pick(self, name: str, rows: Sequence[int], itemsize: int) -> list[memoryview]:
        """The bytes of each of some rows, which ascend; rows that are near each other are read together."""
        if not itemsize:
            return [memoryview(b"")] * len(rows)
        out: list[memoryview] = []
        for start, stop in spans(rows, gap=max(1, _GAP_BYTES // itemsize)):
            first = rows[start]
            raw = memoryview(self.read(name, first, rows[stop - 1] - first + 1, itemsize))
            out += [raw[(row - first) * itemsize : (row - first + 1) * itemsize] for row in rows[start:stop]]
        return out


_GAP_BYTES = 4096  # what is read for nothing costs less than one more open, pread and close


def spans(rows: Sequence[int], *, gap: int = 0) -> Iterator[tuple[int, int]]:
    """Runs of rows with at most `gap` others between two of them, as half-open ranges of positions in `rows`."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] - rows[i - 1] > gap + 1:
            yield start, i
            start = i


def _check(record: bytes, name: str, row: int) -> int:
    """Checksum of a record and of where it belongs, so that a write to the wrong place does not pass."""
    return zlib.crc32(struct.pack("<q", row) + name.encode() + record)


def key_record(key: str, row: int, *, attempt: int, crc32: int, status: int = VALID) -> bytes:
    head = struct.pack("<III", status, attempt, crc32)
    return head + struct.pack("<I", _check(head, record_file(key), row))


def _record_of(key: str, row: int, attempt: int, blob: bytes) -> bytes:
    """The record of a key that has been written. A key that failed counts its own attempts, whatever its row's are."""
    if isinstance(blob, Failed):
        return key_record(key, row, attempt=blob.attempt, crc32=blob.mark, status=KEY_FAILED)
    return key_record(key, row, attempt=attempt, crc32=zlib.crc32(blob))


def row_record(row: int, *, state: int, attempts: int, started: float, finished: float, seed: int, run: str) -> bytes:
    head = struct.pack("<IIddQ24sI", state, attempts, started, finished, seed, run.encode()[:24], 0)
    return head + struct.pack("<I", _check(head, ROWS_FILE, row))


def key_record_intact(record: np.void | bytes, key: str, row: int) -> bool:
    raw = record if isinstance(record, bytes) else record.tobytes()
    return raw == bytes(16) or struct.unpack("<I", raw[12:])[0] == _check(raw[:12], record_file(key), row)


def row_record_intact(record: np.void | bytes, row: int) -> bool:
    raw = record if isinstance(record, bytes) else record.tobytes()
    return raw == bytes(64) or struct.unpack("<I", raw[60:])[0] == _check(raw[:60], ROWS_FILE, row)


def problem(record: np.void, key: str, row: int, blob: bytes | memoryview) -> str | None:
    """What is wrong with a complete row's key, or None: the record, and the bytes against it."""
    if not key_record_intact(record, key, row):
        return "its record is damaged"
    if record["status"] == KEY_FAILED:
        return "it failed when it was to be made"
    if record["status"] != VALID:
        return "it was never written"
    if zlib.crc32(blob) != record["crc32"]:
        return "its bytes are not what was committed (checksum)"
    return None


def first_problem(
    records: np.ndarray, key: str, rows: Sequence[int], blobs: Sequence[bytes | memoryview]
) -> tuple[int, str] | None:
    """The first of some rows whose key is not as committed, and what is wrong; without numpy's cost per record."""
    raw, name, crc = records.tobytes(), record_file(key).encode(), zlib.crc32
    for i, (row, (status, _, crc32, check), blob) in enumerate(
        zip(rows, struct.iter_unpack("<IIII", raw), blobs, strict=True)
    ):
        intact = check == crc(raw[16 * i : 16 * i + 12], crc(name, crc(struct.pack("<q", row))))
        if not intact or status != VALID or crc(blob) != crc32:
            return row, problem(records[i], key, row, blob) or "its record is damaged"
    return None


@dataclass(frozen=True)
class RowInfo:
    """What `_rows.npy` says of a row that is being committed; it was finished now, by the run that commits it, unless
    it is the copy of another store's row."""

    attempts: int
    started: float
    seed: int
    finished: float | None = None
    run: str | None = None


def _nothing() -> None:
    pass


def commit(
    layout: Layout,
    rows: Sequence[int],
    blobs: Mapping[str, Sequence[bytes]],
    infos: Sequence[RowInfo],
    run: str,
    guard: Callable[[], None] = _nothing,
    *,
    complete: np.ndarray | None = None,
) -> None:
    """Write incomplete rows; when this returns they are complete and durable.

    `rows` ascend without repetition; `blobs` holds per key one encoded value per row, every required key among them.
    `guard` is called before every write and raises `ClaimLost` to refuse it. `complete`: their flags, where the caller
    has read them under its commit lock. An error leaves each row incomplete or complete and exact, never in between.
    """
    _invalidate(layout, rows, guard, layout.completed(rows) if complete is None else complete)
    for key in blobs:
        layout.write(key_file(key), rows, blobs[key], guard)
    layout.disk.sync([key_file(key) for key in blobs])

    for key in blobs:
        layout.write(
            record_file(key),
            rows,
            [
                _record_of(key, row, info.attempts, blob)
                for row, info, blob in zip(rows, infos, blobs[key], strict=True)
            ],
            guard,
        )
    now = time.time()
    layout.write(
        ROWS_FILE,
        rows,
        [
            row_record(
                row,
                state=DONE,
                attempts=info.attempts,
                started=info.started,
                finished=now if info.finished is None else info.finished,
                seed=info.seed,
                run=info.run or run,
            )
            for row, info in zip(rows, infos, strict=True)
        ],
        guard,
    )
    # Records of keys that the row does not have, too: who took them back may not have lived to sync that.
    layout.disk.sync([*(record_file(key) for key in layout.fields), ROWS_FILE])

    try:
        layout.write(COMPLETED_FILE, rows, [b"\1"] * len(rows), guard)
        layout.disk.sync([COMPLETED_FILE])
    except StoreError:
        # This machine sees the flags and the disk may not have them. A retry that found them set would call the rows
        # done without ever having synced them, so they are taken back.
        with contextlib.suppress(DatamodelsError):
            layout.write(COMPLETED_FILE, rows, [b"\0"] * len(rows), guard)
            layout.disk.sync([COMPLETED_FILE])
        raise


def _invalidate(layout: Layout, rows: Sequence[int], guard: Callable[[], None], complete: np.ndarray) -> None:
    """Take back what records and `_completed` say of bytes that are about to change. A fresh row costs only reads."""
    stale = {
        key: [row for row, record in zip(rows, layout.records(key, rows), strict=True) if record.tobytes() != bytes(16)]
        for key in layout.fields
    }
    # Where records are left, a flag that is seen to be 0 may have been taken back by a process that did not live to
    # sync it.
    done = {row for row, flag in zip(rows, complete, strict=True) if flag}.union(*stale.values())
    if done:
        layout.write(COMPLETED_FILE, sorted(done), [b"\0"] * len(done), guard)
        layout.disk.sync([COMPLETED_FILE])
    touched = [key for key in stale if stale[key]]
    for key in touched:
        layout.write(record_file(key), stale[key], [bytes(16)] * len(stale[key]), guard)
    if touched:
        layout.disk.sync([record_file(key) for key in touched])


def fill(
    layout: Layout,
    rows: Sequence[int],
    blobs: Mapping[str, Sequence[bytes]],
    attempts: Mapping[str, Sequence[int]],
    guard: Callable[[], None] = _nothing,
) -> None:
    """Write optional keys of complete rows, which stay complete all along; durable when this returns.

    `blobs` holds per key one encoded value per row, and `attempts` which attempt made it. A crash leaves each key
    absent, or exact, in each row; values that may not be lost are replaced through a journal.
    """
    for key in blobs:
        again = [row for row, record in zip(rows, layout.records(key, rows), strict=True) if record["status"] == VALID]
        if again:
            clear_keys(layout, again, [key], guard)
        layout.write(key_file(key), rows, blobs[key], guard)
    layout.disk.sync([key_file(key) for key in blobs])
    for key in blobs:
        records = [
            _record_of(key, row, attempt, blob)
            for row, attempt, blob in zip(rows, attempts[key], blobs[key], strict=True)
        ]
        layout.write(record_file(key), rows, records, guard)
    layout.disk.sync([record_file(key) for key in blobs])


def clear(layout: Layout, rows: Sequence[int], guard: Callable[[], None] = _nothing) -> None:
    """Make rows as if they had never been run; their bytes stay where they are, and nothing says what they are.

    A crash leaves a row whole but for its flag, or no longer one that its record calls done: the flag goes first, and
    the key records last, so that no row can be put together again without its optional keys.
    """
    layout.write(COMPLETED_FILE, rows, [b"\0"] * len(rows), guard)
    layout.disk.sync([COMPLETED_FILE])
    layout.write(ROWS_FILE, rows, [bytes(ROW_RECORD.itemsize)] * len(rows), guard)
    layout.disk.sync([ROWS_FILE])
    clear_keys(layout, rows, list(layout.fields), guard)


def clear_keys(layout: Layout, rows: Sequence[int], keys: Sequence[str], guard: Callable[[], None] = _nothing) -> None:
    """Take back keys of rows: optional ones where the rows are complete."""
    for key in keys:
        layout.write(record_file(key), rows, [bytes(KEY_RECORD.itemsize)] * len(rows), guard)
    layout.disk.sync([record_file(key) for key in keys])


def restored(raw: bytes, intact: Callable[[bytes], bool]) -> bytes | None:
    """A record as it was before one of its bits flipped, or None where no single bit explains it."""
    for place in range(8 * len(raw)):
        whole = bytearray(raw)
        whole[place // 8] ^= 1 << place % 8
        if intact(bytes(whole)):
            return bytes(whole)
    return None


# A journal is one file per row: magic, length of the head, the head in JSON, the values, and a CRC of all before it.
# That of some keys alone has a magic of its own, of the same length: older versions call it damaged and leave it.
_MAGIC, _KEYS_MAGIC = b"datamodels-replace-1\n", b"datamodels-replace-2\n"


def write_journal(layout: Layout, row: int, blobs: Mapping[str, bytes], info: RowInfo | None, run: str) -> None:
    """The new values of a complete row, whole and durable at the side; from here on they win.

    Without `info` they replace keys of the row, which stays complete, and its other keys stay as they are.
    """
    head = json.dumps(
        {
            "row": row,
            "run": run,
            **({} if info is None else {"attempts": info.attempts, "started": info.started, "seed": info.seed}),
            "keys": [[key, len(blob)] for key, blob in blobs.items()],
            "failed": [key for key, blob in blobs.items() if isinstance(blob, Failed)],
        }
    ).encode()
    magic = _MAGIC if info is not None else _KEYS_MAGIC
    body = magic + struct.pack("<I", len(head)) + head + b"".join(blobs.values())
    layout.disk.put(f"{JOURNAL}/{row}", body + struct.pack("<I", zlib.crc32(body)))


def apply_journal(layout: Layout, row: int, guard: Callable[[], None] = _nothing) -> None:
    """Commit the values that a journal holds, and remove it. Doing it twice is doing it once."""
    run, info, held = read_journal(layout, row)
    blobs = {key: [blob] for key, blob in held.items()}
    if info is not None:
        commit(layout, [row], blobs, [info], run, guard)
    elif layout.completed([row])[0]:  # else the row was cleared, and has no keys to be replaced
        fill(layout, [row], blobs, {key: [1] for key in blobs}, guard)
    layout.disk.remove(f"{JOURNAL}/{row}")


def read_journal(layout: Layout, row: int) -> tuple[str, RowInfo | None, dict[str, bytes]]:
    """(run, info, bytes per key) of a row's journal, without info where it is of keys alone.

    `StoreError` unless it is whole and fits the row and the spec.
    """
    name, start = f"{JOURNAL}/{row}", len(_MAGIC) + 4
    try:
        # The interface has positioned reads and nothing else, so the size comes from the head.
        (length,) = struct.unpack("<I", layout.disk.read(name, len(_MAGIC), 4))
        head = json.loads(layout.disk.read(name, start, length))
        sizes = {str(key): int(size) for key, size in head["keys"]}
        raw = layout.disk.read(name, 0, start + length + sum(sizes.values()) + 4)
        alone = raw.startswith(_KEYS_MAGIC)
        whole = raw.startswith((_MAGIC, _KEYS_MAGIC)) and zlib.crc32(raw[:-4]) == struct.unpack("<I", raw[-4:])[0]
        fits = head["row"] == row and all(
            sizes[key] == field.nbytes if key in sizes else alone or not field.required
            for key, field in layout.fields.items()
        )
        if not whole or not fits or not set(sizes) <= set(layout.fields):
            raise ValueError
        run, info = str(head["run"]), None
        if not alone:
            info = RowInfo(int(head["attempts"]), float(head["started"]), int(head["seed"]))
        failed = frozenset(map(str, head.get("failed", ())))
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError, struct.error):
        raise StoreError(
            f"{name}: this journal of a replaced row is damaged; remove the file, and run the row again if it is not "
            f"complete"
        ) from None
    offset, blobs = start + length, {}
    for key, size in sizes.items():
        blobs[key] = (Failed if key in failed else bytes)(raw[offset : offset + size])
        offset += size
    return run, info, blobs


def journals(layout: Layout) -> list[int]:
    """Rows of which a journal is left, by a crash or by somebody who is at work."""
    names = layout.disk.list(JOURNAL)
    return sorted(row for row in (int(n) for n in names if n.isdecimal() and n.isascii()) if row < layout.num_models)
