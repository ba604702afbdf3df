"""The command that writes a .beton file: what it holds, what is refused, and what a killed one leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from datamodels.errors import ConfigError, RegressionError, StoreError
from datamodels.regression import beton, compute_datamodels, ffcv_engine, problem_from_store
from datamodels.regression.beton import Beton, Layout
from datamodels.regression.problem import problem_from_beton
from datamodels.regression.write_dataset import main, write_dataset
from datamodels.store import Store
from tests import needs

P, T = 30, 4
LIMIT = 300  # seconds; alone they take ten
DESIGN = [
    {"role": "train", "masks": 40, "repeats": 2, "seed": 1, "sampler": "bernoulli", "choices": {"lr": [0.1, 0.5, 1.0]}},
    {"role": "eval", "masks": 5, "repeats": 2, "seed": 2, "sampler": "bernoulli", "alpha": 0.5},
]
SCHEMA = {
    "masks": {"shape": [P], "dtype": "bits"},
    "margins": {"shape": [T], "dtype": "float16", "allow_nonfinite": True},
    "exact": {"shape": [T], "dtype": "float64"},
    "base": {"shape": [T], "dtype": "float32"},
    "loss": {"shape": [], "dtype": "float32"},
    "steps": {"shape": [], "dtype": "int64"},
    "good": {"shape": [], "dtype": "bool"},
    "half": {"shape": [2], "dtype": "float16"},
}


def make_store(path, done=None, **changes):
    store = Store.create(path, {"schema": SCHEMA, "design": DESIGN}, sync=False)
    n = store.num_models
    rng = np.random.default_rng(0)
    masks = np.stack([store.design.assignment(row).mask for row in range(n)])
    exact = masks @ rng.standard_normal((P, T)) + 0.3 * rng.standard_normal((n, T))
    values = {
        "margins": exact.astype("f2"),
        "exact": exact,
        "base": rng.standard_normal((n, T)).astype("f4"),
        "loss": exact[:, 0].astype("f4"),
        "steps": rng.integers(0, 2**40, n),
        "good": np.arange(n) % 3 > 0,
        "half": rng.standard_normal((n, 2)).astype("f2"),
    } | changes
    rows = np.arange(n) if done is None else np.asarray(done)
    store.commit_many(rows, {key: value[rows] for key, value in values.items()})
    return store


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("w") / "store").path


def command(*args):
    """In a process of its own, with a hard limit."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "datamodels.regression.write_dataset", *map(str, args)],
        capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stderr


def same(problem, other):
    for name in ("x", "train", "val", "rows"):
        np.testing.assert_array_equal(getattr(problem, name), getattr(other, name))
    every = slice(None), slice(None)
    np.testing.assert_array_equal(problem.outcomes(*every), other.outcomes(*every))
    np.testing.assert_array_equal(problem.penalty_of(slice(None)), other.penalty_of(slice(None)))
    assert (problem.x.dtype, problem.columns, problem.targets) == (other.x.dtype, other.columns, other.targets)


@pytest.mark.parametrize(
    "names",
    [
        {"y_name": "margins"},
        {"y_name": "exact", "x_name": ["masks", "choices"], "penalty": {"choices": 0}},
        {"y_name": "loss", "x_name": ["choices", "half", "steps"], "penalty": {"half": 2}},
        {"y_name": "margins", "offset_name": "base"},
        {"y_name": "steps"},
    ],
)
def test_a_file_is_the_same_problem_as_its_store(logdir, tmp_path, names):
    write_dataset(tmp_path / "a.beton", data_dir=logdir, **names)
    with Store.open(logdir) as store, Beton(tmp_path / "a.beton") as file:
        for chosen in ({}, {"num_train": 100, "num_val": 50, "seed": 3}):
            same(problem_from_beton(file, **chosen), problem_from_store(store, **names, **chosen))
        assert file.rows.tolist() == list(range(240))
        if names["y_name"] in ("margins", "exact"):
            slices = {"target_start": 1, "target_end": 3}
            same(problem_from_beton(file, **slices), problem_from_store(store, **names, **slices))
            with pytest.raises(RegressionError, match="there are 4 targets"):
                problem_from_beton(file, target_end=5)
        with pytest.raises(RegressionError, match="but the file .* has 240 complete"):
            problem_from_beton(file, num_train=239, num_val=2)
        other = problem_from_beton(file, penalty={file.side.about["parts"][0]["key"]: 3}).penalty
        assert other[0] == 3


