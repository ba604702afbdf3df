"""Rankings of models: every statistic against scipy or by hand, what is joined and refused, and what people see."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.ranking import held
from datamodels.errors import ConfigError, RankingError, StoreError
from datamodels.evaluation import ranking
from datamodels.evaluation.ranking import statistics
from datamodels.evaluation.ranking.__main__ import main
from datamodels.evaluation.ranking.join import combined, parse, show
from datamodels.evaluation.ranking.scores import short_names
from datamodels.report import ranking as pictures
from datamodels.store import Store
from datamodels.store.export import export
from tests import needs

ROOT = Path(__file__).parents[2]
ORACLES = {
    "tau": stats.kendalltau,
    "weighted_tau": stats.weightedtau,
    "spearman": stats.spearmanr,
    "pearson": stats.pearsonr,
}


def ones(count):
    return np.ones((1, count), np.int64)


# ------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("ties", ["none", "scores", "actual", "both"])
@pytest.mark.parametrize("models", [3, 8, 25])
def test_statistics_are_scipys_with_and_without_ties(name, ties, models):
    rng = np.random.default_rng(models)
    scores = rng.standard_normal(models)
    actual = 0.6 * scores + rng.standard_normal(models)
    if ties in ("scores", "both"):
        scores[1::2] = scores[::2][: len(scores[1::2])]
    if ties in ("actual", "both"):
        actual[models // 2 :] = actual[models // 2]
    got = statistics.correlations(scores, actual, ones(models))[name][0]
    assert got == pytest.approx(ORACLES[name](scores, actual).statistic, abs=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_a_draw_is_the_statistic_of_the_models_as_often_as_they_are_drawn(name):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, 9).astype(float)  # with ties
    actual = 0.5 * scores + rng.standard_normal(9)
    counts = rng.multinomial(9, np.full(9, 1 / 9), size=40)
    counts[20:, 2:5] = 0  # as where some models have no value: a draw then has fewer than there are models
    got = statistics.correlations(scores, actual, counts)[name]
    for value, count in zip(got, counts, strict=True):
        drawn = np.repeat(np.arange(9), count)
        assert value == pytest.approx(ORACLES[name](scores[drawn], actual[drawn]).statistic, abs=1e-6)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("beyond", [(np.inf,), (-np.inf,), (np.inf, np.inf, -np.inf)])
def test_infinite_scores_are_ranks_that_pearson_leaves_out(name, beyond):
    """The ranks of scipy's statistics are the same if the infinities are numbers far away."""
    rng = np.random.default_rng(len(beyond))
    scores = rng.standard_normal(9)
    actual = 0.6 * scores + rng.standard_normal(9)
    scores[[1, 4, 6][: len(beyond)]] = beyond
    counts = np.concatenate([ones(9), rng.multinomial(9, np.full(9, 1 / 9), size=20)])
    got = statistics.correlations(scores, actual, counts)[name]
    far, finite = np.clip(scores, -1e6, 1e6), np.isfinite(scores)
    for value, count in zip(got, counts, strict=True):
        drawn = np.repeat(np.arange(9), count * (finite if name == "pearson" else 1))
        truth = ORACLES[name](far[drawn], actual[drawn]).statistic if len(drawn) > 1 else np.nan
        assert value == pytest.approx(truth, abs=1e-6, nan_ok=True)


def test_pearson_of_two_finite_scores_is_no_number():
    scores = np.array([np.inf, 1.0, 2.0, -np.inf])
    found = statistics.correlations(scores, np.arange(4.0), ones(4))
    assert math.isnan(found["pearson"][0])
    assert found["tau"][0] == pytest.approx(-4 / 6)  # of six pairs only that of the finite ones is concordant


def test_a_constant_score_predicts_nothing_and_constant_performance_cannot_be_predicted():
    same, different = np.full(5, 0.1) * 3, np.arange(5.0)
    for name in ORACLES:
        assert statistics.correlations(same, different, ones(5))[name][0] == 0, name
        assert math.isnan(statistics.correlations(different, same, ones(5))[name][0]), name


def test_what_is_constant_in_a_draw_is_constant_whatever_rounding_says():
    counts = np.array([[0, 0, 0, 0, 7, 0, 0], [0, 0, 0, 0, 0, 3, 0], [2, 3, 2, 0, 0, 0, 0], [1, 1, 3, 0, 0, 0, 0]])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores, actual = rng.standard_normal(7) / 3, rng.standard_normal(7) / 3
        scores[:3] = scores[0]
        for name, got in statistics.correlations(scores, actual, counts).items():
            assert np.isnan(got[:2]).all() and got[2:].tolist() == [0, 0], name


def test_regret_and_hit_by_hand():
    actual = np.array([0.5, 0.9, 0.8, 0.6])
    scores = np.array([4.0, 1.0, 3.0, 2.0])  # takes the models 0, 2, 3, 1
    for k, (regret, hit) in {1: (0.4 / 0.9, 0), 2: (0.1 / 0.9, 0), 3: (0.1 / 0.9, 0), 4: (0, 1), 9: (0, 1)}.items():
        found = statistics.choices(scores, actual, ones(4), k)
        assert (found[0][0], found[1][0]) == pytest.approx((regret, hit)), k


@pytest.mark.parametrize("seed", range(6))
def test_where_equal_scores_compete_it_is_the_mean_over_who_is_taken(seed):
    rng = np.random.default_rng(seed)
    models = 6
    scores, actual = rng.integers(0, 3, models).astype(float), rng.integers(1, 5, models) / 5
    if seed >= 3:  # what is infinite is taken first or last, what is missing never, and may have been the best
        scores[:4] = np.inf, np.nan, np.nan, -np.inf
        actual[1] = 0.9
    counts = rng.multinomial(models, np.full(models, 1 / models), size=6)
    for k in (1, 2, 3, 5):
        got = statistics.choices(scores, actual, counts, k)
        for b, count in enumerate(counts):
            there = np.flatnonzero(count)
            best, regrets, hits = actual[there].max(), [], []
            scored = there[~np.isnan(scores[there])]
            if not len(scored):
                assert math.isnan(got[0][b]) and math.isnan(got[1][b])
                continue
            for order in itertools.permutations(scored):  # all ways to break ties are equally often among these
                taken = sorted(order, key=lambda m: -scores[m])[:k]
                reached = max(actual[m] for m in taken)
                regrets.append((best - reached) / best)
                hits.append(reached == best)
            assert got[0][b] == pytest.approx(np.mean(regrets), abs=1e-9)
            assert got[1][b] == pytest.approx(np.mean(hits), abs=1e-9)


