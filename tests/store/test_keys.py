"""Keys that are filled in afterwards: of complete rows, which stay complete, and nothing else of them."""

import os
import time

import numpy as np
import pytest

from datamodels.errors import ClaimLost, RowError, StoreError
from datamodels.store import Store
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.keys import KeyStore
from datamodels.store.repair import repair
from tests.jobs import CALLED, DESIGN, Job, alive, finish, until

SPEC = {
    "num_models": 6,
    "schema": {
        "x": {"shape": [], "dtype": "float64"},
        "a": {"shape": [2], "dtype": "float32", "required": False},
        "b": {"shape": [9], "dtype": "bits", "required": False},
    },
}


@pytest.fixture
def path(tmp_path):
    with Store.create(tmp_path / "store", SPEC, sync=False) as store:
        store.commit_many([0, 1, 3, 4], {"x": [0.0, 1.0, 3.0, 4.0]})
        store.commit_many([5], {"x": [5.0], "a": [[5, 5]]})
    return tmp_path / "store"


@pytest.fixture
def both(path):
    with KeyStore.of(path, ["a", "b"], sync=False) as made:
        yield made


def untouched(path):
    """Bytes of everything but the keys that are filled in."""
    return {name: (path / name).read_bytes() for name in ("x.npy", "_keys/x.npy", "_rows.npy", "_completed.npy")}


def values(row):
    return {"a": [row, -row], "b": np.arange(9) < row}


def test_a_row_is_done_when_it_has_the_keys(both, path):
    before = untouched(path)
    assert both.completed().tolist() == [False, False, True, False, False, False]  # row 2 is not complete at all
    assert both.within(None).tolist() == [True, True, False, True, True, True]
    others = {"x": ["no number", None]}  # which are left as they are, so it does not matter
    both.commit_many([3, 0], {"a": [[3, -3], [0, 0]], "b": [values(3)["b"], values(0)["b"]], **others})
    assert both.completed().tolist() == [True, False, True, True, False, False]
    assert untouched(path) == before
    with Store.open(path) as store:
        assert store.rows("a", [0, 3]).tolist() == [[0, 0], [3, -3]] and list(verify(store)) == []
        assert store.rows("b").sum(axis=1).tolist() == [0, 3] and store.completed().sum() == 5
        assert store.layout.records("a", [3])["attempt"].tolist() == [1]


def test_what_a_row_has_is_left_alone_unless_it_is_to_be_replaced(both, path):
    both.commit_many([5], {"a": [[9, 9]], "b": [values(5)["b"]]})
    with Store.open(path) as store:
        assert store.rows("a", [5]).tolist() == [[5, 5]] and store.rows("b", [5]).sum() == 5
    with pytest.raises(RowError, match="row 5: has a, b already, nothing to do"):
        both.commit_many([5], {"a": [[9, 9]], "b": [values(5)["b"]]})
    both.commit_many([5], {"a": [[9, 9]], "b": [values(1)["b"]]}, replace=True)
    with Store.open(path) as store:
        assert store.rows("a", [5]).tolist() == [[9, 9]] and store.rows("b", [5]).sum() == 1
        assert list(verify(store)) == []


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"a": [[1, 2]]}, "row 0: 'b' missing; got 'a'; return what --worker.keys names"),
        ({"x": [1.0]}, "row 0: 'a', 'b' missing; got 'x'"),
        ({"a": [[1, 2]], "b": [[0] * 9], "c": [1]}, "row 0: unknown key 'c'"),
        ({"a": [[1, 2]], "b": [[2] * 9]}, "row 0, 'b': value 2"),
        ({"a": [[1, np.inf]], "b": [[0] * 9]}, "row 0, 'a': value inf at \\[1\\] is not finite"),
        ({"a": [[1, 2, 3]], "b": [[0] * 9]}, "row 0, 'a': expected shape"),
    ],
)
def test_the_checks_are_those_of_any_commit(both, path, values, why):
    before = {name: (path / name).read_bytes() for name in ("a.npy", "b.npy", "_keys/a.npy", "_keys/b.npy")}
    with pytest.raises(RowError, match=why):
        both.commit_many([0], values)
    assert before == {name: (path / name).read_bytes() for name in before}


