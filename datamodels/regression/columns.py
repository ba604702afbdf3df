"""What the columns of a regression are made of: masks, choices, and any other key with a number or a vector per row.

A source reads runs in blocks, from a store or from a folder of plain arrays, and lays the keys that were asked for side
by side. The regression and `write_dataset` take their rows from the same sources, so they see the same columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from datamodels.errors import RegressionError

if TYPE_CHECKING:
    from datamodels.design import Design
    from datamodels.spec import Field
    from datamodels.store import Store

CHOICES = "choices"  # the factors of the design, one column per level; a key of that name goes first
BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Part:
    """The columns that one key brings.

    names: one per column; None: `key[0]`, `key[1]`, …  penalty: how strongly they are shrunk, 0 for not at all.
    """

    key: str
    width: int
    names: tuple[str, ...] | None = None
    penalty: float = 1.0

    def columns(self) -> tuple[str, ...]:
        return self.names if self.names is not None else tuple(f"{self.key}[{j}]" for j in range(self.width))

    def to_json(self) -> dict[str, Any]:
        names = {} if self.names is None else {"names": list(self.names)}
        return {"key": self.key, "width": self.width, "penalty": self.penalty} | names

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Part:
        names = raw.get("names")
        return cls(raw["key"], raw["width"], None if names is None else tuple(names), raw["penalty"])


@dataclass(frozen=True)
class Targets:
    """The outcomes: columns first, first + 1, … of a key; `scalar`: the key holds one number, which has its name."""

    key: str
    width: int
    first: int = 0
    scalar: bool = False

    def names(self) -> tuple[str, ...]:
        return (self.key,) if self.scalar else tuple(f"{self.key}[{self.first + t}]" for t in range(self.width))

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "width": self.width, "first": self.first, "scalar": self.scalar}

    def part(self, start: int, end: int) -> Targets:
        return Targets(self.key, end - start, self.first + start, self.scalar)


class Source(Protocol):
    """Runs, in ascending order, that can be read in blocks.

    where: in words.  rows (n,): their numbers.  parts, targets: what is read.  x_dtype, y_dtype; offset_dtype: None
    where outcomes have no offset.  mask_ids (n,): equal for rows of one mask, -1 where nothing is known of masks.
    """

    where: str
    rows: np.ndarray
    parts: tuple[Part, ...]
    targets: Targets
    x_dtype: np.dtype
    y_dtype: np.dtype
    offset_dtype: np.dtype | None
    mask_ids: np.ndarray

    def fill(self, first: int, last: int, x: np.ndarray, y: np.ndarray, offset: np.ndarray | None) -> None:
        """Rows first..last-1 into x (m, p), y (m, T) and offset (m, T)."""


class Groups:
    """Which rows share a mask: as the source says, and where it does not know, those whose columns are equal."""

    def __init__(self, mask_ids: np.ndarray):
        self._ids = mask_ids
        self._digests: list[bytes] = []
        self._unknown = bool((mask_ids < 0).any())

    def add(self, x: np.ndarray) -> None:
        """The next rows' columns."""
        if self._unknown:
            self._digests += [hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).digest() for row in x]

    def ids(self) -> np.ndarray:
        """int64 (n,), equal for rows that share a mask."""
        if not self._unknown:
            return np.asarray(self._ids, dtype=np.int64)
        equal = np.unique(self._digests, return_inverse=True)[1].reshape(-1)
        return np.where(self._ids < 0, self._ids.max() + 1 + equal, self._ids).astype(np.int64)


