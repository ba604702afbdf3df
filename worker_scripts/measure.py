"""A row is one model, measured: which one and on which data are the design's factors, what is measured is the spec's.

    python -m datamodels.initialize_logdir --logging.logdir=out/scan --logging.spec=specs/scan.json
    python -m datamodels.pool --worker.logdir=out/scan --worker.main_import=worker_scripts.measure
    python -m datamodels.store export out/scan --table scan.parquet

The spec says `"measurements": {"names": ["default"], "samples": 5}`: names of `datamodels.measurements.library`, `"on"`
which data sets, where no factor says so, and of how many examples of each data set `sample_ids`, `sample_labels` and
`sample_predictions` are kept.

Factors, each optional: `model`, `checkpoint` (a file, for a torch module), `dataset`, `split`, `n_samples` (drawn from
the split, classes in proportion; 0: all), `sample_seed` (what draws them), `labels` (the classes kept, as "0,3"),
`keep_size` (how many examples of the split n_samples are drawn from). Models and data sets are named as in
`datamodels.measurements.backbones` and `.datasets`; and
`row:STORE#ROW?factory=package.module.function` is a model of a row of another store: the function is called with those
factors of the row that it takes, and filled with the checkpoint that the row left in its folder.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastargs import Param, Section, get_current_config
from fastargs.validation import And, Checker, InRange, OneOf

from datamodels.errors import ConfigError, MeasurementError
from datamodels.measurements import backbones, datasets, library
from datamodels.measurements.backbones import Backbone
from datamodels.measurements.datasets import Examples
from datamodels.measurements.view import View
from datamodels.store import Store

ALL_FACTORS_ARE_TAKEN = True  # by main: another one is a mistake, as the worker says
SMOKE_BATCHES = 3
SAMPLES = library.SAMPLES
_CHECKPOINTS = ("*.pt", "*.pth", "*.pth.tar")


class Names(Checker):
    """A mapping of short names to long ones, as YAML's or as JSON text."""

    def check(self, value: Any) -> dict[str, str]:
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict) or not all(isinstance(text, str) for item in value.items() for text in item):
            raise ValueError
        return value

    def help(self) -> str:
        return "a mapping"


Section("measure", "what is measured where; the design's factors beat these").params(
    model=Param(str, "the model, where the design has no such factor"),
    dataset=Param(str, "the data set, where the design has no such factor and the spec no `on`"),
    split=Param(str, "the split, where the design has no such factor", default="test"),
    names=Param(str, "what to measure besides the spec's, separated by spaces: for keys added later", default=""),
    reference=Param(str, "a second model, to which agreement compares the first"),
    models=Param(Names(), "short names for models: {small: torch:my.module.make?width=8}", default={}),
    data=Param(Names(), "short names for data sets: {packages: csv:a.csv?text=body&label=topic}", default={}),
    samples=Param(
        And(int, InRange(min=0)),
        "examples of which sample_ids, _labels, _predictions are kept, where the schema has these keys and the spec's "
        "measurements do not say `samples`",
        default=0,
    ),
    batch_size=Param(And(int, InRange(min=1)), "examples in a forward pass", default=64),
    data_examples=Param(
        And(int, InRange(min=2)), "examples that sharpness, llc and adversarial hold in memory, at most", default=1000
    ),
    device=Param(str, "torch's name of one; auto: a GPU where there is one", default="auto"),
    pooling=Param(OneOf(backbones.POOLINGS), "how a transformer's hidden states become one vector", default="auto"),
    max_length=Param(And(int, InRange(min=1)), "tokens of a text", default=256),
    local_files_only=Param(bool, "never look for a model on the network", default=False),
    cache=Param(str, "folder of checkpoints that were fetched", default=str(backbones.CACHE)),
)


