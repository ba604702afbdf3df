"""More rows and more keys, in place: what was there stays bit for bit; a crash leaves a store of before or after."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodels.errors import ConfigError, SpecError, StoreError
from datamodels.spec import Field, Spec
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import grow as grows
from datamodels.store.arrays import NEXT_FILE
from datamodels.store.check import verify
from datamodels.store.disk import PosixDisk
from datamodels.store.grow import add_key, apply, grow, undo
from datamodels.store.keys import KeyStore
from tests.faults.memory import Crash, MemoryDisk

PLAIN = {
    "num_models": 9,
    "schema": {
        "x": {"shape": [70], "dtype": "float64"},
        "tag": {"shape": [], "dtype": "U4"},
        "old": {"shape": [9], "dtype": "bits", "required": False},
    },
}
GRID = {
    "schema": {"masks": {"shape": [12], "dtype": "bits"}, "y": {"shape": [], "dtype": "int8"}},
    "design": [
        {"sampler": "fixed_size", "masks": 3, "repeats": 2, "seed": 4, "choices": {"lr": [0.1, 0.2]}},
        {"role": "eval", "masks": 2, "seed": 1, "choices": {"lr": [0.1]}},
    ],
}
EXTRA = Field("extra", (3,), "int16", required=False)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The power is cut in memory; what is real here need not wait for a disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


def value(row):
    return {"x": np.arange(70) + 100.0 * row, "tag": f"r{row}"[:4]}


def commit(store, rows):
    store.commit_many(rows, {key: [value(row)[key] for row in rows] for key in ("x", "tag")})


def made(path, rows=(0, 3, 8)):
    with Store.create(path, PLAIN, sync=False) as store:
        commit(store, list(rows))
    return path


def arrays(path):
    return {str(p.relative_to(path)): np.load(p) for p in sorted(path.rglob("*.npy"))}


# ------------------------------------------------------------------------------------ more rows


def test_a_store_that_has_grown_holds_what_it_held_and_takes_more(tmp_path):
    path = made(tmp_path / "s")
    before, inodes = arrays(path), {p: p.stat().st_ino for p in path.rglob("*.npy")}
    change = grow(path, 10_000)
    assert (change.before.num_models, change.after.num_models, change.living) == (9, 10_000, ())
    after = arrays(path)
    for name, array in before.items():
        assert after[name].shape == (10_000, *array.shape[1:]) and after[name].dtype == array.dtype
        assert (after[name][:9] == array).all() and not after[name][9:].view("u1").any()
    assert inodes == {p: p.stat().st_ino for p in path.rglob("*.npy")}, "an array was rewritten"
    assert sorted(os.listdir(path)) == sorted(
        [
            "_completed.npy",
            "_keys",
            "_rows.npy",
            "claims",
            "old.npy",
            "runs",
            "spec.json",
            "tag.npy",
            "workers",
            "x.npy",
        ]
    )
    with Store.open(path) as store:
        commit(store, [9_999, 4])
        assert store.rows("tag").tolist() == ["r0", "r3", "r4", "r8", "r999"] and list(verify(store)) == []


def test_space_for_the_new_rows_is_reserved(tmp_path):
    path = made(tmp_path / "s")
    grow(path, 100_000)
    assert (path / "x.npy").stat().st_blocks * 512 >= 100_000 * 560
    grow(path, 200_000, reserve=False)
    assert (path / "x.npy").stat().st_blocks * 512 < 200_000 * 560 == (path / "x.npy").stat().st_size - 128


def test_of_a_design_no_row_changes_and_the_new_ones_are_another_block(tmp_path):
    path = tmp_path / "s"
    with Store.create(path, GRID, sync=False) as store:
        old = [store.design.assignment(row) for row in range(14)]
    grow(path, 14 + 8)
    grow(path, block={"role": "eval", "masks": 1, "choices": {"lr": [0.3]}})
    with Store.open(path) as store:
        assert store.num_models == 23 and store.design.roles.tolist() == ["train"] * 12 + ["eval"] * 2 + [
            *["train"] * 8,
            "eval",
        ]
        new = [store.design.assignment(row) for row in range(23)]
        for a, b in zip(old, new, strict=False):
            assert (a.seed, a.mask_id, dict(a.choices)) == (b.seed, b.mask_id, dict(b.choices))
            assert (a.mask == b.mask).all()
        assert [block.seed for block in store.design.blocks] == [4, 1, 2, 3]
        assert store.design.blocks[2].masks == 2 and store.design.blocks[3].sampler == "fixed_size"
        assert len({a.seed for a in new}) == 23
        store.commit_many([22, 0], {"y": [1, 2]})
        assert (store.rows("masks", [22])[0] == new[22].mask).all()


@pytest.mark.parametrize(
    ("block", "rows", "entry"),
    [
        ({"count": 5, "seed": 3}, 7, {"role": "train", "count": 2, "repeats": 2, "seed": 1}),
        (
            {"choices": {"a": [1, 2, 3]}, "repeats": 2},
            15,
            {"role": "train", "count": 9, "repeats": 3, "seed": 1, "choices": {"a": [1, 2, 3]}},
        ),
    ],
)
def test_one_more_block_of_the_only_kind(tmp_path, block, rows, entry):
    schema = {"y": {"shape": [], "dtype": "int8"}}
    Store.create(tmp_path / "s", {"schema": schema, "design": [block]}, sync=False).close()
    grow(tmp_path / "s", rows)
    grow(tmp_path / "s", rows + rows - 3 * (rows == 7) - 3 * (rows == 15))  # once more, upon what has grown
    design = json.loads((tmp_path / "s/spec.json").read_text())["design"]
    assert design[1] == entry and len(design) == 3 and len({b["seed"] for b in design}) == 3


def test_a_blocks_files_begin_where_it_stands_and_are_copied(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    Store.create(
        tmp_path / "s",
        {**GRID, "design": [{"sampler": "stratified", "labels": str(tmp_path / "labels.npy"), "masks": 2}]},
        sync=False,
    ).close()
    grow(tmp_path / "s", 4)  # with the store's own copy of the file
    (tmp_path / "b[1]").mkdir()
    np.save(tmp_path / "b[1]/other.npy", np.arange(12) % 4)
    (tmp_path / "b[1]/run.pt").touch()
    block = {"sampler": "by_group", "groups": "other.npy", "masks": 2, "choices": {"file": {"files": "*.pt"}}}
    (tmp_path / "b[1]/block.json").write_text(json.dumps(block))
    grow(tmp_path / "s", block=tmp_path / "b[1]/block.json")
    with Store.open(tmp_path / "s") as store:
        assert store.num_models == 6 and len(os.listdir(store.path / "design")) == 2
        assert store.design.assignment(5).choices == {"file": str(tmp_path / "b[1]/run.pt")}


@pytest.mark.parametrize(
    ("spec", "ask", "why"),
    [
        (PLAIN, {"num_models": 9}, "the store has 9 rows already, and only grows; got 9"),
        (PLAIN, {"num_models": 8}, "the store has 9 rows already"),
        (PLAIN, {}, "num_models: missing"),
        (PLAIN, {"block": {"count": 3}}, "no design to append a block to; give num_models"),
        (PLAIN, {"num_models": 10**10}, "the limit is 1,000,000,000"),
        (GRID, {}, "block: missing"),
        (GRID, {"num_models": 16}, r"design\[2\], count: 2 rows do not divide into 4 rows per mask"),
        (
            GRID,
            {"num_models": 18, "block": {"count": 1}},
            "num_models: 18 does not fit the design, which gives 15 rows",
        ),
        (GRID, {"block": {"count": 1, "seed": 4}}, r"seed: 4 is already design\[0\]'s"),
        (GRID, {"block": {"masks": 1, "sampler": "no"}}, r"design\[2\], sampler: expected one of"),
        (GRID, {"block": [1]}, "block: expected one block of a design"),
        (
            {**GRID, "design": [*GRID["design"], {"count": 3, "seed": 9}]},
            {"num_models": 20},
            "the design has 2 kinds of train blocks, so it is not clear what the new rows are to be",
        ),
        (
            {**GRID, "design": [{"choices": {"a": [1, 2]}}]},
            {"num_models": 3},
            "1 rows more do not divide into the 2 cells of the grid",
        ),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, spec, ask, why):
    Store.create(tmp_path / "s", spec, sync=False).close()
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file() and p.parent.name != "runs"}
    with pytest.raises((SpecError, StoreError), match=why):
        grow(tmp_path / "s", **ask)
    assert before == {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file() and p.parent.name != "runs"}


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 400), min_size=2, max_size=5, unique=True), shape=st.lists(st.integers(0, 3)))
def test_growing_in_steps_is_growing_at_once(tmp_path_factory, sizes, shape):
    folder = tmp_path_factory.mktemp("g")
    spec = {"num_models": min(sizes), "schema": {"x": {"shape": shape, "dtype": "U2"}}}
    with Store.create(folder / "steps", spec, sync=False) as store:
        store.commit_many([0], {"x": np.full((1, *shape), "ab")})
    for size in sorted(sizes)[1:]:
        grow(folder / "steps", size, reserve=False)
    with Store.create(folder / "once", {**spec, "num_models": max(sizes)}, sync=False) as store:
        store.commit_many([0], {"x": np.full((1, *shape), "ab")})
    for name in ("x.npy", "_completed.npy", "_keys/x.npy", "spec.json"):
        assert (folder / "steps" / name).read_bytes() == (folder / "once" / name).read_bytes()
    assert (folder / "steps/_rows.npy").stat().st_size == (folder / "once/_rows.npy").stat().st_size


CHANGES = {  # what of the spec each is to change
    "rows": ({"num_models"}, lambda path: grow(path, 20)),
    "block": ({"num_models", "design"}, lambda path: grow(path, block={"count": 3, "sampler": None})),
    "key": ({"schema"}, lambda path: add_key(path, EXTRA)),
}


@pytest.mark.parametrize(
    ("measured", "key", "option"),
    [
        (None, "accuracy", ""),
        ({"names": ["leep"]}, "accuracy", " --measure.names=accuracy"),
        ({"names": ["leep"], "on": ["a/test"]}, "a_test_accuracy", " --measure.names=accuracy@a/test"),
        ({"names": ["drop@a/x->b/x"]}, "a_x_to_b_x_accuracy_drop", " '--measure.names=accuracy_drop@a/x->b/x'"),
    ],
)
def test_the_command_that_fills_a_key_in_says_what_to_measure(tmp_path, capsys, measured, key, option):
    spec = {"num_models": 2, "schema": {"y": {"shape": [], "dtype": "int8"}}}
    Store.create(tmp_path / "s", spec | ({"measurements": measured} if measured else {}), sync=False).close()
    assert command.main(["add-key", str(tmp_path / "s"), key, "--dtype=float64"]) == 0
    line = f"python -m datamodels.worker --worker.keys={key}{option} … fills it in, of rows that are complete"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("kind", CHANGES)
def test_everything_else_of_the_spec_stays(tmp_path, kind):
    whole = {
        "num_models": 9,
        "schema": {"y": {"shape": [], "dtype": "int8"}},
        "design": [{"count": 9, "sampler": None, "seed": 1}],
        "measurements": {"names": ["leep", "logme"], "on": ["digits/test"], "samples": 5},
    }
    assert whole.keys() == {field.name for field in fields(Spec)}, "give the new field a value"
    if kind == "rows":
        del whole["design"]
    path, (changed, change) = tmp_path / "s", CHANGES[kind]
    Store.create(path, whole, sync=False).close()
    before = json.loads((path / "spec.json").read_bytes())
    change(path)
    after = json.loads((path / "spec.json").read_bytes())
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == changed


# ------------------------------------------------------------------------------------ one more key


def test_a_key_is_added_and_rows_stay_complete(tmp_path):
    path = made(tmp_path / "s")
    before = {name: (path / name).read_bytes() for name in arrays(path)}
    change = add_key(path, EXTRA)
    assert list(change.after.schema) == ["x", "tag", "old", "extra"]
    assert before == {name: (path / name).read_bytes() for name in before}
    assert np.load(path / "extra.npy").shape == (9, 3)
    with Store.open(path) as store:
        assert store.completed().sum() == 3 and store.rows("extra").shape == (0, 3) and list(verify(store)) == []
        store.commit_many([1], {"x": [value(1)["x"]], "tag": ["new"], "extra": [[1, 2, 3]]})
        assert store.rows("extra").tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("field", "why"),
    [
        (Field("x", (), "int8", required=False), "key 'x': the store has it already"),
        (Field("X", (), "int8", required=False), "'x' and 'X' differ only in case"),
        (Field("y", (), "int8"), "key 'y': rows that are complete do not have it, so it must be optional"),
        (Field("mine", (), "int8", required=False), "mine.npy: exists, and is not of this store"),
    ],
)
def test_a_key_that_is_refused(tmp_path, field, why):
    path = made(tmp_path / "s")
    (path / "mine.npy").write_text("mine")
    before = (path / "spec.json").read_bytes()
    with pytest.raises((SpecError, StoreError), match=why):
        add_key(path, field)
    assert (path / "spec.json").read_bytes() == before and (path / "mine.npy").read_text() == "mine"
    assert not (path / "_keys/mine.npy").exists() and not (path / NEXT_FILE).exists()


@pytest.mark.parametrize("replace", [True, False])
def test_who_opened_the_store_before_the_key_was_added_does_not_leave_an_old_value_of_it(tmp_path, replace):
    """A row that is run again must not keep a metric of the model that it held before."""
    path = made(tmp_path / "s", [0, 1])
    with Store.open(path) as old:
        add_key(path, EXTRA)
        with KeyStore.of(path, ["extra"]) as filler:
            filler.commit_many([0, 1], {"extra": [[1, 1, 1], [2, 2, 2]]})
        if not replace:  # the flag is gone, as after a crash, and the records are there
            old.layout.write("_completed.npy", [1], [b"\0"], lambda: None)
        old.commit_many([1], {"x": [value(5)["x"]], "tag": ["new"]}, replace=replace)
    with Store.open(path) as store:
        assert store.rows("extra").tolist() == [[1, 1, 1]] and store.rows("tag").tolist() == ["r0", "new"]
        assert list(verify(store)) == []


# ------------------------------------------------------------------------------------ crashes


class Disk(MemoryDisk):
    """Making a file and making it longer each end in a sync, so that a crash finds them done or not begun."""

    def create(self, name, head, size, *, reserve):
        assert name not in self.cached
        self.put(name, head + bytes(size - len(head)))

    def resize(self, name, size, *, reserve):
        assert not [entry for entry in self.pending if entry[0] == name]
        self.put(name, bytes(self.cached[name][:size]).ljust(size, b"\0"))


def files_of(path):
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.relative_to(path).parts[0] not in ("runs", "claims", "workers")
    }


def written(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def states(files, call, known):
    """(where, files) of every different state that a power cut during `call(disk)` may leave."""
    for stop in range(1, 1000):
        disk = Disk(files, stop_at=stop)
        try:
            call(disk)
        except Crash:
            for name, left in disk.survivors(draws=2, seed=stop):
                state = hash(tuple(sorted(left.items())))
                if state not in known:
                    known.add(state)
                    yield f"operation {stop}, {name}", left
        else:
            assert stop > 3
            return


def opens(path, old, new, where):
    """The spec that the store at `path` opens with: one of the two, its rows as they were."""
    with Store.open(path) as store:
        assert store.spec in (old, new), where
        assert store.completed()[:9].tolist() == [row in (0, 3, 8) for row in range(9)], where
        for key in ("x", "tag"):
            assert all(
                np.array_equal(got, value(row)[key]) for got, row in zip(store.rows(key), (0, 3, 8), strict=True)
            )
        assert list(verify(store)) == [], where
        for name in ("x", "_completed", "_rows", "_keys/tag"):
            assert len(np.load(path / f"{name}.npy")) >= store.num_models, where
        return store.spec


def changed(kind, old):
    if kind == "grow":
        return old.with_rows(40, None), lambda path: grow(path, 40)
    return Spec(9, {**old.schema, "extra": EXTRA}), lambda path: add_key(path, EXTRA)


@pytest.mark.parametrize(
    ("kind", "twice"), [("grow", False), ("add-key", True), pytest.param("grow", True, marks=pytest.mark.slow)]
)
def test_every_crash_leaves_the_store_of_before_or_after(tmp_path, kind, twice):
    """With `twice`, the undoing of what was cut short is cut short too."""
    files = files_of(made(tmp_path / "s"))
    old = Spec.load(tmp_path / "s/spec.json")
    new, change = changed(kind, old)
    final, found, known, count = None, set(), set(), 0

    def check(where, left):
        nonlocal final, count
        count += 1
        path = written(tmp_path / f"{kind}{count}", left)
        spec = opens(path, old, new, where)
        found.add(spec == new)
        with Store.open(path) as store:  # a worker may come first
            commit(store, [5])
            store.commit_encoded({5: store.encode(5, value(5))}, replace=True)
        if spec == old:
            change(path)
        else:  # and a later change finishes the tidying
            grow(path, 70)
        with Store.open(path) as store:
            assert store.spec == (new if spec == old else store.spec.with_rows(70, None)), where
            assert store.completed()[:9].tolist() == [row in (0, 3, 5, 8) for row in range(9)], where
            assert list(verify(store)) == [], where
        end = {name: data for name, data in files_of(path).items() if name not in ("_rows.npy", "_keys/old.npy")}
        assert NEXT_FILE not in end and grows.MARKER not in os.listdir(path), where
        if spec == old:
            final = final or end
            assert end == final, f"{where}: {[n for n in end if end.get(n) != final.get(n)]}"

    for where, left in states(files, lambda disk: apply(disk, old, new, {}, reserve=True, folder=tmp_path), known):
        check(where, left)
        if twice and NEXT_FILE in left and left["spec.json"] == files["spec.json"]:
            for again, rest in states(left, lambda disk: undo(disk, old, new), known):
                check(f"{where}, then {again} of undoing it", rest)
    assert found == {True, False} and count > 5


def open_all(every, old, new, folder):
    for number, (where, left) in enumerate(every):
        opens(written(folder / f"m{number}", left), old, new, where)


def test_the_simulator_catches_headers_before_the_arrays_are_longer(tmp_path, monkeypatch):
    files = files_of(made(tmp_path / "s"))
    old = Spec.load(tmp_path / "s/spec.json")
    new, _ = changed("grow", old)

    def early(disk):
        disk.resize = lambda *which, **how: None
        apply(disk, old, new, {}, reserve=True, folder=tmp_path)

    with pytest.raises((StoreError, ValueError), match="cut short|cannot reshape"):
        open_all(states(files, early, set()), old, new, tmp_path)


def test_the_simulator_catches_a_spec_that_comes_before_the_headers(tmp_path, monkeypatch):
    files = files_of(made(tmp_path / "s"))
    old = Spec.load(tmp_path / "s/spec.json")
    new, _ = changed("grow", old)
    monkeypatch.setattr(Disk, "sync", lambda self, names: None)
    monkeypatch.setattr(grows, "_rewrite", lambda disk, heads: [disk.write(name, 0, heads[name]) for name in heads])

    every = states(files, lambda disk: apply(disk, old, new, {}, reserve=True, folder=tmp_path), set())
    with pytest.raises(StoreError, match="expected shape"):
        open_all(
            ((where, {n: d for n, d in left.items() if n != NEXT_FILE}) for where, left in every), old, new, tmp_path
        )


@pytest.mark.parametrize("kind", ["grow", "add-key"])
def test_a_change_that_fails_leaves_the_store_as_it_was(tmp_path, monkeypatch, kind):
    """No space, at any step."""
    path = made(tmp_path / "s")
    before, old = files_of(path), Spec.load(path / "spec.json")
    _, change = changed(kind, old)
    for name in ("create", "resize", "write", "put"):
        real, left = getattr(PosixDisk, name), [0]
        for fail_at in range(1, 12):
            left[0] = fail_at

            def failing(self, *which, real=real, left=left, **how):
                left[0] -= 1
                if left[0] == 0:
                    raise StoreError("No space left on device: the disk is full")
                return real(self, *which, **how)

            monkeypatch.setattr(PosixDisk, name, failing)
            with contextlib.suppress(StoreError):
                change(path)
            monkeypatch.undo()
            if left[0] > 0:  # there are not so many calls
                break
            assert files_of(path) == before, f"{name}, call {fail_at}"
        else:
            raise AssertionError("it always failed")
        for name in files_of(path):
            (path / name).unlink()
        written(path, before)


# ------------------------------------------------------------------------------------ others at work

WORKER = """
    import sys, time
    import numpy as np
    from datamodels.store import Store
    with Store.open(sys.argv[1], sync=False) as store:
        print(store.num_models, flush=True)
        version, end = 0, time.time() + float(sys.argv[2])
        while time.time() < end:
            version += 1
            for row in range(9):
                store.commit_many([row], {"x": np.full((1, 70), version), "tag": [str(version % 999)]}, replace=True)
                got = store.rows("x", [row])
                assert (got == version).all(), (row, version, got)
        print(version, flush=True)
