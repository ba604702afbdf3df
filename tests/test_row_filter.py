"""Rows chosen by text, against the design asked row by row."""

import numpy as np
import pytest

from datamodels.design import resolve
from datamodels.errors import ConfigError
from datamodels.row_filter import select
from datamodels.spec import Spec

SPEC = {
    "schema": {"masks": {"shape": [6], "dtype": "bits"}, "x": {"shape": [], "dtype": "float32"}},
    "design": [
        {
            "role": "train",
            "masks": 2,
            "repeats": 3,
            "sampler": "bernoulli",
            "choices": {"lr": [0.1, 1e-3, 1], "net": ["small", "big one"], "aug": [True, False]},
            "filter": [["lr", "<", 1]],
        },
        {"role": "eval", "masks": 2, "choices": {"net": ["small", "7"]}},
    ],
}


@pytest.fixture(scope="module")
def design():
    return resolve(Spec.from_json(SPEC), ".").design


def asked(design, wanted):
    """The rows whose choices fulfil a function of them."""
    choices = [design.assignment(row, with_mask=False).choices for row in range(design.num_models)]
    return [row for row, levels in enumerate(choices) if wanted(levels)]


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        (["lr=0.1"], lambda c: c.get("lr") == 0.1),
        (["lr==.1"], lambda c: c.get("lr") == 0.1),
        (["lr = 1e-3"], lambda c: c.get("lr") == 0.001),
        (["lr!=0.1"], lambda c: c.get("lr") != 0.1),
        (["lr<0.1"], lambda c: c.get("lr", 9) < 0.1),
        (["lr>=0.1"], lambda c: c.get("lr", -9) >= 0.1),
        (["net=big one"], lambda c: c["net"] == "big one"),
        (["net=big one|7"], lambda c: c["net"] in ("big one", "7")),
        (["net!=big one|7"], lambda c: c["net"] == "small"),
        (["aug=true"], lambda c: c.get("aug") is True),
        (["aug=False"], lambda c: c.get("aug") is False),
        (["lr=0.1", "net=small", "aug!=true"], lambda c: c == {"lr": 0.1, "net": "small", "aug": False}),
    ],
)
def test_conditions(design, items, wanted):
    rows = select(design, items)
    assert rows.dtype == bool and rows.shape == (design.num_models,)
    assert np.flatnonzero(rows).tolist() == asked(design, wanted) != []


def test_ranges_are_joined_and_cut_by_conditions(design):
    assert np.flatnonzero(select(design, ["3-5", "9", "8 - 9"])).tolist() == [3, 4, 5, 8, 9]
    inside = [row for row in asked(design, lambda c: c.get("lr") == 0.1) if row in range(6, 30)]
    assert np.flatnonzero(select(design, ["6-29", "lr=.1"])).tolist() == inside


def test_kinds_of_rows_are_a_partition(design):
    one, other = select(design, ["lr=0.1"]), select(design, ["lr!=0.1"])
    assert (one ^ other).all()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["lrr=0.1"], "'lrr' is not a factor; did you mean 'lr'?"),
        (["depth=3"], "'depth' is not a factor; known: lr, net, aug"),
        (["lr=0.2"], "lr has no level '0.2'; it has 0.1, 0.001"),
        (["net=small|huge"], "net has no level 'huge'; it has small, big one, 7"),
        (["aug=1"], "aug has no level '1'; it has true, false"),
        (["net<small"], "< compares numbers; net has the levels small, big one, 7"),
        (["lr<high"], "< compares numbers; lr has the levels 0.1, 0.001"),
        (["lr"], "expected conditions and rows as in lr=0.1,"),
        (["lr~0.1"], "expected conditions and rows as in lr=0.1,"),
        (["5-3"], "expected rows as in 0-99, ascending and in [0, 52)"),
        (["20-52"], "expected rows as in 0-99, ascending and in [0, 52)"),
        (["-1"], "expected conditions and rows"),
        (["lr=0.1", "lr=0.001"], "no row of the store is lr=0.1 and lr=0.001"),
    ],
)
def test_what_is_not_there_is_refused_and_what_is_named(design, items, message):
    with pytest.raises(ConfigError) as error:
        select(design, items, where="--pool.rows")
    assert str(error.value).startswith("--pool.rows: ") and message in str(error.value)


def test_a_design_without_factors_says_so():
    plain = resolve(Spec.from_json({"num_models": 3, "schema": {"x": {"shape": [], "dtype": "int8"}}}), ".").design
    with pytest.raises(ConfigError, match="the design of this store has no factors"):
        select(plain, ["lr=1"])
