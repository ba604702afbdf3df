"""What a store promises of its files: refused is untouched, committed is readable by plain numpy, damaged is said."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import ClaimLost, RowError, SpecError, StoreError
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import commit as commits
from datamodels.store import store as store_module
from datamodels.store.check import verify
from datamodels.store.create import MARKER
from datamodels.store.disk import PosixDisk, filesystem
from tests.needs import missing

SPEC = {
    "num_models": 6,
    "schema": {
        "margins": {"shape": [5], "dtype": "float32"},
        "tag": {"shape": [], "dtype": "U4"},
        "hit": {"shape": [2, 9], "dtype": "bits"},
        "extra": {"shape": [], "dtype": "float64", "required": False, "allow_nonfinite": True},
        "none": {"shape": [0], "dtype": "int8", "required": False},
    },
}
DESIGNED = {
    "schema": {
        "masks": {"shape": [20], "dtype": "bits"},
        "lr": {"shape": [], "dtype": "float64"},
        "y": {"shape": [], "dtype": "int8"},
    },
    "design": [{"sampler": "bernoulli", "masks": 3, "seed": 1, "choices": {"lr": [0.1, 0.2]}}],
}


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "store", SPEC) as made:
        yield made


def values(row, version=0):
    rng = np.random.default_rng((row, version))
    return {
        "margins": rng.standard_normal(5).astype("float32"),
        "tag": f"r{row}v{version}",
        "hit": rng.random((2, 9)) < 0.5,
    }


def commit(store, rows, version=0, **more):
    rows = list(rows)
    arrays = {key: [values(row, version)[key] for row in rows] for key in ("margins", "tag", "hit")}
    store.commit_many(rows, arrays, **more)


def check(store, row, version=0):
    for key, value in values(row, version).items():
        np.testing.assert_array_equal(store.rows(key, [row])[0], value)


def everything(folder):
    """Every file of a folder but what says who is at work: bytes, or where a link leads."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if (p.is_symlink() or p.is_file()) and p.relative_to(folder).parts[0] not in ("runs", "claims")
    }


def python(script, *args, flags=(), **options):
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


# ------------------------------------------------------------------------------------ commits that are right


def test_plain_numpy_reads_what_was_committed(store):
    commit(store, [0, 3, 4])
    assert np.load(store.path / "_completed.npy").tolist() == [True, False, False, True, True, False]
    margins = np.load(store.path / "margins.npy", mmap_mode="r", allow_pickle=False)
    tags = np.load(store.path / "tag.npy", allow_pickle=False)
    hits = np.load(store.path / "hit.npy", allow_pickle=False)
    assert margins.shape == (6, 5) and margins.dtype == np.float32 and hits.shape == (6, 2, 2)
    for row in (0, 3, 4):
        np.testing.assert_array_equal(margins[row], values(row)["margins"])
        assert tags[row] == values(row)["tag"]
        np.testing.assert_array_equal(
            np.unpackbits(hits[row], axis=-1, count=9, bitorder="little").astype(bool), values(row)["hit"]
        )
    assert (margins[[1, 2, 5]] == 0).all()
    np.testing.assert_array_equal(store["margins"], margins)
    with pytest.raises(ValueError, match="read-only"):
        store["margins"][0] = 0
    assert np.load(store.path / "none.npy").shape == (6, 0)


def test_rows_come_as_asked(store):
    commit(store, [5, 0, 2, 3])
    assert store.rows("tag").tolist() == ["r0v0", "r2v0", "r3v0", "r5v0"]
    for rows in ([5, 0], [2, 2, 0, 2], [], np.array([3, 0], np.uint8), range(2, 4), (np.int64(5),)):
        assert store.rows("tag", rows).tolist() == [f"r{row}v0" for row in rows]
        assert store.rows("margins", rows).shape == (len(rows), 5)
        assert store.rows("hit", rows).shape == (len(rows), 2, 9) and store.rows("hit", rows).dtype == bool
        assert store.rows("hit", rows).flags.writeable
    with pytest.raises(StoreError, match=r"row 1 is not complete \(2 of the 3 rows"):
        store.rows("tag", [0, 1, 4])
    with pytest.raises(StoreError, match="no key 'tags'; did you mean 'tag'"):
        store.rows("tags")
    with pytest.raises(StoreError, match="no key"):
        store["../spec"]


def test_rows_near_and_far_and_in_pieces(tmp_path, monkeypatch):
    """What is near is read together, what is far is not, and a large request is read in pieces."""
    spec = {"num_models": 9000, "schema": {"x": {"shape": [5], "dtype": "int32"}}}
    with Store.create(tmp_path / "s", spec, sync=False) as store:
        some = np.unique(np.concatenate([np.arange(0, 9000, 7), [8000, 8001, 8002, 8999]]))
        store.commit_many(some, {"x": some[:, None] * np.arange(5)})
        monkeypatch.setattr(store_module, "_READ_ROWS", 100)
        for rows in (None, some[::-1], [8999, 0, 7, 7, 8001, 4200, 14], some[[3]]):
            expected = some if rows is None else np.asarray(rows)
            np.testing.assert_array_equal(store.rows("x", rows), expected[:, None] * np.arange(5))
        assert list(verify(store)) == []


def test_optional_keys(store):
    commit(store, [0, 1])
    store.commit_many([2], {**{k: [v] for k, v in values(2).items()}, "extra": [np.nan], "none": [[]]})
    assert np.isnan(store.rows("extra")).tolist() == [True] and store.rows("none").shape == (1, 0)
    with pytest.raises(StoreError, match="row 1, 'extra': it was never written"):
        store.rows("extra", [2, 1])
    assert list(verify(store)) == []
    # replaced without it, the row no longer has it
    commit(store, [2], 1, replace=True)
    assert store.rows("extra").shape == (0,) and list(verify(store)) == []


def test_replace_is_asked_for(store):
    commit(store, [1, 2])
    before = everything(store.path)
    with pytest.raises(RowError, match="row 1: already complete; nothing is written"):
        commit(store, [0, 1], 1)
    assert everything(store.path) == before
    commit(store, [0, 1], 1, replace=True)
    check(store, 0, 1), check(store, 1, 1), check(store, 2, 0)
    assert os.listdir(store.path / "_replace") == []
    assert list(verify(store)) == []