def test_a_regret_relative_to_nothing_is_no_number():
    regret, hit = statistics.choices(np.arange(3.0), np.array([-3.0, -1.0, -2.0]), ones(3), 1)
    assert math.isnan(regret[0]) and hit[0] == 0


# ------------------------------------------------------------------------------------------- what is read and joined

OWN = ["--actual_name=accuracy"]  # the truth stands among the scores
MODELS = ["zoo/tiny", "zoo/small", "zoo/base", "zoo/large", "zoo/broken"]
PARAMS = dict(zip(MODELS, [1e6, 3e6, 9e6, 3e7, 2e7], strict=True))
QUALITY = dict(zip(MODELS, [0.1, 0.4, 0.5, 0.9, 0.2], strict=True))
NUMBER = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True}
SCAN = {
    "schema": {
        "log_me": NUMBER,
        "sharp-ness": NUMBER,
        "num_params": {**NUMBER, "role": "property"},
        "accuracy": {**NUMBER, "role": "benefit"},
        "seconds_log_me": NUMBER,
        "per_class": {"shape": [3], "dtype": "float32", "required": False},
        "verdict": {"shape": [], "dtype": "U8", "required": False},
    },
    "design": [
        {
            "choices": {"model": MODELS, "dataset": ["pets", "cars"], "n_samples": [10, 100]},
            "filter": [["n_samples", "<=", 100]],
            "repeats": 2,
            "seed": 1,
        },
        {"choices": {"model": MODELS, "dataset": ["pets", "cars"]}, "repeats": 3, "seed": 2},
    ],
}


def values_of(row, model, dataset, n_samples=None):
    """Made up, the same for the same row; log_me of the broken model failed on cars."""
    rng = np.random.default_rng(row)
    if n_samples is None:
        return {"accuracy": 0.5 + 0.4 * QUALITY[model] + 0.01 * rng.standard_normal()}
    noise = rng.standard_normal() / n_samples
    found = {
        "log_me": QUALITY[model] + noise + (dataset == "cars"),
        "sharp-ness": -QUALITY[model] + 20 * noise,
        "num_params": PARAMS[model],
        "seconds_log_me": 0.1,
        "verdict": "trust",
        "per_class": np.zeros(3),
    }
    if model == "zoo/broken" and dataset == "cars":
        del found["log_me"]
    return found


def fill(path, spec, skip=()):
    with Store.create(path, spec, sync=False) as store:
        for row in range(store.num_models):
            if row not in skip:
                found = values_of(row, **store.design.assignment(row).choices)
                store.commit_many([row], {key: [value] for key, value in found.items()})
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("scan") / "store", SCAN)


def cells(dataset, n_samples, key):
    """The mean over its repeats of a value that `fill` wrote, model -> number, from the rule of row order alone."""
    found = {}
    if n_samples is not None:
        grid = list(itertools.product(MODELS, ["pets", "cars"], [10, 100]))
        repeats, first = 2, 0
    else:
        grid, repeats, first = list(itertools.product(MODELS, ["pets", "cars"], [None])), 3, 40
    for number, (model, data, size) in enumerate(grid):
        if (data, size) == (dataset, n_samples):
            rows = [first + number * repeats + r for r in range(repeats)]
            written = [values_of(row, model, data, size).get(key, np.nan) for row in rows]
            found[model] = np.mean(written)
    return found


def joined_of(path, **options):
    scores = ranking.read(path)
    actual, notes = ranking.actual_of(scores, "accuracy")
    return ranking.join(scores, actual, notes=notes, **options)


@pytest.mark.parametrize("n_samples", [10, 100, None])
def test_scan_and_fine_tuned_rows_of_one_store_meet_on_model_and_data_set(scan, n_samples):
    joined = joined_of(scan, n_samples=n_samples)
    assert joined.models == tuple(MODELS) and joined.datasets == ("pets", "cars")
    assert set(joined.scores) == {"log_me", "sharp-ness", "num_params"}
    for d, dataset in enumerate(joined.datasets):
        for key in joined.scores:
            expected = cells(dataset, n_samples or 100, key)
            np.testing.assert_allclose(joined.scores[key][:, d], [expected[m] for m in MODELS], rtol=1e-12)
        expected = cells(dataset, None, "accuracy")
        np.testing.assert_allclose(joined.actual[:, d], [expected[m] for m in MODELS], rtol=1e-12)
    assert (joined.n_samples, joined.seeds, joined.actual_seeds) == (n_samples or 100, (2, 2), (3, 3))


def test_the_spread_is_that_over_seeds(scan):
    grid = ranking.read(scan).of(n_samples=10).mean()
    rows = [values_of(row, "zoo/tiny", "pets", 10)["log_me"] for row in (0, 1)]
    assert grid.spreads["log_me"][0, 0] == pytest.approx(np.std(rows, ddof=1))
    assert grid.spreads["num_params"][0, 0] == 0 and grid.seeds["log_me"][0, 0] == 2


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_export_is_read_as_its_store_is(scan, tmp_path, ending):
    if ending == "parquet":
        needs.pyarrow()
    with Store.open(scan) as store:
        export(store, tmp_path / f"scan.{ending}")
    one, other = joined_of(scan), joined_of(tmp_path / f"scan.{ending}")
    assert (one.models, one.datasets, one.n_samples) == (other.models, other.datasets, other.n_samples)
    assert set(one.scores) == set(other.scores)
    for name in one.scores:
        np.testing.assert_array_equal(one.scores[name], other.scores[name])
    np.testing.assert_array_equal(one.actual, other.actual)


def test_two_stores_and_a_file_of_names_and_numbers_are_joined_alike(scan, tmp_path):
    both = joined_of(scan)
    metrics = fill(tmp_path / "metrics", {**SCAN, "design": SCAN["design"][:1]})
    accuracies = {**SCAN, "design": [SCAN["design"][1]]}
    with Store.create(tmp_path / "actual", accuracies, sync=False) as store:
        for row in range(store.num_models):  # the same values as in the one store, whose rows begin at 40 there
            found = values_of(row + 40, **store.design.assignment(row).choices)
            store.commit_many([row], {key: [value] for key, value in found.items()})
    scores = ranking.read(metrics)
    apart = ranking.join(scores, ranking.actual_of(ranking.read(tmp_path / "actual"), "accuracy")[0])
    raw = {d: {m: float(both.actual[i, j]) for i, m in enumerate(MODELS)} for j, d in enumerate(both.datasets)}
    (tmp_path / "actual.yaml").write_text(json.dumps(raw))
    named = ranking.join(scores, ranking.from_yaml(tmp_path / "actual.yaml", "accuracy", both.datasets))
    for other in (apart, named):
        np.testing.assert_array_equal(both.actual, other.actual)
        np.testing.assert_array_equal(both.scores["log_me"], other.scores["log_me"])


