"""The GPU benchmark runs from end to end on a CPU, small, and says what it could not measure."""

import os
import subprocess
import sys
from pathlib import Path

from tests.regression.test_fast_l1 import stand_in  # noqa: F401

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks/gpu.py"


def run(*args, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *args],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_small_on_a_cpu(stand_in, tmp_path):  # noqa: F811
    done = run("--device", "cpu", "--small", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for text in (
        "answers against float64 on the CPU",
        "half, prox",
        "half, tiles",
        "n=500, p=120, T=8, Gram matrix",
        "n=600, p=200, T=12, Gram matrix",
        "n=300, p=400, T=6, tiles",
        "gradient product, 8 targets",
        "certificate",
        "0 of 12 targets beyond 1e-05",
        "fast_l1, its defaults:",
        "0 answers missed",
    ):
        assert text in done.stdout, done.stdout
    assert "MISSED" not in done.stdout and "out of memory" not in done.stdout


def test_what_the_budget_has_no_time_for_is_left_out():
    done = run("--device", "cpu", "--small", "--budget", "0", "--precision", "half")
    assert done.returncode == 0
    assert done.stdout.count("left out: ") == 3


def test_without_a_gpu():
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # where there is one
    done = run(**hidden)
    assert done.returncode == 0
    assert done.stdout == "no CUDA device, nothing measured; --device cpu --small runs the same steps\n"
    done = run("--device", "cuda", **hidden)
    assert done.returncode == 1 and "sees 0 CUDA devices" in done.stderr
