"""Fits in shards: a real pool, real deaths, and what a plan refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import ConfigError, RegressionError
from datamodels.regression import Datamodel, make_problem, shard
from datamodels.regression.shard import Plan
from datamodels.store import Store
from tests.regression.shards import assert_same_result, begin, compute, files, fill, make_store, outcomes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("shards") / "store")


@pytest.fixture(scope="module")
def whole(logdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    compute(logdir, out)
    return out


def start(logdir, out, *options):
    """compute_datamodels in a process of its own, in three shards unless the options say otherwise."""
    return subprocess.Popen(
        [sys.executable, "-m", "datamodels.regression.compute_datamodels", f"--data.logdir={logdir}",
         f"--cfg.out_dir={out}", "--cfg.shards=3", *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(pid):
    """Children of a process that are workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"datamodels.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def records(out):
    with Store.open(out / "shards") as store:
        return store.completed(), store.layout.row_records()


def in_hand(out):
    """Whether a shard is done and another one has been begun."""
    if not (out / "shards" / "spec.json").exists():
        return False
    completed, rows = records(out)
    return completed.any() and (rows["attempts"][~completed] > 0).any()


# ------------------------------------------------------------------ one command


def test_one_command_fits_all_shards_and_leaves_what_a_whole_fit_does(logdir, whole, tmp_path):
    out = tmp_path / "deep" / "out"
    process = start(logdir, out, "--pool.workers=2")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert_same_result(whole, out)
    assert set(files(out)) == set(files(whole))
    assert "3 shards of 10 targets, 0 of them done; others may help:" in stderr
    command = stderr.partition("others may help: python -m ")[2].splitlines()[0].split()
    assert command[:2] == ["datamodels.pool", f"--worker.logdir={out}/shards"]
    helping = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert (helping.returncode, helping.stdout) == (0, "all 3 rows are complete\n")
    assert "3 shards merged: 10 datamodels in" in stderr
    assert stderr.count("warning: constant targets") == 1

    report, one = (json.loads((folder / "regression.json").read_text()) for folder in (out, whole))
    assert report["rows"] == one["rows"] and report["about"] == one["about"]
    assert report["summary"].pop("ended") == one["summary"].pop("ended")
    assert report["summary"] == pytest.approx(one["summary"])
    config = one["config"] | {"out_dir": str(out), "shards": 3, "logdir": str(logdir)}
    assert {name: report["config"][name] for name in config} == config
    assert [part["targets"] for part in report["shards"]] == [[0, 3], [3, 6], [6, 10]]
    assert report["seconds"]["fit"] == pytest.approx(sum(part["seconds"]["fit"] for part in report["shards"]), abs=1e-6)

    before = files(out)
    again = start(logdir, out)
    assert again.communicate(timeout=120)[1].endswith("these 3 shards are merged already\n")
    assert again.returncode == 0
    assert files(out) == before
    assert records(out)[1]["attempts"].tolist() == [1, 1, 1]


def test_a_worker_that_is_killed_costs_the_shard_in_its_hand(logdir, whole, tmp_path):
    out = tmp_path / "out"
    process = start(logdir, out)
    until(lambda: in_hand(out))
    for worker in workers(process.pid):
        os.kill(worker, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "was killed by SIGKILL" in stderr
    assert sorted(records(out)[1]["attempts"].tolist()) == [1, 1, 2]
    assert_same_result(whole, out)


def test_a_fit_that_is_killed_goes_on_from_the_shards_that_are_done(logdir, whole, tmp_path):
    out = tmp_path / "out"
    process = start(logdir, out)
    until(lambda: in_hand(out))
    victims = [process.pid, *workers(process.pid)]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)
    completed = records(out)[0]
    done = np.flatnonzero(completed).tolist()
    assert 1 <= len(done) < 3
    assert set(files(out)) == set()
    before = {row: files(out / "shards" / "workers" / str(row)) for row in done}
    times = {row: (out / f"shards/workers/{row}/result/datamodels.pt").stat().st_mtime_ns for row in done}

    again = start(logdir, out, "--cfg.num_workers=1")  # how many threads is nobody's affair
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    assert f"3 shards of 10 targets, {len(done)} of them done" in stderr
    assert before == {row: files(out / "shards" / "workers" / str(row)) for row in done}
    assert times == {row: (out / f"shards/workers/{row}/result/datamodels.pt").stat().st_mtime_ns for row in done}
    assert_same_result(whole, out)


def test_ctrl_c_is_told_how_to_go_on(logdir, tmp_path):
    out = tmp_path / "out"
    process = start(logdir, out)
    until(lambda: in_hand(out))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.count("the same command again to go on") == 1
    assert "Traceback" not in stderr
    assert not (out / "datamodels.pt").exists()


def test_shards_that_failed_are_tried_again_when_the_command_is_given_again(logdir, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 3)
    fill(out, [1])
    away = logdir.rename(logdir.with_name("away"))
    try:
        process = start(logdir, out, "--pool.workers=2")
        _, stderr = process.communicate(timeout=120)
    finally:
        away.rename(logdir)
    assert process.returncode == 1
    assert "1 of 3 rows are complete; 2 failed" in stderr and "there is no such folder" in stderr
    assert "give the same command again to go on" in stderr
    assert records(out)[1]["attempts"][[0, 2]].tolist() == [3, 3]
    process = start(logdir, out)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert_same_result(whole, out)


