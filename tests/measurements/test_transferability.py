"""Metrics for choosing a pretrained model: published values, dense closed forms, what they must not depend on."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datamodels.errors import MeasurementError
from datamodels.learning.data import permutation
from datamodels.measurements import probe, spectrum, transferability
from datamodels.measurements.arrays import check_features, encode
from datamodels.measurements.transferability import (
    SmallSampleWarning,
    h_score,
    leep,
    linear_probe,
    log_me,
    nce,
    num_params,
    parc,
    published_accuracy,
)

pytestmark = pytest.mark.filterwarnings("ignore::datamodels.measurements.transferability.SmallSampleWarning")

TINY = np.array([[1, 0], [1, 0.5], [0.8, 0.1], [0, 1], [0.2, 1], [0.1, 0.9]])
TINY_LABELS = np.array([0, 0, 0, 1, 1, 1])

OF_FEATURES = {
    "log_me": log_me,
    "h_score": h_score,
    "h_score, shrunk": lambda features, labels: h_score(features, labels, shrinkage=True),
    "parc": parc,
    "parc, 5 dims": lambda features, labels: parc(features, labels, dims=5),
    "linear_probe": linear_probe,
}
of_features = pytest.mark.parametrize("metric", OF_FEATURES.values(), ids=OF_FEATURES)
ROTATED = [name for name in OF_FEATURES if name != "linear_probe"]  # it standardises columns


def clusters(n=240, d=12, c=4, *, seed=0, spread=1.5):
    """Gaussian classes in correlated features with a mean, n examples in no order; of the first class there are twice
    as many as of any other."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % (c + 1) % c)
    features = rng.standard_normal((c, d))[labels] + spread * rng.standard_normal((n, d))
    return features @ rng.standard_normal((d, d)) + 3, labels


def rotation(d, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


# ---------------------------------------------------------------------------------------------------- published values


def test_leep_of_the_reference():
    theta = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]])
    assert leep(theta, [0, 0, 1, 1]) == pytest.approx((math.log(0.78) + math.log(0.71)) / 2, abs=1e-12)
    assert leep(np.full((6, 5), 0.2), [0, 1, 0, 1, 1, 0]) == pytest.approx(-math.log(2), abs=1e-12)


def test_leep_takes_no_notice_of_source_classes_without_mass():
    theta = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]])
    empty = np.insert(theta, 1, 0.0, axis=1)
    assert leep(empty, [0, 0, 1, 1]) == pytest.approx(-0.2954758341, abs=1e-10)


def test_nce_of_the_reference():
    assert nce([0, 0, 1, 1, 1], [0, 0, 0, 1, 1]) == pytest.approx(-0.3819085010, abs=1e-10)


def test_nce_has_its_arguments_in_the_right_order():
    assert nce([0, 1, 2, 3], [0, 0, 1, 1]) == 0
    assert nce([0, 0, 1, 1], [0, 1, 2, 3]) == pytest.approx(-math.log(2))


def test_log_me_of_the_reference():
    assert log_me(TINY, TINY_LABELS) == pytest.approx(-0.216829578276, abs=1e-7)


def test_log_me_does_not_count_absent_classes():
    features, labels = clusters(c=3)
    assert log_me(features, np.array([0, 1, 9])[labels]) == log_me(features, labels)


def test_parc_of_one_hot_features_is_100():
    labels = np.arange(30) % 3
    assert parc(np.eye(3)[labels], labels, dims=None, scale=False) == pytest.approx(100, abs=1e-9)
    assert parc(np.eye(3)[labels], labels, dims=None) == pytest.approx(100, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- dense oracles


def evidence(features, y):
    """max over α, β of log N(y; 0, F Fᵀ/α + I/β) / n, from the density itself: a grid, then a simplex."""
    from scipy.optimize import minimize
    from scipy.stats import multivariate_normal

    n = len(y)
    gram = features @ features.T
    unit = np.trace(gram) / n

    def lost(point):
        covariance = math.exp(point[0]) * gram / unit + math.exp(point[1]) * np.eye(n)
        return -multivariate_normal.logpdf(y, np.zeros(n), covariance) / n

    starts = [(a, b) for a in np.arange(-12, 7, 2.0) for b in np.arange(-12, 3, 2.0)]
    best = min(starts, key=lost)
    found = minimize(lost, best, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000})
    return -found.fun