def chunks(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive rows of about BLOCK_BYTES together."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, n, step):
        yield first, min(n, first + step)


def penalties(parts: Sequence[Part]) -> np.ndarray | None:
    """(p,), the penalty of every column; None where all are 1."""
    if all(part.penalty == 1 for part in parts):
        return None
    return np.repeat([float(part.penalty) for part in parts], [part.width for part in parts])


def with_penalties(parts: Sequence[Part], penalty: Mapping[str, float] | None, section: str) -> tuple[Part, ...]:
    """The parts with their penalties replaced by those given, {key: penalty}."""
    penalty = penalty or {}
    keys = [part.key for part in parts]
    for key, value in penalty.items():
        if key not in keys:
            raise RegressionError(
                f"{section}.penalty: {key!r} is not among the columns; {section}.x_name has {', '.join(keys)}"
            )
        if not (np.isfinite(value) and value >= 0):
            raise RegressionError(
                f"{section}.penalty: {value} for {key!r}; it must be finite and at least 0 (0: not shrunk)"
            )
    return tuple(Part(part.key, part.width, part.names, float(penalty.get(part.key, part.penalty))) for part in parts)


class ChoiceCode:
    """One-hot columns of a design's factors, named `factor=level`: the levels of its training rows, all of them.

    A row whose block lacks a factor has 0 in that factor's columns.
    """

    def __init__(self, design: Design, where: str):
        self._design, self._where = design, where
        blocks = [block for block in design.blocks if block.role == "train"]
        place: dict[tuple[str, type, Any], int] = {}  # 1, 1.0 and True are one key of a dict and three levels
        for block in blocks:
            for factor in block.cells[0]:
                for cell in block.cells:
                    place.setdefault((factor, type(cell[factor]), cell[factor]), -1)
        if not place:
            raise RegressionError(
                f"{where} has no choices: no training block of its design names factors; leave {CHOICES!r} out of "
                f"x_name, or give the design choices"
            )
        factors = list(dict.fromkeys(factor for factor, *_ in place))
        levels = [key for factor in factors for key in place if key[0] == factor]
        self._place = {key: at for at, key in enumerate(levels)}
        plain = tuple(f"{factor}={level}" for factor, _, level in levels)
        told = tuple(f"{factor}={level!r}" for factor, _, level in levels)  # tells 1 from "1"
        self.names = plain if len(set(plain)) == len(plain) else told
        # Per block and cell, the columns that are 1; -1 for a level that no training row has.
        self._ones = [
            np.array(
                [[self._place.get((factor, type(level), level), -1) for factor, level in cell.items()]
                 for cell in block.cells],
                dtype=np.int64,
            ).reshape(len(block.cells), -1)
            for block in design.blocks
        ]  # fmt: skip

    def fill(self, rows: np.ndarray, out: np.ndarray) -> None:
        """out (m, width): 0 and 1. Raises RegressionError for a level that no training row has."""
        out[:] = 0
        numbers = np.searchsorted(self._design.starts, rows, side="right") - 1
        for number in np.unique(numbers):
            block, here = self._design.blocks[number], np.flatnonzero(numbers == number)
            cells = (rows[here] - self._design.starts[number]) // (block.masks * block.repeats)
            ones = self._ones[number][cells]
            if (ones < 0).any():
                at, factor = np.argwhere(ones < 0)[0]
                name, level = list(block.cells[int(cells[at])].items())[int(factor)]
                raise RegressionError(
                    f"{self._where}: row {rows[here[at]]}: {name}={level} is no level of a training row, so no "
                    f"column stands for it"
                )
            out[np.repeat(here, ones.shape[1]), ones.reshape(-1)] = 1


class StoreColumns:
    """The columns of a store's rows that x_name stands for: keys, or `choices`, side by side.

    Raises RegressionError for keys that the store does not have or that are no numbers.
    """

    def __init__(self, store: Store, x_name: str | Sequence[str], section: str = "data"):
        self._store = store
        self._code: ChoiceCode | None = None
        parts = []
        dtypes: list[np.dtype] = []
        for name in split_names(x_name, section):
            if name == CHOICES and name not in store.spec.schema:
                self._code = ChoiceCode(store.design, f"the store {store.path}")
                parts.append(Part(name, len(self._code.names), self._code.names))
                dtypes.append(np.dtype(bool))
                continue
            field = _field(store, name, f"{section}.x_name", extra=[CHOICES] if store.design.factors else [])
            parts.append(Part(name, math.prod(field.shape), None if field.shape else (name,)))
            dtypes.append(field.value_dtype)
        self.parts = tuple(parts)
        self.dtype = common_dtype(dtypes)

    @property
    def width(self) -> int:
        return sum(part.width for part in self.parts)

    def fill(self, rows: np.ndarray, x: np.ndarray) -> None:
        """The columns of these rows into x (m, p)."""
        at = 0
        for part in self.parts:
            columns = x[:, at : at + part.width]
            if self._code is not None and part.key == CHOICES:
                self._code.fill(rows, columns)
            else:
                _read(self._store, part.key, rows, columns)
            at += part.width


def columns_of_store(
    store: Store, rows: Sequence[int] | np.ndarray, *, x_name: str | Sequence[str] = "masks"
) -> np.ndarray:
    """Columns (m, p) of any complete rows, as problem_from_store lays them out; what `Datamodel.predict` takes.

    Raises RegressionError for keys that cannot be columns, and for a level that no training row has.
    """
    columns = StoreColumns(store, x_name)
    x = np.empty((len(rows), columns.width), dtype=columns.dtype)
    columns.fill(np.asarray(rows), x)
    return x


class StoreSource:
    """The complete training rows of a store, read against their checksums.

    x_name: keys, or `choices`.  offset_name: a key of the outcomes' shape.  keep: (num_models,) bool, a further
    condition on rows.  section: of the command line, for messages.

    Raises RegressionError for keys that the store does not have or that are no numbers.
    """

    def __init__(
        self,
        store: Store,
        *,
        x_name: str | Sequence[str],
        y_name: str,
        penalty: Mapping[str, float] | None = None,
        offset_name: str | None = None,
        keep: np.ndarray | None = None,
        section: str = "data",
    ):
        self.where = f"the store {store.path}"
        self._store = store
        self._columns = StoreColumns(store, x_name, section)
        self.parts = with_penalties(self._columns.parts, penalty, section)
        self.x_dtype = self._columns.dtype
        field = _field(store, y_name, f"{section}.y_name")
        self.targets = Targets(y_name, math.prod(field.shape), scalar=not field.shape)
        self.y_dtype = field.value_dtype
        self._offset = offset_name
        self.offset_dtype = None
        if offset_name is not None:
            other = _field(store, offset_name, f"{section}.offset_name")
            if other.shape != field.shape:
                raise RegressionError(
                    f"{self.where}: offset {offset_name!r} ({section}.offset_name) has shape {list(other.shape)}, "
                    f"the outcomes {y_name!r} {list(field.shape)}; one offset per row and target is needed"
                )
            self.offset_dtype = other.value_dtype
        training = store.design.roles == "train"
        chosen = store.completed() & training
        if keep is not None:
            chosen &= keep
        self.rows = np.flatnonzero(chosen)
        ids = np.asarray(store.design.mask_ids)
        planned = ids[training]
        # Where all rows share one mask, it is the choices that differ.
        one = len(planned) > 0 and planned[0] >= 0 and (planned == planned[0]).all()
        self.mask_ids = np.full(len(self.rows), -1, dtype=np.int64) if one else ids[self.rows]

    def take(self, count: int) -> None:
        """Keep the first `count` rows."""
        self.rows, self.mask_ids = self.rows[:count], self.mask_ids[:count]

    def fill(self, first: int, last: int, x: np.ndarray, y: np.ndarray, offset: np.ndarray | None) -> None:
        rows = self.rows[first:last]
        self._columns.fill(rows, x)
        _read(self._store, self.targets.key, rows, y, self.targets.first)
        if offset is not None and self._offset is not None:
            _read(self._store, self._offset, rows, offset, self.targets.first)


def _read(store: Store, key: str, rows: np.ndarray, out: np.ndarray, first: int = 0) -> None:
    """A key's columns first, first + 1, … of these rows into out; never more than a block is in memory."""
    field = store.field(key)
    width = math.prod(field.shape)
    for low, high in chunks(len(rows), width * field.value_dtype.itemsize):
        values = store.rows(key, rows[low:high]).reshape(high - low, width)
        out[low:high] = values[:, first : first + out.shape[1]]


def _field(store: Store, name: str, option: str, extra: Sequence[str] = ()) -> Field:
    schema = store.spec.schema
    if name not in schema:
        raise RegressionError(
            f"the store {store.path} has no key {name!r} ({option}); it has {', '.join([*schema, *extra])}"
        )
    field = schema[name]
    if len(field.shape) > 1:
        raise RegressionError(
            f"key {name!r} ({option}) has shape {field.shape} per row; the regression takes one number or one vector "
            f"per row"
        )
    if field.value_dtype.kind not in "biuf":
        advice = f"; a factor of the design comes as {CHOICES!r}" if name in store.design.factors else ""
        raise RegressionError(f"key {name!r} ({option}) holds {field.dtype}, no numbers{advice}")
    return field


class FolderSource:
    """Rows of a folder of plain arrays, `<key>.npy` of shape (rows, …) each, as the released code leaves it.

    completed_name: an array of flags; None: every row is taken.
    """

    offset_dtype: np.dtype | None = None

    def __init__(
        self,
        folder: Path,
        *,
        x_name: str | Sequence[str],
        y_name: str,
        completed_name: str | None = "_completed",
        penalty: Mapping[str, float] | None = None,
        offset_name: str | None = None,
        section: str = "cfg",
    ):
        self.where = f"the folder {folder}"
        self._folder = folder
        names = split_names(x_name, section)
        self._x = [self._array(name, f"{section}.x_name") for name in names]
        self._y = self._array(y_name, f"{section}.y_name")
        self._offset = None if offset_name is None else self._array(offset_name, f"{section}.offset_name")
        every = len(self._y)
        flags = np.ones(every, dtype=bool)
        if completed_name is not None:
            flags = self._open(completed_name, f"{section}.completed_name")
            if flags.ndim != 1 or flags.dtype.kind not in "biu":
                raise RegressionError(
                    f"{folder / completed_name}.npy ({section}.completed_name): expected a flag per row, got "
                    f"{flags.dtype} of shape {flags.shape}"
                )
        shapes = dict(zip(names, [len(x) for x in self._x], strict=True)) | {y_name: every}
        shapes |= {} if completed_name is None else {completed_name: len(flags)}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in shapes.items())
            raise RegressionError(f"{self.where}: arrays of different numbers of rows ({told}); they are not one run's")
        if self._offset is not None and self._offset.shape != self._y.shape:
            raise RegressionError(
                f"{self.where}: offset {offset_name!r} has shape {self._offset.shape}, the outcomes {self._y.shape}"
            )
        scalar = [len(self._open(name, "").shape) == 1 for name in names]
        parts = [
            Part(name, x.shape[1], (name,) if one else None)
            for name, x, one in zip(names, self._x, scalar, strict=True)
        ]
        self.parts = with_penalties(parts, penalty, section)
        self.targets = Targets(y_name, self._y.shape[1], scalar=self._open(y_name, "").ndim == 1)
        self.x_dtype = common_dtype([x.dtype for x in self._x])
        self.y_dtype = self._y.dtype
        self.offset_dtype = None if self._offset is None else self._offset.dtype
        self.rows = np.flatnonzero(flags)
        self.mask_ids = np.full(len(self.rows), -1, dtype=np.int64)

    def fill(self, first: int, last: int, x: np.ndarray, y: np.ndarray, offset: np.ndarray | None) -> None:
        rows = self.rows[first:last]
        at = 0
        for part, values in zip(self.parts, self._x, strict=True):
            x[:, at : at + part.width] = values[rows]
            at += part.width
        start, end = self.targets.first, self.targets.first + self.targets.width
        y[:] = self._y[rows, start:end]
        if offset is not None and self._offset is not None:
            offset[:] = self._offset[rows, start:end]

    def _array(self, name: str, option: str) -> np.ndarray:
        """(rows, width), mapped."""
        values = self._open(name, option)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.dtype.kind not in "biuf":
            raise RegressionError(
                f"{self._folder / name}.npy ({option}): expected a number or a vector of numbers per row, got "
                f"{values.dtype} of shape {values.shape}"
            )
        return values

    def _open(self, name: str, option: str) -> np.ndarray:
        path = self._folder / f"{name}.npy"
        try:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped
        except FileNotFoundError:
            there = sorted(file.stem for file in self._folder.glob("*.npy"))
            raise RegressionError(
                f"{self.where} has no {name}.npy ({option}); it has {', '.join(there) or 'no arrays'}"
            ) from None
        except (OSError, ValueError) as error:
            raise RegressionError(f"{path} ({option}): is no array of numbers, or cut short ({error})") from None


