"""The fit against other solvers, closed forms and the conditions of optimality, on problems small enough for both."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from sklearn.linear_model import Lasso

from datamodels.errors import RegressionError
from datamodels.regression import RegressionWarning, certify, fit, gram_path, lasso, make_problem, wide_path
from datamodels.regression.datamodel import CONSTANT, END_OF_PATH, TURNED


@pytest.fixture(autouse=True, params=[gram_path, wide_path], ids=lambda solver: solver.NAME)
def solver(request, monkeypatch):
    """Every test here runs with every solver, whatever fit would choose."""
    monkeypatch.setitem(fit.__kwdefaults__, "solver", request.param.NAME)
    return request.param


def simulate(n=300, p=40, T=6, *, alpha=0.5, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, p)) < alpha
    weight = rng.standard_normal((p, T)) * (rng.random((p, T)) < 0.3)
    return x, x @ weight + 3.0 + noise * rng.standard_normal((n, T))


def quiet_fit(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        return fit(problem, **options)


def fit_warned(match, problem, **options):
    """The fit, and that one of its warnings matches; it may have others."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", RegressionWarning)
        model = fit(problem, **options)
    texts = [str(warning.message) for warning in raised]
    assert any(re.search(match, text) for text in texts), texts
    return model


def by_scikit(x, y, lam, use_bias=True):
    """(weight, bias) of one target by coordinate descent on standardised columns, without a Gram matrix."""
    x = x.astype(float)
    sd = x.std(axis=0)
    z = (x - x.mean(axis=0)) / sd if use_bias else x / sd
    solved = Lasso(alpha=lam, fit_intercept=use_bias, tol=1e-13, max_iter=1_000_000).fit(z, y)
    weight = solved.coef_ / sd
    return weight, (solved.intercept_ - x.mean(axis=0) @ weight if use_bias else 0.0)


def by_scikit_or_nothing(x, y, lam, use_bias):
    """The same, where some columns are constant."""
    weight, varies = np.zeros(x.shape[1]), np.ptp(x.astype(int), axis=0) > 0
    weight[varies], bias = by_scikit(x[:, varies], y, lam, use_bias) if varies.any() else (0.0, y.mean() * use_bias)
    return weight, bias


def objective(x, y, weight, lam, use_bias=True):
    residual = y - x @ weight
    residual = residual - residual.mean() if use_bias else residual
    return (residual**2).sum() / (2 * len(y)) + lam * (x.std(axis=0) * np.abs(weight)).sum()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [{}, {"n": 60, "p": 80}, {"n": 82, "p": 80}, {"alpha": 0.15}, {"T": 1}], ids=str)
def test_refit_is_scikit_lasso_on_all_rows(shape, use_bias):
    x, y = simulate(**shape)
    model = quiet_fit(make_problem(x, y, num_val=20), use_bias=use_bias, tol=1e-10)
    assert model.gap.max() < 1e-6
    assert model.nnz.max() > 0
    for t in range(y.shape[1]):
        weight, bias = by_scikit(x, y[:, t], float(model.lam[t]), use_bias)
        np.testing.assert_allclose(model.weight[:, t], weight, atol=2e-4)
        np.testing.assert_allclose(model.bias[t], bias, atol=2e-3)
    if not use_bias:
        assert (model.bias == 0).all()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [{"p": 1}, {"n": 3, "p": 1}, {"n": 40}, {"n": 40, "T": 1}], ids=str)
def test_one_column_or_one_validation_row(shape, use_bias):
    x, y = simulate(**shape)
    problem = make_problem(x, y, num_val=1)
    model = quiet_fit(problem, tol=1e-10, use_bias=use_bias)
    assert model.gap.max() < 1e-6
    for t in range(y.shape[1]):
        lam = model.path.lam[:, t]
        for i in range(0, int(np.isfinite(lam).sum()), 5):
            weight, bias = by_scikit_or_nothing(x[problem.train], y[problem.train, t], lam[i], use_bias)
            error = ((y[problem.val, t] - x[problem.val] @ weight - bias) ** 2).mean()
            np.testing.assert_allclose(model.path.val_mse[i, t], error, rtol=1e-2, atol=1e-3)


