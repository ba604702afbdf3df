"""`.beton` files, the format of FFCV 1.0.2, written and read with plain numpy.

    header        version, number of fields, page size, number of samples, place of the allocation table
    fields        per field a type, a name and 1,024 bytes that describe it
    metadata      per sample one number per field: where its bytes are, or the number itself
    pages         the bytes; a sample lies in one page
    side          ours alone: what a regression wants to know besides; FFCV never looks between pages and table
    table         (sample, place, size) of every array, to the end of the file

The fields are those of the released code: `mask` (p,), `targets` (T,) and `idx`, the number of the row. The side holds
the names and penalties of the columns, which rows share a mask, and checksums: of every row, and of all that is not a
row. A file without one, such as FFCV's own writer leaves, is read as well.

Reading is by `pread`, so a file that is cut short meanwhile is an error and no SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from datamodels.errors import RegressionError
from datamodels.regression import memory

VERSION = 2
FIELDS = ("mask", "targets", "idx")
PAGE = 1 << 23  # what FFCV's writer takes; a larger row gets the next power of two
MAX_PAGE = 1 << 31  # FFCV keeps the size in 32 bits
BLOCK_BYTES = 1 << 26
# FFCV's compiler knows no float16 and hangs on it; torch is at odds with unsigned numbers of more than 8 bits.
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64")

_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
_FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
_ARRAY = np.dtype([("shape", "<u8", 32), ("length", "<u8")])  # and then a dtype, as JSON
_SAMPLE = np.dtype([("mask", "<u8"), ("targets", "<u8"), ("idx", "<i8")])
_ENTRY = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
_INT, _NDARRAY, _TENSOR = 1, 4, 6
_EIGHT_BYTES = (0, _INT, _NDARRAY, _TENSOR)  # float, int and the arrays: 8 bytes of metadata
_TRAILER = np.dtype(
    [("magic", "S8"), ("json", "<u8"), ("samples", "<u8"), ("head", "<u4"), ("table", "<u4"), ("side", "<u4"),
     ("version", "<u4")]
)  # fmt: skip
_MAGIC = b"DMSIDE1\n"
_SUMS = np.dtype([("mask", "<u4"), ("targets", "<u4")])
_AT_ONCE = 1 << 16  # samples whose metadata is looked at together


@dataclass(frozen=True)
class Layout:
    """Shapes and types of a file, and with them the place of every byte.

    Raises RegressionError for what FFCV would hang on: no rows, no columns or targets, a dtype that it cannot read, a
    row that is larger than its largest page.
    """

    samples: int
    columns: int
    targets: int
    x_dtype: np.dtype
    y_dtype: np.dtype

    def __post_init__(self) -> None:
        for name in ("x_dtype", "y_dtype"):
            object.__setattr__(self, name, np.dtype(getattr(self, name)).newbyteorder("<"))
        if self.samples < 1:
            raise RegressionError("no rows to write; a .beton file needs at least one complete training row")
        for what, width, dtype in (
            ("columns", self.columns, self.x_dtype),
            ("targets", self.targets, self.y_dtype),
        ):
            if width < 1:
                raise RegressionError(f"{width} {what} to write; a .beton file needs at least one")
            if dtype.name not in DTYPES:
                raise RegressionError(
                    f"{what} of dtype {dtype}: FFCV hangs on it; expected one of {', '.join(DTYPES)}. "
                    f"Store the key as one of these, or fit from the store itself (data.logdir)"
                )
        if self.row_bytes > MAX_PAGE:
            raise RegressionError(
                f"one row takes {self.row_bytes:,} bytes, and a page of a .beton file holds at most {MAX_PAGE:,}; "
                f"write fewer targets (cfg.y_slice), or fit from the store itself (data.logdir)"
            )

    @property
    def row_bytes(self) -> int:
        return self.columns * self.x_dtype.itemsize + self.targets * self.y_dtype.itemsize

    @property
    def page(self) -> int:
        return max(PAGE, 1 << (self.row_bytes - 1).bit_length())

    @property
    def start(self) -> int:
        """Where the first page begins; pages are aligned to their size."""
        head = _HEADER.itemsize + len(FIELDS) * _FIELD.itemsize + self.samples * _SAMPLE.itemsize
        return -(-head // self.page) * self.page

    @property
    def per_page(self) -> int:
        return self.page // self.row_bytes

    @property
    def end(self) -> int:
        return self.start + -(-self.samples // self.per_page) * self.page

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where the bytes of rows begin: mask, and behind it targets."""
        at = self.start + rows // self.per_page * self.page + rows % self.per_page * self.row_bytes
        return np.asarray(at, dtype=np.uint64)

    def descriptors(self) -> bytes:
        out = np.zeros(len(FIELDS), dtype=_FIELD)
        for at, (name, kind, width, dtype) in enumerate(
            (
                ("mask", _NDARRAY, self.columns, self.x_dtype),
                ("targets", _NDARRAY, self.targets, self.y_dtype),
                ("idx", _INT, 0, None),
            )
        ):
            out[at]["type"], out[at]["name"] = kind, name.encode()
            if dtype is not None:
                described = json.dumps(dtype.descr).encode()
                array = np.zeros((), dtype=_ARRAY)
                array["shape"][0], array["length"] = width, len(described)
                out[at]["arguments"] = array.tobytes() + described
        return out.tobytes()

    def header(self, table: int) -> bytes:
        return np.array((VERSION, len(FIELDS), self.page, self.samples, table), dtype=_HEADER).tobytes()


