"""The command line on a small store: what it writes, refuses and says."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from datamodels.errors import ConfigError, RegressionError
from datamodels.regression import Datamodel, RegressionWarning, fit, problem_from_store, result, write_dataset
from datamodels.regression.compute_datamodels import main
from datamodels.store import Store

# The keys and values of the released README's example.
RELEASED = """
data:
    data_path: 'OUT_DIR/reg_data.beton' # a file
    num_train: 90_000
    num_val: 10_000
    seed: 0
    target_start_ind: 0
    target_end_ind: -1 # all
    # nothing more
cfg:
    k: 100
    batch_size: 2000
    lr: 5e-3
    eps: 1e-6
    out_dir: 'OUT_DIR/reg_results'
    num_workers: 8
early_stopping:
    check_every: 3
    eps: 5e-11
"""


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("regression") / "store"
    design = [
        {"role": "train", "count": 200, "seed": 1, "sampler": "bernoulli", "alpha": 0.5},
        {"role": "eval", "masks": 5, "repeats": 2, "seed": 2},
    ]
    schema = {"masks": {"shape": [15], "dtype": "bits"}, "margins": {"shape": [4], "dtype": "float16"}}
    store = Store.create(path, {"schema": schema, "design": design}, sync=False)
    rng = np.random.default_rng(0)
    masks = np.stack([store.design.assignment(row).mask for row in range(210)])
    margins = masks @ rng.standard_normal((15, 4)) + rng.standard_normal((210, 4))
    margins[:, 3] = 0.5
    store.commit_many(range(210), {"masks": masks, "margins": margins.astype("f2")})
    return path


def test_end_to_end_in_a_process_of_its_own(logdir, tmp_path):
    (tmp_path / "config.yml").write_text(RELEASED)
    out = tmp_path / "deep" / "result"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "datamodels.regression.compute_datamodels",
         "-C", tmp_path / "config.yml", f"--data.logdir={logdir}", "--data.num_train=160", "--data.num_val=40",
         f"--cfg.out_dir={out}"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for key in ("cfg.lr", "cfg.batch_size", "early_stopping.check_every", "early_stopping.eps"):
        assert done.stderr.count(f"note: {key} ") == 1
    assert "data.data_path is not read" in done.stderr
    assert "warning: constant targets, weight 0 and the value as bias: 1: margins[3]" in done.stderr
    assert "4 datamodels in" in done.stderr

    state = torch.load(out / "datamodels.pt", weights_only=True)
    assert [tuple(state[name].shape) for name in ("weight", "bias", "lam")] == [(15, 4), (4,), (4,)]
    store = Store.open(logdir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegressionWarning)
        expected = fit(problem_from_store(store, num_train=160, num_val=40), k=100, eps=1e-6)
    np.testing.assert_allclose(state["weight"], expected.weight, atol=1e-6)
    for name in ("weight", "bias", "lam", "gap", "kkt", "nnz", "r2_val", "r2_train"):
        np.testing.assert_array_equal(np.load(out / "final_lambda" / f"{name}.npy"), state[name].numpy())
    for name in ("lam", "val_mse", "nnz"):
        assert np.load(out / "regularization_path" / f"{name}.npy").shape == (100, 4)

    report = json.loads((out / "regression.json").read_text())
    assert report["config"]["num_train"] == 160
    assert report["config"]["k"] == 100
    assert set(report["versions"]) >= {"datamodels", "python", "numpy", "scikit-learn", "torch"}
    assert report["seconds"]["fit"] > 0
    assert sorted(report["rows"]["train"] + report["rows"]["val"]) == list(range(200))
    assert report["summary"]["targets"] == 4
    assert sorted(os.listdir(out)) == ["datamodels.pt", "final_lambda", "regression.json", "regularization_path"]
    assert os.listdir(out.parent) == ["result"]


def test_a_user_who_waits_for_the_compiler_is_told_so(logdir, tmp_path):
    told = []
    for name in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-m", "datamodels.regression.compute_datamodels", f"--data.logdir={logdir}",
             f"--cfg.out_dir={tmp_path / name}"],
            capture_output=True, text=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append("compiling the solver" in done.stderr)
    assert told == [True, False]


def test_shipped_config(logdir, tmp_path, capsys):
    main(["-C", "regression/digits.yaml", f"--data.logdir={logdir}", "--data.num_train=150", "--data.num_val=20",
          f"--cfg.out_dir={tmp_path / 'out'}"])  # fmt: skip
    assert Datamodel.load(tmp_path / "out" / "datamodels.pt").about["num_val"] == 20
    assert "note:" not in capsys.readouterr().err


def test_target_slice_and_bias(logdir, tmp_path):
    main([f"--data.logdir={logdir}", f"--cfg.out_dir={tmp_path / 'out'}", "--data.target_start_ind=1",
          "--data.target_end_ind=3", "--cfg.use_bias=0", "--cfg.k=12", "--early_stopping.patience=2"])  # fmt: skip
    model = Datamodel.load(tmp_path / "out" / "datamodels.pt")
    assert model.targets == ("margins[1]", "margins[2]")
    assert (model.bias == 0).all()
    assert (model.about["k"], model.about["patience"], model.about["use_bias"]) == (12, 2, False)
    assert (model.about["num_train"], model.about["num_val"]) == (160, 40)


@pytest.fixture(scope="module")
def beton(logdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("beton") / "reg_data.beton"
    write_dataset.main([f"--cfg.data_dir={logdir}", f"--cfg.out_path={path}", "--cfg.y_name=margins"])
    return path


def test_the_released_config_reads_a_beton_file(logdir, beton, tmp_path):
    """Every number is the same as from the store."""
    (tmp_path / "config.yml").write_text(RELEASED)
    slices = ["--data.num_train=150", "--data.num_val=40", "--data.target_start_ind=1", "--data.target_end_ind=3"]
    for out, data in (("file", f"--data.data_path={beton}"), ("store", f"--data.logdir={logdir}")):
        main(["-C", str(tmp_path / "config.yml"), data, *slices, f"--cfg.out_dir={tmp_path / out}"])
    files = sorted(path.relative_to(tmp_path / "file") for path in (tmp_path / "file").rglob("*.npy"))
    assert len(files) == 11
    for name in files:
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "store" / name).read_bytes()
    models = [Datamodel.load(tmp_path / out / "datamodels.pt") for out in ("file", "store")]
    assert models[0].targets == models[1].targets == ("margins[1]", "margins[2]")
    assert models[0].columns == models[1].columns
    reports = [json.loads((tmp_path / out / "regression.json").read_text()) for out in ("file", "store")]
    assert reports[0]["rows"] == reports[1]["rows"]
    assert reports[0]["config"]["data_path"] == str(beton)


def test_shards_of_a_beton_file(beton, tmp_path):
    main([f"--data.data_path={beton}", f"--cfg.out_dir={tmp_path / 'whole'}"])
    main([f"--data.data_path={beton}", f"--cfg.out_dir={tmp_path / 'parts'}", "--cfg.shards=2"])
    for name in ("weight", "bias", "lam", "gap"):
        arrays = [np.load(tmp_path / out / "final_lambda" / f"{name}.npy") for out in ("whole", "parts")]
        np.testing.assert_array_equal(*arrays)


def test_where_the_data_come_from(logdir, beton, tmp_path, capsys):
    (tmp_path / "config.yml").write_text(RELEASED)
    with pytest.raises(RegressionError, match=r"reg_data.beton: cannot be read: No such file"):
        main(["-C", str(tmp_path / "config.yml")])
    out = f"--cfg.out_dir={tmp_path / 'out'}"
    with pytest.raises(ConfigError, match=r"data.logdir is missing: the store to read \(or data.data_path"):
        main([out])
    with pytest.raises(ConfigError, match="FFCV reads .beton files and no stores"):
        main([out, f"--data.logdir={logdir}", "--data.engine=ffcv"])
    for option, message in (
        ("x_name=choices", r"was written with x_name masks, and data.x_name asks for choices"),
        ("y_name=loss", r"was written with y_name margins, and data.y_name asks for loss"),
        ("offset_name=loss", r"was written with offset_name none, and data.offset_name asks for loss"),
        ("penalty=choices=0", r"data.penalty: 'choices' is not among the columns; data.x_name has masks"),
    ):
        with pytest.raises(RegressionError, match=message):
            main([out, f"--data.data_path={beton}", f"--data.{option}"])
    assert os.listdir(tmp_path) == ["config.yml"]


def test_a_result_is_never_overwritten(logdir, tmp_path, capsys):
    out = tmp_path / "out"
    args = [f"--data.logdir={logdir}", f"--cfg.out_dir={out}", "--data.target_end_ind=1"]
    main(args)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RegressionError, match="already holds a result"):
        main([*args, "--cfg.k=3"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    (tmp_path / "part" / "final_lambda").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RegressionError, match="already holds a result"):  # before the store is even opened
        main(["--data.logdir=nowhere", f"--cfg.out_dir={out}"])
    for name, message in (("part", r"already holds a result \(final_lambda\)"), ("file", "is a file")):
        with pytest.raises(RegressionError, match=message):
            main([f"--data.logdir={logdir}", f"--cfg.out_dir={tmp_path / name}"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_files_keeps_them(logdir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("mine")
    main([f"--data.logdir={logdir}", f"--cfg.out_dir={tmp_path / 'out'}", "--data.target_end_ind=1"])
    assert (tmp_path / "out" / "log.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*result.RESULTS, "log.txt"])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing_behind(logdir, tmp_path, monkeypatch, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def full(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(Datamodel, "save", full)
    with pytest.raises(OSError, match="disk full"):
        main([f"--data.logdir={logdir}", f"--cfg.out_dir={out}", "--data.target_end_ind=1"])
    assert os.listdir(tmp_path) == (["out"] if there else [])
    assert not there or os.listdir(out) == []


def test_the_result_appears_in_one_step(logdir, tmp_path, monkeypatch):
    seen = []
    rename = os.rename

    def watched(source, target):
        seen.append((os.path.exists(target), sorted(os.listdir(source))))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    main([f"--data.logdir={logdir}", f"--cfg.out_dir={tmp_path / 'out'}", "--data.target_end_ind=1"])
    assert seen == [(False, sorted(result.RESULTS))]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--data.num_train=300", "--data.num_val=20"], RegressionError, r"320 rows .* has 200 complete"),
        (["--data.y_name=loss"], RegressionError, "no key 'loss'"),
        (["--data.target_end_ind=5"], RegressionError, "there are 4 targets"),
        (["--data.target_start_ind=4"], RegressionError, "there are 4 targets"),
        (["--cfg.eps=2"], RegressionError, "eps=2.0"),
        (["--cfg.k=0"], ConfigError, "cfg.k"),
        (["--cfg.use_bias=2"], ConfigError, "use_bias"),
        (["--data.num_val=0"], ConfigError, "num_val"),
        (["--cfg.num_val=3"], ConfigError, "cfg.num_val"),
    ],
)
def test_bad_input_leaves_no_folder(logdir, tmp_path, args, error, message):
    with pytest.raises(error, match=message):
        main([f"--data.logdir={logdir}", f"--cfg.out_dir={tmp_path / 'out'}", *args])
    assert os.listdir(tmp_path) == []
