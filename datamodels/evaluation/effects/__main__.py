"""`python -m datamodels.evaluation.effects STORE`: which property of a model goes with which benefit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import ConfigError

if TYPE_CHECKING:
    from datamodels.evaluation.effects import Effects, Table

ENDINGS = (".png", ".svg", ".pdf")
SECTIONS = {
    "effects": {
        "properties": Option(
            list,
            "keys, or patterns of keys that have a role, as in digits_train_*; left out: keys with the role property",
        ),
        "benefits": Option(list, "likewise; left out: keys with the role benefit"),
        "draws": Option(int, "draws of the bootstrap", default=200, min=20),
        "seed": Option(int, "their seed, and that of the validation split", default=0, min=0),
        "plot": Option(str, "file to draw, as png, svg or pdf"),
        "json": Option(bool, "print all numbers as JSON", default=False),
    }
}


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        "python -m datamodels.evaluation.effects",
        "Say which property of a model goes with which benefit: the lasso from one to the other over the rows of a "
        "store, refitted by least squares, with intervals.",
        SECTIONS,
        argv,
        positional=(("store", "a store whose rows are models"),),
        short="effects",
    )
    out = None if args["effects.plot"] is None else Path(args["effects.plot"])
    if out is not None and out.suffix not in ENDINGS:
        raise ConfigError(f"--plot={out}: expected a name that ends in {', '.join(ENDINGS)}")

    from tqdm import tqdm

    from datamodels.evaluation.effects import estimate, read
    from datamodels.store import Store

    with Store.open(args.positional["store"]) as store:
        table = read(store, args["effects.properties"] or (), args["effects.benefits"] or ())
    draws = args["effects.draws"]
    with tqdm(total=draws, desc="resamples", leave=False, disable=not sys.stderr.isatty()) as bar:
        found = estimate(
            table.x,
            table.y,
            columns=table.columns,
            targets=table.targets,
            groups=table.groups,
            draws=draws,
            seed=args["effects.seed"],
            progress=bar.update,
        )
    for line in table.left_out:
        print(f"left out: {line}", file=sys.stderr)
    for line in table.notes:
        print(f"note: {line}", file=sys.stderr)
    print(as_json(found) if args["effects.json"] else text(found, table))
    if out is not None:
        from datamodels.report import effects, figures

        print(figures.save(effects.heatmap(found), out))
    return 0


def text(found: Effects, table: Table) -> str:
    """For each benefit the properties that the fit or most resamples chose, those of the largest effect first."""
    lines = [
        f"{found.models} models of {found.groups} different choices, {len(found.columns)} properties; effects in "
        f"standard deviations, {found.draws} resamples"
    ]
    width = max(map(len, found.columns))
    for t, target in enumerate(found.targets):
        lines.append(f"\n{target}: R2 {found.r2[t]:.2f} on models left out")
        lines.append(f"  {'property':{width}}   effect   95 % interval     chosen   rank correlation")
        order = sorted(range(len(found.columns)), key=lambda j, t=t: -abs(found.value[j, t]))  # type: ignore[misc]
        shown = [j for j in order if found.value[j, t] or found.chosen[j, t] > 0.5]
        for j in shown:
            mark = "*" if found.clear[j, t] else " "
            lines.append(
                f"{mark} {found.columns[j]:{width}}   {found.value[j, t]:+6.2f}   [{found.low[j, t]:+5.2f}, "
                f"{found.high[j, t]:+5.2f}]   {found.chosen[j, t]:5.0%}   {found.correlation[j, t]:+16.2f}"
            )
        if not shown:
            lines.append("  none")
    lines.append("\n* the interval does not reach 0. What goes together need not be cause and effect.")
    return "\n".join(lines)


def as_json(found: Effects) -> str:
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return json.dumps({name: v.tolist() if hasattr(v, "tolist") else v for name, v in values.items()})


if __name__ == "__main__":
    cli.run(main)
