"""What looking after a large store costs: status, a claim, growing it, and verify beside what it cannot beat.

    python benchmarks/tools.py [--folder DIR] [--repeats 7] [--rows 1000000] [--quick]

The floor of verify is one thread that reads the same files and takes zlib.crc32 of what it read, a megabyte at a
time; it checks nothing. Files are in the page cache for both. Medians of the repeats (least–most).
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.store import machine
from datamodels.store import Store
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.disk import filesystem
from datamodels.store.grow import add_key, grow
from datamodels.store.keys import KeyStore
from datamodels.store.status import progress


def filled(path: Path, rows: int, floats: int, share: float) -> Store:
    """A store with one key of so many float32s, and an optional one, of which a share of the rows are complete."""
    schema = {
        "x": {"shape": [floats], "dtype": "float32"},
        "note": {"shape": [], "dtype": "float32", "required": False},
    }
    store = Store.create(path, {"num_models": rows, "schema": schema}, sync=False)
    blob = np.arange(floats, dtype="float32").tobytes()
    done = int(rows * share)
    for first in range(0, done, 10_000):
        some = range(first, min(first + 10_000, done))
        infos = [commits.RowInfo(1, time.time(), row) for row in some]
        commits.commit(store.layout, some, {"x": [blob] * len(some)}, infos, store.run.id)
    return store


def taken(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def shown(seconds: list[float], each: int = 1) -> str:
    values = [1e3 * s / each for s in seconds]
    return f"{statistics.median(values):9.3f} ms  ({min(values):.3f}–{max(values):.3f})"


def floor(store: Store) -> None:
    for name in ("x.npy", "_keys/x.npy", "_rows.npy"):
        with open(store.path / name, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                zlib.crc32(block)


def large(folder: Path, rows: int, repeats: int) -> None:
    path = folder / "large"
    with filled(path, rows, 1, 0.7) as store:
        store.run  # noqa: B018 - made once per process
        print(f"a store of {rows:,} rows, 70 % complete, one optional key")
        print(f"  Store.open              {shown(taken(lambda: Store.open(path).close(), repeats))}")
        print(f"  Store.status            {shown(taken(store.status, repeats))}")
        print(f"  progress (the screen)   {shown(taken(lambda: progress(store), repeats))}")
        command = [sys.executable, "-m", "datamodels.store", "status", str(path)]
        whole = taken(lambda: subprocess.run(command, check=True, capture_output=True), repeats)
        print(f"  the command, whole      {shown(whole)}")
        start = taken(lambda: subprocess.run([*command[:3], "--help"], check=True, capture_output=True), repeats)
        print(f"  of that, its start      {shown(start)}")
        some = np.random.default_rng(0).choice(rows, 1000, replace=False).tolist()

        def claim() -> None:
            for row in some:
                store.run.take(row)

        def release() -> None:
            for row in some:
                store.run.release(row, done=False)

        claims, releases = [], []
        for _ in range(repeats):
            claims += taken(claim, 1)
            releases += taken(release, 1)
        print(f"  a claim                 {shown(claims, 1000)}")
        print(f"  giving it back          {shown(releases, 1000)}")
        with KeyStore.of(path, ["note"]) as filler:
            print(f"  rows that lack a key    {shown(taken(filler.completed, repeats))}")
        print(f"  files in the folder     {sum(len(names) for _, _, names in os.walk(path)):9,}")
    for verb, call in (
        ("grow by as many", lambda: grow(path, 2 * rows)),
        ("add-key of 4 bytes", lambda: add_key(path, _field())),
    ):
        print(f"  {verb:22}  {shown(taken(call, 1))}")


def _field():  # type: ignore[no-untyped-def]
    from datamodels.spec import Field

    return Field("later", (), "float32", required=False)


def checking(folder: Path, rows: int, floats: int, repeats: int) -> None:
    with filled(folder / f"rows-{floats}", rows, floats, 1.0) as store:
        gigabytes = rows * floats * 4 / 1e9
        sides: dict[str, Callable[[], object]] = {
            "floor": lambda: floor(store),
            "1 thread": lambda: list(verify(store, threads=1)),
            f"{os.cpu_count()} threads": lambda: list(verify(store, threads=os.cpu_count())),
        }
        wall: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, call in sides.items():
                before = time.process_time()
                wall[name] += taken(call, 1)
                cpu[name].append(time.process_time() - before)
        print(f"verify, {rows:,} rows of {4 * floats / 1e3:g} KB, {gigabytes:.2f} GB")
        for name in sides:
            rates = [gigabytes / s for s in wall[name]]
            ratio = statistics.median(b / a for a, b in zip(cpu["floor"], cpu[name], strict=True))
            print(
                f"  {name:10} {statistics.median(rates):6.2f} GB/s ({min(rates):.2f}–{max(rates):.2f}), "
                f"{statistics.median(cpu[name]) / gigabytes:.2f} CPU s a GB, {ratio:.1f} times the floor's"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", default=".", help="where the stores are made")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="two repeats of small stores, to see that it works")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.rows = 2, 10_000
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-tools-") as name:
        folder = Path(name)
        print(f"{datetime.date.today()}  {machine()}, {filesystem(folder)}")
        print(f"Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}")
        print(f"medians of {args.repeats} repeats (least–most)")
        large(folder, args.rows, args.repeats)
        for floats in (1, 256, 17_500):
            checking(folder, max(1000, min(args.rows, int(args.rows * 256 / floats))), floats, args.repeats)
    print("not measured: network file systems, files that are not in the page cache")


if __name__ == "__main__":
    main()