def test_outcomes_are_float32_where_that_is_exact(logdir, tmp_path):
    for name, dtype in (("margins", "f4"), ("exact", "f8"), ("loss", "f4"), ("steps", "f8"), ("good", "f4")):
        write_dataset(tmp_path / name, data_dir=logdir, y_name=name)
        with Beton(tmp_path / name) as file:
            assert file.y_dtype == dtype
    write_dataset(tmp_path / "o", data_dir=logdir, y_name="loss", offset_name="loss")
    with Beton(tmp_path / "o") as file:
        assert file.y_dtype == "f8"
        assert (file.read(0, 240)[1] == 0).all()


def test_both_engines_write_and_read_the_same(logdir, tmp_path):
    """Files of both, read by both, and the store: five fits, one answer, to the bit."""
    needs.ffcv()
    chosen = ["x_name=masks,choices", "y_name=margins", "penalty=choices=0", "offset_name=base"]
    keys = [f"--cfg.{key}" for key in chosen]
    fits = {"store": [f"--data.logdir={logdir}", *(f"--data.{key}" for key in chosen)]}
    for engine in ("numpy", "ffcv"):
        out = tmp_path / f"{engine}.beton"
        code, said = command(f"--cfg.data_dir={logdir}", f"--cfg.out_path={out}", *keys, f"--cfg.engine={engine}")
        assert (code, said.count("\n")) == (0, 1), said
        assert said.startswith("240 rows of 33 columns and 4 targets in ")
        for reader in ("numpy", "ffcv"):
            fits[f"{engine} {reader}"] = [f"--data.data_path={out}", f"--data.engine={reader}"]
    apart = []
    for name, source in fits.items():
        args = [*source, "--data.target_start_ind=1", f"--cfg.out_dir={tmp_path / name}", "--cfg.k=10",
                "--data.num_train=150", "--data.num_val=50"]  # fmt: skip
        if "--data.engine=ffcv" in args:
            apart.append(args)
        else:
            compute_datamodels.main(args)
    code = "import json, sys; from datamodels.regression.compute_datamodels import main\n"
    code += "for args in json.loads(sys.argv[1]): main(args)"
    subprocess.run([sys.executable, "-W", "error", "-c", code, json.dumps(apart)], timeout=LIMIT, check=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*fits, "numpy.beton", "ffcv.beton"])
    files = [path.relative_to(tmp_path / "store") for path in (tmp_path / "store").rglob("*.npy")]
    assert len(files) == 11
    for name in fits:
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "store" / file).read_bytes(), (name, file)
        report = json.loads((tmp_path / name / "regression.json").read_text())
        assert report["rows"] == json.loads((tmp_path / "store" / "regression.json").read_text())["rows"]


def test_only_complete_training_rows_are_written(tmp_path):
    make_store(tmp_path / "s", done=[*range(10, 50), 241, 242])
    write_dataset(tmp_path / "a", data_dir=tmp_path / "s", y_name="margins")
    with Beton(tmp_path / "a") as file:
        assert file.rows.tolist() == list(range(10, 50))
    write_dataset(tmp_path / "b", data_dir=tmp_path / "s", y_name="margins", completed_name="good")
    with Beton(tmp_path / "b") as file:
        assert file.rows.tolist() == [row for row in range(10, 50) if row % 3]
    for name in ("loss", "nothing", "half"):
        with pytest.raises(RegressionError, match=f"cfg.completed_name={name}: expected _completed or a key"):
            write_dataset(tmp_path / "c", data_dir=tmp_path / "s", y_name="margins", completed_name=name)
    with pytest.raises(RegressionError, match="cfg.ignore_completed: 200 training rows .* are not complete"):
        write_dataset(tmp_path / "c", data_dir=tmp_path / "s", y_name="margins", ignore_completed=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "s"]


def test_a_slice_of_one_outcome(logdir, tmp_path):
    write_dataset(tmp_path / "a", data_dir=logdir, y_name="margins", y_slice=2, offset_name="base")
    with Store.open(logdir) as store, Beton(tmp_path / "a") as file:
        same(problem_from_beton(file), problem_from_store(store, offset_name="base", target_start=2, target_end=3))
        assert file.targets == 1
    for y_slice in (4, 99, -2):
        with pytest.raises(RegressionError, match=f"cfg.y_slice={y_slice}: 'margins' has 4 outcomes; expected 0 to 3"):
            write_dataset(tmp_path / "b", data_dir=logdir, y_name="margins", y_slice=y_slice)


