"""The demo, small: it runs to its end, and killed half way and run again it ends with the same datamodel."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CALL = "from pathlib import Path; from examples.digits.run import main; " \
       "raise SystemExit(main(Path({spec!r}), Path({out!r}), (40, 120), {options!r}))"  # fmt: skip


def demo(folder, out, *options):
    spec = json.loads((ROOT / "specs/digits.json").read_text())
    spec["design"][0]["masks"], spec["design"][1] = 120, {"role": "eval", "masks": 6, "repeats": 2, "seed": 1}
    (folder / "spec.json").write_text(json.dumps(spec))
    code = CALL.format(spec=str(folder / "spec.json"), out=str(out), options=options)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def finished(process, seconds=240):
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder / "out", finished(demo(folder, folder / "out", "--pool.workers=2"))


def test_it_ends_with_a_table_and_pictures(whole):
    out, text = whole
    assert "ceiling" in text and "40 " in text and "120 " in text
    for picture in ("influential.png", "lds.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "datamodels/datamodels.pt").exists()


def test_run_again_it_does_nothing_twice(whole, tmp_path):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    text = finished(demo(tmp_path, out))
    assert "all 132 rows are complete" in text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before


def test_killed_half_way_it_goes_on_and_ends_the_same(whole, tmp_path):
    out = tmp_path / "out"
    # One worker and batches of 8, so that half way exists and rows are grouped otherwise than in the whole run.
    process = demo(tmp_path, out, "--pool.workers=1", "--worker.batch=8")
    completed = out / "store/_completed.npy"
    deadline = time.monotonic() + 120
    while not (completed.exists() and (out / "store/spec.json").exists() and np.load(completed).sum() >= 8):
        assert process.poll() is None and time.monotonic() < deadline, "it never got half way"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # the pool is dead, and its worker is told so by the kernel
    half = int(np.load(completed).sum())
    assert 8 <= half < 132, "it was killed too late to be half way"

    text = finished(demo(tmp_path, out, "--pool.workers=2"))
    assert "all 132 rows are complete" in text
    from datamodels.regression import Datamodel

    one, two = (Datamodel.load(folder / "datamodels/datamodels.pt") for folder in (whole[0], out))
    np.testing.assert_allclose(np.load(out / "store/margins.npy"), np.load(whole[0] / "store/margins.npy"), atol=1e-3)
    np.testing.assert_array_equal(np.load(out / "store/masks.npy"), np.load(whole[0] / "store/masks.npy"))
    np.testing.assert_allclose(one.weight, two.weight, atol=2e-3)
    np.testing.assert_allclose(one.bias, two.bias, atol=2e-3)
