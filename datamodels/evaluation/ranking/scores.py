"""What was measured of models on data sets, read from a store, a table or a file of names and numbers."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodels.errors import ConfigError, RankingError, StoreError
from datamodels.spec import nearest

if TYPE_CHECKING:
    from datamodels.design import Design
    from datamodels.spec import Field
    from datamodels.store.rows import Rows

FINE_TUNED = "after fine-tuning"  # how actual performances came to be, in words that follow their name
ALL = "all"  # the data set where nothing says which
NO_SAMPLES = -1
ALL_SAMPLES = 0  # as `worker_scripts.measure` understands it
SPLITS = ("train", "val", "validation", "test")
TIMES = ("seconds", "seconds_")
_NAMES = ("model", "dataset", "split")
_SEEDS = ("seed", "sample_seed")
_FACTS = ("row", "role", "mask_id", "seed", "attempts", "started", "finished", "seconds", "run")  # of an export
_ENTRY = re.compile(r".*\[\d+\]")
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Scores:
    """Measurements, a line each; the lines of one model, data set, split and number of samples differ by their seed.

    models, datasets, splits: (n,) text, "" for a split that nothing says.  n_samples: (n,) int64, 0 for all there are,
    -1 where nothing says.  values: name -> (n,) float64, NaN where one is missing; an infinity is a value.
    benefits: those names whose role is `benefit`.  incomplete: rows of a store that are not complete and so not here.
    """

    where: str
    models: np.ndarray
    datasets: np.ndarray
    splits: np.ndarray
    n_samples: np.ndarray
    values: Mapping[str, np.ndarray]
    benefits: frozenset[str] = frozenset()
    incomplete: int = 0

    def metrics(self) -> tuple[str, ...]:
        """Names to rank by where nobody chose any: all but benefits and times."""
        return tuple(name for name in self.values if name not in self.benefits and not name.startswith(TIMES))

    def known(self, name: str) -> None:
        """RankingError unless there is a measurement of that name."""
        if name not in self.values:
            raise RankingError(f"{self.where}: no measurement {name!r}{nearest(name, self.values)}")

    def of(self, **wanted: Any) -> Scores:
        """The lines with these values of datasets, splits or n_samples; RankingError for one that no line has."""
        kept = np.ones(len(self.models), bool)
        for column, value in wanted.items():
            values, listed = getattr(self, column), value if isinstance(value, list | tuple) else [value]
            for one in listed:
                if one not in values:
                    levels = np.unique(values).tolist()
                    what = {"n_samples": "n_samples", "splits": "split", "datasets": "data set"}[column]
                    hint = nearest(one, levels) if isinstance(one, str) else f"; there are {some(levels)}"
                    raise RankingError(f"{self.where}: nothing was measured with {what} {one!r}{hint}")
            kept &= np.isin(values, listed)
        return self.take(kept)

    def take(self, lines: np.ndarray) -> Scores:
        return Scores(
            self.where,
            self.models[lines],
            self.datasets[lines],
            self.splits[lines],
            self.n_samples[lines],
            {name: values[lines] for name, values in self.values.items()},
            self.benefits,
            self.incomplete,
        )

    def mean(self) -> Grid:
        """Means over the seeds; RankingError where lines of several splits or numbers of samples would be mixed.

        Where a seed gave an infinity, so is the mean; NaN where one gave inf and another -inf.
        """
        for column, option in (("splits", "--split"), ("n_samples", "--n_samples")):
            levels = np.unique(getattr(self, column)).tolist()
            if len(levels) > 1:
                raise RankingError(f"{self.where}: it has {column} {some(levels)}; choose one with {option}")
        models, datasets = (tuple(dict.fromkeys(values.tolist())) for values in (self.models, self.datasets))
        rows = np.array([models.index(name) for name in self.models], int)
        columns = np.array([datasets.index(name) for name in self.datasets], int)
        cells = rows * len(datasets) + columns
        shape, means, spreads, seeds = (len(models), len(datasets)), {}, {}, {}
        for name, values in self.values.items():
            there = ~np.isnan(values)
            count = np.bincount(cells[there], minlength=shape[0] * shape[1])
            total = np.bincount(cells[there], values[there], minlength=len(count))
            mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
            # Seeds that agree agree exactly: rounding must not break a tie between models, nor make a spread.
            first = np.full(len(count), np.nan)
            first[cells[there][::-1]] = values[there][::-1]
            same = np.bincount(cells[there], values[there] != first[cells[there]], minlength=len(count)) == 0
            mean = np.where(same, first, mean)
            with np.errstate(invalid="ignore"):  # an infinite mean has no spread: NaN
                off = np.bincount(cells[there], (values[there] - mean[cells[there]]) ** 2, minlength=len(count))
            spread = np.sqrt(np.divide(off, count - 1, out=np.full(len(count), np.nan), where=count > 1))
            means[name], spreads[name], seeds[name] = mean.reshape(shape), spread.reshape(shape), count.reshape(shape)
        return Grid(self.where, models, datasets, means, spreads, seeds)


@dataclass(frozen=True, eq=False)
class Grid:
    """Measurements of M models on D data sets, averaged over seeds.

    values, spreads, seeds: name -> (M, D): the mean, NaN where it is missing; the standard deviation over seeds, NaN
    for fewer than two and for infinities; how many seeds there were.  how: where actual performances come from.
    """

    where: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    spreads: Mapping[str, np.ndarray]
    seeds: Mapping[str, np.ndarray]
    how: str = FINE_TUNED


def read(path: str | Path, *, rows: Sequence[str] = (), option: str = "--rows") -> Scores:
    """Measurements from a store, or a table (.csv, .parquet) such as `store export` writes.

    What a line is of say the factors, keys or columns `model`, `dataset`, `split` and `n_samples`. Where there is no
    `dataset`, keys are taken for `<dataset>_<split>_<name>`. `rows` are conditions on the design, as in
    `datamodels.row_filter`, which `option` gave.

    Raises RankingError where models or numbers are missing, or where another factor differs between lines, which would
    be averaged; StoreError for a row that is not as it was committed.
    """
    path = Path(path)
    if path.suffix in (".csv", ".parquet"):
        if rows:
            raise ConfigError(f"{option}: {path} is a table and has no design; choose its lines when you export it")
        return _from_table(path)
    return _from_store(path, rows, option)


# ---------------------------------------------------------------------------------------------- from a store


def _from_store(path: Path, rows: Sequence[str], option: str) -> Scores:
    from datamodels import row_filter
    from datamodels.store import Store
    from datamodels.store.rows import batches, read_rows

    with Store.open(path) as store:
        wanted = row_filter.select(store.design, rows, where=option) if rows else np.ones(store.num_models, bool)
        complete = np.flatnonzero(wanted & store.completed())
        if not len(complete):
            asked = "none of the rows asked for" if rows else "no row"
            raise RankingError(f"{path}: {asked} is complete, so there is nothing to rank; run the workers first")
        fields = [f for f in store.spec.schema.values() if f.shape == () and f.dtype != "bits"]
        names = [field.name for field in fields]
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for batch in batches(store, complete, names):
            read = read_rows(store, batch, names)
            for row, what in read.damaged.items():
                raise StoreError(
                    f"{path}: row {row}: {what}; nothing is ranked; python -m datamodels.store repair {path} says what "
                    f"can be done"
                )
            for field in fields:
                found[field.name].append(_decoded(field, read))
        keys = {name: np.concatenate(parts) for name, parts in found.items()}
        factors = _factors(store.design, complete)
        on = (store.spec.measurements or {}).get("on")
        roles = {field.name: field.role for field in fields}
        incomplete = int(wanted.sum()) - len(complete)
    _refuse_mixed(path, factors, f"choose one with {option}={{name}}=…")
    values = {n: v for n, v in keys.items() if v.dtype.kind != "U" and n not in factors and roles[n] != "mask"}
    lines = _lines(str(path), {**keys, **factors}, values, on)
    melted = {name: [key for key in roles if key == name or key.endswith(f"_{name}")] for name in lines.values}
    benefits = frozenset(n for n, found_ in melted.items() if found_ and all(roles[k] == "benefit" for k in found_))
    return Scores(**{**vars(lines), "benefits": benefits, "incomplete": incomplete})


def _decoded(field: Field, read: Rows) -> np.ndarray:
    """A scalar key of some rows, (rows,): text, or float64 with NaN where a row does not have it."""
    blobs = read.blobs[field.name]
    stored = np.frombuffer(b"".join(blob or bytes(field.nbytes) for blob in blobs), field.disk_dtype)
    values = field.decode(stored.reshape(len(blobs), *field.disk_shape))
    if values.dtype.kind == "U":
        return values
    return np.where([blob is None for blob in blobs], np.nan, values.astype(np.float64))


def _factors(design: Design, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The level of each factor in some rows, as an array of objects; None where a row's block does not have it."""
    block = np.searchsorted(design.starts, rows, side="right") - 1
    cells = [
        design.blocks[b].cells[design.blocks[b].locate(int(row - design.starts[b]))[0]]
        for b, row in zip(block.tolist(), rows, strict=True)
    ]
    columns = {}
    for name in design.factors:
        column = np.empty(len(rows), object)
        column[:] = [cell.get(name) for cell in cells]
        columns[name] = column
    return columns