# -- a folder as the released code leaves it ------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "released"
    path.mkdir()
    distinct = rng.random((30, P)) < 0.5
    arrays = {
        "masks": distinct[np.arange(60) % 30],
        "margins": rng.standard_normal((60, T)).astype("f2"),
        "loss": rng.standard_normal(60).astype("f4"),
        "_completed": np.arange(60) % 7 > 0,
        "other": np.arange(60) < 20,
    }
    for name, values in arrays.items():
        np.save(path / f"{name}.npy", values)
    return path


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], [row for row in range(60) if row % 7]),
        (["--cfg.completed_name=other"], range(20)),
        (["--cfg.ignore_completed"], range(60)),
        (["--cfg.ignore_completed", "--cfg.completed_name=nothing"], range(60)),
    ],
)
def test_the_released_folder(folder, tmp_path, options, rows):
    """What the released code would have written, in its order, with its row numbers."""
    main(["--cfg.data_dir", str(folder), "--cfg.out_path", str(tmp_path / "a"), "--cfg.y_name", "margins",
          "--cfg.x_name", "masks", *options])  # fmt: skip
    rows = list(rows)
    with Beton(tmp_path / "a") as file:
        x, y = file.read(0, file.samples)
        np.testing.assert_array_equal(x, np.load(folder / "masks.npy")[rows])
        np.testing.assert_array_equal(y, np.load(folder / "margins.npy")[rows].astype("float32"))
        assert y.dtype == "float32"
        assert file.rows.tolist() == rows
        if len(rows) > 30:
            problem = problem_from_beton(file, num_val=10)
            assert not set(problem.rows[problem.train] % 30) & set(problem.rows[problem.val] % 30)


def test_the_released_folder_with_numbers(folder, tmp_path):
    write_dataset(tmp_path / "a", data_dir=folder, y_name="margins", x_name=["masks", "loss"], penalty={"loss": 0},
                  offset_name="margins")  # fmt: skip
    with Beton(tmp_path / "a") as file:
        problem = problem_from_beton(file)
    assert problem.columns[P - 1 :] == ("masks[29]", "loss")
    assert problem.targets == ("margins[0]", "margins[1]", "margins[2]", "margins[3]")
    assert problem.x.dtype == "f4"
    np.testing.assert_array_equal(problem.x[:, P], np.load(folder / "loss.npy")[problem.rows])
    np.testing.assert_array_equal(problem.penalty, [1] * P + [0])
    assert (problem.y == 0).all()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        ({}, {"y_name": "margin"}, r"has no margin.npy \(cfg.y_name\); it has _completed, loss, margins, masks, other"),
        ({}, {"x_name": ["choices"]}, r"has no choices.npy \(cfg.x_name\)"),
        ({}, {"completed_name": "done"}, r"has no done.npy \(cfg.completed_name\)"),
        ({}, {"completed_name": "margins"}, r"margins.npy \(cfg.completed_name\): expected a flag per row, got float"),
        ({"masks": np.ones((59, P), bool)}, {}, "different numbers of rows .masks 59, margins 60, _completed 60"),
        ({"masks": np.ones((60, 2, 2), bool)}, {}, r"masks.npy \(cfg.x_name\): expected a number or a vector of"),
        ({"masks": np.full((60, 2), "a")}, {}, "got <U1 of shape"),
        ({"margins": np.array([None] * 60)}, {}, r"margins.npy \(cfg.y_name\): is no array of numbers, or cut short"),
        ({"_completed": np.zeros(60, bool)}, {}, "no rows to write"),
        ({"masks": np.ones((60, P), "f2")}, {}, "columns of dtype float16: FFCV hangs on it"),
        ({"masks": np.ones((60, 0), bool)}, {}, "0 columns"),
    ],
)
def test_a_folder_that_cannot_be_used(folder, tmp_path, damage, options, message):
    for name, values in damage.items():
        np.save(folder / f"{name}.npy", values)
    with pytest.raises(RegressionError, match=message):
        write_dataset(tmp_path / "a", **{"data_dir": folder, "y_name": "margins"} | options)
    assert os.listdir(tmp_path) == ["released"]


