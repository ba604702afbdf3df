"""The only file that touches a store's bytes: positioned writes, syncs, and files that appear whole.

Memory maps are for reading. Writing rows through one on a network file system loses neighbouring rows, because whole
pages are written back; `pwrite` of the exact range does not, and on a network file system it has to go through a
descriptor opened O_DSYNC, or the host's cached page does the same damage.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path
from threading import Thread
from typing import Protocol

from datamodels import files
from datamodels.errors import StoreError

# What is known to have one host; anything else is treated as shared with others.
_LOCAL = frozenset(
    [
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "tmpfs",
        "ramfs",
        "overlay",
        "zfs",
        "f2fs",
        "bcachefs",
        "reiserfs",
        "jfs",
        "ntfs",
        "ntfs3",
        "vfat",
        "exfat",
        "apfs",
        "hfs",
        "aufs",
    ]
)


_SYNCS = 16  # at once
_THREAD_SECONDS = 1e-4  # what it costs to start one
_READ_AT_ONCE = 1 << 30  # Python allocates what it asks for, and the kernel gives at most 2 GiB


class Disk(Protocol):
    """What a store needs of a folder; names are relative to it. The crash simulator in the tests is another one."""

    network: bool

    def write(self, name: str, offset: int, data: bytes) -> None: ...
    def read(self, name: str, offset: int, size: int) -> bytes: ...
    def sync(self, names: Iterable[str]) -> None: ...
    def put(self, name: str, data: bytes) -> None: ...
    def remove(self, name: str) -> None: ...
    def list(self, name: str) -> list[str]: ...
    def create(self, name: str, head: bytes, size: int, *, reserve: bool) -> None: ...
    def resize(self, name: str, size: int, *, reserve: bool) -> None: ...


def filesystem(path: Path) -> str:
    """Type of the file system that holds `path`, as the kernel names it; "unknown" where it does not say."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        best, kind = -1, "unknown"
        real = os.path.realpath(path)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                fields = left.split()
                where = fields[4].replace("\\040", " ")
                inside = real == where or real.startswith(where.rstrip("/") + "/")
                # btrfs and overlay report other device numbers than mountinfo does; the longest mount point decides.
                score = len(where) + (10_000 if fields[2] == wanted else 0)
                if inside and score > best:
                    best, kind = score, right.split()[0]
        return kind
    except OSError:
        return "unknown"


