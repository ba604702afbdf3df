"""Effects of columns on outcomes, in standard deviations of both: the lasso of this project, and a bootstrap of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodels.errors import DatamodelsError
from datamodels.regression import Datamodel, RegressionWarning, fit, make_problem

LEAST = 10  # different models; below that a resample has hardly any left out


@dataclass(frozen=True, eq=False)
class Effects:
    """What p columns say of T outcomes, all of them in standard deviations over the models.

    value (p, T): weights of the lasso, its lambda chosen by validation.  low, high (p, T): the 95 % interval,
    percentiles of the whole fit on resampled models.  chosen (p, T): in what share of them the weight is not 0.
    correlation (p, T): Spearman's, of each pair alone.  r2 (T,): of models that a resample left out; below 0, the
    columns say nothing.
    """

    columns: tuple[str, ...]
    targets: tuple[str, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    chosen: np.ndarray
    correlation: np.ndarray
    r2: np.ndarray
    models: int
    groups: int
    draws: int

    @property
    def clear(self) -> np.ndarray:
        """(p, T), bool: effects whose interval does not reach 0."""
        apart: np.ndarray = (self.low > 0) | (self.high < 0)
        return apart


def estimate(
    x: np.ndarray,
    y: np.ndarray,
    *,
    columns: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    groups: np.ndarray | None = None,
    draws: int = 500,
    seed: int = 0,
    progress: Callable[[int], object] = lambda draws: None,
) -> Effects:
    """Effects of the columns x (n, p) on the outcomes y (n, T) of n models.

    groups: (n,), equal for models that are repeats of one choice; they are resampled, and put on a side of the
    validation split, together. A lasso weight is shrunk towards 0, and of columns that say the same it takes one or the
    other: `chosen` and wide intervals tell so. Raises DatamodelsError for a constant column or outcome, and for fewer
    than ten groups.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    groups = np.arange(len(x)) if groups is None else np.asarray(groups)
    columns = [f"x[{j}]" for j in range(x.shape[1])] if columns is None else columns
    targets = [f"y[{t}]" for t in range(y.shape[1])] if targets is None else targets
    given, wanted = _standardised(x, columns), _standardised(y, targets)
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < LEAST:
        raise DatamodelsError(f"effects: expected {LEAST} different models or more, got {len(names)}")

    weights, errors, seen = [], np.zeros_like(y), np.zeros(len(y))
    for rows, left in _resamples(members, draws, seed):
        fitted = _fit(given[rows], wanted[rows], members[rows], seed)
        weights.append(fitted.weight)
        errors[left] += (fitted.predict(given[left]) - wanted[left]) ** 2
        seen[left] += 1
        progress(1)
    some = seen > 0
    low, high = np.percentile(weights, [2.5, 97.5], axis=0)
    return Effects(
        columns=tuple(columns),
        targets=tuple(targets),
        value=_fit(given, wanted, members, seed).weight.astype(np.float64),
        low=low,
        high=high,
        chosen=np.mean(np.array(weights) != 0, axis=0),
        correlation=_spearman(x, y),
        r2=1 - (errors[some] / seen[some, None]).mean(axis=0) / wanted[some].var(axis=0),
        models=len(x),
        groups=len(names),
        draws=draws,
    )


def _standardised(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    spread = values.std(axis=0)
    constant = spread <= 1e-12 * np.abs(values).max(axis=0, initial=0.0)
    if constant.any():
        raise DatamodelsError(
            f"effects: {', '.join(np.array(names)[constant])} is the same for all {len(values)} models; leave it out"
        )
    scaled: np.ndarray = (values - values.mean(axis=0)) / spread
    return scaled


def _resamples(members: np.ndarray, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of resampled groups' rows, as often as their group was drawn, and those of groups that were not."""
    count = members.max() + 1
    of_group = [np.flatnonzero(members == group) for group in range(count)]
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        drawn = generator.integers(count, size=count)
        left = np.ones(count, bool)
        left[drawn] = False
        yield np.concatenate([of_group[group] for group in drawn]), np.flatnonzero(left[members])


def _fit(x: np.ndarray, y: np.ndarray, members: np.ndarray, seed: int) -> Datamodel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)  # an outcome that no column tells of is an answer here
        return fit(make_problem(x, y, groups=members, seed=seed), workers=1)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=0) for values in (x, y)]
    a, b = ((r - r.mean(axis=0)) / r.std(axis=0) for r in ranks)
    correlation: np.ndarray = a.T @ b / len(x)
    return correlation
