"""Tables and pictures of stores of LLCs: python -m examples.llc.show sweep|trace|curve STORE [--row=N] [--out=FILE]

sweep   acceptance, stationarity and LLC of every (epsilon, gamma), the one to use, and a picture
trace   the draws of all chains of one row, by default of the one that sweep chooses
curve   LLC with 95 % intervals against the training step of the checkpoint
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import DatamodelsError
from datamodels.measurements.llc import BAND, TRUST, Choice, choose
from datamodels.report import llc as pictures
from datamodels.report.figures import save
from datamodels.store import Store

NUMBERS = (
    "llc",
    "llc_se",
    "acceptance",
    "rhat",
    "ess",
    "stationary",
    "verdict",
    "reason",
    "n",
    "nbeta",
    "initial_loss",
    "step",
)


def table(path: Path) -> dict[str, np.ndarray]:
    """The columns of all complete rows, with their factors and their numbers in the store."""
    with Store.open(path) as store:
        rows = np.flatnonzero(store.completed())
        lacking = [key for key in NUMBERS if key not in store.spec.schema]
        if lacking:
            raise DatamodelsError(f"{path}: has no {', '.join(lacking)}; expected a store of specs/llc.json's keys")
        if not len(rows):
            raise DatamodelsError(f"{path}: no row is complete yet; run the pool on it")
        if len(rows) < store.num_models:
            print(f"   {path}: {len(rows)} of {store.num_models} rows are complete; the others are missing here")
        found: dict[str, Any] = {key: store.rows(key, rows) for key in NUMBERS}
        choices = [store.design.assignment(int(row)).choices for row in rows]
    for factor in choices[0]:
        found[factor] = np.array([choice[factor] for choice in choices])
    return found | {"row": rows}


def chosen(found: dict[str, np.ndarray], band: tuple[float, float] = BAND) -> Choice:
    """Which entry of a sweep's table to use."""
    gamma = found.get("gamma", np.zeros(len(found["row"])))
    return choose(found["acceptance"], found["verdict"], found["ess"], gamma, band=band)


def sweep(path: Path, out: Path | None = None) -> Choice:
    """Print the table of a calibration and the choice, and draw it; sweep.png beside the store.

    Where the sampler is a factor too, each has a picture of its own, `sweep-sgnht.png`.
    """
    found = table(path)
    choice = chosen(found)
    samplers = found.get("sampler", np.array([""] * len(found["row"])))
    print("     row      epsilon      gamma   acceptance    R-hat      ESS                LLC   verdict")
    print("     " + "-" * 98)
    for i, row in enumerate(found["row"]):
        print(f"  {'*' if i == choice.row else ' '} {row:4} {found['epsilon'][i]:12.3g} {found['gamma'][i]:10.4g} "
              f"{found['acceptance'][i]:12.3f} {found['rhat'][i]:8.3f} {found['ess'][i]:8.0f} {found['llc'][i]:10.3f} "
              f"± {1.96 * found['llc_se'][i]:<7.2g} {found['verdict'][i]} {samplers[i]}")  # fmt: skip
    print(f"   {'chosen' if choice.row is not None else 'none chosen'}: {choice.reason}")
    out = out or path.parent / "sweep.png"
    for sampler in np.unique(samplers):
        of_it = np.flatnonzero(samplers == sampler)
        part = {name: column[of_it] for name, column in found.items()}
        columns = [part[name] for name in ("epsilon", "gamma", "acceptance", "llc", "llc_se")]
        ringed = int(np.flatnonzero(of_it == choice.row)[0]) if choice.row in of_it else None
        figure = pictures.sweep(*columns, part["verdict"] == TRUST, chosen=ringed, band=BAND,
                                subtitle=f"{sampler + ': ' if sampler else ''}{_setting(part)}")  # fmt: skip
        print(f"   {save(figure, out.with_stem(f'{out.stem}-{sampler}') if sampler else out)}")
    return choice


def trace(path: Path, row: int | None = None, out: Path | None = None) -> None:
    """Draw the chains of one row; trace.png beside the store."""
    found = table(path)
    if row is None:
        choice = chosen(found) if "epsilon" in found else None
        picked = 0 if choice is None or choice.row is None else choice.row
        row = int(found["row"][picked])
        if choice is not None and choice.row is None:
            print(f"   none is chosen ({choice.reason}); this is row {row}, --row=N draws another")
    if row not in found["row"]:
        raise DatamodelsError(
            f"{path}: row {row} is not complete; complete are {', '.join(map(str, found['row'][:20]))}"
        )
    at = int(np.flatnonzero(found["row"] == row)[0])
    with Store.open(path) as store:
        values = store.rows("llc_trace", [row])[0]
    llc, error = float(found["llc"][at]), 1.96 * float(found["llc_se"][at])
    factors = ", ".join(f"{name} = {found[name][at]:g}" for name in ("epsilon", "gamma") if name in found)
    title = f"Row {row}" + (f": {factors}" if factors else f": training step {found['step'][at]}")
    figure = pictures.trace(values, interval=(llc, llc - error, llc + error), title=title,
                            subtitle=f"{found['verdict'][at]}: {_short(str(found['reason'][at]))}")  # fmt: skip
    print(f"   {save(figure, out or path.parent / 'trace.png')}")


def curve(path: Path, out: Path | None = None) -> None:
    """Print LLC by training step, and draw it; curve.png beside the store."""
    found = table(path)
    order = np.argsort(found["step"], kind="stable")
    print(f"     step        LLC   95 % interval          loss   verdict\n{'':5}{'-' * 66}")
    for i in order:
        llc, error = found["llc"][i], 1.96 * found["llc_se"][i]
        print(f"  {found['step'][i]:7,} {llc:10.3f}   [{llc - error:8.3f}, {llc + error:8.3f}] "
              f"{found['initial_loss'][i]:10.4g}   {found['verdict'][i]}")  # fmt: skip
    columns = [found[name] for name in ("step", "llc", "llc_se", "initial_loss")]
    figure = pictures.curve(*columns, found["verdict"] == TRUST, subtitle=_setting(found))
    print(f"   {save(figure, out or path.parent / 'curve.png')}")


def _setting(found: dict[str, np.ndarray]) -> str:
    """What all rows have in common."""
    return f"n = {found['n'][0]:,}, nβ = {found['nbeta'][0]:.4g}, {len(found['row'])} rows"


def _short(text: str, most: int = 88) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.llc.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("picture", choices=["sweep", "trace", "curve"])
    parser.add_argument("store", type=Path)
    parser.add_argument("--row", type=int, help="of trace")
    parser.add_argument("--out", type=Path, help="file to draw; left out: PICTURE.png beside the store")
    given = parser.parse_args(argv)
    if given.row is not None and given.picture != "trace":
        parser.error("--row goes with trace")
    try:
        if given.picture == "trace":
            trace(given.store, given.row, given.out)
        else:
            {"sweep": sweep, "curve": curve}[given.picture](given.store, given.out)
    except DatamodelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
