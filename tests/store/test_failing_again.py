"""Optional keys that fail again and again, are given back, replaced, reset or copied: what is kept of them."""

import gc
import json
import os
import shutil
import signal

import numpy as np
import pytest

from datamodels.errors import RowError, StoreError
from datamodels.store import Store
from datamodels.store import commit as commits
from datamodels.store.__main__ import main as tool
from datamodels.store.check import verify
from datamodels.store.compact import compact
from datamodels.store.disk import PosixDisk
from datamodels.store.keys import KeyStore
from datamodels.store.merge import merge
from datamodels.store.reset import failed_rows, reset
from tests.jobs import CALLED, Job, finish, until

FLOAT = {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True}
SPEC = {"num_models": 4, "schema": {"x": {"shape": [], "dtype": "float64"}, "a": FLOAT, "b": FLOAT}}
LONG = {f"digits_test_a_measurement_with_a_long_name_{number}": FLOAT for number in range(12)}

# A main that does what the file `how` says: "raise" it, "return" it for each key, or neither.
MAIN = (
    CALLED
    + """
import pathlib

def main(*, index, keys):
    called(f"{index}:{'+'.join(keys)}")
    how = pathlib.Path("how").read_text()
    if "raise" in how:
        raise ValueError(how)
    return {"x": index, **{key: ValueError(f"{how} {key}") if "return" in how else 7.0 for key in keys if key != "x"}}
"""
)


def made(tmp_path, monkeypatch, name, spec=SPEC, source=MAIN, rows=True):
    job = Job(tmp_path, spec, source, name=name)
    monkeypatch.chdir(tmp_path)
    if rows:
        with Store.open(job.path, sync=False) as store:
            store.commit_many(range(store.num_models), {"x": np.zeros(store.num_models)})
    return job


def how(job, what):
    (job.folder / "how").write_text(what)


@pytest.mark.parametrize("what", ["raise", "return"])
def test_many_keys_with_long_names_fail_and_are_given_up(tmp_path, monkeypatch, capfd, what):
    """Their names together are longer than a file's name may be."""
    spec = {"num_models": 2, "schema": {**SPEC["schema"], **LONG}}
    job = made(tmp_path, monkeypatch, f"long_{what}", spec)
    how(job, what)
    assert job.here(f"--worker.keys={','.join(LONG)}", "--worker.retries=1", monkeypatch=monkeypatch) == 3
    assert capfd.readouterr().out.startswith(
        "0 rows committed, 4 attempts failed; 2 rows of the store failed too often"
    )
    assert sorted(os.listdir(job.path / "workers/1")) == ["attempt-keys-1.json", "attempt-keys-2.json"]
    with Store.open(job.path) as store:
        for key in LONG:
            assert store.layout.records(key)["attempt"].tolist() == [2, 2]
            assert store.key_error(1, key) == f"ValueError: {what}{'' if what == 'raise' else f' {key}'}"


@pytest.mark.parametrize("what", ["raise", "return"])
def test_keys_whose_traceback_has_no_place_are_given_up_too(tmp_path, monkeypatch, capfd, what):
    job = made(tmp_path, monkeypatch, f"no_place_{what}")
    how(job, what)
    (job.path / "workers").mkdir(exist_ok=True)
    (job.path / "workers/1").write_text("in the way")
    assert job.here("--worker.keys=a,b", monkeypatch=monkeypatch) == 3
    assert job.calls().count("1:a+b") == 3
    assert "row 1: attempt 3 failed: " in (err := capfd.readouterr().err) and "its traceback could not be kept" in err


def test_a_row_whose_folder_cannot_be_made_does_not_end_the_worker(tmp_path, monkeypatch):
    """Its process dies, and who finds that cannot write it down there."""
    source = MAIN.replace("    how =", "    if index == 1:\n        os.kill(os.getpid(), 9)\n    how =")
    job = made(tmp_path, monkeypatch, "dies", source=source, rows=False)
    how(job, "")
    (job.path / "workers").mkdir(exist_ok=True)
    (job.path / "workers/1").write_text("in the way")
    assert [job.run("--worker.retries=0")[0] for _ in range(2)] == [-signal.SIGKILL, 3]
    with Store.open(job.path) as store:
        assert store.completed().tolist() == [True, False, True, True] and failed_rows(store) == [1]