def test_keys_that_cannot_be_filled_in(path):
    with pytest.raises(StoreError, match="key 'x' is required, so every complete row has it"):
        KeyStore.of(path, ["a", "x"])
    with pytest.raises(StoreError, match="no key 'c'"):
        KeyStore.of(path, ["c"])


def test_a_row_that_is_not_complete_or_is_held_is_refused(both, path):
    with pytest.raises(StoreError, match="row 2: is not complete any more"):
        both.commit_many([0, 2], {"a": [[1, 2]] * 2, "b": [[0] * 9] * 2})
    with pytest.raises(RowError, match="row 2: not complete, so keys cannot be added"):
        both.check_row(2)
    with Store.open(path) as other:
        other.run.take(1)
        with pytest.raises(ClaimLost, match="row 1: another worker is running it"):
            both.commit_many([0, 1], {"a": [[1, 2]] * 2, "b": [[0] * 9] * 2})
    assert not both.completed()[[0, 1]].any()


def test_attempts_are_counted_in_the_records_of_the_keys(both, path):
    before = untouched(path)
    for attempt in (1, 2):
        assert both.begin([1, 3]) == [attempt, attempt]
    assert both.layout.row_records([1, 3])["state"].tolist() == [commits.RUNNING] * 2
    assert both.run_id(both.layout.row_records([1])[0]) == both.run.id
    where = both.fail(1, 2, "Traceback\nValueError: no")
    assert where.name == "attempt-keys-2.json" and both.last_error(1) == "ValueError: no"
    both.give_back(3, 2)
    records = both.layout.row_records()
    assert records["state"].tolist() == [0, commits.FAILED, 0, commits.FAILED, 0, 0]
    assert records["attempts"].tolist() == [0, 2, 0, 1, 0, 0]
    state = both.status(rows=both.within(None))
    assert (state.num_models, state.completed, state.failed, state.pending) == (5, 0, 2, 3)
    assert [(f.row, f.error) for f in state.failures] == [(1, "ValueError: no"), (3, "")]
    assert untouched(path) == before
    with Store.open(path) as store:  # to everybody else the keys are absent, and all is well
        assert list(verify(store)) == [] == list(repair(store)) and store.rows("a").tolist() == [[5, 5]]
        assert store.status().failed == 0 and store.last_error(1) == ""
    assert both.begin([0]) == [1]
    both.give_back(0, 1)
    assert bytes(both.whole.records("a", [0])[0]) == bytes(16)
    both.begin([1])
    both.commit_many([1], {"a": [[1, 1]], "b": [[0] * 9]})
    assert both.whole.records("b", [1])["attempt"].tolist() == [3] and both.completed()[1]


# ------------------------------------------------------------------------------------ workers

MAIN = (
    CALLED
    + """
def main(index, mask, width, optimiser=None):
    called(index)
    return {"note": f"{optimiser}{width}", "x": [9, 9, 9]}
"""
)


@pytest.fixture
def job(tmp_path):
    """Rows 0-3 are complete, 4 and 5 are not."""
    job = Job(tmp_path, DESIGN, MAIN, name="adds_keys")
    with Store.open(job.path, sync=False) as store:
        store.commit_many([0, 1, 2, 3], {"x": np.arange(12).reshape(4, 3)})
    return job


def held(path):
    return [name for name in os.listdir(path / "claims") if not name.endswith(".lock")]


