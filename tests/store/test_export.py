"""A table holds exactly what was committed: compared with plain numpy's view of the files, not with the store's own."""

import csv
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from datamodels.errors import ConfigError, StoreError
from datamodels.store import Store
from datamodels.store import __main__ as command
from datamodels.store import export as export_module
from datamodels.store import rows as rows_module
from datamodels.store.export import export
from tests import needs

ROOT = Path(__file__).parent.parent.parent
NUMBERS = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64"),
)
SHAPES = {"scalar": (), "vector": (3,), "matrix": (2, 3), "deep": (2, 1, 2), "none": (0,), "nothing": (2, 0)}
WORDS = ["", "plain", 'a "b"', "a,b", "line\nbreak", "line\rbreak", "naïve ☃", " 1.0 ", "null", "NaN"]
ROWS = [0, 1, 3, 4, 7]


def schema():
    found = {}
    for name, shape in SHAPES.items():
        for dtype in NUMBERS:
            found[f"{name}.{dtype}"] = {
                "shape": list(shape),
                "dtype": dtype,
                "required": dtype not in ("float16", "uint64"),
            }
            if dtype.startswith("float"):
                found[f"{name}.{dtype}"]["allow_nonfinite"] = True
        found[f"{name}.text"] = {"shape": list(shape), "dtype": "U12", "required": False}
        if shape:
            found[f"{name}.bits"] = {"shape": list(shape), "dtype": "bits"}
    return found


