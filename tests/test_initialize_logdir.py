"""`python -m datamodels.initialize_logdir`, as it is typed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from datamodels.store import Store
from tests.jobs import DESIGN, ROOT, finish, plain


@pytest.fixture
def initialise(tmp_path):
    def run(*argv, spec=None, text=None):
        (tmp_path / "spec.json").write_text(json.dumps(spec) if text is None else text)
        process = subprocess.Popen(
            [sys.executable, "-m", "datamodels.initialize_logdir", *argv],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return finish(process)

    return run


ARGV = ("--logging.logdir=store", "--logging.spec=spec.json")


def test_what_is_made_and_what_is_said_of_it(tmp_path, initialise):
    code, out, err = initialise(*ARGV, spec=DESIGN)
    assert (code, err) == (0, "")
    size = 6 * (1 + 4 + 12 + 32) / 1e6
    assert f"store: 6 rows, {size:.1f} MB" in out
    assert "x.npy  float32 [6, 3]" in out and "note.npy  U8 [6], optional" in out
    assert "block 0: 4 train rows = 2 grid cells × 2 bernoulli masks of alpha 0.5" in out
    assert "block 1: 2 eval rows = 1 grid cells × 1 bernoulli masks of alpha 0.5 × 2 repeats" in out
    x = np.load(tmp_path / "store/x.npy")
    assert (x.shape, x.dtype, x.any()) == ((6, 3), np.dtype("float32"), np.False_)
    assert np.load(tmp_path / "store/_completed.npy").tolist() == [False] * 6
    assert json.loads((tmp_path / "store/spec.json").read_text())["num_models"] == 6


def test_twice_into_one_folder_is_refused_and_changes_nothing(tmp_path, initialise):
    assert initialise(*ARGV, spec=plain(3))[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    code, out, err = initialise(*ARGV, spec=plain(4))
    assert (code, out) == (1, "")
    assert err.startswith("error: store: there is a store already, nothing is changed") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("reserve", ["auto", "no"])
def test_an_empty_folder_is_taken_and_space_reserved(tmp_path, initialise, reserve):
    (tmp_path / "store").mkdir()
    big = {"num_models": 1000, "schema": {"x": {"shape": [1024], "dtype": "float32"}}}
    assert initialise(*ARGV, f"--logging.reserve={reserve}", spec=big)[0] == 0
    stat = (tmp_path / "store/x.npy").stat()
    assert stat.st_size == 128 + 1000 * 4096
    assert (stat.st_blocks * 512 >= 1000 * 4096) == (reserve == "auto")


@pytest.mark.parametrize(
    ("argv", "text", "code", "message"),
    [
        (ARGV, '{"num_models": 3,\n "schema": }', 1, "line 2, column 12"),
        (ARGV, '{"num_models": -1, "schema": {"x": {"shape": [], "dtype": "float"}}}', 1, "an int >= 1, got -1"),
        (ARGV, '{"num_models": 1, "schema": {"x": {"shape": [], "dtype": "flaot32"}}}', 1, "did you mean 'float32'?"),
        (ARGV[:1], "{}", 2, "--logging.spec is required"),
        ((*ARGV, "--logging.reserv=no"), "{}", 2, "did you mean --logging.reserve?"),
        ((*ARGV, "--logging.reserve=yes"), "{}", 2, "expected one of auto, no, got 'yes'"),
        ((ARGV[0], "--logging.spec=gone.json"), "{}", 1, "gone.json"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, initialise, argv, text, code, message):
    end, out, err = initialise(*argv, text=text)
    assert (end, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "store").exists()


# ------------------------------------------------------------------ keys that measurements bring


def test_measurements_become_keys_of_the_schema(tmp_path, initialise):
    spec = {
        "schema": {"log_me": {"shape": [], "dtype": "float32"}},
        "measurements": {"names": ["log_me", "num_params"]},
        "design": [{"role": "train", "seed": 0, "count": 2, "choices": {"dataset": ["a", "b"]}}],
    }
    code, out, err = initialise(*ARGV, spec=spec)
    assert (code, err) == (0, "")
    assert "num_params.npy  float64 [2], optional" in out and "log_me.npy  float32 [2]\n" in out  # its own entry wins
    with Store.open(tmp_path / "store") as store:
        assert store.spec.measurements == {"names": ("log_me", "num_params")}
        assert store.spec.schema["num_params"].role == "property" and store.spec.schema["num_params"].allow_nonfinite
        assert {"seconds_log_me", "seconds_inference"} <= set(store.spec.schema)


def test_one_level_that_is_a_pair_is_enough_for_what_compares_two(tmp_path, initialise):
    spec = {
        "measurements": {"names": ["accuracy", "accuracy_drop"], "samples": 3},
        "design": [{"seed": 0, "choices": {"dataset": ["a"]}}, {"seed": 1, "choices": {"dataset": ["a->b"]}}],
    }
    assert initialise(*ARGV, spec=spec)[0] == 0
    with Store.open(tmp_path / "store") as store:
        assert store.spec.measurements == {"names": ("accuracy", "accuracy_drop"), "samples": 3}
        field = store.spec.schema["sample_ids"]
        assert (field.shape, field.dtype, field.required, field.role) == ((3,), "int64", False, None)


@pytest.mark.parametrize(
    ("measurements", "choices", "why"),
    [
        ({"names": ["log_you"]}, {"dataset": ["a"]}, "log_you"),
        ({"names": ["log_me"], "on": ["a/test"]}, {"dataset": ["a"]}, "the design has a factor `dataset`"),
        ({"names": ["log_me@a/test"]}, {"dataset": ["a"]}, "the design has a factor `dataset`"),
        ({"names": "log_me"}, {"dataset": ["a"]}, "measurements, names: expected a list of names, got 'log_me'"),
        ({"names": ["log_me", "log_me"]}, {"dataset": ["a"]}, "a name stands there twice"),
        ({"on": ["a/test"]}, {"model": ["a"]}, "measurements: names is missing"),
        ({"names": ["accuracy_drop"]}, {"dataset": ["a", "b"]}, "accuracy_drop needs a pair of data sets, as in"),
        ({"names": ["accuracy"]}, {"dataset": ["a->b"]}, "accuracy needs one data set, and no pair"),
        ({"names": ["log_me"], "samples": 0}, {"dataset": ["a"]}, "measurements, samples: expected an int >= 1, got 0"),
        ({"names": ["log_me"], "samples": [5]}, {"dataset": ["a"]}, "expected an int >= 1, got [5]"),
        ({"names": ["log_me?as=sample_ids"], "samples": 5}, {"dataset": ["a"]}, "'sample_ids' is filled by `samples`"),
        ({"names": ["log_me"], "over": ["a"]}, {"model": ["a"]}, "unknown key 'over'"),
        (["log_me"], {"model": ["a"]}, 'measurements: expected {"names"'),
    ],
)
def test_measurements_that_mean_nothing_are_refused(tmp_path, initialise, measurements, choices, why):
    design = [{"role": "train", "seed": 0, "count": 1, "choices": choices}]
    code, _, err = initialise(*ARGV, spec={"measurements": measurements, "design": design})
    assert code == 1 and "spec.json: " in err and why in err and err.count("\n") == 1
    assert not (tmp_path / "store").exists()
