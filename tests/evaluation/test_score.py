import importlib.util
import tracemalloc

import numpy as np
import pytest
from scipy.stats import spearmanr

from datamodels.errors import RegressionError
from datamodels.evaluation import lds, lds_of_store
from datamodels.evaluation import score as score_module
from datamodels.evaluation.score import _ceilings, rank_correlations
from datamodels.regression import memory


def simulate(masks=40, repeats=3, targets=7, seed=0, noise=1.0, decimals=None):
    rng = np.random.default_rng(seed)
    predicted = rng.standard_normal((masks, targets))
    truth = 0.8 * predicted + 0.6 * rng.standard_normal((masks, targets))
    outcomes = truth[:, None] + noise * rng.standard_normal((masks, repeats, targets))
    if decimals is not None:
        predicted, outcomes = predicted.round(decimals), outcomes.round(decimals)
    return predicted, truth, outcomes


def score(predicted, outcomes, **options):
    masks, repeats, targets = outcomes.shape
    return lds(
        np.repeat(predicted, repeats, axis=0),
        outcomes.reshape(-1, targets),
        np.repeat(np.arange(masks), repeats),
        **({"draws": 50} | options),
    )


@pytest.mark.parametrize("decimals", [None, 0])
def test_value_is_the_mean_of_scipy_spearman(decimals):
    predicted, _, outcomes = simulate(decimals=decimals)
    got = score(predicted, outcomes)
    expected = [spearmanr(predicted[:, t], outcomes.mean(axis=1)[:, t]).statistic for t in range(7)]
    np.testing.assert_allclose(got.per_target, expected, rtol=1e-6)
    np.testing.assert_allclose(got.value, np.mean(expected), rtol=1e-6)
    assert (got.num_masks, got.num_targets, got.repeats) == (40, 7, (3, 3))


@pytest.mark.parametrize("decimals", [None, 0])
def test_every_draw_is_ranked_anew(decimals):
    predicted, _, outcomes = simulate(decimals=decimals)
    observed = outcomes.mean(axis=1)
    counts = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=20)
    got = rank_correlations(predicted, observed, counts.T.astype(np.float32))
    for draw, count in enumerate(counts):
        drawn = np.repeat(np.arange(40), count)
        expected = [spearmanr(predicted[drawn, t], observed[drawn, t]).statistic for t in range(7)]
        np.testing.assert_allclose(got[:, draw], expected, rtol=1e-6)


def test_order_of_rows_and_names_of_masks_do_not_matter():
    predicted, _, outcomes = simulate()
    one = score(predicted, outcomes)
    order = np.random.default_rng(0).permutation(120)
    ids = np.repeat(np.arange(40) * 7 + 1000, 3)
    other = lds(np.repeat(predicted, 3, axis=0)[order], outcomes.reshape(-1, 7)[order], ids[order], draws=50)
    assert other.value == pytest.approx(one.value, abs=1e-6)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=1e-6)


def test_interval_is_the_bootstrap_of_masks_and_targets():
    """The same quantity by repeating rows and columns, with draws of its own: equal to sampling error."""
    predicted, _, outcomes = simulate(targets=5)
    got = score(predicted, outcomes, draws=4000)
    rng, observed, values = np.random.default_rng(9), outcomes.mean(axis=1), []
    for _ in range(1500):
        masks, targets = rng.integers(0, 40, 40), rng.integers(0, 5, 5)
        values.append(np.mean([spearmanr(predicted[masks, t], observed[masks, t]).statistic for t in targets]))
    low, high = np.quantile(values, [0.025, 0.975]) - np.median(values) + got.value
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.02)
    assert got.low < got.value < got.high


