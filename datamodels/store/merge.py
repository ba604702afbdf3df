"""Stores that were filled on different machines become one.

Every complete row of the sources that the target lacks is read, held against its checksums and committed to the target
under a claim, as a worker would. Its record (attempts, times, seed, run) is the source's; its folder in workers/ and
all runs come along, before the row is complete. So a merge that was killed anywhere is simply run again, and one that
has nothing to do writes nothing. Rows that two stores hold differently are found before anything is written, from the
checksums alone.
"""

from __future__ import annotations

import contextlib
import filecmp
import itertools
import json
import os
import re
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodels import files
from datamodels.errors import StoreError
from datamodels.spec import Spec
from datamodels.store import commit as commits
from datamodels.store.arrays import SPEC_FILE
from datamodels.store.check import in_order
from datamodels.store.claims import run_record
from datamodels.store.commit import RowInfo
from datamodels.store.reset import failed_rows
from datamodels.store.rows import Rows, batches, read_rows
from datamodels.store.store import Failure, Store

_FOLDERS_AT_ONCE = 64  # rows whose own folders are copied between two commits
_NAMED, FAILURES = 10, 20
_HALF = re.compile(r"\.(.+)\.[0-9]+\.partial")

Convert = Mapping[str, Callable[[memoryview], bytes]]
"""Per key that the target holds in another form: its bytes there, of those in the source."""


@dataclass
class Taken:
    """What a source gave: rows, to how many rows that were there it added which optional key, and the bytes of both;
    what is wrong with complete rows of it; how many rows that failed in it are not complete in the target, and the
    first of them."""

    path: Path
    complete: int
    copied: int = 0
    keys: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    failed: int = 0
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    `busy` are rows that somebody is running, or has just completed, in the target, and `missing` all rows that are
    complete in a source and not, or not with all their keys, in the target: where it is empty, the target has all that
    the sources have.
    """

    target: Path
    created: bool
    sources: tuple[Taken, ...]
    busy: tuple[int, ...]
    missing: tuple[int, ...]
    completed: int
    num_models: int
    seconds: float

    @property
    def copied(self) -> int:
        return sum(source.copied for source in self.sources)


def merge(
    sources: Sequence[str | Path],
    into: str | Path,
    *,
    progress: Callable[[int, int], object] = lambda rows, total: None,
) -> Merged:
    """Copy the complete rows of `sources` that the store `into` lacks; it is made where there is none.

    Rows of the first source that has them whole are taken; optional keys that only another has are added to them. A row
    of the target stays as it is but for optional keys that it does not have. A row that fails in a source, or is
    damaged there, is left to be run. `progress` is told of rows looked at, and of how many there are.

    Raises `StoreError`, with nothing written, where specs differ (a store may have fewer rows than the target, if it is
    the target before it grew), or where a row is complete in two of the stores with different bytes.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Store.open(source)) for source in sources]
        target = stack.enter_context(Store.open(into)) if (Path(into) / SPEC_FILE).exists() else None
        largest = max(opened, key=lambda store: store.num_models) if target is None else target
        for store in opened:
            if target is not None:
                refuse_itself(store, target)
            check_same_spec(store, largest)
        _refuse_disagreement([*([] if target is None else [target]), *opened])
        created = target is None
        if target is None:
            target = stack.enter_context(Store.create(into, largest.path / SPEC_FILE))
        return copy_rows(opened, target, {}, progress, created=created)


# ------------------------------------------------------------------------- before anything is written


def refuse_itself(store: Store, target: Store) -> None:
    if os.path.samefile(store.path, target.path):
        raise StoreError(f"{target.path}: is the target and a source at once; name another behind --into")


def check_same_spec(store: Store, target: Store, spec: Spec | None = None) -> None:
    """`StoreError` unless a store's spec, or `spec` in its place, is the target's, or was before the target grew."""
    if different := _difference(store, spec or store.spec, target):
        raise StoreError(f"{store.path} and {target.path} are not of one spec, nothing is written: {different}")