def test_the_design_fills_in_what_it_knows(tmp_path):
    with Store.create(tmp_path / "s", DESIGNED) as store:
        store.commit_many([4, 1], {"y": np.array([1, 2])})
        np.testing.assert_array_equal(
            store.rows("masks", [4, 1]), [store.design.assignment(4).mask, store.design.assignment(1).mask]
        )
        assert store.rows("lr").tolist() == [0.1, 0.2]
        assert store.layout.row_records([4])["seed"][0] == store.design.seed(4)


def test_status_counts_to_the_number_of_rows(store):
    commit(store, [0, 1])
    assert store.run.take(2) and store.run.take(3)
    store.fail(3, 2, "Traceback\nValueError: no")
    store.run.release(3, done=False)
    state = store.status()
    assert (state.completed, state.running, state.failed, state.pending) == (2, 1, 1, 2)
    assert [(f.row, f.attempts, f.error) for f in state.failures] == [(3, 2, "ValueError: no")]
    assert store.status(failures=0).failures == ()


# ------------------------------------------------------------------------------------ refused, and untouched


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"margins": None}, "required key 'margins' missing"),
        ({"marginz": [1.0]}, "unknown key 'marginz'; did you mean 'margins'"),
        ({"_completed": [True]}, "'_completed' is the store's own record"),
        ({"../x": [1]}, "unknown key"),
        ({"margins": [np.zeros(4)]}, r"row 1, 'margins': expected shape \[5\], got \[4\]"),
        ({"margins": [1.0]}, r"'margins': expected shape \[5\], got \[\]"),
        ({"margins": [np.full(5, 1e39)]}, "'margins': value 1e\\+39 at \\[0\\] does not fit float32"),
        ({"margins": [[0, 0, np.nan, 0, 0]]}, "'margins': value nan at \\[2\\] is not finite"),
        ({"margins": [["1"] * 5]}, "'margins': expected numbers"),
        ({"tag": ["fives"]}, "'tag': expected text of at most 4 characters, got 5"),
        ({"tag": "f"}, "'tag': expected a leading axis of 1 rows, got a str"),
        ({"hit": [np.full((2, 9), 2)]}, "'hit': value 2 at \\[0, 0\\]"),
        ({"extra": [[1.0]]}, "'extra': expected shape"),
        ({"extra": 1.0}, "'extra': expected a leading axis of 1 rows, got a float"),
        ({"extra": np.array(1.0)}, "'extra': expected a leading axis of 1 rows, got a ndarray"),
        ({"extra": [1.0, 2.0]}, "'extra': expected a leading axis of 1 rows, got 2"),
        ({"extra": {0: 1.0}}, "'extra': expected a leading axis of 1 rows, got a dict"),
    ],
)
def test_nothing_is_written_of_a_row_that_is_refused(store, change, why):
    commit(store, [0])
    before = everything(store.path)
    arrays = {key: [value] for key, value in values(1).items()} | change
    with pytest.raises(RowError, match=why):
        store.commit_many([1], {key: value for key, value in arrays.items() if value is not None})
    assert everything(store.path) == before and not store.completed()[1]


def test_one_bad_row_refuses_the_batch(store):
    before = everything(store.path)
    bad = [values(0)["margins"], values(1)["margins"] * np.inf, values(2)["margins"]]
    with pytest.raises(RowError, match="row 1, 'margins'"):
        store.commit_many([0, 1, 2], {"margins": bad, "tag": ["a"] * 3, "hit": [values(0)["hit"]] * 3})
    assert everything(store.path) == before


@pytest.mark.parametrize("row", [-1, 6, True, np.True_, 1.5, 1.0, "3", None, 10**30])
def test_an_index_that_is_no_row(store, row):
    before = everything(store.path)
    with pytest.raises(RowError, match="row"):
        store.commit_many([row], {key: [value] for key, value in values(0).items()})
    with pytest.raises(RowError, match="row"):
        store.rows("tag", [row])
    assert everything(store.path) == before


def test_rows_that_are_no_list_of_rows(store):
    for rows in (3, np.array([1.0]), np.array([True]), np.array(3), np.array([-1, 2]), np.array([2, 6])):
        with pytest.raises(RowError, match="row"):
            store.rows("tag", rows)
    with pytest.raises(RowError, match="rows: 2 stands twice"):
        commit(store, [1, 2, 2])
    commit(store, np.array([1, 3], np.uint16))
    assert store.completed().tolist() == [False, True, False, True, False, False]
    store.commit_many([], {"margins": []})


def test_that_a_row_stands_twice_is_found_at_once(tmp_path):
    spec = {"num_models": 20_000, "schema": {"x": {"shape": [], "dtype": "int8"}}}
    with Store.create(tmp_path / "store", spec, sync=False) as store:
        rows, started = [*range(20_000), 19_999], time.perf_counter()
        with pytest.raises(RowError, match="rows: 19999 stands twice"):
            store.commit_many(rows, {"x": np.zeros(20_001)})
        assert time.perf_counter() - started < 1


def test_a_store_says_in_one_line_what_it_is(store, tmp_path):
    assert repr(store) == f"Store('{store.path}': 6 rows of margins, tag, hit, extra, none)"
    spec = {"num_models": 1200, "schema": {f"k{i}": {"shape": [], "dtype": "int8"} for i in range(7)}}
    with Store.create(tmp_path / "many", spec) as many:
        assert repr(many).endswith("1,200 rows of k0, k1, k2, k3, k4 and 2 keys more)")


def test_a_row_that_another_holds_is_refused(store):
    with Store.open(store.path) as other:
        assert other.run.take(2)
        with pytest.raises(ClaimLost, match="row 2: another worker is running it"):
            commit(store, [1, 2])
        assert not store.completed().any()
        other.run.release(2, done=False)
        commit(store, [1, 2])


def test_a_row_that_is_held_for_a_moment_is_waited_for(store):
    """As whoever opens the store holds one whose replacement it finds."""
    with Store.open(store.path, sync=False) as other:
        assert other.run.take(2)
        timer = threading.Timer(0.03, lambda: other.run.release(2, done=False))
        timer.start()
        commit(store, [2])
        timer.join()
    check(store, 2)