def test_a_folder_with_an_array_that_was_cut_short(folder, tmp_path):
    os.truncate(folder / "margins.npy", 200)
    with pytest.raises(RegressionError, match=r"margins.npy \(cfg.y_name\): is no array of numbers, or cut short"):
        write_dataset(tmp_path / "a", data_dir=folder, y_name="margins")


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--cfg.x_name=half"], RegressionError, "columns of dtype float16: FFCV hangs on it; .*data.logdir"),
        (["--cfg.x_name=masks,mask"], RegressionError, r"no key 'mask' \(cfg.x_name\); it has masks, .*choices"),
        (["--cfg.y_name=nothing"], RegressionError, r"no key 'nothing' \(cfg.y_name\)"),
        (["--cfg.penalty=choices=0"], RegressionError, "cfg.penalty: 'choices' is not among the columns"),
        (["--cfg.data_dir=nowhere"], RegressionError, "cfg.data_dir=nowhere: there is no such folder"),
        (["--cfg.y_slice=-7"], ConfigError, "y_slice"),
        (["--cfg.engine=torch"], ConfigError, "one of numpy, ffcv"),
        (["--cfg.xname=masks"], ConfigError, "did you mean --cfg.x_name"),
    ],
)
def test_refused_before_anything_is_written(logdir, tmp_path, options, error, message):
    out = tmp_path / "deep" / "a"
    with pytest.raises(error, match=message):
        main([f"--cfg.data_dir={logdir}", f"--cfg.out_path={out}", "--cfg.y_name=margins", *options])
    assert os.listdir(tmp_path) == []


def test_no_complete_row(tmp_path):
    make_store(tmp_path / "s", done=[241])
    with pytest.raises(RegressionError, match="no rows to write; .* at least one complete training row"):
        write_dataset(tmp_path / "a", data_dir=tmp_path / "s", y_name="margins")


