"""Names become keys before anything runs; what runs is shared, timed, and fails one by one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from datamodels.errors import MeasurementError
from datamodels.measurements import library
from datamodels.measurements.library import Measurement, Unmet, measure, measurement, schema
from datamodels.running.ends import JobTimeout, Stopped
from datamodels.spec import Spec

LOGITS = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
LABELS = np.array([0, 1, 1, 1])

USERS = """
from datamodels.measurements.library import measurement

def plain(labels):
    return float(labels.sum())

@measurement(role="benefit", columns={"": (), "per_class": (2,)})
def counted(labels, times=1):
    return {"": times * len(labels), "per_class": [times * (labels == c).sum() for c in (0, 1)]}

def broken(labels):
    raise ZeroDivisionError("on purpose")

def nan(labels):
    return float("nan")

def infinite(labels):
    return float("inf")

def pair(labels, other_labels):
    return float(labels.sum() - other_labels.sum())

def of_model(model):
    return 7

def wrong_shape(labels):
    return [1.0, 2.0]

def unknown(weights):
    return 1.0

leaves_by = SystemExit(2)
def leaves(labels):
    raise leaves_by

def wishes(labels, groups=None):
    return -1.0 if groups is None else float(len(groups))

number = 3
"""


@pytest.fixture(autouse=True)
def users(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("users_own", None)


def view(**more):
    return {"": {"logits": LOGITS, "labels": LABELS, "num_classes": 2, **more}}


# ------------------------------------------------------------------------------------------------ names and keys


def test_every_shipped_measurement_is_reached_by_name_and_has_a_place_in_a_schema():
    shipped = library.shipped()
    assert {"log_me", "leep", "accuracy", "calibration_error", "group_accuracy", "sharpness", "llc"} <= set(shipped)
    for name, found in shipped.items():
        pairs = ["a/x->b/x"] if found.num_datasets == 2 else ["a/x"]
        entries = schema([name], pairs)
        assert Spec.from_json({"num_models": 1, "schema": entries}).schema.keys() == entries.keys()
        roles = {entry["role"] for key, entry in entries.items() if "seconds_" not in key}
        assert roles == {found.role}


@pytest.mark.parametrize("group", library.GROUPS)
def test_every_group_resolves(group):
    assert [asked.measurement.name for asked in library.resolve([group])] == [
        library.parse(name)[0] for name in library.GROUPS[group]
    ]


def test_keys_are_data_set_split_and_name():
    entries = schema(["accuracy", "users_own.counted", "num_params"], ["digits/test", "my.own.noisy/train"])
    plain = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True}
    assert entries == {
        **{
            f"{prefix}_{key}": {**plain, "role": "benefit", **more}
            for prefix in ("digits_test", "noisy_train")
            for key, more in {"accuracy": {}, "counted": {}, "counted_per_class": {"shape": [2]}}.items()
        },
        **{
            f"{prefix}_seconds_{key}": plain
            for prefix in ("digits_test", "noisy_train")
            for key in ("accuracy", "counted", "inference")
        },
        "num_params": {**plain, "role": "property"},
        "seconds_num_params": plain,
    }


def test_without_on_keys_are_plain():
    assert list(schema(["accuracy", "users_own.plain"])) == [
        "accuracy", "seconds_accuracy", "seconds_inference", "plain", "seconds_plain",
    ]  # fmt: skip
    assert "seconds_inference" not in schema(["users_own.plain"])  # which asks the model nothing


def test_pairs_are_for_what_compares_two_data_sets():
    entries = schema(["accuracy", "accuracy_drop"], ["a/x", "b/x", "a/x->b/x"])
    assert [key for key in entries if "seconds" not in key] == [
        "a_x_accuracy", "b_x_accuracy", "a_x_to_b_x_accuracy_drop",
    ]  # fmt: skip


def test_a_name_may_say_where():
    names = ["users_own.plain@a/x", "calibration@b/x,c/x", "accuracy", "num_params@a/x", "accuracy_drop@a/x->b/x"]
    keys = {key for key in schema(names, ["d/x"]) if "seconds" not in key}
    calibration = library.GROUPS["calibration"]  # accuracy among them: there, and on all of `on`
    assert keys == {
        "a_x_plain", "num_params", "d_x_accuracy", "a_x_to_b_x_accuracy_drop",
        *(f"{place}_{name}" for place in ("b_x", "c_x") for name in calibration),
    }  # fmt: skip
    assert library.places(names, ["d/x"]) == ("d/x", "a/x", "b/x", "c/x", "a/x->b/x")
    assert library.places(["accuracy?k=2@a/x", "nll@a/x"]) == ("a/x",) and library.places(["accuracy", "nll"]) is None
    assert library.located("equivariance?transformations=shift,rotation@a/x, b/x") == (
        "equivariance?transformations=shift,rotation",
        ("a/x", "b/x"),
    )
    views = {"a/x": view()[""], "b/x": view(labels=1 - LABELS)[""]}
    found = measure(["accuracy@b/x", "users_own.plain@a/x"], views)
    assert found["b_x_accuracy"] == np.mean(LOGITS.argmax(1) == 1 - LABELS)
    assert [key for key in found if "seconds" not in key] == ["b_x_accuracy", "a_x_plain"]


def test_options_and_another_name():
    entries = schema(["users_own.counted", "users_own.counted?times=3&as=tripled"])
    assert [key for key in entries if "seconds" not in key] == [
        "counted", "counted_per_class", "tripled", "tripled_per_class",
    ]  # fmt: skip
    found = measure(["users_own.counted?times=3&as=tripled"], view())
    assert found["tripled"] == 12
    assert found["tripled_per_class"].tolist() == [3, 9]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", {})),
        ("a?b=1&c=x", ("a", {"b": 1, "c": "x"})),
        ("a?b=1.5,2&c=true&d=false,none&e=-3", ("a", {"b": [1.5, 2], "c": True, "d": [False, None], "e": -3})),
        ("csv:/a/b.csv?text=t", ("csv:/a/b.csv", {"text": "t"})),
    ],
)
def test_parse(text, expected):
    assert library.parse(text) == expected


@pytest.mark.parametrize(
    ("names", "on", "says"),
    [
        (["nope"], None, "there is no 'nope'; expected one of accuracy"),
        (["accuracy", "accuracy?as=accuracy"], None, "would both fill"),
        (["top_k_accuracy", "top_k_accuracy?k=2"], None, "as in top_k_accuracy?k=2&as=top_k_accuracy_2"),
        (["top_k_accuracy?j=2"], None, "no option 'j'; it has k"),
        (["accuracy?as=a/b"], None, "cannot be part of a key"),
        (["accuracy?"], None, None),
        (["accuracy?k"], None, "expected name?option=value"),
        (["users_own.missing"], None, "module users_own has no 'missing'"),
        (["users_gone.f"], None, "there is no module 'users_gone'"),
        (["users_own.number"], None, "expected a function, got int"),
        (["users_own.unknown"], None, "'weights' is no need and has no default"),
        (["accuracy_drop"], ["a/x"], "accuracy_drop needs a pair of data sets"),
        (["accuracy_drop@a/x"], ["a/x->b/x"], "accuracy_drop needs a pair of data sets"),
        (["accuracy", "nll@a/x"], None, "accuracy needs a data set; got none; say where, as in accuracy@digits/test"),
        (["accuracy@"], None, "expected name@<data set>/<split>"),
        (["@a/x"], None, "expected name@<data set>/<split>"),
        (["accuracy"], ["a/x->b/x"], "accuracy needs a data set"),
        (["accuracy"], ["a/x/y"], "expected <data set>/<split>"),
        (["accuracy"], ["csv:x.csv/test"], "give a data set with a longer name a short one"),
        (["accuracy"], ["a.b.noisy/x", "noisy/x"], "would both fill 'noisy_x_accuracy'"),
        (["num_params", "users_own.of_model?as=seconds_num_params"], None, "would both fill 'seconds_num_params'"),
    ],
)
def test_names_that_cannot_be(names, on, says):
    if says is None:
        schema(names, on)
        return
    with pytest.raises(MeasurementError) as caught:
        schema(names, on)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"role": "virtue"}, "expected a role of property, benefit"),
        ({"name": "a-b"}, "expected a name that is an identifier"),
        ({"function": lambda *arrays: 0}, "expected parameters by name"),
        ({"function": lambda **arrays: 0}, "expected parameters by name"),
    ],
)
def test_measurements_that_cannot_be(given, says):
    with pytest.raises(MeasurementError, match=says):
        Measurement(**{"name": "m", "function": lambda labels: 0, **given})


def test_needs_are_read_from_the_parameters():
    @measurement()
    def one(features, other_labels, reference_logits, seed=0, k=3):
        return 0.0

    assert one.needs == ("features", "other_labels", "reference_logits")
    assert one.wishes == ("seed",)
    assert one.options == {"k": 3}
    assert one.num_datasets == 2
    assert one.takes_a_pass
    assert library.shipped()["num_params"].num_datasets == 0
    assert not library.shipped()["sharpness"].takes_a_pass


def test_a_schema_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is blocked by this test')\n")
    code = f"import sys, json; sys.path.insert(0, {str(tmp_path)!r}); from datamodels.measurements import library\n"
    code += f"print(json.dumps(library.schema({list(library.GROUPS)!r}, ['a/x', 'a/x->b/x'])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a_x_log_me" in json.loads(done.stdout)


# -------------------------------------------------------------------------------------------------------- measuring


def test_values_times_and_a_users_function():
    found = measure(["accuracy", "users_own.plain"], view(seconds_inference=2.5))
    assert set(found) == set(schema(["accuracy", "users_own.plain"]))
    assert found["accuracy"] == 0.75
    assert found["plain"] == 3
    assert found["seconds_inference"] == 2.5
    assert 0 <= found["seconds_plain"] < 1
    assert all(np.asarray(value).dtype == np.float64 for value in found.values())


def test_what_leaves_is_a_failure_and_what_ends_the_worker_is_not(monkeypatch):
    found = measure(["users_own.leaves", "accuracy"], view())
    assert isinstance(found["leaves"], SystemExit) and found["accuracy"] == 0.75
    for ends in (JobTimeout("late"), Stopped(15), KeyboardInterrupt()):
        monkeypatch.setattr(sys.modules["users_own"], "leaves_by", ends)
        with pytest.raises(type(ends)):
            measure(["users_own.leaves", "accuracy"], view())


def test_a_failure_is_the_value_of_its_keys_alone():
    names = ["users_own.broken", "users_own.nan", "users_own.infinite", "users_own.wrong_shape", "accuracy"]
    found = measure([*names, "group_accuracy"], view())
    assert isinstance(found["broken"], ZeroDivisionError)
    assert found["seconds_broken"] is found["broken"] and found["seconds_accuracy"] >= 0
    for key in ("nan", "infinite"):
        assert isinstance(found[key], MeasurementError)
        assert "not finite" in str(found[key])
    assert "declared shape [], returned [2]" in str(found["wrong_shape"])
    assert isinstance(found["group_accuracy_worst"], Unmet)
    assert str(found["group_accuracy_gap"]) == "group_accuracy: needs groups, which this model does not have"
    assert found["accuracy"] == 0.75


def test_infinities_pass_where_they_are_declared_and_nan_never():
    inf = Measurement("m", lambda labels: np.inf, infinite=True)
    nan = Measurement("m", lambda labels: np.nan, infinite=True)
    cell = library.Cell(library.Asked(inf, "m", {}), "", None)
    assert library._measure(cell, ("",), view())["m"] == np.inf
    cell = library.Cell(library.Asked(nan, "m", {}), "", None)
    assert isinstance(library._measure(cell, ("",), view())["m"], MeasurementError)


def test_columns_that_were_not_declared():
    found = measure(["users_own.counted"], view())
    assert found["counted_per_class"].tolist() == [1, 3]
    wrong = Measurement("m", lambda labels: {"a": 1.0}, columns={"b": ()})
    value = library._measure(library.Cell(library.Asked(wrong, "m", {}), "", None), ("",), view())["m_b"]
    assert "declared the columns ['b'], returned ['a']" in str(value)


def test_only_what_fills_the_keys_is_run(monkeypatch):
    import users_own

    calls = []
    monkeypatch.setattr(users_own, "plain", lambda labels: calls.append("plain") or 1.0)
    monkeypatch.setattr(users_own, "wishes", lambda labels: calls.append("wishes") or 1.0)
    names = ["users_own.plain?as=p", "users_own.wishes?as=w"]
    found = measure(names, view(), keys=["w"])
    assert (list(found), calls) == (["w"], ["wishes"])
    found = measure(names, view(), keys=["seconds_p"])
    assert (list(found), calls) == (["seconds_p"], ["wishes", "plain"])


def test_a_need_with_a_default_is_a_wish():
    assert measure(["users_own.wishes"], view())["wishes"] == -1
    assert measure(["users_own.wishes"], view(groups=np.arange(4)))["wishes"] == 4


def test_places():
    views = {"a/x": {"labels": LABELS}, "b/x": {"labels": 1 - LABELS}}
    names = ["users_own.plain", "users_own.pair"]
    found = measure(names, views, on=["a/x", "b/x", "a/x->b/x"])
    values = {key: float(value) for key, value in found.items() if "seconds" not in key}
    assert values == {"a_x_plain": 3, "b_x_plain": 1, "a_x_to_b_x_pair": 2}
    assert measure(["users_own.pair"], views)["pair"] == 2  # a row's own two, in order


def test_a_row_with_one_data_set_cannot_be_compared():
    found = measure(["accuracy_drop"], view())
    assert "needs 2 data sets" in str(found["accuracy_drop"])
    found = measure(["accuracy"], {"a": view()[""], "b": view()[""]})
    assert "needs 1 data set, got a, b" in str(found["accuracy"])


def test_what_looks_at_the_model_alone_is_measured_once():
    class Once(dict):
        asked = 0

        def __getitem__(self, need):
            Once.asked += need == "model"
            return super().__getitem__(need)

    views = {name: Once(labels=LABELS, model=object()) for name in ("a/x", "b/x")}
    found = measure(["users_own.of_model"], views, on=["a/x", "b/x"])
    assert found["of_model"] == 7
    assert Once.asked == 1


def test_a_data_set_that_cannot_be_had_fails_alone():
    class Views(dict):
        def __missing__(self, name):
            raise OSError(f"{name} is gone")

    found = measure(["users_own.plain"], Views(view_of_a()), on=["a/x", "b/x"])
    assert found["a_x_plain"] == 3
    assert isinstance(found["b_x_plain"], OSError)


def view_of_a():
    return {"a/x": {"labels": LABELS}}
