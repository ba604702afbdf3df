import re
import warnings

import numpy as np
import pytest

from datamodels.errors import RegressionError
from datamodels.regression import RegressionWarning, fit, make_problem, problem_from_store
from datamodels.store import Store


def test_split_is_drawn_from_the_seed():
    x, y = np.eye(50), np.arange(50.0)
    a, again, b = (make_problem(x, y, num_train=30, num_val=10, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.val, again.val)
    assert not np.array_equal(a.val, b.val)
    for problem in (a, b):
        assert (len(problem.train), len(problem.val)) == (30, 10)
        assert sorted([*problem.train, *problem.val]) == list(range(40))  # the first 40 rows, each once


def test_left_out_counts_are_a_fifth_and_the_rest():
    x, y = np.eye(50), np.arange(50.0)
    for options, expected in (
        ({}, (40, 10)),
        ({"num_val": 8}, (42, 8)),
        ({"num_train": 16}, (16, 4)),
        ({"num_train": 46}, (46, 4)),
    ):
        problem = make_problem(x, y, **options)
        assert (len(problem.train), len(problem.val)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_mask_stay_together(seed):
    groups = np.random.default_rng(seed).integers(0, 25, 100)
    problem = make_problem(np.eye(100), np.arange(100.0), num_val=20, seed=seed, groups=groups)
    assert not set(groups[problem.train]) & set(groups[problem.val])
    assert len(problem.train) + len(problem.val) == 100
    assert 20 - np.bincount(groups).max() < len(problem.val) <= 20


def test_no_split_when_one_mask_is_all_there_is():
    with pytest.raises(RegressionError, match=r"no split possible: 20 rows have 1 different masks"):
        make_problem(np.eye(20), np.arange(20.0), groups=np.zeros(20))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (10, {"num_train": 8, "num_val": 3}, r"8 \+ 3 = 11 rows asked for, but the data has 10 complete"),
        (10, {"num_val": 9}, r"no split possible: the data has 10 .* num_val=9"),
        (1, {}, "no split possible"),
        (0, {}, "no split possible: the data has 0"),
        (10, {"num_val": 0}, "num_val=0"),
        (10, {"num_train": -1}, "num_train=-1"),
    ],
)
def test_too_few_rows(rows, options, message):
    with pytest.raises(RegressionError, match=message):
        make_problem(np.ones((rows, 3)), np.ones((rows, 2)), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_values_that_are_not_finite_are_refused_by_name(value, dtype):
    x, y = np.zeros((9, 3), dtype), np.zeros((9, 2), dtype)
    y[4, 1] = value
    with pytest.raises(RegressionError, match=r"row 104, target 'b': (nan|-?inf) is not finite \(1 such"):
        make_problem(x, y, targets=["a", "b"], rows=np.arange(100, 109))
    with pytest.raises(RegressionError, match=r"row 4, column 'x\[1\]'"):
        make_problem(y[:, :2], np.zeros(9))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((9, 2)), np.ones((8, 2)), r"with the same rows; got \(9, 2\) and \(8, 2\)"),
        (np.ones((9, 2, 2)), np.ones((9, 2)), r"\(9, 2, 2\)"),
        (np.ones((9, 0)), np.ones((9, 2)), "0 columns"),
        (np.ones((9, 2)), np.ones((9, 0)), "0 targets"),
        (np.full((9, 2), "a"), np.ones((9, 2)), "dtype <U1"),
        (np.ones((9, 2)), np.ones((9, 2), complex), "dtype complex128"),
    ],
)
def test_wrong_shapes_and_types(x, y, message):
    with pytest.raises(RegressionError, match=message):
        make_problem(x, y)


def test_names_and_groups_must_fit():
    with pytest.raises(RegressionError, match="1 target names for 2 targets"):
        make_problem(np.ones((9, 2)), np.ones((9, 2)), targets=["a"])
    with pytest.raises(RegressionError, match=r"one entry per row, shape \(9,\), got \(8,\)"):
        make_problem(np.ones((9, 2)), np.ones((9, 2)), groups=np.zeros(8))


# -- from a store -----------------------------------------------------------------------------------------

P, T = 12, 3


