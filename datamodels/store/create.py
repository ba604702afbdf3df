"""How a store's folder comes to be: everything or nothing, and never over something else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from datamodels.design import resolve
from datamodels.errors import SpecError, StoreError
from datamodels.spec import Spec
from datamodels.store.arrays import SPEC_FILE, arrays, header, size_of
from datamodels.store.claims import Process
from datamodels.store.commit import COMPLETED_FILE, ROWS_FILE
from datamodels.store.disk import PosixDisk

MARKER = "spec.json.partial"
FOLDERS = ("claims", "runs", "workers")


def create(
    path: Path, spec: Spec | Mapping[str, Any] | str | Path, *, reserve: bool, sync: bool, base: Path | None = None
) -> None:
    """Make the folder of a new store; see `Store.create`."""
    base = base or Path()
    if isinstance(spec, (str, Path)):
        base = Path(spec).resolve().parent
        where, spec = f"{spec}: ", Spec.load(spec)
    else:
        where, spec = "", spec if isinstance(spec, Spec) else Spec.from_json(spec)
    try:
        resolved = resolve(spec, base)
    except SpecError as error:
        raise SpecError(f"{where}{error}") from None
    spec = resolved.spec
    assert spec.num_models is not None
    try:
        text = spec_text(spec)
    except SpecError as error:
        raise SpecError(f"{where}{error}") from None
    _refuse_existing(path, spec)
    try:
        there = path.exists()
        path.mkdir(parents=True, exist_ok=True)
        disk = PosixDisk(path, sync=sync)
        with _initialising(path, spec, there=there, network=disk.network), contextlib.closing(disk):
            for name, dtype, shape in arrays(spec):
                whole = (spec.num_models, *shape)
                with needing(path, name, size_of(dtype, whole)) as size:
                    disk.create(name, header(dtype, whole), size, reserve=reserve)
            for inside, content in resolved.files.items():
                disk.put(inside, content)
            for folder in FOLDERS:
                (path / folder).mkdir(exist_ok=True)
                disk.sync_folder(path / folder)
            disk.put(f".{SPEC_FILE}.new", text)
            _publish(path / f".{SPEC_FILE}.new", path / SPEC_FILE)
            disk.sync_folder(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot make the store: {error.strerror or error}") from error


def spec_text(spec: Spec) -> bytes:
    """What spec.json holds. `SpecError` for a design that JSON cannot."""
    try:
        return (json.dumps(spec.to_json(), indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise SpecError(f"design: cannot be kept as JSON ({error})") from None


@contextlib.contextmanager
def needing(folder: Path, name: str, size: int) -> Iterator[int]:
    """`size`; a `StoreError` inside also says how much an array needs and how much there is."""
    try:
        yield size
    except StoreError as error:
        free = shutil.disk_usage(folder).free
        raise StoreError(f"{error}; {name} needs {size:,} bytes, {free:,} are free in {folder}") from error


def _refuse_existing(path: Path, spec: Spec) -> None:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: expected a folder, this is a file; choose another logdir")
    if (path / SPEC_FILE).exists():
        raise StoreError(f"{path}: there is a store already, nothing is changed; choose another logdir, or remove it")
    if os.path.lexists(path / MARKER):
        return  # an initialisation was interrupted: before spec.json there is no row to lose
    for name, _, _ in arrays(spec):
        if os.path.lexists(path / name):
            raise StoreError(
                f"{path / name}: exists, and there is no spec.json, so it is not ours to overwrite; choose "
                f"another logdir, or move it away"
            )


@contextlib.contextmanager
def _initialising(path: Path, spec: Spec, *, there: bool, network: bool) -> Iterator[None]:
    """Keeps a second initialisation of the folder out while this one makes its files, and leaves all or nothing.

    The marker says that what looks like a store's files here is of an initialisation that did not end, and may go. It
    names its process, because a network file system may not have locks that reach other hosts.
    """

    def first() -> None:
        _refuse_existing(path, spec)

    entered = False
    try:
        with alone(path, MARKER, "initialising this folder", network=network, first=first):
            entered = True
            folders = [name for name in ("_keys", "design", *FOLDERS) if not (path / name).exists()]
            try:
                _refuse_existing(path, spec)
                _clear(path)
                yield
            except BaseException:
                if not (path / SPEC_FILE).exists():
                    _clear(path)
                    for name in folders:
                        shutil.rmtree(path / name, ignore_errors=True)
                raise
    finally:
        if entered and not there:
            with contextlib.suppress(OSError):  # it holds something, if only what is right
                os.rmdir(path)


@contextlib.contextmanager
def alone(
    path: Path, name: str, doing: str, *, network: bool, first: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Keeps other processes from `doing` the same to a folder, by a lock and a marker that names this process.

    The marker is there because a network file system may not have locks that reach other hosts. `first` is called
    before the marker is made.
    """
    marker, me = path / name, json.dumps(astuple(Process.current()))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = not network
        except BlockingIOError:
            raise StoreError(f"{path}: another process is {doing}; nothing is changed") from None
        except OSError:
            locked = False
        first()
        try:
            os.symlink(me, marker)
        except FileExistsError:
            if not locked and _alive(marker) is not False:
                raise StoreError(
                    f"{path}: another process is {doing}, or was interrupted on another host; nothing is changed; if "
                    f"none is, remove {marker}"
                ) from None
            os.unlink(marker)
            os.symlink(me, marker)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(marker)
    finally:
        os.close(fd)


def _alive(marker: Path) -> bool | None:
    """Whether the process that an initialisation's marker names lives; None where this host cannot know."""
    try:
        return Process(*json.loads(os.readlink(marker))).alive()
    except (OSError, ValueError, TypeError):
        return None


def _clear(path: Path) -> None:
    """Remove what an initialisation that did not end has made."""
    for record in (path / "_keys").glob("*.npy"):
        (path / record.name).unlink(missing_ok=True)
        record.unlink(missing_ok=True)
    for name in (COMPLETED_FILE, ROWS_FILE, f".{SPEC_FILE}.new"):
        (path / name).unlink(missing_ok=True)
    for half in (*path.glob(f"..{SPEC_FILE}.new.*.partial"), *(path / "design").glob(".*.npy.*.partial")):
        half.unlink(missing_ok=True)


def _publish(beside: Path, path: Path) -> None:
    """Give a finished file its name, unless somebody else was first."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise StoreError(f"{path.parent}: there is a store already; another process initialised it") from None
    except OSError:  # a file system without hard links
        os.rename(beside, path)
        return
    os.unlink(beside)
