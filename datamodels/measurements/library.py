"""Measurements by name: what they need, which keys they fill, and one call that measures what is asked for.

A measurement is a function whose parameters say what it needs of a model and a data set (`NEEDS`):

    @measurement(role="benefit", columns={"": (), "per_class": (10,)})
    def recall(logits, labels, *, threshold=0.5): ...

`other_<need>` is the same of a second data set (a drop from one to the other), `reference_<need>` of a second model on
the same data. A parameter that is no need is an option and has a default; a need with a default is passed where it can
be had. Names are written as `recall`, `recall?threshold=0.9&as=recall_90` (options, and a name for its keys),
`my_study.metrics.recall` (anybody's function, decorated or not), or as one of `GROUPS`; each of these may end in where
it is measured, `recall@digits/test,noisy/test`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from datamodels.errors import MeasurementError

ROLES = ("property", "benefit")

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "features": "penultimate representation, float64 (n, d)",
        "logits": "output of the model's head, float64 (n, c)",
        "labels": "class of each example, int64 (n,)",
        "num_classes": "how many classes the data set has, whether all are kept or not",
        "inputs": "the examples as the data set gives them: images float32 (n, c, h, w) in [0, 1], texts, or (n, ...)",
        "groups": "group of each example, (n,)",
        "factors": "known factors of variation of each example, (n, k)",
        "embed": "function of inputs to features (n, d), in batches",
        "predict": "function of inputs to logits (n, c), in batches",
        "model": "torch module in eval mode: a batch of `data`'s inputs to logits",
        "data": "(inputs, labels): tensors that `model` and `loss_fn` take, of some examples where there are many",
        "loss_fn": "function of (logits, labels) to their mean loss, a scalar tensor",
        "checkpoint": "the model's name, as whoever asks calls it",
        "seed": "int that all randomness of the measurement comes from",
    }
)
FAILURES = (Exception, SystemExit)  # what a measurement may end in; a worker's own ends, as at a timeout, are neither
SAMPLES = ("sample_ids", "sample_labels", "sample_predictions")  # of the first examples of a data set
_WITHOUT_DATA = ("model", "checkpoint", "seed")
_OF_A_PASS = ("features", "logits")
_PREFIXES = ("other_", "reference_")

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (
            "num_params",
            "log_me",
            "h_score_shrunk",
            "linear_probe",
            "effective_rank",
            "anisotropy",
            "weight_norms",
        ),
        "transferability": ("num_params", "log_me", "leep", "nce", "h_score", "h_score_shrunk", "parc", "linear_probe"),
        "calibration": ("accuracy", "nll", "brier", "calibration_error"),
        "fairness": ("accuracy", "group_accuracy"),
        "robustness": ("accuracy", "corruption", "adversarial"),
        "shift": ("accuracy_drop",),
        "geometry": ("effective_rank", "anisotropy", "equivariance", "invariance"),
        "landscape": ("weight_norms", "sharpness", "llc"),
    }
)
_SHIPPED = ("transfer", "benefits", "properties")  # modules beside this one

_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

Columns = Mapping[str, tuple[int, ...]]


class Unmet(MeasurementError):
    """A measurement asks for something that this model or this data set does not have."""


@dataclass(frozen=True)
class Measurement:
    """A function, what it needs (its parameters' names) and what it returns.

    Parameters
    ----------
    columns : shape of each number it returns by the suffix of its key, "" for none; or a function of the options to
        that. A function with the one column "" returns a number or an array, any other a dict by suffix.
    role : `property` of the model itself (or of it and the data it sees), or `benefit` downstream.
    infinite : infinities are results; otherwise they are failures, as NaN always is.

    Raises MeasurementError for a parameter that is neither a need nor an option with a default.
    """

    name: str
    function: Callable[..., Any]
    role: str = "property"
    columns: Columns | Callable[..., Columns] = field(default_factory=lambda: {"": ()})
    infinite: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise MeasurementError(f"measurement {self.name}: expected a role of {', '.join(ROLES)}, got {self.role!r}")
        if not self.name.isidentifier():
            raise MeasurementError(f"measurement {self.name!r}: expected a name that is an identifier; give it one")
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise MeasurementError(f"measurement {self.name}: expected parameters by name, got {parameter}")
            if parameter.default is parameter.empty and _need(parameter.name) is None:
                raise MeasurementError(
                    f"measurement {self.name}: its parameter {parameter.name!r} is no need and has no default; needs "
                    f"are {', '.join(NEEDS)}, and the same behind {' or '.join(_PREFIXES)}"
                )

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """The needs among its parameters that have no default."""
        return tuple(p.name for p in self._parameters if _need(p.name) and p.default is p.empty)

    @functools.cached_property
    def wishes(self) -> tuple[str, ...]:
        """The needs among its parameters that have a default: passed where they can be had."""
        return tuple(p.name for p in self._parameters if _need(p.name) and p.default is not p.empty)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Its other parameters, with their defaults."""
        return {p.name: p.default for p in self._parameters if not _need(p.name)}

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    @property
    def num_datasets(self) -> int:
        """0 where it looks at the model alone, 2 where it compares two data sets, otherwise 1."""
        if any(need.startswith("other_") for need in self.needs):
            return 2
        return int(any(need not in _WITHOUT_DATA for need in self.needs))

    @property
    def takes_a_pass(self) -> bool:
        """Whether it needs the model's answers to the whole data set."""
        return any(_need(need) in _OF_A_PASS for need in self.needs)


def _need(parameter: str) -> str | None:
    """The entry of NEEDS that a parameter asks for, if any."""
    for prefix in ("", *_PREFIXES):
        if parameter.startswith(prefix) and parameter.removeprefix(prefix) in NEEDS:
            return parameter.removeprefix(prefix)
    return None


def measurement(
    *,
    role: str = "property",
    name: str | None = None,
    columns: Columns | Callable[..., Columns] | None = None,
    infinite: bool = False,
) -> Callable[[Callable[..., Any]], Measurement]:
    """Makes a `Measurement` of a function; it can still be called as before."""

    def decorate(function: Callable[..., Any]) -> Measurement:
        return Measurement(
            name or function.__name__, function, role, {"": ()} if columns is None else columns, infinite
        )

    return decorate


# ---------------------------------------------------------------------------------- names and what they stand for


@dataclass(frozen=True)
class Asked:
    """A measurement with the options and the stem of keys that a spec gives it."""

    measurement: Measurement
    stem: str
    options: Mapping[str, Any]

    @functools.cached_property
    def columns(self) -> Columns:
        columns = self.measurement.columns
        return dict(columns(**{**self.measurement.options, **self.options}) if callable(columns) else columns)

    def key(self, suffix: str) -> str:
        return f"{self.stem}_{suffix}" if suffix else self.stem


def shipped() -> dict[str, Measurement]:
    """The library's own measurements by name."""
    package = __name__.rpartition(".")[0]
    modules = [importlib.import_module(f"{package}.{name}") for name in _SHIPPED]
    return {m.name: m for module in modules for m in vars(module).values() if isinstance(m, Measurement)}


def resolve(names: Iterable[str]) -> list[Asked]:
    """Names, dotted paths and groups (groups may overlap) as measurements, each once, in order.

    Raises MeasurementError for what cannot be found, an unknown option, or two that would fill the same keys.
    """
    return [asked for asked, _ in _resolve(names, ())]


def _resolve(names: Iterable[str], on: Sequence[str]) -> list[tuple[Asked, tuple[str, ...]]]:
    """`resolve`, each with its entries: those behind its `@`, and those of `on` where it also stands without one."""
    own = shipped()
    found: dict[str, tuple[str, Asked, dict[str, None]]] = {}  # by stem
    for given in names:
        name, entries = located(given)
        for text in GROUPS.get(name, (name,)):
            asked = _one(text, own)
            before, _, where = found.setdefault(asked.stem, (text, asked, {}))
            if before != text:
                raise MeasurementError(
                    f"measurements: {before!r} and {text!r} would both fill the keys of {asked.stem!r}; give one "
                    f"another name, as in {text}{'&' if '?' in text else '?'}as={asked.stem}_2"
                )
            where.update(dict.fromkeys(on if entries is None else entries))
    return [(asked, tuple(where)) for _, asked, where in found.values()]


def located(text: str) -> tuple[str, tuple[str, ...] | None]:
    """`accuracy@a/test,b/test` as the name and the entries where it is measured, or None. Raises MeasurementError."""
    name, at, where = text.rpartition("@")
    if not at:
        return text, None
    entries = tuple(entry.strip() for entry in where.split(","))
    if not name or not all(entries):
        raise MeasurementError(
            f"measurements: expected name@<data set>/<split>, or several behind the @ with commas between, got {text!r}"
        )
    return name.strip(), entries


def places(names: Iterable[str], on: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """All entries where something is measured: those of `on` and those behind an `@`; None: what a row brings."""
    behind = [entry for text in names for entry in located(text)[1] or ()]
    return tuple(dict.fromkeys((*(on or ()), *behind))) if on is not None or behind else None


def _one(text: str, own: Mapping[str, Measurement]) -> Asked:
    name, options = parse(text)
    if name in own:
        found = own[name]
    elif _DOTTED.fullmatch(name):
        found = _import(name)
    else:
        known = ", ".join(sorted(own))
        raise MeasurementError(
            f"measurements: there is no {name!r}; expected one of {known}; a group, {', '.join(GROUPS)}; or the dotted "
            f"path of a function of yours, as in my_study.metrics.sharp"
        )
    stem = str(options.pop("as", found.name))
    if not _STEM.fullmatch(stem):
        raise MeasurementError(f"measurements: {text!r}: {stem!r} cannot be part of a key; use letters, digits, _ . -")
    for option in options:
        if option not in found.options:
            raise MeasurementError(
                f"measurements: {text!r}: {name} has no option {option!r}; it has {', '.join(found.options) or 'none'}"
            )
    return Asked(found, stem, options)


def _import(path: str) -> Measurement:
    found = attribute(path, f"measurements: {path!r}")
    if isinstance(found, Measurement):
        return found
    if not callable(found):
        raise MeasurementError(f"measurements: {path!r}: expected a function, got {type(found).__name__}")
    return Measurement(path.rpartition(".")[2], found)


def attribute(path: str, where: str) -> Any:
    """What a dotted path `package.module.name` names; MeasurementError, beginning with `where`, where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise MeasurementError(
            f"{where}: there is no module {module!r}; run it from the folder that the name begins in, or set PYTHONPATH"
        ) from None
    except AttributeError:
        raise MeasurementError(f"{where}: module {module} has no {name!r}") from None


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`name?a=1&b=x,y` as the name and its options: numbers, true, false, none, text; with commas, lists of them."""
    name, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not key or not equals or key in options:
            raise MeasurementError(f"{text!r}: expected name?option=value&option=value, got {part!r}")
        options[key] = [_value(v) for v in value.split(",")] if "," in value else _value(value)
    return name, options


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# ------------------------------------------------------------------------------------------ what goes where


@dataclass(frozen=True)
class Cell:
    """One measurement at one place: a data set, a pair of them, or (no data sets) the model alone."""

    asked: Asked
    prefix: str
    datasets: tuple[str, ...] | None  # None: those that `measure` is given

    def __str__(self) -> str:
        return " on ".join(filter(None, (self.asked.stem, "->".join(self.datasets or ()))))

    @property
    def keys(self) -> dict[str, tuple[int, ...]]:
        """Its keys and their shapes."""
        return {self.prefix + self.asked.key(suffix): shape for suffix, shape in self.asked.columns.items()}

    @property
    def seconds(self) -> str:
        """The key of the time it took."""
        return f"{self.prefix}seconds_{self.asked.stem}"

    @property
    def inference(self) -> str | None:
        """The key of the time of the forward pass that it shares with others, if it needs one."""
        return f"{self.prefix}seconds_inference" if self.asked.measurement.takes_a_pass else None


def plan(names: Iterable[str], on: Sequence[str] | None = None) -> list[Cell]:
    """Which measurement goes where: where its name says, or on every one of `on`, or on the data set that a row brings.

    The last where there is no `on` and no name says where. `on`, and what stands behind an `@`, has entries
    `digits/test`, whose keys begin with `digits_test_`, and pairs `digits/test->noisy/test`, with
    `digits_test_to_noisy_test_`; a measurement that compares two data sets is for the pairs, all others for the rest.
    What looks at the model alone has the same plain keys everywhere. Raises MeasurementError.
    """
    names = list(names)
    per_row = places(names, on) is None
    cells: list[Cell] = []
    for asked, entries in _resolve(names, on or ()):
        count = asked.measurement.num_datasets
        if count == 0:
            cells.append(Cell(asked, "", ()))
        elif per_row:
            cells.append(Cell(asked, "", None))
        else:
            here = [Cell(asked, prefix, sets) for prefix, sets in map(place, entries) if len(sets) == count]
            if not here:
                form = "a pair of data sets, as in digits/test->noisy/test" if count == 2 else "a data set"
                raise MeasurementError(
                    f"measurements, on: {asked.stem} needs {form}; got {', '.join(entries) or 'none'}; say where, as "
                    f"in {asked.stem}@digits/test, or with `on`"
                )
            cells += here
    seen: dict[str, Cell] = {}
    for cell in cells:
        for key in (*cell.keys, cell.seconds):
            if seen.setdefault(key, cell) is not cell:
                raise MeasurementError(
                    f"measurements: {seen[key]} and {cell} would both fill {key!r}; rename one of them"
                )
    return cells


def place(entry: str) -> tuple[str, tuple[str, ...]]:
    """The beginning of the keys of an entry of `on`, and its data sets. Raises MeasurementError."""
    datasets = split_pair(entry)
    # of a dotted path the last part, as in the name of a measurement
    short = [name.rpartition(".")[2] if _DOTTED.fullmatch(name.partition("/")[0]) else name for name in datasets]
    prefix = "_to_".join(name.replace("/", "_") for name in short) + "_"
    if len(datasets) > 2 or any(name.count("/") > 1 for name in datasets) or not _STEM.fullmatch(prefix):
        raise MeasurementError(
            f"measurements, on: expected <data set>/<split>, or two of them as in a/test->b/test, in letters, digits, "
            f"_ . -, got {entry!r}; give a data set with a longer name a short one (measure.data)"
        )
    return prefix, datasets


def split_pair(entry: str) -> tuple[str, ...]:
    """The data sets of an entry of `on`: `a/test->b/test` has two."""
    return tuple(name.strip() for name in entry.split("->"))


def schema(names: Iterable[str], on: Sequence[str] | None = None, samples: int = 0) -> dict[str, dict[str, Any]]:
    """The entries that `measure` of the same names needs in a store's schema: {key: {shape, dtype, role, …}}.

    All float64 and optional; a failed one is NaN there. `seconds_<name>` beside each, and `seconds_inference` for each
    data set that the model is asked about as a whole. With `samples`, the int64 keys of SAMPLES for as many examples of
    each data set. Raises MeasurementError.
    """
    names = list(names)
    entries: dict[str, dict[str, Any]] = {}
    plain = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True}
    for cell in plan(names, on):
        for key, shape in cell.keys.items():
            entries[key] = {**plain, "shape": list(shape), "role": cell.asked.measurement.role}
        for key in filter(None, (cell.seconds, cell.inference)):
            entries[key] = dict(plain)
    listed = places(names, on)
    singles = [""] if listed is None else [place(one)[0] for entry in listed for one in split_pair(entry)]
    for key in [prefix + key for prefix in dict.fromkeys(singles) for key in SAMPLES] if samples else ():
        if key in entries:
            raise MeasurementError(
                f"measurements: {key!r} is filled by `samples` too; give the measurement another name"
            )
        entries[key] = {"shape": [samples], "dtype": "int64", "required": False}
    return entries


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    names: Iterable[str],
    views: Mapping[str, Mapping[str, Any]],
    *,
    on: Sequence[str] | None = None,
    keys: Iterable[str] | None = None,
) -> dict[str, Any]:
    """What is asked for, by key: float64 arrays, or the exception of a measurement that failed.

    Parameters
    ----------
    views : for each data set (as `on` names it) what is known of the model on it: needs by name, as
        `datamodels.measurements.view.View` computes them when first asked for, or a dict. Without `on`, one data set,
        or two to be compared, first and other.
    keys : measure only what fills one of these, and return only these; by default everything.

    A failure is a value, of the time too, and stops nothing else; so are an unmet need, a shape that was not declared,
    and a result that is not finite unless declared. Raises MeasurementError only for `names` and `on` themselves.
    """
    wanted = None if keys is None else set(keys)
    results: dict[str, Any] = {}
    passes: dict[str, tuple[str, ...]] = {}
    for cell in plan(names, on):
        datasets = tuple(views) if cell.datasets is None else cell.datasets
        if wanted is None or not wanted.isdisjoint((*cell.keys, cell.seconds)):
            results.update(_measure(cell, datasets, views))
        if cell.inference:
            passes[cell.inference] = datasets
    for key, datasets in passes.items():
        if wanted is None or key in wanted:
            try:
                results[key] = np.float64(sum(_get(views, name)["seconds_inference"] for name in datasets))
            except KeyError:
                if wanted is not None:
                    results[key] = Unmet(f"{key}: nobody timed a forward pass of {', '.join(datasets) or 'this model'}")
            except FAILURES as error:
                results[key] = error
    return {key: value for key, value in results.items() if wanted is None or key in wanted}


