"""Promises 1 and 2 on real file systems: the power goes out while processes commit, replace and reset rows."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from datamodels.errors import StoreError
from datamodels.store import Store
from datamodels.store.check import verify
from datamodels.store.commit import journals
from datamodels.store.disk import PosixDisk
from datamodels.store.reset import reset
from tests import needs
from tests.faults import calls
from tests.faults.bench import Experiment, Lost, check
from tests.faults.images import WITH_LOG, WITHOUT_LOG, Image, fill, resize, tmpfs
from tests.faults.rows import SPEC, WIDTH, Writers, values

LONGEST = 0.3  # seconds until the power goes


def cuts(folder: Path, count: int, *, kind: str, network: bool = False) -> int:
    """Three writers, cut off with and without the journal's last buffers; then mounted again, and compared."""
    rng = random.Random(kind)
    with tmpfs(folder / "memory", 500_000) as memory, Image(memory / kind, kind) as image:
        path = image.folder / "store"
        Store.create(path, SPEC).close()
        with Writers(path, network=network) as writers:
            for _ in range(count):
                pids = [writers.start() for _ in range(3)]
                time.sleep(0.02 + rng.random() * LONGEST)
                check(not writers.errors, "; ".join(writers.errors))
                image.cut(rng.choice((WITH_LOG, WITHOUT_LOG)))
                for pid in pids:
                    writers.kill(pid)
                writers.settle()
                writers.errors.clear()  # the disk was gone
                image.unmount()
                image.mount()
                forget_claims(path)
                writers.check()
            check(writers.done > count / 2, f"the writers hardly got to commit: {writers.done}")
    return count


def forget_claims(path: Path) -> None:
    """Finish replacements when the leases of the run that were cut off have run out, then drop all that they held.

    After a reboot nobody can know whether they live: what they said of themselves may not have reached the disk.
    """
    with Store.open(path, time_to_live=0.1) as store:
        end = time.monotonic() + 5
        while journals(store.layout) and time.monotonic() < end:
            time.sleep(0.05)
            with contextlib.suppress(StoreError):
                store.recover()
    for claim in (path / "claims").iterdir():
        claim.unlink()


def refused(folder: Path, count: int) -> int:
    """ext4 on a disk that refuses what is written to one key, as a sync is told; then it takes it again; then a cut."""
    rng = random.Random("refused")
    for number in range(count):
        (folder / str(number)).mkdir()
        with (
            tmpfs(folder / str(number) / "memory", 500_000) as memory,
            Image(memory / "disk", "ext4", full=True) as image,
        ):
            path = image.folder / "store"
            Store.create(path, SPEC).close()
            image.make_holes(path / "x.npy")
            fill(memory, 0)
            _read_again_after_a_failed_sync(path)
            with Writers(path, first=1) as writers:
                # Nobody is killed before they heard of the error: ext4 keeps pages whose blocks it takes for written,
                # and what is written to them later is not there after a mount.
                for _ in range(3):
                    writers.start()
                writers.wait()
                resize(memory, 500_000)
                pids = [writers.start() for _ in range(3)]
                time.sleep(0.05 + rng.random() * LONGEST)
                check(not writers.errors, f"the disk takes everything again: {writers.errors}")
                image.cut(WITHOUT_LOG)
                for pid in pids:
                    writers.kill(pid)
                writers.settle()
                image.unmount()
                image.mount()
                forget_claims(path)
                writers.check()
    return count