def make_store(path, *, train=30, repeats=1, masks=None, eval_shift=0.0, done=None):
    """A store whose training outcomes depend on the seed alone and whose evaluation outcomes also on the shift."""
    counts = {"count": train} if repeats == 1 else {"masks": train // repeats, "repeats": repeats}
    design = [
        {"role": "train", "seed": 1, "sampler": "bernoulli", "alpha": 0.5} | counts,
        {"role": "eval", "masks": 5, "repeats": 2, "seed": 2},
    ]
    schema = {
        "masks": {"shape": [P], "dtype": "bits"},
        "margins": {"shape": [T], "dtype": "float32", "allow_nonfinite": True},
        "loss": {"shape": [], "dtype": "float32"},
        "image": {"shape": [2, 2], "dtype": "float32"},
    }
    store = Store.create(path, {"schema": schema, "design": design}, sync=False)
    n = store.num_models
    rng = np.random.default_rng(0)
    masks = np.stack([store.design.assignment(row).mask for row in range(n)])
    margins = masks @ rng.standard_normal((P, T)) + 0.1 * rng.standard_normal((n, T))
    margins[train:] += eval_shift
    rows = np.arange(n) if done is None else np.asarray(done)
    values = {"masks": masks, "margins": margins, "loss": margins[:, 0], "image": np.zeros((n, 2, 2))}
    store.commit_many(
        rows, {key: value[rows].astype(bool if key == "masks" else "f4") for key, value in values.items()}
    )
    return store


def test_only_complete_training_rows(tmp_path):
    store = make_store(tmp_path / "s", done=[*range(3, 25), 30, 31])
    problem = problem_from_store(store, num_val=4)
    np.testing.assert_array_equal(problem.rows, np.arange(3, 25))
    np.testing.assert_array_equal(problem.x, store.rows("masks", np.arange(3, 25)))
    np.testing.assert_array_equal(problem.y, np.load(tmp_path / "s" / "margins.npy")[3:25])
    assert problem.columns[:2] == ("masks[0]", "masks[1]")
    assert problem.targets == ("margins[0]", "margins[1]", "margins[2]")


def test_evaluation_rows_never_reach_a_weight(tmp_path):
    one, other = (make_store(tmp_path / str(shift), eval_shift=shift) for shift in (0.0, 1e3))
    assert not np.array_equal(one.rows("margins"), other.rows("margins"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        models = [fit(problem_from_store(store)) for store in (one, other)]
    assert models[0].nnz.max() > 0
    for name in ("weight", "bias", "lam", "gap"):
        assert getattr(models[0], name).tobytes() == getattr(models[1], name).tobytes()


def test_repeats_of_a_mask_stay_together(tmp_path):
    store = make_store(tmp_path / "s", train=40, repeats=4)
    for seed in range(5):
        problem = problem_from_store(store, num_val=8, seed=seed)
        ids = store.design.mask_ids[problem.rows]
        assert not set(ids[problem.train]) & set(ids[problem.val])
        assert len(problem.val) == 8


def test_equal_masks_stay_together_without_a_design(tmp_path):
    schema = {"masks": {"shape": [P], "dtype": "bool"}, "loss": {"shape": [], "dtype": "float32"}}
    store = Store.create(tmp_path / "s", {"num_models": 40, "schema": schema}, sync=False)
    distinct = np.random.default_rng(0).random((10, P)) < 0.5
    store.commit_many(range(40), {"masks": distinct[np.arange(40) % 10], "loss": np.arange(40.0, dtype="f4")})
    problem = problem_from_store(store, y_name="loss", num_val=8)
    assert not set(problem.rows[problem.train] % 10) & set(problem.rows[problem.val] % 10)
    assert problem.targets == ("loss",)
    assert len(problem.val) == 8


def test_any_key_may_be_the_columns_or_the_outcome(tmp_path):
    store = make_store(tmp_path / "s")
    problem = problem_from_store(store, x_name="margins", y_name="loss")
    assert (problem.x.shape, problem.y.shape) == ((30, T), (30, 1))
    with pytest.warns(RegressionWarning, match="best at the end of the path"):
        assert fit(problem).weight[0, 0] == pytest.approx(1, abs=0.1)  # the loss is the first margin


def test_target_slice(tmp_path):
    store = make_store(tmp_path / "s")
    every = problem_from_store(store)
    for start, end in ((0, 1), (1, 3), (1, -1)):
        problem = problem_from_store(store, target_start=start, target_end=end)
        np.testing.assert_array_equal(problem.y, every.y[:, start : end if end > 0 else T])
        assert problem.targets == every.targets[start : end if end > 0 else T]
    for start, end in ((0, 4), (3, -1), (2, 2), (2, 1), (-1, 2), (0, -2)):
        with pytest.raises(RegressionError, match=r"out of range, there are 3 targets"):
            problem_from_store(store, target_start=start, target_end=end)


def test_keys_that_cannot_be_used(tmp_path):
    store = make_store(tmp_path / "s")
    with pytest.raises(RegressionError, match=r"no key 'margin' \(data.y_name\); it has masks, margins, loss, image"):
        problem_from_store(store, y_name="margin")
    with pytest.raises(RegressionError, match=r"'image' \(data.x_name\) has shape \(2, 2\) per row"):
        problem_from_store(store, x_name="image")


def test_too_few_complete_rows_says_how_many(tmp_path):
    store = make_store(tmp_path / "s", done=range(17))
    with pytest.raises(RegressionError, match=r"20 \+ 5 = 25 rows asked for, but the store .* has 17 complete"):
        problem_from_store(store, num_train=20, num_val=5)


def test_nan_in_a_store_is_refused_by_row_and_target(tmp_path):
    store = make_store(tmp_path / "s", done=range(10, 30))
    margins = store.rows("margins", [15])
    margins[0, 2] = np.nan
    everything = {key: store.rows(key, [15]) for key in store.spec.schema} | {"margins": margins}
    store.commit_many([15], everything, replace=True)
    with pytest.raises(RegressionError, match=r"row 15, target 'margins\[2\]': nan is not finite"):
        problem_from_store(store)
    assert problem_from_store(store, target_end=2).y.shape == (20, 2)


@pytest.mark.parametrize("where", ["column", "target"])
def test_values_that_float32_does_not_hold_are_refused_by_name(where):
    x, y = np.random.default_rng(0).standard_normal((30, 4)), np.random.default_rng(1).standard_normal((30, 2))
    (x if where == "column" else y)[17, 1] = -1e160
    name = "x[1]" if where == "column" else "y[1]"
    with pytest.raises(RegressionError, match=rf"row 17, {where} '{re.escape(name)}': -1e\+160 is beyond 1e\+38"):
        make_problem(x, y)
    make_problem(np.clip(x, -1e38, 1e38), np.clip(y, -1e38, 1e38))