def test_a_failed_attempt_to_replace_a_key_leaves_its_value(tmp_path, monkeypatch, capfd):
    job = made(tmp_path, monkeypatch, "keeps")
    how(job, "")
    assert job.here("--worker.keys=a,b", monkeypatch=monkeypatch) == 0
    for what in ("return", "raise"):
        how(job, what)
        argv = ("--worker.keys=a", "--worker.index=0", "--worker.do_if_complete", "--worker.retries=0")
        assert job.here(*argv, monkeypatch=monkeypatch) == 1
        assert f"attempt 1 failed: {'a: ' * (what == 'return')}ValueError: {what}" in capfd.readouterr().err
        with Store.open(job.path) as store:
            assert store.rows("a").tolist() == [7.0] * 4 and list(verify(store)) == []


def test_a_crash_while_keys_are_replaced_leaves_the_old_values_or_the_new_ones(tmp_path, monkeypatch):
    """The process ends before each single operation on the disk."""

    class Crash(BaseException):
        pass

    with Store.create(tmp_path / "s", SPEC) as store:
        store.commit_many([0, 1], {"x": [1.0, 1.0], "a": [1.0, 1.0]})
    shutil.copytree(tmp_path / "s", tmp_path / "kept")
    left, seen = 0, set()
    real = {name: getattr(PosixDisk, name) for name in ("write", "sync", "put", "remove")}
    for name, call in real.items():

        def step(self, *what, call=call):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            call(self, *what)

        monkeypatch.setattr(PosixDisk, name, step)
    for stop in range(1, 100):
        shutil.rmtree(tmp_path / "s")
        shutil.copytree(tmp_path / "kept", tmp_path / "s")
        left = 0
        try:
            with KeyStore.of(tmp_path / "s", ["a", "b"]) as both:
                left = stop
                both.commit_many([0, 1], {"a": [2.0, 2.0], "b": [2.0, 2.0]}, replace=True)
        except Crash:
            ended = False
        else:
            ended = True
        left = 0
        with Store.open(tmp_path / "s") as store:
            assert list(verify(store)) == [] and store.completed()[:2].all()
            held = [store.rows("a", [row]).tolist()[0] for row in (0, 1)]  # an error where it is lost
            seen.add(tuple(held))
            assert set(held) <= {1.0, 2.0} and set(store.rows("b").tolist()) <= {2.0}
            assert os.listdir(store.path / "_replace") == [] if (store.path / "_replace").exists() else stop < 3
        if ended:
            break
    assert stop > 10 and seen == {(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)} and held == [2.0, 2.0]


@pytest.fixture
def cut_short(tmp_path):
    """A replacement of key a of row 0 that a process died in, found by one that has opened the store before that."""
    with Store.create(tmp_path / "s", SPEC) as store:
        store.commit_many([0], {"x": [1.0], "a": [1.0]})
        commits.write_journal(store.layout, 0, {"a": np.float64(2).tobytes()}, None, "of a process that died")
        yield store


def test_a_replacement_that_was_cut_short_does_not_undo_what_is_committed_after_it(cut_short):
    with KeyStore.of(cut_short.path, ["b"]) as filler:
        assert cut_short.rows("a").tolist() == [2.0], "to open the store is to finish it"
        commits.write_journal(filler.whole, 0, {"b": np.float64(3).tobytes()}, None, "of another that died")
        filler.commit_many([0], {"b": [4.0]})  # of a row that lacked it when the attempt began
        assert filler.rows("b").tolist() == [4.0]
        with pytest.raises(RowError, match="row 0: has b already"):
            filler.commit_many([0], {"b": [5.0]})
    with Store.open(cut_short.path) as store:
        assert store.rows("b").tolist() == [4.0] and os.listdir(store.path / "_replace") == []


