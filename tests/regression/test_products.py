"""Products in int8 against those of exact rationals and of float64."""

from fractions import Fraction

import numpy as np
import pytest

from datamodels.regression import products


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 3), (3, 700, 17), (33, 65, 129)])
def test_int8_product_is_exact(shape):
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, shape[:2], dtype=np.int8)
    b = rng.integers(-128, 128, shape[1:], dtype=np.int8)
    np.testing.assert_array_equal(products.matmul(a, b), a.astype(int) @ b.astype(int))
    np.testing.assert_array_equal(products.matmul(np.ascontiguousarray(a.T).T, b), a.astype(int) @ b.astype(int))


@pytest.mark.parametrize("shape", [(18, 1, 40), (120, 1, 18), (1, 17, 3), (1, 64, 1), (120, 64, 1), (1, 1, 6)])
def test_one_row_or_column_lies_in_memory_in_any_way(shape):
    """Strides of a dimension of length 1 mean nothing, and torch takes them at their word."""
    rng = np.random.default_rng(0)
    m, k, n = shape

    def layouts(a):
        wide, tall = np.full((2 * len(a), 2 * a.shape[1]), 99, np.int8), np.full((a.shape[1], 2 * len(a)), 99, np.int8)
        wide[::2, : a.shape[1]], tall[:, : len(a)] = a, a.T
        return [a, a.T.copy().T, wide[::2, : a.shape[1]], tall[:, : len(a)].T]

    for _ in range(5):
        a, b = rng.integers(-128, 128, (m, k), dtype=np.int8), rng.integers(-128, 128, (k, n), dtype=np.int8)
        for left in layouts(a):
            for right in layouts(b):
                np.testing.assert_array_equal(products.matmul(left, right), a.astype(int) @ b.astype(int))


def test_a_processor_that_saturates_is_not_believed(monkeypatch):
    monkeypatch.setattr(products, "_int8_is_exact", lambda: False)
    test_int8_product_is_exact((3, 700, 17))


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 1 / 3, 1e-280, 1e300, -0.75, 255 / 256, 2.0**52])
def test_digits_are_the_value(value):
    digits, unit = products.limbs(np.array([[value, value / 3, -value]]))
    for column, expected in zip(digits.reshape(products.LIMBS, -1).T, (value, value / 3, -value), strict=True):
        found = sum(Fraction(int(digit)) * 256**place for place, digit in enumerate(column)) * Fraction(float(unit[0]))
        assert abs(found - Fraction(expected)) <= Fraction(abs(value)) * Fraction(2) ** -products.BITS


@pytest.mark.parametrize("n", [1, 7, 1000, products.ROWS + 5])
@pytest.mark.parametrize("kind", ["masks", "real"])
def test_products_are_those_of_float64(n, kind):
    rng = np.random.default_rng(1)
    x = rng.random((n, 9)) < 0.3
    x = x if kind == "masks" else x + rng.standard_normal(x.shape)
    r, w = rng.standard_normal((4, n)) * np.logspace(-8, 8, 4)[:, None], rng.standard_normal((4, 9))
    scale = np.abs(r).max(axis=1, keepdims=True) * np.sqrt(n)
    np.testing.assert_allclose(products.times_columns(r, x) / scale, (r @ x) / scale, atol=1e-13)
    np.testing.assert_allclose(products.rows_times(x, w), w @ x.T, atol=1e-13)


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    x, r = rng.random((300, 40)) < 0.5, rng.standard_normal((9, 300))
    whole = products.times_columns(r, x)
    for t in range(9):
        np.testing.assert_array_equal(products.times_columns(r[t : t + 1], x)[0], whole[t])