@pytest.mark.parametrize(
    ("n", "d", "c"), [(40, 5, 3), (40, 39, 2), (25, 25, 2), (20, 33, 3)], ids=["tall", "nearly", "square", "wide"]
)
def test_log_me_is_the_largest_evidence(n, d, c):
    features, labels = clusters(n, d, c, seed=n)
    expected = np.mean([evidence(features, (labels == k).astype(float)) for k in range(c)])
    assert log_me(features, labels) == pytest.approx(expected, abs=2e-7)


def test_log_me_where_noise_is_best_told_without_features():
    """Labels in the features' null space: the evidence is that of noise alone, at an infinite α."""
    labels = np.arange(64) % 2
    y = np.stack([labels == 0, labels == 1]).astype(float)
    features = np.random.default_rng(3).standard_normal((64, 4))
    features -= y.T @ np.linalg.pinv(y.T) @ features
    assert log_me(features, labels) == pytest.approx(-0.5 * math.log(2 * math.pi * math.e / 2), abs=1e-9)


def test_log_me_of_as_many_directions_as_examples_may_have_no_noise():
    """y in the span of the largest directions of a square F: β grows without bound, the evidence does not."""
    rng = np.random.default_rng(5)
    features = rng.standard_normal((12, 30))
    labels = np.arange(12) % 2
    gram = features @ features.T

    def noiseless(y):  # max over α of log N(y; 0, F Fᵀ/α)
        alpha = len(y) / (y @ np.linalg.solve(gram, y))
        return (-0.5 * math.log(2 * math.pi * math.e / alpha) * len(y) - 0.5 * np.linalg.slogdet(gram)[1]) / len(y)

    at_least = np.mean([noiseless((labels == k).astype(float)) for k in range(2)])
    value = log_me(features, labels)
    assert math.isfinite(value) and value >= at_least - 1e-12
    expected = np.mean([evidence(features, (labels == k).astype(float)) for k in range(2)])
    assert value == pytest.approx(max(expected, at_least), abs=1e-5)


def dense_evidence(features, labels):
    """As `evidence`, from numpy's SVD and a fine grid of t = α/β, for features that a density cannot bear."""
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    n, sigma = len(labels), values**2
    t = np.exp(np.arange(-70, 60, 0.002)) * sigma[0]
    total = 0.0
    for k in np.unique(labels):
        y = (labels == k).astype(float)
        x = left.T @ y
        rest = ((y - left @ x) ** 2).sum()
        quad = rest + sum(x_i**2 * t / (t + s) for x_i, s in zip(x, sigma, strict=True))
        logs = sum(np.log1p(s / t) for s in sigma)
        total += (-0.5 * np.log(2 * np.pi * np.e * quad / n) - logs / (2 * n)).max()
    return total / len(np.unique(labels))


@pytest.mark.parametrize("n", [60, 8], ids=["tall", "wide"])
@pytest.mark.parametrize("decades", [0, 3, 6, 9, 12])
def test_log_me_of_ill_conditioned_features(n, decades):
    """The Gram matrix squares the condition number, which must not be seen in the result."""
    rng = np.random.default_rng(decades)
    labels = np.arange(n) % 2
    features = rng.standard_normal((n, 10)) @ (10.0 ** -np.linspace(0, decades, 10)[:, None] * rotation(10))
    features += 1e-3 * 10.0**-decades * labels[:, None]
    assert log_me(features, labels) == pytest.approx(dense_evidence(features, labels), abs=1e-6)


def test_log_me_sees_labels_in_a_direction_that_a_gram_matrix_loses():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(200) % 2)
    features = rng.standard_normal((200, 6)) * [1, 1, 1, 1, 1, 1e-9]
    features[:, 5] += 1e-9 * (labels - 0.5) * 4
    without = log_me(features[:, :5], labels)
    value = log_me(features, labels)
    assert value == pytest.approx(dense_evidence(features, labels), abs=1e-6)
    assert value > without + 1e-3 or value == pytest.approx(without, abs=1e-3)


def test_h_score_is_its_formula():
    features, labels = clusters()
    means = np.stack([features[labels == k].mean(axis=0) for k in range(4)])[labels]
    expected = np.trace(np.linalg.pinv(np.cov(features.T)) @ np.cov(means.T))
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(240, 12), (30, 50), (9, 200)])
def test_shrunk_h_score_is_its_formula(n, d):
    from sklearn.covariance import LedoitWolf

    features, labels = clusters(n, d, 3)
    fitted = LedoitWolf().fit(features)
    means = np.stack([features[labels == k].mean(axis=0) for k in range(3)])[labels]
    between = (1 - fitted.shrinkage_) * np.cov(means.T, bias=True)
    expected = np.trace(np.linalg.solve(fitted.covariance_, between))
    assert 0 < fitted.shrinkage_ < 1
    assert h_score(features, labels, shrinkage=True) == pytest.approx(expected, rel=1e-9)


