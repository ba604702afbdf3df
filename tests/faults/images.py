"""File systems of our own in image files, which can lose their power, and small ones in memory, which run full."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MEGABYTES = {"ext4": 64, "xfs": 320}  # mkfs.xfs makes nothing below 300
ENV = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, which is XFS_IOC_GOINGDOWN
WITH_LOG, WITHOUT_LOG = 1, 2  # whether the journal's buffers are written first; data never are


def sh(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=ENV)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def tmpfs(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system in memory of that size, at `folder`, which is made."""
    folder.mkdir()
    sh("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder)
    try:
        yield folder
    finally:
        sh("umount", folder)


def resize(folder: Path, kilobytes: int) -> None:
    sh("mount", "-o", f"remount,size={kilobytes}k", folder)


def fill(folder: Path, kilobytes: int) -> None:
    """Leave so much of a file system in memory, by making it smaller."""
    while True:
        room = os.statvfs(folder)
        try:
            resize(folder, (room.f_blocks - room.f_bfree) * room.f_frsize // 1024 + kilobytes)
            return
        except RuntimeError:  # somebody wrote meanwhile
            kilobytes += 4


class Image:
    """A file system in a file, mounted at `folder`."""

    def __init__(self, file: Path, kind: str, *, full: bool = False):
        """`full`: all of the file takes room, so that nothing of it can be refused but what `make_holes` frees."""
        self.file, self.folder = file, file.with_name(f"{file.name}.mounted")
        size = MEGABYTES[kind] << 20
        with open(file, "wb") as made:
            made.truncate(size)
        sh(f"mkfs.{kind}", *(["-q", "-F", "-b", "4096"] if kind == "ext4" else ["-q"]), file)
        if full:
            sh("fallocate", "-l", size, file)
        self.folder.mkdir()
        self.mount()

    def mount(self) -> None:
        sh("mount", "-o", "loop", self.file, self.folder)

    def make_holes(self, path: Path, block: int = 4096) -> None:
        """Give back the room of a file of ext4, but for its first block.

        Linux' loop device takes a write of which some was written for a whole one, so only writes that begin in a hole
        are refused.
        """
        sh("sync", "-f", path)
        for match in re.findall(r"(\d+)\.\. +(\d+): +(\d+)\.\. +\d+:", sh("filefrag", "-v", path)):
            logical, last, physical = map(int, match)
            skip = int(logical == 0)
            start, count = physical + skip, last - logical + 1 - skip
            if count:
                sh("fallocate", "--punch-hole", "--offset", start * block, "--length", count * block, self.file)

    def cut(self, how: int) -> None:
        """The power goes out: from here on nothing that is written arrives, and what was not synced is gone."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", how))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Not before the threads of processes that were killed are gone, which takes a moment."""
        end = time.monotonic() + 10
        while True:
            try:
                sh("umount", self.folder)
                return
            except RuntimeError as error:
                if "busy" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *error: object) -> None:
        if os.path.ismount(self.folder):
            self.unmount()
