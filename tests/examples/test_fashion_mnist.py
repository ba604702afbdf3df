"""The Fashion-MNIST example, as a user runs it, on a tiny folder of IDX files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from datamodels.spec import Spec
from tests import image_files

ROOT = Path(__file__).parents[2]
TRAIN, TEST = 60, 20


def example(*args, **settings):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WORKERS": "1"} | settings
    command = ["bash", str(ROOT / "examples/fashion_mnist/example.sh"), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def settings(tmp_path):
    """The shipped spec with the tiny folder's sizes, and a regression to go with it."""
    spec = json.loads((ROOT / "examples/fashion_mnist/spec.json").read_text())
    spec["schema"]["masks"]["shape"], spec["schema"]["margins"]["shape"] = [TRAIN], [TEST]
    spec["design"][0]["masks"] = 12
    spec["design"][1] |= {"masks": 2, "repeats": 2}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "regression.yaml").write_text("data: {num_train: 9, num_val: 3}\ncfg: {k: 5}\n")
    return {"SPEC": str(tmp_path / "spec.json"), "REGRESSION": str(tmp_path / "regression.yaml")}


def test_the_example_runs_from_files_to_datamodels(tmp_path, settings):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    image_files.write_fashion_mnist(images, train=TRAIN, test=TEST)
    options = (f"--data.dir={images}", "--training.hidden=16", "--training.batch_size=10", "--training.epochs=8")
    done = example(out, *options, **settings)
    assert done.returncode == 0, done.stderr
    assert np.load(out / "store/_completed.npy").all()
    masks = np.unpackbits(np.load(out / "store/masks.npy"), axis=1, count=TRAIN, bitorder="little")
    assert masks.sum(1).tolist() == [TRAIN // 2] * 16
    margins = np.load(out / "store/margins.npy")
    assert margins.dtype == np.float16
    assert (margins > 0).mean() > 0.3  # of ten classes with the margin above the others' sum: it has learned
    saved = torch.load(out / "datamodels/datamodels.pt", weights_only=True)
    assert saved["weight"].shape == (TRAIN, TEST)
    again = example(out, *options, **settings)
    assert again.returncode == 0, again.stderr
    assert np.array_equal(margins, np.load(out / "store/margins.npy"))


def test_missing_images_end_it_before_any_row_is_spent(tmp_path, settings):
    done = example(tmp_path / "out", f"--data.dir={tmp_path}", **settings)
    assert done.returncode != 0
    assert "apt-get install dataset-fashion-mnist" in done.stderr
    assert not np.load(tmp_path / "out/store/_rows.npy")["attempts"].any()


def test_the_shipped_spec_is_fashion_mnists():
    spec = Spec.load(ROOT / "examples/fashion_mnist/spec.json")
    assert spec.schema["masks"].shape == (60_000,)
    assert spec.schema["margins"].shape == (10_000,)


def test_the_shipped_regression_takes_rows_and_images_that_there_are():
    spec = Spec.load(ROOT / "examples/fashion_mnist/spec.json")
    config = yaml.safe_load((ROOT / "examples/fashion_mnist/regression.yaml").read_text())["data"]
    assert int(config["num_train"]) + int(config["num_val"]) == spec.design[0]["masks"]
    assert 0 <= config["target_start_ind"] < config["target_end_ind"] <= spec.schema["margins"].shape[0]
