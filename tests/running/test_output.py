"""What rows print: the part of the worker's output that a failed row keeps beside its traceback."""

import subprocess
import sys

import pytest

from datamodels.errors import StoreError
from datamodels.running import output
from datamodels.store import Store
from tests.jobs import Job, finish, plain
from tests.test_pool import Pool

# Python keeps back what it prints to a file, and so does C.
TALKS = """
import ctypes, os, signal, subprocess, sys, time
def talk(index):
    print('python', index)
    print('error', index, file=sys.stderr)
    os.write(1, b'descriptor %d\\n' % index)
    ctypes.CDLL(None).puts(b'C %d' % index)
    subprocess.run(['echo', 'child', str(index)])
def main(index):
    talk(index)
    if index % 2: {line}
    return {{'x': index}}
"""
LINES = ["C", "child", "descriptor", "error", "python"]


def run(job, *more, mode="wb", out="out", err=None):
    """Exit code of a worker that prints to files of the job's folder, and what a second one finds there."""
    with open(job.folder / out, mode) as stdout, open(job.folder / (err or out), mode) as stderr:
        buffered = {"PYTHONUNBUFFERED": ""}
        process = job.start(*more, stdout=stdout, stderr=stdout if err is None else stderr, env=buffered)
        return finish(process)[0]


def log(job, row, attempt=1):
    path = job.path / f"workers/{row}/attempt-{attempt}.log"
    return path.read_text() if path.exists() else None


def test_a_row_that_fails_keeps_what_it_printed_and_no_more(tmp_path):
    job = Job(tmp_path, plain(6), TALKS.format(line="raise ValueError(index)"))
    assert run(job, "--worker.retries=1") == 3
    for row in (1, 3, 5):
        for attempt in (1, 2):
            assert sorted(log(job, row, attempt).splitlines()) == [f"{word} {row}" for word in LINES]
            assert "ValueError" in job.traceback(row, attempt)
    assert not [row for row in (0, 2, 4) if (job.path / f"workers/{row}").exists()]
    everything = (tmp_path / "out").read_text()
    assert [everything.count(f"python {row}\n") for row in range(6)] == [1, 2] * 3  # nothing is hidden
    assert not list((job.path / "runs").glob("*.row"))


def test_two_files(tmp_path):
    job = Job(tmp_path, plain(2), TALKS.format(line="raise ValueError(index)"))
    assert run(job, "--worker.retries=0", err="err") == 3
    out, _, err = log(job, 1).removeprefix("---- standard output\n").partition("---- standard error\n")
    assert sorted(out.splitlines()) == [f"{word} 1" for word in LINES if word != "error"]
    assert err == "error 1\n"


def test_a_file_without_a_name(tmp_path):
    """GNU parallel gives its jobs such files."""
    job = Job(tmp_path, plain(2), TALKS.format(line="raise ValueError(index)"))
    with open(tmp_path / "out", "wb") as file:
        (tmp_path / "out").unlink()
        assert finish(job.start("--worker.retries=0", stdout=file, stderr=file))[0] == 3
    assert sorted(log(job, 1).splitlines()) == [f"{word} 1" for word in LINES]


@pytest.mark.parametrize("line", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_row_whose_process_was_killed_keeps_what_it_printed(tmp_path, line):
    """The next worker finds it, behind which it has printed itself."""
    source = TALKS.replace("talk(index)\n    if", "talk(index); sys.stdout.flush()\n    if").format(line=line)
    job = Job(tmp_path, plain(4), source)
    assert run(job, "--worker.retries=0", "--worker.index=1") in (7, -9)
    assert run(job, "--worker.retries=0", "--worker.index=0", mode="ab") == 0
    assert run(job, "--worker.retries=0", mode="ab") in (7, -9)
    assert run(job, "--worker.retries=0", mode="ab") == 3
    for row in (1, 3):
        words = [word for word in LINES if word != "C"]  # which C had not yet written
        assert sorted(log(job, row).splitlines()) == [f"{word} {row}" for word in words]
        assert "died without leaving a word" in job.traceback(row)


@pytest.mark.slow
def test_a_row_that_is_stuck_in_c_keeps_what_it_printed(tmp_path):
    source = TALKS.replace("talk(index)\n    if", "talk(index); sys.stdout.flush()\n    if")
    job = Job(tmp_path, plain(2), source.format(line="sum(iter(int, 1))"))
    assert run(job, "--worker.job_timeout=1", "--worker.retries=0") == -9
    assert "python 1\n" in log(job, 1) and "child 1\n" in log(job, 1) and "python 0" not in log(job, 1)
    with Store.open(job.path) as store:
        (failed,) = [failure.row for failure in store.status().failures]
        assert failed == 1 and store.run_of(1)["state"] == "died"
        assert store.run_of(1)["argv"][-2:] == ["--worker.job_timeout=1", "--worker.retries=0"]  # not the watchdog's


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path):
    source = """
def main(index):
    print('first')
    for number in range(40000): print(f'line {number:095}')
    print('last', flush=True)
    raise ValueError
"""
    job = Job(tmp_path, plain(1), source)
    assert run(job, "--worker.retries=1") == 3
    begin = (tmp_path / "out").stat().st_size
    for attempt in (1, 2):
        text = log(job, 0, attempt)
        assert 4 << 16 <= len(text) < (4 << 16) + 300
        assert text.startswith("first\nline 000") and text.endswith(
            "line 039999\nlast\n".replace("039999", f"{39999:095}")
        )
        left = 6 + 40000 * 101 + 5 - (4 << 16)
        assert f"[… {left:,} bytes left out; all of it is in {tmp_path / 'out'}, from byte" in text
    assert begin > 8_000_000


