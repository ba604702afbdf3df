"""Effects of columns on outcomes, in standard deviations of both: the lasso of this project chooses the columns, least
squares fits them, and a bootstrap of both says how sure that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodels.errors import DatamodelsError

LEAST = 10  # different models; below that a resample has hardly any left out
FOLDS, REPEATS = 5, 4  # of cross-validation; a resample's is not repeated
DRAWS = 200  # resamples; a standard deviation needs fewer than percentiles do
LAMBDAS, LEAST_LAMBDA = 20, 1e-2  # how many, and the smallest over the largest
SHARES = LEAST_LAMBDA ** (np.arange(LAMBDAS) / (LAMBDAS - 1))
GAP = 1e-7  # relative duality gap of every lasso


@dataclass(frozen=True, eq=False)
class Effects:
    """What p columns say of T outcomes, all of them in standard deviations over the models.

    value (p, T): least squares on the columns that the lasso chooses, its lambda by cross-validation; 0 for the others.
    low, high (p, T): the 95 % interval.  chosen (p, T): in what share of resamples the lasso takes the column.
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
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int], object] = lambda draws: None,
) -> Effects:
    """Effects of the columns x (n, p) on the outcomes y (n, T) of n models.

    The lasso chooses columns, its lambda by cross-validation in five folds; its weights are shrunk, so those that are
    reported are of least squares on the chosen columns. Intervals are Student's, with the standard deviation over
    resampled models, each standardised, cross-validated and fitted anew. Of columns that say the same the lasso takes
    one or the other: `chosen` and wide intervals tell so. groups: (n,), equal for models that are repeats of one
    choice; they are resampled, and put on a side of a split, together.

    Simulated with two effects of .64 and .43 among five columns, intervals held the effect in 115 of 120 cases for 40
    models, and in as many for 100; where all columns correlate by .7 (.54 and .36), in 202 of 220 for 40 models and in
    201 of 220 for 100; among twenty columns that correlate by .3, in 115 of 120 for 40. Of columns without effect they
    held 0 in 97 to 99 %. Effects of .15 to .3 are often not chosen at 40 models, and their intervals, which held 86 to
    100 %, are wide. `benchmarks/effects.py` simulates that.

    Raises DatamodelsError for a constant column or outcome, and for fewer than ten groups.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    groups = np.arange(len(x)) if groups is None else np.asarray(groups)
    columns = [f"x[{j}]" for j in range(x.shape[1])] if columns is None else columns
    targets = [f"y[{t}]" for t in range(y.shape[1])] if targets is None else targets
    given, wanted = _standardised(x, columns), _standardised(y, targets)
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < LEAST:
        raise DatamodelsError(f"effects: expected {LEAST} different models or more, got {len(names)}")

    weights, chosen, errors, seen = [], [], np.zeros_like(y), np.zeros(len(y))
    generator = np.random.default_rng(seed)
    value, _ = _fit(given, wanted, members, generator, repeats=REPEATS)
    for rows, left in _resamples(members, draws, generator):
        (a, a_mean, a_spread), (b, b_mean, b_spread) = _scaled(given[rows]), _scaled(wanted[rows])
        weight, some = _fit(a, b, members[rows], generator)
        weights.append(weight)
        chosen.append(some)
        predicted = b_mean + (given[left] - a_mean) / a_spread @ weight * b_spread
        errors[left] += (predicted - wanted[left]) ** 2
        seen[left] += 1
        progress(1)
    some = seen > 0
    reach = _reach(np.std(weights, axis=0), value, given, wanted, len(names))
    return Effects(
        columns=tuple(columns),
        targets=tuple(targets),
        value=value,
        low=value - reach,
        high=value + reach,
        chosen=np.mean(chosen, axis=0),
        correlation=_spearman(x, y),
        r2=1 - (errors[some] / seen[some, None]).mean(axis=0) / wanted[some].var(axis=0),
        models=len(x),
        groups=len(names),
        draws=draws,
    )


def _standardised(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    scaled, _, _ = _scaled(values)
    constant = (scaled == 0).all(axis=0)
    if constant.any():
        raise DatamodelsError(
            f"effects: {', '.join(np.array(names)[constant])} is the same for all {len(values)} models; leave it out"
        )
    return scaled


def _scaled(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of mean 0 and standard deviation 1, and both of these; 0 and 1 for what does not vary."""
    mean, spread = values.mean(axis=0), values.std(axis=0)
    constant = spread <= 1e-12 * np.abs(values).max(axis=0, initial=0.0)
    spread = np.where(constant, 1.0, spread)
    return np.where(constant, 0.0, (values - mean) / spread), mean, spread


