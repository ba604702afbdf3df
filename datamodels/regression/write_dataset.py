"""Write the rows of a store as a .beton file: python -m datamodels.regression.write_dataset --cfg.data_dir=DIR …"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodels import cli
from datamodels.cli import Option
from datamodels.errors import RegressionError
from datamodels.regression import beton
from datamodels.regression.columns import Groups, Source, chunks, encode, open_source, outcome_dtype

OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "cfg": {
        "data_dir": Option(str, "the store, or a folder of arrays as the released code made it", required=True),
        "out_path": Option(str, "the .beton file to write; one that exists is refused", required=True),
        "x_name": Option(
            list,
            "keys of the columns, side by side: masks, choices (the design's factors, one column per level), or any "
            "number or vector per row",
            default=["masks"],
        ),
        "y_name": Option(str, "key of the outcomes", required=True),
        "y_slice": Option(int, "the one outcome to write; -1: all", default=-1, min=-1),
        "offset_name": Option(str, "key of a part of the outcomes that is given; outcomes are written less it"),
        "penalty": Option(dict, "how strongly a key's columns are shrunk, 0 for not at all; 1 for keys left out"),
        "completed_name": Option(str, "key that says which rows to write", default="_completed"),
        "ignore_completed": Option(bool, "write all rows of a folder of arrays", default=False),
        "engine": Option(
            str, "what writes: numpy, or FFCV's own writer", default="numpy", choices=["numpy", "ffcv"]
        ),
    },
}  # fmt: skip
DESCRIPTION = """
Write the complete training rows of a store as a .beton file, the format of FFCV 1.0.2, with the fields mask (the
columns), targets (the outcomes) and idx (the row's number). Every row is checked against its checksum on the way.
Rows with the role eval are never written. The file appears whole or not at all.

It also holds the columns' names and penalties and which rows share a mask, where FFCV does not look. Then
python -m datamodels.regression.compute_datamodels --data.data_path=FILE fits it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse("python -m datamodels.regression.write_dataset", DESCRIPTION, OPTIONS, argv)
    cfg = args.section("cfg")
    write_dataset(Path(cfg.pop("out_path")), engine=cfg.pop("engine"), **cfg)
    return 0


def write_dataset(
    out_path: Path,
    *,
    data_dir: str | Path,
    y_name: str,
    x_name: Sequence[str] = ("masks",),
    y_slice: int = -1,
    completed_name: str = "_completed",
    ignore_completed: bool = False,
    penalty: Mapping[str, float] | None = None,
    offset_name: str | None = None,
    engine: str = "numpy",
) -> None:
    """Write `out_path`; a bar and a last line go to stderr.

    Raises RegressionError, before anything is written, for an out_path that exists, a disk that is too small, keys
    that are not there, no complete row, and for what FFCV would hang on.
    """
    from tqdm import tqdm

    if engine == "ffcv":
        from datamodels.regression import ffcv_engine

        ffcv_engine.require("cfg")
    wanted: dict[str, Any] = {
        "data_dir": str(data_dir),
        "x_name": list(x_name),
        "y_name": y_name,
        "y_slice": y_slice,
        "completed_name": completed_name,
        "ignore_completed": ignore_completed,
        "penalty": penalty,
        "offset_name": offset_name,
    }
    source = open_source(**wanted)
    layout = beton.Layout(
        samples=len(source.rows),
        columns=sum(part.width for part in source.parts),
        targets=source.targets.width,
        x_dtype=source.x_dtype,
        y_dtype=outcome_dtype(source),
    )
    about = {
        "parts": [part.to_json() for part in source.parts],
        "targets": source.targets.to_json(),
        "offset": offset_name,
        "from": str(Path(data_dir).resolve()),
    }
    groups = Groups(source.mask_ids)
    check = Check(source)
    with tqdm(total=layout.samples, unit="row", desc=out_path.name, disable=not sys.stderr.isatty()) as bar:
        if engine == "numpy":

            def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                for first, last in chunks(layout.samples, layout.row_bytes):
                    x, y = encode(source, first, last, layout.x_dtype, layout.y_dtype)
                    check.rows(first, x, y)
                    groups.add(x)
                    yield x, y

            beton.write(
                out_path, layout, source.rows, blocks(), lambda: beton.Side(about, groups.ids()), progress=bar.update
            )
        else:

            def side(written: Any) -> tuple[Any, np.ndarray]:
                sums = []
                for first, last in chunks(layout.samples, layout.row_bytes):
                    x, y = written.read(first, last)
                    check.rows(first, x, y)
                    groups.add(x)
                    sums.append(beton.row_sums(x, y))
                return beton.Side(about, groups.ids()), np.concatenate(sums)

            with beton.whole(out_path, needed=beton.size(layout)) as (fd, name):
                ffcv_engine.write(name, layout, wanted, source.rows, progress=bar.update)
                beton.add_side(fd, name, side)
    check.tell()
    print(
        f"{layout.samples} rows of {layout.columns} columns and {layout.targets} targets in {out_path} "
        f"({out_path.stat().st_size / 1e6:.0f} MB)",
        file=sys.stderr,
    )


class Check:
    """A look at what is written: columns must be finite, and outcomes that are not are told of at the end."""

    def __init__(self, source: Source):
        self._source = source
        self._first = ""
        self._count = 0

    def rows(self, first: int, x: np.ndarray, y: np.ndarray) -> None:
        bad = self._find(x)
        if bad is not None:
            row, column = bad
            name = [name for part in self._source.parts for name in part.columns()][column]
            raise RegressionError(
                f"row {self._source.rows[first + row]}, column {name!r}: {x[row, column]} is not finite; leave the "
                f"row out, or train it again"
            )
        bad = self._find(y)
        if bad is not None:
            row, target = bad
            name = self._source.targets.names()[target]
            self._first = self._first or f"row {self._source.rows[first + row]}, target {name!r}: {y[row, target]}"
            self._count += int((~np.isfinite(y)).sum())

    def tell(self) -> None:
        if self._count:
            print(
                f"warning: {self._count} outcomes are not finite, the first: {self._first}; they are written, and a "
                f"fit of these targets will be refused",
                file=sys.stderr,
            )

    @staticmethod
    def _find(values: np.ndarray) -> tuple[int, int] | None:
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return None
        row, column = np.argwhere(~np.isfinite(values))[0]
        return int(row), int(column)


if __name__ == "__main__":
    cli.run(main)
