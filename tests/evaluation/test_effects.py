"""Effects of properties on benefits: what is planted is found, what is not is not, and what is missing is named."""

import importlib
import json

import numpy as np
import pytest

from benchmarks.effects import simulate, weights
from datamodels import cli
from datamodels.errors import DatamodelsError, StoreError
from datamodels.evaluation import effects
from datamodels.evaluation.effects import __main__ as command
from datamodels.store import Store

inner = importlib.import_module("datamodels.evaluation.effects.estimate")  # in the package the function has its name


def planted(n=150, seed=0):
    """Six properties and three benefits: one of the first alone, one of two others, one of nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)) * [1, 100, 1e-3, 1, 1, 1] + 5
    z = (x - x.mean(0)) / x.std(0)
    y = np.stack(
        [z[:, 0] + rng.normal(size=n), 3 * (z[:, 2] - 0.5 * z[:, 1]) + rng.normal(size=n), rng.normal(size=n)], 1
    )
    return x, y, z


def test_what_was_planted_is_found_and_nothing_else():
    x, y, z = planted(seed=1)
    found = effects.estimate(x, y, draws=60)
    assert np.argwhere(found.clear).tolist() == [[0, 0], [1, 1], [2, 1]]
    assert found.value[0, 0] > 0 > found.value[1, 1] and found.value[2, 1] > 0
    for t in range(3):  # of the columns that are chosen it is least squares, and so not shrunk
        chosen = found.value[:, t] != 0
        exact = np.linalg.lstsq(z[:, chosen], (y[:, t] - y[:, t].mean()) / y[:, t].std(), rcond=None)[0]
        np.testing.assert_allclose(found.value[chosen, t], exact, rtol=1e-9)
    np.testing.assert_allclose((found.low + found.high) / 2, found.value, atol=1e-12)
    assert found.r2[1] > 0.85 and found.r2[2] < 0.05 and abs(found.r2[0] - 0.5) < 0.12
    assert (found.chosen[[0, 2], [0, 1]] == 1).all() and found.models == found.groups == 150


def test_a_whole_estimate_of_given_resamples_by_hand(monkeypatch):
    """Two columns that every fit chooses: least squares alone says what value, interval and R2 are."""
    from scipy.stats import t

    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 2)) * [1, 1000]
    y = x @ [[1, 0], [2e-3, -1e-3]] + [0, 0.3] * rng.normal(size=(60, 2)) + 0.2 * x[:, :1]
    rows = rng.integers(60, size=(25, 60))
    left = [np.setdiff1d(np.arange(60), drawn) for drawn in rows]
    monkeypatch.setattr(inner, "_resamples", lambda members, draws, generator: zip(rows, left, strict=True))
    found = effects.estimate(x, y, draws=25)

    def fit(x, y):  # in standard deviations of these models, and the function that predicts
        full = np.c_[np.ones(len(x)), x]
        weight = np.linalg.lstsq(full, y, rcond=None)[0]
        return weight[1:] * x.std(0)[:, None] / y.std(0), lambda x: np.c_[np.ones(len(x)), x] @ weight

    value = fit(x, y)[0]
    np.testing.assert_allclose(found.value, value, rtol=1e-6)
    weights = np.array([fit(x[drawn], y[drawn])[0] for drawn in rows])
    noise = ((y - fit(x, y)[1](x)) ** 2).mean(0) / y.var(0)
    reach = t.ppf(0.975, 57) * np.maximum(weights.std(0), np.sqrt(noise / 57))
    np.testing.assert_allclose(found.high - value, reach, rtol=1e-4)
    np.testing.assert_allclose(value - found.low, reach, rtol=1e-4)
    errors, seen = np.zeros((60, 2)), np.zeros(60)
    for drawn, out in zip(rows, left, strict=True):
        errors[out] += (fit(x[drawn], y[drawn])[1](x[out]) - y[out]) ** 2
        seen[out] += 1
    assert (seen > 0).all()
    np.testing.assert_allclose(found.r2, 1 - (errors / seen[:, None]).mean(0) / y.var(0), rtol=1e-6)


def test_lambdas_and_columns_are_those_of_scikit_learn():
    from sklearn.linear_model import Lasso, lasso_path

    rng = np.random.default_rng(0)
    x, groups = rng.normal(size=(60, 8)), np.repeat(np.arange(20), 3)
    x = (x - x.mean(0)) / x.std(0)
    y = x[:, :2] @ [[0.6, 0.2], [0.4, 0.1]] + 0.7 * rng.normal(size=(60, 2))
    y = (y - y.mean(0)) / y.std(0)
    weight, chosen = inner._fit(x, y, groups, np.random.default_rng(5), repeats=2)
    shares = inner.LEAST_LAMBDA ** (np.arange(inner.LAMBDAS) / (inner.LAMBDAS - 1))
    generator, errors = np.random.default_rng(5), np.zeros((inner.LAMBDAS, 2))
    for _ in range(2):
        fold_of = (generator.permutation(20) % 5)[groups]
        for fold in range(5):
            out = fold_of == fold
            mean, spread = x[~out].mean(0), x[~out].std(0)
            z, c = (x - mean) / spread, y - y[~out].mean(0)
            for t in range(2):
                top = np.abs(z[~out].T @ c[~out, t]).max() / (~out).sum()
                coefficients = lasso_path(z[~out], c[~out, t], alphas=top * shares)[1]
                errors[:, t] += ((c[out, t][:, None] - z[out] @ coefficients) ** 2).sum(0)
    for t, place in enumerate(errors.argmin(0)):
        lam = np.abs(x.T @ y[:, t]).max() / 60 * shares[place]
        truth = Lasso(alpha=lam, tol=1e-10).fit(x, y[:, t]).coef_
        assert 0 < (truth != 0).sum() < 8 and np.array_equal(chosen[:, t], truth != 0)
        assert np.array_equal(weight[:, t] != 0, truth != 0)


def test_more_columns_than_models_are_not_interpolated():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 60))
    y = x[:, :1] + 0.5 * rng.normal(size=(30, 1))
    found = effects.estimate(x, y, draws=20)
    assert found.clear[0, 0] and found.clear.sum() <= 4 and 0.3 < found.r2[0] < 0.9
    assert (found.value != 0).sum() <= 15


@pytest.mark.parametrize("together", [0.0, 0.7])
def test_effects_are_not_shrunk_and_intervals_hold_them(together):
    """Of .64 and .43 among five columns, .54 and .36 where they go together. `benchmarks/effects.py` has the rest."""
    made = [simulate(40, weights(5), together, seed, draws=20) for seed in range(16)]
    off = np.array([found.value.mean(axis=1) - truth for found, truth in made]).mean(axis=0)
    assert np.abs(off).max() < 0.06, "shrunk"
    held = [(found.low <= truth[:, None]) & (truth[:, None] <= found.high) for found, truth in made]
    assert np.mean(held, axis=(0, 2))[:2].min() >= 0.85 and np.mean(held, axis=(0, 2))[2:].min() >= 0.85


def test_units_do_not_matter_and_spearman_is_scipys():
    from scipy.stats import spearmanr

    x, y, _ = planted()
    a = effects.estimate(x, y, draws=5)
    b = effects.estimate(1e4 * x - 3, -1e-5 * y, draws=5)
    assert np.allclose(a.value, -b.value, atol=1e-4) and np.allclose(a.low, -b.high, atol=1e-4)
    assert np.allclose(a.correlation, spearmanr(x, y).statistic[:6, 6:])


def test_repeats_of_one_choice_are_no_more_models():
    x, y, _ = planted(n=30)
    alone = effects.estimate(x, y, draws=40)
    copied = effects.estimate(np.repeat(x, 8, 0), np.repeat(y, 8, 0), groups=np.repeat(np.arange(30), 8), draws=40)
    naive = effects.estimate(np.repeat(x, 8, 0), np.repeat(y, 8, 0), draws=40)
    width = [float(np.mean((f.high - f.low)[[0, 1, 2], [0, 1, 1]])) for f in (alone, copied, naive)]
    assert (copied.models, copied.groups) == (240, 30)
    assert 0.7 < width[1] / width[0] < 1.4 and width[2] < 0.6 * width[1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, y: (x[:9], y[:9]), "expected 10 different models or more, got 9"),
        (lambda x, y: (np.hstack([x, np.full((150, 1), 7.1)]), y), r"x\[6\] is the same for all 150 models"),
    ],
)
def test_what_cannot_be_estimated(change, why):
    x, y, _ = planted()
    with pytest.raises(DatamodelsError, match=why):
        effects.estimate(*change(x, y), draws=2)


# ------------------------------------------------------------------ from a store


@pytest.fixture
def store(tmp_path):
    number = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True}
    schema = {
        "norm": {**number, "role": "property"},
        "rank": {**number, "shape": [2], "role": "property"},
        "same": {**number, "role": "property"},
        "rare": {**number, "role": "property"},
        "accuracy": {**number, "role": "benefit"},
        "loss": {**number, "role": "benefit"},
        "name": {"shape": [], "dtype": "U3", "required": False, "role": "benefit"},
        "done": {"shape": [], "dtype": "bool"},
    }
    design = [{"role": "train", "seed": 0, "repeats": 3, "choices": {"width": list(range(16))}}]
    x, y, _ = planted(n=48)
    with Store.create(tmp_path / "store", {"schema": schema, "design": design}) as made:
        for row in range(47):
            values = {"done": True, "norm": x[row, 0], "rank": x[row, 1:3], "same": 1.5, "name": "abc"}
            values |= {"accuracy": y[row, 0] if row != 5 else ValueError("no"), "loss": y[row, 1]}
            if row == 7:
                values["norm"] = np.nan
            if row < 9:
                values["rare"] = row
            made.commit_many([row], {key: [value] for key, value in values.items()})
        yield made


def test_the_columns_are_the_roles_and_what_is_left_out_is_named(store):
    table = effects.read(store)
    assert table.columns == ("norm", "rank[0]", "rank[1]") and table.targets == ("accuracy", "loss")
    assert table.rows.tolist() == [row for row in range(47) if row not in (5, 7)]
    assert table.left_out == (
        "rare: 38 of 47 rows do not have it",
        "row 5: has no accuracy",
        "row 7: has no norm",
        "same: the same in all rows",
    )
    x, y, _ = planted(n=48)
    assert np.array_equal(table.x, x[table.rows, :3]) and np.array_equal(table.y, y[table.rows, :2])
    widths = [store.design.assignment(int(row)).choices["width"] for row in table.rows]
    same = table.groups[:, None] == table.groups[None]
    assert np.array_equal(same, np.equal.outer(widths, widths)) and len(set(table.groups)) == 16


def test_a_damaged_record_is_no_value_that_a_row_lacks(store):
    name = "_keys/accuracy.npy"
    with open(store.path / name, "r+b") as file:
        file.seek(store.layout.heads[name] + 16 * 4)
        file.write(b"\0")  # the status of row 4
    with pytest.raises(StoreError, match="row 4, 'accuracy': its record is damaged"):
        effects.read(store)


@pytest.mark.parametrize("shape", [[], [2]])
def test_a_measurement_that_failed_in_all_rows_is_left_out(tmp_path, shape):
    number = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True, "role": "property"}
    schema = {"norm": number, "failed": {**number, "shape": shape}, "accuracy": {**number, "role": "benefit"}}
    with Store.create(tmp_path / "store", {"schema": schema, "design": [{"count": 4, "seed": 0}]}) as made:
        for row in range(4):
            made.commit_many([row], {"norm": [row], "accuracy": [row**2], "failed": [ValueError("never")]})
        table = effects.read(made)
    assert table.columns == ("norm",) and table.left_out == ("failed: 4 of 4 rows do not have it",)


@pytest.fixture
def measured(tmp_path):
    """A store as measurements make it: times have no role, and an estimate has what describes it beside it."""
    number = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True}
    names = ["llc", "llc_se", "llc_rhat", "llc_acceptance", "llc_step_bias", "llc_trusted", "llc_n", "llc_nbeta"]
    names += ["norm", "norm_n"]
    schema = {f"d_train_{name}": {**number, "role": "property"} for name in names}
    schema |= {"d_train_seconds_llc": number, "d_accuracy_drop": {**number, "role": "benefit"}}
    schema |= {"seconds_accuracy_drop": number}
    values = np.random.default_rng(0).normal(size=(25, len(schema)))
    values[:, list(schema).index("d_train_llc_trusted")] = np.arange(25) >= 17
    with Store.create(tmp_path / "store", {"schema": schema, "design": [{"count": 25, "seed": 0}]}) as made:
        for row in range(25):
            made.commit_many([row], {key: [value] for key, value in zip(schema, values[row], strict=True)})
        yield made


def test_what_describes_an_estimate_or_a_measurement_is_no_property(measured, capsys):
    for table in (effects.read(measured), effects.read(measured, ["d_train_*"], ["*_accuracy_drop"])):
        assert table.columns == ("d_train_llc", "d_train_norm", "d_train_norm_n")
        assert table.targets == ("d_accuracy_drop",) and table.left_out == ()
        assert table.notes == ("17 of 25 values of d_train_llc are not trusted",)
    named = effects.read(measured, ["d_train_llc_se", "d_train_seconds_llc", "d_train_norm"])
    assert named.columns == ("d_train_llc_se", "d_train_seconds_llc", "d_train_norm") and named.notes == ()
    with pytest.raises(DatamodelsError, match=r"'d_train_s\*' is the pattern only of .*d_train_seconds_llc\); such"):
        effects.read(measured, ["d_train_s*"])
    command.main([str(measured.path), "--draws=20"])
    assert "note: 17 of 25 values of d_train_llc are not trusted" in capsys.readouterr().err


def test_keys_by_pattern_and_mistakes(store):
    assert effects.read(store, ["r*k", "norm"], ["loss"]).columns == ("rank[0]", "rank[1]", "norm")
    with pytest.raises(DatamodelsError, match="no number is called 'nrm'; did you mean 'norm'"):
        effects.read(store, ["nrm"])
    with pytest.raises(DatamodelsError, match="loss: stands among the properties and among the benefits"):
        effects.read(store, ["loss", "norm"])
    with pytest.raises(DatamodelsError, match="nothing varies"):
        effects.read(store, ["same"])


def test_the_command(store, tmp_path, capsys):
    def run(*more):
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: command.main([str(store.path), "--draws=20", *more]))
        return end.value.code, *capsys.readouterr()

    code, out, err = run(f"--plot={tmp_path}/effects.png")
    assert code == 0 and "45 models of 16 different choices, 3 properties" in out
    assert "left out: row 5: has no accuracy" in err
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("--json")
    found = json.loads(out)
    assert code == 0 and np.array(found["value"]).shape == (3, 2) and found["draws"] == 20
    assert run("--plot=a.gif")[0] == 2
