"""Which scores rank models as fine-tuning does, with intervals, and the number of parameters beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from datamodels.errors import RankingError
from datamodels.evaluation.ranking import statistics
from datamodels.evaluation.ranking.interval import Draws, Estimate
from datamodels.evaluation.ranking.join import Joined

BASELINE = "num_params"
DRAWS = 2000
FEWEST = 3  # models that a ranking needs: of two, one is above the other


@dataclass(frozen=True)
class OnDataset:
    """How a score ranks the models of one data set.

    models: how many have both numbers.  best: of all whose performance is known, the one that did best, and what it
    reached.  chosen: those with the highest score (several where it is shared) and what they reached on average.
    values: statistic -> number.  left_out: why it does not count, or "".  missing: those whose performance is known
    and the score is not.  infinite: those of both numbers whose score is infinite.
    """

    dataset: str
    models: int
    best: str = ""
    best_reached: float = float("nan")
    chosen: tuple[str, ...] = ()
    chosen_reached: float = float("nan")
    values: Mapping[str, float] | None = None
    left_out: str = ""
    missing: tuple[str, ...] = ()
    infinite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A score, and how well it ranks: statistic -> mean over data sets with its interval.

    difference: of tau from the baseline's, on the models that have both, in the same draws; None for the baseline.
    """

    metric: str
    baseline: bool
    estimates: Mapping[str, Estimate]
    difference: Estimate | None
    datasets: tuple[OnDataset, ...]

    @property
    def used(self) -> tuple[OnDataset, ...]:
        return tuple(d for d in self.datasets if not d.left_out)


@dataclass(frozen=True)
class Ranking:
    """Scores in the order of their tau, best first; those that rank nothing last.

    models, datasets: of the join; a score may lack some, see `OnDataset.models`.  ks: of regret@k and hit@k.
    """

    rows: tuple[Judged, ...]
    joined: Joined
    ks: tuple[int, ...]
    level: float
    draws: int
    seed: int

    def __getitem__(self, metric: str) -> Judged:
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(metric)


def rank(
    joined: Joined,
    *,
    baseline: str = BASELINE,
    ks: Sequence[int] = (1, 3),
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], object] = lambda scores: None,
) -> Ranking:
    """How well each score ranks the models: `statistics.CORRELATIONS`, regret@k and hit@k for each of `ks`.

    A correlation is the mean over data sets of its value on the models that have both numbers; data sets with fewer
    than 3 such models, or where all of them perform the same, do not count. Regret and hit are against the best of all
    models whose performance is known; those without a score cannot be chosen. An infinite score is a rank above or
    below all others; Pearson's correlation is of the models whose score is finite. For intervals see `interval`.
    `progress` is told of scores as they are done.

    Raises RankingError where the baseline is not among the scores, and where no data set counts for any of them.
    """
    if baseline not in joined.scores:
        raise RankingError(
            f"{joined.where}: the baseline {baseline!r} is not among the scores; measure it, name another with "
            f"--baseline, or give a file of model: number with --num_params"
        )
    if not (draws >= 1 and 0 < level < 1 and ks and min(ks) >= 1):
        raise RankingError(
            f"draws={draws}, level={level}, k={list(ks)}: at least 1 draw, a level between 0 and 1, k >= 1"
        )
    M, D = joined.actual.shape
    draw = Draws(M, D, draws=draws, level=level, seed=seed)
    rows = []
    for metric in joined.scores:
        rows.append(_judge(joined, metric, baseline, tuple(ks), draw))
        progress(1)
    if not any(row.used for row in rows):
        reasons = dict.fromkeys(f"{d.dataset}: {d.left_out}" for row in rows for d in row.datasets)
        raise RankingError(f"{joined.where}: no data set can be ranked: {'; '.join(reasons)}")
    rows.sort(key=lambda row: -np.nan_to_num(row.estimates["tau"].value, nan=-np.inf))
    return Ranking(tuple(rows), joined, tuple(ks), level, draws, seed)


