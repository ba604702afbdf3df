"""Merging shards: the result of a whole fit, refusals by name, whole or not at all."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import ConfigError, RegressionError
from datamodels.regression import Datamodel, merge, result
from datamodels.regression.merge import main
from datamodels.store import Store
from tests.regression.shards import assert_same_result, begin, compute, files, fill, make_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("merge") / "store")


@pytest.fixture
def out(logdir, tmp_path, monkeypatch):
    """Where three shards of a fit are done and not merged."""
    begin(monkeypatch, logdir, tmp_path / "out", 3)
    fill(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("shards", [1, 2, 7, 10])
def test_any_number_of_shards_has_the_result_of_one_fit(logdir, tmp_path, monkeypatch, shards):
    compute(logdir, tmp_path / "whole")
    begin(monkeypatch, logdir, tmp_path / "out", shards)
    fill(tmp_path / "out")
    assert main([str(tmp_path / "out")]) == 0
    assert_same_result(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("shards", [2, 9])
def test_fewer_rows_than_columns(tmp_path, monkeypatch, shards):
    logdir = make_store(tmp_path / "store", rows=40, p=60)
    compute(logdir, tmp_path / "whole")
    begin(monkeypatch, logdir, tmp_path / "out", shards)
    fill(tmp_path / "out")
    main([str(tmp_path / "out")])
    assert_same_result(tmp_path / "whole", tmp_path / "out")


def test_a_slice_of_the_targets_with_options(logdir, tmp_path, monkeypatch):
    options = ["--data.target_start_ind=2", "--data.target_end_ind=9", "--data.num_val=30", "--data.seed=5",
               "--cfg.k=7", "--cfg.use_bias=0", "--early_stopping.patience=1"]  # fmt: skip
    compute(logdir, tmp_path / "whole", *options)
    begin(monkeypatch, logdir, tmp_path / "out", 3, *options)
    fill(tmp_path / "out")
    main([str(tmp_path / "out")])
    assert_same_result(tmp_path / "whole", tmp_path / "out")
    model = Datamodel.load(tmp_path / "out")
    assert model.targets == tuple(f"margins[{t}]" for t in range(2, 9))
    assert model.path.lam.shape == (7, 7)


def test_in_a_process_of_its_own_and_again(out):
    command = [sys.executable, "-W", "error", "-m", "datamodels.regression.merge", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 shards merged: 10 datamodels in" in done.stderr
    assert "warning: constant targets, weight 0 and the value as bias: 1: margins[9]" in done.stderr
    before = files(out)
    assert {"datamodels.pt", "regression.json", "regularization_path/path.png", "final_lambda/bias.npy"} <= set(before)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, f"{out}: these 3 shards are merged already\n")
    assert files(out) == before


# ------------------------------------------------------------------ refusals


def refused(out, told):
    """Merging is refused, and leaves the folder as it was."""
    before = files(out)
    with pytest.raises(RegressionError, match=told):
        main([str(out)])
    assert files(out) == before
    assert sorted(os.listdir(out.parent)) == ["out"]


def test_missing_shards_are_listed_with_the_command_that_fills_them(logdir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 10)
    fill(out, [4])
    told = r"9 of 10 shards are missing \(0, 1, 2, 3, 5, 6, 7, 8 and 1 more\); fill them: python -m datamodels.pool "
    refused(out, told + rf"--worker.logdir={out}/shards")


def test_weights_that_are_not_what_was_committed(out):
    files_of_shard = out / "shards/workers/1/result"
    model = Datamodel.load(files_of_shard)
    model.weight[3, 0] += 1e-6
    model.save(files_of_shard / "datamodels.pt")
    refused(out, r"shard 1: .*result is not what it committed; fit it again with .*--worker.index=1 --worker.do_if_")


@pytest.mark.parametrize("name", ["val_mse", "lam", "nnz"])
def test_a_path_that_is_not_what_was_committed(out, name):
    file = out / f"shards/workers/2/result/regularization_path/{name}.npy"
    values = np.load(file)
    values[0, 0] = 7
    np.save(file, values)
    refused(out, "shard 2: .*is not what it committed")


@pytest.mark.parametrize("name", ["", "datamodels.pt", "regression.json", "regularization_path/lam.npy"])
def test_a_shard_whose_files_are_gone(out, name):
    result.remove(out / "shards/workers/0/result" / name)
    refused(out, "shard 0: .*fit it again with")


def test_the_command_that_is_named_mends_the_shard(out, tmp_path, logdir):
    result.remove(out / "shards/workers/0/result")
    try:
        main([str(out)])
    except RegressionError as error:
        command = str(error).partition("fit it again with python")[2].split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    main([str(out)])
    compute(logdir, tmp_path / "whole")
    assert_same_result(tmp_path / "whole", out)


def test_a_shard_of_another_plan(logdir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    fill(out, [0])
    fill(out, [1], plan="0" * 32)
    refused(out, "shard 1 belongs to another plan")


def test_a_shard_of_other_targets(logdir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    fill(out, [0])
    fill(out, [1], targets=[5, 9])
    refused(out, "shard 1 belongs to another plan")


def test_a_plan_that_was_changed_afterwards(out):
    plan = json.loads((out / "shards/plan.json").read_text())
    plan["options"]["k"] = 20
    (out / "shards/plan.json").write_text(json.dumps(plan))
    refused(out, "shard 0 belongs to another plan")
    plan["bounds"] = plan["bounds"][:2]
    (out / "shards/plan.json").write_text(json.dumps(plan))
    refused(out, "3 rows, and a plan of 2 shards")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: {"about": model.about | {"solver": "another"}}, "solver is .* there and another here"),
        (lambda model: {"about": model.about | {"extra": 1}}, "extra is None there and 1 here"),
        (lambda model: {"columns": ("another", *model.columns[1:])}, "it has other columns"),
    ],
)
def test_shards_that_disagree(logdir, tmp_path, monkeypatch, change, told):
    """As shards do that were fitted on machines with different solvers."""
    from dataclasses import replace

    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    fill(out, [0])
    fill(out, [1])
    files_of_shard = out / "shards/workers/1/result"
    model = Datamodel.load(files_of_shard)
    model = replace(model, **change(model))
    model.save(files_of_shard / "datamodels.pt")
    with Store.open(out / "shards", sync=False) as store:
        keys = {key: store.rows(key, [1]) for key in store.spec.schema}
        store.commit_many([1], keys | {"digest": np.array([result.digest(model)])}, replace=True)
    refused(out, f"shard 1 disagrees with shard 0: {told}")


def test_versions_that_differ_are_a_warning(out, capsys):
    file = out / "shards/workers/1/result/regression.json"
    report = json.loads(file.read_text())
    report["versions"]["numpy"] = "1.0"
    file.write_text(json.dumps(report))
    main([str(out)])
    told = f"shards were fitted with different versions of numpy: 1.0, {np.__version__}"
    assert f"warning: {told}" in capsys.readouterr().err
    report = json.loads((out / "regression.json").read_text())
    assert told in report["warnings"]
    assert [part["versions"]["numpy"] for part in report["shards"]] == [np.__version__, "1.0", np.__version__]


def test_a_damaged_row_of_the_shards_store(out):
    with open(out / "shards" / "digest.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(Exception, match="row 2, 'digest'"):
        main([str(out)])
    assert set(files(out)) == set()


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(RegressionError, match=r"holds no plan.json; a fit in shards begins with"):
        main([str(tmp_path)])
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match="out_dir"):
        main([])


# ------------------------------------------------------------------ whole or not at all


def test_another_result_there_is_left_alone(out, logdir, tmp_path):
    compute(logdir, tmp_path / "other", "--cfg.k=5")
    for name in result.RESULTS:
        (tmp_path / "other" / name).rename(out / name)
    (tmp_path / "other").rmdir()
    refused(out, "already holds a result")


def test_more_shards_of_other_numbers_are_not_taken_for_merged(out):
    main([str(out)])
    report = json.loads((out / "regression.json").read_text())
    report["shards"][1]["digest"] = "0" * 32
    (out / "regression.json").write_text(json.dumps(report))
    refused(out, "already holds a result")


def test_a_second_merge_at_the_same_time_is_refused(out):
    with open(out / "shards" / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(out, "another process is at work on it")
    assert main([str(out)]) == 0


KILLED = """
import os, signal, sys
from datamodels.regression import merge
calls, rename = 0, os.rename
def dying(source, target):
    global calls
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    rename(source, target)
os.rename = dying
merge.main([sys.argv[1]])
"""


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_merge_that_is_killed_is_done_anew(out, logdir, tmp_path, after):
    """After each of the steps by which a result appears."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(after)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "datamodels.pt").exists()
    assert [name for name in result.RESULTS if (out / name).exists()] == list(result.RESULTS[:after])
    assert main([str(out)]) == 0
    compute(logdir, tmp_path / "whole")
    assert_same_result(tmp_path / "whole", out)
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert sorted(os.listdir(out)) == sorted([*result.RESULTS, "shards"])