def test_a_damaged_row_is_named_and_leaves_no_file(tmp_path):
    store = make_store(tmp_path / "s")
    with open(store.path / "margins.npy", "r+b") as file:
        file.seek(-8 * 50, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(StoreError, match="row 200, 'margins': .*checksum"):
        write_dataset(tmp_path / "a", data_dir=store.path, y_name="margins")
    assert os.listdir(tmp_path) == ["s"]


def test_values_that_are_not_finite(tmp_path, capsys):
    margins = np.zeros((250, T), "f2")
    margins[7, 2], margins[9, 0], margins[245, 1] = np.nan, np.inf, np.nan  # the last is of an evaluation row
    store = make_store(tmp_path / "s", margins=margins)
    write_dataset(tmp_path / "a", data_dir=store.path, y_name="margins")
    said = capsys.readouterr().err
    assert "warning: 2 outcomes are not finite, the first: row 7, target 'margins[2]': nan" in said
    with Beton(tmp_path / "a") as file:
        with pytest.raises(RegressionError, match=r"row 7, target 'margins\[2\]': nan is not finite"):
            problem_from_beton(file, target_start=1)
        assert problem_from_beton(file, target_start=1, target_end=2).y.shape == (240, 1)
    with pytest.raises(RegressionError, match=r"row 7, column 'margins\[2\]': nan is not finite"):
        write_dataset(tmp_path / "b", data_dir=store.path, y_name="loss", x_name=["masks", "margins", "exact"])
    assert sorted(os.listdir(tmp_path)) == ["a", "s"]


def test_help_says_it_all(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for word in ("--cfg.x_name=A,B", "default masks", "default -1", "_completed", "one of numpy, ffcv", "whole or not"):
        assert word in text


# -- killed, and FFCV failing -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A released folder that takes seconds to write."""
    path = tmp_path_factory.mktemp("large")
    n = 200_000
    np.save(path / "masks.npy", np.zeros((n, 300), bool))
    np.save(path / "margins.npy", np.zeros((n, 10), "f4"))
    return path


def start(large, out, engine):
    if engine == "ffcv":
        needs.ffcv()
    return subprocess.Popen(
        [sys.executable, "-m", "datamodels.regression.write_dataset", f"--cfg.data_dir={large}", "--cfg.y_name=margins",
         f"--cfg.out_path={out}", "--cfg.ignore_completed", f"--cfg.engine={engine}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def below(pid):
    """Process ids of all descendants, and how they were started."""
    found = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            for child in map(int, file.read().split()):
                with contextlib.suppress(OSError):
                    with open(f"/proc/{child}/cmdline", "rb") as words:
                        found[child] = words.read().replace(b"\0", b" ").decode()
                    found |= below(child)
    return found


def until(condition, limit=60):
    end = time.monotonic() + limit
    while not (got := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return got


def writers(pid):
    """FFCV's workers, once they are at it: children of our child, less the tracker of shared memory."""
    return [child for child, words in below(pid).items() if "ffcv_engine" in words][1:]


@pytest.mark.parametrize("engine", ["numpy", "ffcv"])
def test_killed_in_the_middle_it_leaves_nothing(large, tmp_path, engine):
    process = start(large, tmp_path / "a.beton", engine)
    if engine == "numpy":
        until(lambda: any(link.endswith("(deleted)") and str(tmp_path) in link for link in _open_files(process.pid)))
    else:
        until(lambda: writers(process.pid))
    others = below(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in others))
    assert os.listdir(tmp_path) == []


def _open_files(pid):
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links


def test_a_writer_of_ffcv_that_dies_is_an_error(large, tmp_path):
    process = start(large, tmp_path / "a.beton", "ffcv")
    until(lambda: writers(process.pid))
    others = below(process.pid)
    os.kill(writers(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in others))  # one that waits for the dead one too
    assert "error: FFCV's writer failed (a process of it ended by signal 9); use --cfg.engine=numpy" in said
    assert os.listdir(tmp_path) == []


def test_a_process_of_ffcv_that_is_killed_with_its_watch_is_an_error(large, tmp_path):
    process = start(large, tmp_path / "a.beton", "ffcv")
    until(lambda: writers(process.pid))
    others = below(process.pid)
    os.kill(next(iter(others)), signal.SIGKILL)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "error: FFCV's writer failed (its process ended by signal 9); use --cfg.engine=numpy" in said
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in others))
    assert os.listdir(tmp_path) == []


def test_an_error_inside_ffcvs_writer_is_told(tmp_path):
    store = make_store(tmp_path / "s")
    with open(store.path / "margins.npy", "r+b") as file:
        file.seek(-8 * 50, os.SEEK_END)
        file.write(b"\x01")
    needs.ffcv()
    code, said = command(f"--cfg.data_dir={store.path}", f"--cfg.out_path={tmp_path / 'a'}", "--cfg.y_name=margins",
                         "--cfg.engine=ffcv")  # fmt: skip
    assert code == 1
    assert "error: FFCV's writer failed (datamodels.errors.StoreError: " in said
    assert "row 200, 'margins'" in said
    assert os.listdir(tmp_path) == ["s"]


@pytest.fixture(scope="module")
def small(logdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a.beton"
    write_dataset(path, data_dir=logdir, y_name="margins")
    return path


def test_ffcv_that_does_not_move_is_an_error(small):
    """Its compiler alone takes longer than this patience."""
    needs.ffcv()
    code = (
        "import sys; from datamodels.regression import ffcv_engine; from datamodels.regression.beton import Beton\n"
        "file = Beton(sys.argv[1]); ffcv_engine.read(file, 240, lambda *rows: None, patience=0.01)"
    )
    done = subprocess.run([sys.executable, "-c", code, small], capture_output=True, text=True, timeout=LIMIT)
    assert "FFCV's loader failed after 0 of 240 rows (TimeoutError: no rows for 0 s); use --data.eng" in done.stderr


def test_an_error_inside_ffcvs_loader_is_told(tmp_path):
    """float16 targets, which FFCV's own writer accepts: its loader's thread dies of them, and alone it would wait."""
    needs.ffcv()
    path = tmp_path / "a.beton"
    layout = Layout(9, P, T, np.dtype(bool), np.dtype("int16"))
    rows = np.ones((9, P), bool), np.ones((9, T), "int16")
    beton.write(path, layout, np.arange(9), [rows], lambda: beton.Side({}, np.arange(9)))
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"<i2") : raw.index(b"<i2") + 3] = b"<f2"
    raw[raw.index(b"DMSIDE1")] = 0  # a file of FFCV's has no checksums
    path.write_bytes(raw)
    code = (
        "import sys; from datamodels.regression import ffcv_engine; from datamodels.regression.beton import Beton\n"
        "ffcv_engine.read(Beton(sys.argv[1]), 9, lambda *rows: None)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=LIMIT)
    assert "FFCV's loader failed after 0 of 9 rows (NotImplementedError: float16); use --data.engine" in done.stderr


def test_without_ffcv_its_engine_says_how_to_get_it(logdir, small, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RegressionError, match="cfg.engine=ffcv: FFCV is not installed; run make ffcv, or use --cfg"):
        write_dataset(tmp_path / "a", data_dir=logdir, y_name="margins", engine="ffcv")
    with pytest.raises(RegressionError, match="data.engine=ffcv: FFCV is not installed"), Beton(small) as file:
        problem_from_beton(file, engine="ffcv")
    assert ffcv_engine.PATIENCE > 60