def _judge(joined: Joined, metric: str, baseline: str, ks: tuple[int, ...], draw: Draws) -> Judged:
    scores, actual, D = joined.scores[metric], joined.actual, len(joined.datasets)
    names = [*statistics.CORRELATIONS, *(f"{what}@{k}" for what in ("regret", "hit") for k in ks)]
    values = {name: np.full(D, np.nan) for name in (*names, "difference")}
    drawn = {name: np.full((draw.count, D), np.nan) for name in values}
    misses = {k: np.full(D, np.nan) for k in ks}
    on = []
    for d, dataset in enumerate(joined.datasets):
        known = np.isfinite(actual[:, d])
        usable = known & ~np.isnan(scores[:, d])
        on.append(_on_dataset(joined, dataset, known, usable, scores[:, d], actual[:, d]))
        if on[-1].left_out:
            continue
        s, a, counts = scores[usable, d], actual[usable, d], _counts(draw, usable)
        found = statistics.correlations(s, a, counts)
        for k in ks:
            found[f"regret@{k}"], found[f"hit@{k}"] = statistics.choices(
                scores[known, d], actual[known, d], _counts(draw, known), k
            )
            misses[k][d] = _lost_by_a_miss(scores[known, d], actual[known, d], k)
        both = usable & ~np.isnan(joined.scores[baseline][:, d])
        if both.sum() >= FEWEST:
            taus = (
                statistics.tau(values_[both, d], actual[both, d], _counts(draw, both))
                for values_ in (scores, joined.scores[baseline])
            )
            found["difference"] = np.subtract(*taus)
        for name, column in found.items():
            values[name][d], drawn[name][:, d] = column[0], column[1:]
        on[-1] = replace(on[-1], values={name: float(found[name][0]) for name in names})
    estimates = {}
    for name in statistics.CORRELATIONS:
        counted = [
            d.models - len(d.infinite) * (name == "pearson") for d in on if d.values and np.isfinite(d.values[name])
        ]
        estimates[name] = draw.correlation(name, values[name], drawn[name], float(np.mean(counted or [0])))
    for k in ks:
        hit = draw.hit(values[f"hit@{k}"], drawn[f"hit@{k}"])
        miss = float(np.nanmean(misses[k])) if np.isfinite(misses[k]).any() else 0.0
        estimates[f"regret@{k}"] = draw.regret(values[f"regret@{k}"], drawn[f"regret@{k}"], hit, miss)
        estimates[f"hit@{k}"] = hit
    difference = None if metric == baseline else draw.difference(values["difference"], drawn["difference"])
    return Judged(metric, metric == baseline, {name: estimates[name] for name in names}, difference, tuple(on))


def _on_dataset(
    joined: Joined, dataset: str, known: np.ndarray, usable: np.ndarray, scores: np.ndarray, actual: np.ndarray
) -> OnDataset:
    names = np.array(joined.models, object)
    s, a, count = scores[usable], actual[usable], int(usable.sum())
    found = OnDataset(
        dataset,
        count,
        missing=tuple(names[known & ~usable].tolist()),
        infinite=tuple(names[usable & np.isinf(scores)].tolist()),
    )
    if count < FEWEST:
        return replace(found, left_out=f"{count} models have both numbers, at least {FEWEST} are needed")
    if a.min() == a.max():
        return replace(found, left_out="all models perform the same")
    best, top = np.where(known, actual, -np.inf).argmax(), s == s.max()
    return replace(
        found,
        best=str(names[best]),
        best_reached=float(actual[best]),
        chosen=tuple(names[usable][top].tolist()),
        chosen_reached=float(a[top].mean()),
    )


def _counts(draw: Draws, usable: np.ndarray) -> np.ndarray:
    """Every usable model once, and below how often each draw has it; (1 + draws, usable)."""
    return np.concatenate([np.ones((1, int(usable.sum())), np.int64), draw.models[:, usable]])


def _lost_by_a_miss(scores: np.ndarray, actual: np.ndarray, k: int) -> float:
    """Expected regret of k of the models with a score, at random, given that the best is not among them; else 0."""
    alike = np.where(np.isnan(scores), np.nan, 0.0)
    regret, hit = statistics.choices(alike, actual, np.ones((1, len(actual)), np.int64), k)
    return float(regret[0] / (1 - hit[0])) if hit[0] < 1 else 0.0
