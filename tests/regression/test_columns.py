"""Training choices of every kind as columns of one problem."""

import itertools

import numpy as np
import pytest

from datamodels.errors import RegressionError
from datamodels.regression import columns_of_store, make_problem, memory, problem_from_store
from datamodels.regression.columns import ChoiceCode, Groups, Part, Targets, chunks, common_dtype
from datamodels.store import Store

P, T = 6, 2
GRID = {"lr": [0.1, 0.2, 0.5], "aug": ["none", "flip"]}


def make_store(path, *, choices=GRID, masks=8, repeats=2, sampler=True, others=(), y_dtype="float32", done=None):
    block = {"role": "train", "seed": 1, "choices": choices} if choices else {"role": "train", "seed": 1}
    block |= {"masks": masks, "repeats": repeats, "sampler": "bernoulli"} if sampler else {"repeats": repeats}
    design = [block, *others, {"role": "eval", "masks": 3, "seed": 9, "sampler": "bernoulli", "alpha": 0.5}]
    schema = {
        "masks": {"shape": [P], "dtype": "bits", "required": False},
        "margins": {"shape": [T], "dtype": y_dtype},
        "base": {"shape": [T], "dtype": "float32"},
        "width": {"shape": [], "dtype": "int16"},
        "features": {"shape": [3], "dtype": "float16"},
        "name": {"shape": [], "dtype": "U4"},
    }
    store = Store.create(path, {"schema": schema, "design": design}, sync=False)
    n = store.num_models
    rng = np.random.default_rng(0)
    values = {
        "margins": rng.standard_normal((n, T)).astype(y_dtype),
        "base": rng.standard_normal((n, T)).astype("f4"),
        "width": rng.integers(0, 99, n).astype("i2"),
        "features": rng.standard_normal((n, 3)).astype("f2"),
        "name": np.full(n, "a"),
    }
    rows = np.arange(n) if done is None else np.asarray(done)
    store.commit_many(rows, {key: value[rows] for key, value in values.items()})
    return store


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s")


def by_hand(store, rows, factor, levels):
    return np.array([[store.design.assignment(row).choices.get(factor) == level for level in levels] for row in rows])


def test_choices_are_one_column_per_level(store):
    problem = problem_from_store(store, x_name="choices")
    assert problem.columns == ("lr=0.1", "lr=0.2", "lr=0.5", "aug=none", "aug=flip")
    assert problem.x.dtype == bool
    expected = [by_hand(store, problem.rows, factor, levels) for factor, levels in GRID.items()]
    np.testing.assert_array_equal(problem.x, np.hstack(expected))
    assert (problem.x.sum(axis=1) == 2).all()
    assert len(problem.x) == 6 * 8 * 2


@pytest.mark.parametrize("x_name", ["masks,choices", " masks , choices", ["masks", "choices"]])
def test_keys_side_by_side(store, x_name):
    problem = problem_from_store(store, x_name=x_name)
    parts = [problem_from_store(store, x_name=name) for name in ("masks", "choices")]
    assert problem.columns == parts[0].columns + parts[1].columns
    assert problem.columns[P - 1 : P + 1] == ("masks[5]", "lr=0.1")
    np.testing.assert_array_equal(problem.x, np.hstack([part.x for part in parts]))
    assert problem.x.dtype == bool
    assert problem.penalty is None


@pytest.mark.parametrize(
    ("x_name", "dtype", "columns"),
    [
        ("width", "int16", ("width",)),
        ("masks,width", "int16", (*(f"masks[{j}]" for j in range(P)), "width")),
        ("features,masks", "float16", (*(f"features[{j}]" for j in range(3)), *(f"masks[{j}]" for j in range(P)))),
        ("choices,features,width", "float32", None),
    ],
)
def test_the_smallest_dtype_that_holds_all(store, x_name, dtype, columns):
    problem = problem_from_store(store, x_name=x_name)
    assert problem.x.dtype == dtype
    assert columns is None or problem.columns == columns
    at = 0
    for name in x_name.split(","):
        alone = problem_from_store(store, x_name=name).x
        np.testing.assert_array_equal(problem.x[:, at : at + alone.shape[1]], alone)
        at += alone.shape[1]
    assert at == problem.x.shape[1]


def test_dtypes_of_several_keys():
    assert common_dtype([np.dtype("?"), np.dtype("?")]) == "?"
    assert common_dtype([np.dtype("i8"), np.dtype("f4")]) == "f8"
    assert common_dtype([np.dtype("u1"), np.dtype("i1")]) == "i2"