def _refuse_mixed(path: Path, factors: Mapping[str, np.ndarray], advice: str) -> None:
    """RankingError where lines differ in more than a model, a data set, a split, a number of samples and a seed."""
    for name, column in factors.items():
        levels = list(dict.fromkeys(level for level in column.tolist() if level is not None))
        if name not in (*_NAMES, "n_samples", *_SEEDS) and len(levels) > 1:
            raise RankingError(
                f"{path}: the factor {name!r} has the levels {some(levels)}, whose values would be averaged; "
                f"{advice.format(name=name)}. Only repeats, and the factors {' and '.join(_SEEDS)}, are averaged over"
            )


# ---------------------------------------------------------------------------------------------- from a table


def _from_table(path: Path) -> Scores:
    columns = _csv_columns(path) if path.suffix == ".csv" else _parquet_columns(path)
    names = list(columns)
    if {"row", "seed", "attempts"} <= set(names) and names.index("seed") < names.index("attempts"):
        between = names[names.index("seed") + 1 : names.index("attempts")]  # where an export has its factors
        _refuse_mixed(path, {name: columns[name] for name in between}, "export one of them with --rows={name}=…")
        names = [name for name in names if name not in between]
    values = {}
    for name in names:
        if name in (*_NAMES, "n_samples", *_FACTS) or _ENTRY.fullmatch(name):
            continue
        numbers = [as_number(cell) for cell in columns[name].tolist()]
        if any(number is not None for number in numbers) and not any(
            number is None and cell not in ("", None) for number, cell in zip(numbers, columns[name], strict=True)
        ):
            values[name] = np.array([math.nan if number is None else number for number in numbers])
    return _lines(str(path), columns, values, None)


