"""CIFAR-10 as its authors ship it, read without trusting it.

The python batches are pickles, and a pickle can run whatever it names. These are read by an unpickler that
knows an array's few parts by name, hands out stand-ins for them, and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodels.errors import DatamodelsError

SOURCE = "the python or the binary version from https://www.cs.toronto.edu/~kriz/cifar.html, unpacked"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The real batches have 31 MB each.
_LARGEST = 1 << 30
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_PIXELS = 3 * 32 * 32  # one example: red, green, blue plane, each 32 rows of 32


Labelled = tuple[np.ndarray, np.ndarray]


def read(folder: Path) -> tuple[Labelled, Labelled]:
    """Training and test examples, each as pixels uint8 (n, 3, 32, 32) and labels int64 (n,).

    Training examples keep the order of batches 1 to 5. Where a folder has both forms, the python one is read.
    Raises DatamodelsError, naming the file, for one that is missing, damaged, or asks to have something run.
    """
    for sub, suffix, batch in (
        ("cifar-10-batches-py", "", _python_batch),
        ("cifar-10-batches-bin", ".bin", _binary_batch),
    ):
        for place in (folder, folder / sub):
            paths = [place / f"{name}{suffix}" for name in _BATCHES]
            if any(path.is_file() for path in paths):  # one means this form; a missing other is then an error
                *train, test = (batch(path) for path in paths)
                return _joined(train), _joined([test])
    raise DatamodelsError(
        f"cifar10: neither data_batch_1 nor data_batch_1.bin in {folder}, nor in its cifar-10-batches-py or "
        f"cifar-10-batches-bin; expected {SOURCE}; name its folder with --data.dir=DIR"
    )


def _joined(batches: list[Labelled]) -> Labelled:
    pixels = np.concatenate([pixels for pixels, _ in batches])
    return pixels.reshape(-1, 3, 32, 32), np.concatenate([labels for _, labels in batches])


def _read_whole(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise DatamodelsError(f"{path}: {size} bytes; no CIFAR-10 batch is that large; fetch it again")
        return path.read_bytes()
    except OSError as error:
        raise DatamodelsError(f"{path}: cannot be read ({error.strerror}); all six are needed") from error


def _binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = _read_whole(path)
    if not raw or len(raw) % (1 + _PIXELS):
        raise DatamodelsError(
            f"{path}: {len(raw)} bytes; expected a multiple of {1 + _PIXELS}, each a label and its pixels; "
            f"fetch it again"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + _PIXELS)
    _check_labels(path, records[:, 0])
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _unpickle(_read_whole(path))
    except DatamodelsError:
        raise
    except _Refused as error:
        raise DatamodelsError(
            f"{path}: refused, because {error}; CIFAR-10's own batches hold nothing of the kind. "
            f"Nothing of it was run. Expected {SOURCE}"
        ) from error
    except Exception as error:  # whatever the unpickler makes of a damaged file: it documents no closed list
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DatamodelsError(f"{path}: not a CIFAR-10 batch ({reason}); fetch it again") from error
    if not isinstance(content, dict):
        raise DatamodelsError(f"{path}: expected a dict of 'data' and 'labels', got {type(content).__name__}")
    # Written by Python 2, its keys are byte strings; a copy written by Python 3 may have text.
    pixels, labels = (content.get(key.encode(), content.get(key)) for key in ("data", "labels"))
    if not isinstance(pixels, _PickledArray):
        raise DatamodelsError(f"{path}: expected b'data' as a numpy array, got {type(pixels).__name__}")
    if pixels.dtype != "u1" or len(pixels.shape) != 2 or pixels.shape[1] != _PIXELS:
        raise DatamodelsError(
            f"{path}: expected b'data' as u1 (uint8) of shape (n, {_PIXELS}), "
            f"got {pixels.dtype[:20]} {pixels.shape[:5]}"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DatamodelsError(f"{path}: expected b'labels' as a list of ints, got {type(labels).__name__}")
    if len(labels) != pixels.shape[0] or not labels:
        raise DatamodelsError(f"{path}: {len(labels)} labels for {pixels.shape[0]} images; expected as many")
    if len(pixels.values) != pixels.shape[0] * _PIXELS:
        raise DatamodelsError(f"{path}: {len(pixels.values)} bytes for shape {pixels.shape}; fetch it again")
    _check_labels(path, labels)
    order: Literal["F", "C"] = "F" if pixels.fortran else "C"
    images = np.frombuffer(pixels.values, np.uint8).reshape(pixels.shape, order=order)
    return images, np.asarray(labels, np.int64)


class _Refused(Exception):
    """The pickle asks for something that no CIFAR-10 batch has."""


# What Python 2 writes in protocol 2 for a dict of strings, lists of ints and one array, and what Python 3
# writes for the same up to protocol 4. None of them makes an instance of a class, looks up an extension or
# reads a persistent id, and none allocates more than the bytes it brings along.
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_PLAIN = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"})
_BYTES = frozenset({"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"})
_TEXT = frozenset({"BINUNICODE", "SHORT_BINUNICODE"})
_LISTS = frozenset({"EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS"})
_MEMO = frozenset({"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE"})
_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"})  # answered by _Unpickler.find_class
_FRAME = frozenset({"PROTO", "FRAME", "MARK", "STOP"})
_OPCODES = _PLAIN | _BYTES | _TEXT | _TUPLES | _LISTS | _MEMO | _CALLS | _FRAME


class _PickledArray:
    """Stands in for a numpy array while a batch is read: its parts, for numpy only once they are checked."""

    __slots__ = ("dtype", "fortran", "shape", "values")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: str = ""
        self.fortran = False
        self.values = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, values = state  # numpy's: version, shape, dtype, Fortran order, bytes
        if not (isinstance(shape, tuple) and all(type(d) is int and d >= 0 for d in shape)):
            raise _Refused("the shape of an array is not a tuple of sizes")
        if not isinstance(dtype, _PickledDtype) or not isinstance(values, bytes):
            raise _Refused("an array holds something else than plain bytes")
        self.shape, self.dtype, self.fortran, self.values = shape, dtype.name, bool(fortran), values


class _PickledDtype:
    __slots__ = ("name",)

    def __init__(self, name: Any) -> None:
        if not isinstance(name, bytes | str):
            raise _Refused("the dtype of an array is not a plain one")
        self.name = name if isinstance(name, str) else name.decode("latin1")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which one-byte values do not have."""


