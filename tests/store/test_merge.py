"""Stores of different machines become one: every row bit for bit, none half, and what disagrees is said."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import StoreError
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import commit as commits
from datamodels.store import merge as merge_module
from datamodels.store import rows as rows_module
from datamodels.store.arrays import arrays
from datamodels.store.check import verify
from datamodels.store.grow import grow
from datamodels.store.merge import copy_rows, merge
from datamodels.store.rows import read_rows
from tests.faults.memory import Crash, MemoryDisk

ROOT = Path(__file__).parent.parent.parent
SPEC = {
    "schema": {
        "masks": {"shape": [20], "dtype": "bits"},
        "lr": {"shape": [], "dtype": "float64"},
        "y": {"shape": [3], "dtype": "float16", "allow_nonfinite": True},
        "note": {"shape": [], "dtype": "U5", "required": False},
    },
    "design": [
        {"sampler": "stratified", "labels": "labels.npy", "masks": 4, "seed": 1, "choices": {"lr": [0.1, 0.2]}},
        {"role": "eval", "sampler": "bernoulli", "masks": 1, "repeats": 2, "seed": 2, "choices": {"lr": [0.1]}},
    ],
}
ROWS = 10
QUIET_NAN = np.array([0x7E01], "u2").view("f2")[0]  # a payload that arithmetic would lose


def value(row, version=0):
    return np.array([row + version / 8, -0.0, QUIET_NAN], "f2")


def fill(path, rows, spec=SPEC, version=0, notes=True):
    """A store with some rows, each in a commit of its own, and a folder for those that are even."""
    np.save(path.parent / "labels.npy", np.arange(20) % 3)
    (path.parent / "spec.json").write_text(json.dumps(spec))
    with Store.create(path, path.parent / "spec.json", sync=False) as store:
        for row in rows:
            arrays = {"y": [value(row, version)]}
            if notes and row % 3 == 0:
                arrays["note"] = [f"n{row}"]
            assert store.run.take(row)
            store.begin([row])
            if row % 2 == 0:
                folder = path / "workers" / str(row)
                (folder / "checkpoints").mkdir(parents=True)
                (folder / "checkpoints" / "last.pt").write_bytes(bytes([row]) * 5000)
                (folder / "latest").symlink_to("checkpoints/last.pt")
                (folder / "main.log").write_text(f"row {row}")
            store.commit_many([row], arrays)
            store.run.release(row, done=True)
    return path


@pytest.fixture
def two(tmp_path):
    return fill(tmp_path / "A", [0, 1, 2, 3, 8]), fill(tmp_path / "B", [3, 4, 5, 6])


def same_rows(target, source, rows):
    """Everything that the files say of some rows, by plain numpy."""
    for path in sorted(source.glob("*.npy")) + sorted((source / "_keys").glob("*.npy")):
        mine = np.load(target / path.relative_to(source), allow_pickle=False)[list(rows)]
        assert mine.tobytes() == np.load(path, allow_pickle=False)[list(rows)].tobytes(), path.name


def folder(path):
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def fails(store, row, why):
    assert store.run.take(row)
    (attempts,) = store.begin([row])
    store.fail(row, attempts, f"Traceback (most recent call last):\n{why}")
    store.run.release(row, done=False)


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


# ------------------------------------------------------------------------------------ what is copied


def test_rows_with_their_records_runs_and_folders(two, tmp_path):
    merged = merge(two, tmp_path / "C")
    assert merged.created and merged.copied == 8 and merged.completed == 8 and merged.missing == ()
    assert [source.copied for source in merged.sources] == [5, 3]
    flags = np.load(tmp_path / "C" / "_completed.npy")
    assert flags.tolist() == [row in (0, 1, 2, 3, 4, 5, 6, 8) for row in range(ROWS)]
    same_rows(tmp_path / "C", two[0], [0, 1, 2, 3, 8])
    same_rows(tmp_path / "C", two[1], [4, 5, 6])
    for source, rows in zip(two, ([0, 2, 8], [4, 6]), strict=True):
        for row in rows:
            assert folder(tmp_path / "C" / "workers" / str(row)) == folder(source / "workers" / str(row))
        for run in (source / "runs").iterdir():
            assert (tmp_path / "C" / "runs" / run.name).read_bytes() == run.read_bytes()
    assert folder(tmp_path / "C" / "design") == folder(two[0] / "design") != {}
    with Store.open(tmp_path / "C") as store:
        assert list(verify(store)) == []
        runs = {name.removesuffix(".json") for name in os.listdir(tmp_path / "C" / "runs")}
        assert set(store.layout.row_records()["run"][flags].astype(str)) <= runs
        np.testing.assert_array_equal(store.rows("note"), ["n0", "n3", "n6"])


def test_a_second_time_there_is_nothing_to_do(two, tmp_path):
    merge(two, tmp_path / "C")
    before, times = folder(tmp_path / "C"), {p: p.lstat().st_mtime_ns for p in (tmp_path / "C").rglob("*")}
    again = merge(two, tmp_path / "C")
    assert (again.created, again.copied, again.missing) == (False, 0, ())
    assert folder(tmp_path / "C") == before
    assert {p: p.lstat().st_mtime_ns for p in (tmp_path / "C").rglob("*")} == times


def test_into_a_store_that_has_rows_of_its_own(two, tmp_path):
    fill(tmp_path / "C", [1, 9])
    with Store.open(two[0]) as store:
        fails(store, 9, "ValueError: of no interest, since the target has the row")
    before = {row: np.load(tmp_path / "C" / "_rows.npy")[row].tobytes() for row in (1, 9)}
    merged = merge(two, tmp_path / "C")
    assert not merged.created and [source.copied for source in merged.sources] == [4, 3] and merged.completed == 9
    assert [source.failed for source in merged.sources] == [0, 0]
    records = np.load(tmp_path / "C" / "_rows.npy")
    assert {row: records[row].tobytes() for row in (1, 9)} == before
    same_rows(tmp_path / "C", two[0], [0, 2, 3, 8])


def test_what_failed_in_the_target_stays_beside_what_the_source_made(two, tmp_path):
    fill(tmp_path / "C", [])
    with Store.open(tmp_path / "C") as store:
        fails(store, 2, "ValueError: here")
    own = (tmp_path / "C" / "workers" / "2" / "attempt-1.json").read_bytes()
    with Store.open(two[0]) as source:  # the source's row failed once as well, before it was done
        shutil.copy(source.fail(9, 1, "Traceback\nValueError: there"), two[0] / "workers" / "2" / "attempt-1.json")
    merge(two, tmp_path / "C")
    found = folder(tmp_path / "C" / "workers" / "2")
    assert found.pop("attempt-1.json.replaced-1") == own
    assert found == folder(two[0] / "workers" / "2")


def test_optional_keys_that_different_stores_filled_come_together(tmp_path, capsys):
    first = fill(tmp_path / "A", [0, 1, 3, 6], notes=False)
    second = shutil.copytree(first, tmp_path / "B", symlinks=True)
    third = shutil.copytree(first, tmp_path / "C", symlinks=True)
    for path, rows in ((second, [0, 1]), (third, [3])):
        with Store.open(path) as store:
            store.commit_many(
                rows, {"y": [value(row) for row in rows], "note": [f"n{row}" for row in rows]}, replace=True
            )
    records = (first / "_rows.npy").read_bytes()
    for target in (first, tmp_path / "D"):
        assert command.main(["merge", str(first), str(second), str(third), f"--into={tmp_path}/D"]) == 0
        if target == first:
            assert f"{second}: 4 rows complete, 0 copied, note added to 2 that were there" in capsys.readouterr().out
    assert command.main(["merge", str(second), str(third), f"--into={first}"]) == 0
    for target in (first, tmp_path / "D"):
        assert (target / "_rows.npy").read_bytes() == records
        with Store.open(target) as store:
            assert list(verify(store)) == []
            assert store.rows("note").tolist() == ["n0", "n1", "n3"]
            assert store.rows("note", [0, 1, 3]).tolist() == ["n0", "n1", "n3"]
    with holding(tmp_path / "D", 6), Store.open(second) as store:
        store.commit_many([6], {"y": [value(6)], "note": ["n6"]}, replace=True)
        merged = merge([second], tmp_path / "D")
    assert merged.busy == merged.missing == (6,) and merge([second], tmp_path / "D").sources[0].keys == {"note": 1}


def test_folders_are_durable_before_their_rows_and_few_at_once(two, tmp_path, monkeypatch):
    steps = []
    whole, commit = merge_module.files.whole, Store.commit_encoded

    def write(path, *, sync=True):
        if "workers" in str(path):
            steps.append((int(path.parts[len(tmp_path.parts) + 2]), sync))
        return whole(path, sync=sync)

    def count(store, encoded, **more):
        steps.append(list(encoded))
        assert list(store.run.claims) == list(encoded)
        return commit(store, encoded, **more)

    monkeypatch.setattr(merge_module, "_FOLDERS_AT_ONCE", 2)
    monkeypatch.setattr(merge_module.files, "whole", write)
    monkeypatch.setattr(Store, "commit_encoded", count)
    merge(two, tmp_path / "C")
    twice = [(row, True) for row in (0, 0, 2, 2, 8, 8, 4, 4, 6, 6)]
    assert steps == [*twice[:4], [0, 1, 2], *twice[4:6], [3, 8], *twice[6:], [4, 5, 6]]


def test_a_run_that_went_on_is_brought_up_to_date(two, tmp_path):
    merge(two, tmp_path / "C")
    with Store.open(two[0]) as store:
        store.commit_many([7], {"y": [value(7)]})
        (run,) = {p.name for p in (two[0] / "runs").iterdir()} - {p.name for p in (tmp_path / "C" / "runs").iterdir()}
        merge(two, tmp_path / "C")
        early = (tmp_path / "C" / "runs" / run).read_bytes()
        store.commit_many([9], {"y": [value(9)]})
    merge(two, tmp_path / "C")
    assert early != (tmp_path / "C" / "runs" / run).read_bytes() == (two[0] / "runs" / run).read_bytes()


def test_a_row_is_of_one_commit_while_it_is_replaced(two, monkeypatch):
    read = rows_module._read_key
    with Store.open(two[0]) as store:

        def slow(store, field, rows, damaged):
            found = read(store, field, rows, damaged)
            if field.name == "masks" and not damaged:
                store.commit_many([1], {"y": [value(1, 1)]}, replace=True)
            return found

        monkeypatch.setattr(rows_module, "_read_key", slow)
        found = read_rows(store, [0, 1, 2], ["masks", "y"])
    assert found.rows == [0, 2] and "changed while it was read" in found.damaged[1]


def test_a_row_whose_flag_is_taken_back_while_it_is_read_is_not_complete(two, monkeypatch):
    with Store.open(two[0]) as store:
        store.layout.write(commits.COMPLETED_FILE, [1], [b"\0"], lambda: None)
        found = read_rows(store, [0, 1, 2], ["masks", "y"])
    assert found.rows == [0, 2] and "changed while it was read" in found.damaged[1]


def meanwhile(monkeypatch, call):
    """Do something when a merge has begun to read."""
    read = merge_module.read_rows

    def then(*args, **more):
        if then.call:
            then.call, now = None, then.call
            now()
        return read(*args, **more)

    then.call = call
    monkeypatch.setattr(merge_module, "read_rows", then)


def test_a_row_that_somebody_completes_meanwhile_is_theirs(two, tmp_path, monkeypatch):
    def complete():
        with Store.open(tmp_path / "C") as store:
            store.commit_many([2], {"y": [value(2, 1)]})

    fill(tmp_path / "C", [])
    meanwhile(monkeypatch, complete)
    merged = merge(two, tmp_path / "C")
    assert merged.busy == (2,) and merged.missing == () and merged.copied == 7
    with Store.open(tmp_path / "C") as store:
        assert store.rows("y", [2]).tobytes() == value(2, 1).tobytes()
    with pytest.raises(StoreError, match="row 2 .y. in"):
        merge(two, tmp_path / "C")


def test_a_row_that_is_cleared_meanwhile_gets_no_key(tmp_path, monkeypatch):
    target, source = fill(tmp_path / "A", [0, 3], notes=False), fill(tmp_path / "B", [0, 3])
    meanwhile(monkeypatch, lambda: command.main(["reset", str(target), "--rows=3"]))
    merged = merge([source], target)
    assert merged.busy == merged.missing == (3,) and merged.sources[0].keys == {"note": 1}
    assert not np.load(target / "_keys" / "note.npy")["status"][3]
    assert merge([source], target).missing == ()


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_BYTES", 1 << 20)
    spec = {"num_models": 400, "schema": {"x": {"shape": [25_000], "dtype": "float32"}}}
    with Store.create(tmp_path / "A", spec, sync=False) as store:
        for start in range(0, 400, 40):
            store.commit_many(range(start, start + 40), {"x": np.full((40, 25_000), start, "f4")})
    tracemalloc.start()
    try:
        assert merge([tmp_path / "A"], tmp_path / "C").copied == 400
        assert tracemalloc.get_traced_memory()[1] < 12 << 20  # of 40 MB
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------ what is refused or left


def test_rows_that_disagree_are_named_and_nothing_is_written(two, tmp_path):
    fill(tmp_path / "other", [2, 3, 6, 8], version=1, notes=False)
    before = folder(two[0])
    with pytest.raises(StoreError) as refused:
        merge([*two, tmp_path / "other"], tmp_path / "C")
    said = str(refused.value)
    assert f"4 rows complete in two stores with different bytes: row 2 (y) in {two[0]} and {tmp_path}/other" in said
    assert f"row 6 (y) in {two[1]} and {tmp_path}/other" in said and "nothing is written" in said
    assert f"python -m datamodels.store reset {tmp_path}/other --rows=2,3,6,8" in said
    assert not (tmp_path / "C").exists()
    with pytest.raises(StoreError, match="row 2 .y. in"):
        merge([two[1], tmp_path / "other"], two[0])
    assert folder(two[0]) == before
    with Store.open(tmp_path / "other") as store:  # the advice works
        command.main(["reset", str(store.path), "--rows=2,3,6,8"])
    assert merge([*two, tmp_path / "other"], tmp_path / "C").missing == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["schema"]["y"].update(dtype="float32"), 'schema, \'y\', dtype: "float32" and "float16"'),
        (lambda s: s["schema"]["note"].update(required=True), "schema, 'note', required: true and false"),
        (lambda s: s["schema"].pop("note"), "schema: 'note' is in {A} only; give it to {B} with add-key"),
        (lambda s: s["design"][0].update(seed=3), "design[0], seed: 3 and 1"),
        (lambda s: s["design"][0]["choices"].update(lr=[0.1, 0.4]), "design[0], cells: [{{"),
        (lambda s: s["design"][1].update(alpha=0.25), "design[1], alpha: 0.25 and 0.5"),
        (lambda s: s["design"].append({"sampler": None, "count": 3, "seed": 5}), "num_models: 13 and 10"),
        (lambda s: s.update(measurements={"names": ["leep"]}), 'measurements: {{"names": ["leep"]}} and null'),
        (lambda s: s.update(measurements={"names": ["leep"], "samples": 5}), '"samples": 5}} and null'),
    ],
)
def test_specs_that_differ(tmp_path, change, said):
    spec = json.loads(json.dumps(SPEC))
    change(spec)
    fill(tmp_path / "A", [0, 1])
    fill(tmp_path / "C", [2])
    (tmp_path / "sub").mkdir()
    fill(tmp_path / "sub" / "B", [3] if "note" in spec["schema"] else [], spec)
    with pytest.raises(StoreError) as refused:
        merge([tmp_path / "A", tmp_path / "sub" / "B"], tmp_path / "C")
    assert said.format(A=tmp_path / "C", B=tmp_path / "sub" / "B") in str(refused.value)
    with Store.open(tmp_path / "C") as store:
        assert store.completed().sum() == 1


def test_files_of_the_design_that_differ(tmp_path):
    fill(tmp_path / "A", [0])
    (tmp_path / "sub").mkdir()
    fill(tmp_path / "sub" / "B", [1])
    np.save(tmp_path / "labels.npy", np.arange(20) % 4)
    Store.create(tmp_path / "B", tmp_path / "spec.json").close()
    with pytest.raises(StoreError, match=r"design\[0\], labels: "):
        merge([tmp_path / "A", tmp_path / "B"], tmp_path / "C")
    assert merge([tmp_path / "A", tmp_path / "sub" / "B"], tmp_path / "C").copied == 2


@pytest.mark.parametrize("order", [1, -1])
def test_a_store_from_before_it_grew(tmp_path, order):
    stores = [fill(tmp_path / "A", [0, 9]), fill(tmp_path / "B", [1])]
    grow(stores[1], block={"sampler": "bernoulli", "masks": 3, "choices": {"lr": [0.1]}})
    with Store.open(stores[1]) as store:
        store.commit_many([11], {"y": [value(11)]})
    merged = merge(stores[::order], tmp_path / "C")
    assert merged.num_models == 13 and merged.completed == 4
    same_rows(tmp_path / "C", stores[0], [0, 9])
    same_rows(tmp_path / "C", stores[1], [1, 11])
    assert (tmp_path / "C" / "spec.json").read_bytes() == (tmp_path / "B" / "spec.json").read_bytes()
    with pytest.raises(StoreError, match="num_models: 13 and 10; .*grow"):
        merge([stores[1]], stores[0])


@pytest.mark.parametrize("order", [1, -1])
def test_a_store_without_a_design_from_before_it_grew(tmp_path, order):
    for name, rows, mine in (("A", 4, [0, 3]), ("B", 7, [1, 6])):
        spec = {"num_models": rows, "schema": {"y": {"shape": [], "dtype": "int8"}}}
        with Store.create(tmp_path / name, spec) as store:
            store.commit_many(mine, {"y": mine})
    merged = merge([tmp_path / "A", tmp_path / "B"][::order], tmp_path / "C")
    assert merged.num_models == 7 and np.load(tmp_path / "C" / "y.npy").tolist() == [0, 1, 0, 3, 0, 0, 6]
    with pytest.raises(StoreError, match="num_models: 7 and 4; .*grow"):
        merge([tmp_path / "B"], tmp_path / "A")


def test_a_damaged_row_is_left_or_taken_from_another(two, tmp_path, capsys):
    head = os.path.getsize(two[0] / "y.npy") - ROWS * 6
    flip(two[0] / "y.npy", head + 3 * 6)
    flip(two[0] / "y.npy", head + 8 * 6)
    assert command.main(["merge", str(two[0]), "--into", str(tmp_path / "C")]) == 1
    said = capsys.readouterr().out
    assert "row 8 is damaged: 'y': its bytes are not what was committed (checksum)" in said
    assert "complete in a source and not here: 3, 8 (2); merge again" in said
    same_rows(tmp_path / "C", two[0], [0, 1, 2])
    assert command.main(["merge", *map(str, two), "--into", str(tmp_path / "D")]) == 1
    same_rows(tmp_path / "D", two[1], [3, 4, 5, 6])
    assert "not here: 8 (1);" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "place"), [("_rows.npy", 5), ("_keys/y.npy", 5), ("_keys/note.npy", 5), ("_keys/note.npy", 0)]
)
def test_a_damaged_record_is_no_row_to_copy(two, tmp_path, file, place):
    flip(two[0] / file, os.path.getsize(two[0] / file) - ROWS * (64 if file == "_rows.npy" else 16) + place)
    merged = merge(two, tmp_path / "C")
    assert list(merged.sources[0].damaged) == [0] and "record" in merged.sources[0].damaged[0]
    assert merged.missing == (0,) and merged.completed == 7


def test_a_damaged_record_is_no_key_that_a_row_lacks(two, tmp_path):
    """Both have row 3 complete, and one of them has a note of it."""
    fill(tmp_path / "C", [3], notes=False)
    flip(two[0] / "_keys/note.npy", os.path.getsize(two[0] / "_keys/note.npy") - (ROWS - 3) * 16)
    merged = merge([two[0]], tmp_path / "C")
    assert merged.sources[0].damaged == {3: "'note': its record is damaged"} and merged.missing == (3,)
    merge([two[1]], tmp_path / "C")
    same_rows(tmp_path / "C", two[1], [4, 5, 6])
    with Store.open(tmp_path / "C") as store:
        assert store.rows("note", [3]).tolist() == ["n3"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_damaged_checksum_disagrees_with_nobody(two, tmp_path, order):
    flip(two[0] / "_keys" / "y.npy", os.path.getsize(two[0] / "_keys" / "y.npy") - (ROWS - 3) * 16 + 8)
    assert merge(two[::order], tmp_path / "C").missing == ()
    same_rows(tmp_path / "C", two[1], [3, 4, 5, 6])
    fill(tmp_path / "other", [3], version=1)
    with pytest.raises(StoreError, match=f"row 3 .y. in {two[1]} and {tmp_path}/other"):
        merge([*two, tmp_path / "other"], tmp_path / "D")


def test_a_row_that_is_being_run_is_left_to_its_worker(two, tmp_path, capsys):
    fill(tmp_path / "C", [])
    with holding(tmp_path / "C", 4):
        assert command.main(["merge", *map(str, two), "--into", str(tmp_path / "C")]) == 1
        assert f"1 row is being run in {tmp_path}/C: 4" in (said := capsys.readouterr().out)
        assert "complete in a source and not here: 4 (1); merge again" in said
    assert not np.load(tmp_path / "C" / "_completed.npy")[4]
    assert command.main(["merge", *map(str, two), "--into", str(tmp_path / "C")]) == 0
    same_rows(tmp_path / "C", two[1], [4, 5, 6])


@contextlib.contextmanager
def holding(path, row):
    script = f"""
        import sys
        from datamodels.store import Store
        with Store.open({str(path)!r}) as store:
            print(store.run.take({row}), flush=True)
            sys.stdin.read()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], **pipes)
    try:
        assert process.stdout.readline() == "True\n"
        yield
    finally:
        process.communicate()