def test_penalties_by_key(store):
    problem = problem_from_store(store, x_name="masks,choices", penalty={"choices": 0})
    np.testing.assert_array_equal(problem.penalty, [1] * P + [0] * 5)
    problem = problem_from_store(store, x_name=["width", "masks"], penalty={"width": 2.5})
    np.testing.assert_array_equal(problem.penalty, [2.5] + [1] * P)
    assert problem_from_store(store, x_name=["width", "masks"], penalty={"width": 1}).penalty is None
    for penalty, message in (
        ({"lr": 0}, "data.penalty: 'lr' is not among the columns; data.x_name has masks, choices"),
        ({"masks": -1}, "data.penalty: -1 for 'masks'; it must be finite and at least 0"),
        ({"masks": np.inf}, "data.penalty: inf for 'masks'"),
    ):
        with pytest.raises(RegressionError, match=message):
            problem_from_store(store, x_name="masks,choices", penalty=penalty)


def test_an_offset_is_sliced_like_the_outcomes(store):
    problem = problem_from_store(store, offset_name="base", target_start=1)
    y, base = (store.rows(key, problem.rows)[:, 1:].astype(float) for key in ("margins", "base"))
    np.testing.assert_array_equal(problem.outcomes(slice(None), slice(None)), y - base)
    with pytest.raises(RegressionError, match=r"offset 'width' \(data.offset_name\) has shape \[\], the outcomes"):
        problem_from_store(store, offset_name="width")
    with pytest.raises(RegressionError, match=r"no key 'bases' \(data.offset_name\)"):
        problem_from_store(store, offset_name="bases")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_name": "masks,choice"}, r"no key 'choice' \(data.x_name\); it has masks, margins, .*, name, choices"),
        ({"x_name": "lr"}, r"no key 'lr' \(data.x_name\); it has .*choices"),
        ({"x_name": "masks,masks"}, "data.x_name: 'masks' stands twice"),
        ({"x_name": "masks,,width"}, "at least one key is needed, and none of them empty"),
        ({"x_name": []}, "at least one key is needed"),
        ({"x_name": "name"}, r"key 'name' \(data.x_name\) holds U4, no numbers"),
        ({"y_name": "name"}, r"key 'name' \(data.y_name\) holds U4, no numbers"),
    ],
)
def test_keys_that_cannot_be_columns(store, options, message):
    with pytest.raises(RegressionError, match=message):
        problem_from_store(store, **{"y_name": "margins"} | options)


def test_a_design_without_choices(tmp_path):
    with pytest.raises(RegressionError, match="has no choices: no training block of its design names factors"):
        problem_from_store(make_store(tmp_path / "s", choices=None), x_name="masks,choices")


def test_blocks_with_other_factors(tmp_path):
    others = [
        {"seed": 2, "masks": 4, "sampler": "bernoulli", "choices": {"aug": ["cut", "none"], "wd": [0]}},
        {"seed": 3, "masks": 2, "role": "eval", "choices": {"aug": ["mix"], "only": [1]}},
    ]
    store = make_store(tmp_path / "s", others=others)
    problem = problem_from_store(store, x_name="choices")
    levels = {"lr": [0.1, 0.2, 0.5], "aug": ["none", "flip", "cut"], "wd": [0]}
    assert problem.columns == tuple(f"{factor}={level}" for factor, each in levels.items() for level in each)
    expected = [by_hand(store, problem.rows, factor, each) for factor, each in levels.items()]
    np.testing.assert_array_equal(problem.x, np.hstack(expected))

    row = int(store.design.starts[2])
    code, out = ChoiceCode(store.design, "the store"), np.zeros((1, 7), dtype=bool)
    with pytest.raises(RegressionError, match=f"the store: row {row}: aug=mix is no level of a training row"):
        code.fill(np.array([row]), out)


def test_levels_that_look_alike_have_columns_of_their_own(tmp_path):
    store = make_store(tmp_path / "s", choices={"a": [1, "1", True, 1.0]})
    problem = problem_from_store(store, x_name="choices")
    assert problem.columns == ("a=1", "a='1'", "a=True", "a=1.0")
    np.testing.assert_array_equal(problem.x.sum(axis=0), [16] * 4)
    np.testing.assert_array_equal(problem.x.sum(axis=1), 1)


def test_rows_of_one_mask_stay_together_across_choices(store):
    for seed, x_name in itertools.product(range(3), ("masks", "choices", "masks,choices", "width")):
        problem = problem_from_store(store, x_name=x_name, seed=seed, num_val=24)
        ids = store.design.mask_ids[problem.rows]
        assert not set(ids[problem.train]) & set(ids[problem.val])
        assert len(problem.val) == 24


@pytest.mark.parametrize("options", [{"sampler": False}, {"masks": 1}])
def test_without_masks_rows_of_one_cell_stay_together(tmp_path, options):
    store = make_store(tmp_path / "s", repeats=5, **options)
    problem = problem_from_store(store, x_name="choices", num_val=10)
    cells = [tuple(row) for row in problem.x.tolist()]
    train, val = ({cells[at] for at in side} for side in (problem.train, problem.val))
    assert (len(train), len(val)) == (4, 2)
    assert not train & val