def test_h_score_of_as_few_examples_as_features_says_nothing_and_the_shrunk_one_does():
    rng = np.random.default_rng(0)
    noise, labels = rng.standard_normal((40, 60)), np.arange(40) % 4
    signal = noise + 4 * rng.standard_normal((4, 60))[labels]
    assert h_score(noise, labels) == pytest.approx(3, abs=1e-9)
    assert h_score(signal, labels) == pytest.approx(3, abs=1e-9)
    assert h_score(noise, labels, shrinkage=True) < 0.3 < 2 < h_score(signal, labels, shrinkage=True)


def test_h_score_of_nearly_dependent_features():
    """A direction with 1e-5 of the others' deviation holds the labels: cov's own eigenvalues would lose it."""
    features, labels = clusters(300, 4, 3, spread=0.3)
    mixed = np.hstack([features, features @ np.ones((4, 1)) + 1e-4 * (labels[:, None] == 0)])
    straight = np.hstack([features, (labels[:, None] == 0)])
    assert h_score(mixed, labels) == pytest.approx(h_score(straight, labels), rel=1e-6)


def test_leep_is_its_formula():
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.full(7, 0.3), 150), rng.integers(0, 3, 150)
    joint = {(y, z): theta[labels == y, z].sum() for y in range(3) for z in range(7)}
    given_z = {key: joint[key] / sum(joint[y, key[1]] for y in range(3)) for key in joint}
    expected = np.mean(
        [math.log(sum(given_z[y, z] * row[z] for z in range(7))) for row, y in zip(theta, labels, strict=True)]
    )
    assert leep(theta, labels) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=60))
def test_nce_is_mutual_information_less_entropy(pairs):
    from sklearn.metrics import mutual_info_score

    source, labels = zip(*pairs, strict=True)
    if len(set(labels)) < 2:
        with pytest.raises(MeasurementError, match="at least 2 classes"):
            nce(source, labels)
        return
    expected = mutual_info_score(source, labels) - mutual_info_score(labels, labels)
    assert nce(source, labels) == pytest.approx(expected, abs=1e-9)
    assert not math.copysign(1, nce(source, source)) < 0 if len(set(source)) > 1 else True


def dense_parc(features, labels, dims, scale):
    """As the authors have it: PCA, standardised, corrcoef, spearmanr; the PCA exact, its signs by the scores."""
    from scipy.stats import spearmanr

    if dims is not None:
        left, values, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
        features = (left * values)[:, : min(dims, len(features) - 1)]
        features = features * np.sign([column[np.abs(column).argmax()] for column in features.T])
    if scale:
        features = (features - features.mean(axis=0)) / features.std(axis=0)
    upper = np.triu_indices(len(features), 1)
    of_labels = np.corrcoef((labels[:, None] == np.unique(labels)).astype(float))
    # rounded, or ranks would tell apart what is equal
    return 100 * spearmanr(np.round(1 - np.corrcoef(features)[upper], 9), np.round(1 - of_labels[upper], 9)).statistic


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dims", [None, 2, 5, 32])
@pytest.mark.parametrize(("n", "d"), [(120, 40), (30, 100)])
def test_parc_is_its_formula(n, d, dims, scale):
    features, labels = clusters(n, d, 3)
    assert parc(features, labels, dims=dims, scale=scale) == pytest.approx(
        dense_parc(features, labels, dims, scale), abs=5e-3
    )


def test_parc_counts_equal_distances_as_equal():
    """Three places, many examples in each: scipy's ranks share their ties, and so must these."""
    from scipy.stats import spearmanr

    place = np.array([[1.0, 2, 4, 0], [2.0, 1, 0, 5], [0.0, 3, 1, 1]])
    rng = np.random.default_rng(2)
    at, labels = rng.integers(0, 3, 60), rng.integers(0, 2, 60)
    upper = np.triu_indices(60, 1)
    distance = np.round(1 - np.corrcoef(place[at])[upper], 9)
    expected = 100 * spearmanr(distance, labels[upper[0]] != labels[upper[1]]).statistic
    assert parc(place[at], labels, dims=None, scale=False) == pytest.approx(expected, abs=1e-9)