def _difference(store: Store, spec: Spec, target: Store) -> str | None:
    mine, theirs = _schema(spec), _schema(target.spec)
    for key in {**theirs, **mine}:
        if key not in mine or key not in theirs:
            lacking, has = (store, target) if key in theirs else (target, store)
            return f"schema: {key!r} is in {has.path} only; give it to {lacking.path} with add-key"
        for entry, value in mine[key].items():
            if value != theirs[key][entry]:
                return f"schema, {key!r}, {entry}: {json.dumps(value)} and {json.dumps(theirs[key][entry])}"
    if spec.measurements != target.spec.measurements:
        return f"measurements: {_short(spec.measurements)} and {_short(target.spec.measurements)}"
    plain = store.spec.design is None and target.spec.design is None
    for number, (block, other) in enumerate(zip(_blocks(store), _blocks(target), strict=False)):
        if plain:
            break
        for entry, value in block.items():
            if value != other[entry]:
                return f"design[{number}], {entry}: {_short(value)} and {_short(other[entry])}"
    if len(store.design.blocks) > len(target.design.blocks) or store.num_models > target.num_models:
        return (
            f"num_models: {store.num_models:,} and {target.num_models:,}; a store can take the rows of a smaller one, "
            f"not of a larger: grow {target.path} first"
        )
    return None


def _schema(spec: Spec) -> dict[str, dict[str, Any]]:
    names = ("shape", "dtype", "role", "required", "allow_nonfinite")
    return {key: {name: getattr(field, name) for name in names} for key, field in spec.schema.items()}


def _blocks(store: Store) -> Iterator[dict[str, Any]]:
    """The blocks of a design as they were understood, and the hashes of the files that they name."""
    raw = store.spec.design or ({},)
    for block, entry in zip(store.design.blocks, raw, strict=True):
        hashes = {name: entry.get(name, {}).get("sha256") for name in ("labels", "groups")}
        cells = [dict(cell) for cell in block.cells]
        yield {**{n: v for n, v in vars(block).items() if n != "strata"}, "cells": cells, **hashes}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _refuse_disagreement(stores: Sequence[Store]) -> None:
    """`StoreError` for rows that are complete in two stores with different bytes, by their checksums."""
    rows = max(store.num_models for store in stores)
    completed = [store.completed() for store in stores]
    clashes: dict[int, list[str]] = defaultdict(list)
    pairs: dict[int, tuple[Path, Path]] = {}
    for key in stores[0].spec.schema:
        crc32, owner = np.zeros(rows, "u4"), np.full(rows, -1)
        for number, (store, complete) in enumerate(zip(stores, completed, strict=True)):
            records = store.layout.records(key)
            mine = complete & (records["status"] == commits.VALID)
            first, known = owner[: store.num_models], crc32[: store.num_models]
            for row in np.flatnonzero(mine & (first >= 0) & (known != records["crc32"])).tolist():
                if not commits.key_record_intact(records[row], key, row):
                    continue
                other = stores[first[row]]
                if commits.key_record_intact(other.layout.records(key, [row])[0], key, row):
                    clashes[row].append(key)
                    pairs.setdefault(row, (other.path, store.path))
                else:
                    first[row] = -1
            fresh = mine & (first < 0)
            first[fresh], known[fresh] = number, records["crc32"][fresh]
    refuse(clashes, pairs)


def refuse(clashes: Mapping[int, Sequence[str]], pairs: Mapping[int, tuple[Path, Path]]) -> None:
    """`StoreError` that names the rows, and of each its keys and the two stores, unless there are none."""
    if not clashes:
        return
    rows = sorted(clashes)
    one, other = pairs[rows[0]]
    named = "; ".join(
        f"row {row} ({', '.join(dict.fromkeys(clashes[row]))}) in {pairs[row][0]} and {pairs[row][1]}"
        for row in rows[:_NAMED]
    )
    more = f"; and {len(rows) - _NAMED:,} rows more" if len(rows) > _NAMED else ""
    raise StoreError(
        f"{one} and {other} disagree, nothing is written: {len(rows):,} row{'s' * (len(rows) > 1)} complete in two "
        f"stores with different bytes: {named}{more}; see which is right and clear it in the other, as with python -m "
        f"datamodels.store reset {other} --rows={','.join(map(str, rows[:_NAMED]))}"
    )


# ------------------------------------------------------------------------------------ the copy