# ------------------------------------------------------------------ leftovers


def test_what_an_attempt_left_half_done_is_in_nobodys_way(logdir, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    for left in ("result", ".result.partial-1"):
        (out / "shards/workers/0" / left / "final_lambda").mkdir(parents=True)
        (out / "shards/workers/0" / left / "final_lambda/weight.npy").write_text("half")
    (out / "shards/workers/1").mkdir()
    shutil.copytree(whole, out / "shards/workers/1/result")  # whole, and not committed
    fill(out)
    assert os.listdir(out / "shards/workers/0") == os.listdir(out / "shards/workers/1") == ["result"]
    compute(logdir, out, "--cfg.shards=2")
    assert_same_result(whole, out)


def test_a_plan_without_its_store_is_made_anew(logdir, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    (out / "shards" / "spec.json").unlink()
    for path in (out / "shards").iterdir():  # as a process that was killed before Store.create leaves it
        if path.name not in ("plan.json", "lock"):
            shard.result.remove(path)
    (out / "shards" / "plan.json").write_text("{")
    begin(monkeypatch, logdir, out, 2)
    fill(out)
    compute(logdir, out, "--cfg.shards=2")
    assert_same_result(whole, out)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cfg.shards=3"], "cfg.shards is 2 there and 3 here"),
        (["--cfg.k=30"], "cfg.k is 50 there and 30 here"),
        (["--cfg.use_bias=0"], "cfg.use_bias is True there and False here"),
        (["--data.seed=4"], "data.seed is 0 there and 4 here"),
        (["--data.target_end_ind=9"], "data.target_end_ind is -1 there and 9 here"),
        (["--early_stopping.patience=9", "--data.num_val=9"],
         r"data.num_val is None there and 9 here; early_stopping.patience is 3 there and 9 here"),
        (["--data.logdir=elsewhere"], "data.logdir is .*store there and .*/elsewhere here"),
    ],
)  # fmt: skip
def test_another_fit_in_the_same_folder_is_refused_by_name(logdir, tmp_path, monkeypatch, options, told):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    before = (out / "shards" / "plan.json").read_bytes()
    with pytest.raises(RegressionError, match=f"is another one: {told}"):
        compute(logdir, out, "--cfg.shards=2", *options)
    assert (out / "shards" / "plan.json").read_bytes() == before


def test_a_whole_fit_does_not_go_where_shards_are(logdir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 2)
    with pytest.raises(RegressionError, match="holds a fit in shards"):
        compute(logdir, out)
    assert set(files(out)) == set()


def test_shards_do_not_go_where_a_result_is(logdir, whole, tmp_path):
    before = files(whole)
    with pytest.raises(RegressionError, match="already holds a result"):
        compute(logdir, whole, "--cfg.shards=2")
    assert files(whole) == before and not (whole / "shards").exists()
    with pytest.raises(RegressionError, match="is a file"):
        compute(logdir, whole / "datamodels.pt", "--cfg.shards=2")


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        (["--cfg.shards=11"], RegressionError, "cfg.shards=11: there are 10 targets"),
        (["--cfg.shards=4", "--data.target_start_ind=7"], RegressionError, "cfg.shards=4: there are 3 targets"),
        (["--cfg.shards=0"], ConfigError, "cfg.shards"),
        (["--cfg.shards=2", "--cfg.eps=2"], RegressionError, "eps=2.0"),
        (["--cfg.shards=2", "--data.y_name=loss"], RegressionError, "no key 'loss'"),
        (["--cfg.shards=2", "--pool.executor=nowhere"], ConfigError, "nowhere"),
    ],
)
def test_what_no_shard_could_fit_leaves_no_folder(logdir, tmp_path, options, error, told):
    with pytest.raises(error, match=told):
        compute(logdir, tmp_path / "out", *options)
    assert os.listdir(tmp_path) == []


def test_a_pool_without_shards_is_a_note(logdir, tmp_path):
    code, said = compute(logdir, tmp_path / "out", "--pool.workers=2", "--data.target_end_ind=1")
    assert code == 0
    assert "note: pool.workers does nothing" in said


# ------------------------------------------------------------------ data that change


@pytest.fixture
def growing(tmp_path):
    """A store of 40 rows, of which 30 are complete: 5 to 34."""
    path = tmp_path / "growing"
    schema = {"masks": {"shape": [6], "dtype": "bits"}, "margins": {"shape": [4], "dtype": "float32"}}
    design = [{"role": "train", "count": 40, "seed": 1, "sampler": "bernoulli", "alpha": 0.5}]
    store = Store.create(path, {"schema": schema, "design": design}, sync=False)
    store.commit_many(range(5, 35), {key: value[5:35] for key, value in outcomes(store, 40).items()})
    return store


