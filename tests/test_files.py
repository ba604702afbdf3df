"""Files that appear whole."""

import contextlib
import os
import stat
import subprocess
import sys
import threading

import pytest

from datamodels.files import whole


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole(path) as file:
        file.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
        (beside,) = (name for name in os.listdir(tmp_path) if name != "a.bin")
        assert beside.startswith(".a.bin.") and beside.endswith(".partial")
    assert path.read_bytes() == b"new" * 100_000 and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.bin"
    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with contextlib.suppress(error), whole(path) as file:
            file.write(b"new")
            raise error
        assert os.listdir(tmp_path) == ([] if before is None else ["a.bin"])
    assert path.read_bytes() == b"old"


def test_others_may_read_it_as_far_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with whole(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    path, size = tmp_path / "a", 200_000
    barrier, errors = threading.Barrier(8), []

    def write(number):
        try:
            barrier.wait()
            for _ in range(20):
                with whole(path, sync=False) as file:
                    file.write(bytes([number]) * size)
                content = path.read_bytes()
                assert len(content) == size and len(set(content)) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("sync", [True, False])
def test_what_is_synced_is_synced_before_it_has_its_name(tmp_path, sync):
    script = f"""
import os
from datamodels.files import whole
for name in ("fsync", "replace"):
    def spy(*given, name=name, real=getattr(os, name)):
        folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{{given[0]}}")
        print(name, "folder" if folder else "")
        return real(*given)
    setattr(os, name, spy)
with whole("a", sync={sync}) as file:
    file.write(b"x")
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == (["fsync", "replace", "fsync", "folder"] if sync else ["replace"]), done.stderr
