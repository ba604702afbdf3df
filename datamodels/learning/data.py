"""Image classification data held in memory, to be indexed by a training mask.

`load("digits")` needs no file of the user's; `load("fashion_mnist", folder)` reads IDX files and
`load("cifar10", folder)` reads CIFAR-10's own batches. Pixels come scaled to [0, 1] and nothing else is
done to them: centring belongs to the model that wants it, and a picture of them needs no undoing.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from datamodels.errors import DatamodelsError
from datamodels.learning import cifar10

if TYPE_CHECKING:
    import torch

NAMES = ("digits", "fashion_mnist", "cifar10")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist

# Far above the real file's 47 MB, far below what a forged header could make us allocate.
_LARGEST_IDX = 1 << 30

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
                raise DatamodelsError(f"split: expected {name} as an array of {np.dtype(dtype)}, got {got}")
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
    `fashion_mnist`: 60,000 and 10,000, inputs (n, 28, 28); IDX files, gzipped or plain, by default those of
    Debian's package `dataset-fashion-mnist`.
    `cifar10`: 50,000 and 10,000, inputs (n, 3, 32, 32); the python or the binary batches, in the folder or in
    the subfolder that the archives unpack to. The python ones are pickles; nothing that they name is run.

    The counts of the last two are those of the real files: a folder with fewer examples is as good.

    Raises DatamodelsError for an unknown name, and for a file that is missing or cannot be trusted.
    """
    if name == "digits":
        if folder is not None:
            raise DatamodelsError(f"digits: comes with scikit-learn and takes no folder, got {str(folder)!r}")
        return _digits()
    if name == "fashion_mnist":
        return _fashion_mnist(FASHION_MNIST_FOLDER if folder is None else Path(folder))
    if name == "cifar10":
        if folder is None:
            raise DatamodelsError(f"cifar10: no folder given; name it with --data.dir=DIR: {cifar10.SOURCE}")
        train, test = cifar10.read(Path(folder))
        return Dataset(name, Split(_unit(train[0]), train[1]), Split(_unit(test[0]), test[1]), 10)
    raise DatamodelsError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")


def permutation(num_examples: int, *, seed: int) -> np.ndarray:
    """A permutation of range(num_examples), int64, from raw PCG64 output.

    Element i gets the i-th raw 64-bit word of `np.random.PCG64(seed)`; the permutation sorts by these words,
    ties by index. numpy keeps a bit generator's raw words for good, not what `Generator.permutation` does.
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


def _fashion_mnist(folder: Path) -> Dataset:
    def split(part: str) -> Split:
        images = _idx(_idx_path(folder, f"{part}-images-idx3-ubyte"), dims=3)
        path = _idx_path(folder, f"{part}-labels-idx1-ubyte")
        labels = _idx(path, dims=1)
        if len(images) != len(labels):
            raise DatamodelsError(f"{path}: {len(labels)} labels for {len(images)} images; expected as many")
        if labels.max() > 9:
            raise DatamodelsError(f"{path}: expected labels in [0, 10), got {labels.max()}")
        return Split(_unit(images), labels.astype(np.int64))

    return Dataset("fashion_mnist", split("train"), split("t10k"), 10)


def _idx_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DatamodelsError(
        f"fashion_mnist: no {name} or {name}.gz in {folder}; install Debian's copy with "
        f"`apt-get install dataset-fashion-mnist`, or name the folder of the IDX files with --data.dir=DIR"
    )


def _idx(path: Path, *, dims: int) -> np.ndarray:
    """The uint8 array in an IDX file: bytes 0 0 8 (for uint8) and dims, each dim big-endian, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read_idx(path, file, dims)
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises for a damaged or truncated file
        raise DatamodelsError(f"{path}: cannot be read ({error}); fetch it again") from error


