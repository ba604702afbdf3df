"""What a row printed: the part of the worker's own output that begins where the row began.

Where standard output and error are files, as under a pool, SLURM, GNU parallel or `> log`, nothing is redirected or
copied while rows run: before each call of main the worker notes how long the files are, in `runs/<run id>.row`, and
when the row fails its part is read back. The note is there for others too: for the watchdog, and for the worker that
finds a row whose process was killed. At a terminal or into a pipe nothing is kept; it is seen where it goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from datamodels.store import Store

_HEAD, _TAIL = 1 << 16, 3 << 16  # bytes of a row's output that are kept
_CHUNK = 1 << 20
_RULE = b"---- datamodels.worker, run "
_NAMES = {1: b"---- standard output\n", 2: b"---- standard error\n"}


class Output:
    """The files that this process prints to, and the note of where in them the rows in hand began."""

    def __init__(self, store: Store):
        self._store = store
        self._note = -1
        self._files: dict[int, str] = {}

    def open(self) -> None:
        """Find the files; before a word is printed of any row."""
        self._files = {fd: path for fd in (1, 2) if (path := _file(fd)) is not None}
        if len(self._files) == 2 and os.path.sameopenfile(1, 2):
            del self._files[2]
        if not self._files:
            return
        self._flush_c = _flusher()
        self._path = _note(self._store.path, self._store.run.id)
        with contextlib.suppress(OSError):  # a full disk
            self._note = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            for fd in self._files:
                if os.fstat(fd).st_size:  # what an earlier run printed ends here
                    os.write(fd, _RULE + self._store.run.id.encode() + b"\n")
        self._store.run.note(output=list(self._files.values()))

    def begin(self, attempts: Mapping[int, int]) -> None:
        """What is printed from here on is that of these rows; `attempts` has the number of each one's attempt."""
        if self._note < 0:
            return
        self._flush()
        files = []
        for fd, path in self._files.items():
            with contextlib.suppress(OSError):  # main has closed it
                status = os.fstat(fd)
                files.append({"fd": fd, "path": path, "inode": status.st_ino, "begin": status.st_size})
        with contextlib.suppress(OSError):
            os.pwrite(self._note, json.dumps({"rows": attempts, "files": files}).encode() + b"\n", 0)

    def kept(self) -> bytes:
        """What the rows in hand have printed so far, at most 256 KiB of each file: its beginning and its end."""
        if self._note < 0:
            return b""
        self._flush()
        return _read(self._store.path, self._store.run.id, None)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # main may have put anything there
                stream.flush()
        self._flush_c()

    def close(self) -> None:
        if self._note >= 0:
            os.close(self._note)
            self._note = -1
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def printed(folder: Path, run: str, row: int) -> bytes:
    """What another run has printed since it began with a row that it has in hand, or had when it was killed.

    Empty where that is not known, or was printed to a file of another machine.
    """
    return _read(folder, run, row)


def _file(fd: int) -> str | None:
    """Path of the regular file that a descriptor writes to, or None for anything else."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None


def _flusher() -> Callable[[], object]:
    """Writes out what C code has printed, which C keeps back where the output is a file."""
    try:
        libc = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "stdout")
    except (OSError, ValueError):
        return lambda: None
    return lambda: libc.fflush(stdout)


def _note(folder: Path, run: str) -> Path:
    return folder / "runs" / f"{run}.row"


def _read(folder: Path, run: str, row: int | None) -> bytes:
    """The parts of the files of a run's note; `row` says that it is another run, and which row it must have had."""
    parts: dict[int, bytes] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        note = json.loads(_note(folder, run).read_bytes().splitlines()[0])
        if row is not None and str(row) not in note["rows"]:
            return b""
        for file in note["files"]:
            with contextlib.suppress(OSError):
                path = file["path"] if row is not None else f"/proc/self/fd/{file['fd']}"  # it may have no name
                with open(path, "rb") as log:
                    status = os.fstat(log.fileno())
                    if status.st_ino == file["inode"]:  # not another machine's, or another one of the name
                        begin = file["begin"] if file["begin"] <= status.st_size else 0  # somebody emptied it
                        end = status.st_size if row is None else _end(log, begin, status.st_size)
                        if part := _bounded(log, begin, end, file["path"]):
                            parts[file["fd"]] = part
    return b"".join(_NAMES[fd] + part for fd, part in parts.items()) if len(parts) > 1 else b"".join(parts.values())


def _end(log: BinaryIO, begin: int, size: int) -> int:
    """Where the next run began to print, or the end."""
    before = b""
    log.seek(begin)
    while begin < size and (chunk := log.read(_CHUNK)):
        if (place := (before + chunk).find(_RULE)) >= 0:
            return begin - len(before) + place
        before, begin = chunk[-len(_RULE) :], begin + len(chunk)
    return size


def _bounded(log: BinaryIO, begin: int, end: int, path: str) -> bytes:
    log.seek(begin)
    left = end - begin - _HEAD - _TAIL
    if left <= 0:
        return log.read(end - begin)
    head = log.read(_HEAD)
    log.seek(end - _TAIL)
    between = f"\n[… {left:,} bytes left out; all of it is in {path}, from byte {begin} on …]\n"
    return head + between.encode() + log.read(_TAIL)