# ------------------------------------------------------------------------------------ damage is found


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize(("file", "size"), [("margins.npy", 20), ("_keys/margins.npy", 16)])
def test_every_flipped_bit_of_data_and_records_is_found(store, file, size):
    commit(store, range(6))
    for offset in range(size):
        for bit in (0, 7):
            flip(store.path / file, head(file, store) + 2 * size + offset, bit)
            with pytest.raises(
                StoreError, match="row 2, 'margins': its (bytes are not|record is damaged)|never written"
            ):
                store.rows("margins")
            with pytest.raises(StoreError, match="row 2, 'margins'"):
                store.rows("margins", [0, 2])
            assert [(p.row, p.key) for p in verify(store)] == [(2, "margins")]
            np.testing.assert_array_equal(store.rows("margins", [3, 1]), [values(3)["margins"], values(1)["margins"]])
            flip(store.path / file, head(file, store) + 2 * size + offset, bit)
    assert list(verify(store)) == []


def test_a_record_that_is_damaged_is_no_key_that_a_row_lacks(store):
    """Where the status of an optional key flips, the row does not look like one that never had it."""
    commit(store, [0])
    store.commit_many([1, 2], {k: [v, v] for k, v in {**values(1), "extra": 2.5}.items()})
    place = head("_keys/extra.npy", store)
    for offset in range(16):
        for row, bit in ((0, 1), (1, 0), (2, 2)):
            flip(store.path / "_keys/extra.npy", place + 16 * row + offset, bit)
            with pytest.raises(StoreError, match=f"row {row}, 'extra': its record is damaged"):
                store.rows("extra")
            flip(store.path / "_keys/extra.npy", place + 16 * row + offset, bit)
    assert store.rows("extra").tolist() == [2.5, 2.5] and store.having("extra", [0, 2]).tolist() == [False, True]


def test_a_flipped_flag_is_found(store):
    commit(store, [0, 2])
    flip(store.path / "_completed.npy", 128 + 1)  # a row that nobody ran
    with pytest.raises(StoreError, match="row 1, 'margins': it was never written"):
        store.rows("margins")
    assert {p.row for p in verify(store)} == {1}
    flip(store.path / "_completed.npy", 128 + 1)
    flip(store.path / "_completed.npy", 128 + 2, bit=3)  # neither true nor false
    with pytest.raises(StoreError, match="row 2: its completed flag is 9"):
        store.rows("margins")
    assert "row 2: its completed flag is 9" in {str(p).partition(",")[0] for p in verify(store)}


def test_a_flipped_row_record_is_found(store):
    commit(store, [3])
    for offset in range(64):
        flip(store.path / "_rows.npy", head("_rows.npy", store) + 192 + offset)
        assert [(p.row, p.key) for p in verify(store)] == [(3, None)], offset
        flip(store.path / "_rows.npy", head("_rows.npy", store) + 192 + offset)


def head(name, store):
    return store.layout.heads[name]


def test_a_row_written_to_anothers_place_is_found(store):
    """Right bytes with a right checksum, of another row: what a misdirected write leaves."""
    commit(store, [1, 2])
    for name, size in (("margins.npy", 20), ("_keys/margins.npy", 16)):
        with open(store.path / name, "r+b") as file:
            file.seek(head(name, store) + size)
            data = file.read(size)
            file.write(data)
    with pytest.raises(StoreError, match="row 2, 'margins'"):
        store.rows("margins")


@pytest.mark.parametrize("name", ["margins.npy", "_completed.npy", "_rows.npy", "_keys/tag.npy"])
def test_a_file_that_is_missing_cut_or_changed_is_named_on_open(store, name):
    commit(store, [0])
    path = store.path / name
    whole = path.read_bytes()
    for damage, why in (
        (lambda: path.unlink(), "missing"),
        (lambda: path.write_bytes(whole[:-1]), "cut short"),
        (lambda: path.write_bytes(b""), "not a .npy file"),
        (lambda: path.write_bytes(b"\x80" + whole[1:]), "not a .npy file"),
        (lambda: np.save(path, np.zeros((6, 7))), "expected shape"),
        (lambda: np.save(path, np.array([print] * 6), allow_pickle=True), "expected shape"),
    ):
        damage()
        with pytest.raises(StoreError, match=f"{path}: .*{why}"):
            Store.open(store.path)
        path.write_bytes(whole)
    Store.open(store.path).close()


def test_a_file_that_is_cut_while_the_store_is_open(store):
    commit(store, range(6))
    os.truncate(store.path / "margins.npy", 128 + 70)
    np.testing.assert_array_equal(store.rows("margins", [2]), [values(2)["margins"]])
    with pytest.raises(StoreError, match=r"margins.npy: ends at byte 198, expected 10 more"):
        store.rows("margins", [3])
    (store.path / "tag.npy").unlink()
    with pytest.raises(StoreError, match="tag.npy: this file of the store is missing"):
        store.rows("tag")


def test_what_is_not_a_store(tmp_path):
    (tmp_path / "file").touch()
    np.save(tmp_path / "_completed.npy", np.zeros(3, bool))
    for path, why in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "file", "it is not a folder"),
        (tmp_path, "made by the released code, or its spec.json was lost"),
    ):
        with pytest.raises(StoreError, match=f"{path}: not a store: .*{why}.*initialize_logdir"):
            Store.open(path)


def test_a_store_of_a_newer_format(store):
    raw = json.loads((store.path / "spec.json").read_text())
    (store.path / "spec.json").write_text(json.dumps({**raw, "format": 2, "something": "new"}))
    with pytest.raises(StoreError, match="format: this version reads and writes format 1, got 2; install"):
        Store.open(store.path)


# ------------------------------------------------------------------------------------ initialise


def test_initialising_over_a_store_is_refused(store):
    commit(store, [1])
    before = everything(store.path)
    for spec in (SPEC, DESIGNED):
        with pytest.raises(StoreError, match="there is a store already, nothing is changed"):
            Store.create(store.path, spec)
    assert everything(store.path) == before