def copy_rows(
    sources: Sequence[Store],
    target: Store,
    convert: Convert,
    progress: Callable[[int, int], object],
    *,
    created: bool,
) -> Merged:
    """Copy what the target lacks; see `merge`. The specs agree but for the keys that `convert` makes."""
    began = time.monotonic()
    taken = [Taken(source.path, int(source.completed().sum())) for source in sources]
    wanted = np.zeros(target.num_models, bool)
    for source in sources:
        wanted[_lacking(source, target)] = True
    looked, total, busy = 0, int(wanted.sum()), set[int]()
    for source, mine in zip(sources, taken, strict=True):
        rows = _lacking(source, target)
        if len(rows):
            _bring_runs(source, target)
        folders = _row_folders(source)
        read = partial(read_rows, source, keys=list(source.spec.schema))
        for batch in in_order(read, _pieces(source, rows, folders), threads=1):
            left = _commit(source, target, batch, convert, folders)
            busy.update(left)
            mine.damaged.update(batch.damaged)
            mine.copied += len(batch.rows) - len(left)
            mine.nbytes += batch.nbytes
            fresh = [*batch.rows, *batch.damaged]  # a damaged row may be whole in the next source, and counts once
            looked += int(wanted[fresh].sum())
            wanted[fresh] = False
            progress(looked, total)
        for key, rows in _lacking_keys(source, target):
            total += len(rows)
            for batch in in_order(partial(read_rows, source, keys=[key]), batches(source, rows, [key]), threads=1):
                left = _commit_key(source, target, batch, key, convert)
                busy.update(left)
                mine.damaged.update(batch.damaged)
                mine.keys[key] = mine.keys.get(key, 0) + len(batch.rows) - len(left)
                mine.nbytes += batch.nbytes
                looked += len(batch.rows) + len(batch.damaged)
                progress(looked, total)
    completed, missing = target.completed(), set[int]()
    for source, mine in zip(sources, taken, strict=True):
        for rows in (_lacking(source, target), *(rows for _, rows in _lacking_keys(source, target))):
            missing.update(rows.tolist())
        failed = failed_rows(source)
        left_to_run = [row for row in failed if not completed[row]]
        attempts = source.layout.row_records(left_to_run)["attempts"].tolist()
        mine.failed = len(left_to_run)
        mine.failures = tuple(
            Failure(row, count, source.last_error(row))
            for row, count in zip(left_to_run[:FAILURES], attempts, strict=False)
        )
    return Merged(
        target.path,
        created,
        tuple(taken),
        tuple(sorted(busy)),
        tuple(sorted(missing)),
        int(completed.sum()),
        target.num_models,
        time.monotonic() - began,
    )


def _lacking(source: Store, target: Store) -> np.ndarray:
    """Rows that are complete in the source and not in the target, ascending."""
    return np.flatnonzero(source.completed() & ~target.completed()[: source.num_models])


def _lacking_keys(source: Store, target: Store) -> Iterator[tuple[str, np.ndarray]]:
    """Optional keys that a row has in the source and not in the target, where it is complete in both; rows ascend."""
    both = source.completed() & target.completed()[: source.num_models]
    for key, entry in source.spec.schema.items():
        if not entry.required:
            there = target.layout.records(key)["status"][: source.num_models] == commits.VALID
            rows = np.flatnonzero(both & ~there & source.having(key))
            if len(rows):
                yield key, rows


def _pieces(source: Store, rows: np.ndarray, folders: frozenset[int]) -> Iterator[list[int]]:
    """What is read and committed at once: few rows where folders of any size have to be copied first."""
    for batch in batches(source, rows, list(source.spec.schema)):
        piece: list[int] = []
        for row in batch:
            piece.append(row)
            if row in folders and len(folders.intersection(piece)) >= _FOLDERS_AT_ONCE:
                yield piece
                piece = []
        if piece:
            yield piece


def _commit(source: Store, target: Store, batch: Rows, convert: Convert, folders: frozenset[int]) -> list[int]:
    """Commit what was read; the rows that were left because somebody else has them, or has just completed them."""
    run, done = target.run, False
    mine = [i for i, row in enumerate(batch.rows) if run.take(row)]
    try:
        flags = target.layout.completed([batch.rows[i] for i in mine])
        free = [i for i, flag in zip(mine, flags, strict=True) if not flag]
        encoded: dict[int, dict[str, bytes]] = {}
        infos: dict[int, RowInfo] = {}
        failed = _failed_keys(source, target, batch)
        for i in free:
            row, record = batch.rows[i], batch.records[i]
            if row in folders:
                _bring_folder(source.path / "workers" / str(row), target.path / "workers" / str(row), target)
            encoded[row] = {
                key: convert[key](blob) if key in convert else bytes(blob)
                for key, blobs in batch.blobs.items()
                if (blob := blobs[i]) is not None
            } | failed.get(row, {})
            infos[row] = RowInfo(
                int(record["attempts"]),
                float(record["started"]),
                int(record["seed"]),
                float(record["finished"]),
                record["run"].decode(),
            )
        target.commit_encoded(encoded, infos=infos)
        done = True
    finally:
        for i in mine:
            run.release(batch.rows[i], done=done)
    return sorted(set(batch.rows).difference(encoded))