def test_parc_in_several_blocks(monkeypatch):
    from datamodels.measurements import pairs

    features, labels = clusters(300, 10, 3)
    expected = parc(features, labels)
    monkeypatch.setattr(pairs, "PRODUCTS", 7 * 300)
    assert parc(features, labels) == pytest.approx(expected, abs=1e-9)


def test_parc_with_coarse_bins_for_many_examples(monkeypatch):
    from datamodels.measurements import pairs

    features, labels = clusters(2_000, 10, 3)
    expected = parc(features, labels)
    monkeypatch.setattr(pairs, "MANY", 1_000)
    assert parc(features, labels) == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- linear probe


def documented_split(labels, share, seed):
    order = permutation(len(labels), seed=seed)
    held = np.zeros(len(labels), dtype=bool)
    for k in np.unique(labels):
        members = [i for i in order if labels[i] == k]
        held[members[: min(len(members) - 1, math.floor(len(members) * share + 0.5))]] = True
    return held


@pytest.mark.parametrize("c", [2, 5])
@pytest.mark.parametrize(("n", "d", "spread"), [(900, 20, 3.0), (120, 200, 6.0)], ids=["tall", "wide"])
def test_linear_probe_is_scikit_learns(n, d, spread, c):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = clusters(n, d, c, spread=spread)
    held = documented_split(labels, 0.3, 7)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, tol=1e-6))
    expected = fitted.fit(features[~held], labels[~held]).score(features[held], labels[held])
    assert 0.3 < expected < 0.99
    assert linear_probe(features, labels, seed=7, test=0.3) == pytest.approx(expected, abs=1.01 / held.sum())


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(
    ("n", "d", "c"), [(400, 15, 4), (400, 15, 2), (150, 400, 4), (150, 400, 3), (60, 200, 2)], ids=str
)
def test_logistic_regression_is_scikit_learns(n, d, c, l2):
    from sklearn.linear_model import LogisticRegression

    features, labels = clusters(n, d, c, spread=3)
    x = ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float32)
    weight, bias = probe.logistic(x, labels, c, l2)
    fitted = LogisticRegression(C=1 / l2, max_iter=20_000, tol=1e-8).fit(x.astype(float), labels)
    expected, offset = fitted.coef_.T, fitted.intercept_
    if c == 2:  # there one column: of the second class against the first
        expected, offset = expected * [-0.5, 0.5], offset * [-0.5, 0.5]
    assert np.linalg.norm(weight - expected) < 3e-3 * np.linalg.norm(expected)
    assert np.abs((bias - bias.mean()) - (offset - offset.mean())).max() < 5e-3


def test_linear_probe_holds_out_a_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [400, 40, 2, 1])
    for share, expected in ((0.25, [100, 10, 1, 0]), (0.8, [320, 32, 1, 0])):
        held = transferability._stratified(encode(labels, "test"), share, 0)
        assert [held[labels == k].sum() for k in range(4)] == expected
        assert (held == documented_split(labels, share, 0)).all()
    assert (held != transferability._stratified(encode(labels, "test"), 0.8, 1)).any()


def test_linear_probe_is_seeded():
    features, labels = clusters(600, 10, 4, spread=4)
    values = [linear_probe(features, labels, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert values[0] == values[1] and len(set(values)) > 1


def test_linear_probe_scales_by_the_training_part_alone():
    """One held-out example far away must not change what the others are told."""
    features, labels = clusters(900, 10, 3, spread=4)
    far = features.copy()
    far[np.flatnonzero(documented_split(labels, 0.25, 0))[0]] *= 1e6
    assert linear_probe(far, labels) == pytest.approx(linear_probe(features, labels), abs=1.01 / 225)


def test_linear_probe_with_nothing_to_hold_out():
    with pytest.raises(MeasurementError, match="nothing is held out"):
        linear_probe(np.eye(4), [0, 1, 2, 3])


def test_logistic_regression_goes_on_where_float32_ends():
    """Here float32's rounding ends the line search six steps in, short of the gradient that is asked."""
    x, labels = np.array([[1.3416], [0.4472], [-0.4472], [-1.3416]], np.float32), np.array([0, 1, 1, 2])
    weight, bias = probe.logistic(x, labels, 3, 1.0)
    odds = np.exp(x.astype(float) @ weight + bias)
    slope = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[labels]
    assert np.abs(x.T @ slope + weight).max() < 1e-3 and np.abs(slope.sum(axis=0)).max() < 1e-3
    assert math.isfinite(linear_probe([[2.0], [1.0], [0.0], [-2.0]], [-1, 0, 0, 1]))


def test_linear_probe_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 2)
    with pytest.raises(MeasurementError, match="did not converge in 2 steps"):
        linear_probe(*clusters())


# ---------------------------------------------------------------------------------------------------------- invariances


@of_features
def test_names_of_labels_do_not_matter(metric):
    features, labels = clusters()
    expected = metric(features, labels)
    for names in ([5, -3, 10**12, 0], ["pear", "fig", "apple", "lime"], [True, False], [2.0, 1.0, 7.0, 0.0]):
        used = labels % len(names)
        expected = metric(features, used)
        assert metric(features, np.array(names)[used]) == pytest.approx(expected, abs=1e-9)
    assert metric(features, ["abcd"[k] for k in labels]) == pytest.approx(metric(features, labels), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in OF_FEATURES if name != "linear_probe"])  # its split goes by position