def anything(entry, rng):
    """A value of any bytes: NaN payloads, negative zeros, subnormals and the largest integers among them."""
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype == "U12":
        return np.array(rng.choice(WORDS, shape or None), "U12")
    if dtype in ("bool", "bits"):
        return rng.random(shape) < 0.5
    size = np.dtype(dtype).itemsize
    value = np.frombuffer(rng.bytes(size * math.prod(shape)), dtype).reshape(shape).copy()
    if dtype.startswith("float") and value.size:
        kinds = [np.nan, -np.nan, -0.0, np.inf, -np.inf, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max, 0.1]
        value[rng.random(shape) < 0.4] = np.array(kinds, dtype)[rng.integers(len(kinds))]
        odd = np.full(shape, np.nan, dtype).view(f"u{size}") + np.array(5, f"u{size}")
        value = np.where(rng.random(shape) < 0.3, odd.view(dtype), value)
    return value


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A store of every dtype in several shapes; of row 3 the optional keys are missing."""
    path, rng = tmp_path_factory.mktemp("varied") / "store", np.random.default_rng(0)
    entries = schema()
    with Store.create(path, {"num_models": 9, "schema": entries}, sync=False) as store:
        for row in ROWS:
            there = {k: e for k, e in entries.items() if row != 3 or e.get("required", True)}
            store.commit_many([row], {key: [anything(entry, rng)] for key, entry in there.items()})
    return path


def plain(path, key, rows=ROWS):
    """(rows, *shape) of a key, as numpy alone reads the files."""
    array = np.load(path / f"{key}.npy", allow_pickle=False)[list(rows)]
    entry = json.loads((path / "spec.json").read_text())["schema"][key]
    if entry["dtype"] == "bits":
        return np.unpackbits(array, axis=-1, count=entry["shape"][-1], bitorder="little").astype(bool)
    return array


def parquet(path):
    needs.pyarrow()
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


def flattened(column):
    """The entries of the lines of a column that are not missing, as one numpy array."""
    array = column.combine_chunks().drop_null()
    while hasattr(array, "flatten") and str(array.type).startswith(("fixed_size_list", "list")):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    return {name: [line[i] for line in lines] for i, name in enumerate(head)}


# ------------------------------------------------------------------------------------ bit for bit


def test_parquet_is_bit_exact(varied, tmp_path):
    needs.pyarrow()
    with Store.open(varied) as store:
        done = export(store, tmp_path / "t.parquet")
    table, nans = parquet(tmp_path / "t.parquet"), set()
    assert done.rows == table.num_rows == len(ROWS) and done.incomplete == 4 and done.left_out == {}
    assert list(done.columns) == table.column_names
    for key, entry in schema().items():
        there = [row for row in ROWS if row != 3 or entry.get("required", True)]
        assert table[key].is_valid().to_pylist() == [row in there for row in ROWS], key
        wanted, found = plain(varied, key, there), flattened(table[key])
        if entry["dtype"] == "U12":
            assert found.tolist() == wanted.ravel().tolist(), key
            continue
        kind = str(table.schema.field(key).type)
        inner = kind.partition("element: ")[2].rpartition("element: ")[2].partition(">")[0] or kind
        names = {"bits": "bool", "float16": "halffloat", "float32": "float", "float64": "double"}
        assert inner == names.get(entry["dtype"], entry["dtype"]), key
        if math.prod(entry["shape"]):
            assert kind.count("fixed_size_list") == len(entry["shape"])
            assert [f"[{n}]" for n in entry["shape"]] == [f"[{k.partition(']')[0]}]" for k in kind.split("[")[1:]][::-1]
            assert found.astype(wanted.dtype).tobytes() == found.tobytes() == wanted.tobytes(), key
        else:
            assert "fixed" not in kind  # arrow divides by the size of such a list, and the reader's process dies
            assert found.size == 0 and len(table[key].drop_null()) == len(there)
        if entry["dtype"] == "float16" and found.size:
            nans.update(found.view("u2")[np.isnan(found)].tolist())
    assert 0x7E05 in nans, "no NaN with a payload was tried"


def test_csv_reads_back_as_the_same_numbers(varied, tmp_path):
    with Store.open(varied) as store:
        done = export(store, tmp_path / "t.csv")
    table = read_csv(tmp_path / "t.csv")
    assert list(table) == list(done.columns)
    for key, entry in schema().items():
        wanted = plain(varied, key)
        for index in np.ndindex(tuple(entry["shape"])):
            found = table[key + "".join(f"[{i}]" for i in index)]
            for row, text, value in zip(ROWS, found, wanted[(slice(None), *index)], strict=True):
                if row == 3 and not entry.get("required", True):
                    assert text == ""
                elif entry["dtype"].startswith("float"):
                    number = np.array(float(text), entry["dtype"])
                    assert number == value or (np.isnan(number) and np.isnan(value))
                    assert np.isnan(value) or float(text) == float(value)
                    assert math.copysign(1, number) == math.copysign(1, value) or np.isnan(value)
                elif entry["dtype"] == "U12":
                    assert text == value
                else:
                    assert text == str(value if entry["dtype"] != "bits" else bool(value))
    assert len({len(column) for column in table.values()}) == 1


# ------------------------------------------------------------------------------------ the other columns

DESIGN = {
    "schema": {
        "masks": {"shape": [8], "dtype": "bits"},
        "lr": {"shape": [], "dtype": "float32", "required": False},
        "seconds": {"shape": [], "dtype": "float64"},
        "seen": {"shape": [5], "dtype": "bits", "role": "mask"},
        "long": {"shape": [101], "dtype": "float32"},
        "short": {"shape": [100], "dtype": "int8"},
    },
    "design": [
        {
            "sampler": "bernoulli",
            "masks": 2,
            "repeats": 2,
            "seed": 1,
            "choices": {"lr": [0.1, 0.2], "depth": [1, 2], "warm": [True, False], "role": ["a", 1, 0.5]},
            "filter": [["lr", "<", "depth"], ["depth", "!=", 2]],
        },
        {"role": "eval", "masks": 1, "repeats": 3, "seed": 2, "choices": {"size": [1, 2.5], "warm": [False]}},
    ],
}


@pytest.fixture
def designed(tmp_path):
    with Store.create(tmp_path / "store", DESIGN, sync=False) as store:
        rows = [row for row in range(store.num_models) if row % 5]
        for row in rows:
            assert store.run.take(row)
            store.begin([row])
            values = {"seconds": row / 3, "seen": np.ones(5, bool), "long": np.full(101, row), "short": np.ones(100)}
            store.commit_many([row], {key: [value] for key, value in values.items()})
            store.run.release(row, done=True)
        yield store


def test_what_the_store_knows_of_a_row(designed, tmp_path):
    rows = np.flatnonzero(designed.completed()).tolist()
    export(designed, tmp_path / "t.parquet")
    table = parquet(tmp_path / "t.parquet").to_pydict()
    records = np.load(designed.path / "_rows.npy")[rows]
    assert list(table)[:11] == (
        ["row", "_role", "mask_id", "seed", "depth", "warm", "role", "size", "attempts", "started", "finished"]
    )
    assert table["row"] == rows and set(table) == {
        *list(table)[:11],
        "_seconds",
        "run",
        "lr",
        "seconds",
        "long",
        "short",
    }
    for name in ("attempts", "started", "finished", "seed"):
        assert table[name] == records[name].tolist()
    assert table["_seconds"] == (records["finished"] - records["started"]).tolist()
    assert table["run"] == [designed.run.id] * len(rows)
    assert table["seconds"] == [row / 3 for row in rows]
    for i, row in enumerate(rows):
        assignment = designed.design.assignment(row)
        assert table["_role"][i] == assignment.role and table["seed"][i] == assignment.seed
        factors = {name: table[name][i] for name in ("depth", "warm", "role", "size")}
        wanted = {name: assignment.choices.get(name) for name in factors}
        wanted["role"] = None if wanted["role"] is None else str(wanted["role"])
        assert factors == wanted and table["lr"][i] == (
            np.float32(assignment.choices["lr"]) if "lr" in assignment.choices else None
        )
        same = [k for k, other in enumerate(rows) if (designed.design.assignment(other).mask == assignment.mask).all()]
        assert [k for k, number in enumerate(table["mask_id"]) if number == table["mask_id"][i]] == same
    kinds = {name: str(parquet(tmp_path / "t.parquet").schema.field(name).type) for name in table}
    assert [kinds[n] for n in ("depth", "warm", "role", "size")] == ["int64", "bool", "string", "double"]


def test_factors_keep_their_values():
    needs.pyarrow()
    choices = {
        "big": [2**53 + 1, 0.5],
        "huge": [2**63, 1],
        "flag": [True, "auto"],
        "name": ["x", "tail\0"],
        "n": [-(2**63), 2**63 - 1],
    }
    spec = {"schema": {"y": {"shape": [], "dtype": "int8"}}, "design": [{"choices": choices}]}
    from datamodels.design import resolve
    from datamodels.spec import Spec

    design = resolve(Spec.from_json(spec), ".").design
    for name in choices:
        found, missing = export_module._levels(design, name)
        wanted = [cell[name] for cell in design.blocks[0].cells]
        assert not missing.any()
        if name != "n":
            wanted = [value if isinstance(value, str) else json.dumps(value) for value in wanted]
        assert found.tolist() == wanted and found.dtype == (np.int64 if name == "n" else object)


def test_masks_and_what_is_long_in_csv_are_left_out(designed, tmp_path, capsys):
    done = export(designed, tmp_path / "t.csv")
    assert done.left_out == {"masks": "a mask", "seen": "a mask", "long": "101 columns in csv, one in parquet"}
    names = set(read_csv(tmp_path / "t.csv"))
    assert {"short[0]", "short[99]", "lr"} <= names and not any(n.startswith(("masks", "long")) for n in names)
    done = export(designed, tmp_path / "t.csv", keys=["long", "masks"])
    table = read_csv(tmp_path / "t.csv")
    assert done.left_out == {} and table["masks[7]"] == [str(m[7]) for m in designed.rows("masks")]
    assert "long[100]" in table and "short[0]" not in table and table["seconds"] and "lr" in table
    with pytest.raises(ConfigError, match=r"no key 'mask'; it has masks, lr"):
        export(designed, tmp_path / "t.csv", keys=["mask"])
    assert command.main(["export", str(designed.path), f"--table={tmp_path}/t.parquet"]) == 0
    said = capsys.readouterr().out
    assert "masks is not in it: a mask; name it in --keys to have it" in said and "long is not" not in said
    assert "long" in parquet(tmp_path / "t.parquet").column_names


def test_rows_by_condition(designed, tmp_path):
    done = export(designed, tmp_path / "t.csv", rows=["depth=1", "warm=true", "0-19"])
    rows = [int(row) for row in read_csv(tmp_path / "t.csv")["row"]]
    wanted = [row for row in range(20) if designed.design.assignment(row).choices.get("warm") is True]
    assert rows == [row for row in wanted if row % 5] and done.incomplete == len(wanted) - len(rows) > 0
    with pytest.raises(ConfigError, match="--rows: 'width=3': 'width' is not a factor"):
        export(designed, tmp_path / "t.csv", rows=["width=3"])
    with pytest.raises(StoreError, match="none of the rows asked for is complete"):
        export(designed, tmp_path / "u.csv", rows=["5"])
    with Store.create(tmp_path / "empty", DESIGN) as store, pytest.raises(StoreError, match="no row is complete"):
        export(store, tmp_path / "u.csv")
    assert not (tmp_path / "u.csv").exists()


# ------------------------------------------------------------------------------------ whole, or nothing


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_damaged_row_is_named_and_no_table_is_written(designed, tmp_path, monkeypatch, kind):
    if kind == "parquet":
        needs.pyarrow()
    monkeypatch.setattr(rows_module, "_ROWS", 4)
    export(designed, tmp_path / f"t.{kind}")
    before = (tmp_path / f"t.{kind}").read_bytes()
    rows = np.flatnonzero(designed.completed()).tolist()
    row = rows[-3]
    with open(designed.path / "long.npy", "r+b") as file:
        file.seek(-(designed.num_models - row) * 404, os.SEEK_END)
        file.write(struct.pack("<f", -1.0))
    with pytest.raises(StoreError, match=rf"row {row}: 'long': its bytes are not what was committed .*; no table is"):
        export(designed, tmp_path / f"t.{kind}", keys=["long"])
    assert (tmp_path / f"t.{kind}").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", f"t.{kind}"]
    assert export(designed, tmp_path / f"t.{kind}", keys=["short"]).rows == len(rows)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(rows_module, "_BYTES", 1 << 18)
    spec = {
        "num_models": 400,
        "schema": {"x": {"shape": [25_000], "dtype": "float32"}, "n": {"shape": [], "dtype": "int16"}},
    }
    with Store.create(tmp_path / "A", spec, sync=False) as store:
        for start in range(0, 400, 40):
            store.commit_many(
                range(start, start + 40), {"x": np.full((40, 25_000), start, "f4"), "n": range(start, start + 40)}
            )
        if kind == "parquet":
            needs.pyarrow()
            import pyarrow

            pyarrow.default_memory_pool()
        export(store, tmp_path / f"t.{kind}", rows=["0-9"], keys=["n"])  # what is imported is not counted
        tracemalloc.start()
        try:
            rows = ["0-19"] if kind == "csv" else []  # csv is slow under tracemalloc; ten batches are enough
            export(store, tmp_path / f"t.{kind}", rows=rows, keys=["x"])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    if kind == "parquet":
        assert peak + pyarrow.default_memory_pool().max_memory() < 20 << 20, peak  # of 40 MB
        assert pyarrow.parquet.ParquetFile(tmp_path / "t.parquet").num_row_groups == 200
    else:
        assert peak < 10 << 20, peak  # 20 rows are 500,000 floats, which Python keeps in 16 MB


# ------------------------------------------------------------------------------------ the command


def test_without_pyarrow_csv_works_and_parquet_says_what_to_install(designed, tmp_path):
    script = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "pyarrow":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocked())
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == "pyarrow" else real(name, *more)
        from datamodels import cli
        from datamodels.store import __main__ as command
        cli.run(lambda: command.main(["export", {str(designed.path)!r}, "--table=" + sys.argv[1]]))
    """
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), tmp_path / name], cwd=ROOT, capture_output=True, text=True
        )
        for name in ("t.csv", "t.parquet")
    ]
    assert [run.returncode for run in runs] == [0, 2], runs
    assert "pip install 'datamodels-store[table]', or export to a file that ends in .csv" in runs[1].stderr
    assert (tmp_path / "t.csv").exists() and not (tmp_path / "t.parquet").exists()


