"""Penalty weights, unpenalised columns and offsets, against scikit-learn on a problem from which they are taken out."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import Lasso

from datamodels.errors import RegressionError
from datamodels.regression import RegressionWarning, certify, fit, gram_path, make_problem, wide_path


@pytest.fixture(autouse=True, params=[gram_path, wide_path], ids=lambda solver: solver.NAME)
def solver(request, monkeypatch):
    monkeypatch.setitem(fit.__kwdefaults__, "solver", request.param.NAME)


def simulate(n=240, p=30, T=4, *, real=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, p)) < 0.4
    x = x + 0.3 * rng.standard_normal((n, p)) if real else x
    weight = rng.standard_normal((p, T)) * (rng.random((p, T)) < 0.4)
    return x, x @ weight + 2.0 + rng.standard_normal((n, T))


def quiet_fit(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        return fit(problem, **options)


def without(free, values, use_bias):
    """What is left of the columns `values` after least squares on the columns `free` and the bias."""
    values, free = values.astype(float), free.astype(float)
    if use_bias:
        free = np.column_stack([free, np.ones(len(free))])
    return values - free @ np.linalg.lstsq(free, values, rcond=None)[0] if free.shape[1] else values


def oracle(x, y, penalty, lam, use_bias):
    """Fitted values of one target: the unpenalised columns are projected out, the others scaled by 1 / (v sd)."""
    free = penalty == 0
    rest, target = without(x[:, free], x[:, ~free], use_bias), without(x[:, free], y, use_bias)
    scale = penalty[~free] * x[:, ~free].std(axis=0)
    solved = Lasso(alpha=lam, fit_intercept=False, tol=1e-12, max_iter=1_000_000).fit(rest / scale, target)
    weight = np.zeros(x.shape[1])
    weight[~free] = solved.coef_ / scale
    left = y - x @ weight
    return weight, y - without(x[:, free], left, use_bias)


def penalties(p, T, kind, seed=3):
    rng = np.random.default_rng(seed)
    v = {"per column": rng.uniform(0.2, 3, p), "per target": rng.uniform(0.2, 3, (p, T)), "free": np.ones(p)}[kind]
    if kind == "free":
        v[[1, 4, 9]] = 0
    if kind == "per target":
        v[2, 0] = v[5, 1] = v[7, 1] = 0
    return v


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("real", [False, True], ids=["masks", "real"])
@pytest.mark.parametrize("kind", ["per column", "per target", "free"])
def test_refit_and_lambda_max_are_those_of_the_projected_problem(kind, real, use_bias):
    x, y = simulate(real=real)
    v = penalties(30, 4, kind)
    problem = make_problem(x, y, num_val=40, penalty=v)
    model = quiet_fit(problem, tol=1e-10, use_bias=use_bias)
    assert model.gap.max() < 1e-6  # weights are kept in float32
    assert model.kkt.max() < 1e-2
    for t in range(4):
        own = v if v.ndim == 1 else v[:, t]
        weight, fitted = oracle(x, y[:, t], own, float(model.lam[t]), use_bias)
        np.testing.assert_allclose(model.weight[own > 0, t], weight[own > 0], atol=1e-3)
        np.testing.assert_allclose(model.predict(x)[:, t], fitted, atol=5e-3)
        fit_rows = problem.train
        rest = without(x[fit_rows][:, own == 0], y[fit_rows, t], use_bias)
        spread = own * x[fit_rows].std(axis=0)
        shrunk = own > 0
        expected = (np.abs(x[fit_rows].T @ rest)[shrunk] / (len(fit_rows) * spread[shrunk])).max()
        np.testing.assert_allclose(model.path.lam[0, t], expected, rtol=1e-9)
        assert model.path.nnz[0, t] == (own == 0).sum()


def test_copies_among_unpenalised_columns():
    x, y = simulate()
    x[:, 4] = x[:, 1]
    v = np.ones(30)
    v[[1, 4, 9]] = 0
    model = quiet_fit(make_problem(x, y, penalty=v))
    assert model.gap.max() <= 1e-5
    one = np.ones(29)
    one[[1, 8]] = 0
    alone = quiet_fit(make_problem(np.delete(x, 4, axis=1), y, penalty=one))
    np.testing.assert_array_equal(model.lam, alone.lam)
    np.testing.assert_allclose(model.predict(x), alone.predict(np.delete(x, 4, axis=1)), atol=5e-3)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_tolerance_is_met_with_correlated_unpenalised_columns(use_bias):
    rng = np.random.default_rng(0)
    x = rng.random((120, 40)) < 0.5
    x[:, 1], x[:, 2] = x[:, 0], ~x[:, 0]
    y = x[:, :10] @ rng.standard_normal((10, 30)) + rng.standard_normal((120, 30)) + 5
    v = np.ones(40)
    v[:6] = 0
    assert quiet_fit(make_problem(x, y, penalty=v), use_bias=use_bias).gap.max() < 4e-6  # tol / 4, and some rounding


def test_nothing_is_shrunk():
    x, y = simulate()
    problem = make_problem(x, y, penalty=np.zeros(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegressionWarning)
        model = fit(problem)
    exact = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    np.testing.assert_allclose(model.weight, exact[:-1], atol=1e-3)
    np.testing.assert_allclose(model.bias, exact[-1], atol=1e-3)
    assert (model.lam == 0).all()
    assert model.gap.max() <= 1e-5
    design = np.column_stack([x, np.ones(len(x))])
    for rows, found in ((problem.train, model.r2_train), (problem.val, model.r2_val)):
        solved = np.linalg.lstsq(design[problem.train], y[problem.train], rcond=None)[0]
        left, around = y[rows] - design[rows] @ solved, y[rows] - y[problem.train].mean(axis=0)
        np.testing.assert_allclose(found, 1 - (left**2).sum(axis=0) / (around**2).sum(axis=0), atol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_an_offset_is_taken_from_the_outcomes(use_bias):
    x, y = simulate()
    offset = np.random.default_rng(1).standard_normal(y.shape) * 3
    given = quiet_fit(make_problem(x, y + offset, offset=offset), use_bias=use_bias)
    plain = quiet_fit(make_problem(x, y), use_bias=use_bias)
    np.testing.assert_allclose(given.lam, plain.lam, rtol=1e-6)
    np.testing.assert_allclose(given.weight, plain.weight, atol=1e-4)
    np.testing.assert_allclose(given.bias, plain.bias, atol=1e-4)
    np.testing.assert_allclose(given.r2_val, plain.r2_val, atol=1e-5)


def test_certificate_with_unpenalised_columns_bounds_the_excess():
    x, y = simulate(n=90, p=10, T=3)
    v = np.ones((10, 3))
    v[[2, 5]] = 0
    v[7, 1] = 0
    sd, rows, lam = x.std(axis=0), np.arange(90), np.full(3, 0.05)
    rng = np.random.default_rng(0)
    best = np.zeros((10, 3))
    for t in range(3):
        weight, fitted = oracle(x, y[:, t], v[:, t], 0.05, True)
        free = v[:, t] == 0
        left = fitted - x @ weight
        best[free, t] = np.linalg.lstsq(np.column_stack([x[:, free], np.ones(90)]), left, rcond=None)[0][:-1]
        best[~free, t] = weight[~free]

    def objective(weight, t):
        r = y[:, t] - x @ weight
        return ((r - r.mean()) ** 2).mean() / 2 + 0.05 * (v[:, t] * sd * np.abs(weight)).sum()

    gap, kkt = certify(x, y, rows, best, lam, sd, True, v)
    assert np.abs(gap).max() < 1e-9
    assert kkt.max() < 1e-5
    off = best + 0.05 * rng.standard_normal(best.shape)
    gap, kkt = certify(x, y, rows, off, lam, sd, True, v)
    assert kkt.min() > 0.1
    for t in range(3):
        scale = (without(x[:, v[:, t] == 0], y[:, t], True) ** 2).mean() / 2
        excess = objective(off[:, t], t) - objective(best[:, t], t)
        assert excess > 0
        assert gap[t] * scale >= excess
        r = without(x[:, v[:, t] == 0], y[:, t] - x @ off[:, t], True)
        r0 = without(x[:, v[:, t] == 0], y[:, t], True)
        shrunk = v[:, t] > 0
        s = min(1.0, (0.05 * 90 * sd[shrunk] / np.abs(x.T @ r)[shrunk]).min())
        dual = (r0 @ r0 - (r0 - s * r) @ (r0 - s * r)) / 180
        np.testing.assert_allclose(gap[t], (objective(off[:, t], t) - dual) / scale, rtol=1e-8)


@pytest.mark.parametrize(
    ("penalty", "match"),
    [
        (np.ones(29), r"penalty: expected .* shape \(30,\).*got float64 of \(29,\)"),
        (np.full(30, -1.0), r"penalty of column 'x\[0\]' is -1.0; it must be finite and at least 0"),
        (np.full((30, 4), np.inf), r"penalty of column 'x\[0\]' is inf"),
    ],
)
def test_penalties_that_make_no_sense(penalty, match):
    with pytest.raises(RegressionError, match=match):
        make_problem(*simulate(), penalty=penalty)


def test_offsets_that_make_no_sense():
    x, y = simulate()
    with pytest.raises(RegressionError, match=r"offset: expected real numbers of the outcomes' shape \(240, 4\)"):
        make_problem(x, y, offset=y[:, :2])
    bad = np.zeros_like(y)
    bad[17, 2] = np.nan
    with pytest.raises(RegressionError, match=r"row 17, offset of target 'y\[2\]': nan is not finite"):
        make_problem(x, y, offset=bad)