def test_the_order_of_examples_does_not_matter(name):
    metric = OF_FEATURES[name]
    features, labels = clusters()
    order = np.random.default_rng(4).permutation(len(labels))
    assert metric(features[order], labels[order]) == pytest.approx(metric(features, labels), rel=1e-6)


def test_the_order_of_examples_does_not_matter_to_metrics_of_predictions():
    rng = np.random.default_rng(0)
    theta, labels, order = rng.dirichlet(np.ones(5), 100), rng.integers(0, 3, 100), rng.permutation(100)
    assert leep(theta[order], labels[order]) == pytest.approx(leep(theta, labels), abs=1e-12)
    source = theta.argmax(axis=1)
    assert nce(source[order], labels[order]) == pytest.approx(nce(source, labels), abs=1e-12)
    shuffled = rng.permutation(5)
    assert leep(theta[:, shuffled], labels + 7) == pytest.approx(leep(theta, labels), abs=1e-12)
    assert nce(np.array(list("vwxyz"))[source], labels - 9) == pytest.approx(nce(source, labels), abs=1e-12)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize(("n", "d"), [(240, 12), (40, 70)])
def test_rotated_features_are_the_same(name, n, d):
    metric = OF_FEATURES[name]
    features, labels = clusters(n, d)
    assert metric(features @ rotation(d), labels) == pytest.approx(metric(features, labels), rel=1e-6)


@of_features
@pytest.mark.parametrize("factor", [1e-8, 1e8, 1e-150, 1e150, 1e-310])
def test_features_of_any_size_are_the_same(metric, factor):
    features, labels = clusters()
    tolerance = 1e-6 if factor != 1e-310 else 1e-2  # few bits are left there
    assert metric(features * factor, labels) == pytest.approx(metric(features, labels), rel=tolerance)


@pytest.mark.parametrize("name", ["h_score", "h_score, shrunk", "parc", "linear_probe"])
def test_shifted_features_are_the_same(name):
    features, labels = clusters()
    assert OF_FEATURES[name](features + 1e4, labels) == pytest.approx(OF_FEATURES[name](features, labels), rel=1e-6)


def test_h_score_is_affine_invariant():
    features, labels = clusters()
    changed = features @ np.random.default_rng(0).standard_normal((12, 12)) * np.logspace(-6, 6, 12) + 5
    assert h_score(changed, labels) == pytest.approx(h_score(features, labels), rel=1e-6)


@of_features
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_lower_precision_is_read_as_the_numbers_it_holds(metric, dtype):
    features, labels = clusters()
    low = (features * (4 if dtype == np.int8 else 1)).astype(dtype)
    assert metric(low, labels) == pytest.approx(metric(low.astype(np.float64), labels), rel=1e-9)


@of_features
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_are_taken(metric, dtype):
    features, labels = clusters()
    tensor = torch.tensor(features, dtype=dtype, requires_grad=True)
    expected = metric(tensor.detach().to(torch.float64).numpy(), labels)
    assert metric(tensor, torch.tensor(labels)) == pytest.approx(expected, rel=1e-9)


def test_sums_of_float32_do_not_lose_bits():
    """Means far from zero, many examples: float32 sums would be off in the third digit."""
    rng = np.random.default_rng(0)
    labels = np.arange(20_000) % 4
    features = (1000 + rng.standard_normal((20_000, 3)) + 0.3 * (labels[:, None] == np.arange(3))).astype(np.float32)
    centred = features.astype(np.float64) - 1000
    for metric in (h_score, OF_FEATURES["h_score, shrunk"]):
        assert metric(features, labels) == pytest.approx(metric(centred, labels), rel=1e-6)


