"""Promise 7: a process is stopped at every system call of a commit, and others want its row meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from datamodels.errors import ClaimLost
from datamodels.store import Store, claims
from datamodels.store.check import verify
from datamodels.store.claims import Run
from tests import needs
from tests.faults.bench import Experiment, Lost, check
from tests.faults.rows import SPEC, Server, values
from tests.faults.traced import Traced, calls_in
from tests.jobs import alive

ROW = 3


def near(folder: Path, step: int) -> int:
    """Known to live: it is never overtaken, however long it is silent. Woken it ends; killed, its row is free."""
    return _every_call(folder, step, _near)


def contained(folder: Path, step: int) -> int:
    """In a container of its own, so only its heartbeat can be seen: it is not overtaken in a commit; else refused."""
    return _every_call(folder, step, _contained)


def far(folder: Path, step: int) -> int:
    """On another host of a network file system: its row is taken, and woken it writes nothing but what it was at."""
    return _every_call(folder, step, _far, network=True)


def silent(folder: Path, rounds: int) -> int:
    """A heartbeat that cannot be written, on a network file system: no byte is written once the lease is half over."""
    path = folder / "store"
    Store.create(path, SPEC).close()
    with Store.open(path, time_to_live=0.4) as store:
        store.disk.network = True
        for _ in range(rounds):
            run = Run(path, network=True, time_to_live=0.4)
            try:
                check(run.take(ROW), "the row could not be had")
                run._beat = _disk_is_full
                time.sleep(0.25)
                with run.committing([ROW]) as guard:
                    guard()
                raise Lost("a commit begins though the lease is half over and cannot be renewed")
            except ClaimLost:
                pass
            finally:
                run.close()
    return rounds


def _disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Stopped:
    """A process that commits a version of the row and is stopped on the way, and the store as others see it."""

    def __init__(self, store: Store, traced: Traced, version: int, run: str):
        self.store, self.traced, self.version, self.run = store, traced, version, run
        self.before = int(store.rows("version", [ROW])[0])

    def take(self, seconds: float) -> bool:
        """Whether the row could be had within a time."""
        end = time.monotonic() + seconds
        while not (taken := self.store.run.take(ROW)) and time.monotonic() < end:
            time.sleep(0.02)
        return taken

    def seems_elsewhere(self) -> None:
        record = self.store.path / "runs" / f"{self.run}.json"
        said = {**json.loads(record.read_text()), "boot": "another boot/1", "host": "elsewhere"}
        record.write_text(json.dumps(said))

    def commit(self) -> int:
        """Another version, by the one that has taken the row."""
        version = self.version + 1
        self.store.commit_many([ROW], {key: [value] for key, value in values(ROW, version).items()}, replace=True)
        self.store.run.release(ROW, done=True)
        return version

    def wake(self) -> tuple[list[str], list[str]]:
        """What the process said, and the trace since it was woken."""
        os.kill(self.traced.pid, signal.SIGCONT)
        _, said, trace = self.traced.ended()
        woken = max((i for i, line in enumerate(trace) if "stopped by SIGSTOP" in line), default=0)
        return said, trace[woken + 1 :]

    def held(self) -> int | str:
        """The version of the row, which is whole, 0 where it is not complete, or what is wrong with it."""
        with contextlib.suppress(Exception):
            self.store.recover()
        problems = [str(problem) for problem in verify(self.store)]
        if problems:
            return "; ".join(problems)
        if not self.store.completed()[ROW]:
            return 0
        version = int(self.store.rows("version", [ROW])[0])
        for key in ("x", "text"):
            check(
                np.array_equal(self.store.rows(key, [ROW])[0], values(ROW, version)[key]), f"{key}: of another version"
            )
        return version


def _every_call(folder: Path, step: int, judge: Callable[[Stopped], None], *, network: bool = False) -> int:
    path = folder / "store"
    Store.create(path, SPEC).close()
    time_to_live = 0.4 if network else 60.0
    with Server() as server, Store.open(path, time_to_live=0.4 if network else 0.1) as store:

        def start(version: int, options: list[str]) -> Traced:
            asked = {"path": str(path), "rows": [ROW], "version": version, "time_to_live": time_to_live}
            return Traced(server, folder, ["-e", "trace=all", *options], kind="once", network=network, **asked)

        places = _places(start(1, []))
        check(len(places) > 60, f"the commit has {len(places)} calls only")
        for tried, (name, call) in enumerate(places[::step], start=1):
            version = 1 + 3 * tried
            traced = start(version, ["-e", f"inject={name}:signal=SIGSTOP:when={call}"])
            stopped = Stopped(store, traced, version, os.readlink(_highest(path)))
            traced.go()
            if not _wait_for_stop(traced):
                traced.ended()
                continue  # this time the commit made fewer such calls
            try:
                judge(stopped)
            except Lost as lost:
                traced.kill()
                raise Lost(f"stopped at {name} {call}: {lost}") from None
        return tried


def taking(folder: Path, step: int) -> int:
    """Stopped while it takes a dead one's row, which others take, give back and take meanwhile: one has it."""
    path = folder / "store"
    Store.create(path, SPEC).close()
    with Server() as server, Store.open(path) as store:

        def start(options: list[str]) -> Traced:
            server.ask(kind="hold", path=str(path), row=ROW)
            server.until("exit")
            return Traced(server, folder, ["-e", "trace=all", *options], kind="take", path=str(path), row=ROW)

        places = _places(start([]), end="write(1<")
        for name, call in places[::step]:
            traced = start(["-e", f"inject={name}:signal=SIGSTOP:when={call}"])
            traced.go()
            if _wait_for_stop(traced):
                mine = store.run.take(ROW)
                if mine:
                    store.run.release(ROW, done=True)
                    mine = store.run.take(ROW)
                os.kill(traced.pid, signal.SIGCONT)
                took = f"took {ROW}" in traced.ended()[1]
                check(took != mine, f"stopped at {name} {call}: {'both have' if mine else 'nobody has'} the row")
            else:
                traced.ended()
            store.run.release(ROW, done=True)
        return len(places[::step])


