"""What runs/<id>.json says of each process, and how a reader asks which run made a row."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import datamodels
from datamodels.errors import RowError, StoreError
from datamodels.store import Store, describe
from tests.jobs import Job, finish, plain, until

WAITS = """
import os, time
def main(index):
    while index == 2 and not os.path.exists('go'): time.sleep(.02)
    if index == 1: raise ValueError('bad')
    return {'x': index}
"""


def git(folder, *args):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def record_of(job, row):
    with Store.open(job.path) as store:
        return store.run_of(row)


def test_a_worker_says_what_it_is_and_each_row_says_which_one_made_it(tmp_path):
    job = Job(tmp_path, plain(4), WAITS)
    git(tmp_path, "init")
    git(tmp_path, "add", "job.py")
    git(tmp_path, "commit", "-m", "one")
    process = job.start("--worker.retries=0")
    try:
        until(lambda: record_of(job, 2) is not None)
        assert record_of(job, 2)["state"] == "running" and record_of(job, 2)["exit"] is None
        (tmp_path / "go").touch()
        assert finish(process)[0] == 3
    finally:
        process.kill()
    record = record_of(job, 1)
    assert record == record_of(job, 3)
    assert json.loads((job.path / f"runs/{record['run']}.json").read_text()).items() <= record.items()
    for key, value in {
        "host": os.uname().nodename,
        "pid": process.pid,
        "argv": [sys.executable, "-m", "datamodels.worker", *job.argv("--worker.retries=0")],
        "cwd": str(tmp_path),
        "main": "job",
        "file": str(tmp_path / "job.py"),
        "git_commit": git(tmp_path, "rev-parse", "HEAD"),
        "git_dirty": False,
        "exit": 3,
        "state": "ended",
        "rows_done": 3,
        "rows_failed": 1,
    }.items():
        assert record[key] == value, key
    assert record["versions"] == {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "datamodels": datamodels.__version__,
    }
    assert time.time() - 60 < record["started"] < record["finished"] < time.time()


@pytest.mark.slow
def test_torch_has_its_version_once_main_has_loaded_it(tmp_path):
    torch = pytest.importorskip("torch")
    job = Job(tmp_path, plain(1), "def main():\n    import torch\n    return {'x': 1}")
    assert job.run()[0] == 0
    assert record_of(job, 0)["versions"]["torch"] == torch.__version__


def test_code_that_is_not_in_its_commit_is_called_dirty(tmp_path):
    assert describe.code(tmp_path / "job.py") == {"file": str(tmp_path / "job.py")}  # no checkout
    git(tmp_path, "init")
    (tmp_path / "job.py").write_text("1")
    git(tmp_path, "add", "job.py")
    git(tmp_path, "commit", "-m", "one")
    assert describe.code(tmp_path / "job.py")["git_dirty"] is False
    (tmp_path / "other.txt").write_text("a store, say")
    assert describe.code(tmp_path / "job.py")["git_dirty"] is False
    (tmp_path / "new.py").write_text("1")
    assert describe.code(tmp_path / "new.py")["git_dirty"] is True  # git does not have what runs
    (tmp_path / "job.py").write_text("2")
    assert describe.code(tmp_path / "job.py")["git_dirty"] is True


def test_a_run_that_was_killed_has_died_and_its_rows_stay_its_own(tmp_path):
    job = Job(tmp_path, plain(2), "import os, signal\ndef main(): os.kill(os.getpid(), signal.SIGKILL)")
    process = job.start("--worker.index=1", "--worker.retries=0")
    assert finish(process)[0] == -signal.SIGKILL
    for _ in range(2):
        record = record_of(job, 1)
        assert (record["pid"], record["state"], record["exit"], record["finished"]) == (process.pid, "died", None, None)
        assert job.run("--worker.retries=0")[0] in (-9, 3)  # the other row; then one that records both deaths
    assert job.run("--worker.retries=0")[0] == 3
    assert job.array("_rows")["state"].tolist() == [3, 3] and record_of(job, 1)["pid"] == process.pid
    assert json.loads((job.path / "workers/1/attempt-1.json").read_text())["run"] == record["run"]


def test_an_exit_by_an_error_of_the_store_is_told(tmp_path):
    job = Job(tmp_path, plain(2), "import os\ndef main():\n    os.unlink('store/_rows.npy')\n    return {'x': 1}")
    code, _, err = job.run()
    (record,) = (json.loads(path.read_text()) for path in (job.path / "runs").glob("*.json"))
    assert record["exit"] == code == 1 and "_rows.npy: this file of the store is missing" in err


def test_runs_of_another_machine_and_runs_without_a_record(tmp_path):
    with Store.create(tmp_path / "store", plain(3), sync=False) as store:
        store.commit_many([0], {"x": [1.0]})
        assert store.run_of(0)["state"] == "running" and store.run_of(1) is None
        path = tmp_path / "store/runs" / f"{store.run.id}.json"
        assert store.run_of(0)["pid"] == os.getpid()
    assert record_state(tmp_path) == "ended"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "finished": None, "boot": "another"}))
    assert record_state(tmp_path) == "running"
    os.utime(path, (time.time() - 130,) * 2)
    assert record_state(tmp_path) == "silent"
    path.write_text(json.dumps({**record, "finished": None, "boot": "another", "time_to_live": 1000}))
    os.utime(path, (time.time() - 130,) * 2)
    assert record_state(tmp_path) == "running"
    path.unlink()
    with Store.open(tmp_path / "store") as store:
        assert store.run_of(0) == {"run": path.stem, "state": "unknown"}


def record_state(folder):
    with Store.open(folder / "store") as store:
        return store.run_of(0)["state"]


def test_a_row_that_is_none_and_a_record_that_is_damaged(tmp_path):
    with Store.create(tmp_path / "store", plain(3), sync=False) as store:
        store.commit_many([0], {"x": [1.0]})
        for row in (-1, 3, 0.5):
            with pytest.raises(RowError):
                store.run_of(row)
        rows = np.load(tmp_path / "store/_rows.npy", mmap_mode="r+")
        rows["attempts"][0] += 1
        rows.flush()
        with pytest.raises(StoreError, match="row 0: its record is damaged"):
            store.run_of(0)