def test_a_folder_with_other_things_is_accepted(tmp_path):
    for name in ("workers", "claims", "design"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    Store.create(tmp_path, DESIGNED).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {
        "notes.txt", "design", "workers", "claims", "runs", "spec.json", "_completed.npy", "_rows.npy", "_keys",
        "masks.npy", "lr.npy", "y.npy",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["margins.npy", "_completed.npy", "_keys/tag.npy"])
def test_files_of_the_released_code_are_not_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    np.save(tmp_path / name, np.arange(3))
    before = everything(tmp_path)
    for _ in range(2):  # the first refusal must not make the second one think that the file is ours
        with pytest.raises(StoreError, match=f"{name}: exists, and there is no spec.json"):
            Store.create(tmp_path, SPEC)
        assert everything(tmp_path) == before and not os.path.lexists(tmp_path / MARKER)


def test_a_spec_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(SpecError):
        Store.create(tmp_path / "a" / "b", {**SPEC, "num_models": -1})
    with pytest.raises(SpecError, match="design: cannot be kept as JSON"):
        Store.create(
            tmp_path / "a",
            {"schema": SPEC["schema"], "design": [{"choices": {"x": [1]}, "filter": [["x", "in", [1, np.inf]]]}]},
        )
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="expected a folder, this is a file"):
        Store.create(tmp_path / "file", SPEC)
    with pytest.raises(StoreError, match="cannot make the store"):
        Store.create(tmp_path / "file" / "deeper", SPEC)
    assert os.listdir(tmp_path) == ["file"]


def interrupted(tmp_path, stop, spec=SPEC):
    """Initialise in a process that is gone at its `stop`-th call that changes the disk; whether it was."""
    script = """
        import json, os, sys
        from datamodels.store import Store
        left = int(sys.argv[2])
        def counted(real):
            def call(*args, **options):
                global left
                left -= 1
                if left < 0:
                    os._exit(9)
                return real(*args, **options)
            return call
        for name in ("mkdir", "symlink", "ftruncate", "pwrite", "fsync", "replace", "link", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        Store.create(sys.argv[1], json.loads(sys.argv[3]))
    """
    done = python(script, tmp_path, stop, json.dumps(spec))
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


def test_an_initialisation_that_was_killed_can_be_run_again(tmp_path):
    """A second one with another spec leaves no file of the first, and reserves its space anew."""
    cut, total = 0, 0
    small = {"num_models": 3, "schema": {"y": {"shape": [], "dtype": "int8"}, "old": {"shape": [], "dtype": "int8"}}}
    for stop in [0, 1, 2, 5, 9, 14, 20, 26, 30, 33, 36, 100]:
        path = tmp_path / str(stop)
        path.mkdir()
        total += 1
        if not interrupted(path, stop, small):
            Store.open(path).close()
            continue
        if (path / "spec.json").exists():  # it was published; what was left to do is tidying
            with Store.open(path) as store:
                store.commit_many([0], {"y": [1], "old": [2]})
            continue
        cut += 1
        with pytest.raises(StoreError, match="not a store"):
            Store.open(path)
        with Store.create(path, SPEC) as store:
            commit(store, [0])
            check(store, 0)
        left = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
        assert not [name for name in left if "old" in name or "y.npy" in name or "partial" in name], left
    assert cut >= 7 and cut < total


def test_a_marker_without_its_process_is_no_obstacle_here(tmp_path):
    os.symlink('["elsewhere", "other boot", 1, "2"]', tmp_path / MARKER)
    with pytest.raises(StoreError, match="its initialisation did not finish; run it again"):
        Store.open(tmp_path)
    Store.create(tmp_path, SPEC).close()


def test_on_a_network_file_system_another_hosts_marker_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs4")
    marker = tmp_path / MARKER
    os.symlink('["elsewhere", "other boot", 1, "2"]', marker)
    with pytest.raises(
        StoreError, match=f"or was interrupted on another host; nothing is changed; if none is, remove {marker}"
    ):
        Store.create(tmp_path, SPEC)
    assert os.listdir(tmp_path) == [marker.name]
    marker.unlink()
    Store.create(tmp_path, SPEC).close()
    assert not os.path.lexists(marker)