def _places(traced: Traced, end: str = "exit_group(") -> list[tuple[str, int]]:
    """All system calls from the gate to the first one that begins so, with how many of its kind there were by then."""
    traced.go()
    made: Counter[str] = Counter()
    places = []
    for line in traced.ended()[2]:
        if line.startswith(end):
            break
        for name in calls_in([line]):
            made[name] += 1
            places.append((name, made[name]))
    return places[1:]  # the first is the gate


def _highest(path: Path) -> Path:
    return max((path / "claims").glob(f"{ROW}.*"), key=lambda claim: int(claim.suffix[1:]))


def _wait_for_stop(traced: Traced) -> bool:
    """Whether a process is stopped, before it ends."""
    while alive(traced.pid):
        if "stopped by SIGSTOP" in traced.log.read_text(errors="replace"):
            return True
        time.sleep(0.002)
    return False


def _near(stopped: Stopped) -> None:
    before = stopped.before
    over = not _claimed(stopped)
    check(over or not stopped.take(0.15), "the row of a process that lives was taken")
    if stopped.version % 2 or over:
        said, _ = stopped.wake()
        check("done" in " ".join(said), f"woken, it did not end its commit: {said}")
        check(stopped.held() == stopped.version, f"the row holds {stopped.held()}")
        return
    os.kill(stopped.traced.pid, signal.SIGKILL)
    _, said, _ = stopped.traced.ended()
    check(stopped.take(5), "the row of a process that was killed could not be had")
    stopped.store.run.release(ROW, done=False)
    held, done = stopped.held(), "done" in " ".join(said)
    allowed = [stopped.version] if done else [stopped.version, before]
    check(held in allowed, f"it holds {held}, not one of {allowed}")


def _claimed(stopped: Stopped) -> bool:
    with contextlib.suppress(ValueError, OSError):
        return os.readlink(_highest(stopped.store.path)) == stopped.run
    return False


def _contained(stopped: Stopped) -> None:
    stopped.seems_elsewhere()
    taken = stopped.take(0.2)
    version = stopped.commit() if taken else stopped.version
    said, _ = stopped.wake()
    done = "done" in " ".join(said)
    check(done or taken, f"it was not overtaken, and yet: {said}")
    check(stopped.held() == version, f"taken over: {taken}, said done: {done}, the row holds {stopped.held()}")


def _far(stopped: Stopped) -> None:
    stopped.seems_elsewhere()
    with _no_locks():
        taken = stopped.take(3)
        check(taken or not _claimed(stopped), "the row of a host that went silent could not be had")
        version = stopped.commit() if taken else stopped.version
    said, trace = stopped.wake()
    written = [line for line in trace if line.startswith("pwrite64(") and ".npy" in line]
    check(not taken or len(written) <= 1, f"overtaken, it wrote {len(written)} times: {said}")
    held = stopped.held()
    # A write that was past its check cannot be kept from happening; then the damage is found.
    check(held == version or (taken and isinstance(held, str) and written), f"it holds {held}, not {version}: {said}")
    if held != version:
        check(stopped.take(5), "the row could not be had")
        stopped.commit()


@contextlib.contextmanager
def _no_locks() -> Iterator[None]:
    """Locks do not reach other hosts."""

    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    real, claims.fcntl.flock = claims.fcntl.flock, flock
    try:
        yield
    finally:
        claims.fcntl.flock = real


def _experiment(fault: str, run: Callable[[Path, int], int], **amounts: int) -> Experiment:
    return Experiment(fault, run, inside=True, needs=needs.strace, **amounts)


NEAR = _experiment("stopped at every call of a commit, on this host", near, fast=83, slow=11, full=1)
CONTAINED = _experiment("stopped at every call of a commit, in a container", contained, fast=83, slow=11, full=1)
TAKING = _experiment("stopped at every call of taking a dead one's row", taking, fast=9, slow=3, full=1)
SILENT = Experiment("a heartbeat that cannot be written", silent, fast=1, full=10, inside=True, quick=True)
FAR = _experiment("stopped at every call of a commit, on another host", far, slow=15, full=1)
