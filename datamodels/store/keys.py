"""Optional keys of rows that are complete already: a store in which a row is done when it has these keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from datamodels.design import Assignment
from datamodels.errors import RowError, StoreError
from datamodels.store import commit as commits
from datamodels.store.claims import TIME_TO_LIVE
from datamodels.store.commit import KEY_FAILED, KEY_STARTED, ROW_RECORD, VALID, Layout, RowInfo
from datamodels.store.store import Store


def opened(
    path: str | Path, keys: Sequence[str] | None = None, *, sync: bool = True, time_to_live: float = TIME_TO_LIVE
) -> Store:
    """The store at `path`; with `keys`, as those see it who fill them in."""
    if keys is None:
        return Store.open(path, sync=sync, time_to_live=time_to_live)
    return KeyStore.of(path, keys, sync=sync, time_to_live=time_to_live)


class KeyStore(Store):
    """A store as those see it who fill in some optional keys of its complete rows. Make one with `KeyStore.of`.

    A row is complete here when it has all of these keys, or when it is not complete at all, so that there is nothing to
    add them to. The attempts at each key are counted in its records; a row's are those at the key that it lacks and
    that was tried least often. Nothing else of a row is written: it stays complete throughout, and a crash leaves each
    key absent or exact, or, where it is replaced, with its old value or its new one.
    """

    whole: Layout

    @classmethod
    def of(
        cls, path: str | Path, keys: Sequence[str], *, sync: bool = True, time_to_live: float = TIME_TO_LIVE
    ) -> Self:
        """The store at `path`. `StoreError` for a key that is required or that there is not."""
        store = cls.open(path, sync=sync, time_to_live=time_to_live)
        try:
            for key in keys:
                if store.field(key).required:
                    raise StoreError(
                        f"{store.path}: key {key!r} is required, so every complete row has it; run a row again with "
                        f"--worker.index=ROW --worker.do_if_complete, or name keys that are optional"
                    )
        except StoreError:
            store.close()
            raise
        store.keys, store.whole = tuple(dict.fromkeys(keys)), store.layout
        store.layout = _KeyLayout(**vars(store.whole), keys=store.keys)
        store.required, store.written, store.attempt_name = (), store.keys, "attempt-keys"
        return store

    def within(self, rows: np.ndarray | None) -> np.ndarray | None:
        complete = self.whole.completed()
        return complete if rows is None else complete & rows

    def check_row(self, row: Any) -> int:
        number = super().check_row(row)
        if not self.whole.completed([number])[0]:
            raise RowError(f"row {number}: not complete, so keys cannot be added; run it without --worker.keys first")
        return number

    def already(self, row: int) -> str:
        return f"has {', '.join(self.keys)} already, nothing to do (--worker.do_if_complete replaces them)"

    def _records(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        return {key: self.whole.records(key, rows) for key in self.keys}

    def _begun(self, rows: Sequence[int], run: str) -> list[str]:
        """Keys of which a run has begun an attempt in any of some rows."""
        return [
            key
            for key, each in self._records(rows).items()
            if ((each["status"] == KEY_STARTED) & (each["crc32"] == _mark(run))).any()
        ]

    def asked(self, assignments: Sequence[Assignment], *, replace: bool = False) -> tuple[str, ...]:
        wanted = self.keys if replace else self._wanted(sorted(assignment.row for assignment in assignments))
        return tuple(key for key in super().asked(assignments) if key in wanted)

    def _wanted(self, rows: Sequence[int]) -> Sequence[str]:
        """Keys that are to be made of such rows now: those of the attempt that has begun, or that any of them lacks."""
        lacking = [key for key, each in self._records(rows).items() if (each["status"] != VALID).any()]
        return (self._run and self._begun(rows, self._run.id)) or lacking or self.keys

    def encode(self, row: int, values: Mapping[str, Any], *, replace: bool = False) -> dict[str, bytes]:
        """What would be written of a row: bytes per key. Other keys of the schema, and those that the row has, unless
        `replace` is given, are left as they are in the store; `RowError` as in `Store.encode`, and for a key that is
        to be filled in now and is missing."""
        if isinstance(values, Mapping):
            wanted = self.keys if replace else self._wanted([row])
            missing = [key for key in wanted if key not in values]
            if missing:
                raise RowError(
                    f"row {row}: {', '.join(map(repr, missing))} missing; got "
                    f"{', '.join(map(repr, values)) or 'nothing'}; return what --worker.keys names"
                )
            there = [] if replace else [key for key, each in self._records([row]).items() if each["status"] == VALID]
            kept = set(self.keys).difference(there) or set(self.keys)
            values = {key: values[key] for key in values if key in kept or key not in self.spec.schema}
        return super().encode(row, values)

    def commit_encoded(
        self,
        encoded: Mapping[int, Mapping[str, bytes]],
        *,
        replace: bool = False,
        infos: Mapping[int, RowInfo] | None = None,
    ) -> None:
        """Fill in the keys of complete rows; those that a row has are left alone, unless `replace` is given, and then
        too where the new attempt failed. The rows' own records stay as they are, so `infos` says nothing here."""
        rows = sorted(encoded)
        if not rows:
            return
        with self._borrowing(rows), self.run.committing(rows) as guard:
            had = {key: each["status"] == VALID for key, each in self._records(rows).items()}
            for row in set(commits.journals(self.whole)).intersection(rows):  # applied later, it would undo this commit
                commits.apply_journal(self.whole, row, guard)
            for row, complete in zip(rows, self.whole.completed(rows), strict=True):
                if not complete:
                    raise StoreError(
                        f"row {row}: is not complete any more, so keys cannot be added; nothing is written"
                    )
            records = self._records(rows)
            has = {key: each["status"] == VALID for key, each in records.items()}
            full = np.all(list(had.values()), axis=0)
            if full.any() and not replace:
                raise RowError(f"row {rows[int(np.argmax(full))]}: {self.already(rows[int(np.argmax(full))])}")
            attempts = {key: np.where(has[key], 1, np.maximum(1, each["attempt"])) for key, each in records.items()}
            batches: dict[tuple[str, ...], list[int]] = {}
            for place, row in enumerate(rows):
                for key, blob in encoded[row].items():
                    if isinstance(blob, commits.Failed):
                        blob.attempt, blob.mark = int(attempts[key][place]), _mark(self.run.id)
                old = {key: blob for key, blob in encoded[row].items() if has[key][place]}
                new = {
                    key: blob
                    for key, blob in old.items()
                    if (replace or not had[key][place]) and not isinstance(blob, commits.Failed)
                }
                if new:
                    self._replace(self.whole, row, new, None, guard)
                batches.setdefault(tuple(key for key in encoded[row] if key not in old), []).append(place)
            for keys, places in batches.items():
                batch = [rows[place] for place in places]
                blobs = {key: [encoded[row][key] for row in batch] for key in keys}
                commits.fill(self.whole, batch, blobs, {key: attempts[key][places].tolist() for key in keys}, guard)

    # ------------------------------------------------- what a worker records

    def begin(
        self,
        rows: Sequence[int],
        *,
        complete: np.ndarray | None = None,
        records: np.ndarray | None = None,
        retries: int | None = None,
    ) -> list[int]:
        """Count an attempt at the keys that each row lacks, without those that were tried more than `retries` times."""
        done = self.layout.completed(rows) if complete is None else complete
        counts = np.full(len(rows), _NEVER, np.int64)
        for key, each in self._records(rows).items():
            lacking = ~np.asarray(done, bool) & (each["status"] != VALID)
            if retries is not None:
                lacking &= each["attempt"] <= retries
            places = np.flatnonzero(lacking).tolist()
            self._mark_keys(key, rows, places, each["attempt"].astype(np.int64) + 1, KEY_STARTED, self.run.id)
            counts[places] = np.minimum(counts[places], each["attempt"][places].astype(np.int64) + 1)
        return [1 if count == _NEVER else int(count) for count in counts]

    def _mark_keys(
        self, key: str, rows: Sequence[int], places: Sequence[int], attempts: np.ndarray, status: int, run: str
    ) -> None:
        if len(places):
            blobs = [
                commits.key_record(key, rows[i], attempt=int(attempts[i]), crc32=_mark(run), status=status)
                if attempts[i]
                else bytes(commits.KEY_RECORD.itemsize)
                for i in places
            ]
            self.whole.write(commits.record_file(key), [rows[i] for i in places], blobs, lambda: None)

    def _write_rows(
        self,
        rows: Sequence[int],
        state: int,
        attempts: Sequence[int],
        *,
        started: float,
        finished: float,
        complete: np.ndarray | None = None,
        run: str | None = None,
    ) -> None:
        """The attempts that have begun at keys of rows have failed, or, where `state` is PENDING, do not count."""
        for key, each in self._records(rows).items():
            places = np.flatnonzero(each["status"] == KEY_STARTED).tolist()
            count = each["attempt"].astype(np.int64) - (state == commits.PENDING)
            self._mark_keys(key, rows, places, count, KEY_FAILED, run or self.run.id)

    def _put_failure(self, row: int, attempts: int, traceback: str, run: str, errors: Mapping[str, str] | None) -> Path:
        records = {key: each[0] for key, each in self._records([row]).items()}
        begun = [key for key, record in records.items() if record["status"] == KEY_STARTED]
        files: dict[int, dict[str, str]] = {}
        for key, words in (errors or dict.fromkeys(begun or self.keys, traceback)).items():
            there = records[key]["status"] == VALID  # and stays
            files.setdefault(attempts if there else int(records[key]["attempt"]), {})[key] = words
        return [self._put_tracebacks(row, attempt, some, run) for attempt, some in sorted(files.items())][-1]

    def last_error(self, row: int) -> str:
        failed = [key for key, each in self._records([row]).items() if each["status"][0] == KEY_FAILED]
        return next((words for key in failed if (words := self.key_error(row, key))), "")

    def run_id(self, record: np.void) -> str:
        mark = super().run_id(record)
        names = [name.removesuffix(".json") for name in self.disk.list("runs") if name.endswith(f"{mark}.json")]
        return names[0] if mark and names else mark

    def neglected(self, rows: np.ndarray, retries: int) -> np.ndarray:
        """Those of a mask of rows that lack keys which nobody is making, or has tried too often; ascending."""
        found = np.zeros(self.num_models, bool)
        for key in self.keys:
            each = self.whole.records(key)
            spent = (each["status"] == KEY_FAILED) & (each["attempt"] > retries)
            found |= (each["status"] != VALID) & (each["status"] != KEY_STARTED) & ~spent
        return np.flatnonzero(found & rows & self.whole.completed())


