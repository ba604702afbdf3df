"""Files that FFCV reads and writes; and files that are damaged in every place."""

import json
import os
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodels.errors import RegressionError
from datamodels.regression import beton
from datamodels.regression.beton import Beton, Layout, Side
from tests import needs

N, P, T = 237, 40, 3
LIMIT = 300  # seconds; where something raises inside FFCV it waits for ever


def make_rows(n=N, p=P, width=T, x_dtype="bool", y_dtype="float32"):
    rng = np.random.default_rng(0)
    return (rng.random((n, p)) < 0.5).astype(x_dtype), (10 * rng.standard_normal((n, width))).astype(y_dtype)


def write(path, x, y, step=50, **about):
    layout = Layout(len(x), x.shape[1], y.shape[1], x.dtype, y.dtype)
    blocks = ((x[at : at + step], y[at : at + step]) for at in range(0, len(x), step))
    beton.write(path, layout, 3 * np.arange(len(x)), blocks, lambda: Side(about, np.arange(len(x)) // 2))
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "a.beton", *make_rows(), text="λ = 1")


def in_ffcv(code, *args, limit=LIMIT):
    """A script in a process of its own, with a hard limit."""
    needs.ffcv()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
    import sys
    import numpy as np
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    for path in sys.argv[2:]:
        for os_cache in (True, False):
            arrays = [NDArrayDecoder(), ToTensor()], [NDArrayDecoder(), ToTensor()], [IntDecoder(), ToTensor()]
            loader = Loader(path, batch_size=int(sys.argv[1]), num_workers=1, order=OrderOption.SEQUENTIAL,
                            drop_last=False, os_cache=os_cache, pipelines=dict(zip(("mask", "targets", "idx"), arrays)))
            batches = [[part.numpy().copy() for part in batch] for batch in loader]
            arrays = {name: np.concatenate(parts) for name, parts in zip(("x", "y", "idx"), zip(*batches))}
            np.savez(f"{path}-{os_cache}.npz", **arrays)
"""
# What the released write_dataset hands to FFCV.
WRITE = """
    import sys
    import numpy as np
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter
    path, data = sys.argv[1:]
    data = np.load(data)
    x, y = data["x"], data["y"]
    class Rows:
        def __len__(self):
            return len(x)
        def __getitem__(self, at):
            return x[at], y[at], 3 * at
    DatasetWriter(path, {"mask": NDArrayField(dtype=x.dtype, shape=x.shape[1:]),
                         "targets": NDArrayField(dtype=y.dtype, shape=y.shape[1:]), "idx": IntField()},
                  num_workers=2).from_indexed_dataset(Rows())
"""


def test_ffcv_reads_every_row(tmp_path):
    """Of every type; from the system's cache and from its own."""
    types = [("bool", "float32"), ("uint8", "float64"), ("int16", "float32"), ("int64", "int32"), ("float32", "int8")]
    rows = {f"{x}-{y}.beton": make_rows(x_dtype=x, y_dtype=y) for x, y in types}
    files = [write(tmp_path / name, *values) for name, values in rows.items()]
    in_ffcv(READ, 100, *files)
    for name, (x, y) in rows.items():
        for os_cache in (True, False):
            read = np.load(tmp_path / f"{name}-{os_cache}.npz")
            assert (read["x"].dtype, read["y"].dtype) == (x.dtype, y.dtype)
            np.testing.assert_array_equal(read["x"], x)
            np.testing.assert_array_equal(read["y"], y)
            np.testing.assert_array_equal(read["idx"].reshape(-1), 3 * np.arange(N))


def test_ffcv_reads_rows_on_many_pages(tmp_path):
    """Rows of 3 MB lie two on a page; one of 9 MB takes a larger page."""
    wide = {3_000_000: 1 << 23, 9_000_000: 1 << 24}
    files = [write(tmp_path / f"{width}.beton", *make_rows(5, width, 2), step=2) for width in wide]
    in_ffcv(READ, 2, *files)
    for file, (width, page) in zip(files, wide.items(), strict=True):
        x, _ = make_rows(5, width, 2)
        with Beton(file) as opened:
            assert opened.page == page
            np.testing.assert_array_equal(opened.read(1, 5)[0], x[1:])
        for os_cache in (True, False):
            np.testing.assert_array_equal(np.load(f"{file}-{os_cache}.npz")["x"], x)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [("bool", "float32"), ("float64", "float16")])