def split_names(names: str | Sequence[str], section: str) -> tuple[str, ...]:
    """`masks,choices` or a list as names, each once."""
    split = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if not split or any(not name for name in split):
        raise RegressionError(f"{section}.x_name={names}: at least one key is needed, and none of them empty")
    if len(set(split)) < len(split):
        twice = next(name for name in split if split.count(name) > 1)
        raise RegressionError(f"{section}.x_name: {twice!r} stands twice; its columns would be the same")
    return tuple(split)


def common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The smallest dtype that holds them all; bool as long as all are."""
    return np.dtype(np.result_type(*dtypes)).newbyteorder("=")


def open_source(
    *,
    data_dir: str,
    x_name: Sequence[str],
    y_name: str,
    y_slice: int = -1,
    completed_name: str = "_completed",
    ignore_completed: bool = False,
    penalty: Mapping[str, float] | None = None,
    offset_name: str | None = None,
) -> StoreSource | FolderSource:
    """The source that `write_dataset` writes: a store, or a folder of arrays as the released code leaves it.

    y_slice: the one outcome that is written, -1 for all.

    Raises RegressionError for what neither has, and for a store of which incomplete rows are asked for.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise RegressionError(f"cfg.data_dir={folder}: there is no such folder; name a store, or a folder of arrays")
    keys: dict[str, Any] = {"x_name": x_name, "y_name": y_name, "penalty": penalty, "offset_name": offset_name}
    source: StoreSource | FolderSource
    if (folder / "spec.json").exists():
        from datamodels.store import Store

        store = Store.open(folder)
        keep = None
        if completed_name != "_completed":
            keep = _flags(store, completed_name)
        source = StoreSource(store, **keys, keep=keep, section="cfg")
        if ignore_completed and not store.completed()[store.design.roles == "train"].all():
            missing = int((~store.completed()[store.design.roles == "train"]).sum())
            raise RegressionError(
                f"cfg.ignore_completed: {missing} training rows of {source.where} are not complete, so there is "
                f"nothing true to write for them; leave it out, and the complete rows are written"
            )
    else:
        source = FolderSource(folder, **keys, completed_name=None if ignore_completed else completed_name)
    if y_slice != -1:
        if not 0 <= y_slice < source.targets.width:
            raise RegressionError(
                f"cfg.y_slice={y_slice}: {y_name!r} has {source.targets.width} outcomes; expected 0 to "
                f"{source.targets.width - 1}, or -1 for all"
            )
        source.targets = source.targets.part(y_slice, y_slice + 1)
    return source


