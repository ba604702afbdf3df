"""How well scores rank models: agreement with what fine-tuning reached, and what is lost by trusting them.

Every statistic takes the scores and the actual performances of M models, and how often each model counts in each of B
draws, (B, M); it returns B values. Higher scores predict higher performance. As in `datamodels.evaluation.score`, a
statistic is NaN where all models that count perform the same, and a score that is the same for all predicts nothing.

Scores may be infinite: they rank above, or below, all that are finite, and beside each other. Pearson's correlation,
which needs numbers, is of the models whose score is finite, and NaN for fewer than three.
"""

from __future__ import annotations

import numpy as np

from datamodels.evaluation.score import rank_correlations

CORRELATIONS = ("tau", "weighted_tau", "spearman", "pearson")


def correlations(scores: np.ndarray, actual: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """The four of CORRELATIONS, each (B,)."""
    concordant, untied_scores, untied_actual = _pairs(scores, actual)
    drawn, finite = counts.astype(np.float64), np.isfinite(scores)
    by_score, by_actual = (
        _top_weights(first, second, counts) for first, second in ((scores, actual), (actual, scores))
    )
    weighted = [
        _ratio(*(np.einsum("bi,ij,bj->b", weights, pairs, drawn, optimize=True)
                 for pairs in (concordant, untied_scores, untied_actual)))
        for weights in (by_score, by_actual)
    ]  # fmt: skip
    return {
        "tau": tau(scores, actual, counts),
        "weighted_tau": (weighted[0] + weighted[1]) / 2,
        "spearman": rank_correlations(scores[:, None], actual[:, None], counts.T.astype(np.float32))[0],
        "pearson": _pearson(scores[finite], actual[finite], drawn[:, finite]),
    }


def tau(scores: np.ndarray, actual: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Kendall's tau-b (Kendall 1945), (B,): concordant less discordant pairs over the geometric mean of untied pairs.

    Two draws of one model are a tie in both, so they drop out above and below.
    """
    drawn = counts.astype(np.float64)
    return _ratio(*(np.einsum("bi,ij,bj->b", drawn, pairs, drawn, optimize=True) for pairs in _pairs(scores, actual)))


def _pairs(scores: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per pair of models, (M, M): 1 concordant, -1 discordant, 0 tied; 1 untied in the scores; 1 untied in fact."""
    a, b = (
        (values[:, None] > values[None, :]).astype(np.float64) - (values[:, None] < values[None, :])
        for values in (scores, actual)
    )
    return a * b, np.abs(a), np.abs(b)


def _ratio(agree: np.ndarray, untied_scores: np.ndarray, untied_actual: np.ndarray) -> np.ndarray:
    size = np.sqrt(untied_scores * untied_actual)
    return np.where(untied_actual > 0, np.divide(agree, size, out=np.zeros_like(size), where=size > 0), np.nan)


def _top_weights(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, M): sum of 1/rank over the places that a model's draws take, ordered by `first`, then `second`, downwards.

    The additive hyperbolic weights of Vigna's weighted tau (2015), which is what scipy.stats.weightedtau computes; a
    pair weighs the sum of both models' weights.
    """
    order = np.lexsort((second, first))[::-1]
    placed = counts[:, order].astype(np.int64)
    last = np.cumsum(placed, axis=1)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, last.max(initial=0) + 1))])
    weights = np.empty(counts.shape)
    weights[:, order] = harmonic[last] - harmonic[last - placed]
    return weights


def _pearson(scores: np.ndarray, actual: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    if len(scores) < 3:
        return np.full(len(drawn), np.nan)

    def centred(values: np.ndarray) -> np.ndarray:
        # What is equal must be zero, and not what rounding leaves of it: the spread of a draw may be one value.
        shifted = (values - values.mean()) / (np.abs(values - values.mean()).max() or 1.0)
        off = shifted - (drawn @ shifted / np.maximum(drawn.sum(axis=1), 1))[:, None]
        low, high = (fold(np.where(drawn > 0, shifted, empty), axis=1) for fold, empty in
                     ((np.min, np.inf), (np.max, -np.inf)))  # fmt: skip
        return off * (low < high)[:, None]

    a, b = centred(scores), centred(actual)
    ab, aa, bb = (np.einsum("bm,bm,bm->b", drawn, one, two) for one, two in ((a, b), (a, a), (b, b)))
    return _ratio(ab, aa, bb)


def choices(scores: np.ndarray, actual: np.ndarray, counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Relative regret and hit of fine-tuning only the k models with the highest scores, (B,) each.

    Regret: (best - best of the k) / best, the share of the best performance that is lost: the regret of a budget of k
    models (Renggli et al. 2022) relative to the best, which is 1 - Rel@k of Li et al. (Ranking Neural Checkpoints,
    2021); NaN where the best is not positive. Hit: whether the best model is among the k.

    A model whose score is NaN cannot be chosen; it counts as what could have been had, so that scores which lack
    different models are held against the same best. Where no model of a draw can be chosen, both are NaN.

    Of a draw only the models in it matter, not how often they are. Where equal scores compete for the last places, the
    values are expectations over which of them are taken.
    """
    best = np.where(counts > 0, actual, -np.inf).max(axis=1, initial=-np.inf)[:, None]
    scored = ~np.isnan(scores)
    scores, actual, counts = scores[scored], actual[scored], counts[:, scored]
    some = (counts > 0).any(axis=1)
    if not some.any():
        return np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    order = np.lexsort((-actual, -scores))
    scores, actual, there = scores[order], actual[order], counts[:, order] > 0
    group = np.concatenate([[0], np.cumsum(scores[1:] != scores[:-1])])
    start = np.searchsorted(group, group)  # of each model's group of equal scores
    end = np.searchsorted(group, group, side="right")
    seen = np.concatenate([np.zeros((len(there), 1), np.int64), np.cumsum(there, axis=1)], axis=1)
    before, members, total = seen[:, start], seen[:, end] - seen[:, start], seen[:, -1:]
    better = seen[:, :-1] - before  # of the same score and present, those that perform better
    places = np.clip(k - before, 0, members)
    last = there & (before < k) & ((before + members >= k) | (before + members == total))

    best_so_far = np.maximum.accumulate(np.where(there, actual, -np.inf), axis=1)
    above = np.concatenate([np.full((len(there), 1), -np.inf), best_so_far], axis=1)[:, start]
    reached = np.maximum(above, actual)
    chance = np.where(last, _chance_of_best(members, places, better), 0.0)
    expected = np.where(chance > 0, chance * np.where(chance > 0, reached, 0.0), 0.0).sum(axis=1)
    hit = np.where(chance > 0, chance * (reached >= best), 0.0).sum(axis=1)
    best = best[:, 0]
    usable = (best > 0) & some
    regret = np.divide(best - expected, best, out=np.full(len(best), np.nan), where=usable)
    return np.maximum(regret, 0.0), np.where(some, hit, np.nan)


def _chance_of_best(members: np.ndarray, places: np.ndarray, better: np.ndarray) -> np.ndarray:
    """That a member is the best of `places` members drawn at random, `better` of all members being better than it."""
    from scipy.special import gammaln

    def log_choose(n: np.ndarray, r: np.ndarray) -> np.ndarray:
        return gammaln(n + 1.0) - gammaln(r + 1.0) - gammaln(n - r + 1.0)

    possible = (places >= 1) & (members - 1 - better >= places - 1)
    n, r = np.where(possible, members, 1), np.where(possible, places, 1)
    rest = np.where(possible, members - 1 - better, 0)
    return np.where(possible, np.exp(log_choose(rest, r - 1) - log_choose(n, r)), 0.0)