class PosixDisk:
    """A folder of a POSIX file system.

    `sync=False` leaves durability to the kernel: rows survive the death of a process, not of the machine. On a
    network file system every write is synchronous regardless, for correctness and not only for durability; `network`
    says whether it is one, None is to find out.
    """

    def __init__(self, root: Path, *, sync: bool = True, network: bool | None = None):
        self.root, self._root = root, str(root)  # pathlib is too slow for what is done several times a row
        if network is None:  # find out
            network = filesystem(root) not in _LOCAL and os.path.exists("/proc/self/mountinfo")
        self.network = network
        self.durable = sync
        self._flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DSYNC if self.network else 0)
        self._direct = getattr(os, "O_DIRECT", 0) if self.network else 0
        self._fds: dict[str, int] = {}
        self._sync_seconds = inf  # that the last sync of one file took

    def close(self) -> None:
        while self._fds:
            fd = self._fds.popitem()[1]
            self._forget(fd)
            os.close(fd)

    def _forget(self, fd: int) -> None:
        """Have the cache of a network file system let go of a file, or plain numpy on this host may find an old one.

        NFS keeps what it has read while any process of the host has the file open to write, whatever others write.
        """
        if self.network and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _fd(self, name: str) -> int:
        fd = self._fds.get(name)
        if fd is None:
            with _explained(self.root, name):
                fd = os.open(self.root / name, self._flags)
            kept = self._fds.setdefault(name, fd)
            if kept != fd:  # another thread was first
                os.close(fd)
            return kept
        return fd

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset` of an existing file."""
        fd = self._fd(name)
        with _explained(self.root, name):
            _write_all(fd, data, offset)
        self._forget(fd)

    def sync(self, names: Iterable[str]) -> None:
        """Make every write to `names` so far survive power loss; an error here is an error of the commit.

        A disk does many at once in little more than the time of one, so threads do them, unless it is quicker than
        these. All have ended when this returns or raises; after an error no other is begun.
        """
        if not self.durable or self.network:  # O_DSYNC has done it already
            return
        left = deque(enumerate(names))
        errors: dict[int, BaseException] = {}
        alone = len(left) == 1
        helpers = min(_SYNCS, len(left)) - 1 if self._sync_seconds > _THREAD_SECONDS else 0

        def work() -> None:
            while left and not errors:
                with contextlib.suppress(IndexError):  # another thread took the last
                    place, name = left.popleft()
                    try:
                        self._sync(name)
                    except BaseException as error:
                        errors[place] = error

        # Threads live no longer than this call: a main that forks must not find any.
        threads: list[Thread] = []
        try:
            with contextlib.suppress(RuntimeError):  # no more may be started: those that there are do it
                for _ in range(helpers):
                    thread = Thread(target=work, name="datamodels sync")
                    thread.start()
                    threads.append(thread)
            began = time.monotonic()
            work()
            if alone:
                self._sync_seconds = time.monotonic() - began
        finally:
            for thread in threads:
                thread.join()
        if errors:
            raise errors[min(errors)]

    def _sync(self, name: str) -> None:
        with _explained(self.root, name):
            fd = self._fd(name)
            try:
                os.fdatasync(fd)
            except OSError:
                # The kernel takes what it could not write for written; let it read again what the disk has, or a retry
                # would rest on it.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                raise

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, as they are on the disk now, or on the server of a network file system.

        Its cache is passed by: a fresh descriptor is not a fresh look while the file is open to write on this host.
        """
        with _explained(self.root, name, "the read failed"):
            try:
                return self._read(name, offset, size, self._direct)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = 0  # a file system that cannot, or only by whole pages
            return self._read(name, offset, size, 0)

    def _read(self, name: str, offset: int, size: int, flags: int) -> bytes:
        fd = os.open(f"{self._root}/{name}", os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            parts, left = [], size
            while left:
                part = os.pread(fd, min(left, _READ_AT_ONCE), offset)
                if not part:
                    raise StoreError(
                        f"{self.root / name}: ends at byte {offset}, expected {left} more; the file was "
                        f"cut short; restore it, or initialise a new store"
                    )
                parts.append(part)
                left, offset = left - len(part), offset + len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(fd)

    def create(self, name: str, head: bytes, size: int, *, reserve: bool) -> None:
        """A new file of `size` bytes that begins with `head` and continues with zeros. It must not exist."""
        path = self.root / name
        with _explained(self.root, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                if reserve:
                    _reserve(fd, size)
                os.ftruncate(fd, size)
                _write_all(fd, head, 0)
                if self.durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            self.sync_folder(path.parent)

    def resize(self, name: str, size: int, *, reserve: bool) -> None:
        """Have an existing file end at `size` bytes, with zeros where it was shorter; durable when this returns."""
        with _explained(self.root, name):
            fd = os.open(self.root / name, os.O_RDWR | os.O_CLOEXEC)
            try:
                if reserve:
                    _reserve(fd, size)
                os.ftruncate(fd, size)
                if self.durable:
                    os.fsync(fd)
            finally:
                os.close(fd)

    def put(self, name: str, data: bytes) -> None:
        """A file with `data`, whole or not at all, replacing what was there; durable when this returns."""
        path = self.root / name
        with _explained(self.root, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(path, sync=self.durable) as file:
                file.write(data)

    def remove(self, name: str) -> None:
        path = self.root / name
        with _explained(self.root, name, "it could not be removed"), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            self.sync_folder(path.parent)

    def list(self, name: str) -> list[str]:
        """Names of the files in a folder that do not begin with a dot; none where the folder is missing."""
        try:
            return sorted(n for n in os.listdir(self.root / name) if not n.startswith("."))
        except FileNotFoundError:
            return []

    def sync_folder(self, folder: Path) -> None:
        if self.durable:
            files.sync_folder(folder)


@contextlib.contextmanager
def _explained(folder: Path, name: str, otherwise: str = "the write did not happen") -> Iterator[None]:
    """System errors as a `StoreError` that names the file and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise StoreError(
            f"{folder / name}: this file of the store is missing; restore it, or initialise a new store"
        ) from None
    except OSError as error:
        hint = {
            errno.ENOSPC: "the disk is full; free space and run it again",
            errno.EDQUOT: "your quota is used up; free space and run it again",
            errno.EIO: "the disk reported an error; check it before you go on",
            errno.EACCES: "you have no permission there",
            errno.EFBIG: "larger than a file may be here (ulimit -f, or the file system's limit)",
            errno.EROFS: "the file system is read-only",
        }
        raise StoreError(f"{folder / name}: {error.strerror}: {hint.get(error.errno or 0, otherwise)}") from error


def _write_all(fd: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset`; the kernel may take less at a time."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        if not done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[done:], offset + done


def _reserve(fd: int, size: int) -> None:
    """Reserve space where the file system can, and say so now when there is not enough.

    glibc's posix_fallocate is no use here: where the file system cannot reserve, it writes every block instead.
    """
    if size == 0 or not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    while libc.fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