def _csv_columns(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise RankingError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if len(lines) < 2:
        raise RankingError(f"{path}: expected a line of names and a line per measurement, got {len(lines)} lines")
    head, body = lines[0], [line for line in lines[1:] if line]
    for number, line in enumerate(body, 2):
        if len(line) != len(head):
            raise RankingError(
                f"{path}, line {number}: expected {len(head)} values, as the first line has names, got {len(line)}"
            )
    if len(set(head)) < len(head):
        raise RankingError(f"{path}: a column stands there twice: {some(n for n in set(head) if head.count(n) > 1)}")
    return {name: np.array([line[i] for line in body], object) for i, name in enumerate(head)}


def _parquet_columns(path: Path) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"{path}: pyarrow reads parquet and is not installed; pip install 'datamodels-store[table]', or export "
            f"to csv"
        )
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise RankingError(f"{path}: cannot be read as parquet: {error}") from None
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not (pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type)):
            columns[name] = np.array(column.to_pylist() + [None], object)[:-1]
    return columns


def as_number(cell: Any) -> float | None:
    """A cell as a number, or None for text, for nothing and for what is missing."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str) and cell.strip().lower() in ("true", "false"):
        return float(cell.strip().lower() == "true")
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------ in common


def _lines(
    where: str, columns: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], on: Sequence[str] | None
) -> Scores:
    if "model" not in columns:
        raise RankingError(
            f"{where}: nothing says which model a line is of; expected a factor, a key or a column called 'model', "
            f"found {some(columns)}"
        )
    count = len(columns["model"])
    text = {name: _text(where, name, columns[name]) for name in _NAMES if name in columns}
    samples = np.full(count, NO_SAMPLES, np.int64)
    if "n_samples" in columns:
        for line, cell in enumerate(columns["n_samples"].tolist()):
            number = as_number(cell)
            if number is not None and math.isfinite(number):
                samples[line] = int(number)
    values = {name: v for name, v in values.items() if name not in (*_NAMES, "n_samples", *_SEEDS)}
    if "dataset" not in text and (places := _places(values, on)):
        return _melted(where, text, samples, values, places)
    scores = Scores(
        where,
        text["model"],
        text.get("dataset", np.full(count, ALL)),
        text.get("split", np.full(count, "")),
        samples,
        values,
    )
    return _some_numbers(scores)


def _some_numbers(scores: Scores) -> Scores:
    if not scores.values:
        raise RankingError(f"{scores.where}: it holds no number per line that could be a score")
    return scores


def _text(where: str, name: str, column: np.ndarray) -> np.ndarray:
    words = ["" if cell is None else str(cell) for cell in column.tolist()]
    if name != "split" and "" in words:
        raise RankingError(f"{where}: line {words.index('')} has no {name}; every line needs one")
    return np.array(words)


def _places(names: Iterable[str], on: Sequence[str] | None) -> dict[str, tuple[str, str, str] | None]:
    """Key -> (data set, split, measurement), of those that are `<dataset>_<split>_<name>`; None for those of a pair."""
    if on is not None:
        places: dict[str, tuple[str, str, str] | None] = {}
        for entry in sorted(on, key=len):  # of two prefixes that fit the longer one stays
            prefix = entry.replace("->", "_to_").replace(" ", "").replace("/", "_") + "_"
            dataset, _, split = entry.rpartition("/")
            for key in names:
                if key.startswith(prefix):
                    places[key] = None if "->" in entry else (dataset, split, key.removeprefix(prefix))
        return places
    form = re.compile(rf"(.+?)_({'|'.join(SPLITS)})_(.+)")
    return {key: match.groups() for key in names if not key.startswith(TIMES) and (match := form.fullmatch(key))}  # type: ignore[misc]


def _melted(
    where: str,
    text: Mapping[str, np.ndarray],
    samples: np.ndarray,
    values: Mapping[str, np.ndarray],
    places: Mapping[str, tuple[str, str, str] | None],
) -> Scores:
    """A line per model, data set and split from a line per model; what belongs to no data set belongs to all."""
    everywhere = {name: column for name, column in values.items() if name not in places}
    placed = {key: place for key, place in places.items() if place is not None}
    pairs = list(dict.fromkeys((dataset, split) for dataset, split, _ in placed.values()))
    names = list(dict.fromkeys([name for _, _, name in placed.values()] + list(everywhere)))
    count = len(samples)
    long = {name: np.full((len(pairs), count), np.nan) for name in names}
    for at in range(len(pairs)):
        for name, column in everywhere.items():
            long[name][at] = column
    for key, (dataset, split, name) in placed.items():
        long[name][pairs.index((dataset, split))] = values[key]
    return Scores(
        where,
        np.tile(text["model"], len(pairs)),
        np.repeat([dataset for dataset, _ in pairs], count),
        np.repeat([split for _, split in pairs], count),
        np.tile(samples, len(pairs)),
        {name: column.ravel() for name, column in long.items()},
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name without what all of them share; the whole of them where that would not tell them apart.

    Of a path, and of a dotted path to a function, the last parts that differ stay; of options behind a `?`, those that
    not all have. Where only options differ they stand alone: `width=8`, `width=64&classes=5`.
    """
    names = list(dict.fromkeys(names))
    bases = [name.partition("?")[0] for name in names]
    asked = [[option for option in name.partition("?")[2].split("&") if option] for name in names]
    shared = set.intersection(*map(set, asked)) if len(names) > 1 else set()
    options = ["&".join(option for option in one if option not in shared) for one in asked]
    parts = [_parts(base) for base in bases]
    last = [len(part) for part in parts]
    if len(set(bases)) > 1:  # what all end in tells nothing, unless it is all there is
        while min(last) > 1 and len({part[end - 1][0] for part, end in zip(parts, last, strict=True)}) == 1:
            last = [end - 1 for end in last]
    for count in range(1, max(last) + 1):
        short = []
        for part, end, option in zip(parts, last, options, strict=True):
            base = "".join(word + mark for word, mark in part[max(0, end - count) : end])[
                : -len(part[end - 1][1]) or None
            ]
            alone = option and len(set(bases)) == 1 and len(names) > 1
            short.append(option if alone else f"{base}?{option}" if option else base)
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _parts(base: str) -> list[tuple[str, str]]:
    """A name's parts, each with the mark behind it: of a path, of a kind before a colon, and of a dotted path."""
    head, at, file = base.rstrip("/").partition("@")
    dotted = head.startswith("torch:") or re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){2,}", head)
    cut = re.split(r"([/:.])" if dotted else r"([/:])", head) + ([at, *re.split("(/)", file)] if at else [])
    parts = list(zip(cut[::2], [*cut[1::2], ""], strict=True))
    return [part for part in parts if part[0]] or [(base, "")]


def sizes(n_samples: np.ndarray) -> list[int]:
    """The numbers of samples there are, ascending, "all" last."""
    levels = [level for level in np.unique(n_samples).tolist() if level != NO_SAMPLES]
    return sorted(levels, key=lambda level: (level == ALL_SAMPLES, level))


def in_words(n_samples: int) -> str:
    return "all" if n_samples == ALL_SAMPLES else f"{n_samples:,}"


def some(levels: Iterable[Any]) -> str:
    """The first few, and how many more there are."""
    words = [str(level) for level in levels]
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")
