"""Writes tiny folders in the file formats that the data sets ship in, byte by byte.

The python batches of CIFAR-10 were written by Python 2 with numpy 1. No Python 3 writes such a pickle (its
strings are BINSTRING, its array module is `numpy.core`), so `python2_batch` puts the opcodes down by hand.
"""

import gzip
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def write_fashion_mnist(folder: Path, *, train: int, test: int, seed: int = 0, suffix: str = ".gz") -> None:
    """Images whose class can be seen: one bright band of rows per label, in noise."""
    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("t10k", test)):
        labels = rng.integers(10, size=n)
        images = rng.integers(100, size=(n, 28, 28))
        for i, label in enumerate(labels):
            images[i, 2 * label + 2 : 2 * label + 6] += 150
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)


def cifar10_examples(num_examples: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (n, 3072) and labels (n,): a bright band per label in one colour plane, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=num_examples)
    images = rng.integers(100, size=(num_examples, 3, 32, 32))
    for i, label in enumerate(labels):
        images[i, label % 3, 3 * label : 3 * label + 4] += 150
    return images.reshape(num_examples, 3072).astype(np.uint8), labels


def write_cifar10(folder: Path, *, train: int, test: int, form: str = "python", seed: int = 0) -> None:
    """Five batches of `train` examples in all and a test batch; `form` is python or binary."""
    sizes = [len(part) for part in np.array_split(np.arange(train), 5)] + [test]
    for i, size in enumerate(sizes):
        pixels, labels = cifar10_examples(size, seed=10 * seed + i)
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        if form == "python":
            (folder / name).write_bytes(python2_batch(pixels, labels.tolist(), label=f"batch {i + 1}"))
        else:
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())


def python2_batch(pixels: np.ndarray, labels: list[int], *, label: str = "training batch 1 of 5") -> bytes:
    """The protocol 2 pickle that Python 2's cPickle makes of {batch_label, labels, data, filenames}."""
    memo = iter(range(1, 1 << 20))

    def put() -> bytes:  # BINPUT, and LONG_BINPUT from 256 on
        i = next(memo)
        return b"q" + struct.pack("<B", i) if i < 256 else b"r" + struct.pack("<I", i)

    def string(value: str | bytes) -> bytes:  # SHORT_BINSTRING, and BINSTRING from 256 bytes on
        raw = value.encode() if isinstance(value, str) else value
        length = struct.pack("<cB", b"U", len(raw)) if len(raw) < 256 else struct.pack("<ci", b"T", len(raw))
        return length + raw

    def integer(value: int) -> bytes:  # BININT1, BININT2, BININT
        if 0 <= value < 1 << 8:
            return b"K" + struct.pack("<B", value)
        return b"M" + struct.pack("<H", value) if 0 <= value < 1 << 16 else b"J" + struct.pack("<i", value)

    def sequence(items: list[bytes]) -> bytes:  # EMPTY_LIST, then MARK items APPENDS, a thousand at a time
        out = b"]" + put()
        for start in range(0, len(items), 1000):
            out += b"(" + b"".join(items[start : start + 1000]) + b"e"
        return out

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + put()
        + b"cnumpy\nndarray\n" + put()
        + integer(0) + b"\x85" + put()  # (0,)
        + string("b") + put() + b"\x87" + put() + b"R" + put()  # _reconstruct(ndarray, (0,), 'b')
        + b"(" + integer(1)
        + integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86" + put()
        + b"cnumpy\ndtype\n" + put()
        + string("u1") + put() + integer(0) + integer(1) + b"\x87" + put() + b"R" + put()
        + b"(" + integer(3) + string("|") + put() + b"NNN" + integer(-1) + integer(-1) + integer(0)
        + b"t" + put() + b"b"
        + b"\x89" + string(pixels.tobytes()) + put() + b"t" + put() + b"b"  # NEWFALSE: C order
    )  # fmt: skip
    return (
        b"\x80\x02}" + put() + b"("
        + string("batch_label") + put() + string(label) + put()
        + string("labels") + put() + sequence([integer(i) for i in labels])
        + string("data") + put() + array
        + string("filenames") + put() + sequence([string(f"{i}.png") + put() for i in range(len(labels))])
        + b"u."
    )  # fmt: skip
