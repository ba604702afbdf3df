"""Mistakes in the store that the bench has to see: each mutant puts one into the real code, by name.

`apply` puts a mutant into this process; a process that the bench starts does it where FAULTS_MUTANT names one, which is
read in `tests/faults/writer.py` and nowhere in the package.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np

from datamodels import files
from datamodels.errors import StoreError
from datamodels.store import check, claims, create, disk
from datamodels.store import commit as commits
from datamodels.store.claims import Run
from datamodels.store.commit import COMPLETED_FILE, JOURNAL, ROWS_FILE
from datamodels.store.disk import PosixDisk
from tests.faults.memory import MemoryDisk

VARIABLE = "FAULTS_MUTANT"
Patch = Callable[[object, str, object], None]  # setattr, or pytest's
MUTANTS: dict[str, Callable[[Patch], None]] = {}
DISKS = (PosixDisk, MemoryDisk)


def mutant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTANTS[function.__name__] = function
    return function


@contextlib.contextmanager
def apply(name: str | None) -> Iterator[None]:
    """The mutant of that name inside the block; the store as it is for None."""
    undo: list[tuple[object, str, object]] = []

    def patch(where: object, what: str, new: object) -> None:
        undo.append((where, what, vars(where)[what]))
        setattr(where, what, new)

    try:
        if name is not None:
            MUTANTS[name](patch)
        yield
    finally:
        for where, what, old in reversed(undo):
            setattr(where, what, old)


# ------------------------------------------------------------------ the order of a commit, and what is synced


@mutant
def completed_first(patch: Patch) -> None:
    real = commits.commit

    def commit(layout, rows, blobs, infos, run, *more, **options):
        layout.write(COMPLETED_FILE, rows, [b"\1"] * len(rows), lambda: None)
        layout.disk.sync([COMPLETED_FILE])
        options["complete"] = np.zeros(len(rows), bool)
        real(layout, rows, blobs, infos, run, *more, **options)

    patch(commits, "commit", commit)


@mutant
def no_invalidation(patch: Patch) -> None:
    patch(commits, "_invalidate", lambda *which: None)


@mutant
def flag_not_taken_back(patch: Patch) -> None:
    """Before bytes change only the records say so."""
    real = commits._invalidate

    def invalidate(layout, rows, guard, complete):
        write = layout.disk.write
        layout.disk.write = lambda name, *what: None if name == COMPLETED_FILE else write(name, *what)
        try:
            real(layout, rows, guard, complete)
        finally:
            layout.disk.write = write

    patch(commits, "_invalidate", invalidate)


@mutant
def records_not_taken_back(patch: Patch) -> None:
    """Before bytes change only the flag says so: an optional key of an earlier attempt stays."""

    def invalidate(layout, rows, guard, complete):
        done = [row for row, flag in zip(rows, complete, strict=True) if flag]
        if done:
            layout.write(COMPLETED_FILE, done, [b"\0"] * len(done), guard)
            layout.disk.sync([COMPLETED_FILE])

    patch(commits, "_invalidate", invalidate)


@mutant
def invalidation_not_synced(patch: Patch) -> None:
    real = commits._invalidate

    def invalidate(layout, *which):
        sync, layout.disk.sync = layout.disk.sync, lambda names: None
        try:
            real(layout, *which)
        finally:
            layout.disk.sync = sync

    patch(commits, "_invalidate", invalidate)


def _not_synced(patch: Patch, skip: Callable[[str], bool]) -> None:
    for kind in DISKS:

        def sync(self, names, real=kind.sync):
            real(self, [name for name in names if not skip(name)])

        patch(kind, "sync", sync)


@mutant
def keys_not_synced(patch: Patch) -> None:
    _not_synced(patch, lambda name: not name.startswith("_"))


@mutant
def records_not_synced(patch: Patch) -> None:
    _not_synced(patch, lambda name: name.startswith("_keys/"))


@mutant
def completed_not_synced(patch: Patch) -> None:
    _not_synced(patch, lambda name: name == COMPLETED_FILE)


@mutant
def nothing_synced(patch: Patch) -> None:
    _not_synced(patch, lambda name: True)


@mutant
def failed_sync_tried_again(patch: Patch) -> None:
    """As the kernel forgets what it could not write, the second sync succeeds."""
    for kind in DISKS:

        def sync(self, names, real=kind.sync):
            names = list(names)
            try:
                real(self, names)
            except StoreError:
                real(self, names)

        patch(kind, "sync", sync)


@mutant
def failed_sync_not_forgotten(patch: Patch) -> None:
    """What could not be written stays in the cache, where a retry finds it."""
    patch(MemoryDisk, "forgets", False)
    patch(os, "posix_fadvise", lambda *which: None)


@mutant
def flag_left_after_a_failed_sync(patch: Patch) -> None:
    """The flags are not taken back where the sync of them fails; the kernel is not made to read them again either."""
    MUTANTS["failed_sync_not_forgotten"](patch)
    real = commits.commit

    def commit(layout, *what, **options):
        write, was_set = layout.disk.write, []

        def keep(name, offset, data):
            if name == COMPLETED_FILE and not any(data) and was_set:
                return
            if name == COMPLETED_FILE and any(data):
                was_set.append(True)
            write(name, offset, data)

        layout.disk.write = keep
        try:
            real(layout, *what, **options)
        finally:
            layout.disk.write = write

    patch(commits, "commit", commit)


@mutant
def records_of_absent_keys_not_synced(patch: Patch) -> None:
    """Only records of keys that the row has are synced; one taken back by a process that died may come back."""
    real = commits.commit

    def commit(layout, rows, blobs, *what, **options):
        sync = layout.disk.sync
        absent = {commits.record_file(key) for key in set(layout.fields) - set(blobs)}

        def only(names):
            names = list(names)
            sync([name for name in names if ROWS_FILE not in names or name not in absent])

        layout.disk.sync = only
        try:
            real(layout, rows, blobs, *what, **options)
        finally:
            layout.disk.sync = sync

    patch(commits, "commit", commit)


@mutant
def flag_believed_taken_back(patch: Patch) -> None:
    """A flag that is seen to be 0 is not written and synced again, though records are left."""
    real = commits._invalidate

    def invalidate(layout, rows, guard, complete):
        write, sync = layout.disk.write, layout.disk.sync
        if not any(complete):
            layout.disk.write = lambda name, *what: None if name == COMPLETED_FILE else write(name, *what)
            layout.disk.sync = lambda names: sync([name for name in names if name != COMPLETED_FILE])
        try:
            real(layout, rows, guard, complete)
        finally:
            layout.disk.write, layout.disk.sync = write, sync

    patch(commits, "_invalidate", invalidate)


# --------------------------------------------------------------------------------- a row that is replaced


@mutant
def replaced_in_place(patch: Patch) -> None:
    """No journal: the new values go over the old ones."""

    def journal(layout, row, blobs, info, run):
        commits.commit(layout, [row], {key: [blob] for key, blob in blobs.items()}, [info], run)

    patch(commits, "write_journal", journal)
    patch(commits, "apply_journal", lambda layout, row, guard=None: None)


@mutant
def journal_removed_first(patch: Patch) -> None:
    def apply_journal(layout, row, guard=lambda: None):
        run, info, blobs = commits.read_journal(layout, row)
        layout.disk.remove(f"{JOURNAL}/{row}")
        commits.commit(layout, [row], {key: [blob] for key, blob in blobs.items()}, [info], run, guard)

    patch(commits, "apply_journal", apply_journal)


@mutant
def journal_not_synced(patch: Patch) -> None:
    real = files.whole
    patch(files, "whole", lambda path, *, sync=True: real(path, sync=sync and JOURNAL not in str(path)))


@mutant
def journal_without_checksum(patch: Patch) -> None:
    def read_journal(layout, row):
        name, start = f"{JOURNAL}/{row}", len(commits._MAGIC) + 4
        length = int.from_bytes(layout.disk.read(name, len(commits._MAGIC), 4), "little")
        try:
            head, blobs = json.loads(layout.disk.read(name, start, length)), {}
            for key, size in head["keys"]:
                blobs[key] = layout.disk.read(name, start + length + sum(map(len, blobs.values())), size)
            return head["run"], commits.RowInfo(head["attempts"], head["started"], head["seed"]), blobs
        except (ValueError, KeyError) as error:
            raise StoreError(f"{name}: {error}") from error

    patch(commits, "read_journal", read_journal)


# ------------------------------------------------------------------------------------- how bytes are written


@mutant
def memory_map(patch: Patch) -> None:
    """Rows are written through a map of the file, its pages synced."""

    def write(self, name, offset, data):
        with open(self.root / name, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
            pages[offset : offset + len(data)] = data

    patch(PosixDisk, "write", write)


@mutant
def no_o_dsync(patch: Patch) -> None:
    """On a network file system a plain pwrite, with an fsync where a local one would have it."""
    real = PosixDisk.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        self._flags &= ~os.O_DSYNC

    patch(PosixDisk, "__init__", init)


@mutant
def short_write_taken_for_whole(patch: Patch) -> None:
    patch(disk, "_write_all", lambda fd, data, offset: os.pwrite(fd, data, offset))


@mutant
def write_error_passed_over(patch: Patch) -> None:
    real = disk._write_all

    def write_all(fd, data, offset):
        with contextlib.suppress(OSError):
            real(fd, data, offset)

    patch(disk, "_write_all", write_all)


@mutant
def space_not_reserved(patch: Patch) -> None:
    patch(disk, "_reserve", lambda fd, size: None)


@mutant
def spec_before_arrays(patch: Patch) -> None:
    """A store is there by name before it is there."""
    texts, text, clear = [], create.spec_text, create._clear

    def spec_text(spec):
        texts.append(text(spec))
        return texts[-1]

    def spec_first(path):
        clear(path)
        (path / create.SPEC_FILE).write_bytes(texts[-1])

    patch(create, "spec_text", spec_text)
    patch(create, "_clear", spec_first)
    patch(create, "_publish", os.replace)


@mutant
def new_files_not_synced(patch: Patch) -> None:
    """A store is made without waiting for the disk, and reported."""
    real = create.PosixDisk
    patch(create, "PosixDisk", lambda path, *, sync: real(path, sync=False))


# --------------------------------------------------------------------------------- who may write which row


@mutant
def claim_without_generation(patch: Patch) -> None:
    """A dead holder's claim is removed and made anew under the same name."""

    def take(self, row):
        while row not in self.claims:
            if self._link(row, 0):
                self.claims[row] = 0
                break
            holder = self.holder(row, 0)
            if holder is None:
                continue
            with self._overtaking(holder) as allowed:
                if not allowed:
                    return False
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(row, 0))
        return True

    patch(Run, "take", take)