def test_a_worker_fills_in_the_keys_and_nothing_else(job):
    before = {key: job.array(key).tobytes() for key in ("x", "masks", "width", "_completed", "_rows")}
    code, out, err = job.run("--worker.keys=note")
    assert (code, out) == (0, "4 rows committed, 0 attempts failed\n"), err
    assert job.array("note").tolist() == ["sgd4", "sgd4", "sgd8", "sgd8", "", ""]
    assert {key: job.array(key).tobytes() for key in before} == before
    assert sorted(job.calls()) == ["0", "1", "2", "3"] and not held(job.path)
    with Store.open(job.path) as store:
        assert list(verify(store)) == [] and store.completed().sum() == 4
    assert job.run("--worker.keys=note")[:2] == (0, "0 rows committed, 0 attempts failed\n")
    assert len(job.calls()) == 4
    assert job.run("--worker.keys=note", "--worker.index=2")[1] == (
        "row 2: has note already, nothing to do (--worker.do_if_complete replaces them)\n"
    )
    (job.folder / "adds_keys.py").write_text(MAIN.replace("sgd", "").replace("{optimiser}", "v2-"))
    assert job.run("--worker.keys=note", "--worker.index=2", "--worker.do_if_complete")[0] == 0
    assert job.array("note").tolist() == ["sgd4", "sgd4", "v2-8", "sgd8", "", ""]


def test_one_row_or_some(job):
    code, out, err = job.run("--worker.keys=note", "--worker.index=1")
    assert code == 0 and out.startswith("row 1: complete ("), err
    code, out, err = job.run("--worker.keys=note", "--worker.index=5")
    assert code == 2 and "row 5: not complete, so keys cannot be added; run it without --worker.keys" in err
    assert job.run("--worker.keys=note", "--worker.rows=width=8")[0] == 0
    assert job.array("note").tolist() == ["", "sgd4", "sgd8", "sgd8", "", ""]
    code, out, _ = job.run("--worker.keys=note", "--worker.rows=4-5")
    assert (code, out) == (0, "none of these rows is complete, so there is nothing to add note to\n")
    code, out, err = job.run("--worker.keys=note", "--worker.dry_run")
    assert code == 0 and "row        0 of 6" in out and "\nreturns    note: U8 []\n" in out
    code, out, err = job.run("--worker.keys=note", "--worker.smoke")
    assert code == 0 and "every value fits the schema; nothing was written" in out, err


@pytest.mark.parametrize(("key", "why"), [("x", "key 'x' is required"), ("no", "no key 'no'; did you mean 'note'?")])
def test_keys_that_no_worker_fills_in(job, key, why):
    code, _, err = job.run(f"--worker.keys={key}")
    assert code == 1 and why in err and not job.calls()


def test_failures_are_counted_kept_and_given_up(job):
    (job.folder / "adds_keys.py").write_text(
        CALLED
        + """
def main(index):
    called(index)
    if index == 2:
        raise ValueError("not this one")
    if index == 3:
        return {"x": [1, 2, 3]}
    return {"note": "ok"}
"""
    )
    code, out, err = job.run("--worker.keys=note", "--worker.retries=1")
    reset = f"python -m datamodels.store reset {job.path} --rows=failed --keys=note"
    assert code == 3 and out == (
        "2 rows committed, 4 attempts failed; 2 rows of the store failed too often to be tried again; when the cause "
        f"is gone, {reset} has them run again\n"
    )
    assert "row 2: attempt 2 failed: ValueError: not this one; traceback in" in err
    assert "row 3: 'note' missing; got 'width', 'masks', 'x'; return what --worker.keys names" in err
    assert sorted(job.calls()) == ["0", "1", "2", "2", "3", "3"]
    assert sorted(os.listdir(job.path / "workers/2"))[:1] == ["attempt-keys-1.json"]
    assert job.run("--worker.keys=note", "--worker.retries=1")[0] == 3 and len(job.calls()) == 6
    with Store.open(job.path) as store:
        assert store.completed().sum() == 4 and list(verify(store)) == [] and store.status().failed == 0
    (job.folder / "adds_keys.py").write_text('def main(index):\n    return {"note": "now"}\n')
    assert job.run("--worker.keys=note", "--worker.retries=2")[0] == 0
    assert job.array("note").tolist() == ["ok", "ok", "now", "now", "", ""]


