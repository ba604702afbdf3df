"""`python -m datamodels.initialize_logdir`: make a store from a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import DatamodelsError, SpecError
from datamodels.spec import Spec, measurements_of, read_json
from datamodels.store import Store

SECTIONS = {
    "logging": {
        "logdir": Option(str, "folder to make the store in; it may exist, without a store in it", required=True),
        "spec": Option(str, "JSON spec: num_models, schema, measurements, design", required=True),
        "reserve": Option(
            str,
            "reserve disk space for all rows now, where the file system can",
            default="auto",
            choices=("auto", "no"),
        ),
    }
}


def initialize(logdir: str | Path, spec: str | Path, *, reserve: bool = True) -> str:
    """Make the store and describe it in a few lines. Raises `SpecError` and `StoreError`."""
    spec = Path(spec)
    with Store.create(logdir, expanded(spec), reserve=reserve, base=spec.resolve().parent) as store:
        size = sum(field.nbytes for field in store.spec.schema.values()) * store.num_models
        lines = [f"{store.path}: {store.num_models:,} rows, {size / 1e6:,.1f} MB"]
        for key, field in store.spec.schema.items():
            lines.append(
                f"  {key}.npy  {field.dtype} {[store.num_models, *field.shape]}"
                + ("" if field.required else ", optional")
            )
        for number, block in enumerate(store.design.blocks if store.spec.design is not None else ()):
            what = [f"{len(block.cells)} grid cells"] if block.cells[0] else []
            if block.sampler:
                what.append(f"{block.masks} {block.sampler} masks of alpha {block.alpha:g}")
            if block.repeats > 1:
                what.append(f"{block.repeats} repeats")
            lines.append(
                f"  block {number}: {block.rows:,} {block.role} rows" + (f" = {' × '.join(what)}" if what else "")
            )
        return "\n".join(lines)


def expanded(path: Path) -> Spec:
    """The spec in a JSON file, with a key of the schema for each of its measurements. `SpecError`."""
    raw = read_json(path)
    try:
        asked = measurements_of(raw) if isinstance(raw, dict) else None
        if asked is not None:
            raw = {**raw, "schema": {**raw.get("schema", {}), **_measured(raw, asked)}}
        return Spec.from_json(raw)
    except DatamodelsError as error:
        raise SpecError(f"{path}: {error}") from None


def _measured(raw: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the schema for what is to be measured, without those that the spec has itself."""
    from datamodels.measurements import library  # late: what has no measurements need not load it

    blocks = [block.get("choices", {}) for block in raw.get("design") or [] if isinstance(block, dict)]
    levels = [choices["dataset"] for choices in blocks if isinstance(choices, dict) and "dataset" in choices]
    names, on = asked["names"], asked.get("on")
    if levels and library.places(names, on):
        raise SpecError(
            "measurements: the design has a factor `dataset`, so each row has its own data set; leave out that "
            "factor, or `on` and what stands behind an @"
        )
    schema = library.schema(names, on, asked.get("samples", 0))
    if levels and all(isinstance(some, list) for some in levels):
        counts = {len(library.split_pair(str(level))) for some in levels for level in some}
        for each in library.resolve(names):
            needed = each.measurement.num_datasets
            if needed and needed not in counts:
                form = "a pair of data sets, as in digits->noisy" if needed == 2 else "one data set, and no pair"
                raise SpecError(
                    f"measurements: {each.stem} needs {form}, and no level of the design's factor `dataset` is one, so "
                    f"it would fail in every row; add one, or measure something else"
                )
    own = raw.get("schema", {})
    return {key: entry for key, entry in schema.items() if key not in own}


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.initialize_logdir",
        "Make a store: a folder of memory-mapped .npy arrays, one row per run, from a JSON spec.",
        SECTIONS,
        argv,
    )
    print(initialize(args["logging.logdir"], args["logging.spec"], reserve=args["logging.reserve"] == "auto"))
    return 0


if __name__ == "__main__":
    cli.run(main)
