"""Labelled examples by name: images, texts or arrays, with groups and known factors where there are any.

| name | what |
|---|---|
| `digits`, `fashion_mnist[:DIR]`, `cifar10:DIR` | as `datamodels.learning.data` reads them; splits train and test |
| `csv:FILE?text=COLUMN&label=COLUMN[&group=COLUMN][&split=COLUMN]` | texts; those of `text=a,b` are joined |
| `folder:DIR[?size=PIXELS]` | images in DIR/<split>/<class>/ or DIR/<class>/ |
| `package.module.function[?option=value]` | anybody's function, see `_given` |

Splits are `train`, `test` and `all`; where the data have none, train is a stratified 80 % of them, always the same. A
CSV's own column may hold any others.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodels.errors import MeasurementError
from datamodels.learning import data
from datamodels.measurements.library import attribute, parse

KINDS = ("image", "text", "array")
TRAIN_SHARE = 0.8
_SAMPLE, _SPLIT = 0x73616D70, 0x73706C69  # "samp", "spli": what is drawn does not depend on how it was split
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFiles(Sequence[Path]):
    """Images that stay in their files until a batch of them is needed."""

    def __init__(self, paths: Sequence[Path], size: int | None = None):
        self.paths, self.size = np.array(paths, dtype=object), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return ImageFiles(self.paths[index], self.size) if not isinstance(index, int) else self.paths[index]

    def open(self) -> list[Any]:
        """The images, as PIL's, in RGB; with a size, cut square around the middle and resized."""
        from PIL import Image, ImageOps

        images = []
        for path in self.paths:
            try:
                with Image.open(path) as file:
                    image = ImageOps.exif_transpose(file).convert("RGB")
            except (OSError, ValueError) as error:
                raise MeasurementError(f"{path}: cannot be read as an image ({error})") from error
            images.append(ImageOps.fit(image, (self.size, self.size)) if self.size else image)
        return images

    def array(self) -> np.ndarray:
        """The images as float32 (n, 3, h, w) in [0, 1]; MeasurementError where they are not all of one size."""
        images = self.open()
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            raise MeasurementError(
                f"images of {len(sizes)} sizes, as {sorted(sizes)[:3]}: give the data set one, as in folder:DIR?size=64"
            )
        return np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255) for image in images])


Inputs = np.ndarray | list[str] | ImageFiles