@mutant
def claim_not_read_again(patch: Patch) -> None:
    """After a takeover nobody looks whether the row was taken from whom it was seen to belong to."""
    real = Run.take

    def take(self, row):
        holder = Run.holder
        seen: dict[int, str] = {}

        def remember(number, generation):
            if generation not in seen:
                seen[generation] = holder(self, number, generation)
            return seen[generation]

        self.holder = remember
        try:
            return real(self, row)
        finally:
            del self.holder

    patch(Run, "take", take)


@mutant
def living_are_judged_by_their_heartbeat(patch: Patch) -> None:
    patch(claims, "_alive", lambda record: None)


@mutant
def commit_without_lock(patch: Patch) -> None:
    """Nor does a takeover need it."""

    class NoLocks:
        def __getattr__(self, name):
            return getattr(fcntl, name)

        @staticmethod
        def flock(fd, how):
            pass

    patch(claims, "fcntl", NoLocks())


@mutant
def takeover_without_lock(patch: Patch) -> None:
    @contextlib.contextmanager
    def overtaking(self, holder):
        yield self._gone(holder)

    patch(Run, "_overtaking", overtaking)


@mutant
def lease_not_checked(patch: Patch) -> None:
    patch(Run, "_within_lease", lambda self, rows: None)


@mutant
def lease_checked_once(patch: Patch) -> None:
    """When a commit begins, and not before every write."""
    real = Run.committing

    @contextlib.contextmanager
    def committing(self, rows):
        with real(self, rows):
            yield lambda: None

    patch(Run, "committing", committing)


@mutant
def claims_not_checked_in_a_commit(patch: Patch) -> None:
    patch(Run, "held", lambda self, rows: None)


# ------------------------------------------------------------------------------------------- what is checked


def _passes(patch: Patch, passed_over: str) -> None:
    """Let a problem of a row's key pass, wherever problems are looked for."""
    real = commits.problem

    def problem(record, key, row, blob):
        found = real(record, key, row, blob)
        return None if found and passed_over in found else found

    def first_problem(records, key, rows, blobs):
        for row, record, blob in zip(rows, records, blobs, strict=True):
            if found := problem(record, key, row, blob):
                return row, found
        return None

    patch(commits, "problem", problem)
    patch(commits, "first_problem", first_problem)


@mutant
def bytes_not_checked(patch: Patch) -> None:
    """The checksum of a record is, that of the bytes is not."""
    _passes(patch, "checksum")


@mutant
def key_records_not_checked(patch: Patch) -> None:
    """The checksum of the bytes is, that of the record is not."""
    _passes(patch, "its record is damaged")
    patch(commits, "key_record_intact", lambda record, key, row: True)


@mutant
def row_records_not_checked(patch: Patch) -> None:
    patch(check, "_row_records", lambda store, flags: iter(()))
