"""What the guests do: `python3 -m tests.faults.nfs.in_guest VERB JSON` calls a function, and prints what it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import random
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import DatamodelsError
from datamodels.store import Store
from datamodels.store import commit as commits
from datamodels.store.check import verify
from datamodels.store.disk import PosixDisk

WIDE, PORT = 70_000, 7000


def spec(rows: int, wide: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"one": {"shape": [], "dtype": "uint8"}, "hundred": {"shape": [100], "dtype": "uint8"}}
    if wide:
        schema["wide"] = {"shape": [WIDE], "dtype": "uint8"}
    return {"num_models": rows, "schema": schema}


def values(rows: Sequence[int], wide: bool, salt: int = 0) -> dict[str, np.ndarray]:
    """What belongs into rows; no byte of it is 0."""
    first = np.array(rows, np.int64)[:, None] * 7 + salt
    out = {"one": (first[:, 0] % 251 + 1).astype("u1"), "hundred": ((first + np.arange(100)) % 251 + 1).astype("u1")}
    if wide:
        out["wide"] = ((first + np.arange(WIDE)) % 251 + 1).astype("u1")
    return out


# ------------------------------------------------------------------ the write path, and mutants of it


class Plain(PosixDisk):
    """Mutant: pwrite and fdatasync, without O_DSYNC."""

    def __init__(self, root: Path):
        super().__init__(root)
        self._flags &= ~os.O_DSYNC

    def sync(self, names: Iterable[str]) -> None:
        for name in names:
            os.fdatasync(self._fd(name))


class Mapped(PosixDisk):
    """Mutant: writes go through a shared memory map, flushed after each."""

    def write(self, name: str, offset: int, data: bytes) -> None:
        fd = os.open(self.root / name, os.O_RDWR)
        with mmap.mmap(fd, 0) as mapped:
            mapped[offset : offset + len(data)] = data
            mapped.flush()
        os.close(fd)


class Cached(PosixDisk):
    """Mutant: reads go through the kernel's cache, and writes leave in it what they found there."""

    def __init__(self, root: Path):
        super().__init__(root)
        self._direct = 0

    def _forget(self, fd: int) -> None:
        pass


DISKS = {"ours": PosixDisk, "plain": Plain, "mmap": Mapped, "cached": Cached}


def opened(path: str, disk: str = "ours", time_to_live: float = 120.0) -> Store:
    store = Store.open(path, time_to_live=time_to_live)
    if disk != "ours":
        store.disk = DISKS[disk](store.path)
        store.layout = dataclasses.replace(store.layout, disk=store.disk)
    return store


def create(path: str, rows: int, wide: bool = False) -> None:
    Store.create(path, spec(rows, wide)).close()