def _resamples(
    members: np.ndarray, draws: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of resampled groups' rows, as often as their group was drawn, and those of groups that were not."""
    count = members.max() + 1
    of_group = [np.flatnonzero(members == group) for group in range(count)]
    done = 0
    while done < draws:
        drawn = generator.integers(count, size=count)
        left = np.ones(count, bool)
        left[drawn] = False
        if count - left.sum() >= 3:  # of two groups a fold would leave one to fit
            yield np.concatenate([of_group[group] for group in drawn]), np.flatnonzero(left[members])
            done += 1


def _fit(
    x: np.ndarray, y: np.ndarray, members: np.ndarray, generator: np.random.Generator, *, repeats: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on the columns that the lasso chooses, (p, T), and which those are, bool; x and y standardised."""
    places = _places(x, y, members, generator, repeats)
    chosen = np.stack([_lasso(x, y[:, t : t + 1], SHARES[[place]])[0, :, 0] for t, place in enumerate(places)], 1) != 0
    weight = np.zeros(chosen.shape)
    for t in np.flatnonzero(chosen.any(axis=0)):
        of_t = chosen[:, t]
        weight[of_t, t] = np.linalg.lstsq(x[:, of_t], y[:, t], rcond=None)[0]
    return weight, chosen


def _places(
    x: np.ndarray, y: np.ndarray, members: np.ndarray, generator: np.random.Generator, repeats: int
) -> np.ndarray:
    """(T,): which of the SHARES, of each fit's own lambda_max, has the least error over folds of whole groups.

    Lambdas that choose more columns than half of a fold's groups do not count: least squares would interpolate.
    """
    _, group_of = np.unique(members, return_inverse=True)
    count = int(group_of.max()) + 1
    folds = min(FOLDS, count)
    errors = np.zeros((len(SHARES), y.shape[1]))
    for _ in range(repeats):
        fold_of = (generator.permutation(count) % folds)[group_of]
        for fold in range(folds):
            out = fold_of == fold
            (a, a_mean, a_spread), (b, b_mean, b_spread) = _scaled(x[~out]), _scaled(y[~out])
            weights = _lasso(a, b, SHARES)
            off = b_mean + (x[out] - a_mean) / a_spread @ weights * b_spread - y[out]
            many = (weights != 0).sum(axis=1) > (count - count // folds) / 2
            errors += np.where(many, np.inf, (off**2).sum(axis=1))
    places: np.ndarray = errors.argmin(axis=0)
    return places


def _lasso(x: np.ndarray, y: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weights (k, p, T) at falling shares of each outcome's lambda_max, of standardised x and y.

    The kernel of `regression` without what surrounds it there: threads and certificates take a hundred times as long as
    so few columns do.
    """
    from datamodels.regression import descent

    n, p = x.shape
    gram, products, power = x.T @ x, y.T @ x, (y**2).sum(axis=0)
    diag, none = gram.diagonal().copy(), np.zeros(p)
    norm = np.where(diag > 0, float(n), 0.0)
    thr = descent.thresholds(norm, np.ones((1, p)))[0]
    weights, room = np.zeros((len(shares), p, y.shape[1])), np.empty((p, p))
    for t, q in enumerate(products):
        top, at, w = descent.lambda_max(q, thr), np.zeros(0, np.int32), np.zeros(0)
        for step, share in enumerate(shares):
            if top == 0 or share == 1:  # nothing is chosen, whatever rounding says
                continue
            at, w, _, room = descent.refit(
                gram, diag, none, float(n), q, power[t], thr, norm, share * top, at, w, GAP, power[t], room
            )
            weights[step, at, t] = w
    return weights


def _reach(spread: np.ndarray, value: np.ndarray, x: np.ndarray, y: np.ndarray, groups: int) -> np.ndarray:
    """Half of the intervals' width, (p, T): Student's t times the standard error, for so many groups.

    The standard error is the deviation over resamples, but at least that which least squares would have of a column
    that is orthogonal to all others: a column that no resample chose has none, and is not known to have no effect.
    """
    from scipy.stats import t

    free = groups - 1 - (value != 0).sum(axis=0)
    least = np.sqrt(((y - x @ value) ** 2).mean(axis=0) / free)
    reach: np.ndarray = t.ppf(0.975, free) * np.maximum(spread, least)
    return reach


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=0) for values in (x, y)]
    a, b = ((r - r.mean(axis=0)) / r.std(axis=0) for r in ranks)
    correlation: np.ndarray = a.T @ b / len(x)
    return correlation
