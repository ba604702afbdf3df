"""The library's entries give what the functions give, whose values have oracles of their own."""

import numpy as np
import pytest
from torch import nn

from datamodels.errors import MeasurementError
from datamodels.measurements import transferability
from datamodels.measurements.library import measure

RNG = np.random.default_rng(0)
LABELS = np.arange(600) % 3
FEATURES = RNG.standard_normal((600, 5)) + 2 * np.eye(3)[LABELS] @ RNG.standard_normal((3, 5))
LOGITS = RNG.standard_normal((600, 4)) * 3 + 700
VIEW = {
    "features": FEATURES,
    "labels": LABELS,
    "logits": LOGITS,
    "seed": 3,
    "checkpoint": "vit",
    "model": nn.Linear(3, 2),
}


def test_entries_are_the_functions(tmp_path):
    (tmp_path / "t.json").write_text('{"vit": 81.5}')
    p = np.exp(LOGITS - 700)
    expected = {
        "log_me": transferability.log_me(FEATURES, LABELS),
        "h_score": transferability.h_score(FEATURES, LABELS),
        "h_score_shrunk": transferability.h_score(FEATURES, LABELS, shrinkage=True),
        "parc": transferability.parc(FEATURES, LABELS),
        "parc_all": transferability.parc(FEATURES, LABELS, dims=None),
        "linear_probe": transferability.linear_probe(FEATURES, LABELS, seed=3),
        "leep": transferability.leep(p / p.sum(1, keepdims=True), LABELS),
        "nce": transferability.nce(LOGITS.argmax(1), LABELS),
        "num_params": 8,
        "published_accuracy": 81.5,
    }
    names = ["transferability", "parc?dims=none&as=parc_all", f"published_accuracy?table={tmp_path}/t.json"]
    found = {key: value for key, value in measure(names, {"": VIEW}).items() if "seconds" not in key}
    assert {key: float(value) for key, value in found.items()} == pytest.approx(expected, rel=1e-12)
    assert expected["h_score"] != pytest.approx(expected["h_score_shrunk"], rel=1e-6)


def test_log_me_may_be_infinite():
    with pytest.warns(RuntimeWarning, match="fit 3 of 3 classes exactly"):
        found = measure(["log_me"], {"": {**VIEW, "features": np.eye(3)[LABELS]}})
    assert found["log_me"] == np.inf


@pytest.mark.parametrize("name", ["leep", "nce"])
def test_logits_that_are_no_numbers_are_refused(name):
    logits = np.where(np.arange(600)[:, None] % 200 == 7, np.nan, LOGITS)
    found = measure([name], {"": {**VIEW, "logits": logits}})[name]
    assert isinstance(found, MeasurementError)
    assert f"{name}: logits of 3 of 600 examples are not finite, first of example 7" in str(found)


def test_a_table_that_nobody_named():
    found = measure(["published_accuracy"], {"": VIEW})["published_accuracy"]
    assert isinstance(found, MeasurementError) and "?table=FILE" in str(found)