def test_orthogonal_columns_have_a_closed_form():
    x = scipy.linalg.hadamard(64)[:, 1:33].astype(float)  # mean 0, sd 1, orthogonal over all rows
    rng = np.random.default_rng(1)
    y = x[:, :5] @ rng.standard_normal((5, 4)) + rng.standard_normal((64, 4)) + 7
    model = quiet_fit(make_problem(x, y, num_val=8))
    correlation = x.T @ (y - y.mean(axis=0)) / 64
    expected = np.sign(correlation) * np.maximum(np.abs(correlation) - model.lam, 0)
    np.testing.assert_allclose(model.weight, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_equals_a_general_minimiser():
    x, y = simulate(n=50, p=5, T=3)
    model = quiet_fit(make_problem(x, y, num_val=10), tol=1e-10)
    x = x.astype(float)
    sd, n = x.std(axis=0), len(x)
    for t in range(3):
        lam = float(model.lam[t])

        def cost(v, t=t, lam=lam):  # v: positive parts, negative parts, bias
            return ((y[:, t] - x @ (v[:5] - v[5:10]) - v[10]) ** 2).sum() / (2 * n) + lam * sd @ (v[:5] + v[5:10])

        found = scipy.optimize.minimize(
            cost, np.zeros(11), bounds=[(0, None)] * 10 + [(None, None)], options={"ftol": 1e-15, "gtol": 1e-10}
        ).x
        np.testing.assert_allclose(model.weight[:, t], found[:5] - found[5:10], atol=1e-4)
        np.testing.assert_allclose(model.bias[t], found[10], atol=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_lambda_max_is_exact(use_bias):
    x, y = simulate()
    problem = make_problem(x, y, num_val=50)
    model = quiet_fit(problem, k=2, eps=0.9, use_bias=use_bias)
    fitted, r0 = x[problem.train].astype(float), y[problem.train]
    r0 = r0 - r0.mean(axis=0) if use_bias else r0
    expected = (np.abs(fitted.T @ r0) / (len(r0) * fitted.std(axis=0)[:, None])).max(axis=0)
    np.testing.assert_allclose(model.path.lam[0], expected, rtol=1e-12)
    assert (model.path.nnz[0] == 0).all()
    assert (model.path.nnz[1] > 0).all()

    nothing = np.zeros((x.shape[1], y.shape[1]))
    at = [
        certify(x, y, problem.train, nothing, scale * expected, fitted.std(axis=0), use_bias) for scale in (1.0, 0.999)
    ]
    assert at[0][0].max() < 1e-12
    assert at[0][1].max() < 1e-9
    assert at[1][0].min() > 1e-7
    assert at[1][1].min() > 9e-4


@pytest.mark.parametrize("use_bias", [True, False])
def test_certificate_is_the_formula_and_bounds_the_excess(use_bias):
    x, y = simulate(n=80, p=12, T=4)
    lam, rows = np.full(4, 0.1), np.arange(80)
    best = np.stack([by_scikit(x, y[:, t], 0.1, use_bias)[0] for t in range(4)], axis=1)
    columns = x.astype(float)
    sd = columns.std(axis=0)
    assert np.abs(certify(x, y, rows, best, lam, sd, use_bias)).max() < 1e-6

    off = best + 0.05 * np.random.default_rng(0).standard_normal(best.shape)
    gap, kkt = certify(x, y, rows, off, lam, sd, use_bias)
    for t in range(4):
        r, r0 = y[:, t] - columns @ off[:, t], y[:, t].copy()
        if use_bias:
            r, r0 = r - r.mean(), r0 - r0.mean()
        g = columns.T @ r / 80
        s = min(1.0, (0.1 * sd / np.abs(g)).min())
        dual = (r0 @ r0 - (r0 - s * r) @ (r0 - s * r)) / 160
        scale = r0 @ r0 / 160
        here = objective(columns, y[:, t], off[:, t], 0.1, use_bias)
        np.testing.assert_allclose(gap[t], (here - dual) / scale, rtol=1e-9)
        assert gap[t] * scale >= here - objective(columns, y[:, t], best[:, t], 0.1, use_bias) > 0
        violations = [abs(g[j] / sd[j] - 0.1 * np.sign(off[j, t])) / 0.1 for j in range(12)]  # none of off is 0
        np.testing.assert_allclose(kkt[t], max(violations), rtol=1e-9)


def test_fit_meets_its_certificate_and_the_optimality_conditions():
    x, y = simulate(n=400, p=60, T=9)
    model = quiet_fit(make_problem(x, y))
    columns, w = x.astype(float), model.weight.astype(float)
    residual = y - columns @ w - model.bias
    g = columns.T @ (residual - residual.mean(axis=0)) / len(x) / columns.std(axis=0)[:, None]
    on = w != 0
    lam = np.broadcast_to(model.lam, w.shape)
    np.testing.assert_allclose(g[on], (lam * np.sign(w))[on], rtol=2e-3)
    assert (np.abs(g[~on]) <= lam[~on] * (1 + 2e-3)).all()
    assert abs(residual.mean(axis=0)).max() < 1e-5
    assert model.gap.max() <= 1e-5
    np.testing.assert_array_equal(model.nnz, on.sum(axis=0))


def test_path_on_training_rows_scored_on_validation_rows():
    x, y = simulate(T=2)
    problem = make_problem(x, y, num_val=60, seed=3)
    model = quiet_fit(problem, k=12)
    for t in range(2):
        best = np.nanargmin(model.path.val_mse[:, t])
        for i in range(0, int(np.isfinite(model.path.lam[:, t]).sum()), 3):
            weight, bias = by_scikit(x[problem.train], y[problem.train, t], model.path.lam[i, t])
            error = ((y[problem.val, t] - x[problem.val] @ weight - bias) ** 2).mean()
            np.testing.assert_allclose(model.path.val_mse[i, t], error, rtol=5e-3)
        assert model.lam[t] == np.float32(model.path.lam[best, t])
        null = ((y[problem.val, t] - y[problem.train, t].mean()) ** 2).mean()
        np.testing.assert_allclose(model.r2_val[t], 1 - model.path.val_mse[best, t] / null, rtol=1e-9)
        weight, bias = by_scikit(x[problem.train], y[problem.train, t], model.path.lam[best, t])
        rest = ((y[problem.train, t] - x[problem.train] @ weight - bias) ** 2).mean()
        np.testing.assert_allclose(model.r2_train[t], 1 - rest / y[problem.train, t].var(), rtol=1e-2)


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_path_stops_after_patience_lambdas_without_a_new_minimum(patience):
    x, y = simulate(T=20, noise=3.0)
    model = quiet_fit(make_problem(x, y), k=40, eps=1e-4, patience=patience)
    solved = np.isfinite(model.path.lam).sum(axis=0)
    for t in range(20):
        errors, count = model.path.val_mse[:, t], solved[t]
        assert np.isfinite(errors[:count]).all()
        assert np.isnan(errors[count:]).all()
        assert (model.path.nnz[count:, t] == -1).all()
        running = np.minimum.accumulate(errors[:count])
        since = [i - int(np.argmin(errors[: i + 1])) for i in range(count)]
        assert max(since[:-1]) < patience
        assert (since[-1] == patience) if model.ended[t] == TURNED else count == 40
        assert model.lam[t] == np.float32(model.path.lam[np.argmin(running), t])
    assert TURNED in model.ended


def test_k_and_eps_set_the_grid():
    x, y = simulate(T=3, noise=0.01)
    model = quiet_fit(make_problem(x, y), k=7, eps=1e-3, patience=7)
    assert model.path.lam.shape == (7, 3)
    np.testing.assert_allclose(model.path.lam[-1] / model.path.lam[0], 1e-3)
    np.testing.assert_allclose(model.path.lam[1:] / model.path.lam[:-1], 1e-3 ** (1 / 6))
    assert set(model.ended) == {END_OF_PATH}


def test_released_values_of_k_and_eps_are_fine():
    x, y = simulate(T=3)
    assert fit(make_problem(x, y), k=100, eps=1e-6).gap.max() <= 1e-5


def test_any_number_of_workers_gives_the_same_bits():
    x, y = simulate(T=12)
    one, two = (quiet_fit(make_problem(x, y), workers=workers) for workers in (1, 2))
    for name in ("weight", "bias", "lam", "gap", "kkt"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("real", [False, True], ids=["masks", "real"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_target_has_the_same_bits_among_any_others(use_bias, real):
    x, y = simulate(n=333, T=256)
    x = x + 0.1 * np.random.default_rng(5).standard_normal(x.shape) if real else x
    y = y.astype(np.float32)
    whole = quiet_fit(make_problem(x, y), use_bias=use_bias, workers=2)
    for some in (slice(0, 7), slice(100, 101), slice(250, 256), slice(60, 70)):
        part = quiet_fit(make_problem(x, y[:, some]), use_bias=use_bias, workers=1)
        for name in ("weight", "bias", "lam", "gap", "kkt", "r2_train", "r2_val"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[..., some], err_msg=name)
        np.testing.assert_array_equal(part.path.val_mse, whole.path.val_mse[:, some])


def test_constant_target_has_its_value_as_bias_and_is_named():
    x, y = simulate(T=3)
    y[:, 1] = 0.1
    problem = make_problem(x, y, targets=["a", "b", "c"])
    model = fit_warned(r"constant targets.*: 1: b$", problem)
    assert (model.weight[:, 1] == 0).all()
    assert model.bias[1] == np.float32(0.1)
    assert (model.lam[1], model.ended[1]) == (0, CONSTANT)
    assert abs(model.gap[1]) < 1e-12  # absolute: there is nothing to divide by
    assert model.nnz[0] > 0


def test_constant_target_without_bias_is_a_target_like_others():
    x, y = simulate(T=1)
    model = quiet_fit(make_problem(x, np.full_like(y, 3.0)), use_bias=False)
    assert model.nnz[0] > 0
    assert model.gap[0] <= 1e-5


def test_target_constant_on_the_training_rows_alone():
    x, y = simulate(T=2)
    problem = make_problem(x, y, num_val=30)
    y[problem.train, 1] = 5.0
    model = fit_warned(r"constant on the training rows.*: 1: y\[1\]", make_problem(x, y, num_val=30))
    assert (model.weight[:, 1] == 0).all()
    np.testing.assert_allclose(model.bias[1], y[:, 1].mean(), rtol=1e-6)
    assert model.gap[1] <= 1e-5  # 0 is the solution at the lambda_max of all rows


def test_zero_target_without_bias():
    x, y = simulate(T=2)
    y[:, 0] = 0
    model = fit_warned(r"constant targets.*: 1: y\[0\]", make_problem(x, y), use_bias=False)
    assert (model.weight[:, 0] == 0).all()
    assert model.bias[0] == 0


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("value", [0, 1, 0.1])
def test_constant_column_has_weight_zero_and_is_named(value, use_bias):
    x, y = simulate()
    x = x.astype(type(value)) if isinstance(value, float) else x
    x[:, 2] = value
    model = fit_warned(r"constant columns, weight 0: 1: x\[2\]", make_problem(x, y), use_bias=use_bias)
    assert (model.weight[2] == 0).all()
    without = quiet_fit(make_problem(np.delete(x, 2, axis=1), y), use_bias=use_bias)
    np.testing.assert_allclose(np.delete(model.weight, 2, axis=0), without.weight, atol=1e-4)
    np.testing.assert_allclose(model.bias, without.bias, atol=1e-3)


@pytest.mark.parametrize("use_bias", [True, False])
def test_certificate_is_blind_to_constant_columns(use_bias):
    x, y = simulate()
    rng = np.random.default_rng(1)
    weight, lam = rng.standard_normal((40, 6)) / 10, np.full(6, 0.05)
    with_one = np.column_stack([x, np.ones(len(x), dtype=bool), np.zeros(len(x), dtype=bool)])
    rows, more = np.arange(len(x)), np.vstack([weight, np.zeros((2, 6))])
    found = certify(with_one, y, rows, more, lam, with_one.std(axis=0), use_bias)
    np.testing.assert_array_equal(found, certify(x, y, rows, weight, lam, x.std(axis=0), use_bias))


def test_column_constant_on_the_training_rows_alone():
    x, y = simulate()
    problem = make_problem(x, y, num_val=30)
    x[problem.train, 2] = True
    x[problem.val, 2] = False
    assert quiet_fit(make_problem(x, y, num_val=30)).gap.max() <= 1e-5


def test_no_column_varies():
    x, y = simulate(T=2)
    model = quiet_fit(make_problem(np.ones_like(x), y))
    assert (model.weight == 0).all()
    assert (model.lam == 0).all()
    assert np.isnan(model.path.lam).all()  # there was no path to walk
    np.testing.assert_allclose(model.bias, y.mean(axis=0), rtol=1e-6)


def test_duplicate_columns():
    x, y = simulate()
    model = quiet_fit(make_problem(np.concatenate([x, x[:, :20]], axis=1), y))
    alone = quiet_fit(make_problem(x, y))
    assert model.gap.max() <= 1e-5
    np.testing.assert_allclose(model.weight[:20] + model.weight[40:], alone.weight[:20], atol=2e-2)


def test_real_columns_far_from_zero():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((300, 10)) * 10.0 ** rng.integers(-3, 4, 10)
    y = (x / x.std(axis=0)) @ rng.standard_normal((10, 3)) + rng.standard_normal((300, 3))
    near, far = quiet_fit(make_problem(x, y)), quiet_fit(make_problem(x + 1e6 * x.std(axis=0), y))
    assert near.gap.max() <= 1e-5
    np.testing.assert_allclose(far.weight * x.std(axis=0)[:, None], near.weight * x.std(axis=0)[:, None], atol=1e-4)


@pytest.mark.parametrize("far", [1e6, 1e8])
def test_certificate_of_columns_far_from_zero(far):
    """The certificate is that of the columns less their means, whatever rounding these bring in."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((120, 20))
    y = x[:, :5] @ rng.standard_normal((5, 3)) + 0.3 * rng.standard_normal((120, 3))
    problem = make_problem(x + far, y)
    model = fit_warned("bias, a float32, is too coarse.*: 3: ", problem)
    assert model.gap.max() <= 1e-5
    near, sd = problem.x - far, x.std(axis=0)
    gap, kkt = certify(near, y, np.arange(120), model.weight, model.lam.astype(np.float64), sd, True)
    np.testing.assert_allclose(model.gap, gap, rtol=2e-9 * far)
    np.testing.assert_allclose(model.kkt, kkt, rtol=2e-9 * far)


def test_a_bias_that_float32_cannot_hold_is_reported_by_name():
    x, y = simulate(T=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the bias")
        fit(make_problem(x, y + 1000), use_bias=True)
    y[:, 1] += 1e8
    model = fit_warned(r"the bias, a float32, is too coarse.*: 1: y\[1\]$", make_problem(x, y))
    assert abs((y - model.predict(x)).mean(axis=0))[1] > 0.01


@pytest.mark.parametrize("size", [2.0**-100, 2.0**120])
def test_outcomes_of_any_size(size):
    x, y = simulate()
    near, far = quiet_fit(make_problem(x, y)), quiet_fit(make_problem(x, y * size))
    np.testing.assert_allclose(far.lam.astype(float), near.lam * size, rtol=1e-6)
    np.testing.assert_allclose(far.weight.astype(float), near.weight * size, atol=1e-4 * size)
    np.testing.assert_allclose(far.r2_val, near.r2_val, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_outcomes_of_any_float_type(dtype):
    x, y = simulate()
    y = y.astype(dtype)
    short, long = quiet_fit(make_problem(x, y)), quiet_fit(make_problem(x, y.astype(np.float64)))
    np.testing.assert_array_equal(short.weight, long.weight)


@pytest.mark.parametrize("dtype", ["float16", "longdouble", ">f8", ">i2", "int8"])
def test_real_columns_of_any_type(dtype):
    x = np.random.default_rng(0).integers(-5, 5, (300, 40))
    y = simulate()[1] + x[:, :6]
    near, far = quiet_fit(make_problem(x.astype(float), y)), quiet_fit(make_problem(x.astype(dtype), y))
    for name in ("weight", "bias", "gap", "kkt"):
        np.testing.assert_array_equal(getattr(far, name), getattr(near, name))


def test_integer_masks_are_masks():
    x, y = simulate()
    np.testing.assert_allclose(
        quiet_fit(make_problem(x.astype(np.uint8), y)).weight, quiet_fit(make_problem(x, y)).weight, atol=1e-6
    )


def test_missed_tolerance_is_reported_by_name():
    x, y = simulate(n=60, p=80, T=2)
    model = fit_warned(r"not converged to a relative duality gap of 1e-14.*y\[0\]", make_problem(x, y), tol=1e-14)
    assert model.gap.max() > 1e-14  # weights are kept in float32


def test_minimum_at_an_end_of_the_path_is_reported_by_name():
    x, y = simulate(T=2, noise=1e-3)
    fit_warned(r"end of the path.*lower eps=0.5: 2: y\[0\], y\[1\]", make_problem(x, y), k=5, eps=0.5)
    rng = np.random.default_rng(0)
    model = fit_warned(r"start of the path", make_problem(x, rng.standard_normal((300, 30))))
    start = model.lam == model.path.lam[0].astype(np.float32)
    assert start.any()
    np.testing.assert_allclose(model.r2_train[start], 0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1.0}, "eps=1.0"),
        ({"patience": 0}, "patience=0"),
        ({"tol": 0.0}, "tol=0.0"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_options_out_of_range(options, message):
    x, y = simulate()
    with pytest.raises(RegressionError, match=message):
        fit(make_problem(x, y), **options)


def test_progress_counts_every_target():
    x, y = simulate(T=7)
    done = []
    model = quiet_fit(make_problem(x, y), progress=lambda *counts: done.append(counts))
    assert sum(targets for targets, _ in done) == 7
    assert sum(lambdas for _, lambdas in done) == np.isfinite(model.path.lam).sum()


def test_import_is_light():
    code = (
        "import sys, datamodels.regression, datamodels.evaluation;"
        "print([m for m in ('torch', 'sklearn', 'scipy', 'fastargs', 'tqdm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0, 1e-30, 16777217.0])
def test_a_lambda_is_never_rounded_down(value):
    rounded = lasso.float32_at_least(value)
    assert float(rounded) >= value > float(np.nextafter(rounded, np.float32(0)))