def test_what_ffcv_writes_is_read(tmp_path, x_dtype, y_dtype):
    x, y = make_rows(x_dtype=x_dtype, y_dtype=y_dtype)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    in_ffcv(WRITE, tmp_path / "a.beton", tmp_path / "data.npz")
    with Beton(tmp_path / "a.beton") as opened:
        assert opened.side is None
        opened.check_table()
        for first, last in ((0, N), (0, 1), (N - 1, N), (90, 210)):
            for read, given_ in zip(opened.read(first, last), (x, y), strict=True):
                assert read.dtype == given_.dtype
                np.testing.assert_array_equal(read, given_[first:last])
        np.testing.assert_array_equal(opened.rows, 3 * np.arange(N))


# -- our own reader and writer ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    p=st.integers(1, 30),
    width=st.integers(1, 5),
    x_dtype=st.sampled_from(beton.DTYPES),
    y_dtype=st.sampled_from(beton.DTYPES),
    step=st.integers(1, 50),
)
def test_what_is_written_is_read(tmp_path_factory, n, p, width, x_dtype, y_dtype, step):
    rng = np.random.default_rng(n)
    x = np.frombuffer(rng.bytes(n * p * 8), dtype="u8").reshape(n, p).astype(x_dtype)
    y = np.frombuffer(rng.bytes(n * width * 8), dtype="u8").reshape(n, width).astype(y_dtype)
    path = write(tmp_path_factory.mktemp("b") / "a.beton", x, y, step, names=["a", "ü"])
    with Beton(path) as opened:
        opened.check_table()
        assert opened.side.about == {"names": ["a", "ü"]}
        np.testing.assert_array_equal(opened.side.groups, np.arange(n) // 2)
        np.testing.assert_array_equal(opened.rows, 3 * np.arange(n))
        for first in range(0, n, 7):
            some = slice(first, min(n, first + 7))
            for read, written in zip(opened.read(some.start, some.stop), (x, y), strict=True):
                assert read.tobytes() == written[some].tobytes()
                assert read.dtype == written.dtype


def test_the_checksums_are_those_of_the_rows(file):
    x, y = make_rows()
    with Beton(file) as opened:
        assert opened.side.sums["mask"].tolist() == [zlib.crc32(row.tobytes()) for row in x]
        assert opened.side.sums["targets"].tolist() == [zlib.crc32(row.tobytes()) for row in y]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, P, T, "bool", "float32"), "no rows to write"),
        ((N, 0, T, "bool", "float32"), "0 columns"),
        ((N, P, 0, "bool", "float32"), "0 targets"),
        ((N, P, T, "float16", "float32"), "columns of dtype float16: FFCV hangs on it; expected one of bool"),
        ((N, P, T, "bool", "float16"), "targets of dtype float16: FFCV hangs"),
        ((N, P, T, "uint16", "float32"), "columns of dtype uint16"),
        ((N, P, T, "complex64", "float32"), "columns of dtype complex64"),
        ((N, 1 << 30, 1 << 29, "bool", "float32"), "one row takes 3,221,225,472 bytes"),
    ],
)
def test_what_ffcv_would_hang_on_is_refused(shape, message):
    with pytest.raises(RegressionError, match=message):
        Layout(*shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, 1:], y), r"columns from row 50: expected bool of shape \(50, 40\), got bool of \(50, 39\)"),
        (lambda x, y: (x, y.astype("f8")), "targets from row 50: expected float32 .*, got float64"),
        (lambda x, y: (x[:10], y[:10]), f"{N - 40} rows came, {N} were announced"),
        (lambda x, y: (np.repeat(x, 9, 0), np.repeat(y, 9, 0)), "more rows than the 237 announced"),
    ],
)
def test_blocks_that_are_not_as_announced(tmp_path, change, message):
    x, y = make_rows()
    blocks = [(x[at : at + 50], y[at : at + 50]) for at in range(0, N, 50)]
    blocks[1] = change(*blocks[1])
    layout = Layout(N, P, T, x.dtype, y.dtype)
    with pytest.raises(RegressionError, match=message):
        beton.write(tmp_path / "a.beton", layout, np.arange(N), blocks, lambda: Side({}, np.arange(N)))
    assert os.listdir(tmp_path) == []


