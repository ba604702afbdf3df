"""Change a store's spec in place: more rows, or one more key. No array is rewritten.

`spec.json.next` says first what is to come; then arrays are made or made longer, then headers tell of it, and at last
spec.json does. Until then the store opens as it was; after it, as it will be. What was cut short is undone by the next
change. Workers may run all the while: no row that they know of moves, and they go on with what spec.json said to them.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodels.design import resolve
from datamodels.errors import SpecError, StoreError
from datamodels.spec import Field, Spec, read_json
from datamodels.store.arrays import NEXT_FILE, SPEC_FILE, arrays, header, planned, size_of
from datamodels.store.create import alone, needing, spec_text
from datamodels.store.disk import Disk
from datamodels.store.store import Store

MARKER = "spec.json.changing"


@dataclass(frozen=True)
class Change:
    """What became of a store, and the runs that were alive then: they go on with what they knew before."""

    before: Spec
    after: Spec
    living: tuple[str, ...]


def grow(
    path: str | Path,
    num_models: int | None = None,
    *,
    block: Mapping[str, Any] | str | Path | None = None,
    reserve: bool = True,
) -> Change:
    """More rows behind those there are, which stay exactly what they are.

    A store without a design has `num_models` rows afterwards. One with a design gets one block more: `block`, parsed
    JSON or the path of a JSON file, with a seed of its own where it gives none; or, where only `num_models` is given
    and all train blocks are of one kind, one more of that kind. Space is reserved as in `Store.create`. Raises
    `SpecError` and `StoreError`; the store is then as it was.
    """
    folder = Path()
    if isinstance(block, (str, Path)):
        folder, block = Path(block).resolve().parent, read_json(Path(block))
    with _changing(Path(path)) as store:
        old = store.spec
        assert old.num_models is not None
        if num_models is not None and num_models <= old.num_models:
            raise SpecError(
                f"num_models: the store has {old.num_models} rows already, and only grows; got {num_models}"
            )
        if old.design is None:
            if block is not None:
                raise SpecError("block: the spec of this store has no design to append a block to; give num_models")
            if num_models is None:
                raise SpecError("num_models: missing; expected how many rows the store is to have")
            return _change(store, old.with_rows(num_models, None), {}, reserve)
        if block is None:
            if num_models is None:
                raise SpecError("block: missing; expected a block of the design, or num_models for one like the last")
            block = _another(old.design, num_models - old.num_models)
        if not isinstance(block, Mapping):
            raise SpecError(f'block: expected one block of a design, {{"masks": …, …}}, got {block!r}')
        entry = {"seed": _fresh_seed(old.design), **_from_folder(block, folder)}
        resolved = resolve(replace(old, num_models=num_models, design=(*old.design, entry)), store.path)
        count = len(old.design)
        if resolved.spec.design is None or resolved.spec.design[:count] != old.design:
            raise StoreError(f"{store.path}: the design reads as another one than when the store was made; not changed")
        return _change(store, resolved.spec, resolved.files, reserve)


def add_key(path: str | Path, field: Field, *, reserve: bool = True) -> Change:
    """One more key, which no row has yet. It is optional: complete rows stay complete.

    `python -m datamodels.worker --worker.keys=NAME` fills it in. Raises `SpecError` and `StoreError`; the store is then
    as it was.
    """
    with _changing(Path(path)) as store:
        if field.required:
            raise SpecError(f"key {field.name!r}: rows that are complete do not have it, so it must be optional")
        if field.name in store.spec.schema:
            raise SpecError(f"key {field.name!r}: the store has it already")
        new = replace(store.spec, schema={**store.spec.schema, field.name: field})
        known = {name for name, _, _ in arrays(store.spec)}
        for name, _, _ in arrays(new):
            if name not in known and (store.path / name).exists():
                raise StoreError(
                    f"{store.path / name}: exists, and is not of this store; move it away, or rename the key"
                )
        return _change(store, new, {}, reserve)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Store]:
    """The store, with every other change of it kept out, and one that was cut short undone."""
    with Store.open(path) as store:
        network = store.disk.network
    with alone(path, MARKER, "changing this store", network=network), Store.open(path) as store:
        if (path / NEXT_FILE).exists():
            undo(store.disk, store.spec, planned(path) or store.spec)
        yield store


def _change(store: Store, new: Spec, files: Mapping[str, bytes], reserve: bool) -> Change:
    """Take the store to `new`, or leave it as it was."""
    try:
        apply(store.disk, store.spec, new, files, reserve=reserve, folder=store.path)
    except BaseException:
        with contextlib.suppress(StoreError, SpecError):
            if Spec.load(store.path / SPEC_FILE) == store.spec:  # else it is done, but for tidying up
                undo(store.disk, store.spec, new)
        raise
    return Change(store.spec, new, tuple(store.others()))


def apply(disk: Disk, old: Spec, new: Spec, files: Mapping[str, bytes], *, reserve: bool, folder: Path) -> None:
    """Every step from `old` to `new`, in order; `files` are those that the design names, and `folder` is the disk's."""
    assert new.num_models is not None
    disk.put(NEXT_FILE, spec_text(new))
    for name, content in files.items():
        disk.put(name, content)
    there = {name for name, _, _ in arrays(old)}
    heads = {name: header(dtype, (new.num_models, *shape)) for name, dtype, shape in arrays(new)}
    for name, dtype, shape in arrays(new):
        with needing(folder, name, size_of(dtype, (new.num_models, *shape))) as size:
            if name not in there:
                disk.create(name, heads[name], size, reserve=reserve)
            elif new.num_models != old.num_models:
                disk.resize(name, size, reserve=reserve)
    if new.num_models != old.num_models:
        _rewrite(disk, {name: heads[name] for name in there})
    disk.put(SPEC_FILE, spec_text(new))
    disk.remove(NEXT_FILE)