@dataclass(frozen=True, eq=False)
class Side:
    """What a .beton file of ours says besides its rows.

    about: names and penalties of the columns, names of the targets; JSON.  groups: int64 (n,), equal for rows that
    share a mask.
    """

    about: Mapping[str, Any]
    groups: np.ndarray
    sums: np.ndarray | None = field(default=None, repr=False)


Block = tuple[np.ndarray, np.ndarray]  # columns (m, p) and targets (m, T) of the next m rows


def write(
    path: str | Path,
    layout: Layout,
    rows: np.ndarray,
    blocks: Iterable[Block],
    side: Callable[[], Side],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """A new file at `path` with these rows; whole and on disk when this returns, and until then not there at all.

    rows: (n,), the number of each row (`idx`).  blocks: consecutive rows, n in all.  side: asked for once, after the
    last block.  progress: called with the number of rows just written.

    Raises RegressionError for a path that exists, a disk that is full, and blocks of another shape or type.
    """
    with whole(path, needed=size(layout)) as (fd, _):
        head = _write_head(fd, layout, rows)
        sums = np.zeros(layout.samples, dtype=_SUMS)
        first = 0
        for x, y in blocks:
            if first + len(x) > layout.samples:
                raise RegressionError(f"more rows than the {layout.samples} announced; nothing was written")
            _write_rows(fd, layout, first, x, y, sums)
            first += len(x)
            if progress is not None:
                progress(len(x))
        if first != layout.samples:
            raise RegressionError(f"{first} rows came, {layout.samples} were announced; nothing was written")
        if layout.end > os.fstat(fd).st_size:
            os.ftruncate(fd, layout.end)
        entries = (_entries(layout, some) for some in _some(layout.samples))
        _write_tail(fd, layout.end, side(), sums, head, entries)


def size(layout: Layout) -> int:
    """Bytes of a file, but for its names."""
    n = layout.samples
    return layout.end + n * (8 + _SUMS.itemsize + 2 * _ENTRY.itemsize) + _TRAILER.itemsize + (1 << 16)


def add_side(fd: int, name: str, side: Callable[[Beton], tuple[Side, np.ndarray]]) -> None:
    """Put our side into a file that FFCV wrote, open for reading and writing as fd."""
    with Beton(name) as beton:
        table = beton.end
        entries = np.frombuffer(beton.pread(table, beton.size - table), dtype=_ENTRY)
        what, sums = side(beton)
        # FFCV leaves the place of the table to be written last, and the checksum covers it.
        head = beton.head_bytes()
    end = -(-table // 8) * 8
    _write_tail(fd, end, what, sums, lambda at: _head_sum(head, at), [entries])


def _head_sum(head: bytearray, table: int) -> tuple[bytes, int]:
    header = np.frombuffer(bytes(head[: _HEADER.itemsize]), dtype=_HEADER).copy()
    header["table"] = table
    first = header.tobytes()
    return first, zlib.crc32(bytes(head[_HEADER.itemsize :]), zlib.crc32(first))


def _write_head(fd: int, layout: Layout, rows: np.ndarray) -> Callable[[int], tuple[bytes, int]]:
    """Write descriptors and metadata; the function that comes back gives header and sum of all for a table's place."""
    if rows.shape != (layout.samples,):
        raise RegressionError(f"row numbers: expected {layout.samples}, got shape {rows.shape}")
    at = _HEADER.itemsize
    described = layout.descriptors()
    _write_all(fd, described, at)
    at += len(described)
    for some in _some(layout.samples):
        samples = np.empty(len(some), dtype=_SAMPLE)
        samples["mask"] = layout.places(some)
        samples["targets"] = samples["mask"] + np.uint64(layout.columns * layout.x_dtype.itemsize)
        samples["idx"] = rows[some]
        _write_all(fd, samples.tobytes(), at)
        at += samples.nbytes

    def finish(table: int) -> tuple[bytes, int]:
        first = layout.header(table)
        total, place = zlib.crc32(first), _HEADER.itemsize
        while place < at:
            part = os.pread(fd, min(at - place, BLOCK_BYTES), place)
            total, place = zlib.crc32(part, total), place + len(part)
        return first, total

    return finish


def _write_rows(fd: int, layout: Layout, first: int, x: np.ndarray, y: np.ndarray, sums: np.ndarray) -> None:
    """Rows first, first + 1, … of the file, and their checksums."""
    m = len(x)
    for what, values, width, dtype in (
        ("columns", x, layout.columns, layout.x_dtype),
        ("targets", y, layout.targets, layout.y_dtype),
    ):
        if values.shape != (m, width) or values.dtype != dtype:
            raise RegressionError(
                f"{what} from row {first}: expected {dtype} of shape ({m}, {width}), got {values.dtype} of "
                f"{values.shape}; nothing was written"
            )
    wide = layout.columns * layout.x_dtype.itemsize
    at_once = max(1, BLOCK_BYTES // layout.row_bytes)
    for low in range(0, m, at_once):
        high = min(low + at_once, m)
        records = np.empty((high - low, layout.row_bytes), dtype=np.uint8)
        records[:, :wide] = np.ascontiguousarray(x[low:high]).view(np.uint8).reshape(high - low, -1)
        records[:, wide:] = np.ascontiguousarray(y[low:high]).view(np.uint8).reshape(high - low, -1)
        sums[first + low : first + high] = row_sums(records[:, :wide], records[:, wide:])
        row = first + low
        while row < first + high:  # rows of one page lie side by side
            stop = min(first + high, (row // layout.per_page + 1) * layout.per_page)
            part = records[row - first - low : stop - first - low]
            _write_all(fd, part.reshape(-1).data, int(layout.places(np.array(row))))
            row = stop


def row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CRC-32 of each row's columns and targets."""
    out = np.empty(len(x), dtype=_SUMS)
    for name, values in (("mask", x), ("targets", y)):
        out[name] = [zlib.crc32(np.ascontiguousarray(row).data) for row in values]
    return out


def _write_tail(
    fd: int,
    at: int,
    side: Side,
    sums: np.ndarray,
    head: Callable[[int], tuple[bytes, int]],
    entries: Iterable[np.ndarray],
) -> None:
    """Side, table and, at last, the header, which says where the table is."""
    described = json.dumps(side.about, ensure_ascii=False, allow_nan=False).encode()
    padding = bytes(-len(described) % 8)
    parts = [np.ascontiguousarray(side.groups, dtype="<i8").tobytes(), sums.tobytes(), described, padding]
    table = at + sum(map(len, parts)) + _TRAILER.itemsize
    header, head_sum = head(table)
    place, table_sum = table, 0
    for some in entries:
        raw = some.tobytes()
        _write_all(fd, raw, place)
        place, table_sum = place + len(raw), zlib.crc32(raw, table_sum)
    os.ftruncate(fd, place)
    trailer = np.zeros((), dtype=_TRAILER)
    trailer["magic"], trailer["json"], trailer["samples"] = _MAGIC, len(described), len(sums)
    trailer["head"], trailer["table"], trailer["version"] = head_sum, table_sum, 1
    trailer["side"] = _side_sum(b"".join(parts), trailer)
    _write_all(fd, b"".join([*parts, trailer.tobytes()]), at)
    _write_all(fd, header, 0)


def _side_sum(content: bytes, trailer: np.ndarray) -> int:
    clean = trailer.copy()
    clean["side"] = 0
    return zlib.crc32(clean.tobytes(), zlib.crc32(content))


def _entries(layout: Layout, rows: np.ndarray) -> np.ndarray:
    wide = layout.columns * layout.x_dtype.itemsize
    out = np.empty((len(rows), 2), dtype=_ENTRY)
    out["sample"] = rows[:, None]
    out["place"] = layout.places(rows)[:, None] + np.array([0, wide], dtype=np.uint64)
    out["size"] = [wide, layout.row_bytes - wide]
    return out.reshape(-1)


def _some(n: int) -> Iterator[np.ndarray]:
    for first in range(0, n, _AT_ONCE):
        yield np.arange(first, min(n, first + _AT_ONCE))


# -- files that appear whole ------------------------------------------------------------------------------


@contextlib.contextmanager
def whole(path: str | Path, *, needed: int) -> Iterator[tuple[int, str]]:
    """(descriptor, name to open it by) of a file that stands at `path` once the block is left without an error.

    Until then it has no name where the file system can do that, so that a killed process leaves nothing; elsewhere it
    is a hidden file beside. A path that exists is refused, at the start and again at the end.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path):
        raise RegressionError(f"{path}: exists and is left as it is; name another file, or move that one away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise RegressionError(
                f"{path}: {needed:,} bytes are needed and {free:,} are free in {path.parent}; name another folder, "
                f"or write fewer targets (cfg.y_slice)"
            )
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd, name, beside = _open(path)
            try:
                yield fd, name
                os.fsync(fd)
                if beside is None:
                    # A directory descriptor makes Python call linkat, which follows the link in /proc.
                    os.link(name, path.name, dst_dir_fd=folder)
                else:
                    os.link(beside, path)
                os.fsync(folder)
            finally:
                os.close(fd)
                if beside is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(beside)
        finally:
            os.close(folder)
    except FileExistsError:
        raise RegressionError(f"{path}: appeared meanwhile and is left as it is; name another file") from None
    except OSError as error:
        raise RegressionError(f"{path}: cannot be written: {error.strerror or error}") from error


def _open(path: Path) -> tuple[int, str, Path | None]:
    mode = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            fd = os.open(path.parent, mode | os.O_TMPFILE, 0o666)
            return fd, f"/proc/{os.getpid()}/fd/{fd}", None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(beside)
    return os.open(beside, mode | os.O_CREAT | os.O_EXCL, 0o666), str(beside), beside


def _write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left[: 1 << 30], at)
        left, at = left[done:], at + done


# -- reading ------------------------------------------------------------------------------------------------


class Beton:
    """A .beton file, open for reading; everything but its rows is checked when it is opened.

    samples, columns, targets: n, p, T.  x_dtype, y_dtype.  rows: int64 (n,), `idx`.  side: None for a file that has
    none.  Raises RegressionError for a file that is damaged, cut short, of another version or without the fields.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RegressionError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        try:
            if os.path.isdir(self.path):
                raise self._bad("is a folder", "a .beton file", "name the file (data.data_path), or data.logdir")
            self.size = os.fstat(self._fd).st_size
            self._read_head()
            self.side = self._read_side()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, first: int, last: int) -> Block:
        """Columns (m, p) and targets (m, T) of rows first..last-1, each row checked against its checksum."""
        places = self._places[:, first:last]
        wide, narrow = self.columns * self.x_dtype.itemsize, self.targets * self.y_dtype.itemsize
        if (places[1] == places[0] + wide).all():  # as the writers leave it: one read for both
            both = self._gather(places[0], wide + narrow)
            raw_x, raw_y = both[:, :wide], both[:, wide:]
        else:
            raw_x, raw_y = self._gather(places[0], wide), self._gather(places[1], narrow)
        x = np.ascontiguousarray(raw_x).view(self.x_dtype)
        y = np.ascontiguousarray(raw_y).view(self.y_dtype)
        self.check(first, x, y)
        return x, y

    def check(self, first: int, x: np.ndarray, y: np.ndarray) -> None:
        """RegressionError if rows first, first + 1, … are not what was written, as far as the file tells."""
        if self.side is not None and self.side.sums is not None:
            wrong = row_sums(x, y) != self.side.sums[first : first + len(x)]
            if wrong.any():
                row = first + int(np.argmax(wrong))
                raise RegressionError(
                    f"{self.path}: row {self.rows[row]} (sample {row}): its bytes are not those that were written; "
                    f"write the file again"
                )
        for what, values in (("mask", x), ("targets", y)):
            if values.dtype == bool and values.size and values.view(np.uint8).max() > 1:
                row = first + int(np.argmax(values.view(np.uint8).max(axis=1) > 1))
                raise RegressionError(
                    f"{self.path}: sample {row}, field {what!r}: a bool that is neither 0 nor 1; write the file again"
                )

    def check_table(self) -> None:
        """RegressionError unless the allocation table, which FFCV reads and we do not, fits the metadata."""
        entries = np.frombuffer(self.pread(self.end, self.size - self.end), dtype=_ENTRY)
        order = np.argsort(entries["place"], kind="stable")
        places, sizes = entries["place"][order], entries["size"][order]
        wanted = (self.columns * self.x_dtype.itemsize, self.targets * self.y_dtype.itemsize)
        for at, (name, expected) in enumerate(zip(FIELDS, wanted, strict=False)):
            found = np.searchsorted(places, self._places[at])
            there = found < len(places)
            there[there] = (places[found[there]] == self._places[at][there]) & (sizes[found[there]] == expected)
            if not there.all():
                raise self._bad(
                    f"sample {int(np.argmin(there))}, field {name!r}: not in the allocation table",
                    f"{expected} bytes at {self._places[at][int(np.argmin(there))]}",
                    "write the file again",
                )

    def head_bytes(self) -> bytearray:
        """All before the pages: header, fields, metadata."""
        return bytearray(self.pread(0, self._metadata[0] + self.samples * self._metadata[1]))

    def pread(self, at: int, count: int) -> bytes:
        parts, left = [], count
        while left:
            part = os.pread(self._fd, min(left, 1 << 30), at)
            if not part:
                raise self._bad(f"ends at byte {at}", f"{left:,} bytes more", "it was cut short; write it again")
            parts.append(part)
            left, at = left - len(part), at + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _bad(self, got: str, expected: str, advice: str) -> RegressionError:
        return RegressionError(f"{self.path}: {got}; expected {expected}; {advice}")

    def _gather(self, places: np.ndarray, count: int) -> np.ndarray:
        """(m, count), uint8: `count` bytes at each place; what lies side by side is read at once."""
        out = np.empty((len(places), count), dtype=np.uint8)
        cuts = np.flatnonzero(np.diff(places) != count) + 1
        for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True):
            if high > low:
                raw = self.pread(int(places[low]), (high - low) * count)
                out[low:high] = np.frombuffer(raw, dtype=np.uint8).reshape(high - low, count)
        return out

    def _read_head(self) -> None:
        again = "it is no .beton file, or damaged; write it again"
        if self.size < _HEADER.itemsize:
            raise self._bad(f"has {self.size} bytes", f"at least {_HEADER.itemsize}", again)
        header = np.frombuffer(self.pread(0, _HEADER.itemsize), dtype=_HEADER)[0]
        if header["version"] != VERSION:
            raise self._bad(
                f"version {header['version']}", f"{VERSION}, that of FFCV 1.0.2", "it is no .beton file, or of another"
                " version of FFCV; write it again",
            )  # fmt: skip
        self.samples, self.end, self.page = int(header["samples"]), int(header["table"]), int(header["page"])
        fields = int(header["fields"])
        self._metadata = (_HEADER.itemsize + fields * _FIELD.itemsize, fields * 8)
        start = self._metadata[0] + self.samples * self._metadata[1]
        if self.end == 0:
            raise self._bad("its allocation table was never written", "a finished file", "write it again")
        if not start <= self.end <= self.size:
            raise self._bad(
                f"{fields} fields and {self.samples:,} samples before byte {self.end:,} of {self.size:,}",
                f"at least {start:,} bytes before the allocation table",
                "it was cut short, or is damaged; write it again",
            )
        if (self.size - self.end) % _ENTRY.itemsize:
            raise self._bad(
                f"an allocation table of {self.size - self.end:,} bytes",
                f"a multiple of {_ENTRY.itemsize}",
                "it was cut short, or is damaged; write it again",
            )
        if self.samples == 0:
            raise self._bad("no samples", "at least one", "train models first, then write it again")
        if self.page == 0 or self.page & (self.page - 1):
            raise self._bad(f"pages of {self.page} bytes", "a power of two", again)
        self._read_fields(fields)
        self._read_metadata(start)

    def _read_fields(self, count: int) -> None:
        described = np.frombuffer(self.pread(_HEADER.itemsize, count * _FIELD.itemsize), dtype=_FIELD)
        names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in described["name"]]
        kinds = [int(kind) for kind in described["type"]]
        for name, kind in zip(names, kinds, strict=True):
            if kind not in _EIGHT_BYTES:
                raise self._bad(
                    f"field {name!r} of FFCV's type {kind}", "numbers and arrays of numbers",
                    "write it with python -m datamodels.regression.write_dataset",
                )  # fmt: skip
        for name, allowed in zip(FIELDS, ((_NDARRAY, _TENSOR), (_NDARRAY, _TENSOR), (_INT,)), strict=True):
            if names.count(name) != 1 or kinds[names.index(name)] not in allowed:
                raise self._bad(
                    f"fields {', '.join(names) or 'none'}", f"{', '.join(FIELDS)}, each once",
                    "write it with python -m datamodels.regression.write_dataset",
                )  # fmt: skip
        self._at = [names.index(name) for name in FIELDS]
        self.columns, self.x_dtype = self._array("mask", bytes(described["arguments"][self._at[0]].tobytes()))
        self.targets, self.y_dtype = self._array("targets", bytes(described["arguments"][self._at[1]].tobytes()))

    def _array(self, name: str, arguments: bytes) -> tuple[int, np.dtype]:
        array = np.frombuffer(arguments[: _ARRAY.itemsize], dtype=_ARRAY)[0]
        text = arguments[_ARRAY.itemsize :][: min(int(array["length"]), 1024)]
        try:
            ((_, described),) = json.loads(text.decode("ascii"))
            dtype = np.dtype(described)
        except (ValueError, TypeError):  # what is no JSON, no pair, no dtype
            raise self._bad(f"field {name!r} of type {text[:60]!r}", "a dtype of numbers", "write it again") from None
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise self._bad(f"field {name!r} of dtype {dtype}", "bool or real numbers", "write it again")
        shape = [int(length) for length in array["shape"] if length]
        if len(shape) != 1 or shape[0] * dtype.itemsize > self.size:
            raise self._bad(
                f"field {name!r} of shape {tuple(shape)}", "one vector per row, no longer than the file",
                "reshape each row to a vector, and write it again",
            )  # fmt: skip
        return shape[0], dtype

    def _read_metadata(self, start: int) -> None:
        """Places of all rows, checked to lie inside the pages; and `idx`."""
        sizes = (self.columns * self.x_dtype.itemsize, self.targets * self.y_dtype.itemsize)
        memory.require(
            self.samples * (24 + 8 + _SUMS.itemsize + 8 * len(self._at)),
            f"the metadata of {self.samples:,} samples in {self.path}",
            "if there are not that many, the file is damaged: write it again",
        )
        self._places = np.empty((2, self.samples), dtype=np.int64)
        self.rows = np.empty(self.samples, dtype=np.int64)
        width = self._metadata[1] // 8
        for some in _some(self.samples):
            first, last = int(some[0]), int(some[-1]) + 1
            raw = self.pread(self._metadata[0] + first * 8 * width, (last - first) * 8 * width)
            samples = np.frombuffer(raw, dtype="<u8").reshape(-1, width)
            for at, count in enumerate(sizes):
                places = samples[:, self._at[at]]
                outside = (places < start) | (places > max(self.end - count, 0))
                if count > self.end or outside.any():
                    row = int(np.argmax(outside))
                    raise self._bad(
                        f"sample {first + row}, field {FIELDS[at]!r}: {count:,} bytes at {places[row]:,}",
                        f"a place between {start:,} and {self.end - count:,}",
                        "it was cut short, or is damaged; write it again",
                    )
                self._places[at, first:last] = places
            self.rows[first:last] = samples[:, self._at[2]].view("<i8")

    def _read_side(self) -> Side | None:
        """The side, if there is one; with it everything but the rows is checked against its checksum."""
        again = "it is damaged; write it again"
        low = self._metadata[0] + self.samples * self._metadata[1]
        if self.end - low < _TRAILER.itemsize:
            return None
        trailer = np.frombuffer(self.pread(self.end - _TRAILER.itemsize, _TRAILER.itemsize), dtype=_TRAILER)[0]
        if bytes(trailer["magic"]) != _MAGIC:
            return None
        count = int(trailer["json"])
        length = self.samples * (8 + _SUMS.itemsize) + count + -count % 8
        begin = self.end - _TRAILER.itemsize - length
        if trailer["samples"] != self.samples or begin < low:
            raise self._bad(f"{self.samples:,} samples", f"{int(trailer['samples']):,}, as its own record says", again)
        content = self.pread(begin, length)
        head = 0
        for place in range(0, low, BLOCK_BYTES):
            head = zlib.crc32(self.pread(place, min(BLOCK_BYTES, low - place)), head)
        table = 0
        for place in range(self.end, self.size, BLOCK_BYTES):
            table = zlib.crc32(self.pread(place, min(BLOCK_BYTES, self.size - place)), table)
        for what, is_, should in (
            ("header and metadata", head, trailer["head"]),
            ("allocation table", table, trailer["table"]),
            ("names of columns and rows", _side_sum(content, np.asarray(trailer)), trailer["side"]),
        ):
            if is_ != should:
                raise self._bad(f"{what} of checksum {is_:08x}", f"{int(should):08x}", again)
        n = self.samples
        groups = np.frombuffer(content, dtype="<i8", count=n)
        sums = np.frombuffer(content, dtype=_SUMS, count=n, offset=8 * n)
        about = json.loads(content[8 * n + sums.nbytes :][:count])
        return Side(about, groups, sums)