def test_a_key_called_choices_goes_first(tmp_path):
    schema = {"choices": {"shape": [4], "dtype": "float32"}, "loss": {"shape": [], "dtype": "float32"}}
    store = Store.create(tmp_path / "s", {"num_models": 20, "schema": schema}, sync=False)
    values = np.random.default_rng(0).standard_normal((20, 4)).astype("f4")
    store.commit_many(range(20), {"choices": values, "loss": values[:, 0]})
    problem = problem_from_store(store, x_name="choices", y_name="loss")
    np.testing.assert_array_equal(problem.x, values)


def test_only_the_slice_of_the_outcomes_is_kept_and_asked_for(tmp_path, monkeypatch):
    """Where there is memory for one target, there is none for 50,000."""
    schema = {"masks": {"shape": [P], "dtype": "bits"}, "margins": {"shape": [50_000], "dtype": "float16"}}
    store = Store.create(tmp_path / "s", {"num_models": 40, "schema": schema}, sync=False)
    masks = np.random.default_rng(0).random((40, P)) < 0.5
    store.commit_many(range(40), {"masks": masks, "margins": np.ones((40, 50_000), "f2")})
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    y = problem_from_store(store, target_start=7, target_end=9).y
    assert (y if y.base is None else y.base).nbytes == 40 * 2 * 2
    for offset in (None, "margins"):
        end = -1 if offset is None else 4_000  # 320 kB, twice with the offset, and once more to read them
        with pytest.raises(RegressionError, match="reading 40 rows of 'masks' and 'margins' needs about .* of memory"):
            problem_from_store(store, target_end=end, offset_name=offset)
    assert problem_from_store(store, target_end=4_000).y.shape == (40, 4_000)


def test_reading_in_blocks_changes_nothing(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s")
    names = {"x_name": "masks,choices,features", "offset_name": "base"}
    whole = problem_from_store(store, **names)
    monkeypatch.setattr("datamodels.regression.columns.BLOCK_BYTES", 50)
    parts = problem_from_store(store, **names)
    for name in ("x", "y", "offset", "train", "val"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert list(chunks(5, 20)) == [(0, 2), (2, 4), (4, 5)]
    assert list(chunks(3, 10**9)) == [(0, 1), (1, 2), (2, 3)]


def test_groups_of_rows():
    groups = Groups(np.array([0, 1, -1, 1, -1, -1]))
    groups.add(np.array([[0], [0], [1], [0]]))
    groups.add(np.array([[2], [1]]))
    found = groups.ids()
    assert found[:2].tolist() == [0, 1] and found[3] == 1
    assert found[2] == found[5] != found[4]
    assert len(set(found)) == 4  # none of theirs is one of the masks', though these have the numbers that come first
    np.testing.assert_array_equal(Groups(np.array([3, 3, 1])).ids(), [3, 3, 1])


def test_columns_of_any_rows(tmp_path):
    """Those of evaluation rows too, which no problem holds, so that a model of choices can predict them."""
    block = {"role": "eval", "masks": 2, "seed": 3, "sampler": "bernoulli", "choices": {"aug": ["flip"], "lr": [0.5]}}
    store = make_store(tmp_path / "s", others=[block])
    x_name = ["masks", "choices", "features"]
    problem = problem_from_store(store, x_name=x_name)
    some = [5, 3, 77]
    np.testing.assert_array_equal(columns_of_store(store, problem.rows[some], x_name=x_name), problem.x[some])
    rows = np.flatnonzero(store.design.roles == "eval")[:2]
    found = columns_of_store(store, rows, x_name=x_name)
    np.testing.assert_array_equal(found[:, :P], store.rows("masks", rows))
    np.testing.assert_array_equal(found[:, P : P + 5], [[0, 0, 1, 0, 1]] * 2)
    np.testing.assert_array_equal(found[:, P + 5 :], store.rows("features", rows))
    assert found.dtype == problem.x.dtype


def test_parts_and_targets_come_back_from_json():
    for part in (Part("masks", 5), Part("choices", 2, ("a=1", "a=2"), 0.0), Part("loss", 1, ("loss",))):
        assert Part.from_json(part.to_json()) == part
    for targets in (Targets("margins", 5), Targets("margins", 2, 3), Targets("loss", 1, scalar=True)):
        assert Targets(**targets.to_json()) == targets
    assert Targets("m", 5, 2).part(1, 3).names() == ("m[3]", "m[4]")


def test_a_problem_of_choices_alone_finds_the_level_that_matters(tmp_path):
    """The outcome is 3 where lr is .5, and the masks do nothing."""
    from datamodels.regression import fit

    store = make_store(tmp_path / "s", masks=20)
    x = problem_from_store(store, x_name="masks,choices")
    y = 3.0 * x.x[:, x.columns.index("lr=0.5")] + 0.1 * np.random.default_rng(0).standard_normal(len(x.x))
    model = fit(make_problem(x.x, y, groups=store.design.mask_ids[x.rows], columns=x.columns))
    assert model.columns[int(np.abs(model.weight[:, 0]).argmax())] == "lr=0.5"
    assert np.abs(model.weight[:P]).max() < 0.1