def table(path, text):
    path.write_text(text)
    return ranking.read(path)


def test_keys_of_data_set_split_and_name_are_melted(tmp_path):
    number = {**NUMBER, "required": True}
    spec = {
        "schema": {
            **{
                f"{place}_{name}": number
                for place in ("digits_test", "digits_test_hard_train", "pets_test")
                for name in ("log_me", "accuracy")
            },
            "digits_test_to_pets_test_accuracy_drop": number,
            "num_params": number,
        },
        "measurements": {
            "names": ["log_me"],
            "on": ["digits/test", "digits_test_hard/train", "pets/test", "digits/test->pets/test"],
        },
        "design": [{"choices": {"model": ["a", "b", "c"]}}],
    }
    keys = list(spec["schema"])
    with Store.create(tmp_path / "wide", spec, sync=False) as store:
        for row in range(3):
            store.commit_many([row], {key: [10 * row + at] for at, key in enumerate(keys)})
    for scores in (ranking.read(tmp_path / "wide"), _wide_csv(tmp_path, keys)):
        assert set(scores.values) >= {"log_me", "accuracy", "num_params"}
        for row, model in enumerate("abc"):
            line = (scores.models == model) & (scores.datasets == "pets") & (scores.splits == "test")
            assert line.sum() == 1
            assert scores.values["log_me"][line] == 10 * row + keys.index("pets_test_log_me")
            assert scores.values["num_params"][line] == 10 * row + keys.index("num_params")
    scores = ranking.read(tmp_path / "wide")
    assert sorted(set(scores.datasets)) == ["digits", "digits_test_hard", "pets"]
    assert set(scores.values) == {"log_me", "accuracy", "num_params"}, "a drop from one to the other is of neither"


def _wide_csv(folder, keys):
    lines = [["model", *keys], *([m, *(10 * row + at for at in range(len(keys)))] for row, m in enumerate("abc"))]
    return table(folder / "wide.csv", "\n".join(",".join(map(str, line)) for line in lines) + "\n")


def test_what_would_be_averaged_over_is_refused(tmp_path):
    spec = {"schema": {"m": NUMBER}, "design": [{"choices": {"model": ["a", "b", "c"], "labels": ["", "0,3"]}}]}
    with Store.create(tmp_path / "store", spec, sync=False) as store:
        store.commit_many(range(6), {"m": np.arange(6.0)})
        export(store, tmp_path / "scan.csv")
    for path in (tmp_path / "store", tmp_path / "scan.csv"):
        with pytest.raises(RankingError, match="factor 'labels' has the levels , 0,3, whose values would be averaged"):
            ranking.read(path)
    assert ranking.read(tmp_path / "store", rows=["labels=0,3"]).values["m"].tolist() == [1, 3, 5]
    two = table(tmp_path / "a.csv", "model,dataset,split,m\na,d,train,1\na,d,test,2\n")
    with pytest.raises(RankingError, match="Only repeats, and the factors seed and sample_seed, are averaged over"):
        ranking.read(tmp_path / "store")
    with pytest.raises(RankingError, match="choose one with --actual_rows=labels=…"):
        main([str(tmp_path / "a.csv"), f"--actual={tmp_path / 'store'}"])
    with pytest.raises(RankingError, match="it has splits test, train; choose one with --split"):
        two.mean()
    assert two.of(splits="test").mean().values["m"].tolist() == [[2]]


def test_rows_that_are_not_complete_are_counted_and_damaged_ones_refused(tmp_path):
    path = fill(tmp_path / "store", SCAN, skip=range(6))
    assert ranking.read(path).incomplete == 6
    raw = np.lib.format.open_memmap(path / "log_me.npy", mode="r+")
    raw[12] += 1
    raw.flush()
    with pytest.raises(StoreError, match="row 12.*nothing is ranked"):
        ranking.read(path)


CSV = "model,dataset,n_samples,seed,log_me,num_params,note,accuracy\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,log_me\na,1\n", "nothing says which model"),
        ("model,note\na,good\n", "no number per line"),
        ("model,log_me\n", "a line per measurement"),
        ("model,log_me\na,1,2\n", "line 2: expected 2 values"),
        ("model,log_me,log_me\na,1,2\n", "a column stands there twice: log_me"),
        ("model,dataset,log_me\na,,1\n", "has no dataset"),
    ],
)
def test_tables_that_cannot_be_ranked(tmp_path, text, told):
    with pytest.raises(RankingError, match=told):
        table(tmp_path / "scan.csv", text)


def test_a_foreign_table(tmp_path):
    """Empty cells are missing, true and false are numbers, text is no score; an infinity of one seed is the mean's."""
    lines = ["a,d,10,0,1.5,1e6,x,", "a,d,10,1,2.5,1e6,y,", "b,d,10,0,inf,2e6,x,", "a,d,,,,,,0.5", "b,d,,,,,,0.75"]
    lines += ["b,d,10,1,3,2e6,x,"]
    scores = table(tmp_path / "scan.csv", CSV + "\n".join(lines) + "\n")
    assert set(scores.values) == {"log_me", "num_params", "accuracy"}
    grid = scores.of(n_samples=10).mean()
    assert grid.values["log_me"].tolist() == [[2], [np.inf]] and math.isnan(grid.spreads["log_me"][1, 0])
    assert grid.seeds["log_me"].tolist() == [[2], [2]]
    assert ranking.actual_of(scores, "accuracy")[0].values["accuracy"].tolist() == [[0.5], [0.75]]


def test_rounding_breaks_no_tie_between_models(tmp_path):
    """Three seeds of .1 sum to more than .3."""
    lines = [f"{m},d,10,{s},0.1,{n},x," for m, n in (("a", 1), ("b", 2)) for s in range(3 if m == "a" else 2)]
    grid = table(tmp_path / "scan.csv", CSV + "\n".join(lines) + "\n").mean()
    assert grid.values["log_me"][0, 0] == grid.values["log_me"][1, 0] == 0.1
    assert grid.spreads["log_me"].tolist() == [[0], [0]]


# --------------------------------------------------------------------------------- names that do not join


def scores_of(models, datasets=("d",), **values):
    count = len(models) * len(datasets)
    return ranking.Scores(
        "scan",
        np.repeat(models, len(datasets)),
        np.tile(datasets, len(models)),
        np.full(count, ""),
        np.full(count, -1),
        {name: np.asarray(v, float).ravel() for name, v in values.items()},
    )


