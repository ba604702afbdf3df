"""Promises 1 and 5: the disk runs full while a store is made, in a row's own folder, and in the middle of a run.

It is an error that says so, at creation with nothing left behind; never a SIGBUS; and with room again the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from datamodels.errors import StoreError
from datamodels.store import Store
from datamodels.store.check import verify
from tests import needs
from tests.faults.bench import Experiment, Lost, check
from tests.faults.images import Image, resize, sh, tmpfs
from tests.faults.rows import ROWS, SPEC, Server, values

PLENTY = 50_000  # kilobytes


class Room:
    """A file system of which as much is free as is asked for."""

    def __init__(self, folder: Path, leave: Callable[[int], None]):
        self.folder, self.leave = folder, leave


@contextlib.contextmanager
def room(folder: Path, kind: str) -> Iterator[Room]:
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(tmpfs(folder / "memory", 200_000))
        if kind == "tmpfs":
            yield Room(memory, partial(_shrink, memory))
        else:
            image = stack.enter_context(Image(memory / kind, kind))
            yield Room(image.folder, partial(_ballast, image.folder))


def _shrink(folder: Path, kilobytes: int) -> None:
    resize(folder, _used(folder) + kilobytes)


def _ballast(folder: Path, kilobytes: int) -> None:
    """By a file that takes all the room there is, and gives some of it back; ext4 keeps a little for itself."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    sh("sync", "-f", folder)
    size, block = 0, 1 << 20
    with open(ballast, "wb") as file:
        while block >= 4096:
            try:
                os.posix_fallocate(file.fileno(), size, block)
                size += block
            except OSError:
                block //= 2
        file.truncate(max(0, size - kilobytes * 1024))


def _used(folder: Path) -> int:
    room = os.statvfs(folder)
    return (room.f_blocks - room.f_bfree) * room.f_frsize // 1024


def making(folder: Path, step: int, *, kind: str) -> int:
    """With every `step` kilobytes more, until there is room enough and some more."""
    tried, made = 0, 0
    with room(folder, kind) as disk, Server() as server:
        for kilobytes in range(8, 600, step):
            path = disk.folder / "store"
            disk.leave(kilobytes)
            try:
                Store.create(path, SPEC).close()
            except StoreError as error:
                check("full" in str(error) or "No space" in str(error), f"{kilobytes} KB: it says {error}")
                check(not path.exists(), f"{kilobytes} KB: it left {_listed(path)} behind")
                check(made == 0, f"{kilobytes} KB are too few where less was enough")
            else:
                made += 1
                _run(server, path, kilobytes)
                shutil.rmtree(path)
            tried += 1
    check(0 < made < tried, f"{made} of {tried} stores were made")
    return tried


def _run(server: Server, path: Path, kilobytes: int) -> None:
    """The room of all rows was reserved: what fails now may be files of a run, but no array."""
    code, text = server.work(path)
    check(code >= 0, f"{kilobytes} KB: the worker died by signal {-code}")
    check(code > 0 or _exact(path) == ROWS, f"{kilobytes} KB: it ended with 0 and rows to do: {text}")
    check(".npy: No space" not in text, f"{kilobytes} KB: no room for an array that was reserved: {text}")
    _exact(path)


def running(folder: Path, step: int, *, kind: str, main: str = "tests.faults.writer") -> int:
    """Nothing is reserved: the disk is full after so many kilobytes of a run; then there is room again."""
    tried, cut_short = 0, 0
    with room(folder, kind) as disk, Server() as server:
        for kilobytes in range(0, 330, step):
            disk.leave(PLENTY)
            path = disk.folder / "store"
            Store.create(path, SPEC, reserve=False).close()
            disk.leave(kilobytes)
            code, text = server.work(path, main=main)
            check(code >= 0, f"{kilobytes} KB: the worker died by signal {-code}")
            done = _exact(path)
            check(code > 0 or done == ROWS, f"{kilobytes} KB: it ended with 0 and {done} rows: {text}")
            check(code == 0 or "space" in text, f"{kilobytes} KB: it ended with {code} and says {text}")
            cut_short += code > 0
            with contextlib.suppress(StoreError), Store.open(path) as store:
                store["x"].sum()  # a map of a hole, where no room is left to fill it
            disk.leave(PLENTY)
            code, text = server.work(path, "--worker.retries=9", main=main)
            check(code == 0 and _exact(path) == ROWS, f"{kilobytes} KB: with room again it ended with {code}: {text}")
            shutil.rmtree(path)
            tried += 1
    check(cut_short > 0, "the disk was never full")
    return tried


def _exact(path: Path) -> int:
    """How many rows are complete; each is as it was committed."""
    with Store.open(path) as store:
        problems = [str(problem) for problem in verify(store) if "not marked complete" not in problem.what]
    if problems:
        raise Lost("; ".join(problems))
    completed = np.load(path / "_completed.npy")
    for key in ("x", "version", "text"):
        held = np.load(path / f"{key}.npy")
        for row in np.flatnonzero(completed).tolist():
            check(np.array_equal(held[row], values(row, 1)[key]), f"row {row}, {key}: not what was committed")
    return int(completed.sum())


def _listed(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def _experiment(fault: str, run: Callable[..., int], amounts: tuple[int | None, int, int], **options: str):
    fast, slow, full = amounts
    return Experiment(fault, partial(run, **options), fast, slow, full, inside=True, needs=needs.loop_mounts)


MAKING = _experiment("full disk while a store is made, tmpfs", making, (97, 29, 4), kind="tmpfs")
MAKING_EXT4 = _experiment("full disk while a store is made, ext4", making, (None, 29, 4), kind="ext4")
RUNNING = _experiment("full disk in the middle of a run, tmpfs", running, (101, 33, 4), kind="tmpfs")
RUNNING_EXT4 = _experiment("full disk in the middle of a run, ext4", running, (None, 33, 4), kind="ext4")
OWN_FOLDER = _experiment(
    "full disk in a worker's own folder", running, (None, 101, 20), kind="tmpfs", main="tests.faults.wordy"
)
