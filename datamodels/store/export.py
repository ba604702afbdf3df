"""A store's results as a tidy table: a line per complete row, every value held against its checksum before it leaves.

Columns, in this order: `row`, `role`, `mask_id` (where the design has masks: equal for rows that share one), `seed`,
the factors of the design, `attempts`, `started` and `finished` (seconds since 1970, UTC), `seconds` between them,
`run`, and the keys. A factor that is a key as well is that key's column. Where a key or a factor has the name of
another column, that one begins with an underscore.

In parquet a value has the key's own type, bit for bit, NaN payloads included; an array is nested lists of fixed size,
and an optional key that a row lacks is null. In csv a number is written so that it reads back as the same number, an
array is a column per entry (`margins[0]`, `hit[2][7]`), and what a row lacks is empty, as is an empty text.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datamodels import files, row_filter
from datamodels.design import Design
from datamodels.errors import ConfigError, StoreError
from datamodels.spec import Field
from datamodels.store import commit as commits
from datamodels.store.check import in_order
from datamodels.store.rows import Rows, batches, read_rows
from datamodels.store.store import Store

CSV_ENTRIES = 100
"""A key with more entries a row than this is in a csv table only when it is asked for by name."""

FORMATS = (".parquet", ".csv")
_TEXT = np.dtype(object)
_FACTS = {
    "row": np.dtype("i8"),
    "role": np.dtype("U5"),
    "mask_id": np.dtype("i8"),
    "seed": commits.ROW_RECORD["seed"],
    "attempts": commits.ROW_RECORD["attempts"],
    "started": commits.ROW_RECORD["started"],
    "finished": commits.ROW_RECORD["finished"],
    "seconds": np.dtype("f8"),
    "run": np.dtype("U24"),
}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote. `left_out` are complete-row keys that it did not, each with the reason; `incomplete` counts
    the rows asked for that are not complete."""

    path: Path
    rows: int
    columns: tuple[str, ...]
    left_out: Mapping[str, str]
    incomplete: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Column:
    """A column of the table: its name, and the dtype and shape of its value in one line."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()


Values = tuple[np.ndarray, np.ndarray | None]
"""Values of a column (lines, *shape), and which of them are missing, bool (lines,), or None where none is."""


Write = Callable[[Sequence[Values]], None]
"""Adds lines to a table, given the values of all of its columns."""


def export(
    store: Store,
    path: str | Path,
    *,
    rows: Sequence[str] = (),
    keys: Sequence[str] = (),
    progress: Callable[[int, int], object] = lambda rows, total: None,
) -> Exported:
    """Write complete rows of a store to the table `path`, .parquet or .csv, which appears whole or not at all.

    `rows` are conditions and ranges, as in `datamodels.row_filter`; `keys` the keys to write, all by default but masks
    and, in csv, long ones. `progress` is told of lines written and of how many there will be.

    Raises `StoreError` for a row that is not as it was committed, and where nothing is complete; `ConfigError` for
    another kind of file, for rows or keys that there are not, or where pyarrow, which writes parquet, is missing.
    """
    began, path = time.monotonic(), Path(path)
    table = _table(path)
    chosen, left_out = _choose(store, keys, path.suffix)
    wanted = row_filter.select(store.design, rows, where="--rows") if rows else np.ones(store.num_models, bool)
    complete = np.flatnonzero(wanted & store.completed())
    if not len(complete):
        asked = "none of the rows asked for" if rows else "no row"
        raise StoreError(f"{store.path}: {asked} is complete, so there is nothing to export; run the workers first")
    facts = _Facts(store.design, chosen)
    columns = [*facts.columns, *(Column(field.name, field.value_dtype, field.shape) for field in chosen)]
    names = [field.name for field in chosen]
    try:
        with files.whole(path) as file, table(file, columns) as write:
            lines = 0
            for found in in_order(partial(read_rows, store, keys=names), batches(store, complete, names), threads=1):
                _refuse_damaged(store, found)
                write([*facts.of(found), *(_values(field, found) for field in chosen)])
                lines += len(found.rows)
                progress(lines, len(complete))
    except UnicodeError as error:
        raise StoreError(
            f"{path}: a text cannot be written as UTF-8 ({error}); leave that key out with --keys"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: the table cannot be written: {error.strerror or error}") from error
    return Exported(
        path,
        len(complete),
        tuple(name for column in columns for name in (_entries(column) if path.suffix == ".csv" else [column.name])),
        left_out,
        int(wanted.sum()) - len(complete),
        path.stat().st_size,
        time.monotonic() - began,
    )


def _choose(store: Store, keys: Sequence[str], kind: str) -> tuple[list[Field], dict[str, str]]:
    """The keys to write, and why the others are left out."""
    if keys:
        for key in keys:
            if key not in store.spec.schema:
                known = ", ".join(store.spec.schema)
                raise ConfigError(f"--keys: {store.path} has no key {key!r}; it has {known}")
        return [store.spec.schema[key] for key in dict.fromkeys(keys)], {}
    masks = {block.key for block in store.design.blocks if block.sampler is not None}
    left_out = {}
    for key, field in store.spec.schema.items():
        if key in masks or field.role == "mask":
            left_out[key] = "a mask"
        elif kind == ".csv" and math.prod(field.shape) > CSV_ENTRIES:
            left_out[key] = f"{math.prod(field.shape):,} columns in csv, one in parquet"
    return [field for key, field in store.spec.schema.items() if key not in left_out], left_out


def _refuse_damaged(store: Store, found: Rows) -> None:
    for row, what in found.damaged.items():
        raise StoreError(
            f"{store.path}: row {row}: {what}; no table is written; python -m datamodels.store repair {store.path} "
            f"says what can be done"
        )


def _values(field: Field, found: Rows) -> Values:
    blobs = found.blobs[field.name]
    missing = None if field.required else np.array([blob is None for blob in blobs], bool)
    blank = bytes(field.nbytes)
    stored = np.frombuffer(b"".join(blank if blob is None else blob for blob in blobs), field.disk_dtype)
    return field.decode(stored.reshape(len(blobs), *field.disk_shape)), missing


# ------------------------------------------------------------------------- what the store knows of a row


class _Facts:
    """The columns that are not keys."""

    def __init__(self, design: Design, keys: Sequence[Field]):
        self._design = design
        taken = {field.name for field in keys}
        self._factors = {name: _levels(design, name) for name in design.factors if name not in taken}
        taken.update(self._factors)
        masks = any(block.sampler is not None for block in design.blocks)
        facts = [name for name in _FACTS if masks or name != "mask_id"]
        split = facts.index("attempts")
        self._before, self._after = facts[:split], facts[split:]

        def column(name: str) -> Column:
            return Column(next(n for i in itertools.count() if (n := "_" * i + name) not in taken), _FACTS[name])

        self.columns = [
            *map(column, self._before),
            *(Column(name, levels.dtype) for name, (levels, _) in self._factors.items()),
            *map(column, self._after),
        ]

    def of(self, found: Rows) -> Iterator[Values]:
        rows, records = np.array(found.rows), found.records
        facts = {
            **{name: records[name] for name in ("seed", "attempts", "started", "finished")},
            "row": rows,
            "role": self._design.roles[rows],
            "mask_id": self._design.mask_ids[rows],
            "seconds": records["finished"] - records["started"],
            "run": records["run"].astype("U24"),
        }
        yield from ((facts[name], None) for name in self._before)
        cells = self._cells(rows)
        yield from ((levels[cells], missing[cells]) for levels, missing in self._factors.values())
        yield from ((facts[name], None) for name in self._after)

    def _cells(self, rows: np.ndarray) -> np.ndarray:
        """The grid cell of each row, counted through all blocks."""
        blocks = self._design.blocks
        number = np.searchsorted(self._design.starts, rows, side="right") - 1
        base = np.cumsum([0, *(len(block.cells) for block in blocks[:-1])])
        size = np.array([block.masks * block.repeats for block in blocks])
        cells: np.ndarray = base[number] + (rows - self._design.starts[number]) // size[number]
        return cells


def _levels(design: Design, factor: str) -> tuple[np.ndarray, np.ndarray]:
    """A factor's level in every cell of every block, and where a block does not have it.

    Numbers are numbers and texts are texts; where a factor has levels of several types they are texts, as in JSON.
    """
    cells = [cell for block in design.blocks for cell in block.cells]
    missing = np.array([factor not in cell for cell in cells], bool)
    levels = [cell[factor] for cell in cells if factor in cell]
    kinds = {type(level) for level in levels}
    dtype = _TEXT
    if kinds == {bool}:
        dtype = np.dtype(bool)
    elif kinds == {int} and all(-(2**63) <= level < 2**63 for level in levels):
        dtype = np.dtype("i8")
    elif kinds <= {int, float} and all(type(level) is float or abs(level) <= 2**53 for level in levels):
        dtype = np.dtype("f8")
    if dtype == _TEXT:
        levels = [level if isinstance(level, str) else json.dumps(level) for level in levels]
    values = np.full(len(cells), "" if dtype == _TEXT else 0, dtype)
    values[~missing] = levels
    return values, missing


# ------------------------------------------------------------------------------------ kinds of tables


def _table(path: Path) -> Callable[[BinaryIO, Sequence[Column]], contextlib.AbstractContextManager[Write]]:
    if path.suffix not in FORMATS:
        raise ConfigError(f"--table: expected a file that ends in {' or '.join(FORMATS)}, got {path}")
    if path.suffix == ".csv":
        return _csv
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"--table: {path}: pyarrow writes parquet and is not installed; pip install 'datamodels-store[table]', or "
            f"export to a file that ends in .csv"
        )
    return _parquet


def _entries(column: Column) -> list[str]:
    """Names of the csv columns of a column."""
    return [column.name + "".join(f"[{i}]" for i in index) for index in np.ndindex(column.shape)]


@contextlib.contextmanager
def _csv(file: BinaryIO, columns: Sequence[Column]) -> Iterator[Write]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    lines = csv.writer(text)  # with "\r\n" behind a line: else a text with "\r" in it would not be quoted
    lines.writerow(itertools.chain.from_iterable(map(_entries, columns)))

    def write(values: Sequence[Values]) -> None:
        cells: list[Sequence[Any]] = []
        for array, missing in values:
            for entry in array.reshape(len(array), math.prod(array.shape[1:])).T:
                plain = entry.tolist()  # Python's floats, which csv writes with repr
                if missing is not None:
                    plain = [None if gone else value for value, gone in zip(plain, missing.tolist(), strict=True)]
                cells.append(plain)
        lines.writerows(zip(*cells, strict=True))

    try:
        yield write
    finally:
        text.detach()


@contextlib.contextmanager
def _parquet(file: BinaryIO, columns: Sequence[Column]) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    kinds = [_arrow_type(column) for column in columns]
    schema = pyarrow.schema(list(zip((column.name for column in columns), kinds, strict=True)))
    # Numbers as they are: a dictionary of floats would be one more place that has to keep NaNs apart.
    words = [column.name for column in columns if column.dtype.kind in "UO" and not column.shape]
    with pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=words) as writer:

        def write(values: Sequence[Values]) -> None:
            arrays = [_arrow_array(kind, *value) for kind, value in zip(kinds, values, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

        yield write


def _arrow_type(column: Column) -> Any:
    import pyarrow

    kind = pyarrow.string() if column.dtype.kind in "UO" else pyarrow.from_numpy_dtype(column.dtype)
    for size in reversed(column.shape):
        kind = pyarrow.list_(kind, size if math.prod(column.shape) else -1)  # arrow crashes on lists of fixed size 0
    return kind


def _arrow_array(kind: Any, values: np.ndarray, missing: np.ndarray | None) -> Any:
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values, kind, mask=missing)
    if not values.size:
        gone = np.zeros(len(values), bool) if missing is None else missing
        lines = zip(values.tolist(), gone.tolist(), strict=True)
        return pyarrow.array([None if out else line for line, out in lines], kind)
    levels = [kind]
    while pyarrow.types.is_fixed_size_list(levels[-1].value_type):
        levels.append(levels[-1].value_type)
    array = pyarrow.array(values.ravel(), levels[-1].value_type)
    for level in reversed(levels[1:]):
        array = pyarrow.FixedSizeListArray.from_arrays(array, type=level)
    mask = None if missing is None else pyarrow.array(missing)
    return pyarrow.FixedSizeListArray.from_arrays(array, type=kind, mask=mask)
