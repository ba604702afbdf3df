"""`python -m datamodels.initialize_logdir`: make a store from a spec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datamodels import cli
from datamodels.cli import Option
from datamodels.store import Store

SECTIONS = {
    "logging": {
        "logdir": Option(str, "folder to make the store in; it may exist, without a store in it", required=True),
        "spec": Option(str, "JSON spec: num_models, schema, design", required=True),
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
    with Store.create(logdir, spec, reserve=reserve) as store:
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
