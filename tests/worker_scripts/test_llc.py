"""A row is an LLC: settings from options and factors, checkpoints really loaded, diverging settings as rows."""

import json
import math

import numpy as np
import pytest
import torch
from fastargs import get_current_config
from torch.nn import functional

from datamodels.errors import MeasurementError
from datamodels.learning import checkpoints, data
from datamodels.learning.models import MLP
from datamodels.measurements import llc as measured
from datamodels.measurements.samplers import Settings
from tests.jobs import ROOT
from worker_scripts import llc

MODEL = "examples.llc.train.network?hidden=4"


def network(seed):
    return MLP((64, 4, 4, 10))(seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in range(3):
        checkpoints.save(folder / f"step-{seed:03d}.pt", network(seed).state_dict())
    return [str(folder / f"step-{seed:03d}.pt") for seed in range(3)]


def run(factors, **options):
    """main with `--llc.name=value` for each of the options."""
    given = {"model": MODEL, "normalise": "data", "flatten": True, "chains": 2, "draws": 6, "burn_in": 4,
             "batch_size": 32, "epsilon": 1e-5, "gamma": 10.0, "device": "cpu", **options}  # fmt: skip
    content = get_current_config().content
    before = dict(content)
    try:
        content.update({("llc", name): value for name, value in given.items()})
        return llc.main(seed=5, **factors)
    finally:
        content.clear()
        content.update(before)


def inputs():
    split = data.load("digits").train
    x = torch.from_numpy(split.inputs).flatten(1)
    return (x - x.mean()) / x.std(correction=0), torch.from_numpy(split.labels)


def test_a_row_is_the_estimate_of_its_checkpoint(files):
    row = run({"checkpoint": files[1]})
    settings = Settings(epsilon=1e-5, gamma=10, chains=2, draws=6, burn_in=4, batch_size=32)
    truth = measured.estimate(network(1), functional.cross_entropy, inputs(), settings, seed=5)
    assert row["llc"] == pytest.approx(truth.mean, rel=1e-4)
    assert row["n"] == 1000 and row["nbeta"] == pytest.approx(1000 / math.log(1000))
    assert row["step"] == 1 and row["num_parameters"] == 64 * 4 + 4 + 20 + 50
    np.testing.assert_allclose(row["llc_trace"], truth.trace, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(row["llc_chains"], truth.per_chain, rtol=1e-3, atol=1e-5)
    assert set(row) == set(llc.schema(2, 6)) == set(llc.KEYS)
    for key, field in llc.schema(2, 6).items():
        assert np.shape(row[key]) == tuple(field["shape"]), key


def test_the_spec_that_ships_has_all_keys():
    spec = json.loads((ROOT / "specs/llc.json").read_text())
    assert spec["schema"] == llc.schema(4, 200)
    defaults = get_current_config()
    assert (defaults["llc.chains"], defaults["llc.draws"]) == (4, 200)


def test_a_batch_is_at_most_all(files):
    row = run({"checkpoint": files[0]}, batch_size=512, samples=64)
    assert row["n"] == 64 and row["llc"] == run({"checkpoint": files[0]}, batch_size=0, samples=64)["llc"]


def test_each_checkpoint_is_really_loaded(files):
    rows = [run({"checkpoint": path}) for path in files]
    assert len({row["weights_hash"] for row in rows}) == len({row["initial_loss"] for row in rows}) == 3
    assert [row["step"] for row in rows] == [0, 1, 2]
    for seed, row in enumerate(rows):
        with torch.no_grad():
            x, y = inputs()
            assert row["initial_loss"] == pytest.approx(float(functional.cross_entropy(network(seed)(x), y)), rel=1e-5)
    assert run({}, checkpoint=files[2])["weights_hash"] == rows[2]["weights_hash"]


def test_factors_stand_above_options(files):
    base = run({"checkpoint": files[0]})
    for factor, value in {"epsilon": 3e-5, "gamma": 300.0, "sampler": "sgnht", "nbeta": 40.0, "batch_size": 16}.items():
        by_factor, by_option = (
            run({"checkpoint": files[0], factor: value}),
            run({"checkpoint": files[0]}, **{factor: value}),
        )
        np.testing.assert_array_equal(by_factor["llc_trace"], by_option["llc_trace"], err_msg=factor)
        assert not np.array_equal(by_factor["llc_trace"], base["llc_trace"]), factor
    for option, value in {
        "samples": 200,
        "split": "test",
        "losses": "all",
        "thin": 2,
        "burn_in": 8,
        "normalise": "none",
    }.items():
        assert not np.allclose(run({"checkpoint": files[0]}, **{option: value})["llc_trace"], base["llc_trace"]), option
    assert run({"checkpoint": files[0]}, samples=200)["n"] == 200
    assert run({"checkpoint": files[0]}, parameters="^4|bias")["num_parameters"] == 50 + 4 + 4


def test_only_the_keys_that_are_asked_for(files):
    assert set(run({"checkpoint": files[0], "keys": ("llc", "rhat")})) == {"llc", "rhat"}


def test_a_setting_in_which_all_chains_diverge_is_a_row(files):
    row = run({"checkpoint": files[0], "epsilon": 1e4}, draws=60)
    assert math.isnan(row["llc"]) and np.isnan(row["llc_trace"]).all()
    assert row["verdict"] == "step too large" and "at step" in row["reason"] and "epsilon=10000" in row["reason"]
    assert row["chains_stopped"] == 2 and not row["stationary"] and row["n"] == 1000
    assert math.isfinite(row["initial_loss"]) and len(row["weights_hash"]) == 64
    assert set(row) == set(llc.KEYS)


def test_smoke_has_the_shapes_of_a_whole_run(files):
    row = run({"checkpoint": files[0], "smoke": True}, draws=500, chains=4, burn_in=10**7)
    assert row["llc_trace"].shape == (4, 500) and np.isfinite(row["llc_trace"]).sum() == 4


def test_what_cannot_be_used_is_named(files):
    with pytest.raises(MeasurementError, match="name a file with --llc.checkpoint"):
        run({})
    with pytest.raises(MeasurementError, match="--llc.model=.*to return a torch module, got tuple"):
        run({"checkpoint": files[0]}, model="datamodels.learning.data.digits_indices")
    with pytest.raises(MeasurementError, match="there is no data set 'digitz'"):
        run({"checkpoint": files[0]}, data="digitz")
