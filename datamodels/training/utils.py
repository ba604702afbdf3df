"""The released helpers that user scripts import."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodels import cli


def memmap_path(logdir: str | os.PathLike[str], key: str) -> Path:
    """The file that holds a key of the store."""
    return Path(logdir) / f"{key}.npy"


def load_memmap(logdir: str | os.PathLike[str], key: str, mode: Literal["r", "r+", "c"] | None) -> np.ndarray:
    """A key of the store, (num_models, *shape), memory-mapped with numpy's modes; None reads it whole.

    The raw file: rows that are not complete are in it too, and nothing is checked. A row written through "r+" no
    longer fits its checksum, and `Store.rows` will refuse it; commits go through the worker or `Store.commit_many`.
    """
    return np.asanyarray(np.load(memmap_path(logdir, key), mmap_mode=mode, allow_pickle=False))


def make_config(quiet: bool = False, conf_path: str | os.PathLike[str] | None = None) -> Any:
    """fastargs' global config with what `conf_path`, environment, -C files and command line say; shown unless quiet.

    Exits with 2 and a line on stderr for a value that is missing or of the wrong kind; arguments that no section
    declares are left alone.
    """
    config = cli.collect_global(conf_path)
    if not quiet:
        config.summary()
    return config
