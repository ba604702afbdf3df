"""The released helper names, in this process."""

import json
import sys

import fastargs
import numpy as np
import pytest

from datamodels.errors import SpecError
from datamodels.store import Store
from datamodels.training import spec as names
from datamodels.training.utils import load_memmap, make_config, memmap_path

SPEC = {"num_models": 3, "schema": {"x": {"shape": [2], "dtype": "float"}}}


def test_preprocess_spec_adds_the_completed_array_and_changes_nothing():
    before = json.dumps(SPEC)
    after = names.preprocess_spec(SPEC)
    assert json.dumps(SPEC) == before
    assert after[names.SCHEMA] == {
        "x": {"shape": [2], "dtype": "float"},
        "_completed": {names.DTYPE: "bool_", names.SHAPE: []},
    }
    assert (after[names.NUM_MODELS], names.COMPLETED) == (3, "_completed")


@pytest.mark.parametrize(
    "bad",
    [{}, {"num_models": 3}, {**SPEC, "schema": {"_completed": {"shape": [], "dtype": "bool_"}}}, {**SPEC, "x": 1}],
)
def test_verify_spec(bad):
    assert names.verify_spec(SPEC) is None
    with pytest.raises(SpecError):
        names.verify_spec(bad)


def test_load_memmap_reads_and_writes_like_numpy(tmp_path):
    np.save(memmap_path(tmp_path, "a"), np.arange(6).reshape(3, 2))
    read = load_memmap(str(tmp_path), "a", "r")
    assert isinstance(read, np.memmap) and read.tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1
    load_memmap(tmp_path, "a", "r+")[0] = 9
    copy = load_memmap(tmp_path, "a", "c")
    copy[1] = 7
    assert np.load(tmp_path / "a.npy").tolist() == [[9, 9], [2, 3], [4, 5]]
    np.save(tmp_path / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_memmap(tmp_path, "p", None)


def test_load_memmap_of_a_store(tmp_path):
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    with Store.create(tmp_path / "store", tmp_path / "spec.json") as store:
        store.commit_many([1], {"x": np.array([[1.5, 2.5]])})
    assert load_memmap(tmp_path / "store", "x", "r")[1].tolist() == [1.5, 2.5]
    assert load_memmap(tmp_path / "store", names.COMPLETED, "r").tolist() == [False, True, False]


@pytest.fixture
def registry():
    before = fastargs.get_current_config()
    fastargs.set_current_config(fastargs.Config())
    fastargs.Section("trainer").params(
        a=fastargs.Param(int, "", required=True), b=fastargs.Param(float, "", default=1.0)
    )
    yield
    fastargs.set_current_config(before)


def test_make_config(registry, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yml").write_text("trainer: {a: 1, b: 5e-3}\n")
    monkeypatch.setattr(sys, "argv", ["prog", "--trainer.a=2", "--other.thing=3"])
    config = make_config(conf_path=tmp_path / "c.yml")
    assert config is fastargs.get_current_config()
    assert (config["trainer.a"], config["trainer.b"]) == (2, 5e-3)
    assert capsys.readouterr().err == "trainer.a  2\ntrainer.b  0.005\n"
    make_config(quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "error: --trainer.a is required\n"),
        (["--trainer.a=x"], 2, "error: trainer.a: expected an int, got 'x'\n"),
        (["-C", "/none.yml"], 2, "error: -C /none.yml: cannot be read"),
        (["--help"], 0, ""),
    ],
)
def test_make_config_ends_plainly(registry, monkeypatch, capsys, argv, code, message):
    monkeypatch.setattr(sys, "argv", ["prog", *argv])
    with pytest.raises(SystemExit) as end:
        make_config()
    shown = capsys.readouterr()
    assert end.value.code == code
    assert shown.err.startswith(message) and shown.err.count("\n") == bool(code)
    assert ("trainer.a" in shown.out) == (code == 0)