def test_a_file_that_exists_is_left_as_it_is(file, tmp_path):
    before = file.read_bytes()
    with pytest.raises(RegressionError, match="exists and is left as it is"):
        write(file, *make_rows())
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RegressionError, match="link: exists and is left as it is"):
        write(tmp_path / "link", *make_rows())
    with pytest.raises(RegressionError, match="appeared meanwhile"), beton.whole(tmp_path / "b", needed=0):
        (tmp_path / "b").write_text("mine")
    assert (tmp_path / "b").read_text() == "mine"
    assert file.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "b", "link"]


def test_a_disk_that_is_too_small(tmp_path):
    refused = pytest.raises(RegressionError, match=r"1,000,000,000,000,000,000 bytes are needed and [\d,]+ are free")
    with refused, beton.whole(tmp_path / "deep" / "a", needed=10**18):
        raise AssertionError("not reached")
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch, nameless):
    """Also where the file system has no nameless files."""
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    beside = [] if nameless else [f".a.partial-{os.getpid()}"]

    def half():
        with beton.whole(tmp_path / "a", needed=0) as (fd, name):
            os.write(fd, b"half")
            assert os.listdir(tmp_path) == beside
            with open(name, "rb") as again:
                assert again.read() == b"half"
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        half()
    assert os.listdir(tmp_path) == []
    with beton.whole(tmp_path / "a", needed=0) as (fd, _):
        os.write(fd, b"all")
    assert (tmp_path / "a").read_bytes() == b"all"
    assert os.listdir(tmp_path) == ["a"]
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, nameless):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    done = []

    def watched(name):
        call = getattr(os, name)

        def watch(*args, **options):
            done.append((name, args[0]))
            return call(*args, **options)

        return watch

    for name in ("pwrite", "fsync", "link"):
        monkeypatch.setattr(os, name, watched(name))
    write(tmp_path / "a", *make_rows())
    (last, fd), (synced, same), (named, _), (finally_, folder) = done[-4:]
    assert (last, synced, named, finally_) == ("pwrite", "fsync", "link", "fsync")
    assert fd == same != folder


# -- damage -------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_short_anywhere(file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut.beton"
    with Beton(file) as opened:
        end = opened.end
    lengths = [0, 1, 23, 24, 25, 1000, 24 + 3 * 1041, 24 + 3 * 1041 + 24 * N - 1, 1 << 23, (1 << 23) + 5, 1 << 24]
    lengths += [end - 41, end - 40, end - 1, end, end + 1, end + 24, len(whole) - 24, len(whole) - 1]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(RegressionError, match="cut.beton: .*; expected .*; .*write it again"):
            Beton(cut)
    cut.write_bytes(whole + bytes(24))
    with pytest.raises(RegressionError, match="allocation table of checksum"):
        Beton(cut)


def test_a_file_that_is_cut_short_while_it_is_read(file):
    with Beton(file) as opened:
        os.truncate(file, (1 << 23) + 100)
        with pytest.raises(RegressionError, match="ends at byte 8388708; expected .* bytes more; it was cut short"):
            opened.read(0, N)


def test_a_flipped_bit_anywhere_is_found(file):
    """But in the padding between metadata and pages, and behind the rows."""
    whole = file.read_bytes()
    with Beton(file) as opened:
        head, end, first, last = 24 + 3 * 1041 + 24 * N, opened.end, *opened._places[0, [0, -1]].tolist()
    side = range(end - 40 - 16 * N - 20, end - 40)
    rng = np.random.default_rng(0)
    places = [*range(24), *rng.integers(24, head, 99), *rng.integers(first, last, 99), *rng.choice(side, 99)]
    for at in [*places, *range(end - 40, end + 24), *rng.integers(end, len(whole), 99), len(whole) - 1]:
        change(file, at, bytes([whole[at] ^ 1 << int(rng.integers(8))]))
        if end - 40 <= at < end - 32:  # without this record it looks like a file of FFCV's own, and is one
            with Beton(file) as opened:
                assert opened.side is None
        else:
            with pytest.raises(RegressionError, match="write"), Beton(file) as opened:
                opened.read(0, opened.samples)
        change(file, at, whole[at : at + 1])
    assert file.read_bytes() == whole


def change(path, at, values):
    with open(path, "r+b") as opened:
        opened.seek(at)
        opened.write(values)


def without_side(path):
    """As FFCV would have written it: nothing between pages and table says anything."""
    with Beton(path) as opened:
        end = opened.end
    change(path, end - 40, bytes(8))
    return path


