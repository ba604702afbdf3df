"""The matrices that all targets share, against plain numpy."""

import numpy as np
import pytest

from datamodels.regression import gram


def plain(x, use_bias):
    """Coded columns in float64, as gram.Columns describes them."""
    return 2.0 * x - 1 if use_bias else x.astype(float)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("n", "p"), [(50, 7), (300, 130), (90, 1500)])
def test_masks_give_exact_integers(n, p, use_bias):
    rng = np.random.default_rng(0)
    x = rng.random((n, p)) < rng.random(p)
    rows = rng.permutation(n)
    train, val = np.sort(rows[: n // 2]), np.sort(rows[n // 2 : -5])
    columns = gram.code_columns(x, train, val, use_bias)
    got = gram.multiply(columns, workers=2)
    for part, matrix, diagonal in ((train, got.train, got.diag_train), (np.r_[train, val], got.full, got.diag_full)):
        expected = plain(x[part], use_bias).T @ plain(x[part], use_bias)
        np.testing.assert_array_equal(diagonal, np.diagonal(expected))
        off = ~np.eye(p, dtype=bool)
        np.testing.assert_array_equal(matrix[off], expected[off])
    assert got.train.dtype == np.int16
    np.testing.assert_allclose(columns.sd_train * columns.unit, x[train].std(axis=0), atol=1e-15)
    np.testing.assert_allclose(columns.sd_full * columns.unit, x[np.r_[train, val]].std(axis=0), atol=1e-15)
    np.testing.assert_array_equal(columns.x_val, plain(x[val], use_bias).T)


@pytest.mark.parametrize("copies", [False, True])
def test_counts_that_int16_does_not_hold(copies):
    """The diagonal is kept beside; where copies of a column make others as large, float32 holds them exactly."""
    rng = np.random.default_rng(0)
    n = 41_000
    x = rng.random((n, 6)) < 0.5
    if copies:
        x[:, 3] = x[:, 1]
    columns = gram.code_columns(x, np.arange(n - 1000), np.arange(n - 1000, n), True)
    got = gram.multiply(columns, workers=1)
    assert got.full.dtype == (np.float32 if copies else np.int16)
    expected = plain(x, True).T @ plain(x, True)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_array_equal(got.full[off], expected[off])
    np.testing.assert_array_equal(got.diag_full, n)


@pytest.mark.parametrize("use_bias", [True, False])
def test_real_columns_are_standardised_first(use_bias):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((80, 5)) * [1, 10, 1e-3, 1e4, 1] + [0, 1e5, 0, 0, 3] * np.array(float(use_bias))
    x[:, 4] = 3.0
    train, val = np.arange(0, 80, 2), np.arange(1, 80, 2)
    columns = gram.code_columns(x, train, val, use_bias)
    coded = (x - columns.origin) / columns.unit
    got = gram.multiply(columns, workers=2)
    np.testing.assert_allclose(got.train, coded[train].T @ coded[train], atol=1e-9)
    np.testing.assert_allclose(got.full, coded.T @ coded, atol=1e-9)
    np.testing.assert_allclose(columns.sd_train * columns.unit, x[train].std(axis=0), rtol=1e-9)
    assert columns.sd_full[4] == 0


@pytest.mark.parametrize("kind", ["masks", "real"])
def test_the_same_bits_for_any_number_of_workers(kind, monkeypatch):
    monkeypatch.setattr(gram, "TILE", 32)
    rng = np.random.default_rng(2)
    x = rng.random((200, 150)) < 0.5
    x = x if kind == "masks" else x + rng.standard_normal(x.shape)
    one, three = (
        gram.multiply(gram.code_columns(x, np.arange(150), np.arange(150, 200), True), workers) for workers in (1, 3)
    )
    np.testing.assert_array_equal(one.train, three.train)
    np.testing.assert_array_equal(one.full, three.full)
    np.testing.assert_array_equal(one.full, one.full.T)


def test_row_shards_add_up_to_the_bit():
    """Sums of integers: a matrix that was built in parts, anywhere, is the one built at once."""
    rng = np.random.default_rng(3)
    x = rng.random((500, 90)) < 0.5
    parts = [np.arange(0, 120), np.arange(120, 333), np.arange(333, 450)]
    val = np.arange(450, 500)
    whole = gram.multiply(gram.code_columns(x, np.arange(450), val, True), workers=1)
    shards = [gram.multiply(gram.code_columns(x, rows, val, True), workers=1).train for rows in parts]
    np.testing.assert_array_equal(sum(shards), whole.train)
