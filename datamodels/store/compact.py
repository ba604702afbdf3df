"""A store again with its bool arrays packed: eight times smaller masks, everything else bit for bit.

It is a merge into a store whose schema says `bits` where the source's says `bool`, so it is as safe and is resumed in
the same way. Only rows that are complete, and as they were committed, are copied; the others are left to be run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import StoreError
from datamodels.spec import Field, Spec
from datamodels.store import commit as commits
from datamodels.store.arrays import SPEC_FILE, arrays
from datamodels.store.merge import Merged, check_same_spec, copy_rows, refuse_itself
from datamodels.store.store import Store

_NAMED = 10


@dataclass(frozen=True)
class Compacted:
    """What `compact` did: the keys that are packed, and the bytes of all arrays of the source and of the new store."""

    merged: Merged
    keys: tuple[str, ...]
    before: int
    after: int


def compact(
    source: str | Path, into: str | Path, *, progress: Callable[[int, int], object] = lambda rows, total: None
) -> Compacted:
    """Copy the complete rows of the store `source` to `into`, where the keys of bool arrays have dtype `bits`.

    `into` is made, or is what a compaction that was interrupted has made. `progress` is told of rows looked at, and of
    how many there are. Raises `StoreError` where no key would become smaller, where `into` is another store, or where a
    row has been run again in the source since it was copied; then nothing is written.
    """
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(source))
        spec = replace(store.spec, schema={key: _packed(field) for key, field in store.spec.schema.items()})
        keys = tuple(key for key, field in store.spec.schema.items() if spec.schema[key] != field)
        if not keys:
            raise StoreError(f"{store.path}: nothing to compact: no key is a bool array of more than one entry")
        created = not (Path(into) / SPEC_FILE).exists()
        if created:
            target = stack.enter_context(Store.create(into, _found_from_anywhere(spec, store.path)))
        else:
            target = stack.enter_context(Store.open(into))
            refuse_itself(store, target)
            check_same_spec(store, target, spec)
            _refuse_run_again(store, target)
        convert = {key: partial(_pack, store.spec.schema[key]) for key in keys}
        merged = copy_rows([store], target, convert, progress, created=created)
        return Compacted(merged, keys, _size(store), _size(target))


def _packed(field: Field) -> Field:
    """The field with dtype `bits` where that is smaller."""
    if field.dtype == "bool" and field.shape and (packed := replace(field, dtype="bits")).nbytes < field.nbytes:
        return packed
    return field


def _pack(field: Field, blob: memoryview) -> bytes:
    return np.packbits(np.frombuffer(blob, "?").reshape(field.shape), axis=-1, bitorder="little").tobytes()


def _found_from_anywhere(spec: Spec, folder: Path) -> Spec:
    """The spec with whole paths for the files that its design names inside the store."""

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping) and "sha256" in value:
            return {**value, "file": str((folder / value["file"]).resolve())}
        return value

    design = spec.design and tuple({name: whole(value) for name, value in block.items()} for block in spec.design)
    return replace(spec, design=design)


def _refuse_run_again(store: Store, target: Store) -> None:
    both = np.flatnonzero(store.completed() & target.completed()[: store.num_models]).tolist()
    mine, theirs = store.layout.row_records(both), target.layout.row_records(both)
    changed = [
        row
        for row, one, other in zip(both, mine, theirs, strict=True)
        if one.tobytes() != other.tobytes() and commits.row_record_intact(one, row)
    ]
    if changed:
        rows = ",".join(map(str, changed[:_NAMED]))
        raise StoreError(
            f"{target.path}: {len(changed):,} of its rows are of other runs than in {store.path}: {rows}"
            f"{' …' if len(changed) > _NAMED else ''}; nothing is written; where the source is right, clear them "
            f"first: python -m datamodels.store reset {target.path} --rows={rows}"
        )


def _size(store: Store) -> int:
    return sum((store.path / name).stat().st_size for name, _, _ in arrays(store.spec))
