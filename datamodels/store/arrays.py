"""The arrays of a store: their names, their `.npy` headers, and whether a folder holds what its spec.json says."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import SpecError, StoreError
from datamodels.spec import Spec
from datamodels.store import commit as commits
from datamodels.store.commit import COMPLETED_FILE, KEY_RECORD, ROW_RECORD, ROWS_FILE

SPEC_FILE = "spec.json"
NEXT_FILE = "spec.json.next"
"""What spec.json will be when a change of the store that is under way, or was cut short, has been finished."""


def arrays(spec: Spec) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """(name, dtype, row shape) of every array of a store."""
    found: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = [
        (COMPLETED_FILE, np.dtype("?"), ()),
        (ROWS_FILE, ROW_RECORD, ()),
    ]
    for key, field in spec.schema.items():
        # The record first: an initialisation that was interrupted is cleared away by what stands in _keys.
        found.append((commits.record_file(key), KEY_RECORD, ()))
        found.append((commits.key_file(key), field.disk_dtype, field.disk_shape))
    return found


def header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The `.npy` header; numpy leaves room in it for `num_models` to grow."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


def planned(folder: Path) -> Spec | None:
    """The spec that a change of a store, under way or cut short, is to lead to; None where there is no such change."""
    try:
        return Spec.from_json(json.loads((folder / NEXT_FILE).read_bytes()))
    except (OSError, ValueError, SpecError):
        return None


def size_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Bytes of the file of an array, its header included."""
    return len(header(dtype, shape)) + dtype.itemsize * math.prod(shape)


def check_header(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], *, rows: int | None = None) -> int:
    """Offset behind a file's header. `StoreError` unless it holds exactly an array of this dtype and shape.

    `rows`: how many it may have instead, while a store grows.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found_shape, fortran, found_dtype = read(file)
            head = file.tell()
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise StoreError(f"{path}: this file of the store is missing; restore it, or initialise a new store") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StoreError(f"{path}: not a .npy file ({error}); restore it, or initialise a new store") from None
    if found_shape == (rows, *shape[1:]):
        shape = found_shape
    if (found_shape, found_dtype, fortran) != (shape, dtype, False):
        raise StoreError(
            f"{path}: expected shape {list(shape)}, dtype {dtype} in C order as spec.json says, got "
            f"{list(found_shape)}, {found_dtype}; one of the two was changed; restore it"
        )
    expected = head + dtype.itemsize * math.prod(shape)
    if size < expected:
        raise StoreError(f"{path}: expected {expected:,} bytes, got {size:,}: the file was cut short; restore it")
    return int(head)