def test_interval_covers():
    """Of 95 % intervals on data whose true score is 6/π·arcsin(r/2), between 88 and 100 % must hold it."""
    r, held, trials = 0.7, 0, 100
    truth = 6 / np.pi * np.arcsin(r / 2)
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        shared = rng.standard_normal((2, 60, 1))  # masks that are easy or hard for all targets
        own = rng.standard_normal((2, 60, 8))
        predicted, rest = np.sqrt(0.5) * shared + np.sqrt(0.5) * own
        got = lds(predicted, r * predicted + np.sqrt(1 - r**2) * rest, np.arange(60), draws=200, seed=seed)
        held += got.low <= truth <= got.high
    assert 88 <= held <= 100


def test_interval_covers_where_scores_are_high():
    """High rank correlations are lowered most by the ties of a bootstrap; the plain percentiles hold it 83 times."""
    held, trials = 0, 100
    population = np.random.default_rng(0).normal(0.9, 0.05, 200_000).clip(0, 0.99)
    truth = np.mean(6 / np.pi * np.arcsin(population / 2))
    for seed in range(trials):
        rng = np.random.default_rng(seed + 1)
        r = rng.normal(0.9, 0.05, 60).clip(0, 0.99)
        predicted = rng.standard_normal((100, 60))
        outcomes = r * predicted + np.sqrt(1 - r**2) * rng.standard_normal((100, 60))
        got = lds(predicted, outcomes, np.arange(100), draws=200, seed=seed)
        held += got.low <= truth <= got.high
    assert 88 <= held <= 100


@pytest.mark.parametrize(("noise", "repeats"), [(0.5, 2), (1.0, 5), (2.0, 5), (1.0, 20)])
def test_ceiling_is_what_the_noise_free_outcome_scores(noise, repeats):
    _, truth, outcomes = simulate(masks=400, repeats=repeats, targets=30, noise=noise)
    got = score(truth, outcomes, draws=200)
    closed_form = 6 / np.pi * np.arcsin(np.sqrt(1 / (1 + noise**2 / repeats)) / 2)
    assert got.ceiling == pytest.approx(closed_form, abs=0.01)
    assert got.value == pytest.approx(got.ceiling, abs=0.01)
    assert got.ceiling_low < got.ceiling < got.ceiling_high
    assert got.ceiling_high - got.ceiling_low < 0.05


def test_ceiling_with_unequal_repeats():
    rng = np.random.default_rng(5)
    runs = rng.integers(1, 8, 600)
    truth = rng.standard_normal((600, 30))
    ids = np.repeat(np.arange(600), runs)
    outcomes = truth[ids] + 1.5 * rng.standard_normal((len(ids), 30))
    got = lds(truth[ids], outcomes, ids, draws=50)
    reliability = 1 / (1 + 1.5**2 * np.mean(1 / runs))
    assert got.ceiling == pytest.approx(6 / np.pi * np.arcsin(np.sqrt(reliability) / 2), abs=0.015)
    assert got.repeats == (1, 7)


