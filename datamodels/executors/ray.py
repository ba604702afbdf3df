"""Workers as long-lived tasks of Ray, on the cluster that RAY_ADDRESS names, or one of this machine's own.

A task runs the worker as a process of its node, so that rows never share a process with Ray. A task whose node dies is
begun again elsewhere by Ray; one whose worker dies, by the pool. The store must be at the same path on all nodes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodels.errors import ConfigError
from datamodels.executors.base import Executor, Exit
from datamodels.executors.gpus import capacity

_GRACE = 4.0  # seconds that a worker has to give its rows back
_END = 20.0  # seconds that copies have to end once no row is left
_LOOK_AGAIN = 5.0  # seconds between two looks at what the cluster has
_NOT_OURS = ("RAY_", "CUDA_VISIBLE_DEVICES")  # of the driver's environment, what is another's on the task's node


def connect() -> Any:
    """The module `ray`, connected. `ConfigError` where it is not installed, or has no cluster to give."""
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--pool.executor=ray: Ray is not installed here; pip install 'datamodels-store[ray]' does that"
        ) from None
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():  # Ray itself would end the process after a while
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"RAY_ADDRESS: nobody answers at {address} ({error}); is Ray running there?") from None
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--pool.executor=ray: {error}") from None
    return ray


def places(ray: Any, gpus_each: float) -> int:
    """How many workers the cluster has room for at once, with one core and so much of a GPU each."""
    there = ray.cluster_resources()
    rooms = int(there.get("CPU", 0))
    return min(rooms, capacity(int(there.get("GPU", 0)), gpus_each)) if gpus_each else rooms


def _task(pool: str) -> Callable[..., int]:
    """What Ray runs; made in here, so that it travels by value and a node needs this package for the worker alone."""

    grace = _GRACE

    def work(command: list[str], folder: str, environment: dict[str, str], log: str) -> int:
        import contextlib
        import os
        import signal
        import subprocess
        import time

        path = {"PYTHONPATH": environment.get("PYTHONPATH", "")}
        environment = {**environment, **os.environ, **path, pool: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with open(log, "ab") as out:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                time.sleep(0.1)  # a cancel reaches Python alone: it does not interrupt a wait
        except KeyboardInterrupt:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        if process.poll() is None or process.returncode < 0:  # it could not end its children
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    return work


class _Copy(NamedTuple):
    task: Any
    started: float
    log_begin: int


class RayExecutor(Executor):
    """Each copy is a task with one core, and so much of a GPU, that is begun again for as long as its nodes die."""

    def __init__(self, ray: Any, command: Sequence[str], *, logs: Path, pool: str, gpus_each: float):
        super().__init__(logs.resolve())
        self._ray, self._gpus_each = ray, gpus_each
        self._work = ray.remote(_task(pool)).options(
            num_cpus=1, num_gpus=gpus_each, max_retries=-1, name="datamodels worker"
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
        self._call = (list(command), os.getcwd(), environment)
        self._copies: dict[int, _Copy] = {}
        self._places, self._looked, self._over = 0, float("-inf"), 0.0

    def start(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            task = self._work.remote(*self._call, str(self.log(number)))
            self._copies[number] = _Copy(task, time.monotonic(), self.printed(number))

    def _rooms(self) -> int:
        if time.monotonic() - self._looked > _LOOK_AGAIN:
            self._places, self._looked = places(self._ray, self._gpus_each), time.monotonic()
        return self._places

    def running(self) -> int:
        return min(len(self._copies), self._rooms())

    def waiting(self) -> int:
        return len(self._copies) - self.running()

    def withdraw(self) -> None:
        # Those that run are about to end, and make room for those that wait; but others may take it.
        self._over = self._over or time.monotonic()
        if self._copies and time.monotonic() > self._over + _END:
            self._cancel()

    def ended(self) -> list[Exit]:
        numbers = {copy.task: number for number, copy in self._copies.items()}
        ready, _ = self._ray.wait(list(numbers), num_returns=len(numbers), timeout=0) if numbers else ([], [])
        return [self._end(numbers[task]) for task in ready]

    def _end(self, number: int) -> Exit:
        copy = self._copies.pop(number)
        code, said, wanted, words = 0, "", False, self.words(number, copy.log_begin)
        try:
            code = self._ray.get(copy.task)
        except self._ray.exceptions.TaskCancelledError:
            wanted = True
        except self._ray.exceptions.RayError as error:
            code, said, words = 1, type(error).__name__, f"{words}\n{error}"
        return Exit(number, code, time.monotonic() - copy.started, words, str(self.log(number)), said, wanted)

    def _cancel(self) -> None:
        for copy in self._copies.values():
            self._ray.cancel(copy.task)

    def stop(self, seconds: float) -> int:
        self._cancel()
        asked, deadline = len(self._copies), time.monotonic() + _GRACE + max(seconds, 2.0)
        while self._copies and time.monotonic() < deadline:
            self.ended()
            time.sleep(0.05)
        self._copies.clear()
        return asked  # a task that is cancelled does not say whether its worker listened

    def close(self) -> None:
        self.stop(0)
        self._ray.shutdown()