def test_models_that_do_not_join_are_listed_with_their_nearest():
    scores = scores_of(["google/vit-base", "resnet-50", "b"], m=[1, 2, 3])
    actual = ranking.from_mapping("file", {"vit-base": 0.9, "resnet50": 0.8, "b": 0.7}, "accuracy", ["d"])
    with pytest.raises(RankingError) as error:
        ranking.join(scores, actual)
    said = str(error.value)
    assert (
        "2 models of scan are not in file: 'google/vit-base' (nearest 'vit-base'); 'resnet-50' (nearest 'resnet50')"
        in said
    )
    assert "2 models of file are not in scan: 'vit-base' (nearest 'google/vit-base')" in said
    assert "--allow_unmatched" in said
    joined = ranking.join(scores, actual, allow_unmatched=True)
    assert joined.models == ("b",) and len(joined.notes) == 2 and "google/vit-base" in joined.notes[0]


def test_the_nearest_of_a_path_is_what_its_last_part_names():
    scores = scores_of(["/home/somebody/experiments/zoo/b12", "b"], m=[1, 2])
    actual = ranking.from_mapping("file", {"B12": 0.9, "b": 0.8}, "accuracy", ["d"])
    with pytest.raises(RankingError, match="zoo/b12' \\(nearest 'B12'\\)"):
        ranking.join(scores, actual)


def test_nothing_that_joins_is_an_error_even_where_unmatched_are_allowed():
    actual = ranking.from_mapping("file", {"x": {"a": 1.0}}, "accuracy", ["d"])
    with pytest.raises(RankingError, match="data set of scan is not in file: 'd'.*nothing is left to rank"):
        ranking.join(scores_of(["a"], m=[1]), actual, allow_unmatched=True)


def test_a_file_that_tells_no_data_sets_apart_is_for_one():
    scores = scores_of(["a", "b"], ("d", "e"), m=[1, 2, 3, 4])
    with pytest.raises(RankingError, match="2 are ranked \\(d, e\\)") as error:
        ranking.from_mapping("file", {"a": 1, "b": 2}, "accuracy", ["d", "e"])
    assert 'write {"d": {"a": 1, …}, "e": {…}} in it, or choose one with --datasets=d' in str(error.value)
    actual = ranking.from_mapping("file", {"a": 1, "b": 2}, "accuracy", ["e"])
    joined = ranking.join(scores, actual, datasets=["e"])
    assert joined.scores["m"].tolist() == [[2], [4]] and joined.actual.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([1], "expected model: accuracy"),
        ({"a": "good"}, "d, a: expected a number, got 'good'"),
        ({"a": True}, "d, a: expected a number"),
        ({"a": float("nan")}, "d, a: expected a number"),
        ({"a": 1, "d": {"b": 2}}, "'a' is a number"),
    ],
)
def test_files_that_say_nothing(raw, told):
    with pytest.raises(RankingError, match=told):
        ranking.from_mapping("file", raw, "accuracy", ["d"])


def test_numbers_that_yaml_takes_for_text(tmp_path):
    (tmp_path / "p.yaml").write_text("a: 2.3e7\nb: 1e6\n")
    scores = ranking.with_parameters(scores_of(["a", "b"], m=[1, 2]), tmp_path / "p.yaml")
    assert scores.values["num_params"].tolist() == [2.3e7, 1e6]
    with pytest.raises(RankingError, match="missing: 'c'"):
        ranking.with_parameters(scores_of(["a", "c"], m=[1, 2]), tmp_path / "p.yaml")


# ------------------------------------------------------------------------------------------ sums of scores


def test_sums_are_of_z_scores_over_the_models_that_have_both():
    values = {"x": np.array([[1.0], [2.0], [4.0], [np.nan]]), "y-z": np.array([[10.0], [30.0], [20.0], [0.0]])}
    got = combined(((1, "x"), (-1, "y-z")), values)[:, 0]
    x, y = values["x"][:3, 0], values["y-z"][:3, 0]
    np.testing.assert_allclose(got[:3], stats.zscore(x) - stats.zscore(y))
    assert math.isnan(got[3])
    np.testing.assert_array_equal(combined(((-1, "x"),), values), -values["x"])
    constant = {"x": values["x"], "c": np.full((4, 1), 0.3)}
    np.testing.assert_allclose(combined(((1, "x"), (1, "c")), constant)[:3, 0], stats.zscore(x))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a", ((1, "a"),)),
        ("-a", ((-1, "a"),)),
        ("a + b-c", ((1, "a"), (1, "b-c"))),
        ("a-b-c", ((1, "a"), (-1, "b-c"))),
        ("b - b-c+ab", ((1, "b"), (-1, "b-c"), (1, "ab"))),
    ],
)
def test_expressions_know_names_that_hold_a_sign(text, terms):
    scores = scores_of(["m"], **{"a": [1], "ab": [1], "b": [1], "b-c": [1]})
    assert parse(text, scores) == terms
    assert parse(show(terms), scores) == terms


@pytest.mark.parametrize(("text", "word"), [("log_m", "log_m"), ("log_me+nu", "nu"), ("", ""), ("log_me+", "")])
def test_expressions_of_what_was_not_measured(text, word):
    with pytest.raises(RankingError, match=f"no measurement '{word}'"):
        parse(text, scores_of(["m"], log_me=[1], num_params=[1]))


# ------------------------------------------------------------------------------------------------- the ranking


def made(models=12, datasets=4, seed=0, **noises):
    """A join of made-up scores: actual performance and, for each name, the same with so much noise."""
    rng = np.random.default_rng(seed)
    actual = 0.5 + 0.1 * (rng.standard_normal((models, 1)) + 0.3 * rng.standard_normal((models, datasets)))
    scores = {name: actual + 0.1 * noise * rng.standard_normal(actual.shape) for name, noise in noises.items()}
    names = tuple(f"m{i}" for i in range(models)), tuple(f"d{j}" for j in range(datasets))
    return ranking.Joined(
        "made", *names, scores, actual, np.full(actual.shape, np.nan), "accuracy", None, (1, 1), (1, 1)
    )


def test_values_are_means_over_data_sets_in_the_order_of_tau():
    joined = made(bad=3, good=0.3, num_params=1)
    found = ranking.rank(joined, draws=50)
    taus = {
        name: np.mean([stats.kendalltau(s[:, d], joined.actual[:, d]).statistic for d in range(4)])
        for name, s in joined.scores.items()
    }
    assert (
        [row.metric for row in found.rows]
        == sorted(taus, key=lambda name: -taus[name])
        == ["good", "num_params", "bad"]
    )
    for row in found.rows:
        assert row.estimates["tau"].value == pytest.approx(taus[row.metric])
        assert row.estimates["tau"].low < row.estimates["tau"].value < row.estimates["tau"].high
        assert row.baseline == (row.metric == "num_params")
    assert found["good"].difference.value == pytest.approx(taus["good"] - taus["num_params"])
    assert found["num_params"].difference is None
    on = found["good"].datasets[2]
    best = joined.actual[:, 2].argmax()
    assert (on.best, on.best_reached) == (f"m{best}", joined.actual[best, 2])
    assert on.chosen == (f"m{joined.scores['good'][:, 2].argmax()}",)