def write(
    path: str, me: int, rows: int, batch: int = 1, disk: str = "ours", wide: bool = False, contend: bool = False
) -> dict[str, Any]:
    """Commit every second row from `me`, after reads of the pages that it touches; the rows reported done.

    With `contend` all rows, from the first or from the last.
    """
    store = opened(path, disk)
    assert store.disk.network, "the store is not on a network file system"
    kept = [os.open(file, os.O_RDONLY) for file in sorted(store.path.rglob("*.npy"))]
    done: list[int] = []
    errors: list[str] = []
    mine = list(range(rows))[:: -1 if me else 1] if contend else list(range(me, rows, 2))
    start = time.monotonic()
    longest = 0.0
    for place in range(0, len(mine), batch):
        some = mine[place : place + batch]
        for fd in kept:  # descriptors that stay open: nothing makes the kernel look whether the pages are old
            size = os.fstat(fd).st_size
            os.pread(fd, 12288, max(0, size * some[0] // rows - 4096))
        began = time.monotonic()
        for _ in range(60):
            try:
                store.commit_many(some, values(some, wide))
                done += some
                break
            except DatamodelsError as error:
                if "renewed its lease" not in str(error):
                    errors.append(f"{type(error).__name__}: {error}")
                    break
                time.sleep(1)  # the server was away for long; the heart beats again soon
        longest = max(longest, time.monotonic() - began)
    took = time.monotonic() - start
    store.close()
    return {"done": done, "seconds": took, "longest": longest, "errors": errors}


def look(path: str, me: int, host: str, rows: int, disk: str = "ours") -> dict[str, Any]:
    """The clients commit a row in turn, each looks before whether what the other has done is seen; and plain numpy
    after all is over."""
    witness, unseen = Witness(host, str(me)), 0
    with opened(path, disk) as store:
        for row in range(rows):
            witness.say("barrier", 2)
            unseen += int((~store.completed()[:row]).sum() > 0)
            unseen += int((store.layout.row_records(range(row))["state"] != commits.DONE).sum() > 0)
            witness.say("barrier", 2)
            if row % 2 == me:
                store.commit_many([row], values([row], False))
    witness.say("barrier", 2)
    return {"unseen": unseen, "after": len(check(path, list(range(rows)))["lost"])}


def check(path: str, done: list[int], wide: bool = False) -> dict[str, Any]:
    """How many of the rows reported done are not there, by plain numpy, and what `verify` says of those that are."""
    folder = Path(path)
    completed = np.fromfile(folder / "_completed.npy", "u1")[-_models(folder) :] == 1
    bad = ~completed[done]
    for key, wanted in values(done, wide).items():
        found = np.load(folder / f"{key}.npy")[done]
        bad |= (found != wanted).reshape(len(done), -1).any(axis=1)
    with Store.open(path) as store:
        problems = [str(problem) for problem in verify(store)]
        claims = store.held()
    return {"lost": [done[i] for i in np.flatnonzero(bad)], "problems": problems, "claims": claims}


def _models(folder: Path) -> int:
    return int(json.loads((folder / "spec.json").read_text())["num_models"])


# ------------------------------------------------------------------ claims


class Visit:
    """A process that is in a row; `ended` says how that came to an end."""

    def __init__(self, name: str):
        self.name, self.ended = name, ""


class Arbiter(socketserver.StreamRequestHandler):
    """On the server: who is in which row, by word of the processes themselves, and a barrier for all of them."""

    changed = threading.Condition()
    inside: dict[int, Visit] = {}  # noqa: RUF012
    waiting = turn = entries = 0
    conflicts: list[str] = []  # noqa: RUF012

    def handle(self) -> None:
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine: dict[int, Visit] = {}
        with contextlib.suppress(OSError):
            for line in self.rfile:
                verb, number, name = line.decode().split()
                self.wfile.write(self.said(verb, int(number), name, mine).encode() + b"\n")
        with Arbiter.changed:
            for row in list(mine):
                self.leave(row, mine, "died")

    def said(self, verb: str, row: int, name: str, mine: dict[int, Visit]) -> str:
        shared = Arbiter
        with shared.changed:
            if verb == "barrier":
                shared.waiting += 1
                turn = shared.turn
                if shared.waiting == row:
                    shared.waiting, shared.turn = 0, turn + 1
                    shared.changed.notify_all()
                shared.changed.wait_for(lambda: shared.turn != turn)
            elif verb == "enter":
                shared.entries += 1
                other = shared.inside.get(row)
                # The end of a killed process is seen by its connection, which may take a moment.
                if other and not (shared.changed.wait_for(lambda: bool(other.ended), 5) and other.ended == "died"):
                    shared.conflicts.append(f"row {row}: {name} came while {other.name} was in it")
                shared.inside[row] = mine[row] = Visit(name)
            elif verb == "leave":
                self.leave(row, mine, "left")
            elif verb == "report":
                return json.dumps({"entries": shared.entries, "conflicts": shared.conflicts})
        return "ok"

    @staticmethod
    def leave(row: int, mine: dict[int, Visit], how: str) -> None:
        visit = mine.pop(row)
        visit.ended = how
        if Arbiter.inside.get(row) is visit:
            del Arbiter.inside[row]
        Arbiter.changed.notify_all()


def arbiter() -> None:
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("", PORT), Arbiter) as server:
        server.daemon_threads = True
        server.serve_forever()


class Witness:
    """A process's line to the arbiter."""

    def __init__(self, host: str, name: str):
        self.name = name
        self._socket = socket.create_connection((host, PORT))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rwb")

    def say(self, verb: str, row: int = 0) -> str:
        self._stream.write(f"{verb} {row} {self.name}\n".encode())
        self._stream.flush()
        return self._stream.readline().decode().strip()


def report(host: str) -> Any:
    return json.loads(Witness(host, "host").say("report"))


def race(path: str, host: str, rows: int) -> dict[str, Any]:
    """Take every row at the same moment as the other client does; the rows that this one got."""
    witness = Witness(host, socket.gethostname())
    with opened(path) as store:
        store.run.take(0)
        won = []
        for row in range(1, rows):
            witness.say("barrier", 2)
            if store.run.take(row):
                won.append(row)
        witness.say("barrier", 2)
        held = [row for row in won if store.run.holds(row)]
    return {"won": won, "held": held}


def cycle(path: str, host: str, seconds: float, time_to_live: float, rows: int = 4) -> dict[str, Any]:
    """Take and give back a few rows again and again, telling the arbiter whenever in one."""
    name = f"{socket.gethostname()}/{os.getpid()}"
    witness, end, taken, denied = Witness(host, name), time.monotonic() + seconds, 0, 0
    with opened(path, time_to_live=time_to_live) as store:
        while time.monotonic() < end:
            row = random.randrange(rows)
            if not store.run.take(row):
                denied += 1
                continue
            taken += 1
            witness.say("enter", row)
            if random.random() < 0.3:
                time.sleep(random.random() * 0.01)
            witness.say("leave", row)
            store.run.release(row, done=random.random() < 0.5)
    return {"taken": taken, "denied": denied}


def hold(path: str, row: int, at: str, time_to_live: float, salt: int, folder: str) -> dict[str, Any]:
    """Claim a row and commit it; waits for `folder`/go, once `folder`/ready says so.

    at: "main" waits between claim and commit, "commit" within it, when the bytes of the keys are written.
    """
    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    writes = 0
    with opened(path, time_to_live=time_to_live) as store:
        assert store.run.take(row)
        store.begin([row])
        real = store.disk.write

        def wait() -> None:
            (here / "ready").touch()
            while not (here / "go").exists():
                time.sleep(0.05)

        def watched(name: str, offset: int, data: bytes) -> None:
            nonlocal writes
            if at == "commit" and name == "_keys/one.npy":
                wait()
            writes += 1
            real(name, offset, data)

        store.disk.write = watched  # type: ignore[method-assign]
        if at == "main":
            wait()
        try:
            store.commit_many([row], values([row], False, salt))
            outcome = "committed"
        except DatamodelsError as error:
            outcome = f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "writes": writes}


