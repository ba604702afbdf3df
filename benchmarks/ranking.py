"""How often a ranking's 95 % intervals hold the true value, on made-up models and data sets whose truth is known.

    python -m benchmarks.ranking [--trials 100] [--draws 300] [--quick]

Models have a quality and a way in which a score misjudges them, both partly the same on all data sets; on data set d
score and performance correlate as r_d, drawn around r. The true tau is the mean over all possible data sets of
2/π · arcsin(r_d), Spearman's that of 6/π · arcsin(r_d/2), Pearson's that of r_d; the weighted tau's, regrets' and hit
rates' are means over 2,000 data sets with as many models. `plain tau` are percentiles of the same draws. The last
column is how often a second score, that is as good, is said to differ.
"""

from __future__ import annotations

import argparse
import datetime

import numpy as np

from benchmarks.store import machine
from datamodels.evaluation.ranking import Joined, rank, statistics
from datamodels.evaluation.ranking.interval import Draws
from datamodels.evaluation.score import weighted_mean

SPREAD = 0.1  # of r_d
NAMES = (*statistics.CORRELATIONS, "regret@1", "regret@3", "hit@1", "hit@3")


def simulate(models: int, datasets: int, r: float, seed: int) -> Joined:
    """Two scores, `score` and `num_params`, that are equally good."""
    rng = np.random.default_rng(seed)

    def partly_shared(share: float) -> np.ndarray:
        own, shared = rng.standard_normal((models, datasets)), rng.standard_normal((models, 1))
        return np.sqrt(share) * shared + np.sqrt(1 - share) * own

    quality = partly_shared(0.5)
    correlation = correlations(r, datasets, rng)
    scores = {
        name: correlation * quality + np.sqrt(1 - correlation**2) * partly_shared(0.3)
        for name in ("score", "num_params")
    }
    names = tuple(f"m{i}" for i in range(models)), tuple(f"d{i}" for i in range(datasets))
    actual = 0.7 + 0.05 * quality
    return Joined("made", *names, scores, actual, np.full(actual.shape, np.nan), "accuracy", None, (1, 1), (1, 1))


def correlations(r: float, datasets: int, rng: np.random.Generator) -> np.ndarray:
    """r_d of data sets (D,): around r, closer where r is close to 1; r itself where there is only one."""
    spread = SPREAD * min(1.0, 4 * (1 - r)) * (datasets > 1)
    return np.clip(r + spread * rng.standard_normal(datasets), -0.99, 0.99)


def truth(models: int, datasets: int, r: float) -> dict[str, float]:
    """What the statistics estimate."""
    many = np.array([r]) if datasets == 1 else correlations(r, 200_000, np.random.default_rng(0))
    known = {
        "tau": np.mean(2 / np.pi * np.arcsin(many)),
        "spearman": np.mean(6 / np.pi * np.arcsin(many / 2)),
        "pearson": np.mean(many),
    }
    once, found = np.ones((1, models), np.int64), {name: [] for name in NAMES if name not in known}
    for seed in range(-(-2000 // datasets)):
        made = simulate(models, datasets, r, 10**6 + seed)
        for d in range(datasets):
            s, a = made.scores["score"][:, d], made.actual[:, d]
            found["weighted_tau"].append(statistics.correlations(s, a, once)["weighted_tau"][0])
            for k in (1, 3):
                regret, hit = statistics.choices(s, a, once, k)
                found[f"regret@{k}"].append(regret[0])
                found[f"hit@{k}"].append(hit[0])
    return {**known, **{name: np.mean(values) for name, values in found.items()}}


def held(models: int, datasets: int, r: float, *, trials: int, draws: int) -> dict[str, float]:
    """Share of trials whose interval holds the truth, per statistic, and for `plain tau` by percentiles alone.

    `differs` is the share in which one of two equally good scores is said to be better.
    """
    true = truth(models, datasets, r)
    inside = dict.fromkeys((*NAMES, "plain tau", "differs"), 0)
    for seed in range(trials):
        made = simulate(models, datasets, r, seed)
        found = rank(made, draws=draws, seed=seed)["score"]
        for name in NAMES:
            inside[name] += found.estimates[name].low <= true[name] <= found.estimates[name].high
        inside["differs"] += not found.difference.low <= 0 <= found.difference.high
        draw = Draws(models, datasets, draws=draws, level=0.95, seed=seed)
        taus = [statistics.tau(made.scores["score"][:, d], made.actual[:, d], draw.models) for d in range(datasets)]
        means = weighted_mean(np.array(taus).T, draw.datasets.astype(float))
        low, high = np.quantile(means[np.isfinite(means)], [0.025, 0.975])
        inside["plain tau"] += low <= true["tau"] <= high
    return {name: count / trials for name, count in inside.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="few trials of small cases: does it run?")
    args = parser.parse_args()
    cells = [(m, d, r) for m in (5, 7, 12, 25) for d in (1, 4) for r in (0.5, 0.95)]
    if args.quick:
        cells, args.trials, args.draws = [(5, 1, 0.7), (7, 2, 0.7)], 10, 50
    print(f"{datetime.date.today()}  {machine()}")
    print(f"share of {args.trials} trials, in %, whose 95 % interval of {args.draws} draws holds the true value")
    columns = (*NAMES, "plain tau", "differs")
    print("models  data sets     r  " + "  ".join(f"{name:>9}" for name in columns))
    for models, datasets, r in cells:
        found = held(models, datasets, r, trials=args.trials, draws=args.draws)
        print(f"{models:6}  {datasets:9}  {r:4}  " + "  ".join(f"{100 * found[n]:9.0f}" for n in columns), flush=True)


if __name__ == "__main__":
    main()
