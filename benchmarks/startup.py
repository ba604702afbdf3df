"""How long it takes to import the package, and each entry point to print its help.

    python benchmarks/startup.py [--repeats 9] [--quick]

Each is a fresh process; what Python alone takes is shown beside it. Exit code 1 when a median is over its limit.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time

from store import machine  # beside this file

ENTRY_POINTS = ("initialize_logdir", "worker", "pool", "store", "regression.compute_datamodels")
CASES = {
    "python -c pass": (["-c", "pass"], None),
    "import datamodels": (["-c", "import datamodels"], 0.3),
    "import datamodels.store": (["-c", "import datamodels.store"], None),
    **{f"datamodels.{name} --help": (["-m", f"datamodels.{name}", "--help"], 1.0) for name in ENTRY_POINTS},
}


def seconds(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two repeats, to see that it works")
    args = parser.parse_args()
    repeats = 2 if args.quick else args.repeats
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats + 1):  # the first one fills the caches and is not counted
        for name, (argv, _limit) in CASES.items():
            times[name].append(seconds(argv))
    print(f"{datetime.date.today()}  {machine()}, load average {os.getloadavg()[0]:.1f}")
    print(f"medians of {repeats} (least–most), seconds")
    over = 0
    for name, (_, limit) in CASES.items():
        each = times[name][1:]
        median = statistics.median(each)
        late = limit is not None and median > limit
        over += late
        verdict = "" if limit is None else f"  limit {limit:g}{'  OVER' if late else ''}"
        print(f"{name:44} {median:.3f} ({min(each):.3f}–{max(each):.3f}){verdict}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