def _measure(cell: Cell, datasets: tuple[str, ...], views: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a cell's keys and its time; where anything goes wrong the exception in place of each."""
    try:
        arguments = _arguments(cell, datasets, views)
        started = time.perf_counter()
        value = cell.asked.measurement.function(**arguments, **cell.asked.options)
        seconds = time.perf_counter() - started
        return {**_checked(cell, value), cell.seconds: np.float64(seconds)}
    except FAILURES as error:
        return dict.fromkeys((*cell.keys, cell.seconds), error)  # so that who tries it again is told to ask for both


def _arguments(cell: Cell, datasets: tuple[str, ...], views: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the measurement needs; a forward pass happens here, before its own time is taken."""
    made = cell.asked.measurement
    if made.num_datasets and len(datasets) != made.num_datasets:
        raise Unmet(
            f"{cell.asked.stem}: needs {made.num_datasets} data set{'s' * (made.num_datasets > 1)}, got "
            f"{', '.join(datasets)}; two to be compared are written a/test->b/test"
        )
    if not datasets:
        datasets = tuple(views)[:1]  # it looks at the model, which is the same everywhere
    arguments: dict[str, Any] = {}
    for need in (*made.needs, *made.wishes):
        name = datasets[1] if need.startswith("other_") and len(datasets) > 1 else datasets[0]
        try:
            arguments[need] = _get(views, name)[need.removeprefix("other_")]
        except KeyError:
            if need in made.needs:
                raise Unmet(f"{cell.asked.stem}: needs {need}, which {name or 'this model'} does not have") from None
        except Unmet as error:
            if need in made.needs:
                raise Unmet(f"{cell.asked.stem}: {error}") from None
    return arguments


def _get(views: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    try:
        return views[name]
    except KeyError:
        raise Unmet(f"data set {name!r}: expected one of {', '.join(views)}") from None


def _checked(cell: Cell, value: Any) -> dict[str, np.ndarray]:
    """The measurement's result by key, as float64 arrays of the declared shapes."""
    columns = cell.asked.columns
    if not isinstance(value, Mapping):
        value = {"": value}
    if set(value) != set(columns):
        raise MeasurementError(
            f"{cell.asked.stem}: declared the columns {sorted(columns)}, returned {sorted(map(str, value))}; fix "
            f"`columns` or what it returns"
        )
    checked = {}
    for suffix, shape in columns.items():
        given = value[suffix]
        array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float64)
        where = f"{cell.asked.stem}{f', {suffix}' if suffix else ''}"
        if array.shape != tuple(shape):
            raise MeasurementError(f"{where}: declared shape {list(shape)}, returned {list(array.shape)}")
        if np.isnan(array).any() or (not cell.asked.measurement.infinite and np.isinf(array).any()):
            raise MeasurementError(f"{where}: the result is not finite ({array})")
        checked[cell.prefix + cell.asked.key(suffix)] = array
    return checked
