"""What all runners of examples share: --help starts nothing, and another size is never taken for the one asked for."""

import json
import subprocess
import sys

import numpy as np
import pytest

from datamodels.errors import DatamodelsError
from datamodels.store import Store
from examples import steps
from tests.jobs import ROOT

RUNNERS = ("digits.run", "interplay.run", "llc.run", "llc.train", "select_backbone.run", "select_backbone.data")
SPEC = {
    "schema": {"a": {"shape": [], "dtype": "float64"}},
    "design": [{"role": "train", "seed": 0, "choices": {"epsilon": [1e-6, 1e-5]}}],
}


def python(*words, cwd=ROOT):
    return subprocess.run([sys.executable, *words], cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip


@pytest.mark.parametrize("runner", RUNNERS)
def test_help_says_what_it_is_and_starts_nothing(runner, tmp_path):
    done = python("-m", f"examples.{runner}", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m examples.{runner}"), done.stderr
    assert "--out" in done.stdout and ("--workers" in done.stdout) == runner.endswith(".run")
    assert ("--smoke" in done.stdout) == (runner.endswith(".run") and runner != "digits.run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["interplay.train", "select_backbone.finetune"])
def test_a_main_of_rows_says_how_it_is_run(module):
    done = python("-m", f"examples.{module}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"python -m datamodels.worker --worker.main_import=examples.{module}" in done.stderr


@pytest.fixture
def made(tmp_path, capfd):
    path, kept = tmp_path / "store", tmp_path / "store.json"
    steps.store(path, kept, SPEC, {"--llc.samples": 10.0})
    assert json.loads(kept.read_text()) == SPEC
    capfd.readouterr()
    return path, kept


def complete_one(path):
    with Store.open(path) as store:
        store.commit_many([0], {"a": [1.0]})


def test_what_is_there_is_gone_on_with(made, capfd):
    steps.store(*made, SPEC, {"--llc.samples": 10.0})
    assert f"{made[0]} is there, 0 of 2 rows complete" in capfd.readouterr().out


def test_another_spec_says_what_differs_and_what_to_do(made):
    design = [{**SPEC["design"][0], "choices": {"epsilon": [1e-3]}}]
    wanted = r"store was made from something else: design\[0\].choices.epsilon is \[1e-06, 1e-05\] there and " \
             r"\[0.001\] here. Name another folder for the results, or remove .*store to"  # fmt: skip
    with pytest.raises(DatamodelsError, match=wanted):
        steps.store(*made, {**SPEC, "design": design})
    schema = {"a": {"shape": [3], "dtype": "float64"}}
    with pytest.raises(DatamodelsError, match=r"schema.a.shape is \[\] there and \[3\] here"):
        steps.check(*made, {**SPEC, "schema": schema})
    assert np.load(made[0] / "_completed.npy").shape == (2,)


def test_a_key_more_or_less_in_the_schema_is_no_other_spec(made):
    steps.check(*made, {**SPEC, "schema": {**SPEC["schema"], "b": {"shape": [], "dtype": "int64"}}})


def test_settings_count_from_the_first_complete_row_on(made):
    steps.store(*made, SPEC, {"--llc.samples": 20.0})  # the first were a mistake that no row survived
    complete_one(made[0])
    steps.check(*made, SPEC, {"--llc.samples": 20.0})
    with pytest.raises(DatamodelsError, match="--llc.samples is 20.0 there and 10.0 here"):
        steps.store(*made, SPEC, {"--llc.samples": 10.0})


def test_a_store_that_nothing_describes_is_not_taken(made):
    made[1].unlink()
    with pytest.raises(DatamodelsError, match="no .*store.json that says what it was made from"):
        steps.store(*made, SPEC)


def test_settings_are_what_numbers_come_from():
    words = ["--worker.sync=false", "--pool.workers=3", "--llc.device=cuda", "--llc.epsilon=1e-08", "--llc.data=digits"]
    assert (
        steps.options(words)
        == {"--llc.epsilon": 1e-8, "--llc.data": "digits"}
        == steps.options(["--llc.epsilon=0.00000001", "--llc.data=digits"])
    )