def test_a_replacement_that_was_cut_short_does_not_bring_back_what_is_cleared(cut_short):
    reset(cut_short, [0], keys=["a"])
    with Store.open(cut_short.path) as store:
        assert store.rows("a").tolist() == [] and store.completed()[0]
        commits.write_journal(store.layout, 0, {"a": np.float64(2).tobytes()}, None, "of a process that died")
        commits.clear(store.layout, [0])  # and no further: the journal is left
    with Store.open(cut_short.path) as store:
        assert os.listdir(store.path / "_replace") == [] and store.layout.records("a")["status"].tolist() == [0] * 4


def test_a_key_that_is_being_replaced_does_not_pass_for_one_that_a_row_lacks(cut_short):
    commits.clear_keys(cut_short.layout, [0], ["a"])
    with pytest.raises(StoreError, match="row 0, 'a': is being replaced"):
        cut_short.rows("a")
    assert cut_short.rows("b").tolist() == []


def test_the_journal_of_keys_is_checked(cut_short):
    path = cut_short.path / "_replace/0"
    whole = path.read_bytes()
    commits.write_journal(cut_short.layout, 0, {"a": b"short"}, None, "r")
    with pytest.raises(StoreError, match="damaged"):
        commits.read_journal(cut_short.layout, 0)
    path.write_bytes(whole[:-9] + b"!" + whole[-8:])
    with pytest.raises(StoreError, match="damaged"):
        commits.read_journal(cut_short.layout, 0)
    path.write_bytes(whole)
    assert commits.read_journal(cut_short.layout, 0)[1:] == (None, {"a": np.float64(2).tobytes()})


def test_an_exception_does_not_keep_what_main_had_in_hand(tmp_path, monkeypatch):
    source = """
import weakref

class Features:
    pass

before, kept = [], []

def measure(features, key):
    raise ValueError(key) from TypeError("its cause")

def main(*, index, keys):
    kept.append(sum(each() is not None for each in before))
    features = Features()
    before.append(weakref.ref(features))
    out = {"x": index}
    for key in keys[1:]:
        try:
            measure(features, key)
        except ValueError as error:
            out[key] = error
    return out
"""
    job = made(tmp_path, monkeypatch, "frames", source=source, rows=False)
    gc.disable()
    try:
        assert job.here(monkeypatch=monkeypatch) == 0
    finally:
        gc.enable()
    import frames

    assert frames.kept == [0, 0, 0, 0]
    with Store.open(job.path) as store:
        report = json.loads((store.path / "workers/2/attempt-keys-1.json").read_text())
        assert (
            "raise ValueError(key)" in report["failed"][1]["traceback"]
            and "its cause" in report["failed"][1]["traceback"]
        )


def test_all_keys_of_a_row_that_fail_together_cost_one_file(tmp_path, monkeypatch):
    spec = {"num_models": 1, "schema": {"x": SPEC["schema"]["x"], **LONG}}
    files, real = [], PosixDisk.put
    with Store.create(tmp_path / "s", spec) as store:
        monkeypatch.setattr(PosixDisk, "put", lambda self, name, data: (files.append(name), real(self, name, data)))
        store.commit_many([0], {"x": [1.0], **{key: [ValueError(key)] for key in LONG}})
        assert files == ["workers/0/attempt-keys-1.json"]
        assert [store.key_error(0, key) for key in LONG] == [f"ValueError: {key}" for key in LONG]


def test_who_fills_in_keys_does_not_look_through_all_runs(tmp_path, monkeypatch):
    real, listed = PosixDisk.list, []
    with Store.create(tmp_path / "s", SPEC) as store:
        store.commit_many([0], {"x": [1.0]})
    with KeyStore.of(tmp_path / "s", ["a"]) as filler:
        monkeypatch.setattr(PosixDisk, "list", lambda self, name: (listed.append(name), real(self, name))[1])
        assert filler.run.take(0)
        filler.begin([0])
        filler.fail(0, 1, "no")
        filler.begin([0])
        filler.commit_many([0], {"a": [1.0]})
        filler.run.release(0, done=True)
    assert "runs" not in listed