def test_of_two_initialisations_at_once_exactly_one_wins(tmp_path):
    script = """
        import sys, time
        from datamodels.errors import StoreError
        from datamodels.store import Store
        name, folder, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
        spec = {"num_models": int(name) + 2, "schema": {"x" + name: {"shape": [], "dtype": "int8"}}}
        print("ready", flush=True)
        for line in sys.stdin:
            try:
                with Store.create(f"{folder}/{line.strip()}", spec) as store:
                    store.commit_many([int(name)], {"x" + name: [7]})
                print("won", flush=True)
            except StoreError as error:
                print("lost", str(error)[-60:], flush=True)
    """
    rounds = 25
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(name), str(tmp_path), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in range(3)
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for number in range(rounds):
            for racer in racers:
                racer.stdin.write(f"{number}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().split(maxsplit=1) for racer in racers]
            assert sorted(a[0] for a in answers) == ["lost", "lost", "won"], answers
            winner = [a[0] for a in answers].index("won")
            with Store.open(tmp_path / str(number)) as store:
                assert store.rows(f"x{winner}").tolist() == [7] and store.num_models == winner + 2
            assert sorted(p.name for p in (tmp_path / str(number)).glob("*.npy")) == [
                "_completed.npy",
                "_rows.npy",
                f"x{winner}.npy",
            ]
    finally:
        for racer in racers:
            racer.stdin.close()
            racer.wait(timeout=20)
            racer.stdout.close()


# ------------------------------------------------------------------------------------ full and failing disks

FULL = """
    import json, os, resource, signal, sys
    import numpy as np
    from datamodels.errors import StoreError
    from datamodels.store import Store
    folder = sys.argv[1]
    spec = {"num_models": 64, "schema": {"x": {"shape": [8192], "dtype": "uint8"}}}
    # 256 KiB a file and no more: what ENOSPC is to a write
    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def test_a_disk_that_is_full_from_the_start(tmp_path):
    script = (
        FULL
        + """
    limit(256 * 1024)
    try:
        Store.create(folder + "/store", spec)
    except StoreError as error:
        print(error)
    print(os.listdir(folder))
    """
    )
    done = python(textwrap.dedent(FULL) + textwrap.dedent(script[len(FULL) :]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "x.npy: File too large" in done.stdout and "x.npy needs 524,416 bytes" in done.stdout
    assert done.stdout.endswith("[]\n"), "a refused initialisation left something behind"


def test_a_disk_that_fills_up_during_a_commit(tmp_path):
    body = """
    store = Store.create(folder + "/store", spec, reserve=False)
    limit(256 * 1024)
    rows = {row: np.full(8192, row, np.uint8) for row in range(64)}
    done, failed = [], []
    for row in rows:
        try:
            store.commit_many([row], {"x": [rows[row]]})
            done.append(row)
        except StoreError as error:
            failed.append(str(error))
    print(json.dumps([done, failed]))
    view = store["x"]
    assert all((view[row] == row).all() for row in done)
    assert int(view[done[-1] + 2:].sum()) == 0
    store.close()
    """
    done = python(textwrap.dedent(FULL) + textwrap.dedent(body), tmp_path)
    assert done.returncode == 0, done.stderr
    committed, failed = json.loads(done.stdout)
    assert committed == list(range(31)) and len(failed) == 33
    assert all("x.npy: File too large" in error for error in failed)
    with Store.open(tmp_path / "store") as store:  # and with space it goes on
        assert store.completed().tolist() == [row < 31 for row in range(64)]
        assert list(verify(store)) == [] and store.status().running == 0
        store.commit_many([40], {"x": [np.full(8192, 40, np.uint8)]})
        assert (store.rows("x", [40, 3]) == [[40], [3]]).all()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB. Needs root, or a kernel that lets users mount in a name space of their own."""
    if os.geteuid() != 0:
        missing("mounting a small file system needs root; the tests with a limit on file sizes ran")
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        missing("this machine lets nobody mount")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_file_system(small_disk):
    spec = {"num_models": 64, "schema": {"x": {"shape": [4096], "dtype": "uint8"}}}
    big = {"num_models": 640, "schema": {"x": {"shape": [4096], "dtype": "uint8"}}}
    with pytest.raises(StoreError, match=r"x.npy: No space left on device: the disk is full; .*needs 2,621,568 bytes"):
        Store.create(small_disk / "big", big)
    assert os.listdir(small_disk) == []

    # Reserved: a disk that is full later takes nothing from the store.
    store = Store.create(small_disk / "reserved", spec)
    filler(small_disk)
    with contextlib.suppress(StoreError):
        store.commit_many([3], {"x": [np.full(4096, 3)]})
    (small_disk / "filler").unlink()
    store.commit_many([4], {"x": [np.full(4096, 4)]})
    assert list(verify(store)) == []
    store.close()
    shutil.rmtree(small_disk / "reserved")

    # Not reserved: a clean failure of the row, in a commit and in a replacement.
    store = Store.create(small_disk / "open", spec, reserve=False)
    store.commit_many([0, 1], {"x": [np.full(4096, 0), np.full(4096, 1)]})
    filler(small_disk)
    for row, replace in ((2, False), (40, False), (1, True)):
        with pytest.raises(StoreError, match="No space left on device: the disk is full"):
            store.commit_many([row], {"x": [np.full(4096, 99)]}, replace=replace)
    assert store.completed().tolist() == [True, True] + [False] * 62
    assert (store.rows("x") == [[0], [1]]).all() and list(verify(store)) == []
    with Store.open(small_disk / "open") as reader:  # reading needs no space
        assert (reader.rows("x", [1]) == 1).all()
    (small_disk / "filler").unlink()
    store.commit_many([2], {"x": [np.full(4096, 2)]})
    store.commit_many([1], {"x": [np.full(4096, 5)]}, replace=True)
    assert (store.rows("x") == [[0], [5], [2]]).all() and list(verify(store)) == []
    assert list((small_disk / "open").rglob(".*")) == [], "partial files stay behind"
    store.close()


def test_looking_at_what_was_never_written_on_a_full_disk_is_no_sigbus(small_disk):
    script = """
        import sys
        import numpy as np
        from datamodels.store import Store
        store = Store.open(sys.argv[1])
        print(int(store["x"].sum()), store["x"].flags.writeable)
    """
    spec = {"num_models": 600, "schema": {"x": {"shape": [4096], "dtype": "uint8"}}}
    with Store.create(small_disk / "s", spec, reserve=False) as store:
        store.commit_many([5], {"x": [np.ones(4096)]})
    filler(small_disk)
    done = python(script, small_disk / "s")
    assert (done.returncode, done.stdout) == (0, "4096 False\n"), done.stderr


def filler(folder):
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\1" * 4096):
            pass


def test_short_writes_are_continued(store, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:1]), offset))
    commit(store, [0, 1])
    commit(store, [1], 1, replace=True)
    monkeypatch.undo()
    check(store, 0, 0), check(store, 1, 1)
    assert list(verify(store)) == []


@pytest.mark.parametrize("file", ["margins.npy", "_keys/tag.npy", "_rows.npy", "_completed.npy"])
def test_a_failed_sync_fails_the_commit_and_a_retry_does_it_all_again(store, monkeypatch, file):
    commit(store, [0])
    synced, real = [], os.fdatasync

    def failing(fd):
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), store.path)
        if name == file:
            raise OSError(5, "Input/output error")
        synced.append(name)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(StoreError, match=f"{file}: Input/output error: the disk reported an error"):
        commit(store, [1, 2])
    assert store.completed().tolist() == [True] + [False] * 5, "rows that were never synced look complete"
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    synced.clear()
    commit(store, [1, 2])
    assert {os.path.relpath(name, store.path) for name in synced} >= {
        "margins.npy", "tag.npy", "hit.npy", "_keys/margins.npy", "_keys/tag.npy", "_keys/hit.npy", "_rows.npy",
        "_completed.npy",
    }  # fmt: skip
    check(store, 1), check(store, 2)


