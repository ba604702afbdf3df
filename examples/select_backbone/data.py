"""Real text with labels that is on every Debian machine: what packages say of themselves, from the lists of apt.

    python -m examples.select_backbone.data [--out=FOLDER]

Two data sets of the same descriptions: `sections`, the part of the archive that a package is in, and `interfaces`, how
one works with it, as its debtags say.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from datamodels import files
from datamodels.errors import DatamodelsError
from datamodels.learning.data import permutation
from examples import steps

SECTIONS = (
    "admin", "database", "editors", "fonts", "games", "graphics", "mail", "math", "net", "science", "sound", "web",
)  # fmt: skip
INTERFACES = {
    "interface::commandline": "command line",
    "interface::daemon": "daemon",
    "interface::graphical": "graphical",
    "interface::x11": "graphical",
}
OUT, TRAIN, TEST = Path("out/select_backbone/data"), 480, 420
_FIELD = re.compile(r"^(Package|Section|Description|Tag): (.*(?:\n .*)*)", re.MULTILINE)


def write(folder: Path, *, train: int = TRAIN, test: int = TEST) -> list[Path]:
    """sections.csv and interfaces.csv with the columns text, label and split, as many rows of each class.

    Those that are there are left alone: apt's lists change. DatamodelsError where they have another number of rows.
    """
    paths = [folder / "sections.csv", folder / "interfaces.csv"]
    if all(path.exists() for path in paths):
        for path in paths:
            _check(path, train, test)
        return paths
    found: dict[str, dict[str, str]] = {"sections": {}, "interfaces": {}}
    for package in packages(apt_lists()):
        text = package["Description"]
        if section_of(package) in SECTIONS:
            found["sections"].setdefault(text, section_of(package))
        if label := interface_of(package):
            found["interfaces"].setdefault(text, label)
    return [_write(path, found[path.stem], train, test) for path in paths]


def apt_lists() -> str:
    """All that apt knows of the packages that it could install; DatamodelsError where it knows nothing."""
    if shutil.which("apt-cache") is None:
        raise DatamodelsError("apt-cache is not here: this example reads the package lists of a Debian machine")
    text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    if not text:
        raise DatamodelsError("apt's package lists are empty; fill them with apt-get update")
    return text


def packages(text: str) -> Iterator[Mapping[str, str]]:
    """The stanzas of such a text, in the order of their names; continued lines are joined."""
    stanzas = (
        {name: re.sub(r"\s+", " ", value) for name, value in _FIELD.findall(part)} for part in text.split("\n\n")
    )
    yield from sorted(
        (s for s in stanzas if {"Package", "Section", "Description"} <= set(s)), key=lambda s: s["Package"]
    )


def section_of(package: Mapping[str, str]) -> str:
    """`games` of `contrib/games`."""
    return package["Section"].rpartition("/")[2]


def interface_of(package: Mapping[str, str]) -> str | None:
    """The one way to work with a package; None where its tags name none, another, or several."""
    tags = [tag for tag in package.get("Tag", "").split(", ") if tag.startswith("interface::")]
    kinds = {INTERFACES.get(tag) for tag in tags}
    return kinds.pop() if len(kinds) == 1 else None


def _check(path: Path, train: int, test: int) -> None:
    with path.open(newline="") as file:
        rows = [(row["label"], row["split"]) for row in csv.DictReader(file)]
    classes = len({label for label, _ in rows})
    there = [sum(split == name for _, split in rows) for name in ("train", "test")]
    wanted = [number // classes * classes for number in (train, test)]
    if there != wanted:
        raise DatamodelsError(f"{path}: {there[0]} rows of train and {there[1]} of test are there, {wanted[0]} and "
                              f"{wanted[1]} are wanted; name another folder for the results, or remove it")  # fmt: skip


def _write(path: Path, labels: Mapping[str, str], train: int, test: int) -> Path:
    texts, names = np.array(list(labels)), np.array(list(labels.values()))
    classes = sorted(set(labels.values()))
    order = permutation(len(texts), seed=0)
    rows = []
    for name in classes:
        chosen = texts[order[names[order] == name]].tolist()
        first, last = train // len(classes), train // len(classes) + test // len(classes)
        if len(chosen) < last:
            raise DatamodelsError(f"{path}: {last} packages of the class {name!r} are needed, apt knows {len(chosen)}")
        rows += [(text, name, "train" if i < first else "test") for i, text in enumerate(chosen[:last])]
    table = io.StringIO()
    csv.writer(table).writerows([("text", "label", "split"), *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        file.write(table.getvalue().encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser("python -m examples.select_backbone.data", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the two tables; {OUT}")
    for path in write(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    steps.run(main)