def main(
    *,
    keys: Sequence[str],
    measurements: Mapping[str, Any],
    seed: int,
    model: str | None = None,
    checkpoint: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    n_samples: int = 0,
    sample_seed: int | None = None,
    labels: str = "",
    keep_size: int = 0,
    smoke: bool = False,
) -> dict[str, Any]:
    """Measure the model of a row; values by key, and for those that failed their exceptions."""
    row = Row.of(measurements, model=model, checkpoint=checkpoint, dataset=dataset, split=split)
    config = get_current_config()
    sample_seed = seed if sample_seed is None else sample_seed
    kept = [word.strip() for word in str(labels).split(",") if word.strip()]

    def examples(place: str) -> Examples:
        found = _examples(*row.places[place])
        found = found.keep(kept) if kept else found
        for size in (keep_size, n_samples):
            found = found.sample(size, seed=sample_seed) if size else found
        most = SMOKE_BATCHES * config["measure.batch_size"]
        return found.sample(most, seed=sample_seed) if smoke and len(found) > most else found

    def view(place: str) -> View:
        made = data[place]
        return View(
            _backbone(row.model, made.kind, *_settings()),
            made,
            batch_size=config["measure.batch_size"],
            seed=sample_seed,
            reference=_backbone(row.reference, made.kind, *_settings()) if row.reference else None,
            data_examples=config["measure.data_examples"],
            name=model or config["measure.model"],
        )

    data, views = Each(row.places, examples), Each(row.places, view)
    # Without its model, or any data, a row fails as a whole; one data set of several fails by itself.
    kind = data.first().kind
    for name in filter(None, (row.model, row.reference)):
        _backbone(name, kind, *_settings())
    found = library.measure(row.names, views, on=row.on, keys=keys)
    found |= _samples(row, views, keys, _count(row, measurements, keys))
    if not found:
        raise ConfigError(
            f"nothing that is measured fills {', '.join(keys)}; name what does, as in --measure.names=accuracy"
        )
    return found