def _flags(store: Store, name: str) -> np.ndarray:
    """(num_models,) bool: complete rows whose key `name` is true."""
    if name not in store.spec.schema or store.spec.schema[name].shape or store.spec.schema[name].dtype != "bool":
        raise RegressionError(
            f"cfg.completed_name={name}: expected _completed or a key of the store with one bool per row; "
            f"it has {', '.join(store.spec.schema)}"
        )
    complete = np.flatnonzero(store.completed())
    keep = np.zeros(store.num_models, dtype=bool)
    keep[complete] = store.rows(name, complete)
    return keep


def outcome_dtype(source: Source) -> np.dtype:
    """What outcomes are kept as in a .beton file: float32, or float64 where that would round them."""
    if source.offset_dtype is not None:
        return np.dtype("float64")
    return np.dtype("float32") if np.can_cast(source.y_dtype, "float32", "safe") else np.dtype("float64")


def encode(
    source: Source, first: int, last: int, x_dtype: np.dtype, y_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Rows first..last-1 as a .beton file holds them: columns, and outcomes less their offsets."""
    m, T = last - first, source.targets.width
    x = np.empty((m, sum(part.width for part in source.parts)), dtype=x_dtype)
    y = np.empty((m, T), dtype=source.y_dtype)
    offset = None if source.offset_dtype is None else np.empty((m, T), dtype=source.offset_dtype)
    source.fill(first, last, x, y, offset)
    outcomes = y.astype(y_dtype)
    return x, outcomes if offset is None else outcomes - offset