@pytest.mark.parametrize("metric", [log_me, h_score, OF_FEATURES["h_score, shrunk"], parc], ids=str)
@pytest.mark.parametrize(("n", "d"), [(200, 30), (40, 90)])
def test_features_read_in_blocks_are_the_same(monkeypatch, metric, n, d):
    from datamodels.measurements import arrays

    features, labels = clusters(n, d)
    expected = metric(features, labels)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 8 * 17 * d)
    monkeypatch.setattr(transferability, "BLOCK_BYTES", 8 * 17 * d)
    assert metric(features, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 30), (33, 30), (20, 90)])
def test_both_ways_to_singular_values_agree(monkeypatch, n, d):
    from datamodels.measurements import arrays

    monkeypatch.setattr(arrays, "BLOCK_BYTES", 8 * 11 * d)
    features, labels = clusters(n, d)
    checked, classes = check_features(features, "test"), encode(labels, "test")
    one, other = spectrum.by_gram(checked, classes), spectrum.exact(checked, classes)
    assert (one.n, one.d, len(one.sigma)) == (other.n, other.d, len(other.sigma))
    scale = features.max() ** 2
    for name, unit in (("sigma", scale), ("power", 1), ("rest", 1), ("smallest", scale)):
        assert np.abs(getattr(one, name) - getattr(other, name)).max() < 1e-8 * unit, name


@pytest.mark.parametrize(("n", "d"), [(200, 30), (40, 90)])
def test_what_features_of_a_lower_rank_cannot_reach_is_left_over(n, d):
    features, labels = clusters(n, d)
    features[:, d // 2 :] = features[:, : d - d // 2]
    features[n // 2 :] = features[: n - n // 2]
    classes = encode(labels, "test")
    for found in (spectrum.by_gram, spectrum.exact):
        got = found(check_features(features, "test"), classes)
        assert len(got.sigma) <= np.linalg.matrix_rank(features) + 1
        assert got.power.sum(axis=1) + got.rest == pytest.approx(classes.counts, abs=1e-9)


# ----------------------------------------------------------------------------------------------------- degenerate data


def test_log_me_of_features_without_information():
    labels = np.arange(30) % 3
    noise = -0.5 * math.log(2 * math.pi * math.e / 3)
    assert log_me(np.zeros((30, 4)), labels) == pytest.approx(noise, abs=1e-12)
    assert log_me(np.ones((30, 4)), labels) == pytest.approx(dense_evidence(np.ones((30, 1)) * 2, labels), abs=1e-6)


def test_log_me_of_features_that_fit_exactly_is_infinite_and_says_so():
    labels = np.arange(30) % 3
    with pytest.warns(RuntimeWarning, match="fit 3 of 3 classes exactly"):
        assert log_me(np.eye(3)[labels], labels) == math.inf
    with pytest.warns(RuntimeWarning, match="fit 1 of 3 classes exactly"):
        assert log_me(np.eye(3)[labels][:, :1], labels) == math.inf


def test_log_me_of_dead_and_repeated_features():
    features, labels = clusters()
    more = np.hstack([features, np.zeros((240, 3)), features[:, :2]])
    twice = features * np.where(np.arange(12) < 2, math.sqrt(2), 1)
    assert log_me(more, labels) == pytest.approx(log_me(twice, labels), abs=1e-8)


def test_h_score_of_dead_constant_and_repeated_features():
    features, labels = clusters()
    more = np.hstack(
        [features, np.zeros((240, 2)), np.full((240, 1), 0.1), features[:, :3], features @ np.ones((12, 1))]
    )
    assert h_score(more, labels) == pytest.approx(h_score(features, labels), rel=1e-6)
    for shrinkage in (False, True):
        assert h_score(np.full((30, 4), 0.1), np.arange(30) % 3, shrinkage=shrinkage) == 0


def test_h_score_of_separated_classes_is_the_number_of_classes_less_one():
    labels = np.arange(30) % 3
    assert h_score(np.eye(3)[labels], labels) == pytest.approx(2, abs=1e-9)


def test_linear_probe_of_constant_features_says_the_commonest_class():
    labels = np.repeat([0, 1], [300, 100])
    features = np.full((400, 3), 0.1, dtype=np.float32)
    assert linear_probe(features, labels) == 0.75


def test_parc_of_an_example_whose_features_are_equal():
    features, labels = clusters(60, 6, 2)
    features[3] = 2.5
    assert math.isfinite(parc(features, labels, dims=None, scale=False))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.ones((12, 5)), np.arange(12) % 2, "same distance"),
        (np.arange(12.0)[:, None] * np.ones(5), np.arange(12) % 2, "same distance"),  # one component
        (np.random.default_rng(0).standard_normal((12, 5)), np.arange(12), "no two examples share a class"),
    ],
)
def test_parc_of_what_has_no_rank_correlation(features, labels, message):
    with pytest.raises(MeasurementError, match=message):
        parc(features, labels)


