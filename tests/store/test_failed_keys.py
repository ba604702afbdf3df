"""An optional key whose value is an exception: the row is complete without it, and nothing takes it for a value."""

import json
import os

import numpy as np
import pytest

from datamodels.errors import RowError, StoreError
from datamodels.store import Store
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.export import export
from datamodels.store.keys import KeyStore
from datamodels.store.screens import lines
from datamodels.store.status import progress
from tests.jobs import Job

SPEC = {
    "num_models": 4,
    "schema": {
        "x": {"shape": [], "dtype": "float64"},
        "tau": {"shape": [2], "dtype": "float32", "required": False, "allow_nonfinite": True},
        "count": {"shape": [], "dtype": "int32", "required": False},
    },
}
FAILS = """
import os

def main(*, index, keys, measurements):
    out = {"x": index, "tau": [index, 1.5], "count": 7}
    if index % 2 and not os.path.exists("mended"):
        out["tau"] = ValueError("no class has two members")
        out["count"] = KeyError("labels")
    print("asked for", keys, measurements)
    return {key: out[key] for key in keys}
"""


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, {**SPEC, "measurements": {"names": ["tau"], "on": ["digits/test"]}}, FAILS, name="fails")


def test_the_rows_are_complete_and_say_what_failed(job, monkeypatch, capfd):
    assert job.here(monkeypatch=monkeypatch) == 0
    out, err = capfd.readouterr()
    assert "asked for ('x', 'tau', 'count') {'names': ('tau',), 'on': ('digits/test',)}" in out
    assert "row 1: tau failed: ValueError: no class has two members; traceback in" in err
    assert "the row is complete without it" in err and "row 0" not in err
    assert "4 rows committed, 0 attempts failed; 4 keys failed in 2 of these rows\n" in out
    with Store.open(job.path) as store:
        assert store.completed().all() and list(verify(store)) == []
        assert store.layout.records("tau")["status"].tolist() == [commits.VALID, commits.KEY_FAILED] * 2
        assert np.isnan(store["tau"][1]).all() and store["tau"][2].tolist() == [2, 1.5]
        with pytest.raises(
            StoreError, match="'tau': it failed when it was to be made; .*--worker.keys=tau fills it in"
        ):
            store.rows("tau", [1])
        assert os.listdir(store.path / "workers/1") == ["attempt-keys-1.json"]
        report = json.loads((store.path / "workers/1/attempt-keys-1.json").read_text())
        assert [entry["keys"] for entry in report["failed"]] == [["tau"], ["count"]]
        assert report["failed"][0]["traceback"].endswith("ValueError: no class has two members\n")
        state = progress(store)
        assert state.keys == {"tau": 2, "count": 2}
        assert (state.failed_keys["count"].rows, state.failed_keys["count"].first) == (2, 1)
        assert "  tau: 2 of the complete rows have it; it failed in 2, as in row 1: ValueError: no class" in "\n".join(
            lines("store", state)
        )
        assert export(store, job.folder / "table.csv", keys=["tau", "count"]).rows == 4
    table = (job.folder / "table.csv").read_text().splitlines()
    assert sum("nan" in line.lower() for line in table) == 0 and sum(",,," in line for line in table) == 2


def test_what_failed_is_tried_again_with_worker_keys_and_nothing_else_is(job, monkeypatch, capfd):
    job.here(monkeypatch=monkeypatch)
    assert job.here("--worker.keys=tau,count", monkeypatch=monkeypatch) == 3  # twice more, and that is enough
    assert (
        "row 1: attempt 3 failed: tau: ValueError: no class has two members (and 1 keys more); traceback in"
        in capfd.readouterr().err
    )
    with Store.open(job.path) as store:
        assert store.key_error(1, "tau") == "ValueError: no class has two members"
        assert store.layout.records("tau", [1, 3])["attempt"].tolist() == [3, 3] and store.completed().all()
    (job.folder / "mended").touch()
    assert job.here("--worker.keys=tau", "--worker.retries=5", monkeypatch=monkeypatch) == 0
    assert "asked for ('tau',)" in capfd.readouterr().out
    with Store.open(job.path) as store:
        assert store.rows("tau").tolist() == [[row, 1.5] for row in range(4)] and list(verify(store)) == []
        assert store.layout.records("count")["status"].tolist() == [commits.VALID, commits.KEY_FAILED] * 2


def test_one_of_the_keys_that_are_filled_in_fails_and_the_other_is_kept(job, monkeypatch):
    with Store.open(job.path) as store:
        store.commit_many([1], {"x": [1.0]})
    with KeyStore.of(job.path, ["tau", "count"], sync=False) as both:
        both.commit_many([1], {"tau": [ValueError("no")], "count": [3]})
        assert not both.layout.completed([1])[0]
    with Store.open(job.path) as store:
        assert store.rows("count", [1]).tolist() == [3] and np.isnan(store["tau"][1]).all()


def test_a_row_fails_with_a_key_that_is_required(tmp_path):
    with Store.create(tmp_path / "store", SPEC) as store:
        with pytest.raises(RowError, match="row 0, 'x': main returned ValueError: diverged; this key is required"):
            store.commit_many([0], {"x": [ValueError("diverged")]})
        assert not store.completed().any()


def test_a_replacement_that_a_crash_cuts_short_keeps_what_failed(tmp_path):
    with Store.create(tmp_path / "store", SPEC) as store:
        store.commit_many([0], {"x": [1.0], "tau": [[1, 2]], "count": [5]})
        blobs = store.encode(0, {"x": 2.0, "tau": ValueError("no"), "count": 6})
        with store.run.committing([]):
            commits.write_journal(store.layout, 0, blobs, commits.RowInfo(1, 1.0, 0), store.run.id)
    with Store.open(tmp_path / "store") as store:
        assert store["x"][0] == 2 and store.rows("count", [0]).tolist() == [6]
        assert store.layout.records("tau", [0])["status"].tolist() == [commits.KEY_FAILED]