"""


def test_workers_go_on_while_the_store_grows_and_gets_keys(tmp_path):
    path = made(tmp_path / "s")
    script = textwrap.dedent(WORKER)
    worker = subprocess.Popen([sys.executable, "-c", script, path, "4"], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout.readline() == "9\n"
        size, keys = 9, 0
        while worker.poll() is None:
            size, keys = size + 1000, keys + 1
            change = grow(path, size)
            assert len(change.living) <= 1
            add_key(path, Field(f"k{keys}", (), "int8", required=False))
            with Store.open(path) as store:
                assert store.num_models == size
                store.commit_many([size - 1], {"x": np.zeros((1, 70)), "tag": ["mine"]})
        assert worker.returncode == 0 and int(worker.stdout.readline()) > 5 and keys > 3
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    with Store.open(path) as store:
        assert list(verify(store)) == [] and len(store.rows("x")) == 9 + keys
        assert len(set(store.rows("x", range(9))[:, 0].tolist())) <= 2


def test_of_two_changes_at_once_one_is_refused(tmp_path, monkeypatch):
    path = made(tmp_path / "s")
    real, refused = grows.apply, []

    def slow(*which, **how):
        with pytest.raises(StoreError, match="another process is changing this store; nothing is changed"):
            grow(path, 50)
        refused.append(1)
        real(*which, **how)

    monkeypatch.setattr(grows, "apply", slow)
    grow(path, 20)
    assert refused and Store.open(path).num_models == 20


# ------------------------------------------------------------------------------------ the command


def test_on_the_command_line(tmp_path, capsys):
    path = str(made(tmp_path / "s"))
    with Store.open(path) as store:
        run = store.run.id
        assert command.main(["grow", path, "--num_models", "20"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{path}: 9 rows before, 20 now\n1 process at work go on with the rows that they know;")
        assert f"  run {run} on " in out
    assert command.main(["add-key", path, "extra", "--dtype=int16", "--shape=3", "--role=property"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: extra.npy, int16 [20, 3], 0.0 MB; no row has it yet\n" in out and "at work" not in out
    assert Store.open(path).spec.schema["extra"] == Field("extra", (3,), "int16", role="property", required=False)
    Store.create(tmp_path / "d", GRID, sync=False).close()
    assert command.main(["grow", str(tmp_path / "d"), '--block={"role": "eval", "masks": 1}']) == 0
    assert "14 rows before, 15 now: block 2, eval, seed 2\n" in capsys.readouterr().out
    for argv, why in (
        (["grow", path, "--block={'a': 1}"], r"--block \(command line\): not JSON"),
        (["add-key", path, "b", "--dtype=int8", "--shape=2,x"], r"--shape \(command line\): expected ints, as in 2,9"),
        (["add-key", path, "--dtype=int8"], "name .command line. is missing"),
        (["add-key", path, "b"], "--dtype is required"),
    ):
        with pytest.raises(ConfigError, match=why):
            command.main(argv)
