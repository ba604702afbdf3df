"""A store whose rows are versions of themselves, processes that write them, and what has to be found afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

from datamodels.store import Store
from datamodels.store.check import Problem, verify
from tests.faults.bench import check
from tests.jobs import ROOT, alive

ROWS, WIDTH = 12, 3000
SPEC = {
    "num_models": ROWS,
    "schema": {
        "x": {"shape": [WIDTH], "dtype": "float64"},
        "version": {"shape": [], "dtype": "int64"},
        "text": {"shape": [], "dtype": "U16"},
        "note": {"shape": [], "dtype": "int64", "required": False},
    },
}


def values(row: int, version: int) -> dict[str, Any]:
    """A version of a row; only odd ones have a note."""
    held = {"x": np.arange(WIDTH, dtype=float) * (row + 1) + version, "version": version, "text": f"{row}.{version}"}
    return held | ({"note": -version} if version % 2 else {})


class Server:
    """`tests.faults.writer`: it has imported everything, and forks what is asked for."""

    def __init__(self) -> None:
        self.buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdin and self.process.stdout
        self.asking, self.said = self.process.stdin, self.process.stdout.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **what: object) -> None:
        self.asking.write(json.dumps(what).encode() + b"\n")
        self.asking.flush()

    def line(self, seconds: float = 60.0) -> list[str]:
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            if not select.select([self.said], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the writers say nothing")
            data = os.read(self.said, 1 << 16)
            if not data:
                raise RuntimeError("the process of the writers ended")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode().split()

    def work(self, path: Path, *more: str, main: str = "tests.faults.writer") -> tuple[int, str]:
        """(exit code, output) of a run of the worker on a store; a signal's number, negative, where one ended it."""
        argv = [f"--worker.logdir={path}", f"--worker.main_import={main}", *more]
        with tempfile.NamedTemporaryFile() as out:
            self.ask(kind="work", argv=argv, out=out.name)
            os.kill(int(self.until("ready")[0]), signal.SIGUSR1)
            code = int(self.until("exit")[1])
            return code, out.read().decode(errors="replace")

    def until(self, word: str) -> list[str]:
        """The rest of the next line that begins so; what is said before it is passed over."""
        while (words := self.line())[0] != word:
            pass
        return words[1:]


class Writers(Server):
    """Processes that write one store, what they said, and what a reader has to find.

    What is found after a writer's end is what was done last, or what was started after that; nothing (version 0) where
    nothing was done.
    """

    def __init__(self, path: Path, *, sync: bool = True, network: bool = False, first: int = 0):
        super().__init__()
        self.path, self.options = path, {"sync": sync, "network": network, "first": first}
        self.allowed = {row: {0} for row in range(ROWS)}
        self.done = self.unheard = 0
        self.alive: list[int] = []
        self.errors: list[str] = []
        self.ended: set[int] = set()  # by an error
        self.seed = 0

    def __exit__(self, *error: object) -> None:
        for pid in self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().__exit__(*error)

    def start(self) -> int:
        """A writer more; its process id, once it is about to begin."""
        self.seed += 1
        self.ask(kind="write", path=str(self.path), seed=self.seed, **self.options)
        while (words := self.line())[0] != "ready":
            self._hear(words)
            check(words[0] != "error" or int(words[1]) in self.alive, f"a writer could not begin: {self.errors}")
        self.alive.append(int(words[1]))
        return self.alive[-1]

    def _hear(self, words: list[str]) -> None:
        if words[0] == "error":
            self.errors.append(" ".join(words[2:]))
            self.ended.add(int(words[1]))
            return
        row, version = int(words[1]), int(words[2])
        if words[0] == "start":
            self.allowed[row] = self.allowed[row] | {version}
        else:
            check(version in self.allowed[row], f"row {row}: {version} was done by one that did not hold the row")
            self.allowed[row] = {version}
            self.done += 1

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and was waited for
            os.kill(pid, signal.SIGKILL)
        while alive(pid):
            time.sleep(0.001)
        self.alive.remove(pid)

    def wait(self, seconds: float = 5.0) -> None:
        """Until all writers have ended by an error, which are then forgotten; they have no reason to go on."""
        end = time.monotonic() + seconds
        while not self.ended.issuperset(self.alive):
            self.settle()
            check(time.monotonic() < end, "a writer goes on though the disk refuses all that it writes")
            time.sleep(0.01)
        for pid in list(self.alive):
            self.kill(pid)
        self.errors.clear()

    def settle(self) -> None:
        """Hear all that was said so far."""
        while select.select([self.said], [], [], 0)[0] and (data := os.read(self.said, 1 << 16)):
            self.buffer += data
        while b"\n" in self.buffer:
            self._hear(self.line())

    def _before_the_flag(self, problem: Problem) -> bool:
        """Whether this is a row whose commit came as far as its flag, which looks like a flag that was lost."""
        return "not marked complete" in problem.what and 0 in self.allowed[problem.row]

    def check(self) -> None:
        """Every row is a version that it may be, whole; recovery leaves nothing behind."""
        with Store.open(self.path) as store:
            problems = [problem for problem in verify(store) if not self._before_the_flag(problem)]
            check(not problems, "; ".join(map(str, problems)))
            folder = self.path / "_replace"
            check(not folder.exists() or not os.listdir(folder), "journals are left")
            # By plain numpy, but not mapped: a map of a file system that is shut down would stay.
            plain = {key: np.load(self.path / f"{key}.npy") for key in SPEC["schema"]}
            completed = np.load(self.path / "_completed.npy")
            noted = store.layout.records("note")["status"] == 1
            for row in range(ROWS):
                version, allowed = int(plain["version"][row]) if completed[row] else 0, self.allowed[row]
                check(version in allowed, f"row {row} holds version {version}, expected one of {sorted(allowed)}")
                if version:
                    expected = values(row, version)
                    check(noted[row] == ("note" in expected), f"row {row}: a note of another version")
                    for key, value in expected.items():
                        check(np.array_equal(plain[key][row], value), f"row {row}, {key}: not what was committed")
                self.unheard += len(allowed) > 1 and version == max(allowed)
                self.allowed[row] = {version}  # it was seen, so it stays