def _read_idx(path: Path, file: BinaryIO | gzip.GzipFile, dims: int) -> np.ndarray:
    header = file.read(4 + 4 * dims)
    magic = bytes((0, 0, 8, dims))
    if header[:4] != magic:
        raise DatamodelsError(
            f"{path}: expected an IDX file, whose first bytes are {magic.hex(' ')}; got {header[:4].hex(' ')}"
        )
    if len(header) < 4 + 4 * dims:
        raise DatamodelsError(f"{path}: ends inside its header; fetch it again")
    shape = tuple(int(d) for d in np.frombuffer(header, ">u4", offset=4))
    size = 1
    for d in shape:
        size *= d  # Python ints: a forged header must not overflow into something small
    if not 0 < size <= _LARGEST_IDX:
        raise DatamodelsError(f"{path}: its header says {shape}; expected 1 to {_LARGEST_IDX} values in all")
    values = file.read(size)
    if len(values) < size:
        raise DatamodelsError(f"{path}: truncated: {len(values)} of {size} values; fetch it again")
    if file.read(1):
        raise DatamodelsError(f"{path}: goes on after the {size} values that its header says; fetch it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [0, 1]; 255 is exactly 1."""
    return pixels.astype(np.float32) / np.float32(255)


def masked(
    inputs: torch.Tensor, labels: torch.Tensor, mask: np.ndarray | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The examples that a mask (n,), bool, selects, in their order.

    Raises DatamodelsError for a mask that is not bool or of another length: indices passed by mistake would
    select examples all the same.
    """
    import torch

    chosen = torch.as_tensor(np.array(mask) if isinstance(mask, np.ndarray) else mask)
    if chosen.dtype != torch.bool or chosen.shape != labels.shape:
        raise DatamodelsError(
            f"mask: expected bool of shape ({len(labels)},), one per training example, "
            f"got {str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)}"
        )
    indices = chosen.nonzero().squeeze(1).to(labels.device)
    return inputs[indices], labels[indices]


@dataclass(frozen=True)
class Augment:
    """Random flip, shift and cutout of a batch of images (n, c, h, w), drawn for each image.

    `flip`: left to right with probability 1/2. `translate`: shift by up to so many pixels along each axis,
    the rim filled as `pad` says: "zero", or "reflect" for the image's own pixels. `cutout`: side of a square
    inside the image that is set to 0. All random numbers come from the generator: one on the CPU gives the
    same images on every device.
    """

    flip: bool = True
    translate: int = 2
    cutout: int = 4
    pad: str = "zero"

    def __post_init__(self) -> None:
        if self.pad not in ("zero", "reflect"):
            raise DatamodelsError(f"augment: expected pad 'zero' or 'reflect', got {self.pad!r}")
        if self.translate < 0 or self.cutout < 0:
            raise DatamodelsError(
                f"augment: expected translate and cutout >= 0, got {self.translate} and {self.cutout}"
            )

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        n, _, height, width = images.shape
        if self.cutout > min(height, width):
            raise DatamodelsError(f"augment: a cutout of {self.cutout} does not fit in {height}x{width}")

        def draw(high: int) -> torch.Tensor:
            return torch.randint(high, (n, 1), generator=generator, device=generator.device).to(images.device)

        rows = torch.arange(height, device=images.device).expand(n, height)
        columns = torch.arange(width, device=images.device).expand(n, width)
        source_rows, source_columns = rows, columns
        if self.flip:
            source_columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        if self.translate:
            t = self.translate
            images = F.pad(images, (t, t, t, t), mode="reflect" if self.pad == "reflect" else "constant")
            source_rows = source_rows + draw(2 * t + 1)
            source_columns = source_columns + draw(2 * t + 1)
        # One gather; (n, h, w, c) in memory, which is what channels_last wants.
        batch = torch.arange(n, device=images.device)[:, None, None]
        out = images.permute(0, 2, 3, 1)[batch, source_rows[:, :, None], source_columns[:, None, :]]
        if self.cutout:
            top, left = draw(height - self.cutout + 1), draw(width - self.cutout + 1)
            inside_rows = (rows >= top) & (rows < top + self.cutout)
            inside_columns = (columns >= left) & (columns < left + self.cutout)
            out = out.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], 0)
        return out.permute(0, 3, 1, 2)
