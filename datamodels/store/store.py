"""The store: a folder of plain `.npy` arrays, one row per run, and what says which rows are true."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import format_exception, format_exception_only
from types import TracebackType
from typing import Any, Self

import numpy as np

from datamodels.design import Assignment, Design, check_index, resolve
from datamodels.errors import ClaimLost, RowError, SpecError, StoreError
from datamodels.spec import COMPLETED, Field, Spec, nearest
from datamodels.store import commit as commits
from datamodels.store import describe
from datamodels.store.arrays import SPEC_FILE, arrays, check_header, planned
from datamodels.store.claims import TIME_TO_LIVE, Run, claimed, life, living, run_record
from datamodels.store.commit import COMPLETED_FILE, ROWS_FILE, Layout, RowInfo
from datamodels.store.create import MARKER, create
from datamodels.store.disk import PosixDisk, filesystem

_READ_BYTES, _READ_ROWS = 1 << 26, 1 << 14
_LOOKS, _LOOK_SECONDS = 3, 0.05  # at a row that is being replaced
_REPLACED = "is being replaced; read it again in a moment (one that was cut short is finished when the store is opened)"
_KEY_ATTEMPT = "attempt-keys"  # and its number: one file for all keys of a row that failed then
_SIDE = re.compile(r"\.?([0-9]+)(\.[0-9]+\.partial)?")  # a journal, or one that was not finished


@dataclass(frozen=True)
class Failure:
    """A row that is not complete and whose last attempt failed."""

    row: int
    attempts: int
    error: str


@dataclass(frozen=True)
class Status:
    """Counts of a store's rows; `completed + running + failed + pending == num_models`."""

    num_models: int
    completed: int
    running: int
    failed: int
    pending: int
    failures: tuple[Failure, ...]