# ------------------------------------------------------------------------------------ the command


def test_the_command_and_its_exit_codes(two, tmp_path, capsys):
    for path in two:
        with Store.open(path) as store:
            fails(store, 9, "ValueError: no luck")
    argv = ["merge", *map(str, two), f"--into={tmp_path}/C"]
    assert command.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}/C: a new store"
    assert said[1].startswith(f"{two[0]}: 5 rows complete, 5 copied, ")
    assert said[2] == "  row 9 failed: 1 attempt, ValueError: no luck; left to be run"
    assert said[5].startswith(f"{tmp_path}/C: 8 of 10 rows complete, 8 copied")
    assert command.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("8 of 10 rows complete, nothing to do")

    def run(*argv):
        done = subprocess.run(
            [sys.executable, "-m", "datamodels.store", "merge", *map(str, argv)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    code, error = run(f"--into={tmp_path}/C")
    assert code == 2 and "expected the stores to merge" in error
    code, error = run(two[0])
    assert code == 2 and "--into" in error
    code, error = run(two[0], f"--into={two[0]}")
    assert code == 1 and "is the target and a source at once" in error
    code, error = run(tmp_path / "nowhere", f"--into={tmp_path}/D")
    assert code == 1 and "nowhere: not a store" in error and not (tmp_path / "D").exists()


# ------------------------------------------------------------------------------------ killed, and power cut

KILLED = """
import contextlib, os, signal, sys
sys.path.insert(0, sys.argv[1])
from datamodels.store import merge as module, disk, create
from datamodels import files

calls = 0
stop = 0


def counted(owner, name):
    real = getattr(owner, name)

    def call(*args, **more):
        global calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)

    setattr(owner, name, call)


for name in ("write", "pwrite", "fdatasync", "fsync", "replace", "rename", "symlink", "unlink", "mkdir", "link"):
    counted(os, name)
counted(disk, "_write_all")
for line in sys.stdin:
    words = line.split()
    stop = int(words[0])
    pid = os.fork()
    if pid == 0:
        calls = 0
        try:
            module.merge(words[2:], words[1])
        finally:
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_system_call_it_is_run_again_and_completes(tmp_path, step):
    small = {
        "num_models": 4,
        "schema": {"x": {"shape": [2], "dtype": "float32"}, "e": {"shape": [], "dtype": "int8", "required": False}},
    }
    for name, rows in (("A", [0, 1]), ("B", [1, 3])):
        with Store.create(tmp_path / name, small, sync=False) as store:
            (tmp_path / name / "workers" / str(rows[1])).mkdir()
            (tmp_path / name / "workers" / str(rows[1]) / "main.log").write_text(str(rows[1]))
            store.commit_many(rows, {"x": [[row, row] for row in rows], **({"e": [7, 8]} if name == "B" else {})})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(ROOT)], **pipes)
    kills = partly = 0
    try:
        for stop in range(1, 1000, step):
            target = tmp_path / f"C{stop}"
            process.stdin.write(f"{stop} {target} {tmp_path}/A {tmp_path}/B\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            if (target / "spec.json").exists():
                with Store.open(target) as store:
                    done = store.completed()
                    assert read_rows(store, np.flatnonzero(done).tolist(), ["x"]).damaged == {}, stop
                    partly += 0 < done.sum() < 3
                    for row in np.flatnonzero(done):
                        assert (np.load(target / "x.npy")[row] == row).all()
                    assert not done[1] or (target / "workers/1/main.log").read_text() == "1", stop
            merged = merge([tmp_path / "A", tmp_path / "B"], target)
            assert merged.completed == 3 and merged.missing == () and merged.busy == (), stop
            with Store.open(target) as store:
                assert list(verify(store)) == [], stop
            same_rows(target, tmp_path / "A", [0])
            same_rows(target, tmp_path / "B", [3])
            assert np.load(target / "x.npy")[1].tolist() == [1, 1] and np.load(target / "e.npy")[1] == 7, stop
            assert folder(target / "workers") == {"1/main.log": b"1", "3/main.log": b"3"}, stop
            shutil.rmtree(target)
            if status == 0:
                break
            assert status == -9
            kills += 1
    finally:
        process.communicate()
    assert kills > 70 // step and partly > 5 // step


def test_the_power_goes_out_at_any_operation(tmp_path):
    small = {"num_models": 4, "schema": {"x": {"shape": [70], "dtype": "float64"}, "n": {"shape": [], "dtype": "int8"}}}
    wanted = {}
    for name, rows in (("A", [0, 1]), ("B", [3])):
        with Store.create(tmp_path / name, small, sync=False) as store:
            store.commit_many(rows, {"x": [np.arange(70) + row for row in rows], "n": rows})
            wanted |= {row: store.layout.row_records([row]).tobytes() for row in rows}
    sources = [Store.open(tmp_path / name) for name in "AB"]
    with contextlib.ExitStack() as stack:
        for source in sources:
            stack.enter_context(source)
        real = stack.enter_context(Store.create(tmp_path / "C", small, sync=False))
        names = [name for name, _, _ in arrays(real.spec)]
        empty = {name: (real.path / name).read_bytes() for name in names}

        def on(disk):
            store = Store(
                real.path,
                real.spec,
                real.design,
                commits.Layout(disk, real.spec.schema, 4, real.layout.heads),
                disk,
                120.0,
            )
            store._run = real.run
            return store

        states = 0
        for stop in range(1, 1000):
            disk = MemoryDisk(empty, stop_at=stop)
            try:
                copy_rows(sources, on(disk), {}, lambda rows, total: None, created=False)
            except Crash:
                pass
            else:
                break
            for name, left in disk.survivors(draws=2, seed=stop):
                states += 1
                again = MemoryDisk(left)
                for row in np.flatnonzero(on(again).completed()).tolist():
                    assert check_row(on(again), row) == wanted[row], f"operation {stop}, {name}, row {row}"
                merged = copy_rows(sources, on(again), {}, lambda rows, total: None, created=False)
                assert merged.completed == 3 and not again.pending
                assert {row: check_row(on(again), row) for row in wanted} == wanted, f"operation {stop}, {name}"
    assert stop > 15 and states > 200


def check_row(store, row):
    found = read_rows(store, [row], ["x", "n"])
    assert found.damaged == {}
    assert bytes(found.blobs["x"][0]) == (np.arange(70.0) + row).tobytes() and bytes(found.blobs["n"][0]) == bytes(
        [row]
    )
    return found.records.tobytes()
