"""Ways in which a call of main is ended before it returns."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from datamodels.errors import DatamodelsError
from datamodels.store import Store

_GRACE = 3.0  # seconds between asking main to stop and killing the process


class JobTimeout(BaseException):
    """A call of main ran longer than --worker.job_timeout. Not an Exception: a main that catches those still stops."""


class Stopped(BaseException):
    """The process was asked to end; its rows are given back."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def last_line(error: BaseException) -> str:
    """What is said of an error where there is one line for it."""
    if isinstance(error, (DatamodelsError, JobTimeout)):
        return f"{type(error).__name__}: {error}"
    return traceback.format_exception_only(error)[-1].strip()


class Deadline:
    """Ends a call of main in time: first by a signal, then, if it is stuck in C or does not listen, by the watchdog."""

    def __init__(self, store: Store, seconds: int | None):
        self.seconds = seconds
        if seconds is None:
            return
        self._stacks = store.path / "runs" / f"{store.run.id}.stacks"
        self._file = open(self._stacks, "w")  # noqa: SIM115 - faulthandler keeps it until close()
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        read, self._pipe = os.pipe()
        self._dog = subprocess.Popen(
            [sys.executable, "-m", "datamodels.watchdog", str(os.getpid()), str(store.path), str(self._stacks)],
            stdin=read,
            start_new_session=True,
        )
        os.close(read)

    @contextlib.contextmanager
    def over(self, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        """`rows` are (row, attempt); raises `JobTimeout` inside when their time is up."""
        if self.seconds is None:
            yield
            return

        def ring(number: int, frame: FrameType | None) -> None:
            raise JobTimeout(f"ran longer than --worker.job_timeout={self.seconds} s")

        before = signal.signal(signal.SIGALRM, ring)
        self._say(f"arm {self.seconds + _GRACE} " + " ".join(f"{row}:{attempt}" for row, attempt in rows))
        try:
            signal.alarm(self.seconds)
            yield
        finally:
            try:
                signal.alarm(0)  # it may ring just before this
            finally:
                self._say("off")
                signal.signal(signal.SIGALRM, before)

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody ended the watchdog; the alarm still rings
            os.write(self._pipe, line.encode() + b"\n")

    def close(self) -> None:
        if self.seconds is not None:
            self._say("end")  # what main forked may hold the pipe open
            os.close(self._pipe)
            self._dog.wait()
            faulthandler.unregister(signal.SIGUSR2)
            self._file.close()
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()
