"""The smallest example, as a reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def example(folder, cwd=ROOT):
    return subprocess.run(
        ["bash", str(ROOT / "examples/minimal/example.sh"), str(folder)],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def check(folder, multiple):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "examples.minimal.check",
            f"--checking.logdir={folder}",
            f"--trainer.multiple={multiple}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_example_fills_its_store_from_any_folder(tmp_path):
    done = example("store", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "every row is complete and right" in done.stdout
    assert np.array_equal(np.load(tmp_path / "store/products.npy"), np.outer(np.arange(10), [2, 4, 6]))
    assert np.load(tmp_path / "store/_completed.npy").all()

    again = example(tmp_path / "store")
    assert again.returncode == 1
    assert "there is a store already" in again.stderr

    wrong = check(tmp_path / "store", 3)
    assert wrong.returncode == 1
    assert "row 4: expected [12, 24, 36], got [8, 16, 24]" in wrong.stdout
