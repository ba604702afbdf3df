"""What is asked of a network file system, on a local one; whether that is enough is shown by `make test-nfs`."""

import errno
import os

import pytest

from datamodels.store.disk import PosixDisk
from tests.needs import missing

PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 64)
    made = PosixDisk(tmp_path, network=True)
    yield made
    made.close()


def test_reads_pass_the_cache_by_where_the_file_system_can(disk, monkeypatch):
    flags, real = [], os.open

    def opened(path, flag, *mode):
        flags.append(flag & os.O_DIRECT)
        return real(path, flag & ~os.O_DIRECT, *mode)

    monkeypatch.setattr(os, "open", opened)
    assert disk.read("x", 250, 12) == bytes([*range(250, 256), *range(6)])
    assert flags == [os.O_DIRECT]


def test_a_file_system_that_cannot_read_so_is_read_as_usual(disk, monkeypatch):
    real = os.open

    def refused(path, flag, *mode):
        if flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(path, flag, *mode)

    monkeypatch.setattr(os, "open", refused)
    assert disk.read("x", 250, 12) == bytes([*range(250, 256), *range(6)])


def cached(path):
    """Whether the first page of a file is in the kernel's cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(PAGE)], 0, os.RWF_NOWAIT) == PAGE
    except BlockingIOError:
        return False
    except OSError:
        missing("this file system does not say what is in its cache (RWF_NOWAIT)")
    finally:
        os.close(fd)


def test_nothing_stays_in_the_cache_of_what_was_written(disk, tmp_path):
    (tmp_path / "x").read_bytes()
    assert cached(tmp_path / "x")
    disk.write("x", 5, b"abc")
    assert not cached(tmp_path / "x")
    (tmp_path / "x").read_bytes()
    disk.close()
    assert not cached(tmp_path / "x")
    assert disk.read("x", 4, 5) == b"\4abc\10"