def test_a_full_disk_leaves_nothing(out, monkeypatch):
    def full(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(Datamodel, "save", full)
    with pytest.raises(OSError, match="disk full"):
        main([str(out)])
    assert os.listdir(out) == ["shards"] and os.listdir(out.parent) == ["out"]


def test_many_warnings_are_counted_on_the_terminal(out, monkeypatch, capsys):
    file = out / "shards/workers/1/result/regression.json"
    report = json.loads(file.read_text())
    report["warnings"] = [f"one of many: {i}" for i in range(20)]
    file.write_text(json.dumps(report))
    main([str(out)])
    said = capsys.readouterr().err
    assert said.count("warning: ") == merge.MOST_WARNINGS + 1
    total = len(json.loads((out / "regression.json").read_text())["warnings"])
    assert total > 20 and f"warning: and {total - merge.MOST_WARNINGS} more, in {out}/regression.json" in said


# ------------------------------------------------------------------ other sources


def test_shards_of_a_beton_file(logdir, tmp_path, monkeypatch):
    from datamodels.regression import write_dataset

    path = tmp_path / "data.beton"
    written = [f"--cfg.data_dir={logdir}", f"--cfg.out_path={path}", "--cfg.y_name=margins"]
    write_dataset.main([*written, "--cfg.x_name=masks"])
    monkeypatch.chdir(tmp_path)
    options = ["--data.data_path=data.beton", "--data.penalty=masks=0.5"]
    assert compute(None, tmp_path / "whole", *options)[0] == 0
    begin(monkeypatch, None, tmp_path / "out", 3, *options)
    monkeypatch.chdir(ROOT)  # a worker may run elsewhere
    fill(tmp_path / "out")
    main([str(tmp_path / "out")])
    assert_same_result(tmp_path / "whole", tmp_path / "out")

    begin(monkeypatch, None, tmp_path / "changed", 3, f"--data.data_path={path}")
    path.unlink()
    write_dataset.main([*written, "--cfg.x_name=margins"])
    with pytest.raises(RegressionError, match="changed: the columns"):
        fill(tmp_path / "changed")