def undo(disk: Disk, current: Spec, planned: Spec) -> None:
    """Leave nothing of a change to `planned` that was cut short; `current` is what spec.json says."""
    there = {name: (dtype, (current.num_models or 0, *shape)) for name, dtype, shape in arrays(current)}
    if planned.num_models != current.num_models:
        _rewrite(disk, {name: header(dtype, whole) for name, (dtype, whole) in there.items()})
        for name, (dtype, whole) in there.items():
            disk.resize(name, size_of(dtype, whole), reserve=False)
    for name, _, _ in arrays(planned):
        if name not in there:
            disk.remove(name)
    disk.remove(NEXT_FILE)


def _rewrite(disk: Disk, heads: Mapping[str, bytes]) -> None:
    # A header is shorter than a sector, and numpy leaves room in it for the number of rows, so it keeps its length.
    for name, head in heads.items():
        assert len(head) <= 512
        disk.write(name, 0, head)
    disk.sync(heads)


def _fresh_seed(design: Sequence[Mapping[str, Any]]) -> int:
    taken = {entry["seed"] for entry in design}
    return next(seed for seed in itertools.count(len(design)) if seed not in taken)


def _another(design: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """One more train block of so many rows, of the only kind there is."""
    sizes = ("seed", "count", "masks")
    kinds = {}
    for entry in design:
        if entry["role"] == "train":
            kind = {key: value for key, value in entry.items() if key not in sizes}
            if not entry.get("sampler"):
                kind.pop("repeats")
            kinds[json.dumps(kind, sort_keys=True)] = kind, entry
    if len(kinds) != 1:
        raise SpecError(
            f"num_models: the design has {len(kinds)} kinds of train blocks, so it is not clear what the new rows are "
            f"to be; give the block to append"
        )
    ((kind, entry),) = kinds.values()
    if entry.get("sampler") or "choices" not in entry:
        return {**kind, "count": rows}
    cells = entry["count"] // entry["repeats"]
    if rows % cells:
        raise SpecError(
            f"num_models: {rows} rows more do not divide into the {cells} cells of the grid; give a multiple of "
            f"{cells} more, or the block to append"
        )
    return {**kind, "repeats": rows // cells}


def _from_folder(block: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A block whose file names begin in `folder`, wherever it is read from."""
    entry = dict(block)
    for name in ("labels", "groups"):
        if isinstance(entry.get(name), str):
            entry[name] = str((folder / entry[name]).resolve())
    if isinstance(entry.get("choices"), Mapping):
        entry["choices"] = {
            factor: {"files": str(Path(glob.escape(str(folder.resolve()))) / levels["files"])}
            if isinstance(levels, Mapping) and isinstance(levels.get("files"), str)
            else levels
            for factor, levels in entry["choices"].items()
        }
    return entry
