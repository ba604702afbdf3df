import numpy as np
import pytest

from datamodels.regression import gram, scale


@pytest.fixture(params=["bool", "real"])
def data(request):
    rng = np.random.default_rng(0)
    x = rng.random((90, 7)) < 0.4
    return (x if request.param == "bool" else x * 3.0 + rng.standard_normal((90, 7)) + 5), rng.random((90, 3)) * 9


def parts(x, y, use_bias):
    at = scale.origins(x, y, use_bias)
    return (gram.moments(x, y, rows, *at) for rows in (np.arange(60), np.arange(60, 90), np.arange(90)))


@pytest.mark.parametrize("use_bias", [True, False])
def test_gram_of_standardised_columns(data, use_bias):
    x, y = data
    got = gram.standardise(list(parts(x, y, use_bias))[2], use_bias)
    z = (x - x.mean(axis=0)) / x.std(axis=0) if use_bias else x / x.std(axis=0)
    r0 = y - y.mean(axis=0) if use_bias else y
    np.testing.assert_allclose(got.gram, z.T @ z / 90, atol=1e-12)
    np.testing.assert_allclose(got.xy, r0.T @ z / 90, atol=1e-12)
    np.testing.assert_allclose(got.scale.power, (r0**2).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(got.scale.sd, x.std(axis=0), rtol=1e-12)


@pytest.mark.parametrize("use_bias", [True, False])
def test_validation_rows_in_the_units_of_the_training_rows(data, use_bias):
    x, y = data
    train, val, _ = parts(x, y, use_bias)
    got = gram.standardise(val, use_bias, like=gram.standardise(train, use_bias))
    mean, y_mean = (x[:60].mean(axis=0), y[:60].mean(axis=0)) if use_bias else (0, 0)
    z, r0 = (x[60:] - mean) / x[:60].std(axis=0), y[60:] - y_mean
    np.testing.assert_allclose(got.gram, z.T @ z / 30, atol=1e-12)
    np.testing.assert_allclose(got.xy, r0.T @ z / 30, atol=1e-12)
    np.testing.assert_allclose(got.scale.power, (r0**2).mean(axis=0), rtol=1e-12)


def test_moments_add_up(data):
    x, y = data
    train, val, both = parts(x, y, True)
    together = train + val
    for name in ("n", "x_sum", "xx", "y_sum", "yy", "low", "high", "y_low", "y_high"):
        np.testing.assert_allclose(getattr(together.sums, name), getattr(both.sums, name), atol=1e-9)
    np.testing.assert_allclose(together.xx, both.xx, atol=1e-9)
    np.testing.assert_allclose(together.xy, both.xy, atol=1e-9)
    np.testing.assert_allclose(both.sums.xx, np.diagonal(both.xx), rtol=1e-12)


@pytest.mark.parametrize("use_bias", [True, False])
def test_constant_columns_have_no_spread_whatever_the_rounding(use_bias):
    values = np.array([0.1, 1 / 3, 1e5 + 0.1, 7e-9])
    for n in range(50, 100):
        x, y = np.tile(values, (n, 1)), np.arange(float(n))[:, None]
        at = scale.origins(x, y, use_bias)
        got = gram.standardise(gram.moments(x, y, np.arange(n), *at), use_bias)
        assert (got.scale.sd == 0).all()
        assert not got.gram.any()
        assert not got.xy.any()


def test_large_counts_of_masks_are_exact():
    x = np.random.default_rng(1).random((20_001, 3)) < 0.9
    got = gram.moments(x, np.zeros((20_001, 1)), np.arange(20_001), np.zeros(3), np.zeros(1))
    np.testing.assert_array_equal(got.xx, x.astype(np.int64).T @ x.astype(np.int64))


def test_counts_of_masks_are_exact_over_many_blocks(monkeypatch):
    monkeypatch.setattr(scale, "BLOCK", 7)
    x = np.random.default_rng(1).random((100, 9)) < 0.5
    got = gram.moments(x, np.zeros((100, 1)), np.arange(100), np.zeros(9), np.zeros(1))
    np.testing.assert_array_equal(got.xx, x.astype(np.int64).T @ x.astype(np.int64))
    np.testing.assert_array_equal(got.sums.x_sum, x.sum(axis=0))