_NEVER = np.iinfo(np.int64).max


def _mark(run: str) -> int:
    """The part of a run's id that fits where a key's record has the checksum of its bytes, which it does not have."""
    return int(run[-8:], 16)


@dataclass(frozen=True)
class _KeyLayout(Layout):
    """`completed` and `row_records` as `KeyStore` means them; everything else as it stands on disk."""

    keys: tuple[str, ...]

    def completed(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """Rows that have all the keys, or that are not complete; bool (len(rows),)."""
        lacking = np.any([self.records(key, rows)["status"] != VALID for key in self.keys], axis=0)
        done: np.ndarray = ~(super().completed(rows) & lacking)
        return done

    def row_records(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """Records of ROW_RECORD with `state` and `attempts` of the keys that a row lacks, and of `run` its end."""
        records = [self.records(key, rows) for key in self.keys]
        out = np.zeros(len(records[0]), ROW_RECORD)
        lacking = np.array([record["status"] != VALID for record in records])
        tried = np.array([record["attempt"] for record in records])
        out["attempts"] = np.where(lacking.any(axis=0), np.where(lacking, tried, np.iinfo("u4").max).min(axis=0), 0)
        out["state"] = np.where(out["attempts"] > 0, commits.FAILED, commits.PENDING)
        for status in (KEY_FAILED, KEY_STARTED):
            for record in records:
                places = np.flatnonzero(record["status"] == status)
                marks, which = np.unique(record["crc32"][places], return_inverse=True)
                out["run"][places] = np.array([b"%08x" % mark for mark in marks.tolist()], "S24")[which]
        for record in records:
            out["state"][record["status"] == KEY_STARTED] = commits.RUNNING
        return out
