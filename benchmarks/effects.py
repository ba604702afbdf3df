"""How often the 95 % intervals of effects hold the effect, and how far off its estimates are, on made-up models.

    python -m benchmarks.effects [--trials 30] [--draws 60] [--quick]

Columns correlate by `together`, outcomes are .6 of the first and .4 of the second with noise of .6, four outcomes a
trial; in standard deviations the effects are somewhat larger. The second table has a third column of little effect.
`off` is the mean of estimate less effect, `none` the share of columns without effect whose interval holds 0.
"""

from __future__ import annotations

import argparse
import datetime
import time

import numpy as np

from benchmarks.store import machine
from datamodels.evaluation.effects import Effects, estimate

OUTCOMES = 4  # of the same columns, each with its own noise


def simulate(
    models: int, weight: np.ndarray, together: float, seed: int, *, draws: int = 60
) -> tuple[Effects, np.ndarray]:
    """What is estimated of made-up models, and the effects (p,) that were planted."""
    p = len(weight)
    among = np.full((p, p), together)
    np.fill_diagonal(among, 1)
    rng = np.random.default_rng((seed, models))
    x = rng.normal(size=(models, p)) @ np.linalg.cholesky(among).T
    y = (x @ weight)[:, None] + 0.6 * rng.normal(size=(models, OUTCOMES))
    return estimate(x, y, draws=draws, seed=seed), weight / np.sqrt(weight @ among @ weight + 0.36)


def weights(columns: int, *, little: float = 0.0) -> np.ndarray:
    weight = np.zeros(columns)
    weight[:3] = 0.6, 0.4, little
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="few trials of small cases: does it run?")
    args = parser.parse_args()
    cells = [(m, p, r) for p, r in ((5, 0.0), (5, 0.7), (20, 0.3)) for m in (40, 100)]
    if args.quick:
        cells, args.trials, args.draws = [(20, 5, 0.0)], 3, 20
    print(f"{datetime.date.today()}  {machine()}")
    print(f"{args.trials} trials of {OUTCOMES} outcomes, intervals of {args.draws} draws; held, chosen and none in %")
    for little in (0.0, 0.2):
        names = ("first", "second", *(["third"] if little else []))
        print("\nmodels  columns  together" + "".join(f"  {n:>7}: effect   off  held  chosen" for n in names)
              + "  none  s/call")  # fmt: skip
        for models, columns, together in cells:
            weight, began = weights(columns, little=little), time.perf_counter()
            found, held = [], []
            for seed in range(args.trials):
                one, truth = simulate(models, weight, together, seed, draws=args.draws)
                found.append((one.value, one.value != 0))
                held.append((one.low <= truth[:, None]) & (truth[:, None] <= one.high))
            value, chosen = (np.mean(each, axis=(0, 2)) for each in zip(*found, strict=True))
            inside, seconds = np.mean(held, axis=(0, 2)), (time.perf_counter() - began) / args.trials
            parts = [
                f"  {truth[j]:16.2f}  {value[j] - truth[j]:+.2f}  {100 * inside[j]:4.0f}  {100 * chosen[j]:6.0f}"
                for j in range(len(names))
            ]
            print(f"{models:6}  {columns:7}  {together:8}{''.join(parts)}  {100 * inside[len(names):].mean():4.0f}"
                  f"  {seconds:6.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
