"""Rows that are reset are run again, and no other; held ones are refused before anything changes."""

import os

import numpy as np
import pytest

from datamodels.errors import ConfigError, RowError, StoreError
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.repair import repair
from datamodels.store.reset import failed_rows, parse_rows, reset

SPEC = {
    "num_models": 8,
    "schema": {
        "x": {"shape": [2], "dtype": "int32"},
        "extra": {"shape": [], "dtype": "int8", "required": False},
    },
}


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "store", SPEC, sync=False) as made:
        made.commit_many([0, 1, 2], {"x": [[row, row] for row in range(3)], "extra": [1, 2, 3]})
        for row in (4, 5):
            made.run.take(row)
            made.begin([row])
            made.fail(row, 1, f"Traceback\nValueError: {row}")
            made.run.release(row, done=False)
        yield made


def state(store):
    return store.completed().tolist(), store.layout.row_records()["attempts"].tolist()


def test_rows_in_words():
    assert parse_rows("3,7-9, 8 ,0", 10) == [0, 3, 7, 8, 9]
    for text, why in (
        ("", "expected numbers and ranges as in 3,7-9, got ''"),
        ("1,,2", "got ''"),
        ("-1", "got '-1'"),
        ("all", "got 'all'"),
        ("4-2", "the range 4-2 ends before it begins"),
        ("3-10", "row 10: expected an index in"),
    ):
        with pytest.raises(RowError, match=why):
            parse_rows(text, 10)


def test_rows_that_are_reset_are_as_if_never_run_and_no_other_changes(store):
    done = reset(store, [1, 4, 6])
    assert (done.rows, done.complete, done.untouched) == (2, 1, 1)
    assert state(store) == ([True, False, True] + [False] * 5, [1, 0, 1, 0, 0, 1, 0, 0])
    assert list(verify(store)) == [] == list(repair(store)), "a row that was reset comes back"
    assert store.status().failed == 1 and failed_rows(store) == [5]
    store.commit_many([1], {"x": [[7, 7]]})
    assert store.rows("x").tolist() == [[0, 0], [7, 7], [2, 2]] and store.rows("extra").tolist() == [1, 3]
    assert not [name for name in os.listdir(store.path / "claims") if not name.endswith(".lock")]


def test_optional_keys_alone(store):
    record = commits.key_record("extra", 4, attempt=1, crc32=0)  # of a row that is not complete
    store.layout.write("_keys/extra.npy", [4], [record], lambda: None)
    done = reset(store, [0, 2, 4], keys=["extra"])
    assert (done.rows, done.complete, done.untouched) == (2, 2, 1)
    assert store.layout.records("extra", [4]).tobytes() == record
    assert store.rows("extra").tolist() == [2] and store.rows("x").tolist() == [[0, 0], [1, 1], [2, 2]]
    assert list(verify(store)) == []
    with pytest.raises(StoreError, match="key 'x' is required, so a row without it cannot stay complete"):
        reset(store, [0], keys=["extra", "x"])
    with pytest.raises(StoreError, match="no key 'extr'; did you mean 'extra'"):
        reset(store, [0], keys=["extr"])


def test_nothing_changes_where_a_worker_holds_one_of_the_rows(store):
    before = state(store)
    with Store.open(store.path) as worker:
        worker.run.take(2), worker.run.take(6)
        with pytest.raises(
            StoreError, match=rf"row 2 is held by run {worker.run.id} on .*\(and 1 of the others too.*nothing is"
        ):
            reset(store, [0, 2, 4, 6])
        assert state(store) == before
        assert reset(store, [0, 4]).rows == 2


def test_a_row_that_is_taken_meanwhile_is_refused_and_the_others_given_back(store, monkeypatch):
    with Store.open(store.path) as worker:
        worker.run.take(2)
        monkeypatch.setattr(Store, "holders", lambda self: {})
        with pytest.raises(StoreError, match="row 2 is held by a worker; nothing is changed"):
            reset(store, [0, 1, 2])
        assert not store.run.claims and worker.run.take(1)


def test_the_journal_of_a_replacement_goes_too(store):
    """Applied on the next open, it would bring the row back."""
    commits.write_journal(store.layout, 1, store.encode(1, {"x": [9, 9]}), commits.RowInfo(2, 0.0, 0), "somebody")
    reset(store, [1])
    with Store.open(store.path) as other:
        assert not other.completed()[1]


def test_a_traceback_of_before_is_not_shown_as_that_of_the_last_attempt(store):
    for attempt in (2, 3):
        store.run.take(4)
        store.begin([4])
        store.fail(4, attempt, f"attempt {attempt}")
        store.run.release(4, done=False)
    assert store.last_error(4) == "attempt 3"
    reset(store, [4])
    assert store.run.take(4) and store.begin([4]) == [1]
    store.fail(4, 1, "another")
    assert store.last_error(4) == "another"


def test_many_rows_do_not_make_many_claims_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodels.store.reset._AT_ONCE", 10)
    with Store.create(tmp_path / "s", {**SPEC, "num_models": 95}, sync=False) as store:
        store.commit_many(np.arange(95), {"x": np.zeros((95, 2))})
        most, real = [], store.run.take
        monkeypatch.setattr(store.run, "take", lambda row: most.append(len(store.run.claims)) or real(row))
        seen = []
        assert reset(store, range(95), progress=seen.append).complete == 95 and sum(seen) == 95
        assert max(most) < 10 and not store.completed().any()


def test_on_the_command_line(store, capsys):
    path = str(store.path)
    assert command.main(["reset", path, "--rows", "failed"]) == 0
    assert capsys.readouterr().out == "2 rows cleared, to be run again\n" and store.status().failed == 0
    assert command.main(["reset", path, "--rows=0-1,7", "--keys=extra"]) == 0
    assert capsys.readouterr().out == "extra cleared of 2 rows, which stay complete; 1 had nothing\n"
    assert command.main(["reset", path, "--rows=0-1,7"]) == 0
    out = "2 rows cleared, to be run again, 2 of them complete until now; 1 had never been run\n"
    assert capsys.readouterr().out == out and store.completed().sum() == 1
    with pytest.raises(ConfigError, match=r"--rows \(command line\): rows?: expected numbers and ranges"):
        command.main(["reset", path, "--rows=everything"])
    with pytest.raises(ConfigError, match="--rows is required"):
        command.main(["reset", path])
