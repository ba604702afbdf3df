"""Seconds until 1,000 rows of a main that sleeps 50 ms are done by two workers, under each engine.

    python benchmarks/engines.py [--rows 1000] [--repeats 3] [--engines local,parallel,slurm,ray]

From the start of the command that a person types to its end: the engine's own start, imports, commits that wait for the
disk, and the end are in it. Two workers that do nothing but sleep would need 25 s. `killed`: one worker is ended by
kill -9 when a third of the rows is done; `rows` is from the begin of the first row to the end of the last, by the
store's own records. A SLURM or Ray cluster of nodes on this host is up before. Repeats are interleaved over engines;
medians, and the extremes in brackets. An engine that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datamodels.store import Store  # noqa: E402
from tests.executors.conformance import workers_of  # noqa: E402
from tests.jobs import Job, plain, until  # noqa: E402

SECONDS, WORKERS = 0.05, 2
MAIN = f"import time\ndef main(index):\n    time.sleep({SECONDS})\n    return {{'x': index}}\n"
PARALLEL = str(ROOT / "worker_scripts/parallel.sh")
POOL = [sys.executable, "-m", "datamodels.pool", f"--pool.workers={WORKERS}"]


@contextlib.contextmanager
def engine(name: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The command of an engine and what it needs of the environment; ImportError or OSError where it is not here."""
    if name == "slurm":
        from tests.executors.slurm_cluster import Cluster

        if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None or os.geteuid() != 0:
            raise OSError("slurmctld, slurmd and munged must be installed, and are started as root")
        with Cluster() as cluster:
            yield [*POOL, "--pool.executor=slurm"], cluster.environment
    elif name == "ray":
        import ray  # noqa: F401 - whether it is installed

        from tests.executors.ray_cluster import Cluster as RayCluster

        cluster = RayCluster()
        try:
            yield [*POOL, "--pool.executor=ray"], {"RAY_ADDRESS": cluster.address, "PYTHONWARNINGS": "ignore"}
        finally:
            cluster.close()
    elif name == "parallel":
        if shutil.which("parallel") is None:
            raise OSError("GNU parallel is not installed")
        yield [PARALLEL, "workers", str(WORKERS)], {"PYTHON": sys.executable}
    else:
        yield POOL, {}


def run(command: list[str], environment: dict[str, str], rows: int, *, kill: bool) -> tuple[float, float]:
    """Seconds of the whole command, and from the first row's begin to the last one's end."""
    folder = Path(tempfile.mkdtemp(prefix="engines-"))
    try:
        job = Job(folder, plain(rows), MAIN)
        argv = [*command, f"--worker.logdir={job.path}", "--worker.main_import=job"]
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", **environment}
        started = time.monotonic()
        process = subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if kill:
            until(lambda: sum(job.completed) >= rows / 3 or process.poll() is not None, 600)
            if process.poll() is None:
                os.kill(workers_of(job)[0], signal.SIGKILL)
        said, _ = process.communicate()
        seconds = time.monotonic() - started
        with Store.open(job.path) as store:
            right = np.array_equal(store.rows("x"), np.arange(rows))
        attempts = sum(job.attempts)
        if process.returncode or not right or attempts - rows not in ((0, 1) if kill else (0,)):
            raise SystemExit(f"{argv}: code {process.returncode}, {attempts} attempts\n{said.decode()}")
        records = job.array("_rows")
        return seconds, float(records["finished"].max() - records["started"].min())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default="local,parallel,slurm,ray")
    args = parser.parse_args()
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")  # noqa: SIM115
    print(f"{datetime.date.today()}  {cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(f"Python {platform.python_version()}; other work may share the cores")
    ideal = args.rows * SECONDS / WORKERS
    print(f"{args.rows} rows of {SECONDS * 1000:g} ms, {WORKERS} workers, ideal {ideal:g} s, n={args.repeats}\n")
    figures: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        commands = {}
        for name in args.engines.split(","):
            try:
                commands[name] = stack.enter_context(engine(name))
            except (ImportError, OSError) as error:
                print(f"{name} is left out: {error}")
        for _ in range(args.repeats):
            for name, (command, environment) in commands.items():
                for kill in (False, True):
                    seconds = run(command, environment, args.rows, kill=kill)
                    figures.setdefault((name, kill), []).append(seconds)
                    print(f"{name}{', killed' if kill else ''}: {seconds[0]:.1f} s", file=sys.stderr, flush=True)
    print(f"{'':18}{'s':>8}{'':16}{'x ideal':>8}{'rows, s':>10}")
    for (name, kill), runs in figures.items():
        whole, rows = (list(column) for column in zip(*runs, strict=True))
        middle = statistics.median(whole)
        spread = f"({min(whole):.1f}–{max(whole):.1f})"
        title = name + (", killed" if kill else "")
        print(f"{title:18}{middle:8.1f} {spread:15}{middle / ideal:8.2f}{statistics.median(rows):10.1f}", flush=True)


if __name__ == "__main__":
    main()