class Syncs:
    """What commits do to files, in order. Of the syncs behind the first `after`, `together` wait for each other."""

    def __init__(self, store, monkeypatch, together=1, fails=(), after=0):
        self.store, self.fails, self.events, self.forgotten, self.most = store, fails, [], [], 0
        self.together, self.gate = range(after, after + together), threading.Barrier(together, timeout=20)
        self.under_way, self.lock, self.real = [], threading.Lock(), (os.pwrite, os.fdatasync)
        monkeypatch.setattr(os, "pwrite", self.write)
        monkeypatch.setattr(os, "fdatasync", self.sync)
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, *how: self.forgotten.append(self.name(fd)))

    def name(self, fd):
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.store.path)

    def write(self, fd, *what):
        self.events.append(("write", self.name(fd)))
        assert not self.under_way, "written to while the phase before is being synced"
        return self.real[0](fd, *what)

    def sync(self, fd):
        with self.lock:
            number = len(self.of("sync"))
            self.events.append(("sync", self.name(fd)))
            self.under_way.append(threading.current_thread())
            self.most = max(self.most, len(self.under_way))
        if number in self.together:
            self.gate.wait()
            time.sleep(0.2 * (self.name(fd) not in self.fails))
        self.real[1](fd)
        with self.lock:
            self.under_way.remove(threading.current_thread())
        if self.name(fd) in self.fails:
            raise OSError(5, "Input/output error")

    def of(self, what):
        return [name for kind, name in self.events if kind == what]


def wide(path, count):
    """A store of so many keys, and one row's values of them."""
    keys = {f"k{number}": [1] for number in range(count)}
    return Store.create(path, {"num_models": 4, "schema": {key: {"shape": [], "dtype": "int8"} for key in keys}}), keys


def test_many_files_are_synced_at_once_and_all_of_a_phase_before_the_next(tmp_path, monkeypatch):
    store, keys = wide(tmp_path / "s", 40)
    with store:
        syncs = Syncs(store, monkeypatch, together=16)
        store.commit_many([1], keys)
        values, records = [f"{key}.npy" for key in keys], [f"_keys/{key}.npy" for key in keys]
        phases = ["write"] * 40 + ["sync"] * 40 + ["write"] * 41 + ["sync"] * 41 + ["write", "sync"]
        assert [kind for kind, _ in syncs.events] == phases
        assert syncs.of("write") == [*values, *records, "_rows.npy", "_completed.npy"]
        assert sorted(syncs.of("sync")) == sorted(syncs.of("write")) and syncs.most == 16
        assert not [thread for thread in threading.enumerate() if "sync" in thread.name]
        assert store.rows("k39").tolist() == [1]


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_threads_are_started_where_the_disk_is_slower_than_they(tmp_path, monkeypatch, seconds):
    """Which the sync of `_completed`, alone in its phase, tells."""
    store, keys = wide(tmp_path / "s", 8)
    started, start = [], threading.Thread.start
    with store:
        monkeypatch.setattr(os, "fdatasync", lambda fd: time.sleep(seconds) if seconds else None)
        monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread)))
        store.commit_many([1], keys)
        assert len(started) == 1 + 7 + 8, "the heartbeat's, and one less than files"
        for row in (0, 2, 3):
            store.commit_many([row], keys)
        assert (len(started) == 16 + 3 * 15) == bool(seconds), "a fast disk may be slow once"


def test_where_no_thread_can_be_had_the_files_are_synced_one_by_one(tmp_path, monkeypatch):
    store, keys = wide(tmp_path / "s", 40)
    with store:
        syncs, start = Syncs(store, monkeypatch, together=2), threading.Thread.start

        def scarce(thread):
            if len(threading.enumerate()) >= here + 1:
                raise RuntimeError("can't start new thread")
            start(thread)

        assert store.run.take(1)
        here = len(threading.enumerate())
        monkeypatch.setattr(threading.Thread, "start", scarce)
        store.commit_many([1], keys)
        assert len(syncs.of("sync")) == 82 and syncs.most == 2


def test_of_many_syncs_some_fail(tmp_path, monkeypatch):
    """The first is what the commit fails with; the others under way are waited for, and none more is begun."""
    store, keys = wide(tmp_path / "s", 40)
    with store:
        fails = [f"_keys/{key}.npy" for key in ("k12", "k5", "k9")]
        syncs = Syncs(store, monkeypatch, together=16, fails=fails, after=40)
        with pytest.raises(StoreError, match="_keys/k5.npy: Input/output error: the disk reported an error"):
            store.commit_many([1], keys)
        assert not syncs.under_way and sorted(syncs.forgotten) == sorted(fails)
        begun = len(syncs.of("sync"))
        assert begun < 40 + 41 and not store.completed().any()
        syncs.fails = ()
        store.commit_many([1], keys)
        assert set(syncs.of("sync")[begun:]) == set(syncs.of("write"))


def test_writes_on_a_network_file_system_are_synchronous(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodels.store.disk.filesystem", lambda path: "nfs")
    with Store.create(tmp_path / "s", SPEC) as store:
        assert store.disk.network and store.run.network
        monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("synchronous writes need no sync"))
        commit(store, [0, 1, 3])
        commit(store, [1], 1, replace=True)
        for name, fd in store.disk._fds.items():
            flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            assert flags & os.O_DSYNC, name
        check(store, 0), check(store, 1, 1), check(store, 3)
        assert list(verify(store)) == []


def test_local_file_systems_are_known_as_such(tmp_path):
    assert filesystem(Path("/proc")) == "proc" and not PosixDisk(tmp_path).network
    assert PosixDisk(Path("/proc")).network and not PosixDisk(tmp_path, network=False).network


def test_a_large_range_is_read_in_pieces(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 40)
    monkeypatch.setattr("datamodels.store.disk._READ_AT_ONCE", 1000)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 700), offset))
    assert PosixDisk(tmp_path).read("x", 3, 10_000) == (bytes(range(256)) * 40)[3:10_003]


def test_no_descriptor_stays_open(tmp_path):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    def round_trip(name):
        with Store.create(tmp_path / name, SPEC) as store:
            commit(store, [0, 1])
            commit(store, [0], 1, replace=True)
            store.rows("margins"), store.status(), list(verify(store))
            with contextlib.suppress(RowError):
                commit(store, [0])
        with contextlib.suppress(StoreError):
            Store.create(tmp_path / name, SPEC)
        Store.open(tmp_path / name).close()

    round_trip("warm")
    before = opened()
    for i in range(5):
        round_trip(str(i))
    assert opened() == before


# ------------------------------------------------------------------------------------ replacement, interrupted


