"""An executor starts copies of the worker somewhere and says which have ended; the store is the queue."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Exit:
    """A worker that ended: its number, its exit code (negative: the signal that killed it), its last words and log.

    `said` is what the engine says of it beyond the code, such as SLURM's OUT_OF_MEMORY; `wanted` is true when
    somebody ended it on purpose, so that it is not to be started again.
    """

    number: int
    code: int
    seconds: float
    words: str
    log: str
    said: str = ""
    wanted: bool = False

    def cause(self) -> str:
        """What happened to it, as the rest of a sentence that begins with the worker."""
        if self.said:
            how = f"ended as {self.said}"
        elif self.code >= 0:
            how = f"ended with code {self.code}"
        else:
            hint = " (out of memory, or past --worker.job_timeout)" if self.code == -signal.SIGKILL else ""
            how = f"was killed by {signal.Signals(-self.code).name}{hint}"
        return f"{how} after {self.seconds:.0f} s"

    def last_words(self) -> str:
        return "\n".join(self.words.splitlines()[-15:])


class Executor(ABC):
    """Starts, watches and stops numbered copies of one worker command.

    What a copy prints goes to `logs/worker-<number>.log`; that of a copy started again behind what the first printed.
    """

    def __init__(self, logs: Path):
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def log(self, number: int) -> Path:
        return self.logs / f"worker-{number}.log"

    def words(self, number: int, begin: int) -> str:
        """The end of what a copy printed from byte `begin` of its log on."""
        try:
            with open(self.log(number), "rb") as log:
                log.seek(max(begin, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def printed(self, number: int) -> int:
        """Bytes in the log of a copy."""
        try:
            return os.stat(self.log(number)).st_size
        except FileNotFoundError:
            return 0

    @abstractmethod
    def start(self, numbers: Sequence[int]) -> None:
        """Start the copies of these numbers."""

    def hello(self) -> str:
        """What a person should know once the copies are started, or nothing."""
        return ""

    @abstractmethod
    def running(self) -> int:
        """How many copies are running."""

    def waiting(self) -> int:
        """How many copies wait until the engine has a place for them."""
        return 0

    def withdraw(self) -> None:  # noqa: B027 - most engines have nothing to do
        """No row is left: copies that wait for a place need not begin."""

    @abstractmethod
    def ended(self) -> list[Exit]:
        """The copies that have ended since the last call."""

    @abstractmethod
    def stop(self, seconds: float) -> int:
        """Ask every copy to stop, and after so many seconds make it; how many had to be made."""

    def close(self) -> None:
        """Let go of the copies as the pool ends in whatever way: what cannot live without it is stopped."""
        self.stop(0)