def test_main_is_asked_only_for_what_a_row_lacks(tmp_path, monkeypatch):
    job = made(tmp_path, monkeypatch, "lacks")
    how(job, "")
    with KeyStore.of(job.path, ["a"], sync=False) as filler:
        filler.commit_many([1, 2], {"a": [1.0, 1.0]})
    assert job.here("--worker.keys=a,b", monkeypatch=monkeypatch) == 0
    assert sorted(job.calls()) == ["0:a+b", "1:b", "2:b", "3:a+b"]
    with Store.open(job.path) as store:
        assert store.rows("a").tolist() == [7.0, 1.0, 1.0, 7.0] and store.rows("b").tolist() == [7.0] * 4
    assert job.here("--worker.keys=a,b", "--worker.index=1", "--worker.do_if_complete", monkeypatch=monkeypatch) == 0
    assert job.calls()[-1] == "1:a+b" and job.array("a").tolist() == [7.0, 7.0, 1.0, 7.0]


def test_main_many_is_asked_for_what_any_of_its_rows_lacks(tmp_path, monkeypatch):
    source = CALLED + (
        "def main_many(*, indices, keys):\n    called('+'.join(keys))\n"
        "    return {key: [5.0] * len(indices) for key in keys}\n"
    )
    job = made(tmp_path, monkeypatch, "lacks_many", source=source)
    with KeyStore.of(job.path, ["a"], sync=False) as filler:
        filler.commit_many([0, 1, 2], {"a": [1.0] * 3})
    assert job.here("--worker.keys=a,b", "--worker.batch=4", monkeypatch=monkeypatch) == 0
    assert job.calls() == ["a+b"] and job.array("a").tolist() == [1.0, 1.0, 1.0, 5.0]


def test_a_key_that_was_tried_too_often_does_not_keep_others_from_being_tried(tmp_path, monkeypatch):
    job = made(tmp_path, monkeypatch, "spent")
    how(job, "return")
    assert job.here("--worker.keys=a", "--worker.retries=0", monkeypatch=monkeypatch) == 3
    how(job, "")
    assert job.here("--worker.keys=a,b", "--worker.retries=0", monkeypatch=monkeypatch) == 3  # a is left
    assert set(job.calls()[4:]) == {f"{row}:b" for row in range(4)} and len(job.calls()) == 8
    with Store.open(job.path) as store:
        assert store.rows("b").tolist() == [7.0] * 4 and failed_rows(store) == []
        assert failed_rows(store, ["b"]) == [] and failed_rows(store, ["b", "a"]) == [0, 1, 2, 3]
    assert tool(["reset", str(job.path), "--rows=failed", "--keys=a"]) == 0
    assert job.here("--worker.keys=a", "--worker.retries=0", monkeypatch=monkeypatch) == 0
    assert job.array("a").tolist() == [7.0] * 4


def test_the_error_of_a_key_is_that_of_its_last_attempt_also_after_a_reset(tmp_path):
    with Store.create(tmp_path / "s", SPEC) as store:
        store.commit_many([0], {"x": [1.0], "a": [ValueError("first")]})
    with KeyStore.of(tmp_path / "s", ["a"]) as filler:
        filler.run.take(0)
        filler.begin([0])
        filler.fail(0, 2, "ValueError: second")
        assert filler.key_error(0, "a") == filler.last_error(0) == "ValueError: second"
        filler.run.release(0, done=False)
        with Store.open(tmp_path / "s") as store:
            reset(store, [0], keys=["a"])
            assert store.key_error(0, "a") == ""
        filler.run.take(0)
        filler.begin([0])
        filler.fail(0, 1, "ValueError: after the reset")
        assert filler.key_error(0, "a") == "ValueError: after the reset"


def test_a_key_that_was_never_tried_is_not_marked_when_a_row_is_given_back(tmp_path):
    with Store.create(tmp_path / "s", SPEC) as store:
        store.commit_many([0], {"x": [1.0], "a": [ValueError("no")]})
    with KeyStore.of(tmp_path / "s", ["a", "b"]) as both:
        before = both.whole.records("a", [0]).copy(), both.whole.records("b", [0]).copy()
        both.run.take(0)
        both.give_back(0, both.begin([0])[0])
        assert both.whole.records("b", [0]) == before[1] == np.zeros((), commits.KEY_RECORD)
        (after,) = both.whole.records("a", [0])
        assert (after["status"], after["attempt"]) == (before[0]["status"][0], before[0]["attempt"][0])
        assert both.key_error(0, "a") == "ValueError: no"


