"""Rows per second through the worker for a main that does nothing, beside the raw pwrite + fdatasync floor.

    python benchmarks/store.py [--folder DIR] [--repeats 5] [--rows 1000] [--quick]

The floor writes the same bytes a row (or a batch of rows) to one preallocated file of the same folder, and waits with
one fdatasync for each where the worker syncs. The worker's commit waits for four files when the schema has one key: the
values, then their record and the row's, then the flag that says complete; so with sync and one row a commit the best it
can reach is a quarter of the floor. Both sides take turns, and what is printed are medians of the repeats.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from datamodels.store import Store
from datamodels.store.disk import filesystem
from datamodels.worker import Routine, Worker

SIZES = {"1 KB": 256, "70 KB": 17_500}  # float32s in a row


class Nothing:
    """A module with a main and a main_many that return the same array for ever."""

    __name__ = "nothing"

    def __init__(self, length: int, batch: int):
        values = np.ones((batch, length), np.float32)
        self.main = lambda index: {"x": values[0]}
        self.main_many = lambda indices: {"x": values[: len(indices)]}


def through_the_worker(folder: Path, length: int, batch: int, sync: bool, rows: int) -> float:
    """Seconds per row."""
    spec = {"num_models": rows, "schema": {"x": {"shape": [length], "dtype": "float32"}}}
    path = folder / "store"
    Store.create(path, spec, sync=sync).close()
    module = Nothing(length, batch)
    with Store.open(path, sync=sync) as store:
        store.run  # noqa: B018 - its record and heartbeat are made once per process, not per row
        many = Routine.find(module, "main_many", ["indices"]) if batch > 1 else None  # type: ignore[arg-type]
        main = Routine.find(module, "main", ["index"])  # type: ignore[arg-type]
        with Worker(store, main, many, batch=batch) as worker:
            started = time.perf_counter()
            worker.run_all()
            seconds = time.perf_counter() - started
        if not bool(store.completed().all()):
            raise SystemExit("rows are left undone")
    _remove(path)
    return seconds / rows


def floor(folder: Path, length: int, batch: int, sync: bool, rows: int) -> float:
    """Seconds per row."""
    path, blob = folder / "floor", bytes(4 * length * batch)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, len(blob) * -(-rows // batch))
    os.fsync(fd)
    started = time.perf_counter()
    for start in range(0, rows, batch):
        os.pwrite(fd, blob, start * 4 * length)
        if sync:
            os.fdatasync(fd)
    seconds = time.perf_counter() - started
    os.close(fd)
    path.unlink()
    return seconds / rows


def _remove(path: Path) -> None:
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    path.rmdir()


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.machine()}, {cores} cores, {platform.system()} {platform.release()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", default=".", help="where the store is made: its disk is what is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="rows a repeat; a quarter of it with a sync per row")
    parser.add_argument("--quick", action="store_true", help="two repeats of 256 rows, to see that it works")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.rows = 2, 256
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-store-") as name:
        folder = Path(name)
        print(f"{datetime.date.today()}  {machine()}, {filesystem(folder)}")
        print(f"Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}")
        print(f"rows per second, medians of {args.repeats} repeats (least–most)")
        print(f"{'row':>6} {'batch':>5} {'sync':>5} {'rows':>6}  {'worker':>24}  {'floor':>24}  {'floor / worker':>14}")
        for size, length in SIZES.items():
            for batch in (1, 64):
                for sync in (True, False):
                    rows = args.rows // 4 if sync and batch == 1 else args.rows
                    pairs = [
                        (
                            through_the_worker(folder, length, batch, sync, rows),
                            floor(folder, length, batch, sync, rows),
                        )
                        for _ in range(args.repeats)
                    ]
                    ours, theirs = zip(*pairs, strict=True)
                    ratio = statistics.median(a / b for a, b in pairs)
                    print(
                        f"{size:>6} {batch:>5} {'yes' if sync else 'no':>5} {rows:>6}  {_rates(ours):>24}  "
                        f"{_rates(theirs):>24}  {ratio:>14.1f}",
                        flush=True,
                    )
    print("not measured: several workers at once, network file systems, a disk without other load")


def _rates(seconds: tuple[float, ...]) -> str:
    rates = [1 / s for s in seconds]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"


if __name__ == "__main__":
    main()