def test_a_difference_is_drawn_together():
    """Two scores that are nearly one differ by nearly nothing, however wide the interval of either is."""
    joined = made(num_params=1)
    joined.scores["same"] = joined.scores["num_params"] + 1e-9
    found = ranking.rank(joined, draws=200)["same"]
    assert found.estimates["tau"].high - found.estimates["tau"].low > 0.1
    assert (found.difference.low, found.difference.value, found.difference.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_missing_values_leave_out_models_and_data_sets_and_say_so():
    joined = made(models=6, m=0.5, num_params=1)
    joined.scores["m"][0, 0] = np.nan
    joined.scores["m"][1:5, 1] = np.nan
    joined.actual[:, 3] = 0.7
    found = ranking.rank(joined, draws=50)["m"]
    assert [d.models for d in found.datasets] == [5, 2, 6, 6]
    assert [bool(d.left_out) for d in found.datasets] == [False, True, False, True]
    expected = [
        stats.kendalltau(joined.scores["m"][a:, d], joined.actual[a:, d]).statistic for a, d in ((1, 0), (0, 2))
    ]
    assert found.estimates["tau"].value == pytest.approx(np.mean(expected))
    base = [
        stats.kendalltau(joined.scores["num_params"][a:, d], joined.actual[a:, d]).statistic
        for a, d in ((1, 0), (0, 2))
    ]
    assert found.difference.value == pytest.approx(np.mean(expected) - np.mean(base)), "on the same models"
    said = "\n".join(ranking.lines(ranking.rank(joined, draws=50)))
    assert "m lacks m0 on d0: its correlations are of the other models" in " ".join(said.split())
    assert "m: d1 does not count: 2 models have both numbers, at least 3 are needed" in said
    assert "num_params: d3 does not count: all models perform the same" in said


def test_what_an_infinite_score_says_is_kept(tmp_path, capsys):
    """Features that separate the classes exactly have LogME inf; a sum of z-scores has no place for it."""
    lines = [f"{m},d,{x},{n}" for m, x, n in zip("abcdef", ("inf", 5, 4, 6, 3, 2), range(1, 7), strict=True)]
    (tmp_path / "s.csv").write_text("model,dataset,log_me,num_params\n" + "\n".join(lines) + "\n")
    (tmp_path / "a.json").write_text(json.dumps({m: 0.9 - 0.1 * i for i, m in enumerate("abcdef")}))
    command = [tmp_path / "s.csv", f"--scores_file={tmp_path}/a.json", "--metrics=log_me,num_params,log_me-num_params"]
    found = {row["score"]: row for row in json.loads(said(capsys, *command, "--json", "--draws=20"))["scores"]}
    ranks, actual = [7, 5, 4, 6, 3, 2], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    row = found["log_me"]
    assert row["tau"]["value"] == pytest.approx(stats.kendalltau(ranks, actual).statistic)
    assert row["weighted_tau"]["value"] == pytest.approx(stats.weightedtau(ranks, actual).statistic)
    assert row["pearson"]["value"] == pytest.approx(stats.pearsonr(ranks[1:], actual[1:]).statistic)
    assert (row["regret@1"]["value"], row["hit@1"]["value"], row["datasets"][0]["chosen"]) == (0, 1, ["a"])
    assert (row["datasets"][0]["models"], row["datasets"][0]["infinite"]) == (6, ["a"])
    summed = found["log_me-num_params"]
    assert (summed["datasets"][0]["models"], summed["datasets"][0]["missing"]) == (5, ["a"])
    text = " ".join(said(capsys, *command, "--draws=20").split())
    assert "log_me is infinite for a on d: ranks, which Pearson's correlation leaves out" in text
    assert "log_me-num_params: no sum for a on d, where log_me is infinite" in text


def test_regret_is_against_the_best_of_all_whoever_lacks_it():
    """A score that lacks the best model loses what it would have brought; the others' best is the same."""
    joined = made(models=6, datasets=1, blind=0, num_params=0)
    joined.scores["num_params"][:] = -joined.actual
    joined.actual[:, 0] = [0.9, 0.6, 0.5, 0.4, 0.3, 0.2]
    joined.scores["blind"][:, 0] = [np.nan, 5, 4, 3, 2, 1]
    joined.scores["num_params"][:, 0] = [5, 6, 4, 3, 2, 1]
    ranked = ranking.rank(joined, draws=50, ks=(1, 2, 3))
    for k, blind, parameters in ((1, 0.3 / 0.9, 0.3 / 0.9), (2, 0.3 / 0.9, 0), (3, 0.3 / 0.9, 0)):
        for name, regret in (("blind", blind), ("num_params", parameters)):
            found = ranked[name].estimates
            assert found[f"regret@{k}"].value == pytest.approx(regret), (name, k)
            assert found[f"hit@{k}"].value == (regret == 0)
            assert found[f"regret@{k}"].low <= regret <= found[f"regret@{k}"].high
    on = ranked["blind"].datasets[0]
    assert (on.models, on.best, on.best_reached, on.missing, on.chosen) == (5, "m0", 0.9, ("m0",), ("m1",))
    assert ranked["blind"].estimates["tau"].value == 1, "of the models that it has"
    two = " ".join("\n".join(ranking.lines(ranking.rank(joined, draws=50, ks=(2,)))).split())
    assert "Lowest regret@2: num_params." in two and "note: blind lacks m0 on d0" in two


def test_the_lowest_regret_is_that_on_the_same_data_sets():
    joined = made(models=5, datasets=2, m=0, num_params=0)
    joined.actual[:] = np.array([0.5, 0.6, 0.7, 0.8, 0.9])[:, None]
    joined.scores["num_params"][:, 0], joined.scores["num_params"][:, 1] = [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]
    joined.scores["m"][:, 0], joined.scores["m"][:, 1] = [1, 2, 3, 5, 4], np.nan
    joined.actual[2, 0] = np.nan
    ranked = ranking.rank(joined, draws=50)
    regrets = {row.metric: row.estimates["regret@1"].value for row in ranked.rows}
    assert regrets == {"m": pytest.approx(0.1 / 0.9), "num_params": pytest.approx(0.4 / 0.9 / 2)}
    text = " ".join("\n".join(ranking.lines(ranked)).split())
    assert "Lowest regret@1 on d0, which all scores have: num_params." in text
    assert "note: accuracy is not known of m2 on d0: left out there" in text


def test_a_ranking_needs_its_baseline_and_something_to_rank():
    with pytest.raises(RankingError, match="baseline 'num_params' is not among the scores; measure it"):
        ranking.rank(made(m=1))
    few = made(models=2, num_params=1)
    with pytest.raises(RankingError, match="no data set can be ranked: d0: 2 models have both numbers"):
        ranking.rank(few)


def test_the_same_seed_gives_the_same_intervals():
    one, two, other = (ranking.rank(made(num_params=1), draws=100, seed=s)["num_params"].estimates for s in (1, 1, 2))
    assert one == two != other


@pytest.mark.slow
@pytest.mark.parametrize(("models", "datasets", "r"), [(5, 1, 0.95), (7, 3, 0.7)])
def test_intervals_hold_the_truth_also_where_models_are_few(models, datasets, r):
    """At least 85 % of 40 intervals must; of percentiles alone 70 % do where rankings are often perfect."""
    found = held(models, datasets, r, trials=40, draws=120)
    for name in ("tau", "weighted_tau", "spearman", "pearson", "hit@1", "hit@3", "regret@1", "regret@3"):
        assert found[name] >= 0.85, name
    assert found["differs"] <= 0.12
    if r == 0.95:
        assert found["plain tau"] < 0.8


@pytest.mark.parametrize(("models", "lowest", "highest"), [(7, 0.4, 0.8), (12, 0.8, 0.95)])
def test_a_perfect_ranking_may_be_chance(models, lowest, highest):
    """It is certain up to 1; and down to about the tau at which one ranking in forty is perfect: .62 and .88."""
    joined = made(models=models, datasets=1, num_params=0)
    for sign in (1, -1):
        joined.scores["num_params"][:] = sign * joined.actual
        estimate = ranking.rank(joined, draws=50)["num_params"].estimates["tau"]
        assert estimate.value == sign and sign in (estimate.low, estimate.high)
        assert lowest < min(abs(estimate.low), abs(estimate.high)) < highest


def test_of_four_models_nothing_is_known():
    estimate = ranking.rank(made(models=4, datasets=1, num_params=1), draws=50)["num_params"].estimates["tau"]
    assert (estimate.low, estimate.high) == (-1, 1)


def test_where_models_are_many_the_interval_is_the_bootstraps():
    joined = made(models=60, datasets=1, m=1.5, num_params=1)
    found = ranking.rank(joined, draws=400)["m"].estimates["tau"]
    rng, scores, actual = np.random.default_rng(5), joined.scores["m"][:, 0], joined.actual[:, 0]
    drawn = []
    for _ in range(400):
        chosen = rng.integers(0, 60, 60)
        drawn.append(stats.kendalltau(scores[chosen], actual[chosen]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.04)


# ------------------------------------------------------------------------------------------ the command, the plots


def said(capsys, *argv):
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def test_the_tables(scan, capsys):
    text = said(capsys, scan, f"--actual={scan}", "--metrics=log_me,log_me+num_params", "--draws=200")
    lines = text.splitlines()
    assert lines[0] == (
        "5 models on 2 data sets, scores from 100 samples (2 seeds), against accuracy after fine-tuning (3 seeds)"
    )
    assert "1 as fine-tuning does" in text and "What it costs to fine-tune only" in text
    assert [line.split()[0] for line in lines if "[" in line and line.startswith(("  ", "* "))].count("*") == 2
    assert "log_me+num_params" in text and "regret@1, %" in text and "tau above num_params" in text
    assert "log_me lacks broken on cars" in text
    assert max(map(len, lines)) <= 140


def test_what_was_measured_with_the_scores_is_the_truth_only_where_it_is_named(scan, capsys):
    """The accuracy of a model as it is, which a scan may hold, is not what fine-tuning reaches."""
    with pytest.raises(ConfigError, match="nothing says what fine-tuning reached.*or --actual_name=accuracy to take"):
        main([str(scan), "--metrics=log_me"])
    text = " ".join(said(capsys, scan, *OWN, "--draws=20").split())
    assert f"against accuracy as measured in {scan} (3 seeds)" in text
    assert "fine-tun" not in text and "1 as accuracy does" in text and "What it costs to take only" in text
    found = json.loads(said(capsys, scan, *OWN, "--draws=20", "--json"))
    assert found["actual_is"] == f"accuracy as measured in {scan}"


def words_of(figure):
    return [text.get_text() for text in figure.texts]


def test_pictures_say_whether_the_truth_was_fine_tuned(scan):
    scores = ranking.read(scan)
    for how in ({}, {"how": f"as measured in {'a long path to ' * 5}the scan"}):
        actual = ranking.actual_of(scores, "accuracy", **how)[0]
        ranked = ranking.rank(ranking.join(scores, actual), draws=20)
        figures = pictures.vs_samples(scores, actual=actual), pictures.vs_actual(ranked), pictures.tau(ranked)
        for figure in figures:
            figure.canvas.draw()
            assert all(text.get_window_extent().x1 <= figure.bbox.width for text in figure.texts)
            said_there = " ".join(words_of(figure))
            assert f"accuracy {how.get('how', 'after fine-tuning')}" in said_there
            assert ("fine-tun" in said_there) == (not how)
        assert "mean over data sets" in words_of(figures[0]), "what the numbers in the legend are"
        one = pictures.vs_samples(scores.of(datasets="pets"), actual=actual)
        assert "mean over data sets" not in words_of(one)


def test_of_one_seed_no_standard_deviation_is_said(scan):
    spread = ("band: one standard deviation", "bars: one standard deviation")
    scores = ranking.read(scan)
    firsts = {}
    for line, key in enumerate(zip(scores.models, scores.datasets, scores.n_samples.tolist(), strict=True)):
        firsts.setdefault(key, line)
    single = scores.take(np.array(list(firsts.values())))
    for lines, many in ((scores, True), (single, False)):
        actual = ranking.actual_of(lines, "accuracy")[0]
        ranked = ranking.rank(ranking.join(lines, actual), draws=20)
        for figure, word in zip((pictures.vs_samples(lines), pictures.vs_actual(ranked)), spread, strict=True):
            assert (word in " ".join(words_of(figure))) == many
    assert "A single seed" in words_of(pictures.vs_samples(single))


PRETRAINED = "torch:worker_scripts.digit_models.pretrained"
LONG = [f"{PRETRAINED}?{o}" for o in ("width=8", "width=64", "width=64&classes=5", "width=64&epochs=0")]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (LONG, ["width=8", "width=64", "width=64&classes=5", "width=64&epochs=0"]),
        ([PRETRAINED, LONG[0]], ["pretrained", "width=8"]),
        (["digits", "worker_scripts.digit_models.turned"], ["digits", "turned"]),
        (["zoo/tiny", "zoo/small/"], ["tiny", "small"]),
        (["runs/a/model.pt", "runs/b/model.pt"], ["a", "b"]),
        (["a/vit", "b/vit", "c/resnet"], ["a/vit", "b/vit", "c/resnet"]),
        (["google/vit", "timm:resnet50.a1_in1k"], ["vit", "resnet50.a1_in1k"]),
        (["torch:m.f?x=1&y=2", "torch:m.g?x=1&y=3"], ["f?y=2", "g?y=3"]),
        (["/", ""], ["/", ""]),
    ],
)
def test_short_names_keep_what_differs(names, short):
    assert short_names(names) == dict(zip(names, short, strict=True))


