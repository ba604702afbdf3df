"""Something done in the middle of our own code: before the k-th of its calls that change a file system."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

CHANGING = ("fdatasync", "fsync", "ftruncate", "link", "mkdir", "open", "pwrite")
CHANGING += ("rename", "replace", "rmdir", "symlink", "unlink", "write")


@contextlib.contextmanager
def before(number: int, action: Callable[[], None]) -> Iterator[list[str]]:
    """Inside the block, `action` is called once, before call `number` (from 1); yields the names of all calls."""
    calls: list[str] = []
    one = threading.RLock()  # syncs are made by several threads
    real = {name: getattr(os, name) for name in CHANGING}

    def hook(name):
        def call(*args, **options):
            with one:
                calls.append(name)
                if len(calls) == number:
                    for other, function in real.items():
                        setattr(os, other, function)
                    try:
                        action()
                    finally:
                        for other in real:
                            setattr(os, other, hooks[other])
            return real[name](*args, **options)

        return call

    hooks = {name: hook(name) for name in real}
    for name in real:
        setattr(os, name, hooks[name])
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(os, name, function)