def _read_again_after_a_failed_sync(path: Path) -> None:
    row, size = 2, WIDTH * 8
    disk = PosixDisk(path)
    disk.write("x.npy", 128 + row * size, b"\xff" * size)
    try:
        disk.sync(["x.npy"])
    except StoreError:
        middle = disk.read("x.npy", 128 + row * size + size // 2, 1)
        check(middle == b"\0", "after a sync that failed a reader sees what never reached the disk")
    else:
        raise Lost("the disk refused, and nobody said so")
    finally:
        disk.close()


def every_call(folder: Path, step: int, *, kind: str) -> int:
    """The power goes before every call that changes the file system, or every `step`th: of making a store, a commit…"""
    tried = 0
    with tmpfs(folder / "memory", 500_000) as memory, Image(memory / kind, kind) as image:
        path = image.folder / "store"
        for what, (before, action, allowed) in ACTIONS.items():
            for call in range(1, 1000, step):
                how = WITH_LOG if tried % 2 else WITHOUT_LOG
                before(path)
                with calls.before(call, partial(image.cut, how)) as made, contextlib.suppress(StoreError, OSError):
                    action(path)
                over = len(made) < call
                if over:
                    image.cut(how)  # just after it was reported done
                image.unmount()
                image.mount()
                try:
                    if (path / "spec.json").exists():
                        forget_claims(path)
                    check(allowed(path, over), f"what is found may not be; reported done: {over}")
                except (StoreError, Lost) as error:
                    name = "the end" if over else f"call {call}, {made[call - 1]}"
                    raise Lost(f"{what}, cut before {name}: {error}") from None
                shutil.rmtree(path, ignore_errors=True)
                tried += 1
                if over:
                    check(call > 10, f"{what} made only {made}")
                    break
    return tried


def _create(path: Path) -> None:
    Store.create(path, SPEC).close()


def _created(path: Path, reported: bool) -> bool:
    """A store is there, or one can be made, and it works."""
    there = (path / "spec.json").exists()
    if not there:
        _create(path)
    _commit(path, 1)
    return there or not reported


def _commit(path: Path, version: int) -> None:
    with Store.open(path) as store:
        held = values(3, version)
        store.commit_many([3], {key: [value] for key, value in held.items()}, replace=True)


def _committed(path: Path, version: int) -> None:
    _create(path)
    _commit(path, version)


def _held(path: Path) -> int:
    """The version of row 3, which is whole, or 0."""
    with Store.open(path) as store:
        if not store.completed()[3]:
            return 0
        problems = [str(problem) for problem in verify(store)]
        check(not problems, "; ".join(problems))
        held = {key: store.rows(key, [3])[0] for key in ("x", "version", "text")}
        version = int(held["version"])
        expected = values(3, version)
        noted = store.layout.records("note", [3])["status"][0] == 1
        check(noted == ("note" in expected), "the note of another version")
        check(all(np.array_equal(held[key], expected[key]) for key in held), "not what was committed")
        return version


# What is there before, what is cut off, and whether what is found may be, told if it was reported done.
ACTIONS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], Callable[[Path, bool], bool]]] = {
    "making a store": (lambda path: None, _create, _created),
    "a commit": (_create, partial(_commit, version=1), lambda path, done: _held(path) in ((1,) if done else (0, 1))),
    "a replacement": (
        partial(_committed, version=1),
        partial(_commit, version=2),
        lambda path, done: _held(path) in ((2,) if done else (1, 2)),
    ),
    "a reset": (
        partial(_committed, version=1),
        lambda path: _reset(path),
        lambda path, done: _held(path) in ((0,) if done else (0, 1)),
    ),
}


def _reset(path: Path) -> None:
    with Store.open(path) as store:
        reset(store, [3])


def _experiment(fault: str, run: Callable[..., int], amounts: tuple[int, int], inside: bool = False, **options: object):
    slow, full = amounts
    return Experiment(fault, partial(run, **options), slow=slow, full=full, inside=inside, needs=needs.loop_mounts)


EXT4 = _experiment("power cut on ext4", cuts, (8, 100), kind="ext4")
XFS = _experiment("power cut on xfs", cuts, (8, 100), kind="xfs")
AS_NETWORK = _experiment("power cut on ext4, written as to a network", cuts, (4, 50), kind="ext4", network=True)
EXT4_CALLS = _experiment("power cut on ext4 before every call", every_call, (5, 1), kind="ext4", inside=True)
XFS_CALLS = _experiment("power cut on xfs before every call", every_call, (5, 1), kind="xfs", inside=True)
REFUSED = _experiment("a disk that refuses, then takes again, then a cut", refused, (4, 50))