def _unpickle(raw: bytes) -> Any:
    """What a pickle of dicts, lists, strings, ints and plain arrays holds; _Refused if it has anything else.

    A first pass reads the opcodes and executes none; the unpickler that follows finds four names, all ours.
    """
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        if opcode.name not in _OPCODES:
            raise _Refused(f"it uses the pickle opcode {opcode.name}")
        # The unpickler's memo is an array: a number far above the count of objects is a large allocation.
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > count:
            raise _Refused(f"it stores an object under the number {argument}")
        # A batch has five; to hash a million of them, one inside the other, overflows the C stack.
        tuples += opcode.name in _TUPLES
        if tuples > 100:
            raise _Refused("it holds more than 100 tuples")
    return _Unpickler(io.BytesIO(raw), encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    """Knows the names of an array's parts, and for each a stand-in made for this load; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _PickledArray()
        if (module, name) == ("numpy", "ndarray"):
            return None  # only an argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda spec, *_: _PickledDtype(spec)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, *_: str.encode(text, "latin1")
        raise _Refused(f"it asks for {module}.{name}"[:200])


def _check_labels(path: Path, labels: np.ndarray | list[int]) -> None:
    low, high = int(min(labels)), int(max(labels))
    if low < 0 or high > 9:
        raise DatamodelsError(f"{path}: expected labels in [0, 10), got {low} to {high}")