def test_copies_of_a_store_know_what_failed_and_how_often(tmp_path):
    spec = {**SPEC, "schema": {**SPEC["schema"], "mask": {"shape": [16], "dtype": "bool", "required": False}}}
    with Store.create(tmp_path / "s", spec) as store:
        store.commit_many([0, 2], {"x": [1.0, 3.0], "a": [ValueError("no"), 1.0], "mask": [ValueError("m")] * 2})
    with KeyStore.of(tmp_path / "s", ["a"]) as filler:
        filler.run.take(0)
        filler.begin([0])
        filler.fail(0, 2, "ValueError: still not")
    merge([tmp_path / "s"], tmp_path / "merged")
    compact(tmp_path / "s", tmp_path / "compact")
    for name in ("merged", "compact"):
        with Store.open(tmp_path / name) as store:
            records = store.layout.records("a", [0, 2])
            assert records["status"].tolist() == [commits.KEY_FAILED, commits.VALID] and records["attempt"][0] == 2
            assert store.key_error(0, "a") == "ValueError: still not" and store.rows("a").tolist() == [1.0]
            assert store.key_error(2, "mask") == "ValueError: m" and list(verify(store)) == []
            assert np.isnan(store["a"][0]) and not store["mask"][0].any()


def test_a_row_that_is_held_for_other_keys_is_named(tmp_path, monkeypatch):
    source = MAIN.replace(
        "    how =", "    while index == 1 and 'a' in keys and not os.path.exists('go'):\n        pass\n    how ="
    )
    job = made(tmp_path, monkeypatch, "held_for_a", source=source)
    how(job, "")
    first = job.start("--worker.keys=a", "--worker.index=1")
    until(lambda: "1:a" in job.calls())
    code, out, err = job.run("--worker.keys=b")
    assert (code, out) == (3, "3 rows committed, 0 attempts failed\n")
    assert "rows 1 are held by others, who do not fill in b; run this again when they have ended" in err
    assert job.run("--worker.keys=a")[0] == 0  # it is being made, by the other
    (job.folder / "go").touch()
    assert finish(first)[0] == 0 and job.run("--worker.keys=b")[0] == 0
    assert job.array("b").tolist() == [7.0] * 4


def test_a_text_that_failed_is_empty_in_the_raw_array(tmp_path):
    spec = {
        "num_models": 1,
        "schema": {"x": SPEC["schema"]["x"], "t": {"shape": [2], "dtype": "U3", "required": False}},
    }
    with Store.create(tmp_path / "s", spec) as store:
        store.commit_many([0], {"x": [1.0], "t": [ValueError("no")]})
        assert store["t"][0].tolist() == ["", ""]


def test_one_exception_of_main_many_is_that_of_all_its_rows(tmp_path, monkeypatch):
    source = (
        "def main_many(*, indices):\n"
        "    return {'x': [1.0] * len(indices), 'a': ValueError('no row has it'), 'b': [2.0] * len(indices)}\n"
    )
    job = made(tmp_path, monkeypatch, "whole_key", source=source, rows=False)
    assert job.here("--worker.batch=4", monkeypatch=monkeypatch) == 0
    with Store.open(job.path) as store:
        assert [store.key_error(row, "a") for row in range(4)] == ["ValueError: no row has it"] * 4
        assert store.rows("b").tolist() == [2.0] * 4


def test_an_exception_that_cannot_be_printed_fails_its_row_and_no_more(tmp_path, monkeypatch, capfd):
    source = """
class Mute(Exception):
    def __str__(self):
        raise RuntimeError("not a word")

def main(index):
    return {"x": Mute() if index == 1 else index, "a": Mute()}
"""
    job = made(tmp_path, monkeypatch, "mute", source=source, rows=False)
    assert job.here("--worker.retries=0", monkeypatch=monkeypatch) == 3
    assert (
        "row 1, 'x': main returned mute.Mute: <exception str() failed>; this key is required" in capfd.readouterr().err
    )
    assert job.completed == [True, False, True, True]
