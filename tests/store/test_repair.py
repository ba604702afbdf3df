"""`verify` finds every flipped bit of a complete row; `repair` leaves the row exact or to be run again, never wrong."""

import json
import os

import numpy as np
import pytest

from datamodels.errors import StoreError
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.repair import repair

SPEC = {
    "num_models": 5,
    "schema": {
        "margins": {"shape": [2], "dtype": "float32"},
        "tag": {"shape": [], "dtype": "U1"},
        "hit": {"shape": [9], "dtype": "bits"},
        "extra": {"shape": [], "dtype": "float64", "required": False},
        "other": {"shape": [], "dtype": "int16", "required": False},
        "none": {"shape": [0], "dtype": "int8"},
    },
}
ROW = 2


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "store", SPEC, sync=False) as made:
        commit(made, [1, ROW, 3])
        yield made


def values(row):
    return {
        "margins": np.array([row, -row], "float32"),
        "tag": "abcde"[row],
        "hit": np.arange(9) % (row + 1) == 0,
        "extra": row / 7,
        "none": [],
    }


def commit(store, rows, **more):
    store.commit_many(rows, {key: [values(row)[key] for row in rows] for key in values(0)}, **more)


def exact(store, row):
    return all(np.array_equal(store.rows(key, [row])[0], value) for key, value in values(row).items())


def places(store, row):
    """(file, offset, bytes) of everything that a row is on disk."""
    yield "_completed.npy", store.layout.heads["_completed.npy"] + row, 1
    yield "_rows.npy", store.layout.heads["_rows.npy"] + 64 * row, 64
    for key, field in store.spec.schema.items():
        yield f"_keys/{key}.npy", store.layout.heads[f"_keys/{key}.npy"] + 16 * row, 16
        if key != "other":  # which the row does not have
            yield f"{key}.npy", store.layout.heads[f"{key}.npy"] + field.nbytes * row, field.nbytes


def flip(store, file, offset, bit):
    with open(store.path / file, "r+b") as opened:
        opened.seek(offset)
        (byte,) = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte ^ 1 << bit]))


