"""Bootstrap intervals over models and data sets, and what keeps them honest where both are few.

Models and data sets are drawn anew, together; a statistic's draw is its mean over the drawn data sets. Where they are
few that alone is not enough: a perfect ranking stays perfect in every draw, and [1, 1] never holds the true tau. So no
interval is narrower than theory says it must be:

- Correlations: normal intervals on the scale of arctanh, with the standard deviation of the draws, but at least that
  of so many models on independent data sets if both numbers are normal: arctanh of Kendall's tau has the variance
  .437/(M - 4), of Spearman's 1.06/(M - 3) (Fieller, Hartley and Pearson 1957), of Pearson's 1/(M - 3) (Fisher 1921), of
  the weighted tau about .7/(M - 4) (simulated, M from 8 to 30). A perfect ranking counts as one in which two neighbours
  are exchanged, for the lower end. Of four models and fewer nothing is known: [-1, 1].
- Hit rates: percentiles of the draws, together with Wilson's interval (1927) for as many trials as data sets.
- Regrets: percentiles of the draws, together with what the hit rate's interval allows: its highest chance of a miss
  times what a random choice of models loses when it misses.
- Differences from the baseline, which are drawn together: percentiles.

`benchmarks/ranking.py` says how often they hold the true value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodels.evaluation.score import weighted_mean

_VARIANCES = {"tau": (0.437, 4), "weighted_tau": (0.7, 4), "spearman": (1.06, 3), "pearson": (1.0, 3)}


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


class Draws:
    """How often each of M models and D data sets is drawn, (draws, M) and (draws, D), and intervals made of them.

    The methods take a statistic's values on the data sets, (D,), and in every draw of models, (draws, D); NaN where it
    is not defined, which does not count. `models` is how many models the values are of, on average over data sets.
    """

    def __init__(self, models: int, datasets: int, *, draws: int, level: float, seed: int):
        rng = np.random.default_rng(seed)
        self.count, self.level = draws, level
        self.models = rng.multinomial(models, np.full(models, 1 / models), size=draws)
        self.datasets = rng.multinomial(datasets, np.full(datasets, 1 / datasets), size=draws)

    def correlation(self, name: str, values: np.ndarray, drawn: np.ndarray, models: float) -> Estimate:
        """One of `statistics.CORRELATIONS`."""
        used = int(np.isfinite(values).sum())
        if not used:
            return NOTHING
        value = float(np.nanmean(values))
        factor, lost = _VARIANCES[name]
        if models <= 4:
            return Estimate(value, -1.0, 1.0)
        exchanged = 12 / (models**2 - 1) if name in ("spearman", "pearson") else 4 / (models - 1)
        nearly = 1 - exchanged / models  # what is left of 1 where two neighbours are exchanged
        perfect = nearly if name != "pearson" else 1 - 1e-9
        middle = np.arctanh(np.clip(value, -perfect, perfect))
        spread = np.arctanh(np.clip(self._means(drawn), -nearly, nearly)).std() * np.sqrt(models / (models - 1))
        reach = self._quantile() * max(spread, np.sqrt(factor / (models - lost) / used))
        low, high = float(np.tanh(middle - reach)), float(np.tanh(middle + reach))
        return Estimate(value, -1.0 if value <= -perfect else low, 1.0 if value >= perfect else high)

    def hit(self, values: np.ndarray, drawn: np.ndarray) -> Estimate:
        """A share of data sets."""
        used = int(np.isfinite(values).sum())
        if not used:
            return NOTHING
        value = float(np.nanmean(values))
        low, high = self._percentiles(drawn)
        z = self._quantile()
        centre, reach = value + z**2 / (2 * used), z * np.sqrt(value * (1 - value) / used + z**2 / (4 * used**2))
        wilson = (centre + np.array([-reach, reach])) / (1 + z**2 / used)
        return Estimate(value, max(0.0, min(low, float(wilson[0]))), min(1.0, max(high, float(wilson[1]))))

    def regret(self, values: np.ndarray, drawn: np.ndarray, hit: Estimate, lost_by_a_miss: float) -> Estimate:
        """A regret, given its hit rate, and what a random choice of as many models loses where it misses the best."""
        if not np.isfinite(values).any():
            return NOTHING
        value = float(np.nanmean(values))
        low, high = self._percentiles(drawn)
        return Estimate(value, min(low, value), max(high, value, (1 - hit.low) * lost_by_a_miss))

    def difference(self, values: np.ndarray, drawn: np.ndarray) -> Estimate:
        """A difference of two correlations, both of the same draws."""
        if not np.isfinite(values).any():
            return NOTHING
        return Estimate(float(np.nanmean(values)), *self._percentiles(drawn))

    def _means(self, drawn: np.ndarray) -> np.ndarray:
        means = weighted_mean(drawn, self.datasets.astype(float))
        return means[np.isfinite(means)]

    def _percentiles(self, drawn: np.ndarray) -> tuple[float, float]:
        means = self._means(drawn)
        if not len(means):
            return float("nan"), float("nan")
        low, high = np.quantile(means, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def _quantile(self) -> float:
        from scipy.stats import norm

        return float(norm.ppf((1 + self.level) / 2))