SMALL = st.integers(-2, 2).map(float)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_metric_is_ever_nan(data):
    """Few small integers: constant columns, repeated rows, classes of one example, exact fits, n above and below d."""
    n, d = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 7))
    features = data.draw(hnp.arrays(np.float32, (n, d), elements=SMALL))
    labels = data.draw(hnp.arrays(np.int64, n, elements=st.integers(-2, 2)))
    for name, metric in OF_FEATURES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", SmallSampleWarning)
            warnings.filterwarnings("ignore", "log_me: the features fit")
            try:
                value = metric(features, labels)
            except MeasurementError as error:
                expected = "at least 2 classes" if len(set(labels)) < 2 else "parc:|nothing is held out"
                if not re.search(expected, str(error)):
                    raise
                continue
        assert not math.isnan(value), name
        assert math.isfinite(value) or name == "log_me"
        if name.startswith("h_score"):
            assert -1e-9 <= value <= len(set(labels)) - 1 + 1e-9
        if name.startswith("parc"):
            assert abs(value) <= 100 + 1e-9
    theta = np.abs(features) + 0.0
    theta[theta.sum(axis=1) == 0] = 1
    if len(set(labels)) > 1:
        assert -math.log(n) * 2 < leep(theta / theta.sum(axis=1, keepdims=True), labels) <= 1e-12


# ------------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.filterwarnings("error::datamodels.measurements.transferability.SmallSampleWarning")
@pytest.mark.parametrize(
    ("call", "few", "enough", "message"),
    [
        (lambda n: log_me(*clusters(n, 5)), 30, 40, "30 examples of 4 classes; use at least 40"),
        (lambda n: log_me(*clusters(n, 60)), 239, 240, "239 examples of 4 classes; use at least 240"),
        (lambda n: h_score(*clusters(n, 12)), 119, 120, "take shrinkage=True"),
        (lambda n: h_score(*clusters(n, 12), shrinkage=True), 39, 40, "use at least 40"),
        (lambda n: parc(*clusters(n, 12)), 39, 40, "use at least 40"),
        (lambda n: leep(np.full((n, 2), 0.5), np.arange(n) % 4), 39, 40, "use at least 40"),
        (lambda n: nce(np.arange(n) % 7, np.arange(n) % 5), 105, 175, "35 pairs .* too low by about 0.1 nats"),
        (lambda n: linear_probe(*clusters(n, 12)), 388, 400, "98 held-out examples .* 5 %; use at least 400"),
    ],
)
def test_few_examples_are_warned_about(call, few, enough, message):
    with pytest.warns(SmallSampleWarning, match=message) as caught:
        call(few)
    assert caught[0].filename == __file__  # at the line that asked
    call(enough)


# --------------------------------------------------------------------------------------------------------------- errors


