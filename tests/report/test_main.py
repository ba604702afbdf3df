"""`python -m datamodels.report path`: the picture of a fit, from its folder."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import ConfigError, RegressionError
from datamodels.regression import RegressionWarning, fit, make_problem, result
from datamodels.report.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.random((60, 8)) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        model = fit(make_problem(x, x @ rng.standard_normal((8, 4)) + rng.standard_normal((60, 4))))
    path = tmp_path_factory.mktemp("report") / "out"
    result.write(path, model, {})
    return path


def test_a_picture_of_a_fit_in_its_folder(out):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "datamodels.report", "path", str(out)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}/regularization_path/path.png\n"
    assert Path(done.stdout.strip()).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG")])
def test_elsewhere_and_in_other_formats(out, tmp_path, name, begins):
    assert main(["path", str(out), f"--report.out={tmp_path / name}", "--report.targets=2"]) == 0
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begins)
    assert os.listdir(tmp_path) == [name]
    if name == "a.svg":
        assert main(["path", str(out), f"--report.out={tmp_path / 'b.svg'}"]) == 0
        assert content != (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("argv", "error", "told"),
    [
        (["line", "{out}"], ConfigError, "expected path, got 'line'"),
        (
            ["path", "{out}", "--report.out=x.txt"],
            ConfigError,
            "x.txt: expected a name that ends in .png, .svg or .pdf",
        ),
        (["path", "{out}", "--report.targets=0"], ConfigError, "report.targets"),
        (["path"], ConfigError, "out_dir"),
        (["path", "nowhere"], RegressionError, "nowhere: no such file"),
    ],
)
def test_what_cannot_be_drawn(out, tmp_path, monkeypatch, argv, error, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=told):
        main([part.format(out=out) for part in argv])
    assert os.listdir(tmp_path) == []
