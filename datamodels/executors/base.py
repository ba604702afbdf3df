"""An executor starts copies of the worker somewhere and says which have ended; the store is the queue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Exit:
    """A worker that ended: its number, its exit code (negative: the signal that killed it), its last words and log."""

    number: int
    code: int
    seconds: float
    words: str
    log: str


class Executor(ABC):
    """Starts, watches and stops numbered copies of one worker command."""

    @abstractmethod
    def start(self, number: int) -> None:
        """Start copy `number`."""

    @abstractmethod
    def running(self) -> int:
        """How many copies are running."""

    @abstractmethod
    def ended(self) -> list[Exit]:
        """The copies that have ended since the last call."""

    @abstractmethod
    def stop(self, seconds: float) -> int:
        """Ask every copy to stop, and after so many seconds make it; how many had to be made."""
