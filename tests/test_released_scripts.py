"""Modules written for the released code, in each of the styles seen there, run unchanged and in their own processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

SPEC = """{"num_models": 3, "schema": {
    "numbers": {"shape": [4], "dtype": "uint8"}, "score": {"shape": [], "dtype": "float"}}}"""

# A main() that sets up fastargs itself, from inside the worker, with all of the registry's methods.
COLLECTS_ITSELF = """
from argparse import ArgumentParser
import numpy as np
from fastargs import Param, Section, get_current_config
from fastargs.decorators import param

Section('trainer').params(
    multiple=Param(int, 'a number', required=True),
    half=Param(bool, 'half of it', is_flag=True),
    scale=Param(float, 'another', default=1.0),
)

def main(*_, index, logdir):
    config = get_current_config()
    parser = ArgumentParser(description='a job')
    config.augment_argparse(parser)
    config.collect_argparse_args(parser)
    config.validate(mode='stderr')
    config.summary()
    return work(index=index)

@param('trainer.multiple')
@param('trainer.half')
@param('trainer.scale')
def work(*_, index, multiple, half=False, scale=None):
    return {'numbers': np.ones(4, dtype=np.uint8) * multiple, 'score': scale * index / (2 if half else 1)}
"""

# Positional names, a random mask, its own file in logdir.
POSITIONAL = """
import numpy as np
from argparse import ArgumentParser
from pathlib import Path
from fastargs import get_current_config, Param, Section

Section('trainer', 'numbers').params(multiple=Param(int, '', default=5))

def main(index, logdir):
    config = get_current_config()
    parser = ArgumentParser()
    config.augment_argparse(parser)
    config.collect_argparse_args(parser)
    config.validate(mode='stderr')
    Path(logdir, 'log.txt').write_text(str(index))
    return {'numbers': [config['trainer.multiple']] * 4, 'score': float(index)}
"""

ONLY_PARAM = """
import numpy as np
from fastargs import Param, Section
from fastargs.decorators import param, section
from fastargs.validation import And, InRange

Section('trainer').params(
    multiple=Param(And(int, InRange(min=1)), '', required=True), scale=Param(float, '', default=1))

@section('trainer')
@param('multiple')
@param('scale', alias='by')
def main(*_, index, logdir, multiple, by):
    return {'numbers': np.full(4, multiple), 'score': np.float64(index * by)}
"""

PLAIN_ARGPARSE = """
import argparse
import numpy as np

def main(*_, index, logdir):
    parser = argparse.ArgumentParser()
    parser.add_argument('--multiple', type=int, required=True)
    parser.add_argument('--name.with_dot', type=float, default=1.0, dest='scale')
    parser.add_argument('--half', action='store_true')
    args = parser.parse_args()          # dies on what it does not know
    return {'numbers': np.full(4, args.multiple), 'score': args.scale * index / (2 if args.half else 1)}
"""

# The registry was one for all then: scripts could read the worker's own keys.
READS_THE_WORKERS_KEYS = """
from fastargs import get_current_config
from fastargs.decorators import param
from datamodels.training.spec import COMPLETED
from datamodels.training.utils import load_memmap, make_config, memmap_path
from fastargs import Param, Section

Section('trainer').params(multiple=Param(int, '', required=True))

@param('worker.logdir')
@param('trainer.multiple')
def main(*_, index, logdir, multiple):
    make_config(quiet=True)
    logdir = get_current_config()['worker.logdir']
    assert memmap_path(logdir, 'numbers').exists()
    done = load_memmap(logdir, COMPLETED, 'r')
    assert not done[index]
    return {'numbers': [multiple] * 4, 'score': float(index)}