def await_row(
    path: str, row: int, time_to_live: float, salt: int, folder: str, patience: float, pause: bool = False
) -> dict[str, Any]:
    """Take a row of another host as soon as that goes, and commit it (with `pause`, when `folder`/go is there)."""
    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    with opened(path, time_to_live=time_to_live) as store:
        start = time.monotonic()
        (here / "looking").touch()
        while not store.run.take(row):
            if time.monotonic() - start > patience:
                return {"outcome": "never got it", "seconds": time.monotonic() - start}
            time.sleep(0.25)
        seconds = time.monotonic() - start
        (here / "took").touch()
        while pause and not (here / "go").exists():
            time.sleep(0.05)
        try:
            store.commit_many([row], values([row], False, salt))
            store.run.release(row, done=True)
            outcome = "committed"
        except DatamodelsError as error:
            outcome = f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "seconds": seconds}


def found(path: str, row: int, salts: list[int]) -> dict[str, Any]:
    """Which of several versions a row holds, if it is complete, and what verify says."""
    with Store.open(path) as store:
        problems = [str(problem) for problem in verify(store)]
        complete = bool(store.completed()[row])
        one, hundred = (np.load(store.path / f"{key}.npy")[row] for key in ("one", "hundred"))
    wanted = {salt: values([row], False, salt) for salt in salts}
    fits = [s for s, v in wanted.items() if v["one"][0] == one and (v["hundred"][0] == hundred).all()]
    return {"complete": complete, "holds": fits, "problems": problems}


VERBS = {
    "look": look,
    "create": create,
    "write": write,
    "check": check,
    "arbiter": arbiter,
    "report": report,
    "race": race,
    "cycle": cycle,
    "hold": hold,
    "await": await_row,
    "found": found,
}

if __name__ == "__main__":
    print(json.dumps(VERBS[sys.argv[1]](**json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))))