def test_as_json_it_is_all_there(scan, capsys):
    found = json.loads(said(capsys, scan, *OWN, "--json", "--draws=50", "--k=1,2", "--n_samples=10", "--datasets=pets"))
    assert (found["datasets"], found["n_samples"], found["seeds"]) == (["pets"], 10, [2, 2])
    by_name = {row["score"]: row for row in found["scores"]}
    assert set(by_name) == {"log_me", "sharp-ness", "num_params"}
    actual, score = cells("pets", None, "accuracy"), cells("pets", 10, "log_me")
    row = by_name["log_me"]
    assert row["tau"]["value"] == pytest.approx(stats.kendalltau(list(score.values()), list(actual.values())).statistic)
    assert row["datasets"][0]["chosen"] == [max(score, key=score.get)]
    assert row["regret@2"]["value"] >= 0 and row["baseline"] is False


@pytest.mark.parametrize(
    ("argv", "error", "told"),
    [
        (["{scan}", "--actual_name=acuracy"], ConfigError, "has no 'acuracy' that would say"),
        (["{scan}", *OWN, "--metrics=log_mee"], RankingError, "no measurement 'log_mee'; did you mean 'log_me'?"),
        (["{scan}", *OWN, "--n_samples=50"], RankingError, "nothing was measured with n_samples 50; it has 10, 100"),
        (["{scan}", *OWN, "--datasets=pet"], RankingError, "no data set 'pet'; did you mean 'pets'?"),
        (["{scan}", "--plot=tau", "--out=x.txt"], ConfigError, "expected a name that ends in .png"),
        (["{scan}", "--out=x.png"], ConfigError, "nothing is drawn without --plot"),
        (["{scan}", "--plot=tau", "--json"], ConfigError, "not both"),
        (["{scan}", "--k=0"], ConfigError, "--k: expected numbers of models"),
        (["{scan}", "--plot=dots"], ConfigError, "expected one of vs_samples, vs_actual, tau"),
        (["{scan}", "--actual=a", "--scores_file=b"], ConfigError, "give one"),
        (["{scan}", "--actual_rows=lr=1"], ConfigError, "rows of the store --actual; give it too"),
        (["{scan}", "--scores_file=/no/such.yaml"], RankingError, "/no/such.yaml: cannot be read"),
        (["{scan}", "--split=train"], RankingError, "nothing was measured with split 'train'"),
        (["/no/such/store"], StoreError, "not a store"),
        (["/no/such.csv"], RankingError, "/no/such.csv: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(scan, argv, error, told):
    with pytest.raises(error, match=told.replace("?", "\\?")):
        main([word.format(scan=scan) for word in argv])


def test_scores_of_one_split_are_held_against_accuracy_on_another(tmp_path, capsys):
    """Also where both are keys of the same rows; and rows of the truth are chosen, where it has more factors."""
    number = {**NUMBER, "required": True}
    keys = ["d_train_log_me", "d_test_log_me", "d_train_accuracy", "d_test_accuracy", "num_params"]
    spec = {
        "schema": dict.fromkeys(keys, number),
        "measurements": {"names": ["log_me"], "on": ["d/train", "d/test"]},
        "design": [{"choices": {"model": MODELS, "lr": [0.1, 0.2]}}],
    }
    columns = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [1, 2, 3, 5, 4], [1, 2, 3, 4, 5]], float)
    with Store.create(tmp_path / "store", spec, sync=False) as store:
        store.commit_many(range(10), {key: np.repeat(columns[i], 2) for i, key in enumerate(keys)})
    path = tmp_path / "store"
    chosen = [path, "--rows=lr=0.1", "--split=train", "--json", "--draws=20"]
    for more in (OWN, [f"--actual={path}", "--actual_rows=lr=0.2"]):
        found = json.loads(said(capsys, *chosen, *more))
        by_name = {row["score"]: row["tau"]["value"] for row in found["scores"]}
        assert by_name["log_me"] == pytest.approx(0.8), "train scores, test accuracy"
    with pytest.raises(RankingError, match="'lr' has the levels 0.1, 0.2"):
        main([str(path), *OWN])


def test_the_command_loads_nothing_heavy_for_its_help():
    code = "import sys; sys.modules['matplotlib'] = sys.modules['scipy'] = sys.modules['torch'] = None\n" \
           "from datamodels.evaluation.ranking.__main__ import main; main(['--help'])"  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m datamodels.evaluation.ranking SCORES")


def test_the_command_itself(scan):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "datamodels.evaluation.ranking", str(scan), *OWN, "--draws=20"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "num_params" in done.stdout


@pytest.mark.parametrize("plot", ["vs_samples", "vs_actual", "tau"])
def test_each_plot_is_a_command(scan, tmp_path, capsys, plot):
    out = tmp_path / f"{plot}.png"
    assert said(capsys, scan, *OWN, f"--plot={plot}", f"--out={out}", "--draws=20") == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def boxes(axes):
    """Where the names stand, in pixels."""
    renderer = axes.figure.canvas.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}