def with_journal(store, row, version, name=None):
    """A store as a crash leaves it that came after a replacement's journal was written."""
    blobs = store.encode(row, values(row, version))
    commits.write_journal(store.layout, row, blobs, commits.RowInfo(2, 0.0, 0), "somebody")
    if name is not None:
        os.rename(store.path / "_replace" / str(row), store.path / "_replace" / name)


def test_a_replacement_that_was_interrupted_is_finished_on_open(store):
    commit(store, [1])
    with_journal(store, 1, 1)
    (store.path / "_replace" / ".1.4711.partial").write_bytes(b"half")
    with Store.open(store.path) as other:
        check(other, 1, 1)
        assert os.listdir(store.path / "_replace") == [] and list(verify(other)) == []
        assert not [name for name in os.listdir(store.path / "claims") if name.startswith("1.")]


def test_a_row_is_read_whole_while_it_is_being_replaced(tmp_path):
    """What a reader sees of the old row and of the new one, at the same time, is not taken for damage."""
    spec = {"num_models": 3, "schema": {"x": {"shape": [100_000], "dtype": "int32"}}}
    with Store.create(tmp_path / "store", spec, sync=False) as writer, Store.open(tmp_path / "store") as reader:
        writer.commit_many([0, 1, 2], {"x": np.zeros((3, 100_000), np.int32)})
        stop, error = threading.Event(), []

        def replace():
            version = 0
            while not stop.wait(0.02):
                version += 1
                writer.commit_many([1], {"x": np.full((1, 100_000), version, np.int32)}, replace=True)

        thread = threading.Thread(target=replace)
        thread.start()
        seen = set()
        try:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                got = reader.rows("x")
                assert got.shape == (3, 100_000)
                assert (got == got[:, :1]).all() and not got[[0, 2]].any()
                seen.add(int(got[1, 0]))
                assert int(reader.rows("x", [1])[0, 0]) >= max(seen)
                assert list(verify(reader)) == []
        except StoreError as damage:
            error.append(damage)
        finally:
            stop.set()
            thread.join()
        assert not error and len(seen) > 5


@pytest.mark.parametrize("phase", ["the bytes are new", "the flag is off", "the flag is off, all along"])
def test_a_replacement_that_takes_long_is_named_as_what_it_is(store, monkeypatch, phase):
    commit(store, [0, 1])
    blobs = store.encode(1, values(1, 1))
    commits.write_journal(store.layout, 1, blobs, commits.RowInfo(2, 0.0, 0), store.run.id)
    if phase == "the bytes are new":
        store.layout.write("margins.npy", [1], [blobs["margins"]], lambda: None)
    else:
        store.layout.write(commits.COMPLETED_FILE, [1], [b"\0"], lambda: None)
    if phase.endswith("all along"):
        assert store.rows("margins").shape == (1, 5)
        with pytest.raises(StoreError, match="row 1 is being replaced; read it again in a moment"):
            store.rows("margins", [0, 1])
        assert list(verify(store)) == []
        return
    if phase == "the bytes are new":
        with pytest.raises(StoreError, match="row 1, 'margins': is being replaced; read it again"):
            store.rows("margins", [0, 1])
        assert [(p.row, p.what[:17]) for p in verify(store)] == [(1, "is being replaced")]
    monkeypatch.setattr(store_module, "_LOOK_SECONDS", 0.5)  # the machine may have other things to do
    threading.Timer(0.1, commits.apply_journal, (store.layout, 1)).start()
    assert (store.rows("margins")[1] == values(1, 1)["margins"]).all()


def test_a_journal_left_behind_does_not_undo_a_later_commit(store):
    """The row was invalidated for a replacement, the process died, and a worker that was running all along ran it."""
    commit(store, [1])
    with_journal(store, 1, 1)
    store.layout.write(commits.COMPLETED_FILE, [1], [b"\0"], lambda: None)
    commit(store, [1], 2)
    with Store.open(store.path) as other:
        check(other, 1, 2)
    commit(store, [1], 3, replace=True)
    with Store.open(store.path) as other:
        check(other, 1, 3)


def test_a_holder_that_lost_its_row_leaves_no_journal(store, monkeypatch):
    commit(store, [1])
    real = commits.write_journal

    def overtaken(layout, row, *rest):
        real(layout, row, *rest)
        os.symlink("somebody", store.run.path(row, store.run.claims[row] + 1))

    monkeypatch.setattr(commits, "write_journal", overtaken)
    store.run.network = True
    monkeypatch.setattr("datamodels.store.claims._LOOK_AGAIN", 0.0)
    with pytest.raises(ClaimLost):
        commit(store, [1], 1, replace=True)
    monkeypatch.undo()
    store.run.network = False
    assert os.listdir(store.path / "_replace") == []
    check(store, 1, 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:30],
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
        lambda raw: raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:],
        lambda raw: b"x" * len(raw),
        lambda raw: raw[:21] + struct.pack("<I", 2**32 - 1) + raw[25:],
    ],
)
def test_a_damaged_journal_is_never_applied_and_is_reported(store, spoil):
    commit(store, [1, 2])
    with_journal(store, 1, 1)
    path = store.path / "_replace" / "1"
    path.write_bytes(spoil(path.read_bytes()))
    with Store.open(store.path) as other:
        check(other, 1, 0), check(other, 2, 0)
        with pytest.raises(StoreError, match="_replace/1: "):
            other.recover()
        assert [p.row for p in verify(other)] == [1]


def test_a_journal_of_another_row_or_schema_is_never_applied(store):
    commit(store, [1, 2])
    with_journal(store, 1, 1, name="2")
    for stray in ("notes", "7", "99999999999999999999", ".x", "-1", "1.5"):
        (store.path / "_replace" / stray).write_text("not ours")
    with Store.open(store.path) as other:
        check(other, 1, 0), check(other, 2, 0)
        commit(other, [2], 5, replace=True)
        check(other, 2, 5)