def _failed_keys(source: Store, target: Store, batch: Rows) -> dict[int, dict[str, bytes]]:
    """Per row of a batch the optional keys that failed in the source, as often as they did."""
    failed: dict[int, dict[str, bytes]] = {}
    for key, blobs in batch.blobs.items():
        absent = [row for row, blob in zip(batch.rows, blobs, strict=True) if blob is None]
        for row, record in zip(absent, source.layout.records(key, absent), strict=True):
            if record["status"] == commits.KEY_FAILED and commits.key_record_intact(record, key, row):
                blob = commits.Failed.of(target.field(key), attempt=int(record["attempt"]))
                failed.setdefault(row, {})[key] = blob
    return failed


def _commit_key(source: Store, target: Store, batch: Rows, key: str, convert: Convert) -> list[int]:
    """Give complete rows of the target a key that they lack; the rows that were left because somebody else has them."""
    run = target.run
    mine = [i for i, row in enumerate(batch.rows) if run.take(row)]
    rows = [batch.rows[i] for i in mine]
    try:
        with run.committing(rows) as guard:
            ready = target.layout.completed(rows) & (target.layout.records(key, rows)["status"] != commits.VALID)
            rows = [row for row, flag in zip(rows, ready, strict=True) if flag]
            blobs = [bytes(batch.blobs[key][i] or b"") for i, flag in zip(mine, ready, strict=True) if flag]
            if rows:
                attempts = source.layout.records(key, rows)["attempt"].tolist()
                if key in convert:
                    blobs = [convert[key](memoryview(blob)) for blob in blobs]
                commits.fill(target.layout, rows, {key: blobs}, {key: attempts}, guard)
    finally:
        for i in mine:
            run.release(batch.rows[i], done=False)
    return sorted(set(batch.rows).difference(rows))


# ------------------------------------------------------------------- what stands beside the arrays


def _bring_runs(source: Store, target: Store) -> None:
    """The records of all runs; of one that both have, the later."""
    for name in source.disk.list("runs"):
        path = source.path / "runs" / name
        there = run_record(target.path, path.stem)
        mine = run_record(source.path, path.stem)
        if mine is not None and (there is None or int(there.get("beat", 0)) < int(mine.get("beat", 0))):
            target.disk.put(f"runs/{name}", path.read_bytes())


def _row_folders(source: Store) -> frozenset[int]:
    """Rows that have a folder of their own."""
    return frozenset(int(name) for name in source.disk.list("workers") if name.isdecimal() and name.isascii())


def _bring_folder(source: Path, target: Path, store: Store) -> None:
    """Copy a row's folder. A file that is there with other contents is of attempts in the target: it keeps a name."""
    try:
        for folder, _, names in os.walk(source):
            inside = target / os.path.relpath(folder, source)
            inside.mkdir(parents=True, exist_ok=True)
            for left in os.listdir(inside):  # by a copy that was killed
                if (half := _HALF.fullmatch(left)) and half[1] in names and left not in names:
                    os.unlink(inside / left)
            for name in names:
                _bring_file(Path(folder) / name, inside / name, sync=store.disk.durable)
    except OSError as error:
        raise StoreError(f"{error.filename or source}: cannot copy the row's folder: {error.strerror}") from error


def _bring_file(source: Path, target: Path, *, sync: bool) -> None:
    kind = os.lstat(source).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
        return  # a socket or a pipe is of a process, not of a row
    if os.path.lexists(target):
        if _equal(source, target):
            return
        target.rename(next(name for n in itertools.count(1) if not os.path.lexists(name := f"{target}.replaced-{n}")))
    if stat.S_ISLNK(kind):
        os.symlink(os.readlink(source), target)
        return
    with files.whole(target, sync=sync) as out, open(source, "rb") as file:
        shutil.copyfileobj(file, out, 1 << 22)
    shutil.copystat(source, target)


def _equal(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