def test_rows_that_are_completed_later_and_behind_change_nothing(growing, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, growing.path, out, 2)
    fill(out, [0])
    growing.commit_many(range(35, 40), {key: value[35:] for key, value in outcomes(growing, 40).items()})
    fill(out, [1])
    assert compute(growing.path, out, "--cfg.shards=2")[0] == 0
    assert Datamodel.load(out).about["num_train"] == 24


@pytest.mark.parametrize(
    ("rows", "seed", "told"),
    [(range(5), 0, "changed: which rows take part"), (range(5, 9), 1, "changed: the outcomes")],
)
def test_rows_that_change_the_fit_are_refused_before_it(growing, tmp_path, monkeypatch, rows, seed, told):
    out = tmp_path / "out"
    begin(monkeypatch, growing.path, out, 2)
    fill(out, [0])
    values = {key: value[list(rows)] for key, value in outcomes(growing, 40, seed).items()}
    if rows[0] == 5:
        growing.commit_many(rows, values, replace=True)
    else:
        growing.commit_many(rows, values)
    with pytest.raises(RegressionError, match=told):
        fill(out, [1])
    assert not (out / "shards/workers/1/result").exists()


NUMBERS = np.random.default_rng(0)
PROBLEM = make_problem(
    NUMBERS.random((30, 4)) < 0.5,
    NUMBERS.random((30, 3)),
    num_val=6,
    penalty=np.ones((4, 3)),
    offset=np.zeros((30, 3)),
)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("rows", np.arange(1, 31), "which rows take part"),
        ("train", PROBLEM.train[1:], "which rows take part"),
        ("val", PROBLEM.val[1:], "which rows take part"),
        ("x", ~PROBLEM.x, "the columns"),
        ("x", PROBLEM.x.astype("u1"), "the columns"),
        ("columns", tuple("abcd"), "the columns"),
        ("penalty", np.ones(4), "the columns, the outcomes"),
        ("penalty", np.arange(12.0).reshape(4, 3), "the outcomes"),
        ("y", PROBLEM.y + 1e-9, "the outcomes"),
        ("y", PROBLEM.y.astype("f4"), "the outcomes"),
        ("targets", tuple("abc"), "the outcomes"),
        ("offset", np.full((30, 3), 1e-9), "the outcomes"),
        ("offset", None, "the outcomes"),
    ],
)
def test_every_part_of_a_problem_is_looked_at(name, value, told):
    rows, columns = shard._shared(PROBLEM)
    plan = Plan({}, {}, (24, 6), ((0, 3),), rows, columns, (shard._own(PROBLEM, slice(0, 3)),))
    plan.check(0, PROBLEM)
    with pytest.raises(RegressionError, match=f"changed: {told}[;,]"):
        plan.check(0, replace(PROBLEM, **{name: value}))


def test_penalties_that_all_targets_share_are_looked_at():
    one = replace(PROBLEM, penalty=np.ones(4))
    rows, columns = shard._shared(one)
    plan = Plan({}, {}, (24, 6), ((0, 3),), rows, columns, (shard._own(one, slice(0, 3)),))
    plan.check(0, one)
    with pytest.raises(RegressionError, match="changed: the columns;"):
        plan.check(0, replace(one, penalty=np.array([1, 1, 1, 2.0])))


def test_a_slice_is_the_same_planned_and_read():
    part = replace(
        PROBLEM, y=PROBLEM.y[:, 1:], targets=PROBLEM.targets[1:], offset=PROBLEM.offset[:, 1:],
        penalty=PROBLEM.penalty[:, 1:],
    )  # fmt: skip
    assert shard._own(PROBLEM, slice(1, 3)) == shard._own(part, slice(None))


# ------------------------------------------------------------------ the plan


def test_a_plan_comes_back_as_it_was(logdir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 3, "--data.target_start_ind=2", "--data.num_val=20")
    plan = Plan.load(out / "shards")
    assert plan.bounds == ((2, 4), (4, 7), (7, 10))
    assert plan.counts == (100, 20)
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert Plan.load(tmp_path).digest() == plan.digest()
    assert len(set(plan.targets)) == 3


def test_each_shard_says_what_it_fitted(logdir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(monkeypatch, logdir, out, 3)
    fill(out)
    with Store.open(out / "shards") as store:
        assert store.rows("targets").tolist() == [[0, 3], [3, 6], [6, 10]]
        models = [Datamodel.load(out / f"shards/workers/{row}/result") for row in range(3)]
        assert store.rows("nnz").tolist() == [(model.weight != 0).sum() for model in models]
        assert store.rows("gap").tolist() == [model.gap.max() for model in models]
        assert (store.rows("seconds") > 0).all()
    assert models[1].targets == ("margins[3]", "margins[4]", "margins[5]")


def test_a_folder_that_holds_no_plan(tmp_path):
    with pytest.raises(RegressionError, match=r"holds no plan.json; a fit in shards begins with"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text('{"bounds": 3}')
    with pytest.raises(RegressionError, match="not a plan of shards"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(("share", "threads"), [("3", 3), ("0", None), ("", None), ("many", None), (None, None)])
def test_a_worker_takes_its_share_of_the_cores(monkeypatch, share, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if share is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", share)
    assert shard._threads() == threads