@of_features
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.ones(6), TINY_LABELS, r"features of shape \(n, d\).*got \(6,\)"),
        (np.ones((6, 2, 2)), TINY_LABELS, "pool or flatten"),
        (np.ones((6, 0)), TINY_LABELS, r"got \(6, 0\)"),
        (np.ones((1, 2)), [0], "at least two examples"),
        (np.where(np.arange(12).reshape(6, 2) == 7, np.nan, TINY), TINY_LABELS, "example 3 are not finite"),
        (np.where(np.arange(12).reshape(6, 2) == 8, -np.inf, TINY), TINY_LABELS, "example 4 are not finite"),
        (TINY.astype(complex), TINY_LABELS, "real numbers; got complex128"),
        (TINY.astype(str), TINY_LABELS, "real numbers"),
        (TINY, TINY_LABELS[:5], "expected 6 labels.*got 5"),
        (TINY, np.eye(2)[TINY_LABELS], r"one for each example; got \(6, 2\).*argmax"),
        (TINY, np.zeros(6, int), "at least 2 classes among the labels; got 1.*6 times"),
        (TINY, [0, 0, 1, 1, 1, 0.5], "name classes; got 0.5 at position 5"),
        (TINY, [0, 0, 1, 1, 1, np.nan], "got nan at position 5"),
        (TINY, np.array([0, 0, 1, 1, "x", None], object), "several types"),
        (TINY, np.array([0, 1, np.nan, 1, 0, float("nan")], object), "got nan at position 2, 2 times in all"),
    ],
)
def test_what_cannot_be_measured(metric, features, labels, message):
    with pytest.raises(MeasurementError, match=message):
        metric(features, labels)


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        ([[0.5, 0.5], [3.0, 1.0], [0.5, 0.5]], "row 1 sums to 4.*softmax"),
        ([[0.5, 0.5], [0.5, 0.5], [1.5, -0.5]], "row 2 sums to 1, its least is -0.5"),
        ([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0]], "row 1 sums to 0"),
    ],
)
def test_leep_of_what_are_no_probabilities(theta, message):
    with pytest.raises(MeasurementError, match=message):
        leep(theta, [0, 1, 1])


def test_errors_name_the_row_in_later_blocks_too(monkeypatch):
    from datamodels.measurements import arrays

    monkeypatch.setattr(arrays, "BLOCK_BYTES", 8 * 3 * 2)
    monkeypatch.setattr(transferability, "BLOCK_BYTES", 8 * 3 * 2)
    theta = np.full((10, 2), 0.5)
    theta[7] = [0.5, 0.7]
    with pytest.raises(MeasurementError, match="row 7 sums to 1.2"):
        leep(theta, np.arange(10) % 2)
    theta[8, 1] = np.inf
    with pytest.raises(MeasurementError, match="features of example 8 are not finite"):
        log_me(theta, np.arange(10) % 2)


def test_leep_rescales_the_rounding_of_half_precision():
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.ones(200), 60).astype(np.float16), np.arange(60) % 3
    exact = theta.astype(np.float64) / theta.astype(np.float64).sum(axis=1, keepdims=True)
    assert leep(theta, labels) == pytest.approx(leep(exact, labels), abs=1e-12)


@pytest.mark.parametrize("options", [{"test": 0.0}, {"test": 1.0}, {"l2": 0.0}, {"l2": math.nan}])
def test_options_of_the_probe(options):
    with pytest.raises(MeasurementError, match="expected 0 < test < 1 and l2 > 0"):
        linear_probe(*clusters(), **options)


def test_options_of_parc():
    with pytest.raises(MeasurementError, match="dims of at least 2"):
        parc(*clusters(), dims=1)


# ------------------------------------------------------------------------------------------------- of the model itself


def test_num_params_counts_shared_parameters_once():
    first, second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    model = torch.nn.Sequential(first, second, torch.nn.BatchNorm1d(3))
    assert num_params(model) == 4 * 3 + 3 + 3 + 6


def test_num_params_of_a_model_that_has_no_shape_yet():
    with pytest.raises(MeasurementError, match=r"'0.weight' has no shape.*pass one through"):
        num_params(torch.nn.Sequential(torch.nn.LazyLinear(3)))


def test_published_accuracy(tmp_path):
    table = {"resnet18": 69.758, "vit-b/16": 81.072}
    (tmp_path / "scores.yaml").write_text("resnet18: 69.758\nvit-b/16: 81.072\n")
    (tmp_path / "scores.json").write_text('{"resnet18": 69.758,\n\t"vit-b/16": 81.072}\n')
    for source in (table, tmp_path / "scores.yaml", str(tmp_path / "scores.json")):
        assert published_accuracy("vit-b/16", source) == 81.072


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18: 69.8\n", "no 'resnet-18' among its 1 models; did you mean 'resnet18'"),
        ("other: 69.8\n", "no 'resnet-18' among its 1 models; add it"),
        ("resnet-18: high\n", "expected a finite number for 'resnet-18' in .*; got 'high'"),
        ("resnet-18: .nan\n", "got nan"),
        ("resnet-18: true\n", "got True"),
        ("- resnet-18\n", "map models to accuracies.*got list"),
        ("resnet-18: [69\n", "cannot be read as YAML or JSON"),
        (None, "cannot be read"),
    ],
)
def test_published_accuracy_of_what_is_no_table(tmp_path, text, message):
    path = tmp_path / "scores.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MeasurementError, match=message):
        published_accuracy("resnet-18", path)
