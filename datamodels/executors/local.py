"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from datamodels.executors.base import Executor, Exit
from datamodels.executors.gpus import VARIABLE

# Whichever of these a numerical library reads, W workers then use W cores and no more.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def capped_threads(workers: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Thread counts for each of `workers` processes; a count that the user has set stays, and is that of all the rest.

    A library that reads MKL's before OMP's would otherwise take ours where the user has set OMP_NUM_THREADS.
    """
    share = next((environ[name] for name in THREAD_VARIABLES if name in environ), str(max(1, cores() // workers)))
    return {name: environ.get(name, share) for name in THREAD_VARIABLES}


class _Copy(NamedTuple):
    process: subprocess.Popen[bytes]
    started: float
    log_begin: int  # what it prints begins here in its log, behind what earlier ones of its number did


class LocalExecutor(Executor):
    """Each copy is a process group of its own, so that when it is killed what it started ends with it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        workers: int,
        logs: Path,
        environment: Mapping[str, str],
        gpus: Sequence[str] = (),  # CUDA_VISIBLE_DEVICES of each worker
    ):
        super().__init__(logs)
        self.gpus = gpus
        self.command = list(command)
        self.environment = {**os.environ, **capped_threads(workers, os.environ), **environment}
        self._processes: dict[int, _Copy] = {}

    def start(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._start(number)

    def _start(self, number: int) -> None:
        with open(self.log(number), "ab") as log:
            begin = log.tell()
            process = subprocess.Popen(
                self.command,
                env={**self.environment, **({VARIABLE: self.gpus[number]} if self.gpus else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[number] = _Copy(process, time.monotonic(), begin)

    def running(self) -> int:
        return len(self._processes)

    def ended(self) -> list[Exit]:
        exits = []
        for number, copy in list(self._processes.items()):
            process = copy.process
            end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is None:
                continue
            if end.si_code != os.CLD_EXITED:  # it could not end its children
                self._kill_group(process)  # and until it is reaped, the group's number cannot be anybody else's
            code = process.wait()
            del self._processes[number]
            words = self.words(number, copy.log_begin)
            exits.append(Exit(number, code, time.monotonic() - copy.started, words, str(self.log(number))))
        return exits

    def stop(self, seconds: float) -> int:
        for copy in self._processes.values():
            os.kill(copy.process.pid, signal.SIGTERM)  # its children are the worker's to end
        deadline = time.monotonic() + seconds
        while self._processes and time.monotonic() < deadline:
            self.ended()
            time.sleep(0.02)
        self.ended()
        killed = [copy.process for copy in self._processes.values()]
        for process in killed:
            self._kill_group(process)
        for process in killed:
            process.wait()
        self._processes.clear()
        return len(killed)

    @staticmethod
    def _kill_group(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