@pytest.mark.parametrize(
    ("at", "values", "message"),
    [
        (0, np.uint16(1), "version 1; expected 2, that of FFCV 1.0.2"),
        (0, np.uint16(258), "version 258"),
        (2, np.uint16(0), "fields none; expected mask, targets, idx"),
        (2, np.uint16(65535), "65535 fields and 237 samples before byte"),
        (4, np.uint32(3), "pages of 3 bytes; expected a power of two"),
        (8, np.uint64(0), "no samples; expected at least one"),
        (8, np.uint64(2**64 - 1), r"18,446,744,073,709,551,615 samples before byte .* expected at least"),
        (8, np.uint64(10**9), "1,000,000,000 samples before byte"),
        (16, np.uint64(0), "its allocation table was never written"),
        (16, np.uint64(2**63), "before byte 9,223,372,036,854,775,808"),
        (24, np.uint8(2), "field 'mask' of FFCV's type 2"),
        (24, np.uint8(1), "fields mask, targets, idx; expected mask, targets, idx, each once"),
        (25, b"musk", "fields musk, targets, idx; expected mask, targets, idx"),
        (41, np.uint64(10**15), "field 'mask' of shape .*no longer than the file"),
        (41, np.array([4, 10], "u8"), r"field 'mask' of shape \(4, 10\); expected one vector per row"),
        (41 + 256, np.uint64(2**63), "field 'mask' of type"),
        (41 + 264, b'[["", "|O8"]]  ', "field 'mask' of dtype object"),
        (41 + 264, b"{}            ", "field 'mask' of type"),
        (41 + 264, b"\xff\xfe", "field 'mask' of type"),
        (41 + 264, b'[["", "|V8"]]', "field 'mask' of dtype |V8"),
        (24 + 3 * 1041, np.uint64(5), "sample 0, field 'mask': 40 bytes at 5; expected a place between"),
        (24 + 3 * 1041 + 24 * 100 + 8, np.uint64(2**64 - 8), "sample 100, field 'targets': 12 bytes at 18,446"),
        (1 << 23, b"\x02", "sample 0, field 'mask': a bool that is neither 0 nor 1"),
    ],
)
def test_nonsense_is_refused(file, at, values, message):
    """In a file without checksums, such as FFCV writes."""
    change(without_side(file), at, values if isinstance(values, bytes) else values.tobytes())
    with pytest.raises(RegressionError, match=message), Beton(file) as opened:
        opened.read(0, N)


def test_a_count_that_no_memory_holds(file):
    """A file of holes makes any number of samples look possible."""
    samples = 10**11
    with open(file, "r+b") as opened:
        opened.truncate(24 * samples + (1 << 30))
    change(file, 8, np.array([samples, 24 * samples + (1 << 24)], "u8").tobytes())
    with pytest.raises(RegressionError, match="the metadata of 100,000,000,000 samples in .* needs about .* of memory"):
        Beton(file)


def test_a_table_that_does_not_fit_is_found_before_ffcv_sees_it(file):
    with Beton(without_side(file)) as opened:
        opened.check_table()
        end = opened.end
    change(file, end + 24 * 7 + 8, np.uint64(77).tobytes())
    with Beton(file) as opened, pytest.raises(RegressionError, match="sample 3, field 'targets': not in the alloc"):
        opened.check_table()


def test_what_is_no_file(tmp_path):
    (tmp_path / "text").write_text("hello, this is not a beton file at all")
    for name, message in (("none", "cannot be read: No such file"), ("", "is a folder"), ("text", "version 25960")):
        with pytest.raises(RegressionError, match=message):
            Beton(tmp_path / name)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Writing and reading 400 MB takes little more than a block of 64 MB, a row of which is 100 KB."""
    code = """
        import resource, sys
        import numpy as np
        from datamodels.regression import beton
        n, p = 4000, 100_000
        layout = beton.Layout(n, p, 2, np.dtype(bool), np.dtype("f4"))
        block = np.random.default_rng(0).random((100, p), dtype="f4") < .5, np.zeros((100, 2), "f4")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side = beton.Side({}, np.arange(n))
        beton.write(sys.argv[1], layout, np.arange(n), (block for _ in range(n // 100)), lambda: side)
        with beton.Beton(sys.argv[1]) as opened:
            for first in range(0, n, 500):
                opened.read(first, first + 500)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    path = tmp_path / "a.beton"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 400e6
    path.unlink()
    assert int(done.stdout) * 1024 < 220e6


def test_names_are_json_that_others_can_find(file):
    raw = file.read_bytes()
    assert json.dumps({"text": "λ = 1"}, ensure_ascii=False).encode() in raw
