"""Rows per second from 1, 4 and 16 processes at once into one store, beside the raw floor, zarr and LMDB.

    python benchmarks/writers.py [--folder DIR] [--repeats 5] [--quick]

Every writer is a process; all begin at one moment, and the time is that until the last has ended. `ours` is the worker
with a main that does nothing: it claims each row, checks it, commits it with checksums, and leaves a record of the run.
`ours/64` does so for 64 rows at a time (main_many). `floor` is pwrite of the same bytes into one preallocated file,
with fdatasync after each row where rows are durable. zarr is one array with a chunk per row, uncompressed; it has no
way to wait for the disk, so it stands among the rows that are not durable alone. LMDB is one environment with a
transaction per row, and locks its writers against each other. Rows are dealt out to these three, which claim none. The
sides take turns within a repeat, and what is printed are medians of the repeats.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma
import numpy.random  # these two once here, else every writer imports them with its first row
from store import machine  # beside this file

from datamodels.running.routine import Routine
from datamodels.running.worker import Worker
from datamodels.store import Store
from datamodels.store.disk import filesystem

SIZES = {"1 KB": (256, 2000), "70 KB": (17_500, 600), "4 MB": (1 << 20, 48)}  # float32s in a row, rows
WRITERS = (1, 4, 16)
BATCH = 64
FORK = multiprocessing.get_context("fork")


class Nothing:
    """A module with a main and a main_many that return the same array for ever."""

    __name__ = "nothing"

    def __init__(self, length: int, batch: int):
        values = np.ones((batch, length), np.float32)
        self.main = lambda index: {"x": values[0]}
        self.main_many = lambda indices: {"x": values[: len(indices)]}


def together(writers: int, prepare: Callable[[int], Callable[[], None]]) -> float:
    """Seconds from the moment all writers are ready until the last is done; prepare(number) returns its work."""
    ready, times = FORK.Barrier(writers), FORK.Array("d", 2 * writers)

    def run(number: int) -> None:
        work = prepare(number)
        ready.wait()
        for stream in (1, 2):  # where each says which run it is
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        times[2 * number] = time.perf_counter()  # of one clock in all processes
        work()
        times[2 * number + 1] = time.perf_counter()

    processes = [FORK.Process(target=run, args=(number,)) for number in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a writer failed")
    return max(times[1::2]) - min(times[::2])


def ours(folder: Path, length: int, rows: int, writers: int, durable: bool, batch: int = 1) -> float:
    spec = {"num_models": rows, "schema": {"x": {"shape": [length], "dtype": "float32"}}}
    Store.create(folder / "store", spec, sync=durable).close()
    module = Nothing(length, batch)

    def prepare(number: int) -> Callable[[], None]:
        store = Store.open(folder / "store", sync=durable)
        store.run  # noqa: B018 - its record and heartbeat are made once per process, not per row
        many = Routine.find(module, "main_many", ["indices"]) if batch > 1 else None  # type: ignore[arg-type]
        main = Routine.find(module, "main", ["index"])  # type: ignore[arg-type]

        def work() -> None:
            with Worker(store, main, many, batch=batch) as worker:
                worker.run_all()

        return work

    seconds = together(writers, prepare)
    with Store.open(folder / "store") as store:
        if not bool(store.completed().all()):
            raise SystemExit("rows are left undone")
    return seconds


def ours_in_batches(folder: Path, length: int, rows: int, writers: int, durable: bool) -> float:
    return ours(folder, length, rows, writers, durable, BATCH)


def floor(folder: Path, length: int, rows: int, writers: int, durable: bool) -> float:
    size, path = 4 * length, folder / "floor"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, size * rows)
    os.fsync(fd)
    blob = np.ones(length, np.float32).tobytes()

    def prepare(number: int) -> Callable[[], None]:
        own = os.open(path, os.O_WRONLY)

        def work() -> None:
            for row in range(number, rows, writers):
                os.pwrite(own, blob, row * size)
                if durable:
                    os.fdatasync(own)

        return work

    seconds = together(writers, prepare)
    os.close(fd)
    return seconds


def zarr(folder: Path, length: int, rows: int, writers: int, durable: bool) -> float | None:
    if durable:
        return None
    library = importlib.import_module("zarr")
    library.create_array(
        str(folder / "zarr"), shape=(rows, length), chunks=(1, length), dtype="float32", compressors=None
    )
    values = np.ones(length, np.float32)

    def prepare(number: int) -> Callable[[], None]:
        array = library.open_array(str(folder / "zarr"), mode="r+")

        def work() -> None:
            for row in range(number, rows, writers):
                array[row] = values

        return work

    return together(writers, prepare)


def lmdb(folder: Path, length: int, rows: int, writers: int, durable: bool) -> float:
    library = importlib.import_module("lmdb")
    blob = np.ones(length, np.float32).tobytes()

    def prepare(number: int) -> Callable[[], None]:
        environment = library.open(str(folder / "lmdb"), map_size=4 * len(blob) * rows + (1 << 26), sync=durable)

        def work() -> None:
            for row in range(number, rows, writers):
                with environment.begin(write=True) as transaction:
                    transaction.put(b"%d" % row, blob)

        return work

    return together(writers, prepare)


SIDES: dict[str, Callable[..., float | None]] = {
    "ours": ours,
    f"ours/{BATCH}": ours_in_batches,
    "floor": floor,
    "zarr": zarr,
    "LMDB": lmdb,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", default=".", help="where the stores are made: its disk is what is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two repeats of a tenth of the rows, to see that it works")
    args = parser.parse_args()
    share = 10 if args.quick else 1
    repeats = 2 if args.quick else args.repeats
    sides, versions = dict(SIDES), []
    for name in ("zarr", "lmdb"):
        try:
            versions.append(f"{name} {importlib.import_module(name).__version__}")
        except ImportError:
            sides.pop({"lmdb": "LMDB"}.get(name, name))
            versions.append(f"{name} not installed")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-writers-") as name:
        print(f"{datetime.date.today()}  {machine()}, {filesystem(Path(name))}")
        print(f"Python {platform.python_version()}, numpy {np.__version__}, {', '.join(versions)}, ", end="")
        print(f"load average {os.getloadavg()[0]:.1f}")
        print(f"rows per second, medians of {repeats} repeats (least–most); {BATCH} rows a commit in ours/{BATCH}")
        print(f"{'row':>6} {'durable':>7} {'writers':>7} {'rows':>5}" + "".join(f"{side:>27}" for side in sides))
        for size, (length, all_rows) in SIZES.items():
            rows = max(all_rows // share, max(WRITERS))
            for durable in (True, False):
                for writers in WRITERS:
                    found: dict[str, list[float | None]] = {side: [] for side in sides}
                    for _ in range(repeats):
                        for side, run in sides.items():
                            folder = Path(name) / "one"
                            folder.mkdir()
                            found[side].append(run(folder, length, rows, writers, durable))
                            shutil.rmtree(folder)
                    line = "".join(f"{_rates(found[side], rows):>27}" for side in sides)
                    print(f"{size:>6} {'yes' if durable else 'no':>7} {writers:>7} {rows:>5}{line}", flush=True)
    print("not measured: a disk without other load, network file systems")


def _rates(seconds: list[Any], rows: int) -> str:
    rates = [rows / s for s in seconds if s is not None]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})" if rates else "–"


if __name__ == "__main__":
    main()