def test_somebody_elses_store_is_read_without_a_write(store, tmp_path):
    commit(store, [0, 1])
    with_journal(store, 1, 1)
    store.close()
    before, times = everything(store.path), {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    script = """
        import os, sys
        import numpy as np
        from datamodels.errors import StoreError
        from datamodels.store import Store
        with Store.create(sys.argv[2], {"num_models": 1, "schema": {"x": {"shape": [], "dtype": "int8"}}}) as mine:
            mine.commit_many([0], {"x": [1]})  # imports what is imported late, while that can be read
            mine.rows("x"), mine["x"]
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        store = Store.open(sys.argv[1])
        print(store.rows("tag").tolist(), store.status().completed, store["margins"].shape, store.recover())
        try:
            store.commit_many([2], {"margins": np.zeros((1, 5)), "tag": ["x"], "hit": np.zeros((1, 2, 9))})
        except StoreError as error:
            print(error)
        store.close()
    """
    folders = [store.path, *[p for p in store.path.rglob("*") if p.is_dir()]]
    for parent in store.path.parents:
        if os.stat(parent).st_uid == os.geteuid() and str(parent).startswith("/tmp/"):
            os.chmod(parent, 0o755)
    for folder in folders:
        os.chmod(folder, 0o555)
    try:
        done = python(script, store.path, tmp_path / "mine", cwd="/", env={**os.environ, "PYTHONPATH": os.getcwd()})
    finally:
        for folder in folders:
            os.chmod(folder, 0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['r0v0', 'r1v0'] 2 (6, 5) []\n")
    assert "the folder must be writable and have space" in done.stdout
    assert everything(store.path) == before
    assert {p: p.stat().st_mtime_ns for p in store.path.rglob("*")} == times


# ------------------------------------------------------------------------------------ no pickle, no assert, no torch


def test_no_pickle_is_read(store):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(store.path / "pwned"),)

    evil = np.empty(6, object)
    evil[:] = [Evil()] * 6
    np.save(store.path / "tag.npy", evil, allow_pickle=True)
    with pytest.raises(StoreError, match="expected shape"):
        Store.open(store.path)
    with pytest.raises(ValueError, match="allow_pickle|Python objects"):
        store["tag"]
    assert not (store.path / "pwned").exists()


def test_the_refusals_do_not_rest_on_assert(tmp_path):
    script = """
        import sys
        import numpy as np
        from datamodels.errors import DatamodelsError
        from datamodels.store import Store
        assert False, "this must not run"
        path = sys.argv[1]
        schema = {"x": {"shape": [2], "dtype": "float32"}, "b": {"shape": [], "dtype": "int8"}}
        spec = {"num_models": 3, "schema": schema}
        refused = 0
        def refuse(call):
            global refused
            try:
                call()
            except DatamodelsError:
                refused += 1
            else:
                raise SystemExit(f"not refused: number {refused}")
        for bad in (-1, True, 0, None):
            refuse(lambda: Store.create(path + "/bad", {**spec, "num_models": bad}))
        store = Store.create(path + "/s", spec)
        refuse(lambda: Store.create(path + "/s", spec))
        refuse(lambda: Store.open(path))
        good = {"x": [[1, 2]], "b": [3]}
        for row in (-1, 3, True, 1.5, "1"):
            refuse(lambda: store.commit_many([row], good))
        for change in ({"x": [[1]]}, {"x": [[1, np.nan]]}, {"x": [[1, 1e39]]}, {"b": [300]}, {"b": [0.5]}, {"c": [1]}):
            refuse(lambda: store.commit_many([0], {**good, **change}))
        refuse(lambda: store.commit_many([0], {"b": [1]}))
        store.commit_many([0], good)
        refuse(lambda: store.commit_many([0], good))
        with open(path + "/s/x.npy", "r+b") as file:
            file.seek(129); file.write(b"!")
        refuse(lambda: store.rows("x"))
        print(refused)
    """
    done = python(script, tmp_path, flags=["-O"])
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_the_store_needs_no_torch(tmp_path):
    script = """
        import sys
        sys.modules["torch"] = None
        import numpy as np
        from datamodels.store import Store
        with Store.create(sys.argv[1], {"num_models": 2, "schema": {"x": {"shape": [], "dtype": "int8"}}}) as store:
            store.commit_many([1], {"x": [3]})
            print(store.rows("x"))
        print(sorted(name for name in ("pandas", "scipy", "sklearn", "numba", "matplotlib") if name in sys.modules))
    """
    done = python(script, tmp_path / "s")
    assert (done.returncode, done.stdout) == (0, "[3]\n[]\n"), done.stderr


# ------------------------------------------------------------------------------------ the command


def test_status_and_verify_on_the_command_line(store, capsys):
    commit(store, [0, 1])
    store.run.take(2)
    store.fail(2, 1, "Traceback\nValueError: too bad")
    store.run.release(2, done=False)
    assert command.main(["status", str(store.path)]) == 0
    out = capsys.readouterr().out
    assert "2 of 6 rows complete (33.3 %), 0 running, 1 failed, 3 to do" in out
    assert "row 2: 1 attempt, ValueError: too bad" in out
    assert command.main(["status", str(store.path), "--store.json"]) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == [
        {"row": 2, "attempts": 1, "error": "ValueError: too bad"}
    ]
    assert command.main(["verify", str(store.path)]) == 0
    assert "2 complete rows" in (out := capsys.readouterr().out) and "all as committed" in out
    flip(store.path / "margins.npy", 128 + 3)
    assert command.main(["verify", str(store.path)]) == 1
    out = capsys.readouterr().out
    assert "row 0, 'margins': its bytes are not what was committed (checksum)" in out and "problems: 1" in out


def test_exit_codes_of_the_command(store, tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "datamodels.store", *map(str, args)], capture_output=True, text=True, timeout=60
        )

    done = run("status", tmp_path / "no")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "not a store" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("repaint", store.path)
    assert done.returncode == 2 and "verb (command line): expected one of status, verify" in done.stderr


# ------------------------------------------------------------------------------------ size


def test_a_million_rows_are_quick(tmp_path):
    """Generous bounds, for machines that are busy: what they are to catch is work per row."""
    with Store.create(tmp_path / "s", {"num_models": 10**6, "schema": {"x": {"shape": [], "dtype": "int8"}}}) as store:
        store.status()

        def best(call, times=5):
            taken = []
            for _ in range(times):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            return min(taken)

        assert best(store.status) < 0.4
        assert best(lambda: Store.open(store.path).close()) < 0.1
        store.run.take(999_999)
        assert best(lambda: [store.run.take(row) for row in range(100)], times=1) < 0.2