@pytest.mark.parametrize("crowd", ["spread", "clusters"])
def test_names_cover_neither_each_other_nor_points(crowd):
    joined = made(models=14, datasets=1, m=1, num_params=0.5)
    if crowd == "clusters":
        joined.scores["m"][:7], joined.actual[:7] = joined.scores["m"][0], joined.actual[0]
        joined.actual[:7, 0] += 0.002 * np.arange(7)
    joined.actual_spread[:] = 0.01
    figure = pictures.vs_actual(ranking.rank(joined, draws=20))
    figure.canvas.draw()  # until then matplotlib may not have settled where anything is
    for axes in figure.axes:
        found = boxes(axes)
        assert set(found) == set(joined.models)
        inside = axes.get_window_extent()
        for (a, one), (b, other) in itertools.combinations(found.items(), 2):
            assert not one.overlaps(other), (a, b)
        name = axes.get_title(loc="left")
        for x, y in zip(joined.scores[name][:, 0], joined.actual[:, 0], strict=True):
            px, py = axes.transData.transform((x, y))
            assert not any(box.contains(px, py) for box in found.values()), "a point"
            nearest = min(np.hypot(max(b.x0 - px, 0, px - b.x1), max(b.y0 - py, 0, py - b.y1)) for b in found.values())
            assert nearest < 60, "a name far from everything"
            if crowd == "spread":
                bars = [axes.transData.transform((x, y + 0.01 * share)) for share in np.linspace(-1, 1, 9)]
                assert not any(box.contains(*bar) for box in found.values() for bar in bars), "a bar"
        assert all(inside.x0 - 1 <= box.x0 and box.x1 <= inside.x1 + 1 for box in found.values())