@dataclass(frozen=True)
class Examples:
    """Labelled examples of one split.

    Parameters
    ----------
    inputs : images float32 (n, c, h, w) in [0, 1] or `ImageFiles`, texts, or an array (n, ...).
    labels : int64 (n,), into `classes`, which are all of the data set's, whether or not all occur here.
    ids : int64 (n,), each example's place in its split.
    groups : (n,) or None. factors : (n, k) or None.

    Raises MeasurementError.
    """

    name: str
    kind: str
    inputs: Inputs
    labels: np.ndarray
    classes: tuple[str, ...]
    ids: np.ndarray
    groups: np.ndarray | None = None
    factors: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        if not n:
            raise MeasurementError(f"{self.name}: expected at least one example, got none")
        if self.labels.ndim != 1 or self.labels.dtype != np.int64 or len(self.inputs) != n:
            raise MeasurementError(
                f"{self.name}: expected as many inputs as labels, int64 (n,); got {len(self.inputs)} inputs and labels "
                f"{self.labels.dtype} {self.labels.shape}"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise MeasurementError(
                f"{self.name}: expected labels in [0, {len(self.classes)}), got {self.labels.min()} to "
                f"{self.labels.max()}"
            )
        for what, values in (("groups", self.groups), ("factors", self.factors)):
            if values is not None and (len(values) != n or values.ndim != (1 if what == "groups" else 2)):
                raise MeasurementError(f"{self.name}: expected {what} for each of {n} examples, got {values.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Examples:
        """These examples, in this order."""
        return replace(
            self,
            inputs=[self.inputs[i] for i in indices] if isinstance(self.inputs, list) else self.inputs[indices],
            labels=self.labels[indices],
            ids=self.ids[indices],
            groups=None if self.groups is None else self.groups[indices],
            factors=None if self.factors is None else self.factors[indices],
        )

    def keep(self, classes: Sequence[str]) -> Examples:
        """The examples of some classes; labels stay what they were. MeasurementError for a class without any."""
        for name in classes:
            if name not in self.classes:
                raise MeasurementError(f"{self.name}: there is no class {name!r}; it has {_some(self.classes)}")
        kept = np.flatnonzero(np.isin(self.labels, [self.classes.index(name) for name in classes]))
        if not len(kept):
            raise MeasurementError(f"{self.name}: no example is of class {', '.join(classes)}")
        return self.take(kept)

    def sample(self, count: int, *, seed: int) -> Examples:
        """`count` of the examples, classes in proportion, drawn from the seed: see `stratified_order`.

        Fewer are always among more of the same seed. MeasurementError where there are not so many.
        """
        if not 0 < count <= len(self):
            raise MeasurementError(
                f"{self.name}: asked for {count} examples of {len(self)}; let the design's filter drop such rows, or "
                f"lower n_samples"
            )
        return self.take(stratified_order(self.labels, seed=seed)[:count])


def stratified_order(labels: np.ndarray, *, seed: int, stream: int = _SAMPLE) -> np.ndarray:
    """A random order of the examples (n,) in which every beginning has the classes in proportion, to within one.

    Example j gets the j-th raw word of the PCG64 of (stream, seed). Inside class c examples are sorted by their words;
    the i-th of n_c has the place (i + ½)/n_c, equal places in the words' order.
    """
    words = np.random.PCG64(np.random.SeedSequence((stream, seed))).random_raw(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(words[members])]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((words, place))


def load(name: str, split: str) -> Examples:
    """The examples of a data set's split; see the table at the top. Raises DatamodelsError."""
    where, options = parse(name)
    form, _, rest = where.partition(":")
    if form in data.NAMES:
        return _from_learning(name, form, rest or None, split, options)
    if form == "csv":
        return _csv(name, Path(rest), split, _known(name, options, "text", "label", "group", "split"))
    if form == "folder":
        return _folder(name, Path(rest), split, **_known(name, options, "size"))
    if "." in where and all(part.isidentifier() for part in where.split(".")):
        return _given(name, attribute(where, f"data set {name!r}"), split, options)
    raise MeasurementError(
        f"there is no data set {name!r}; expected {', '.join(data.NAMES)}, csv:FILE?text=COLUMN&label=COLUMN, "
        f"folder:DIR, the dotted path of a function, or a name that measure.data gives one of these"
    )


def _known(name: str, options: Mapping[str, Any], *known: str) -> dict[str, Any]:
    for option in options:
        if option not in known:
            raise MeasurementError(f"data set {name!r}: unknown option {option!r}; it takes {', '.join(known)}")
    return dict(options)


def _from_learning(name: str, form: str, folder: str | None, split: str, options: Mapping[str, Any]) -> Examples:
    _known(name, options)
    loaded = data.load(form, folder)
    parts = {"train": [loaded.train], "test": [loaded.test], "all": [loaded.train, loaded.test]}
    if split not in parts:
        raise MeasurementError(f"{name}: expected the split train, test or all, got {split!r}")
    inputs = np.concatenate([part.inputs for part in parts[split]])
    labels = np.concatenate([part.labels for part in parts[split]])
    if inputs.ndim == 3:  # grey
        inputs = inputs[:, None]
    return Examples(name, "image", inputs, labels, tuple(map(str, range(loaded.num_classes))), np.arange(len(labels)))


def _csv(name: str, path: Path, split: str, columns: Mapping[str, Any]) -> Examples:
    """Rows of a CSV file with a header."""
    text, label, group, split_by = (columns.get(what) for what in ("text", "label", "group", "split"))
    if text is None or label is None:
        raise MeasurementError(
            f"{name}: expected the columns of texts and labels, as in csv:FILE?text=body&label=topic"
        )
    texts = text if isinstance(text, list) else [text]
    csv.field_size_limit(1 << 27)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for column in (*texts, label, *filter(None, (group, split_by))):
                if column not in (reader.fieldnames or ()):
                    raise MeasurementError(f"{path}: no column {column!r}; it has {_some(reader.fieldnames or ())}")
            rows = []
            for row in reader:
                values = [row[c] for c in (*texts, label, *filter(None, (group, split_by)))]
                if any(value is None for value in values) or not row[label]:
                    raise MeasurementError(f"{path}, line {reader.line_num}: too few columns, or no label")
                rows.append(row)
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise MeasurementError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if not rows:
        raise MeasurementError(f"{path}: no rows under its header")
    labels, classes = _encoded([row[label] for row in rows])
    everything = Examples(
        name,
        "text",
        [" ".join(row[c] for c in texts) for row in rows],
        labels,
        classes,
        np.arange(len(rows)),
        None if group is None else np.array([row[group] for row in rows]),
    )
    if split_by is None or split == "all":
        return _part(everything, split)
    chosen = np.flatnonzero(np.array([row[split_by] for row in rows]) == split)
    if not len(chosen):
        raise MeasurementError(
            f"{path}: no row has {split!r} in the column {split_by!r}, which holds "
            f"{_some(sorted({row[split_by] for row in rows}))}"
        )
    return replace(everything.take(chosen), ids=np.arange(len(chosen)))


def _folder(name: str, folder: Path, split: str, size: int | None = None) -> Examples:
    """Images in a folder for each class, these in folders for each split or not."""
    if not folder.is_dir():
        raise MeasurementError(f"{name}: no folder {folder}")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise MeasurementError(f"{name}: expected a size in pixels, got {size!r}")
    splits = {"train", "test"} & {path.name for path in folder.iterdir() if path.is_dir()}
    if splits or (folder / split).is_dir():
        splits |= {split} - {"all"}
        roots = [folder / part for part in (sorted(splits) if split == "all" else [split])]
        names = {path.name for part in splits if (folder / part).is_dir() for path in _folders(folder / part)}
    else:
        roots, names = [folder], {path.name for path in _folders(folder)}
    classes = _sorted(names)
    paths, labels = [], []
    for root in roots:
        if not root.is_dir():
            raise MeasurementError(f"{name}: no split {split!r}; {folder} has {_some(sorted(splits - {split}))}")
        for path in sorted(root.glob("*/*")):
            if path.suffix.lower() in _IMAGES:
                paths.append(path)
                labels.append(classes.index(path.parent.name))
    if not paths:
        raise MeasurementError(f"{name}: no images in {folder}/<class>/ or {folder}/{split}/<class>/")
    n = len(paths)
    everything = Examples(name, "image", ImageFiles(paths, size), np.array(labels, np.int64), classes, np.arange(n))
    return everything if roots != [folder] else _part(everything, split)


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def _given(name: str, function: Any, split: str, options: Mapping[str, Any]) -> Examples:
    """What a user's function returns for `split=` and its own options.

    A dict of `inputs` (texts, images (n, 1 or 3, h, w) in [0, 1], or any array) and `labels` (ints, or text) and, where
    known, `groups` (n,), `factors` (n, k) and the names of all `classes`.
    """
    found = function(split=split, **options)
    if not isinstance(found, Mapping) or not {"inputs", "labels"} <= set(found):
        raise MeasurementError(f"{name}: expected a dict with inputs and labels, got {type(found).__name__}")
    known = ("inputs", "labels", "groups", "factors", "classes")
    if extra := set(found) - set(known):
        raise MeasurementError(f"{name}: returned {', '.join(sorted(extra))}; expected only {', '.join(known)}")
    inputs, groups, factors = found["inputs"], found.get("groups"), found.get("factors")
    if isinstance(inputs, (list, tuple)) and all(isinstance(text, str) for text in inputs):
        kind, inputs = "text", list(inputs)
    else:
        inputs = np.asarray(inputs)
        if inputs.dtype == np.float64:
            inputs = inputs.astype(np.float32)
        picture = inputs.ndim == 4 and inputs.shape[1] in (1, 3) and inputs.dtype.kind == "f"
        kind = "image" if picture and inputs.min() >= 0 and inputs.max() <= 1 else "array"
    labels = np.asarray(found["labels"])
    classes = found.get("classes")
    if labels.dtype.kind in "iu":
        labels = labels.astype(np.int64)
        named = map(str, range(int(labels.max(initial=-1)) + 1)) if classes is None else map(str, classes)
        classes = tuple(named)
    else:
        labels, classes = _encoded([str(label) for label in labels], classes)
    return Examples(
        name,
        kind,
        inputs,
        labels,
        classes,
        np.arange(len(labels)),
        None if groups is None else np.asarray(groups),
        None if factors is None else np.asarray(factors),
    )


def _part(everything: Examples, split: str) -> Examples:
    """Train or test of examples that know no split; both keep the order of the whole."""
    if split == "all":
        return everything
    if split not in ("train", "test"):
        raise MeasurementError(f"{everything.name}: expected the split train, test or all, got {split!r}")
    order = stratified_order(everything.labels, seed=0, stream=_SPLIT)
    train = round(TRAIN_SHARE * len(order))
    chosen = np.sort(order[:train] if split == "train" else order[train:])
    if not len(chosen):
        raise MeasurementError(f"{everything.name}: {len(order)} examples are too few for a split {split!r}")
    return replace(everything.take(chosen), ids=np.arange(len(chosen)))


def _encoded(labels: Sequence[str], classes: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 into the classes; these are the different labels, numbers by size, others by alphabet."""
    known = _sorted(set(labels)) if classes is None else tuple(map(str, classes))
    place = {name: i for i, name in enumerate(known)}
    try:
        return np.array([place[label] for label in labels], np.int64), known
    except KeyError as error:
        raise MeasurementError(f"label {error.args[0]!r} is none of the classes {_some(known)}") from None


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
