"""Files that appear whole: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[BinaryIO]:
    """A file open for writing that gets its name, or replaces what has it, when the block ends without an error.

    What a killed process leaves is `.<name>.<number>.partial`. sync: whether the file survives power loss once the
    block has ended.
    """
    path = Path(path)
    # Threads have numbers that no other process has. mkstemp would make the file private.
    beside = path.with_name(f".{path.name}.{threading.get_native_id()}.partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive power loss: a file's name is in its folder, not in the file."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)