def test_points_stand_where_the_numbers_say():
    joined = made(models=5, datasets=2, m=1, num_params=0.5)
    joined.scores["m"][2, 1] = np.nan
    found = ranking.rank(joined, draws=20)
    figure = pictures.vs_actual(found)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    axes = figure.axes[titles.index("m, d1")]
    kept = [0, 1, 3, 4]
    x, y = axes.containers[0].lines[0].get_data()
    np.testing.assert_array_equal(x, joined.scores["m"][kept, 1])
    np.testing.assert_array_equal(y, joined.actual[kept, 1])
    assert axes.get_title(loc="right") == f"τ {found['m'].datasets[1].values['tau']:.2f}".replace("-", "\N{MINUS SIGN}")


@pytest.mark.parametrize("how_many", [1, 5])
def test_infinite_scores_are_left_out_of_the_picture_and_counted(how_many):
    joined = made(models=5, datasets=1, m=1, num_params=0.5)
    joined.scores["m"][:how_many, 0] = np.inf
    figure = pictures.vs_actual(ranking.rank(joined, draws=20))
    figure.canvas.draw()
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    if how_many == 5:
        assert set(panels) == {"num_params"}, "a panel without a point"
        assert "without a number: m" in " ".join(words_of(figure))
        return
    x, y = panels["m"].containers[0].lines[0].get_data()
    np.testing.assert_array_equal(x, joined.scores["m"][how_many:, 0])
    np.testing.assert_array_equal(y, joined.actual[how_many:, 0])
    assert panels["m"].get_xlabel() == f"{how_many} not drawn: infinite" and panels["num_params"].get_xlabel() == ""


@pytest.mark.parametrize("longest", [20, 40])
def test_long_names_and_titles_cover_nothing(longest):
    """Names that are too long for a panel are numbers, with a list below; a title ends before the tau beside it."""
    joined = made(models=6, datasets=3, a_score_with_quite_a_name_and_then_some_more=1, num_params=0.5)
    options = [f"{'size=' + 'x' * (longest - 6)}{i}" for i in range(6)]
    names = {
        "models": tuple(f"{PRETRAINED}?{o}" for o in options),
        "datasets": ("digits", "noisy", "a.package.of.turned"),
    }
    joined = ranking.Joined(**{**vars(joined), **names})
    joined.scores["num_params"][:, 1] = np.nan
    figure = pictures.vs_actual(ranking.rank(joined, draws=20))
    figure.canvas.draw()
    renderer, width = figure.canvas.get_renderer(), figure.bbox.width
    assert len(figure.axes) == 5, "the panel without a point is dropped"
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == (set("123456") if longest > 24 else set(options))
        inside = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            assert inside.x0 - 1 <= box.x0 and box.x1 <= inside.x1 + 1
        left, right = axes._left_title.get_window_extent(renderer), axes._right_title.get_window_extent(renderer)
        assert left.x1 < right.x0 and axes.get_title(loc="left").startswith(("a_score", "num_params"))
        assert axes.get_title(loc="left").endswith((", digits", ", noisy", ", turned")), "a cut name keeps its data set"
    listed = [words for words in words_of(figure) if words[:1].isdigit()]
    assert listed == ([f"{i + 1}  {option}" for i, option in enumerate(options)] if longest > 24 else [])
    boxes_ = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= width for box in boxes_)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes_, 2))


def test_lines_against_samples_are_means_with_their_spread(scan):
    scores = ranking.read(scan)
    figure = pictures.vs_samples(scores, actual=ranking.actual_of(scores, "accuracy")[0])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["log_me, pets", "log_me, cars", "sharp-ness, pets", "sharp-ness, cars"], (
        "no panel of what is constant"
    )
    axes = figure.axes[1]
    best_first = sorted(MODELS, key=lambda m: -np.mean([cells(d, None, "accuracy")[m] for d in ("pets", "cars")]))
    for line, model in zip(axes.lines, best_first, strict=True):
        expected = [cells("cars", size, "log_me")[model] for size in (10, 100)]
        there = np.isfinite(expected)
        np.testing.assert_allclose(line.get_xdata(), np.array([10, 100])[there])
        np.testing.assert_allclose(line.get_ydata(), np.array(expected)[there])
    with pytest.raises(RankingError, match="needs two of them, it has 10"):
        pictures.vs_samples(scores.of(n_samples=10))


def test_all_samples_are_more_than_any_number_of_them(tmp_path):
    """0 is how the scan says that it takes all there are."""
    lines = [f"{m},d,{n},0,{v + n},{v},x," for m, v in (("a", 1), ("b", 2), ("c", 3)) for n in (0, 10, 100)]
    lines += [f"{m},d,,,,,,0.{v}" for m, v in (("a", 5), ("b", 6), ("c", 7))]
    scores = table(tmp_path / "scan.csv", CSV + "\n".join(lines) + "\n")
    joined = ranking.join(scores, ranking.actual_of(scores, "accuracy")[0])
    assert (joined.n_samples, joined.scores["log_me"].ravel().tolist()) == (0, [1, 2, 3])
    assert "scores from all samples" in ranking.lines(ranking.rank(joined, draws=20))[0]
    axes = pictures.vs_samples(scores, metrics=["log_me"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "100", "all"]
    assert axes.lines[0].get_ydata().tolist() == [11, 101, 1]


def test_the_bars_of_tau_are_the_intervals():
    found = ranking.rank(made(datasets=3, m=1, num_params=0.5), draws=50)
    (axes,) = pictures.tau(found).axes
    bars = [
        line.get_xdata()
        for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    ]
    for bar, row in zip(bars, found.rows, strict=True):
        assert list(bar) == [row.estimates["tau"].low, row.estimates["tau"].high]
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == [row.metric for row in found.rows]
