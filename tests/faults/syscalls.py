"""Promises 1, 2, 5 and 8: system calls of a worker that fail, lie or do half, one after the other, by strace.

A run of the worker on a small store meets one fault. Rows are then complete and exact or not complete; it ends with 0
only when all of them are; it says what went wrong otherwise; and the next run, which meets none, finishes the store.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from datamodels.store import Store
from datamodels.store.check import verify
from tests import needs
from tests.faults.bench import Experiment, check
from tests.faults.rows import SPEC, Server, values
from tests.faults.traced import Traced, calls_in

ROWS = 3
# Which errors a call can have, once and (+) from then on.
ERRORS = {
    "pwrite64": ("EIO", "EINTR", "ENOSPC", "ENOSPC+"),
    "fdatasync": ("EIO", "EINTR", "ENOSPC", "EIO+"),
    "fsync": ("EIO", "EIO+"),
    "pread64": ("EIO",),
    "openat": ("EIO", "EMFILE", "EMFILE+"),
    "symlink": ("EIO", "ENOSPC+"),
    "readlink": ("EIO",),
    "rename": ("EIO", "ENOSPC+"),
    "write": ("ENOSPC", "ENOSPC+"),  # of messages too
    "mkdir": ("ENOSPC",),
    "unlink": ("EIO",),
    "flock": ("ENOLCK", "EINTR"),
}


class Bench:
    def __init__(self, folder: Path, server: Server):
        self.folder, self.server = folder, server
        self.path, self.fresh = folder / "store", folder / "fresh"
        Store.create(self.fresh, {**SPEC, "num_models": ROWS}, sync=False).close()

    def renew(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.fresh, self.path)

    def work(self, options: list[str], *more: str, **asked: object) -> tuple[int, str, list[str]]:
        """Exit code, output and trace of a run of the worker."""
        argv = [f"--worker.logdir={self.path}", "--worker.main_import=tests.faults.writer", *more]
        out = self.folder / "out"
        traced = Traced(self.server, self.folder, options, kind="work", argv=argv, out=str(out), **asked)
        traced.go()
        code, _, trace = traced.ended()
        return code, out.read_text(errors="replace"), trace

    def complete(self) -> int:
        """How many rows are complete, by plain numpy; each is exact, or is found by `verify` where `lies` is given."""
        with Store.open(self.path) as store:
            problems = [problem for problem in verify(store) if "not marked complete" not in problem.what]
            check(not problems, "; ".join(map(str, problems)))
        completed = np.load(self.path / "_completed.npy")
        for row in np.flatnonzero(completed).tolist():
            for key, value in values(row, 1).items():
                held = np.load(self.path / f"{key}.npy")[row]
                check(np.array_equal(held, value), f"row {row}, {key}: not what was committed")
        return int(completed.sum())

    def finish(self) -> None:
        code, text, _ = self.work(["-e", "trace=none"], "--worker.retries=9")
        check(code == 0 and self.complete() == ROWS, f"the run without a fault ended with {code}: {text}")


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    with Server() as server:
        yield Bench(folder, server)


def failing(folder: Path, step: int) -> int:
    """Each call of each kind in turn, or every `step`th, fails in each of its ways."""
    tried = 0
    with bench(folder) as its:
        its.renew()
        code, text, trace = its.work(["-e", f"trace={','.join(ERRORS)}"])
        check(code == 0 and its.complete() == ROWS, f"without a fault the worker ended with {code}: {text}")
        counts = calls_in(trace)
        check(counts["pwrite64"] > 15 and counts["fdatasync"] > 8, f"the trace is not that of a worker: {counts}")
        for name, errors in ERRORS.items():
            for error in errors:
                for call in range(1 + tried % min(step, counts[name] or 1), counts[name] + 1, step):
                    what = f"{name} {call} of {counts[name]}: {error}"
                    its.renew()
                    when = f"{call}+" if error.endswith("+") else f"{call}"
                    inject = f"inject={name}:error={error.rstrip('+')}:when={when}"
                    code, text, trace = its.work(["-e", f"trace={name}", "-e", inject])
                    check("(INJECTED)" in "".join(trace), f"{what}: the fault did not happen")
                    try:
                        done = its.complete()
                        check(code >= 0, f"the worker died by signal {-code}")
                        check(code != 0 or done == ROWS, f"it ended with 0 and {done} rows of {ROWS}: {text}")
                        check(code == 0 or text.strip() or name == "write", f"it ended with {code} and said nothing")
                        its.finish()
                    except AssertionError as lost:
                        raise type(lost)(f"{what}: {lost}") from None
                    tried += 1
    return tried


def lying(folder: Path, step: int) -> int:
    """Each write in turn is said to have done its first byte, and did not: what comes of it is found by `verify`."""
    tried = 0
    with bench(folder) as its:
        its.renew()
        count = calls_in(its.work(["-e", "trace=pwrite64"])[2])["pwrite64"]
        for call in range(1, count + 1, step):
            its.renew()
            its.work(["-e", "trace=pwrite64", "-e", f"inject=pwrite64:retval=1:when={call}"])
            with Store.open(its.path) as store:
                found = {problem.row for problem in verify(store)}
                completed = store.completed()
            for row in set(np.flatnonzero(completed).tolist()) - found:
                for key, value in values(row, 1).items():
                    held = np.load(its.path / f"{key}.npy")[row]
                    check(np.array_equal(held, value), f"write {call}: row {row}, {key} is wrong, and nobody finds it")
            tried += 1
    return tried


def short(folder: Path, runs: int) -> int:
    """Every write does half of what it is asked to, and says so."""
    with bench(folder) as its:
        for _ in range(runs):
            its.renew()
            code, text, trace = its.work(["-e", "trace=pwrite64"], short=True)
            check(code == 0 and its.complete() == ROWS, f"the worker ended with {code}: {text}")
            check(calls_in(trace)["pwrite64"] > 100, "the writes were not cut short")
    return runs


def network(folder: Path, runs: int) -> int:
    """As on a network file system: what is written to an array goes through O_DSYNC, and never through a map."""
    with bench(folder) as its:
        for _ in range(runs):
            its.renew()
            code, text, trace = its.work(["-e", "trace=openat,mmap,write,pwrite64,pwritev,ftruncate"], network=True)
            check(code == 0 and its.complete() == ROWS, f"the worker ended with {code}: {text}")
            mine = [line for line in trace if str(its.path) in line and ".npy" in line]
            for line in mine:
                mapped = "mmap(" in line and "PROT_WRITE" in line and "MAP_SHARED" in line
                check(not mapped, f"an array is mapped to be written: {line}")
            opened = [line for line in mine if "openat(" in line and ("O_WRONLY" in line or "O_RDWR" in line)]
            check(opened, "no array is opened to be written")
            for line in opened:
                check("O_DSYNC" in line, f"an array is opened for plain writes: {line}")
            check(any("pwrite64(" in line for line in mine), "no array is written by pwrite")
    return runs


def _experiment(fault: str, run: Callable[[Path, int], int], **amounts: int) -> Experiment:
    return Experiment(fault, partial(run), needs=needs.strace, **amounts)


FAILING = _experiment("a system call of a worker fails", failing, fast=401, slow=17, full=1)
LYING = _experiment("a write that lies", lying, fast=31, slow=5, full=1)
SHORT = _experiment("every write is cut short", short, fast=1, full=5)
NETWORK = _experiment("written as to a network: the calls", network, fast=1)