"""

STYLES = {
    "collects_itself": (COLLECTS_ITSELF, ["--trainer.multiple=2", "--trainer.scale", "1.5", "--trainer.half"], 0.75),
    "positional": (POSITIONAL, ["--trainer.multiple", "2"], 1.0),
    "only_param": (ONLY_PARAM, ["--trainer.multiple=2", "--trainer.scale=0.5"], 0.5),
    "plain_argparse": (PLAIN_ARGPARSE, ["--multiple", "2", "--name.with_dot=3", "--half"], 1.5),
    "reads_the_workers_keys": (READS_THE_WORKERS_KEYS, ["--trainer.multiple=2"], 1.0),
}


def python(*argv, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def store(tmp_path):
    """A folder as the released scripts make it: mkdir first, then initialize_store into it."""
    (tmp_path / "spec.json").write_text(SPEC)
    (tmp_path / "store").mkdir()
    done = python(
        "datamodels.training.initialize_store", "--logging.logdir=store", "--logging.spec=spec.json", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    return tmp_path / "store"


def work(store, source, *argv, name="job", **env):
    (store.parent / f"{name}.py").write_text(source)
    return python(
        "datamodels.training.worker",
        "--worker.index=1",
        f"--worker.main_import={name}",
        "--worker.logdir=store",
        "--worker.retries=0",
        *argv,
        cwd=store.parent,
        **env,
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_main_of_the_released_code_runs_unchanged(store, style):
    source, argv, score = STYLES[style]
    done = work(store, source, *argv)
    assert done.returncode == 0, done.stderr
    assert np.load(store / "_completed.npy").tolist() == [False, True, False]
    assert np.load(store / "numbers.npy").tolist() == [[0] * 4, [2] * 4, [0] * 4]
    assert np.load(store / "score.npy").tolist() == [0.0, score, 0.0]
    assert "Traceback" not in done.stderr


def test_its_own_files_stay_in_its_own_folder(store):
    assert work(store, POSITIONAL).returncode == 0
    assert (store / "workers/1/log.txt").read_text() == "1"


def test_values_keep_their_order_when_main_collects_again(store):
    """fastargs by itself: the environment wins (9), an absent flag beats the file, and `5e-1` is text."""
    (store.parent / "job.yml").write_text(
        "trainer:\n  half: true\n  scale: 5e-1\n  multiple: 8\nworker:\n  retries: 0\n"
    )
    done = work(store, COLLECTS_ITSELF, "-C", "job.yml", "--trainer.multiple=2", **{"trainer.multiple": "9"})
    assert done.returncode == 0, done.stderr
    assert np.load(store / "numbers.npy")[1].tolist() == [2] * 4
    assert np.load(store / "score.npy")[1] == 0.25


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: --trainer.multiple is required"),
        (["--trainer.multiple=x"], "error: --trainer.multiple (command line): expected an int, got 'x'"),
        (["--trainer.multipl=2"], "did you mean --trainer.multiple?"),
        (["--trainer.multiple=2", "--worker.timeout=2"], "error: --worker.timeout (command line): unknown key"),
    ],
)
def test_a_mistake_in_the_users_own_section_costs_no_attempt(store, argv, message):
    done = work(store, COLLECTS_ITSELF, *argv)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (store / "workers/1").exists()


def test_a_main_that_dies_on_its_arguments_fails_its_row(store):
    done = work(store, PLAIN_ARGPARSE, "--multiple", "2", "--nothing.we_know=1")
    assert done.returncode == 1
    assert "unrecognized arguments: --nothing.we_know=1" in done.stderr
    assert not np.load(store / "_completed.npy").any()


def test_every_released_name_answers(tmp_path):
    for module, key in {
        "datamodels.training.initialize_store": "--logging.spec",
        "datamodels.training.initialize_logdir": "--logging.spec",
        "datamodels.training.worker": "--worker.main_import",
    }.items():
        done = python(module, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert key in done.stdout


def test_a_module_that_parses_sys_argv_when_imported_sees_only_what_is_its_own(tmp_path):
    (tmp_path / "early.py").write_text(
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--epochs', type=int, required=True)\n"
        "options = parser.parse_args()\n"
        "def main(index, logdir):\n"
        "    return {'n': options.epochs}\n"
    )
    (tmp_path / "spec.json").write_text('{"num_models": 2, "schema": {"n": {"shape": [], "dtype": "int64"}}}')
    initialise = [sys.executable, "-m", "datamodels.initialize_logdir", "--logging.logdir=store",
                  "--logging.spec=spec.json"]  # fmt: skip
    worker = [sys.executable, "-m", "datamodels.worker", "--worker.logdir=store", "--worker.main_import=early",
              "--worker.index=1", "--epochs=3"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (initialise, worker):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "store/n.npy").tolist() == [0, 3]
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "store/runs").glob("*.json")]
    assert "--worker.index=1" in record["argv"] and "--epochs=3" in record["argv"]