def test_ceiling_reliability_is_the_intraclass_correlation():
    """Shrout and Fleiss 1979, table 2: six persons, four judges; ICC(1,4) = .44 (table 4)."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    mean = ratings.mean(axis=1)
    within = ((ratings - mean[:, None]) ** 2).sum(axis=1)
    got = _ceilings(mean[:, None], within[:, None], np.full(6, 4), np.ones((1, 6)))[0, 0]
    reliability = (2 * np.sin(got * np.pi / 6)) ** 2
    assert round(reliability, 2) == 0.44


def test_ceiling_of_a_few_very_unequal_masks_is_the_textbook_variance_components():
    groups = [[1.0], [4.0, 5.5], [9.0, 7.5, 8.0, 8.5, 10.0, 9.5, 7.0, 8.0, 9.0]]
    means, sizes = [sum(g) / len(g) for g in groups], [len(g) for g in groups]
    within = [sum((v - m) ** 2 for v in g) for g, m in zip(groups, means, strict=True)]
    grand = sum(map(sum, groups)) / 12
    between = sum(k * (m - grand) ** 2 for k, m in zip(sizes, means, strict=True)) / 2
    noise = sum(within) / (12 - 3)
    signal = (between - noise) / ((12 - sum(k * k for k in sizes) / 12) / 2)
    reliability = signal / (signal + noise * sum(1 / k for k in sizes) / 3)
    got = _ceilings(np.array(means)[:, None], np.array(within)[:, None], np.array(sizes), np.ones((1, 3)))
    assert got[0, 0] == pytest.approx(6 / np.pi * np.arcsin(np.sqrt(reliability) / 2))


def test_pure_noise_has_ceiling_zero_or_near():
    rng = np.random.default_rng(0)
    got = score(rng.standard_normal((200, 20)), rng.standard_normal((200, 5, 20)))
    assert got.ceiling < 0.25
    assert got.low < 0 < got.high


def test_exact_repeats_have_ceiling_one():
    predicted, _, outcomes = simulate(noise=0.0)
    assert score(predicted, outcomes).ceiling == pytest.approx(1)


def test_no_repeats_no_ceiling():
    predicted, _, outcomes = simulate(repeats=1)
    got = score(predicted, outcomes)
    assert np.isnan(got.ceiling)
    assert np.isnan(got.ceiling_low)
    assert np.isfinite([got.value, got.low, got.high]).all()
    assert "ceiling" not in str(got)


def test_constant_targets_are_left_out_and_constant_predictions_count_as_zero():
    predicted, _, outcomes = simulate()
    outcomes[:, :, 2] = 0.1
    predicted[:, 4] = 0.3
    got = score(predicted, outcomes)
    assert got.constant == (2,)
    assert np.isnan(got.per_target[2])
    assert got.per_target[4] == 0
    assert got.value == pytest.approx(np.delete(got.per_target, 2).mean())
    assert "1 constant targets left out" in str(got)
    assert np.isfinite([got.low, got.high, got.ceiling]).all()


def test_constant_targets_do_not_dilute_the_intervals():
    predicted, _, outcomes = simulate()
    outcomes[:, :, 1:] = 0.1
    got = score(predicted, outcomes, draws=200)
    assert got.ceiling_low < got.ceiling < got.ceiling_high
    assert got.low < got.value < got.high


def test_rounding_of_means_makes_no_ranks():
    runs = np.arange(30) % 7 + 1
    ids = np.repeat(np.arange(30), runs)
    outcomes = np.random.default_rng(0).standard_normal((len(ids), 2))
    assert lds(np.full_like(outcomes, 0.1), outcomes, ids, draws=10).value == 0


def test_a_draw_in_which_the_outcome_does_not_vary_has_no_correlation():
    a, b = np.array([[1.0], [2], [3], [4]]), np.array([[0.0], [0], [0], [1]])
    counts = np.array([[1, 2, 1, 0], [1, 1, 1, 1]], dtype=np.float32).T
    got = rank_correlations(a, b, counts)[0]
    assert np.isnan(got[0])
    assert got[1] == pytest.approx(spearmanr(a[:, 0], b[:, 0]).statistic)
    np.testing.assert_array_equal(rank_correlations(b, a, counts)[0, 0], 0)


def test_same_seed_same_interval():
    predicted, _, outcomes = simulate()
    a, b, c = (score(predicted, outcomes, seed=seed) for seed in (0, 0, 1))
    assert (a.low, a.high) == (b.low, b.high) != (c.low, c.high)


def test_bad_input():
    predicted, _, outcomes = simulate(masks=5, repeats=2, targets=2)
    rows, ids = outcomes.reshape(10, 2), np.repeat(np.arange(5), 2)
    p = np.repeat(predicted, 2, axis=0)
    holed = rows.copy()
    holed[3, 1] = np.nan
    for args, message in (
        ((p[:9], rows, ids), r"got \(9, 2\), \(10, 2\) and \(10,\)"),
        ((p, rows, ids[:9]), r"\(9,\)"),
        ((p, holed, ids), "row 3, target 1: the outcome is not finite"),
        ((holed, rows, ids), "row 3, target 1: the prediction is not finite"),
        ((p, rows, np.zeros(10, int)), "1 evaluation masks"),
        ((p, rows, ids - 1), r"no mask id \(-1\)"),
        ((p, np.ones_like(rows), ids), "all 2 targets are constant"),
    ):
        with pytest.raises(RegressionError, match=message):
            lds(*args)
    with pytest.raises(RegressionError, match="draws=0"):
        lds(p, rows, ids, draws=0)


def model_of(weight):
    from datamodels.regression import Datamodel

    p, T = weight.shape
    nothing = np.zeros(T)
    return Datamodel(
        weight=weight.astype("f4"),
        bias=nothing,
        lam=nothing,
        gap=nothing,
        kkt=nothing,
        nnz=nothing,
        r2_train=nothing,
        r2_val=nothing,
        ended=("",) * T,
        columns=("x",) * p,
        targets=("y",) * T,
    )


def small_store(path, targets=4, choices=None):
    from datamodels.store import Store

    grid = {} if choices is None else {"choices": choices}
    design = [
        {"role": "train", "masks": 6, "seed": 1, "sampler": "bernoulli", "alpha": 0.5, **grid},
        {"role": "eval", "masks": 12, "repeats": 3, "seed": 2},
    ]
    schema = {"masks": {"shape": [9], "dtype": "bits"}, "margins": {"shape": [targets], "dtype": "float32"}}
    return Store.create(path, {"schema": schema, "design": design}, sync=False)


def test_score_of_a_store(tmp_path, capsys):
    store = small_store(tmp_path / "s")
    rng = np.random.default_rng(0)
    masks = np.stack([store.design.assignment(row).mask for row in range(42)])
    margins = rng.standard_normal((42, 4)).astype("f4")
    model = model_of(rng.standard_normal((9, 3)))
    with pytest.raises(RegressionError, match="none of its 36 evaluation rows is complete"):
        lds_of_store(model, store)
    done = [row for row in range(42) if row != 20]
    store.commit_many(done, {"masks": masks[done], "margins": margins[done]})
    got = lds_of_store(model, store, target_start=1, draws=10)

    expected = []
    blocks = [[row for row in range(6 + 3 * m, 9 + 3 * m) if row != 20] for m in range(12)]
    for t in range(3):
        outcome = [margins[block, t + 1].mean() for block in blocks]
        prediction = [masks[block[0]] @ model.weight[:, t] for block in blocks]
        expected.append(spearmanr(prediction, outcome).statistic)
    np.testing.assert_allclose(got.per_target, expected, rtol=1e-6)
    assert got.repeats == (2, 3)
    assert capsys.readouterr().err == ""
    with pytest.raises(RegressionError, match=r"targets 2 to 5 of 'margins' are asked for, it has 4; target_start"):
        lds_of_store(model, store, target_start=2)


def test_targets_outside_the_slice_are_read_in_blocks_and_not_kept(tmp_path, monkeypatch):
    store = small_store(tmp_path / "s", targets=200_000)
    masks = np.stack([store.design.assignment(row).mask for row in range(42)])
    margins = np.random.default_rng(0).standard_normal((42, 200_000)).astype("f4")
    store.commit_many(range(42), {"masks": masks, "margins": margins})
    model = model_of(np.random.default_rng(1).standard_normal((9, 2)))
    whole = lds_of_store(model, store, target_start=100_000, draws=10)
    monkeypatch.setattr(score_module, "BLOCK_BYTES", 2_400_000)  # three rows
    tracemalloc.start()
    got = lds_of_store(model, store, target_start=100_000, draws=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2_400_000 < 36 * 200_000 * 4 / 2
    assert (got.value, got.low, got.high) == (whole.value, whole.low, whole.high)


def test_a_score_that_does_not_fit_into_memory_is_refused_before_it_is_tried(tmp_path, monkeypatch):
    store = small_store(tmp_path / "s")
    masks = np.stack([store.design.assignment(row).mask for row in range(42)])
    store.commit_many(range(42), {"masks": masks, "margins": np.random.default_rng(0).standard_normal((42, 4))})
    model = model_of(np.ones((9, 4)))
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    message = r"the score of 36 rows and 4 targets with 1000 draws needs about .* of memory.*fewer targets at a time"
    with pytest.raises(RegressionError, match=message):
        lds_of_store(model, store)
    with pytest.raises(RegressionError, match=message):
        lds(np.ones((36, 4)), np.ones((36, 4)), np.arange(36))
    assert lds_of_store(model, store, draws=50).draws == 50


@pytest.mark.parametrize("sizes", [(100, 5, 1500, 10), (60, 1, 3000, 10), (50, 2, 1000, 300)])
def test_the_memory_that_is_asked_for_is_what_is_taken(monkeypatch, sizes):
    masks, repeats, targets, draws = sizes
    predicted, _, outcomes = simulate(masks=masks, repeats=repeats, targets=targets)
    asked = []
    monkeypatch.setattr(memory, "require", lambda needed, *rest: asked.append(needed))
    tracemalloc.start()
    score(predicted, outcomes, draws=draws)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.6 * asked[0] < peak < 1.2 * asked[0]


def test_progress_is_told_of_every_target_once():
    predicted, _, outcomes = simulate(targets=7)
    told = []
    score(predicted, outcomes, progress=told.append)
    assert told == [1] * 7


def test_rows_of_different_choices_are_not_pooled_in_silence(tmp_path, capsys):
    store = small_store(tmp_path / "s", choices={"width": [4, 8], "optimiser": ["sgd"]})
    rows = range(store.num_models)
    masks = np.stack([store.design.assignment(row).mask for row in rows])
    store.commit_many(rows, {"masks": masks, "margins": np.random.default_rng(0).standard_normal((len(rows), 4))})
    lds_of_store(model_of(np.ones((9, 4))), store, draws=10)
    err = capsys.readouterr().err
    assert err.startswith("note: the training rows of ") and err.count("\n") == 1
    assert "2 different choices of width, optimiser" in err and "columns masks do not" in err


def test_choices_among_the_columns_tell_runs_with_one_mask_apart(tmp_path, capsys):
    from datamodels.regression import columns_of_store
    from datamodels.store import Store

    design = [
        {"role": "train", "masks": 3, "seed": 1, "sampler": "bernoulli", "alpha": 0.5, "choices": {"width": [4, 8]}},
        {"role": "eval", "masks": 8, "repeats": 2, "seed": 2, "choices": {"width": [4, 8]}},
    ]
    schema = {"masks": {"shape": [9], "dtype": "bits"}, "margins": {"shape": [3], "dtype": "float32"}}
    store = Store.create(tmp_path / "s", {"schema": schema, "design": design}, sync=False)
    rows = np.arange(store.num_models)
    rng = np.random.default_rng(0)
    masks = np.stack([store.design.assignment(row).mask for row in rows])
    margins = rng.standard_normal((len(rows), 3)).astype("f4")
    store.commit_many(rows, {"masks": masks, "margins": margins})
    model = model_of(rng.standard_normal((11, 3)))
    got = lds_of_store(model, store, x_name=["masks", "choices"], draws=10)
    assert capsys.readouterr().err == ""

    held = rows[store.design.roles == "eval"]
    x = columns_of_store(store, held, x_name=["masks", "choices"])
    kinds = sorted({row.tobytes() for row in x})
    assert len(kinds) == 16  # 8 masks at each of 2 widths
    blocks = [[i for i, row in enumerate(x) if row.tobytes() == kind] for kind in kinds]
    for t in range(3):
        outcome = [margins[held[block], t].mean() for block in blocks]
        prediction = [x[block[0]] @ model.weight[:, t] for block in blocks]
        np.testing.assert_allclose(got.per_target[t], spearmanr(prediction, outcome).statistic, rtol=1e-6)
    assert got.repeats == (2, 2)


def test_the_function_does_not_hide_a_module():
    import datamodels.evaluation.score as module
    from datamodels.evaluation import Score

    assert module.lds is lds and module.Score is Score
    assert not importlib.util.find_spec("datamodels.evaluation.lds")
