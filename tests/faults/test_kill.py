"""Promises 1 and 2, against the real thing: kill -9 at random moments of processes that commit and replace rows.

A writer says "start" before a commit and "done" after it returned, while it still holds the rows. Whatever is found
after the kill has to be what was done last, or what was started after that; and a row of which nothing was ever done
may be incomplete.
"""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from datamodels.store import Store
from datamodels.store.check import verify

ROWS, WIDTH = 12, 3000
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
SPEC = {
    "num_models": ROWS,
    "schema": {
        "x": {"shape": [WIDTH], "dtype": "float64"},
        "version": {"shape": [], "dtype": "int64"},
        "text": {"shape": [], "dtype": "U16"},
    },
}

# One process that has imported everything forks the writers: hundreds of them would take minutes to import it anew.
WRITERS = """
import os, random, sys, warnings
import numpy as np
from datamodels.errors import ClaimLost
from datamodels.store import Store

ROWS, WIDTH, SYNC = map(int, sys.argv[2:])


def values(row, version):
    x = np.arange(WIDTH, dtype=float) * (row + 1) + version
    return {"x": x, "version": version, "text": f"{row}.{version}"}


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one write, so that lines of several never mix


def write(seed):
    rng = random.Random(seed)
    store = Store.open(sys.argv[1], sync=SYNC)
    store.run
    say("ready", os.getpid())
    for count in range(10**6):
        version = seed * 10_000 + count
        first, size = rng.randrange(ROWS), rng.choice((1, 1, 2, 4))
        rows = [row for row in range(first, min(ROWS, first + size)) if store.run.take(row)]
        for row in rows:
            say("start", row, version)
        if rows:
            arrays = [values(row, version) for row in rows]
            store.commit_many(rows, {key: [a[key] for a in arrays] for key in arrays[0]}, replace=True)
        for row in rows:
            say("done", row, version)
            store.run.release(row, done=False)


for line in sys.stdin:
    seed = int(line)
    if os.fork() == 0:
        try:
            write(seed)
        except BaseException as error:
            say("error", type(error).__name__, error)
        finally:
            os._exit(1)
"""


class Bench:
    """The writers of a store, what they said, and what a reader has to find."""

    def __init__(self, path, *, sync):
        self.path, self.sync = path, sync
        Store.create(path, SPEC).close()
        script = [sys.executable, "-c", textwrap.dedent(WRITERS), str(path), str(ROWS), str(WIDTH), str(int(sync))]
        self.process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV, cwd=path)
        self.allowed = {row: {None} for row in range(ROWS)}  # versions that a row may hold, None: incomplete
        self.kills = self.done = self.unheard = 0
        self.buffer = b""

    def start(self, seed):
        self.process.stdin.write(f"{seed}\n".encode())
        self.process.stdin.flush()
        while (words := self.line()) and words[0] != "ready":
            self.hear(words)
        return int(words[1])

    def line(self):
        while b"\n" not in self.buffer:
            self.buffer += os.read(self.process.stdout.fileno(), 1 << 16)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode().split()

    def hear(self, words):
        assert words[0] != "error", " ".join(words)
        row, version = int(words[1]), int(words[2])
        if words[0] == "start":
            self.allowed[row] = self.allowed[row] | {version}
        else:
            assert version in self.allowed[row]
            self.allowed[row] = {version}
            self.done += 1

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}") and ") Z " not in open_text(f"/proc/{pid}/stat"):
            time.sleep(0.001)
        self.kills += 1

    def settle(self):
        """Hear all that was said by writers that are dead by now."""
        os.set_blocking(self.process.stdout.fileno(), False)
        try:
            while True:
                self.buffer += os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            os.set_blocking(self.process.stdout.fileno(), True)
        while b"\n" in self.buffer:
            self.hear(self.line())
        assert self.buffer == b""

    def check(self):
        """Every row is a version that it may be, whole; recovery leaves nothing behind."""
        with Store.open(self.path) as store:
            assert [str(problem) for problem in verify(store)] == []
            complete = store.completed()
            folder = self.path / "_replace"
            assert not folder.exists() or os.listdir(folder) == []
            plain = {key: np.load(self.path / f"{key}.npy", mmap_mode="r") for key in SPEC["schema"]}
            for row in range(ROWS):
                if not complete[row]:
                    assert None in self.allowed[row], f"row {row} is lost, expected one of {self.allowed[row]}"
                    continue
                version = int(plain["version"][row])
                assert version in self.allowed[row], f"row {row} is {version}, expected one of {self.allowed[row]}"
                np.testing.assert_array_equal(plain["x"][row], np.arange(WIDTH, dtype=float) * (row + 1) + version)
                assert plain["text"][row] == f"{row}.{version}"
                newest = max(v for v in self.allowed[row] if v is not None)
                self.unheard += len(self.allowed[row]) > 1 and version == newest
                self.allowed[row] = {version}  # it was seen, so it stays

    def close(self):
        self.process.kill()
        self.process.communicate()


def open_text(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ") Z "


@pytest.fixture(params=[True, False], ids=["sync", "nosync"])  # a kill needs no sync; without, more happens
def bench(tmp_path, request):
    made = Bench(tmp_path / "store", sync=request.param)
    yield made
    made.close()


def kill_again_and_again(bench, kills, writers, longest, seed):
    rng = random.Random(seed)
    number = 0
    while bench.kills < kills:
        alive = []
        for _ in range(writers):
            number += 1
            alive.append(bench.start(number))
        rng.shuffle(alive)
        for pid in alive:  # one goes, the others take over its rows, then the next
            time.sleep(rng.random() * longest)
            bench.kill(pid)
        bench.settle()
        bench.check()
    with Store.open(bench.path) as store:  # what the dead left behind goes as the living come by
        for row in range(ROWS):
            assert store.run.take(row)
            store.run.release(row, done=False)
        assert [name for name in os.listdir(bench.path / "claims") if not name.endswith(".lock")] == []
        assert len(os.listdir(bench.path / "claims")) <= 20


@pytest.mark.parametrize("writers", [1, 3])
def test_writers_killed_at_random_moments(bench, writers):
    kill_again_and_again(bench, kills=15, writers=writers, longest=0.25, seed=writers)
    assert bench.done > (5 if bench.sync else 30), "the writers hardly got to commit"


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 3])
def test_a_thousand_kills(bench, writers):
    kill_again_and_again(bench, kills=250, writers=writers, longest=0.4, seed=10 + writers)
    assert bench.unheard > 3, "hardly any kill came between a commit and the word of it"
