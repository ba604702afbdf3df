"""Image classification data held in memory, to be indexed by a training mask.

`load("digits")` needs no file of the user's; `load("fashion_mnist", folder)` reads IDX files and
`load("cifar10", folder)` reads CIFAR-10's own batches. Pixels come scaled to [0, 1] and nothing else is
done to them: centring belongs to the model that wants it, and a picture of them needs no undoing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodels.errors import DatamodelsError

NAMES = ("digits", "fashion_mnist", "cifar10")

DIGITS_TRAIN = 1_000
DIGITS_SEED = 0


@dataclass(frozen=True)
class Split:
    """Examples in memory: `inputs` float32 (n, ...) and `labels` int64 (n,), the same n in both."""

    inputs: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for name, values, dtype in (("inputs", self.inputs, np.float32), ("labels", self.labels, np.int64)):
            if not isinstance(values, np.ndarray) or values.dtype != dtype:
                got = getattr(values, "dtype", type(values).__name__)
                raise DatamodelsError(f"split: expected {name} as a numpy array of {np.dtype(dtype)}, got {got}")
        if self.labels.ndim != 1 or self.inputs.ndim < 2 or len(self.inputs) != len(self.labels):
            raise DatamodelsError(
                f"split: expected inputs (n, ...) and labels (n,), got {self.inputs.shape} and {self.labels.shape}"
            )
        if len(self.labels) == 0:
            raise DatamodelsError("split: expected at least one example, got none")
        if not np.isfinite(self.inputs).all():
            raise DatamodelsError("split: inputs hold values that are not finite")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with labels in [0, num_classes) and inputs of one shape."""

    name: str
    train: Split
    test: Split
    num_classes: int

    def __post_init__(self) -> None:
        if self.train.inputs.shape[1:] != self.test.inputs.shape[1:]:
            raise DatamodelsError(
                f"{self.name}: training inputs have shape {self.train.inputs.shape[1:]} each, "
                f"test inputs {self.test.inputs.shape[1:]}; expected the same"
            )
        for part, split in (("training", self.train), ("test", self.test)):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DatamodelsError(
                    f"{self.name}: expected {part} labels in [0, {self.num_classes}), got {low} to {high}"
                )


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """The data set of that name, read into memory.

    `digits`: 1,000 training and 797 test examples, inputs (n, 8, 8); takes no folder.

    Raises DatamodelsError for an unknown name, and for a file that is missing or cannot be trusted.
    """
    if name == "digits":
        if folder is not None:
            raise DatamodelsError(f"digits: comes with scikit-learn and takes no folder, got {str(folder)!r}")
        return _digits()
    raise DatamodelsError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")


def permutation(num_examples: int, *, seed: int) -> np.ndarray:
    """A permutation of range(num_examples), int64, from raw PCG64 output.

    Element i gets the i-th raw 64-bit word of `np.random.PCG64(seed)`; the permutation sorts by these words,
    ties by index. numpy keeps a bit generator's raw words for good, but not what `Generator.permutation` does.
    """
    words = np.asarray(np.random.PCG64(seed).random_raw(num_examples), dtype=np.uint64).reshape(num_examples)
    return np.argsort(words, kind="stable").astype(np.int64)


def digits_indices() -> tuple[np.ndarray, np.ndarray]:
    """Which of scikit-learn's 1,797 digits are for training (1,000) and which for testing (797).

    The first 1,000 of `permutation(1797, seed=0)` train. Both index arrays ascend, so training column i and
    target j keep the order of `sklearn.datasets.load_digits()`.
    """
    order = permutation(1_797, seed=DIGITS_SEED)
    return np.sort(order[:DIGITS_TRAIN]), np.sort(order[DIGITS_TRAIN:])


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # late: half a second that the other data sets need not pay

    raw = load_digits()
    images = (raw.images / 16).astype(np.float32)  # 0..16 in steps of 1, so exact in float32
    labels = raw.target.astype(np.int64)
    train, test = digits_indices()
    if len(labels) != len(train) + len(test):
        raise DatamodelsError(f"digits: expected 1797 examples from scikit-learn, got {len(labels)}")
    return Dataset("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), 10)
