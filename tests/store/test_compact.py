"""A compacted store holds the same values with packed masks, the same records, runs and folders, and is resumable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import StoreError
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.compact import compact

ROOT = Path(__file__).parent.parent.parent
SPEC = {
    "schema": {
        "masks": {"shape": [21], "dtype": "bool", "role": "mask"},
        "hit": {"shape": [2, 9], "dtype": "bool", "required": False},
        "ok": {"shape": [], "dtype": "bool"},
        "one": {"shape": [3, 1], "dtype": "bool"},
        "y": {"shape": [3], "dtype": "float32", "allow_nonfinite": True},
    },
    "design": [{"sampler": "by_group", "groups": "groups.npy", "masks": 6, "seed": 1}],
}
PACKED = {"masks": (21, 3), "hit": (2, 9)}


def values(row):
    rng = np.random.default_rng(row)
    return {"hit": rng.random((2, 9)) < 0.5, "ok": row % 2 == 0, "one": np.ones((3, 1), bool), "y": [row, np.nan, -0.0]}


@pytest.fixture
def store(tmp_path, monkeypatch):
    np.save(tmp_path / "groups.npy", np.arange(21) % 4)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    with Store.create(tmp_path / "A", tmp_path / "spec.json", sync=False) as made:
        for row in (0, 2, 3, 5):
            (made.path / "workers" / str(row)).mkdir()
            (made.path / "workers" / str(row) / "main.log").write_text(f"row {row}")
            made.commit_many([row], {k: [v] for k, v in values(row).items() if (k, row) != ("hit", 3)})
        assert made.run.take(4)
        made.fail(4, *made.begin([4]), "Traceback\nValueError: no luck")
        made.run.release(4, done=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "A"


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_values_in_fewer_bytes(store, tmp_path):
    before = everything(store)
    done = compact(store, tmp_path / "sub" / "B")
    assert everything(store) == before and done.keys == ("masks", "hit") and done.merged.copied == 4
    assert (
        done.before
        > done.after
        == sum(os.path.getsize(p) for p in (tmp_path / "sub" / "B").rglob("*.npy") if "design" not in p.parts)
    )
    with Store.open(store) as old, Store.open(tmp_path / "sub" / "B") as new:
        assert list(verify(new)) == []
        rows = [0, 2, 3, 5]
        assert np.flatnonzero(new.completed()).tolist() == rows
        for key, field in old.spec.schema.items():
            mine = [row for row in rows if (key, row) != ("hit", 3)]
            np.testing.assert_array_equal(new.rows(key), old.rows(key))
            assert len(new.rows(key)) == len(mine)
            was, now = np.load(old.path / f"{key}.npy")[mine], np.load(new.path / f"{key}.npy")[mine]
            if key in PACKED:
                size = field.shape[-1]
                np.testing.assert_array_equal(np.unpackbits(now, axis=-1, count=size, bitorder="little"), was)
                assert new.spec.schema[key].dtype == "bits" and new.spec.schema[key].role == field.role
            else:
                assert now.tobytes() == was.tobytes() and new.spec.schema[key] == field
        for row in rows:
            assert new.layout.row_records([row]).tobytes() == old.layout.row_records([row]).tobytes()
            np.testing.assert_array_equal(new.design.assignment(row).mask, new.rows("masks", [row])[0])
            assert (new.path / "workers" / str(row) / "main.log").read_text() == f"row {row}"
        assert {p.name for p in (old.path / "runs").iterdir()} <= {p.name for p in (new.path / "runs").iterdir()}
        assert everything(new.path / "design") == everything(old.path / "design") != {}


def test_it_goes_on_where_it_was_interrupted(store, tmp_path):
    compact(store, tmp_path / "B")
    first = everything(tmp_path / "B")
    assert compact(store, tmp_path / "B").merged.copied == 0
    assert everything(tmp_path / "B") == first
    with Store.open(store) as old:
        old.commit_many([1], {k: [v] for k, v in values(1).items()})
    assert compact(store, tmp_path / "B").merged.copied == 1
    with Store.open(tmp_path / "B") as new:
        np.testing.assert_array_equal(new.rows("hit", [1])[0], values(1)["hit"])
        np.testing.assert_array_equal(new.rows("masks", [1])[0], new.design.assignment(1).mask)
    with Store.open(store) as old:  # an optional key that came later
        old.commit_many([3], {k: [v] for k, v in values(3).items()}, replace=True)
    before = everything(tmp_path / "B")
    with pytest.raises(StoreError, match=r"B: 1 of its rows are of other runs than in .*A: 3; nothing is written"):
        compact(store, tmp_path / "B")
    assert everything(tmp_path / "B") == before
    command.main(["reset", str(tmp_path / "B"), "--rows=3"])
    assert compact(store, tmp_path / "B").merged.missing == ()


def test_an_optional_key_that_was_filled_in_later(store, tmp_path):
    compact(store, tmp_path / "B")
    with Store.open(store) as old:
        packed = values(3)["hit"].tobytes()
        commits.fill(old.layout, [3], {"hit": [packed]}, {"hit": [1]})
    assert compact(store, tmp_path / "B").merged.sources[0].keys == {"hit": 1}
    with Store.open(tmp_path / "B") as new:
        assert list(verify(new)) == []
        np.testing.assert_array_equal(new.rows("hit", [3])[0], values(3)["hit"])


def test_another_store_is_refused(store, tmp_path):
    spec = json.loads((store / "spec.json").read_text())
    with pytest.raises(StoreError, match="is the target and a source at once"):
        compact(store, store)
    shutil.copytree(store, tmp_path / "E")
    with pytest.raises(StoreError, match='schema, \'masks\', dtype: "bits" and "bool"'):
        compact(store, tmp_path / "E")
    with pytest.raises(StoreError, match="nothing to compact: no key is a bool array"):
        compact(store, tmp_path / "B") and compact(tmp_path / "B", tmp_path / "C")
    assert not (tmp_path / "C").exists()
    spec["schema"]["y"]["dtype"] = "float64"
    spec["schema"]["masks"]["dtype"] = spec["schema"]["hit"]["dtype"] = "bits"
    spec["design"][0]["groups"]["file"] = str(store / spec["design"][0]["groups"]["file"])
    Store.create(tmp_path / "D", spec).close()
    with pytest.raises(StoreError, match="schema, 'y', dtype"):
        compact(store, tmp_path / "D")


def test_the_command(store, tmp_path, capsys):
    assert command.main(["compact", str(store), f"--into={tmp_path}/B"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}/B: a new store"
    assert said[2] == "  row 4 failed: 1 attempt, ValueError: no luck; left to be run"
    assert said[-2].startswith(f"{tmp_path}/B: 4 of 6 rows complete, 4 copied")
    assert said[-1].startswith("masks, hit packed: ") and "times smaller" in said[-1]
    file = store / "y.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = subprocess.run(
        [sys.executable, "-m", "datamodels.store", "compact", store, f"--into={tmp_path}/C"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "row 5 is damaged: 'y': its bytes are not what was committed" in done.stdout
    assert "complete in a source and not here: 5 (1)" in done.stdout