class Store:
    """A store folder, open for reading and committing. Make one with `Store.create` or `Store.open`."""

    def __init__(self, path: Path, spec: Spec, design: Design, layout: Layout, disk: PosixDisk, time_to_live: float):
        assert spec.num_models is not None
        self.path, self.spec, self.design = path, spec, design
        self.num_models: int = spec.num_models
        self.layout, self.disk, self._time_to_live = layout, disk, time_to_live
        # What a commit of a row must have and may have, the optional keys that it is for, where it is not for the row
        # whole, and how its tracebacks are named; see `KeyStore`.
        self.required = tuple(key for key, field in spec.schema.items() if field.required)
        self.written = tuple(spec.schema)
        self.keys: tuple[str, ...] = ()
        self.attempt_name = "attempt"
        self._version = (0, 0)  # of spec.json when it was opened
        self._run: Run | None = None
        self._code: dict[str, Any] = {}
        self._making_run = threading.Lock()

    # ------------------------------------------------------------ make, open

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: Spec | Mapping[str, Any] | str | Path,
        *,
        reserve: bool = True,
        sync: bool = True,
        base: Path | None = None,
    ) -> Store:
        """A new store at `path`, of a `Spec`, parsed JSON or the path of a JSON file.

        Files that the design names are looked for in the JSON file's folder, or in `base`, by default the current one.

        The folder may exist, but not with a store, or with files of the names that a store needs. Where the file system
        can, space for all rows is reserved (`reserve`), so that a full disk is an error now. Raises `SpecError` and
        `StoreError`; in both cases nothing that was there before has changed.
        """
        create(Path(path), spec, reserve=reserve, sync=sync, base=base)
        return cls.open(path, sync=sync)

    @classmethod
    def open(cls, path: str | Path, *, sync: bool = True, time_to_live: float = TIME_TO_LIVE) -> Self:
        """The store at `path`.

        `sync=False` commits without waiting for the disk: rows then survive a killed process but not a power cut.
        `time_to_live` is the lease of its claims in seconds. Raises `StoreError` where there is no store, where a newer
        version wrote it, or where an array does not fit the spec.
        """
        path = Path(path)
        if not (path / SPEC_FILE).is_file():
            what = (
                "there is no such folder"
                if not path.exists()
                else "it is not a folder"
                if not path.is_dir()
                else "its initialisation did not finish; run it again"
                if os.path.lexists(path / MARKER)
                else "it has arrays and no spec.json: made by the released code, or its spec.json was lost"
                if (path / COMPLETED_FILE).exists()
                else "it has no spec.json"
            )
            raise StoreError(
                f"{path}: not a store: {what}; make one with python -m datamodels.initialize_logdir "
                f"--logging.logdir={path} --logging.spec=SPEC.json"
            )
        version = _version(path)
        spec, design, heads = _load(path)
        assert spec.num_models is not None
        disk = PosixDisk(path, sync=sync)
        store = cls(path, spec, design, Layout(disk, spec.schema, spec.num_models, heads), disk, time_to_live)
        store._version = version
        with contextlib.suppress(StoreError, ClaimLost):  # reading goes on; `verify` tells of what is left
            store.recover()
        return store

    def recover(self) -> list[int]:
        """Finish replacements that a crash interrupted; the rows concerned. A row that is held is left to its holder.

        Raises `StoreError` where the disk refuses, or at the end, for a journal that is damaged.
        """
        rows: list[int] = []
        damaged: StoreError | None = None
        try:
            names = os.listdir(self.path / commits.JOURNAL)
        except FileNotFoundError:
            return rows
        for row in sorted({int(match[1]) for name in names if (match := _SIDE.fullmatch(name))}):
            # A store of somebody else's, opened to be read, stays as it is.
            if row >= self.num_models or not os.access(self.path, os.W_OK) or not self.run.take(row):
                continue
            try:
                with self.run.committing([row]) as guard:
                    if (self.path / commits.JOURNAL / str(row)).exists():
                        try:
                            commits.read_journal(self.layout, row)
                        except StoreError as error:
                            damaged = error
                            continue
                        commits.apply_journal(self.layout, row, guard)
                        rows.append(row)
                    for name in names:
                        if name.startswith(f".{row}."):
                            self.disk.remove(f"{commits.JOURNAL}/{name}")
            finally:
                self.run.release(row, done=False)
        if damaged is not None:
            raise damaged
        return rows

    @property
    def run(self) -> Run:
        """This process as a run of the store; made when first asked for, closed with the store or the process."""
        with self._making_run:
            if self._run is None or self._run.pid != os.getpid():  # a forked child is a run of its own
                facts = {**(self._code or describe.code()), **describe.software()}
                self._run = Run(self.path, network=self.disk.network, time_to_live=self._time_to_live, describe=facts)
            return self._run

    def describe_code(self, file: Path, **facts: Any) -> None:
        """Have this process's run record say that it runs `file`, and which commit that is; `facts` stand there too."""
        self._code = {**describe.code(file), **facts}
        if self._run is not None:
            self._run.note(**self._code)

    def run_of(self, row: int) -> dict[str, Any] | None:
        """The record of the run that made a row, or that tried it last; None where nobody has.

        It is `runs/<run>.json`: run, host, pid, argv, cwd, main, file, git_commit, git_dirty, versions, cuda, started
        and finished in seconds since 1970, exit, rows_done, rows_failed, as far as they are known; and `state`:

        running : it lives
        ended : with `exit`, its exit code, or None where the process did not say
        died : its process is gone and wrote no end: it was killed
        silent : of another machine, and no heartbeat came for its `time_to_live` seconds, by the clock of this one
        unknown : its record is missing

        Raises `RowError` for an index that is no row, and `StoreError` where the row's record is damaged.
        """
        record = self.layout.row_records([check_index(row, self.num_models)])[0]
        if not commits.row_record_intact(record, row):
            hint = f"python -m datamodels.store repair {self.path}"
            raise StoreError(f"{self.path}: row {row}: its record is damaged; see to it with {hint}")
        if not record["attempts"]:
            return None
        run = record["run"].decode()
        return {"run": run, **(run_record(self.path, run) or {}), "state": life(self.path, run)}

    def close(self, exit_status: int | None = None) -> None:
        if self._run is not None:
            self._run.close(exit_status)
            self._run = None
        self.disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.num_models:,} rows of {_some(self.spec.schema)})"

    # ------------------------------------------------------------------ read

    def __getitem__(self, key: str) -> np.ndarray:
        """The raw array of a key, (num_models, *disk shape), mapped read-only: no checksum, no completeness."""
        if key != COMPLETED:
            self.field(key)
        path = self.path / f"{key}.npy"
        stat = path.stat()
        # To look at a hole through a map is to fill it on tmpfs, and where no space is left that is a SIGBUS.
        holes = stat.st_blocks * 512 < stat.st_size and filesystem(path) == "tmpfs"
        array: np.ndarray = np.load(path, mmap_mode=None if holes else "r", allow_pickle=False)
        array.flags.writeable = False
        return array

    def field(self, key: str) -> Field:
        if key not in self.spec.schema:
            raise StoreError(f"{self.path}: no key {key!r}{nearest(key, self.spec.schema)}")
        return self.spec.schema[key]

    def completed(self) -> np.ndarray:
        """Which rows are complete, bool (num_models,), read afresh."""
        return self.layout.completed()

    def rows(self, key: str, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Values of a key, (len(rows), *shape), every row checked against its checksum; `bits` come as bool.

        `rows=None` is every complete row that has the key, ascending. `StoreError` names a row that is not complete
        or whose bytes are not what was committed.
        """
        field = self.field(key)
        completed = self._settled_flags()
        if rows is None and not field.required:
            completed &= self.having(key)
        wanted = np.flatnonzero(completed) if rows is None else self._indices(rows)
        missing = wanted[~completed[wanted]]
        if len(missing):
            row, asked = int(missing[0]), f"({len(missing)} of the {len(wanted)} rows asked for)"
            if self._replacing(row):
                raise StoreError(f"{self.path}: row {row} {_REPLACED} {asked}")
            raise StoreError(
                f"{self.path}: row {row} is not complete {asked}; run the workers, or ask for complete rows only"
            )
        distinct, position = np.unique(wanted, return_inverse=True)
        out = np.empty((len(distinct), *field.shape), field.value_dtype)
        step = min(_READ_ROWS, max(1, _READ_BYTES // max(1, field.nbytes)))
        for start in range(0, len(distinct), step):
            chunk = distinct[start : start + step].tolist()
            out[start : start + len(chunk)] = self._checked(field, chunk)
        return out if np.array_equal(distinct, wanted) else out[position]

    def having(self, key: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """Which of some rows, which ascend, have an optional key, bool (len(rows),); None is all rows.

        One whose record is damaged counts, and so does one that is being replaced: who reads it is told so, and it does
        not pass for one that lacks the key.
        """
        before = commits.journals(self.layout)
        records = self.layout.records(key, rows)
        having: np.ndarray = records["status"] == commits.VALID
        for place in np.flatnonzero(~having & records.view("u4").reshape(-1, 4).any(axis=1)).tolist():
            row = place if rows is None else rows[place]
            if not commits.key_record_intact(records[place], key, row):  # or it was being written just then
                again = self.layout.records(key, [row])[0]
                having[place] = again["status"] == commits.VALID or not commits.key_record_intact(again, key, row)
        for row in {*before, *commits.journals(self.layout)}.intersection(
            range(self.num_models) if rows is None else rows
        ):
            place = row if rows is None else list(rows).index(row)
            if not having[place]:
                having[place] = (
                    self._replaces(row, key) or self.layout.records(key, [row])["status"][0] == commits.VALID
                )
        return having

    def _replaces(self, row: int, key: str) -> bool:
        """Whether a row has a journal, and this has a value of the key."""
        try:
            blob = commits.read_journal(self.layout, row)[2].get(key)
        except StoreError:  # it has just been applied
            return False
        return blob is not None and not isinstance(blob, commits.Failed)

    def _indices(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """`rows` as int64. `RowError` unless each is an int in [0, num_models)."""
        if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype.kind in "iu" and len(rows):
            for row in (rows.min(), rows.max()):
                check_index(row, self.num_models)
            return rows.astype(np.int64)
        try:
            listed = list(rows)
        except TypeError:
            raise RowError(f"rows: expected a sequence of ints, got {rows!r}") from None
        return np.array([check_index(row, self.num_models) for row in listed], dtype=np.int64)

    def _checked(self, field: Field, rows: list[int]) -> np.ndarray:
        blobs, records = self.blobs(field, rows), self.layout.records(field.name, rows).copy()
        while found := commits.first_problem(records, field.name, rows, blobs):
            row, place = found[0], rows.index(found[0])
            records[place], blobs[place], problem = self.reread(field, row)
            if problem:
                again = f"; run it again with --worker.index={row} --worker.do_if_complete"
                if not field.required and records[place]["status"] != commits.VALID:
                    again = f"; it is optional, and --worker.keys={field.name} fills it in"
                raise StoreError(
                    f"{self.path}: row {row}, {field.name!r}: {problem}{'' if problem == _REPLACED else again}"
                )
        stored = np.frombuffer(b"".join(blobs), field.disk_dtype).reshape(len(rows), *field.disk_shape)
        return field.decode(stored)

    def _settled_flags(self) -> np.ndarray:
        """Which rows are complete; a row that is being replaced is waited for, but not for long."""
        for _ in range(_LOOKS):
            before = commits.journals(self.layout)
            flags = np.frombuffer(self.layout.read(COMPLETED_FILE, 0, self.num_models, 1), "u1")
            if flags.max() > 1:
                row = int(np.argmax(flags > 1))
                flag = f"its completed flag is {flags[row]}, neither 0 nor 1"
                raise StoreError(f"{self.path}: row {row}: {flag}; run it again")
            if not any(flags[row] == 0 for row in {*before, *commits.journals(self.layout)}):
                break
            time.sleep(_LOOK_SECONDS)
        completed: np.ndarray = flags == 1
        return completed

    def reread(self, field: Field, row: int) -> tuple[np.void, memoryview, str | None]:
        """Record and bytes of a complete row that did not agree, read again, and what is wrong with them, or None.

        While a row is replaced, a reader may find the old one's record with the new one's bytes.
        """
        for _ in range(_LOOKS):
            if self.disk.network or self._replacing(row) or not self.layout.completed([row])[0]:
                time.sleep(_LOOK_SECONDS)
            record, blob = self.layout.records(field.name, [row])[0], self.blobs(field, [row])[0]
            problem = commits.problem(record, field.name, row, blob)
            if problem is None:
                break
        if problem is not None and (self._replacing(row) or not self.layout.completed([row])[0]):
            problem = _REPLACED
        return record, blob, problem

    def _replacing(self, row: int) -> bool:
        return os.path.lexists(self.path / commits.JOURNAL / str(row))

    def blobs(self, field: Field, rows: list[int]) -> list[memoryview]:
        """The bytes of `rows`, ascending, as they stand on disk; unchecked."""
        return self.layout.pick(commits.key_file(field.name), rows, field.nbytes)

    def within(self, rows: np.ndarray | None) -> np.ndarray | None:
        """Those of some rows, bool (num_models,) or None for all, that this store has anything to do with."""
        return rows

    def check_row(self, row: Any) -> int:
        """`row` as an int. `RowError` unless it is one of the store's rows that a worker may be asked to run."""
        return check_index(row, self.num_models)

    def neglected(self, rows: np.ndarray, retries: int) -> np.ndarray:
        """Those of a mask of rows that a worker which holds them leaves as they are, ascending; see `KeyStore`."""
        return np.flatnonzero(np.zeros_like(rows))

    def already(self, row: int) -> str:
        """Why there is nothing to do for a complete row."""
        return "already complete, nothing to do (--worker.do_if_complete runs it again)"

    def status(self, *, failures: int = 20, rows: np.ndarray | None = None) -> Status:
        """How far the store is, or those of its rows that the mask `rows`, bool (num_models,), names.

        At most `failures` failed rows are described.
        """
        mine = np.ones(self.num_models, bool) if rows is None else rows
        completed = self.completed()
        records = self.layout.row_records()
        running = np.zeros(self.num_models, bool)
        running[self.held()] = True
        running &= mine & ~completed & (records["state"] != commits.FAILED)
        failed = np.flatnonzero(mine & (records["state"] == commits.FAILED) & ~completed)
        shown = tuple(
            Failure(int(row), int(records["attempts"][row]), self.last_error(int(row))) for row in failed[:failures]
        )
        total, done, active = int(mine.sum()), int((mine & completed).sum()), int(running.sum())
        return Status(total, done, active, len(failed), total - done - active - len(failed), shown)

    def held(self) -> list[int]:
        """Rows that a run has claimed which has not ended."""
        return list(self.holders())

    def holders(self) -> dict[int, str]:
        """The same rows, each with the id of its run."""
        found = claimed(self.path, self.disk.list("claims"))
        return {row: run for row, run in found.items() if row < self.num_models}

    def others(self) -> list[str]:
        """Ids of runs that have not ended, as far as this host can know, without this one."""
        mine = None if self._run is None else self._run.id
        return [run for run in living(self.path) if run != mine]

    def last_error(self, row: int) -> str:
        """Last line of the traceback of a row's last attempt, or "" where there is none."""
        attempt = int(self.layout.row_records([row])["attempts"][0])  # not the newest file: a row may have been reset
        try:
            report = json.loads((self.path / f"workers/{row}/attempt-{attempt}.json").read_text())
            return _last_line(report["traceback"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def key_error(self, row: int, key: str) -> str:
        """Last line of the traceback of the last attempt at an optional key of a row, or "" where there is none."""
        attempt = int(self.layout.records(key, [row])["attempt"][0])  # as above
        for entry in self._tracebacks(row, attempt):
            if key in entry["keys"]:
                return _last_line(entry["traceback"])
        return ""

    def _tracebacks(self, row: int, attempt: int) -> list[dict[str, Any]]:
        """What the file of an attempt at keys of a row holds: per traceback its keys, which are in no other."""
        try:
            report = json.loads((self.path / f"workers/{row}/{_KEY_ATTEMPT}-{attempt}.json").read_text())
            return [
                {**entry, "keys": list(map(str, entry["keys"])), "traceback": str(entry["traceback"])}
                for entry in report["failed"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _put_tracebacks(self, row: int, attempt: int, errors: Mapping[str, str], run: str) -> Path:
        """Write the tracebacks of keys of a claimed row, all of one attempt, to its file, beside those of others."""
        entries = [
            {**entry, "keys": others}
            for entry in self._tracebacks(row, attempt)
            if (others := [key for key in entry["keys"] if key not in errors])
        ]
        for words in dict.fromkeys(errors.values()):
            keys = [key for key in errors if errors[key] == words]
            entries.append({"keys": keys, "run": run, "time": time.time(), "traceback": words})
        name = f"workers/{row}/{_KEY_ATTEMPT}-{attempt}.json"
        self._put_json(name, {"row": row, "attempt": attempt, "failed": entries})
        return self.path / name

    def _put_json(self, name: str, report: Mapping[str, Any]) -> None:
        self.disk.put(name, (json.dumps(report, indent=1) + "\n").encode())

    # ---------------------------------------------------------------- commit

    def encode(self, row: int, values: Mapping[str, Any], *, replace: bool = False) -> dict[str, bytes]:
        """What would be written for a row: bytes per key. `RowError` for anything that is not exactly what the schema
        says: a required key missing, a key unknown, another shape, a cast that loses, a value that is not finite.

        `replace`: whether what the row has is to be replaced, where it matters; see `KeyStore`.
        """
        where = f"row {row}"
        if not isinstance(values, Mapping):
            raise RowError(
                f"{where}: expected a dict from key to value, got {type(values).__name__}; main() returns "
                f"{{{', '.join(f'{k!r}: …' for k in self.spec.schema)}}}"
            )
        for key in values:
            if key == COMPLETED:
                raise RowError(f"{where}: {COMPLETED!r} is the store's own record; leave it out of what main() returns")
            if key not in self.spec.schema:
                hint = nearest(str(key), self.spec.schema)
                raise RowError(
                    f"{where}: unknown key {key!r}{hint}{' If not,' if hint.endswith('?') else ';'} add it to the "
                    f"schema, or leave it out"
                )
        missing = [k for k in self.required if k not in values]
        if missing:
            raise RowError(
                f"{where}: required key{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} "
                f"missing; got {', '.join(map(repr, values)) or 'nothing'}; return them, or say "
                f'"required": false in the schema'
            )
        return {key: self._encoded(key, value, where) for key, value in values.items()}

    def _encoded(self, key: str, value: Any, where: str) -> bytes:
        """One value as it is written. An exception stands for an optional key that failed: NaN where that may be."""
        field = self.spec.schema[key]
        if not isinstance(value, BaseException):
            return field.encode(value, where=where).tobytes()
        if key in self.required and field.required:
            raise RowError(
                f"{where}, {key!r}: main returned {''.join(format_exception_only(value)).strip()}; this key is "
                f'required, so the row fails; say "required": false in the schema to keep its other keys'
            ) from value
        return commits.Failed.of(field, "".join(format_exception(value)))  # the exception holds all of main's frame

    def failed_keys(self, row: int, blobs: Mapping[str, bytes]) -> Path | None:
        """Keep the tracebacks of keys of a row that was committed without them, if there are any; their file."""
        failed = {key: blob for key, blob in blobs.items() if isinstance(blob, commits.Failed)}
        path = None
        for attempt in sorted({blob.attempt for blob in failed.values()}):
            errors = {key: blob.why for key, blob in failed.items() if blob.attempt == attempt}
            path = self._put_tracebacks(row, attempt, errors, self.run.id)
        return path

    def asked(self, assignments: Sequence[Assignment], *, replace: bool = False) -> tuple[str, ...]:
        """The keys that `main` is to return of such rows: those that the design does not fill in."""
        given = {key for assignment in assignments for key in self.audit(assignment)}
        return tuple(key for key in self.written if key not in given)

    def audit(self, assignment: Assignment) -> dict[str, Any]:
        """What the design itself says of a row, for the keys of the schema that have its names: mask and factors."""
        values: dict[str, Any] = {k: v for k, v in assignment.choices.items() if k in self.spec.schema}
        key = self.design.mask_key(assignment.row)
        if key is not None and assignment.mask is not None:
            values[key] = assignment.mask
        return values

    def commit_many(
        self, rows: Sequence[int] | np.ndarray, arrays: Mapping[str, Any], *, replace: bool = False
    ) -> None:
        """Commit rows, {key: values with leading axis len(rows)}; complete and durable when this returns.

        Everything is checked before any byte is written. Rows that this process has not claimed are claimed for the
        duration. Masks and factors of the design are filled in where `arrays` does not have them.

        Raises
        ------
        RowError : a value that may not be written, an index that is not a row, a row twice, or a row that is complete
            already, unless `replace` is given: then the new row is whole at the side before the old one goes.
        ClaimLost : somebody else holds one of the rows.
        StoreError : the disk refused; each row is incomplete, or complete and exact.
        """
        numbers: list[int] = self._indices(rows).tolist()
        if len(set(numbers)) != len(numbers):
            raise RowError(f"rows: {_twice(numbers)} stands twice in one commit")
        for key, values in arrays.items():
            try:
                if isinstance(values, (str, bytes, Mapping)):
                    raise TypeError
                given = str(len(values))
            except TypeError:  # a scalar array has __len__ and no length
                given = f"a {type(values).__name__}"
            if given != str(len(numbers)):
                raise RowError(f"{key!r}: expected a leading axis of {len(numbers)} rows, got {given}")
        encoded = {}
        for position, row in enumerate(numbers):
            mine = {key: values[position] for key, values in arrays.items()}
            encoded[row] = self.encode(row, {**self._audit_missing(row, mine), **mine}, replace=replace)
        self.commit_encoded(encoded, replace=replace)
        for row, blobs in encoded.items():
            self.failed_keys(row, blobs)

    def _audit_missing(self, row: int, given: Mapping[str, Any]) -> dict[str, Any]:
        key = self.design.mask_key(row)
        assignment = self.design.assignment(row, with_mask=key is not None and key not in given)
        return self.audit(assignment)

    def commit_encoded(
        self,
        encoded: Mapping[int, Mapping[str, bytes]],
        *,
        replace: bool = False,
        infos: Mapping[int, RowInfo] | None = None,
    ) -> None:
        """`commit_many` of rows that `encode` has checked. Rows of one call may have different optional keys.

        `infos` is what their records say, where that is known from elsewhere.
        """
        rows = sorted(encoded)
        if not rows:
            return
        with self._borrowing(rows), self.run.committing(rows) as guard:
            self._learn_keys()
            complete = self.layout.completed(rows)
            old = [row for row, flag in zip(rows, complete, strict=True) if flag]
            if old and not replace:
                raise RowError(
                    f"row {old[0]}: already complete; nothing is written (say replace=True, or "
                    f"--worker.do_if_complete, to replace it)"
                )
            infos = self._infos(rows) if infos is None else infos
            for row in old:
                self._replace(self.layout, row, encoded[row], infos[row], guard)
            fresh = [row for row, flag in zip(rows, complete, strict=True) if not flag]
            stale = set(commits.journals(self.layout)).intersection(fresh)
            for keys in sorted({tuple(encoded[row]) for row in fresh}):
                batch = [row for row in fresh if tuple(encoded[row]) == keys]
                commits.commit(
                    self.layout,
                    batch,
                    {key: [encoded[row][key] for row in batch] for key in keys},
                    [infos[row] for row in batch],
                    self.run.id,
                    guard,
                    complete=np.zeros(len(batch), bool),
                )
            for row in stale:  # a replacement that a crash cut short; applied later, it would undo this commit
                self.disk.remove(f"{commits.JOURNAL}/{row}")

    def changed(self) -> bool:
        """Whether the store has got rows or keys since it was opened."""
        return _version(self.path) != self._version

    def _learn_keys(self) -> None:
        """Know of keys that were added since this store was opened: a row that is run again must not keep them."""
        version = _version(self.path)
        if version == self._version:
            return
        spec, _, heads = _load(self.path)
        self.layout = replace(self.layout, fields={**spec.schema, **self.layout.fields}, heads=heads)
        self._version = version

    @contextlib.contextmanager
    def _borrowing(self, rows: Sequence[int]) -> Iterator[None]:
        """Rows claimed for the duration, where this process has not claimed them. `ClaimLost` where another has.

        Whoever opens the store holds a row whose replacement it finds, for the moment that it takes to finish it.
        """
        borrowed = [row for row in rows if row not in self.run.claims]
        try:
            for row in borrowed:
                looks = 1
                while not self.run.take(row):
                    if looks == _LOOKS:
                        raise ClaimLost(f"row {row}: another worker is running it; wait for it, or stop it")
                    time.sleep(_LOOK_SECONDS)
                    looks += 1
            yield
        finally:
            for row in borrowed:
                self.run.release(row, done=False)

    def _replace(
        self,
        layout: Layout,
        row: int,
        blobs: Mapping[str, bytes],
        info: RowInfo | None,
        guard: Callable[[], None],
    ) -> None:
        guard()
        commits.write_journal(layout, row, blobs, info, self.run.id)
        try:
            commits.apply_journal(layout, row, guard)
        except ClaimLost:
            # The row is another's now, and whoever opens the store would apply what was meant for it before.
            with contextlib.suppress(StoreError):
                if commits.read_journal(layout, row)[0] == self.run.id:
                    self.disk.remove(f"{commits.JOURNAL}/{row}")
            raise

    def _infos(self, rows: list[int]) -> dict[int, RowInfo]:
        now = time.time()
        infos = {}
        for row, record in zip(rows, self.layout.row_records(rows), strict=True):
            started = float(record["started"]) if record["run"] == self.run.id.encode() else now
            infos[row] = RowInfo(max(1, int(record["attempts"])), started, self.design.seed(row))
        return infos

    # ------------------------------------------------- what a worker records

    def begin(
        self,
        rows: Sequence[int],
        *,
        complete: np.ndarray | None = None,
        records: np.ndarray | None = None,
        retries: int | None = None,
    ) -> list[int]:
        """Count an attempt of each of some claimed rows, which ascend; the attempts so far, these included.

        `complete` and `records`: their flags and records, where the caller has read them since it claimed the rows.
        `retries`: how often what failed is tried again, where that is counted for less than a row; see `KeyStore`.
        """
        records = self.layout.row_records(rows) if records is None else records
        attempts = [
            int(record["attempts"]) + 1 if commits.row_record_intact(record, row) else 1
            for row, record in zip(rows, records, strict=True)
        ]
        self._write_rows(rows, commits.RUNNING, attempts, started=time.time(), finished=0.0, complete=complete)
        return attempts

    def fail(
        self,
        row: int,
        attempts: int,
        traceback: str,
        *,
        finished: float | None = None,
        run: str | None = None,
        log: bytes = b"",
        errors: Mapping[str, str] | None = None,
    ) -> Path:
        """Record a failed attempt of a claimed row, that ended now or `finished`; where its traceback is.

        `run` made the attempt, where it was not this one; `log` is what it printed, and stands beside the traceback.
        `errors` are those of some keys, where each has its own; see `KeyStore`. Where there is no place for the
        traceback, that is a `StoreError`, and the attempt has failed nevertheless.
        """
        run = run or self.run.id
        if log:
            with contextlib.suppress(StoreError):  # the traceback may still find a place
                self.disk.put(f"workers/{row}/{self.attempt_name}-{attempts}.log", log)
        try:
            return self._put_failure(row, attempts, traceback, run, errors)
        finally:
            started = float(self.layout.row_records([row])["started"][0])
            finished = time.time() if finished is None else finished
            self._write_rows([row], commits.FAILED, [attempts], started=started, finished=finished, run=run)

    def _put_failure(self, row: int, attempts: int, traceback: str, run: str, errors: Mapping[str, str] | None) -> Path:
        name = f"workers/{row}/attempt-{attempts}.json"
        report = {"row": row, "attempt": attempts, "run": run, "time": time.time(), "traceback": traceback}
        self._put_json(name, report)
        return self.path / name

    def run_id(self, record: np.void) -> str:
        """The run that a row's record names."""
        return bytes(record["run"]).decode(errors="replace")

    def give_back(self, row: int, attempts: int) -> None:
        """Undo `begin`: the row was stopped from outside, which says nothing against it."""
        self._write_rows([row], commits.PENDING, [max(0, attempts - 1)], started=0.0, finished=0.0)

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
        # The record of a complete row belongs to the values that it holds until they are replaced.
        fresh = [i for i, flag in enumerate(self.layout.completed(rows) if complete is None else complete) if not flag]
        if not fresh:
            return
        records = [
            commits.row_record(
                rows[i],
                state=state,
                attempts=attempts[i],
                started=started,
                finished=finished,
                seed=self.design.seed(rows[i]),
                run=run or self.run.id,
            )
            for i in fresh
        ]
        self.layout.write(ROWS_FILE, [rows[i] for i in fresh], records, lambda: None)


def _last_line(traceback: str) -> str:
    lines = traceback.strip().splitlines()
    return lines[-1] if lines else ""


def _version(path: Path) -> tuple[int, int]:
    """Changes whenever spec.json does, which is replaced and never written to."""
    try:
        fd = os.open(path / SPEC_FILE, os.O_RDONLY | os.O_CLOEXEC)  # a network file system looks again at an open
    except OSError as error:
        raise StoreError(f"{path / SPEC_FILE}: cannot be read: {error.strerror}; restore it") from None
    try:
        stat = os.fstat(fd)
        return stat.st_ino, stat.st_mtime_ns
    finally:
        os.close(fd)


def _load(path: Path) -> tuple[Spec, Design, dict[str, int]]:
    """The spec of a folder, its design, and per array where its rows begin. `StoreError` where they disagree."""
    while True:
        try:
            text = (path / SPEC_FILE).read_bytes()
            resolved = resolve(Spec.load(path / SPEC_FILE), path)
        except (OSError, SpecError) as error:
            raise StoreError(f"{path}: {error}") from error
        change = planned(path)
        rows, num_models = None if change is None else change.num_models, resolved.spec.num_models
        assert num_models is not None
        try:
            heads = {
                name: check_header(path / name, dtype, (num_models, *shape), rows=rows)
                for name, dtype, shape in arrays(resolved.spec)
            }
        except StoreError:
            if (path / SPEC_FILE).read_bytes() != text or planned(path) != change:  # somebody is making it grow
                continue
            raise
        return resolved.spec, resolved.design, heads


def _some(keys: Iterable[str], most: int = 5) -> str:
    names = list(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} keys more" if len(names) > most else "")


def _twice(numbers: list[int]) -> int:
    return next(n for n, times in Counter(numbers).items() if times > 1)