def describe_row(
    *,
    measurements: Mapping[str, Any],
    model: str | None = None,
    checkpoint: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
) -> str:
    """What a row would be measured for, and on what, in a few lines."""
    row = Row.of(measurements, model=model, checkpoint=checkpoint, dataset=dataset, split=split)
    lines = [f"model      {row.model}"]
    lines += [
        f"data       {f'{place}: ' if row.listed else ''}{name}, {part}" for place, (name, part) in row.places.items()
    ]
    for cell in library.plan(row.names, row.on):
        options = ", ".join(f"{k}={v}" for k, v in {**cell.asked.measurement.options, **cell.asked.options}.items())
        lines.append(
            f"measures   {', '.join(cell.keys)}: {cell.asked.measurement.role}{f' ({options})' * bool(options)}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """What is measured of which model on which data sets, short names made long."""

    names: tuple[str, ...]
    on: tuple[str, ...] | None
    model: str
    reference: str | None
    places: Mapping[str, tuple[str, str]]  # (data set, split) by what the measurements, or the row, call it
    listed: bool  # the measurements name their data sets, and keys begin with them

    @classmethod
    def of(
        cls,
        measurements: Mapping[str, Any],
        *,
        model: str | None,
        checkpoint: str | None,
        dataset: str | None,
        split: str | None,
    ) -> Row:
        """Raises ConfigError for what neither the design nor the configuration says."""
        config = get_current_config()
        short_models, short_data = config["measure.models"], config["measure.data"]
        names, on = [*measurements.get("names", ()), *config["measure.names"].split()], measurements.get("on")
        if not names:
            raise ConfigError(
                'the spec does not say what to measure; expected "measurements": {"names": ["default"]} in it, or '
                "--measure.names=default"
            )
        model, split = model or config["measure.model"], split or config["measure.split"]
        if not model:
            raise ConfigError("which model? Make `model` a factor of the design, or say --measure.model=NAME")
        listed = library.places(names, on)
        if listed and dataset:
            raise ConfigError(
                "the measurements name data sets, with `on` or behind an @, and the design has a factor `dataset`; "
                "remove one"
            )
        dataset = dataset or config["measure.dataset"]
        if not listed and not dataset:
            raise ConfigError(
                "which data set? Make `dataset` a factor of the design, name some with `on` in the measurements of the "
                "spec, or say --measure.dataset=NAME"
            )
        places = {}
        for entry in listed or [dataset]:
            for place in library.split_pair(entry):
                name, slash, part = place.rpartition("/") if listed else (place, "", "")
                name, part = (name, part) if slash else (place, split)
                places[place] = (short_data.get(name, name), part)
        reference, model = config["measure.reference"], short_models.get(model, model)
        if checkpoint and (not model.startswith("torch:") or "@" in model):
            raise ConfigError(
                f"`checkpoint` is a factor of the design, so the model must be torch:package.module.function; got "
                f"{model!r}"
            )
        return cls(
            tuple(names),
            tuple(on) if on else None,
            f"{model}@{checkpoint}" if checkpoint else model,
            short_models.get(reference, reference),
            places,
            bool(listed),
        )


class Each(Mapping[str, Any]):
    """Something for each of several places, made when it is first asked for; what fails, fails once."""

    def __init__(self, places: Mapping[str, Any], make: Callable[[str], Any]):
        self._places, self._make = places, make
        self._made: dict[str, Any] = {}

    def __getitem__(self, place: str) -> Any:
        if place not in self._places:
            raise KeyError(place)
        if place not in self._made:
            try:
                self._made[place] = self._make(place)
            except Exception as error:
                self._made[place] = error
        if isinstance(self._made[place], Exception):
            raise self._made[place]
        return self._made[place]

    def first(self) -> Any:
        """The first that can be made; the first error where none can."""
        errors = []
        for place in self:
            try:
                return self[place]
            except Exception as error:
                errors.append(error)
        raise errors[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _count(row: Row, measurements: Mapping[str, Any], keys: Sequence[str]) -> int:
    """Of how many examples samples are kept. Raises ConfigError where they are asked for and no key can hold them."""
    option, count = int(get_current_config()["measure.samples"]), int(measurements.get("samples", 0))
    if option and count and option != count:
        raise ConfigError(f"--measure.samples={option}: the store was made for samples of {count}; leave it out")
    unkept = option and not any(key.endswith(SAMPLES) for key in keys)
    if unkept and set(library.schema(row.names, row.on)) <= set(keys):  # the row whole, not some keys of it
        raise ConfigError(
            f"--measure.samples={option}: the store has no key {SAMPLES[0]} that would hold them; make one whose spec "
            f'says "measurements": {{"names": [...], "samples": {option}}}, or leave it out'
        )
    return option or count


def _samples(row: Row, views: Mapping[str, View], keys: Sequence[str], count: int) -> dict[str, Any]:
    """Ids, labels and predicted classes of the first `count` examples of each data set, where such keys are asked."""
    found: dict[str, Any] = {}
    for place in row.places:
        prefix = library.place(place)[0] if row.listed else ""
        wanted = [key for key in SAMPLES if prefix + key in keys]
        for key in wanted:
            try:
                found[prefix + key] = _sample(views[place], key, count)
            except library.FAILURES as error:
                found[prefix + key] = error
    return found


def _sample(view: View, key: str, count: int) -> np.ndarray:
    if not 0 < count <= len(view.examples):
        raise MeasurementError(
            f"{key}: expected measure.samples, or `samples` in the spec, of 1 to {len(view.examples)}, the examples "
            f"there are, got {count}; it is the length that the key has in the schema"
        )
    values = {"sample_ids": lambda: view.examples.ids, "sample_labels": lambda: view.examples.labels}
    values["sample_predictions"] = lambda: view["logits"].argmax(1)
    return values[key]()[:count]


# ------------------------------------------------------------------------------- what rows after each other share


@functools.lru_cache(maxsize=4)
def _examples(name: str, split: str) -> Examples:
    return datasets.load(name, split)


def _settings() -> tuple[str, str, int, bool, str]:
    config = get_current_config()
    device = config["measure.device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("pooling", "max_length", "local_files_only", "cache")
    return (device, *(config[f"measure.{name}"] for name in names))


@functools.lru_cache(maxsize=2)
def _backbone(
    name: str, kind: str, device: str, pooling: str, max_length: int, local_files_only: bool, cache: str
) -> Backbone:
    if name.startswith("row:"):
        return _of_row(name).ready(device)
    return backbones.load(
        name,
        kind,
        device=device,
        pooling=pooling,
        max_length=max_length,
        local_files_only=local_files_only,
        cache=cache,
    )


def _of_row(name: str) -> Backbone:
    """The model of `row:STORE#ROW?factory=package.module.function[&file=NAME]`."""
    place, options = library.parse(name.removeprefix("row:"))
    folder, _, number = place.rpartition("#")
    if not folder or not number.isdecimal() or "factory" not in options or set(options) - {"factory", "file"}:
        raise MeasurementError(
            f"model {name!r}: expected row:STORE#ROW?factory=package.module.function, and &file=NAME where the row "
            f"left several checkpoints"
        )
    store, row = Store.open(folder), int(number)
    store.check_row(row)
    if not store.completed()[row]:
        raise MeasurementError(f"model {name!r}: row {row} of {folder} is not complete; run it first")
    left = Path(folder) / "workers" / number
    pattern = [options["file"]] if "file" in options else _CHECKPOINTS
    files = sorted({path for one in pattern for path in left.glob(str(one))})
    if len(files) != 1:
        raise MeasurementError(
            f"model {name!r}: expected one checkpoint in {left}, got "
            f"{', '.join(path.name for path in files) or 'none'}; "
            f"{'name one with &file=NAME' if files else 'the main of that row saves one in its logdir'}"
        )
    factory = library.attribute(options["factory"], f"model {name!r}")
    taken = inspect.signature(factory).parameters
    choices = {key: value for key, value in store.design.assignment(row).choices.items() if key in taken}
    return backbones.from_factory(name, factory, choices, files[0])
