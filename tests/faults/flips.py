"""Promises 1 and 9: a bit that flips in a complete row, in its records or in a journal is found."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from datamodels.errors import StoreError
from datamodels.store import Store
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.commit import COMPLETED_FILE, ROWS_FILE
from tests.faults.bench import Experiment, check
from tests.faults.rows import SPEC, values

ROWS = 200
DTYPES = ["bool", "bits", "U3", "float16", "float32", "float64"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
SCHEMA = {dtype: {"shape": [11], "dtype": dtype} for dtype in DTYPES}
SCHEMA["note"] = {"shape": [], "dtype": "int64", "required": False}


def everything(rows: list[int]) -> dict[str, np.ndarray]:
    """Values of every dtype, for which every bit pattern that the flips make is as good as another."""
    rng = np.random.default_rng(1)
    shape, held = (len(rows), 11), {}
    for dtype in DTYPES:
        if dtype in ("bool", "bits"):
            held[dtype] = rng.random(shape) < 0.5
        elif dtype == "U3":
            held[dtype] = rng.integers(100, 1000, shape).astype("U3")
        else:
            held[dtype] = rng.integers(0, 100, shape).astype(dtype)
    return held


def rows_and_records(folder: Path, flips: int) -> int:
    """200 rows, of which two thirds are complete and some have an optional key; flips anywhere behind the headers."""
    rng = random.Random(flips)
    path = folder / "store"
    with Store.create(path, {"num_models": ROWS, "schema": SCHEMA}) as store:
        done = [row for row in range(ROWS) if row % 3]
        noted = done[::2]
        plain = [row for row in done if row not in noted]
        store.commit_many(plain, everything(plain))
        store.commit_many(noted, {**everything(noted), "note": np.arange(len(noted)) + 1})
        check(not list(verify(store)), "there are problems without a flip")
        sizes = {name: (path / name).stat().st_size - head for name, head in store.layout.heads.items()}
        found = 0
        for number in range(flips):
            # As many in each file: the flags are far fewer than the values.
            name = sorted(sizes)[number % len(sizes)]
            byte, bit = rng.randrange(sizes[name]), rng.randrange(8)
            row = byte // (sizes[name] // ROWS)
            _flip(path / name, store.layout.heads[name] + byte, bit)
            said = [problem for problem in verify(store) if problem.row == row]
            # A flag or a row's record says something of every row.
            told = {COMPLETED_FILE: range(ROWS), ROWS_FILE: range(ROWS), "note.npy": noted}.get(name, done)
            check(said or row not in told, f"{name}, row {row}, byte {byte}, bit {bit}: nobody finds it")
            found += bool(said)
            _flip(path / name, store.layout.heads[name] + byte, bit)
        check(found > flips / 2, f"only {found} of {flips} flips were found")
    return flips


def journals(folder: Path, flips: int) -> int:
    """A journal in which a bit has flipped is not applied: the row stays as it was, and `verify` tells."""
    rng = random.Random(flips)
    path, row = folder / "store", 3
    with Store.create(path, SPEC) as store:
        store.commit_many([row], {key: [value] for key, value in values(row, 1).items()})
        blobs = store.encode(row, values(row, 2))
        journal = path / commits.JOURNAL / str(row)
        for _ in range(flips):
            commits.write_journal(store.layout, row, blobs, commits.RowInfo(1, 0.0, 0), "a run")
            # As often in the head as in the values, which are far more.
            byte = rng.randrange(rng.choice((200, journal.stat().st_size)))
            _flip(journal, byte, bit := rng.randrange(8))
            try:
                store.recover()
            except StoreError:
                found = any(problem.row == row for problem in verify(store))
            else:
                found = False
            held = int(store.rows("version", [row])[0]) if store.completed()[row] else 0
            check(held == 1, f"journal, byte {byte}, bit {bit}: it was applied, the row holds version {held}")
            check(found, f"journal, byte {byte}, bit {bit}: nobody finds it")
            journal.unlink()
    return flips


def _flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


ROWS_AND_RECORDS = Experiment(
    "a bit flips in a row or its records", rows_and_records, 150, 2000, 20_000, inside=True, quick=True
)
JOURNALS = Experiment("a bit flips in a journal", journals, 50, 500, 5000, inside=True, quick=True)