def test_into_a_pipe_everything_is_as_it_was(tmp_path):
    job = Job(tmp_path, plain(2), TALKS.format(line="raise ValueError(index)"))
    code, out, err = job.run("--worker.retries=0")
    assert code == 3 and out.count("python ") == 3 and err.count("error") == 2
    assert "python -m datamodels.store reset" in out
    assert [path.name for path in (job.path / "workers/1").iterdir()] == ["attempt-1.json"]
    assert not list((job.path / "runs").glob("*.row"))


def test_a_row_of_a_batch_keeps_what_the_batch_printed(tmp_path):
    source = """
def main_many(indices):
    print('rows', *indices)
    return {'x': [None if index == 2 else 1.0 for index in indices]}
"""
    job = Job(tmp_path, plain(4), source)
    assert run(job, "--worker.batch=4", "--worker.retries=1") == 3
    assert sorted(map(int, log(job, 2).split()[1:])) == [0, 1, 2, 3]
    assert log(job, 2, 2) == "rows 2\n"


def test_a_main_that_closes_or_moves_its_output(tmp_path):
    source = """
import os
def main(index):
    fd = os.open('elsewhere', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1) if index == 0 else os.close(1)
    raise ValueError(index)
"""
    job = Job(tmp_path, plain(2), source)
    run(job, "--worker.retries=0", err="err")
    assert "ValueError: 0" in job.traceback(0) and "ValueError: 1" in job.traceback(1)


def test_a_log_that_finds_no_place_costs_nothing_else(tmp_path, monkeypatch):
    with Store.create(tmp_path / "store", plain(1), sync=False) as store:
        assert store.run.take(0)
        put = store.disk.put

        def full(name, data):
            if name.endswith(".log"):
                raise StoreError("full")
            put(name, data)

        monkeypatch.setattr(store.disk, "put", full)
        store.begin([0])
        assert store.fail(0, 1, "Bad", log=b"words").exists()
        assert store.status().failed == 1


def test_another_file_of_the_name_is_not_taken_for_it(tmp_path):
    """As where the killed worker was on another machine."""
    job = Job(tmp_path, plain(2), TALKS.format(line="os._exit(7)"))
    assert run(job, "--worker.retries=0", "--worker.index=1") == 7
    (note,) = (job.path / "runs").glob("*.row")
    assert b"child 1" in output.printed(job.path, note.stem, 1)
    assert output.printed(job.path, note.stem, 0) == b""
    text = (tmp_path / "out").read_bytes()
    (tmp_path / "keep").hardlink_to(tmp_path / "out")  # so that the number is not used again
    (tmp_path / "out").unlink()
    (tmp_path / "out").write_bytes(text)
    assert output.printed(job.path, note.stem, 1) == b""
    note.write_text('{"rows"')
    assert output.printed(job.path, note.stem, 1) == b""


def test_the_next_run_is_found_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_CHUNK", 64)
    rule = output._RULE
    for place in range(130):
        path = tmp_path / "log"
        path.write_bytes(b"x" * (10 + place) + rule + b"id\n" + b"y" * 100)
        with open(path, "rb") as file:
            assert output._end(file, 10, path.stat().st_size) == 10 + place


def test_under_a_pool(tmp_path):
    job = Pool(tmp_path, plain(8), TALKS.format(line="raise ValueError(index)"))
    assert job.run("--worker.retries=0")[0] == 1
    for row in (1, 3, 5, 7):
        assert sorted(log(job, row).splitlines()) == [f"{word} {row}" for word in LINES]


def test_what_it_costs():
    """A note per row, beside a commit of 200 µs and more."""
    code = """
import time
from pathlib import Path
import tempfile
from datamodels.running.output import Output
from datamodels.store import Store
with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder) / 's',
        {'num_models': 1, 'schema': {'x': {'shape': [], 'dtype': 'float64'}}}) as store:
    one = Output(store)
    one.open()
    one.begin({0: 1})
    began = time.perf_counter()
    for _ in range(2000): one.begin({0: 1})
    print((time.perf_counter() - began) / 2000)
    one.close()
"""
    with open("/dev/shm/datamodels-cost", "w+") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, timeout=60)
        file.seek(0)
        assert float(file.read().splitlines()[-1]) < 2e-4
