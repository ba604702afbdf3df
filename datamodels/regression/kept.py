"""Arrays that several processes of one machine need and one of them makes: kept in a folder, mapped by all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

NAMES = "names.json"  # there last: with it, the arrays are whole


def kept(folder: Path | None, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """What `make` returns; from `folder`, mapped, where another process has left it there.

    Whoever comes first makes them while the others wait. Without a folder, or where it has no room, they are simply
    made. What is kept must depend on nothing but the name of the folder.
    """
    if folder is None:
        return make()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / NAMES).exists():
            made = make()
            try:
                for name, array in made.items():
                    _put(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))
                _put(folder / NAMES, lambda file: file.write(json.dumps(sorted(made)).encode()))
            except OSError:  # a full disk costs time and no result
                for name in made:
                    (folder / f"{name}.npy").unlink(missing_ok=True)
                return made
    names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    # Copy on write: kernels compiled for arrays that may be written to would be compiled again for others.
    return {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in names}


def _put(path: Path, write: Callable[..., object]) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