def overwrite(store, file, offset, data):
    with open(store.path / file, "r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def bits(store, row):
    return [
        (file, offset, bit)
        for file, start, size in places(store, row)
        for offset in range(start, start + size)
        for bit in range(8)
    ]


def test_every_flipped_bit_of_a_complete_row_is_found_and_repaired(store):
    """Of the values the row is run again, or loses an optional key; of anything else it is whole again, to the bit."""
    before = {file: (store.path / file).read_bytes() for file, _, _ in places(store, ROW)}
    every = bits(store, ROW)
    assert len(every) == 8 * (1 + 64 + 6 * 16 + 8 + 4 + 2 + 8)
    for file, offset, bit in every:
        flip(store, file, offset, bit)
        where = f"{file}, byte {offset}, bit {bit}"
        assert {problem.row for problem in verify(store, threads=1)} == {ROW}, where
        did = list(repair(store))
        assert {step.row for step in did} == {ROW} and all(step.done for step in did), where
        if file in ("margins.npy", "tag.npy", "hit.npy"):
            assert not store.completed()[ROW] and not store.layout.row_records([ROW])["attempts"][0], where
            commit(store, [ROW])
            changed = before
        elif file == "extra.npy":
            assert store.completed()[ROW] and store.rows("extra").tolist() == [1 / 7, 3 / 7], where
            commit(store, [ROW], replace=True)
            changed = before
        else:
            assert (store.path / file).read_bytes() == before[file], where
            changed = {}
        assert list(verify(store, threads=1)) == [] and exact(store, ROW), where
        for name in changed:
            (store.path / name).write_bytes(before[name])


def test_a_dry_run_says_what_a_repair_then_does(store):
    rng = np.random.default_rng(0)
    every = [spot for row in (1, ROW, 3) for spot in bits(store, row)]
    for _ in range(20):
        for place in rng.choice(len(every), size=3, replace=False):
            flip(store, *every[place])
        before = {file: (store.path / file).read_bytes() for file, _, _ in places(store, ROW)}
        planned = list(repair(store, dry_run=True))
        assert before == {file: (store.path / file).read_bytes() for file in before}
        assert planned == list(repair(store)) and planned
        assert list(verify(store)) == [] and list(repair(store)) == []
        for row in (1, ROW, 3):
            commit(store, [row], replace=True)
            assert exact(store, row)


@pytest.mark.parametrize("flag", [0, 1, 9])
def test_a_record_beyond_recognition(store, flag):
    """Is rebuilt where the flag says complete and the keys agree; otherwise the row is run again."""
    overwrite(store, "_rows.npy", store.layout.heads["_rows.npy"] + 64 * ROW, b"x" * 64)
    overwrite(store, "_completed.npy", store.layout.heads["_completed.npy"] + ROW, bytes([flag]))
    assert {problem.row for problem in verify(store)} == {ROW}
    did = [str(step) for step in repair(store)]
    assert list(verify(store)) == []
    assert store.completed().tolist() == [False, True, flag == 1, True, False]
    if flag == 1:
        assert did == [f"row {ROW}: rebuilt its damaged record, without its times and run"] and exact(store, ROW)
        record = store.layout.row_records([ROW])[0]
        assert record["attempts"] == 1 and record["seed"] == store.design.seed(ROW) and record["run"] == b""
    else:
        assert store.layout.row_records([ROW])[0].tobytes() == bytes(64)


@pytest.mark.parametrize(("key", "stays"), [("margins", False), ("extra", True)])
def test_a_record_is_not_put_back_where_the_bytes_do_not_agree_with_it(store, key, stays):
    flip(store, f"_keys/{key}.npy", store.layout.heads[f"_keys/{key}.npy"] + 16 * ROW + 5, 2)
    flip(store, f"{key}.npy", store.layout.heads[f"{key}.npy"] + 8 * ROW, 2)
    (step,) = repair(store)
    assert step.what.startswith(
        "'extra': its record is damaged; it is optional" if stays else "cleared, it will be run"
    )
    assert store.completed()[ROW] == stays and list(verify(store)) == []


def test_a_damaged_record_of_a_row_that_failed(store):
    store.run.take(4)
    store.begin([4])
    store.fail(4, 1, "no")
    store.run.release(4, done=False)
    flip(store, "_rows.npy", store.layout.heads["_rows.npy"] + 64 * 4 + 4, 7)
    assert [str(problem) for problem in verify(store)] == ["row 4: its record in _rows.npy is damaged"]
    assert [str(step) for step in repair(store)] == ["row 4: put back a flipped bit of its record"]
    assert store.status().failed == 1 and store.layout.row_records([4])["attempts"][0] == 1
    flip(store, "_completed.npy", store.layout.heads["_completed.npy"] + 4, 0)  # marked complete by a flipped bit
    assert [str(step)[:38] for step in repair(store)] == ["row 4: its completed flag was 1: taken"]
    assert store.status().failed == 1 and list(verify(store)) == []


def test_rows_that_a_worker_holds_are_left_and_named(store):
    flip(store, "margins.npy", store.layout.heads["margins.npy"] + 8 * ROW, 3)
    flip(store, "margins.npy", store.layout.heads["margins.npy"] + 8 * 3, 3)
    with Store.open(store.path) as worker:
        assert worker.run.take(ROW)
        left, repaired = list(repair(store))
        assert (left.row, left.done, repaired.row, repaired.done) == (ROW, False, 3, True)
        assert f"held by run {worker.run.id} on " in left.what and f"process {os.getpid()};" in left.what
        assert store.completed()[ROW] and not store.completed()[3]
    assert [step.done for step in repair(store)] == [True]


def test_a_row_that_is_being_committed_is_no_problem(store, monkeypatch):
    """Between the records and the flag a row looks like one that lost its flag."""
    seen, real = [], commits.Layout.write

    def write(layout, name, rows, blobs, guard):
        if name == commits.COMPLETED_FILE and blobs[0] == b"\1":
            with Store.open(store.path) as other:
                seen.append([list(verify(other)), [str(step) for step in repair(other)]])
        real(layout, name, rows, blobs, guard)

    monkeypatch.setattr(commits.Layout, "write", write)
    commit(store, [4])
    monkeypatch.undo()
    ((problems, steps),) = seen
    assert [problem.row for problem in problems] == [4]  # it takes longer than verify waits
    assert len(steps) == 1 and "row 4: left as it is: held by" in steps[0]
    assert store.completed()[4] and list(verify(store)) == []


@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_journal_is_removed_and_those_behind_it_are_applied(store, complete):
    for row in (ROW, 3):
        blobs = store.encode(row, values(row))
        commits.write_journal(store.layout, row, blobs, commits.RowInfo(2, 0.0, 0), "somebody")
    overwrite(store, f"_replace/{ROW}", 60, b"!!")
    if not complete:
        overwrite(store, "margins.npy", store.layout.heads["margins.npy"] + 8 * ROW, b"!")
    with Store.open(store.path) as other:
        assert os.listdir(store.path / "_replace") == [str(ROW)], "a damaged journal keeps others from being applied"
        steps = [str(step) for step in repair(other)]
    assert steps[0] == f"row {ROW}: removed the damaged journal of a replacement that was cut short"
    assert len(steps) == 2 - complete and store.completed()[ROW] == complete
    assert os.listdir(store.path / "_replace") == [] and list(verify(store)) == []


def test_nothing_else_is_touched(store):
    before = {path: path.read_bytes() for path in store.path.rglob("*.npy")}
    assert list(repair(store)) == []
    assert before == {path: path.read_bytes() for path in store.path.rglob("*.npy")}


def test_on_the_command_line(store, capsys):
    path = str(store.path)
    assert command.main(["repair", path]) == 0 and capsys.readouterr().out == "nothing to repair\n"
    flip(store, "margins.npy", store.layout.heads["margins.npy"] + 8 * ROW, 3)
    assert command.main(["verify", path]) == 1
    assert "problems: 1; python -m datamodels.store repair DIR --dry_run" in capsys.readouterr().out
    assert command.main(["verify", path, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 3 and [(p["row"], p["key"]) for p in facts["problems"]] == [(ROW, "margins")]
    line = f"row {ROW}: cleared, it will be run again: 'margins': its bytes are not what was committed (checksum)\n"
    assert command.main(["repair", path, "--dry_run"]) == 0
    assert capsys.readouterr().out == line + "1 row would be repaired (--dry_run)\n" and store.completed()[ROW]
    with Store.open(path) as worker:
        worker.run.take(ROW)
        assert command.main(["repair", path]) == 1
        assert "0 rows repaired, 1 left" in capsys.readouterr().out
    assert command.main(["repair", path]) == 0
    assert capsys.readouterr().out == line + "1 row repaired\n"
    assert command.main(["verify", path]) == 0


def test_every_chunk_of_a_large_store_is_checked_by_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodels.store.check._CHUNK_BYTES", 64)
    spec = {"num_models": 300, "schema": {"x": {"shape": [4], "dtype": "int32"}, "y": {"shape": [], "dtype": "int8"}}}
    with Store.create(tmp_path / "s", spec, sync=False) as store:
        rows = np.delete(np.arange(300), [0, 77])
        store.commit_many(rows, {"x": np.outer(rows, [1, 2, 3, 4]), "y": rows % 100})
        bad = [1, 2, 76, 150, 299]
        for row in bad:
            flip(store, "x.npy", store.layout.heads["x.npy"] + 16 * row + 5, 0)
        for threads in (1, 2, 5):
            seen = []
            assert [(p.row, p.key) for p in verify(store, seen.append, threads=threads)] == [(r, "x") for r in bad]
            assert sum(seen) == 298 * 17
        (tmp_path / "s/x.npy").write_bytes(b"")
        with pytest.raises(StoreError, match="x.npy: ends at byte"):
            list(verify(store))
