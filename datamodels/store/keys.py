"""Optional keys of rows that are complete already: a store in which a row is done when it has these keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

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
    add them to. Its attempts are those at these keys, counted in their records. Nothing else of a row is written: it
    stays complete throughout, and a crash leaves each key absent or exact.
    """

    keys: tuple[str, ...]
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
        store.required = store.written = store.keys
        store.attempt_name = f"attempt-{'+'.join(store.keys)}"
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

    def encode(self, row: int, values: Mapping[str, Any]) -> dict[str, bytes]:
        """What would be written of a row: bytes per key. Other keys of the schema are left as they are in the store;
        `RowError` as in `Store.encode`, and for a key that is filled in and missing."""
        if isinstance(values, Mapping):
            missing = [key for key in self.keys if key not in values]
            if missing:
                raise RowError(
                    f"row {row}: {', '.join(map(repr, missing))} missing; got "
                    f"{', '.join(map(repr, values)) or 'nothing'}; return what --worker.keys names"
                )
            values = {key: values[key] for key in values if key in self.keys or key not in self.spec.schema}
        return super().encode(row, values)

    def commit_encoded(
        self,
        encoded: Mapping[int, Mapping[str, bytes]],
        *,
        replace: bool = False,
        infos: Mapping[int, RowInfo] | None = None,
    ) -> None:
        """Fill in the keys of complete rows; those that a row has are left alone, unless `replace` is given."""
        rows = sorted(encoded)
        if not rows:
            return
        with self._borrowing(rows), self.run.committing(rows) as guard:
            for row, complete in zip(rows, self.whole.completed(rows), strict=True):
                if not complete:
                    raise StoreError(
                        f"row {row}: is not complete any more, so keys cannot be added; nothing is written"
                    )
            lacking = {key: self.whole.records(key, rows)["status"] != VALID for key in self.keys}
            full = ~np.any(list(lacking.values()), axis=0)
            if full.any() and not replace:
                raise RowError(f"row {rows[int(np.argmax(full))]}: {self.already(rows[int(np.argmax(full))])}")
            attempts = np.maximum(1, self.layout.row_records(rows)["attempts"])
            if infos is not None:
                attempts = np.array([infos[row].attempts for row in rows])
            batches: dict[tuple[str, ...], list[int]] = {}
            for place in range(len(rows)):
                keys = tuple(key for key in self.keys if replace or lacking[key][place])
                batches.setdefault(keys, []).append(place)
            for keys, places in batches.items():
                batch = [rows[place] for place in places]
                blobs = {key: [encoded[row][key] for row in batch] for key in keys}
                commits.fill(self.whole, batch, blobs, attempts[places].tolist(), guard)

    def begin(
        self, rows: Sequence[int], *, complete: np.ndarray | None = None, records: np.ndarray | None = None
    ) -> list[int]:
        records = self.layout.row_records(rows) if records is None else records
        attempts = [int(attempt) + 1 for attempt in records["attempts"]]
        self._write_rows(rows, commits.RUNNING, attempts, started=0.0, finished=0.0, complete=complete)
        return attempts

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
        done = self.layout.completed(rows) if complete is None else complete
        places = [place for place in range(len(rows)) if not done[place]]
        status = KEY_STARTED if state == commits.RUNNING else KEY_FAILED
        for key in self.keys:
            records = self.whole.records(key, rows)
            mine = [place for place in places if records["status"][place] != VALID]
            if not mine:
                continue
            blank = state == commits.PENDING
            blobs = [
                bytes(commits.KEY_RECORD.itemsize)
                if blank and not attempts[place]
                else commits.key_record(
                    key, rows[place], attempt=attempts[place], crc32=_mark(run or self.run.id), status=status
                )
                for place in mine
            ]
            self.whole.write(commits.record_file(key), [rows[place] for place in mine], blobs, lambda: None)


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
        """Records of ROW_RECORD with `state`, `attempts` and `run` of the attempts at the keys; unchecked."""
        records = [self.records(key, rows) for key in self.keys]
        tried = [np.where(record["status"] == VALID, 0, record["attempt"]) for record in records]
        out = np.zeros(len(records[0]), ROW_RECORD)
        out["attempts"] = np.max(tried, axis=0)
        out["state"] = np.where(out["attempts"] > 0, commits.FAILED, commits.PENDING)
        for record in records:
            out["state"][record["status"] == KEY_STARTED] = commits.RUNNING
        if rows is not None and (out["state"] == commits.RUNNING).any():
            runs = {run[:-5][-8:]: run[:-5] for run in self.disk.list("runs") if run.endswith(".json")}
            for record in records:
                for place in np.flatnonzero(record["status"] == KEY_STARTED):
                    out["run"][place] = runs.get(f"{record['crc32'][place]:08x}", "").encode()
        return out