def test_a_process_that_dies_is_counted_and_rows_go_on(job):
    (job.folder / "adds_keys.py").write_text(
        CALLED
        + """
import os, signal
def main(index):
    called(index)
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"note": "ok"}
"""
    )
    codes = [job.run("--worker.keys=note", "--worker.retries=1")[0] for _ in range(3)]
    assert codes == [-9, -9, 3] and job.calls().count("2") == 2
    assert job.array("note").tolist() == ["ok", "ok", "", "ok", "", ""]
    with KeyStore.of(job.path, ["note"]) as store:
        assert "died without leaving a word, 2 times" in store.last_error(2)
        record = store.path / "workers/2/attempt-keys-2.json"
        run = next(p.stem for p in sorted((store.path / "runs").glob("*.json")) if p.stem in record.read_text())
        assert run
    with Store.open(job.path) as store:
        assert store.completed().sum() == 4 and list(verify(store)) == []


def test_main_many_fills_in_batches(job):
    (job.folder / "adds_keys.py").write_text(
        CALLED
        + """
def main_many(indices):
    called(len(indices))
    return {"note": [f"r{i}" for i in indices]}
"""
    )
    assert job.run("--worker.keys=note", "--worker.batch=3")[0] == 0
    assert job.array("note").tolist() == ["r0", "r1", "r2", "r3", "", ""] and sorted(job.calls()) == ["1", "3"]


def test_several_workers_share_the_rows_and_one_that_is_stopped_gives_its_row_back(job):
    (job.folder / "adds_keys.py").write_text(
        CALLED
        + """
import os, time
def main(index):
    called(index)
    while index == 1 and not os.path.exists("go"):
        time.sleep(0.02)
    return {"note": "ok"}
"""
    )
    first = job.start("--worker.keys=note")
    until(lambda: "1" in job.calls())
    assert job.run("--worker.keys=note")[0] == 0  # leaves the row that the first one holds
    assert job.array("note").tolist() == ["ok", "", "ok", "ok", "", ""]
    first.terminate()
    code, _, err = finish(first)
    assert code == 143 and "rows in hand are given back" in err and not alive(first.pid) and not held(job.path)
    with KeyStore.of(job.path, ["note"]) as store:
        assert store.layout.row_records()["attempts"].tolist() == [0] * 6
    (job.folder / "go").touch()
    assert job.run("--worker.keys=note")[0] == 0 and job.array("note").tolist()[:4] == ["ok"] * 4


def test_a_pool_fills_in_keys(job):
    argv = [f"--worker.logdir={job.path}", "--worker.main_import=adds_keys", "--worker.keys=note", "--pool.workers=2"]
    code, out, err = job.run(module="datamodels.pool", argv=argv)
    assert code == 0 and "all 4 rows" in out, err
    assert job.array("note").tolist() == ["sgd4", "sgd4", "sgd8", "sgd8", "", ""]
    assert job.run(module="datamodels.pool", argv=argv)[0] == 0 and len(job.calls()) == 4


def test_a_new_key_of_many_rows_is_found_quickly(tmp_path):
    spec = {"num_models": 300_000, "schema": {"x": {"shape": [], "dtype": "int8"}, "y": {**SPEC["schema"]["a"]}}}
    with Store.create(tmp_path / "s", spec, sync=False) as store:
        store.layout.write("_completed.npy", [0], [b"\1" * 300_000], lambda: None)
    started = time.perf_counter()
    with KeyStore.of(tmp_path / "s", ["y"]) as store:
        assert not store.completed().any() and store.status(rows=store.within(None)).pending == 300_000
    assert time.perf_counter() - started < 2
