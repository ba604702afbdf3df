"""Rows of measurements: models and data by name, keys asked for, failures kept apart, stores of the two specs."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastargs import get_current_config
from torch import nn

from datamodels import worker
from datamodels.errors import ConfigError, DatamodelsError, MeasurementError
from datamodels.executors.share import Share
from datamodels.initialize_logdir import initialize
from datamodels.learning import checkpoints
from datamodels.measurements import datasets, library
from datamodels.measurements.backbones import Module
from datamodels.store import Store
from worker_scripts import digit_models, llc, measure

ROOT = Path(__file__).parents[2]
NET = "torch:worker_scripts.digit_models.pretrained?width=8&epochs=3"
UPRIGHT, TURNED = "worker_scripts.digit_models.upright", "worker_scripts.digit_models.turned"


@contextlib.contextmanager
def configured(**given):
    """The section `measure` with these values."""
    content = get_current_config().content
    before = dict(content)
    try:
        content.update({("measure", name): value for name, value in given.items()})
        yield
    finally:
        content.clear()
        content.update(before)


@pytest.fixture(autouse=True)
def fresh():
    measure._backbone.cache_clear()
    measure._examples.cache_clear()


def run(names, on=None, keys=None, **given):
    measurements = {"names": tuple(names), **({"on": tuple(on)} if on else {})}
    keys = tuple(library.schema(names, on)) if keys is None else keys
    return measure.main(keys=keys, measurements=measurements, **{"seed": 3, "model": NET, **given})


def test_a_row_of_a_scan():
    names = ["accuracy", "nll", "num_params", "effective_rank"]
    found = run(names, dataset="digits", split="test", n_samples=200, sample_seed=1)
    assert set(found) == set(library.schema(names))
    model, chosen = digit_models.pretrained(8, epochs=3), datasets.load("digits", "test").sample(200, seed=1)
    with torch.no_grad():
        right = model(torch.from_numpy(chosen.inputs)).argmax(1).numpy() == chosen.labels
    assert found["accuracy"] == pytest.approx(right.mean())
    assert 0.8 < found["accuracy"] < 1
    assert found["num_params"] == 64 * 8 + 8 + 8 * 10 + 10


def test_what_the_factors_change():
    def accuracy(**more):
        return float(run(["nll"], dataset="digits", keys=["nll"], **more)["nll"])

    once = accuracy(n_samples=100, sample_seed=1)
    assert once == accuracy(n_samples=100, sample_seed=1, seed=9)  # the row's own seed draws nothing then
    others = [
        accuracy(n_samples=100, sample_seed=2),
        accuracy(n_samples=100, seed=2),
        accuracy(n_samples=101, sample_seed=1),
        accuracy(n_samples=100, sample_seed=1, split="train"),
        accuracy(n_samples=100, sample_seed=1, labels="0, 3,7"),
        accuracy(n_samples=100, sample_seed=1, model=NET.replace("8", "9")),
        accuracy(),
    ]
    assert others[0] == others[1]
    assert len({once, *others}) == 7


def test_n_samples_are_drawn_from_those_that_are_kept():
    with configured(samples=40):
        keys = ("sample_ids",)
        few = run(["num_params"], dataset="digits", n_samples=40, keep_size=60, sample_seed=1, keys=keys)
        pool = datasets.load("digits", "test").sample(60, seed=1).ids
        assert set(few["sample_ids"]) <= set(pool)
    with pytest.raises(MeasurementError, match="asked for 40 examples of 30; let the design's filter drop such rows"):
        run(["nll"], dataset="digits", n_samples=40, keep_size=30)


def test_properties_and_benefits_of_several_data_sets():
    on = [f"{UPRIGHT}/test", f"{TURNED}/test", f"{UPRIGHT}/test->{TURNED}/test"]
    names = ["accuracy", "group_accuracy", "accuracy_drop", "weight_norms"]
    found = run(names, on)
    assert set(found) == set(library.schema(names, on))
    drop = found["upright_test_accuracy"] - found["turned_test_accuracy"]
    assert found["upright_test_to_turned_test_accuracy_drop"] == pytest.approx(float(drop)) and drop > 0.2
    plain = run(["accuracy"], dataset="digits")
    assert found["upright_test_accuracy"] == plain["accuracy"]
    keys = ["digits_train_effective_rank", "upright_test_accuracy", "digits_train_sample_ids"]
    with configured(samples=3):
        apart = run(["effective_rank@digits/train", f"accuracy@{UPRIGHT}/test"], keys=keys)
    assert apart["upright_test_accuracy"] == plain["accuracy"] and set(apart) == set(keys)


def test_one_forward_pass_for_each_data_set(monkeypatch):
    seen, both = [], Module.both
    monkeypatch.setattr(Module, "both", lambda self, batch: seen.append(len(batch)) or both(self, batch))
    on = [f"{UPRIGHT}/test", f"{TURNED}/test", f"{UPRIGHT}/test->{TURNED}/test"]
    with configured(batch_size=400):
        run(["accuracy", "nll", "log_me", "effective_rank", "leep", "accuracy_drop"], on)
    assert seen == [400, 397] * 2


def test_only_what_is_asked_for_is_measured(monkeypatch):
    seen, both = [], Module.both
    monkeypatch.setattr(Module, "both", lambda self, batch: seen.append(len(batch)) or both(self, batch))
    found = run(["accuracy", "num_params", "weight_norms"], dataset="digits", keys=("weight_norms_l2", "num_params"))
    assert set(found) == {"weight_norms_l2", "num_params"} and seen == []


def test_what_fails_is_a_value_and_a_data_set_fails_by_itself():
    found = run(["group_accuracy", "accuracy"], dataset="digits")
    assert isinstance(found["group_accuracy_worst"], library.Unmet) and found["accuracy"] > 0.8
    found = run(["accuracy", "num_params"], ["digits/test", "digits/dev"])
    assert found["digits_test_accuracy"] > 0.8 and found["num_params"] == 610
    assert "expected the split train, test or all, got 'dev'" in str(found["digits_dev_accuracy"])


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"model": "torch:worker_scripts.digit_models.gone"}, MeasurementError, "has no 'gone'"),
        ({"dataset": "digts"}, MeasurementError, "there is no data set 'digts'"),
        ({"dataset": None}, ConfigError, "which data set?"),
        ({"model": None}, ConfigError, "which model?"),
        ({"names": []}, ConfigError, "does not say what to measure"),
        ({"on": ["digits/test"]}, ConfigError, "remove one"),
        ({"names": ["accuracy@digits/test"]}, ConfigError, "remove one"),
        ({"labels": "eleven"}, MeasurementError, "there is no class 'eleven'"),
    ],
)
def test_rows_that_cannot_be_measured_at_all(given, error, says):
    with pytest.raises(error, match=says):
        run(**{"names": ["num_params"], "dataset": "digits", "keys": ("num_params",), **given})


def test_short_names_and_defaults():
    with configured(models={"small": NET}, data={"t": TURNED}, model="small", dataset="t", split="train"):
        found = run(["accuracy"], model=None)
        assert found["accuracy"] == run(["accuracy"], dataset=TURNED, split="train", model=NET)["accuracy"]
        assert set(run(["accuracy"], ["t/test"], keys=("t_test_accuracy",))) == {"t_test_accuracy"}
        said = measure.describe_row(measurements={"names": ("top_k_accuracy?k=3",)})
    assert said.splitlines() == [
        f"model      {NET}",
        f"data       {TURNED}, train",
        "measures   top_k_accuracy: benefit (k=3)",
    ]


def test_the_checker_of_short_names():
    assert measure.Names().check('{"a": "b"}') == {"a": "b"} == measure.Names().check({"a": "b"})
    for wrong in ("[1]", {"a": 1}, "nonsense"):
        with pytest.raises(ValueError):
            measure.Names().check(wrong)


def test_a_table_knows_models_by_the_names_that_the_design_gives_them(tmp_path):
    (tmp_path / "scores.yaml").write_text("small: 0.75\n")
    with configured(models={"small": NET}):
        found = run([f"published_accuracy?table={tmp_path}/scores.yaml"], dataset="digits", model="small")
    assert found["published_accuracy"] == 0.75


def test_what_fills_a_key_that_was_added_later():
    given = {"names": ["num_params"], "dataset": "digits", "keys": ("accuracy",)}
    with pytest.raises(ConfigError, match="nothing that is measured fills accuracy"):
        run(**given)
    with configured(names="nll accuracy"):
        assert set(run(**given)) == {"accuracy"}


def test_checkpoints_as_a_factor(tmp_path):
    net = digit_models.pretrained(8, epochs=1)
    checkpoints.save(tmp_path / "step-1.pt", net.state_dict())
    given = {"names": ["accuracy"], "dataset": "digits"}
    found = run(**given, model=NET, checkpoint=str(tmp_path / "step-1.pt"))["accuracy"]
    assert found == run(**given, model=NET.replace("epochs=3", "epochs=1"))["accuracy"]
    with pytest.raises(ConfigError, match="the model must be torch:"):
        run(**given, model="bert", checkpoint="a.pt")


def test_agreement_with_a_reference():
    with configured(reference=NET):
        assert run(["agreement"], dataset="digits")["agreement"] == 1
        other = run(["agreement"], dataset="digits", model=NET.replace("epochs=3", "epochs=0"))["agreement"]
    assert other < 0.5


def test_samples_are_kept():
    with configured(samples=5):
        found = run(["accuracy"], dataset="digits", n_samples=50, sample_seed=1, keys=measure.SAMPLES)
        on = run(["accuracy"], ["digits/test"], keys=("digits_test_sample_labels",))
        headless = run(["num_params"], dataset="digits", keys=("num_params",))
    whole = datasets.load("digits", "test")
    assert set(found) == set(measure.SAMPLES) and set(headless) == {"num_params"}
    assert (found["sample_ids"] == whole.sample(50, seed=1).ids[:5]).all()
    assert (found["sample_labels"] == whole.labels[found["sample_ids"]]).all()
    logits = digit_models.pretrained(8, epochs=3)(torch.from_numpy(whole.inputs[found["sample_ids"]]))
    assert (found["sample_predictions"] == logits.argmax(1).numpy()).all()
    assert (on["digits_test_sample_labels"] == whole.labels[:5]).all()
    found = run(["accuracy"], dataset="digits", keys=("sample_ids", "accuracy"))
    assert "`samples` in the spec, of 1 to 797, the examples there are, got 0" in str(found["sample_ids"])
    assert found["accuracy"] > 0.8


def test_samples_are_kept_where_the_spec_says_so(tmp_path, monkeypatch):
    """For each data set, in keys that the store is made with; a store without them refuses the option."""
    on = [f"{UPRIGHT}/test", f"{UPRIGHT}/test->{TURNED}/test"]
    asked = {"names": ["num_params", "accuracy"], "samples": 5}
    monkeypatch.setattr(sys, "argv", ["worker.py"])
    for name, more, design in (("both", {"on": on}, {}), ("own", {}, {"dataset": ["digits"]})):
        spec = {"measurements": {**asked, **more}, "design": [{"seed": 0, "choices": {"model": [NET], **design}}]}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        initialize(tmp_path / name, tmp_path / "spec.json")
        argv = [f"--worker.logdir={tmp_path / name}", "--worker.main_import=worker_scripts.measure"]
        assert worker.main(argv) == 0
        again = [*argv, "--worker.index=0", "--worker.do_if_complete", "--measure.samples=4"]
        with configured(), pytest.raises(ConfigError, match="--measure.samples=4: the store was made for samples of 5"):
            worker.main(again)
    whole, net = datasets.load("digits", "test"), digit_models.pretrained(8, epochs=3)
    with Store.open(tmp_path / "both") as both, Store.open(tmp_path / "own") as own:
        ids = own.rows("sample_ids").tolist()
        assert ids == both.rows("upright_test_sample_ids").tolist() == [whole.ids[:5].tolist()]
        assert own.rows("sample_labels").tolist() == [whole.labels[:5].tolist()]
        with torch.no_grad():
            predicted = net(torch.from_numpy(whole.inputs[:5])).argmax(1)
        assert own.rows("sample_predictions").tolist() == [predicted.tolist()]
        assert both.rows("turned_test_sample_labels").dtype == np.int64
        assert [key for key in both.spec.schema if "sample" in key] == [
            f"{where}_test_{key}" for where in ("upright", "turned") for key in measure.SAMPLES
        ]
    with configured(samples=5), pytest.raises(ConfigError, match='"samples": 5'):
        run(["num_params"], dataset="digits")


def test_a_model_that_leaves_is_a_failure_of_what_asks_it(monkeypatch):
    def leaves(self, batch):
        raise SystemExit(3)

    monkeypatch.setattr(Module, "both", leaves)
    with configured(samples=5):
        keys = ("num_params", "accuracy", "seconds_accuracy", "seconds_inference", "sample_predictions")
        found = run(["num_params", "accuracy"], dataset="digits", keys=keys)
    assert found.pop("num_params") == 610 and len(found) == 4
    assert all(isinstance(value, SystemExit) for value in found.values())


def test_a_measurement_that_is_tried_again_has_its_time_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "mending.py").write_text("mended = False\ndef broken(labels): return 7 if mended else 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["worker.py"])
    spec = {"measurements": {"names": ["mending.broken", "num_params"]}, "num_models": 1}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    initialize(tmp_path / "store", tmp_path / "spec.json")
    argv = [f"--worker.logdir={tmp_path}/store", "--worker.main_import=worker_scripts.measure", "--worker.retries=9"]
    argv += [f"--measure.model={NET}", "--measure.dataset=digits"]
    with configured():
        assert worker.main(argv) == 0
        with Store.open(tmp_path / "store") as store:
            failed = list(Share(store).failed_keys())
        assert failed == ["broken", "seconds_broken"]
        again = [*argv, f"--worker.keys={','.join(failed)}"]
        assert worker.main([*again, "--worker.index=0", "--worker.retries=0"]) == 1
        assert "attempt 2 failed: broken: ZeroDivisionError" in capsys.readouterr().err
        sys.modules["mending"].mended = True
        assert worker.main(again) == 0
    with Store.open(tmp_path / "store") as store:
        assert store.rows("broken").tolist() == [7] and 0 <= store.rows("seconds_broken")[0] < 1


def test_predictions_of_a_model_that_gives_no_numbers_are_none(monkeypatch):
    both = Module.both
    monkeypatch.setattr(Module, "both", lambda self, batch: (both(self, batch)[0], both(self, batch)[1] * torch.nan))
    with configured(samples=5):
        found = run(["num_params"], dataset="digits", keys=("num_params", "sample_ids", "sample_predictions"))
    assert found["sample_ids"].shape == (5,) and "logits of 797 of 797" in str(found["sample_predictions"])


def test_smoke_is_three_batches(monkeypatch):
    seen, both = [], Module.both
    monkeypatch.setattr(Module, "both", lambda self, batch: seen.append(len(batch)) or both(self, batch))
    with configured(batch_size=100):
        run(["accuracy"], dataset="digits", smoke=True)
    assert seen == [100] * 3


# ------------------------------------------------------------------------------------------- a row of another store


def zoo(folder, **files):
    """A store of two rows, the first complete, with checkpoints in its folder."""
    spec = {
        "schema": {"loss": {"shape": [], "dtype": "float64"}},
        "design": [{"role": "train", "seed": 0, "choices": {"width": [7, 9], "lr": [0.1]}}],
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    initialize(folder / "zoo", folder / "spec.json")
    with Store.open(folder / "zoo") as store:
        store.commit_many([0], {"loss": np.ones(1)})
    net = nn.Sequential(nn.Flatten(), digit_models.MLP((64, 7, 10))(5))
    (folder / "zoo/workers/0").mkdir(parents=True)
    for name in files or ("model",):
        checkpoints.save(folder / f"zoo/workers/0/{name}.pt", net.state_dict())
    return net


def test_a_row_of_another_store(tmp_path):
    net = zoo(tmp_path)
    row = f"row:{tmp_path}/zoo#0?factory=worker_scripts.digit_models.pretrained"
    found = run(["accuracy", "num_params"], dataset="digits", model=row)
    whole = datasets.load("digits", "test")
    with torch.no_grad():
        right = net(torch.from_numpy(whole.inputs)).argmax(1).numpy() == whole.labels
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["num_params"] == 64 * 7 + 7 + 7 * 10 + 10  # the width is that of the row


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("row:{}/zoo#1?factory=worker_scripts.digit_models.pretrained", "row 1 of .* is not complete"),
        ("row:{}/zoo#5?factory=worker_scripts.digit_models.pretrained", "row 5"),
        ("row:{}/zoo#0", "expected row:STORE#ROW\\?factory="),
        ("row:{}/zoo?factory=a.b", "expected row:STORE#ROW\\?factory="),
        ("row:{}/zoo#0?factory=worker_scripts.digit_models.pretrained", "a.pt, b.pt; name one with &file=NAME"),
        ("row:{}/zoo#0?factory=worker_scripts.digit_models.pretrained&file=c.pt", "got none"),
        ("row:{}/nowhere#0?factory=worker_scripts.digit_models.pretrained", "nowhere"),
    ],
)
def test_rows_of_stores_that_are_no_model(tmp_path, name, says):
    zoo(tmp_path, a=1, b=1)
    with pytest.raises(DatamodelsError, match=says):
        run(["num_params"], dataset="digits", model=name.format(tmp_path))


def test_one_of_several_checkpoints(tmp_path):
    zoo(tmp_path, a=1, b=1)
    row = f"row:{tmp_path}/zoo#0?factory=worker_scripts.digit_models.pretrained&file=b.pt"
    assert run(["num_params"], dataset="digits", model=row)["num_params"] == 535


# -------------------------------------------------------------------------------------------------- whole stores


def command(argv):
    words = [sys.executable, "-W", "ignore", "-m", *argv]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def work(*argv):
    return command(["datamodels.worker", "--worker.main_import=worker_scripts.measure", *argv])


@pytest.mark.parametrize(("main", "given", "meant"), [(measure, "n_sample", "n_samples"), (llc, "epsilom", "epsilon")])
def test_a_misspelt_factor_is_refused(tmp_path, monkeypatch, main, given, meant):
    monkeypatch.setattr(sys, "argv", ["worker.py"])  # the worker gives it to main
    spec = {"schema": {"nll": {"shape": [], "dtype": "float64"}}, "design": [{"seed": 0, "choices": {given: [1, 2]}}]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    initialize(tmp_path / "store", tmp_path / "spec.json")
    with pytest.raises(ConfigError, match=f"the factor '{given}' reaches nobody.*; did you mean '{meant}'"):
        worker.main(["--worker.dry_run", f"--worker.logdir={tmp_path}/store", f"--worker.main_import={main.__name__}"])


@pytest.mark.slow
def test_rows_of_the_scan_that_ships(tmp_path):
    initialize(tmp_path / "scan", ROOT / "specs/scan.json")
    logdir = f"--worker.logdir={tmp_path}/scan"
    said = work(logdir, "--worker.dry_run")
    assert "dataset='digits', n_samples=100, sample_seed=0" in said and "measure.batch_size        64" in said
    work(logdir, "--worker.rows=n_samples=300,sample_seed=1")
    with Store.open(tmp_path / "scan") as store:
        rows = np.flatnonzero(store.completed())
        assert len(rows) == 8
        choices = [store.design.assignment(int(row)).choices for row in rows]
        probe = store.rows("linear_probe", rows)
        assert np.isfinite(probe).all()
        by = {(c["model"], c["dataset"]): p for c, p in zip(choices, probe, strict=True)}
        assert (store.rows("seconds_log_me", rows) > 0).all() and (store.rows("seconds_inference", rows) > 0).all()
        best = by["torch:worker_scripts.digit_models.pretrained?width=64", "digits"]
        assert best > by["torch:worker_scripts.digit_models.pretrained?width=8", "digits"]
    command(["datamodels.store", "add-key", f"{tmp_path}/scan", "nce", "--dtype=float64"])
    work(logdir, "--worker.keys=nce", "--measure.names=nce")
    with Store.open(tmp_path / "scan") as store:
        assert (store.rows("nce", rows) < 0).all()


@pytest.mark.slow
def test_the_properties_that_ship(tmp_path):
    initialize(tmp_path / "store", ROOT / "specs/properties.json")
    said = work(f"--worker.logdir={tmp_path}/store", "--worker.index=0")
    assert "row 0: complete" in said and " failed:" not in said
    with Store.open(tmp_path / "store") as store:
        for key, field in store.spec.schema.items():
            assert np.isfinite(store.rows(key, [0])).all(), key
            assert (field.role is None) == ("seconds_" in key)
        assert (store.rows("upright_test_to_turned_test_accuracy_drop", [0]) > 0.2).all()