def test_the_command_and_its_exit_codes(designed, tmp_path, capsys):
    assert (
        command.main(["export", str(designed.path), "--table", f"{tmp_path}/t.csv", "--keys=short", "--rows=0-10"]) == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path}/t.csv: 8 rows, 114 columns, ") and "every value as committed" in said[0]
    assert said[1] == "  3 rows are not complete and not in it"

    def run(*argv):
        done = subprocess.run(
            [sys.executable, "-m", "datamodels.store", "export", *map(str, argv)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, error = run(designed.path, "--table=t.xlsx")
    assert code == 2 and "expected a file that ends in .parquet or .csv, got t.xlsx" in error
    code, error = run(designed.path)
    assert code == 2 and "--table" in error
    code, error = run(designed.path, f"--table={tmp_path}/none/t.csv")
    assert code == 1 and "the table cannot be written: No such file or directory" in error


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_text_that_is_no_text(tmp_path, kind):
    if kind == "parquet":
        needs.pyarrow()
    spec = {"num_models": 1, "schema": {"t": {"shape": [], "dtype": "U2"}}}
    with Store.create(tmp_path / "odd", spec) as store:
        store.commit_many([0], {"t": ["\ud800"]})
        with pytest.raises(StoreError, match="a text cannot be written as UTF-8"):
            export(store, tmp_path / f"odd.{kind}")
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]
