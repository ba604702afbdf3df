"""A disk in memory that stops at any operation, and then holds any of the states that a power cut could leave.

What was written and not synced may have reached the platter whole, not at all, or sector by sector. A process may be
killed instead, and another one goes on with what is cached. Or a sync fails: what it should have written is forgotten,
as kernels do, whatever part of it arrived.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator

from datamodels.errors import StoreError

SECTOR = 512


class Crash(BaseException):
    """The power went out. Not an Exception: nothing may catch it and go on."""


class MemoryDisk:
    network = False
    forgets = True  # as `PosixDisk` makes the kernel do, what a failing sync did not write

    def __init__(self, files: dict[str, bytes], *, stop_at: int | None = None):
        self.durable = {name: bytearray(data) for name, data in files.items()}
        self.cached = {name: bytearray(data) for name, data in files.items()}  # what a reader of this machine sees
        self.pending: list[tuple[str, int, bytes]] = []
        self.halfway: tuple[str, bytes | None] | None = None  # a put or remove that was under way
        self.operations = self.syncs = 0
        self.stop_at = stop_at  # an operation
        self.fail_at: int | None = None  # a sync
        self.arrives: Callable[[str, int], bool] = lambda file, sector: False  # of what a failing sync had to write

    def _step(self) -> bool:
        """Count an operation; True when the power goes out during it."""
        self.operations += 1
        return self.stop_at == self.operations

    def write(self, name: str, offset: int, data: bytes) -> None:
        stop = self._step()
        self.pending.append((name, offset, bytes(data)))
        self.cached[name][offset : offset + len(data)] = data
        if stop:
            raise Crash

    def read(self, name: str, offset: int, size: int) -> bytes:
        return bytes(self.cached[name][offset : offset + size])

    def sync(self, names: Iterable[str]) -> None:
        for name in names:
            if self._step():
                raise Crash
            self.syncs += 1
            mine = [entry for entry in self.pending if entry[0] == name]
            self.pending = [entry for entry in self.pending if entry[0] != name]
            if self.syncs == self.fail_at:
                self.durable[name] = self._torn({name: self.durable[name]}, mine, self.arrives)[name]
                if self.forgets:
                    self.cached[name] = bytearray(self.durable[name])
                raise StoreError(f"{name}: the disk reported an error")
            for _, offset, data in mine:
                self.durable[name][offset : offset + len(data)] = data

    def put(self, name: str, data: bytes) -> None:
        if self._step():
            self.halfway = (name, bytes(data))
            raise Crash
        self.durable[name], self.cached[name] = bytearray(data), bytearray(data)

    def remove(self, name: str) -> None:
        if self._step():
            self.halfway = (name, None)
            raise Crash
        self.durable.pop(name, None)
        self.cached.pop(name, None)

    def list(self, name: str) -> list[str]:
        return sorted(n.partition("/")[2] for n in self.cached if n.startswith(name + "/"))

    # ---------------------------------------------------------------- after the crash

    def goes_on(self, *, stop_at: int) -> MemoryDisk:
        """The same disk after the process, and nothing else, died: what was written waits to be synced, as it did."""
        other = copy.deepcopy(self)
        other.operations, other.stop_at, other.halfway = 0, stop_at, None
        return other

    def survivors(self, *, draws: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(name, files) of states that may be found after the crash, the extreme ones and `draws` random ones."""
        yield "killed, not cut", {name: bytes(data) for name, data in self.cached.items()}
        rng = random.Random(seed)
        choices = [
            ("nothing unsynced arrived", lambda file, sector: False),
            ("all of it arrived", lambda file, sector: True),
            ("only even sectors", lambda file, sector: sector % 2 == 0),
            ("only odd sectors", lambda file, sector: sector % 2 == 1),
        ]
        for only in sorted({name for name, _, _ in self.pending}):
            choices.append((f"only {only}", lambda file, sector, only=only: file == only))
            choices.append((f"all but {only}", lambda file, sector, only=only: file != only))
        for number in range(draws):
            choices.append((f"sectors at random, draw {number}", lambda file, sector: rng.random() < 0.5))
        for name, arrived in choices:
            for finished in (False, True) if self.halfway else (False,):
                yield f"{name}{', put done' if finished else ''}", self._after(arrived, finished)

    def _after(self, arrived: Callable[[str, int], bool], finished: bool) -> dict[str, bytes]:
        files = self._torn(self.durable, self.pending, arrived)
        if finished and self.halfway:
            name, content = self.halfway
            if content is None:
                files.pop(name, None)
            else:
                files[name] = bytearray(content)
        return {name: bytes(data) for name, data in files.items()}

    @staticmethod
    def _torn(
        durable: dict[str, bytearray], pending: list[tuple[str, int, bytes]], arrived: Callable[[str, int], bool]
    ) -> dict[str, bytearray]:
        """The files with those sectors of the writes that arrived."""
        files = {name: bytearray(data) for name, data in durable.items()}
        decided: dict[tuple[str, int], bool] = {}
        for name, offset, data in pending:
            for start in range(offset - offset % SECTOR, offset + len(data), SECTOR):
                key = (name, start // SECTOR)
                if decided.setdefault(key, arrived(*key)):
                    low, high = max(start, offset), min(start + SECTOR, offset + len(data))
                    files[name][low:high] = data[low - offset : high - offset]
        return files
