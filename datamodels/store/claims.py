"""Who may write which row: leases in `claims/`, one heartbeat file per worker process in `runs/`.

A claim is a symbolic link `claims/<row>.<generation>` whose text is the run id of its holder: it appears whole and
at most once, and there is no moment at which it exists without saying whose it is. A claim whose holder is gone is
taken over by making the next generation; the old one is never renamed or removed while its holder might wake up. The
highest generation holds the row.

On one host a takeover needs the holder's commit lock, so a commit is never overtaken, and a holder that lives is never
taken over at all. Across hosts a holder is gone when its heartbeat has not moved for the lease's time to live,
measured by the observer's own monotonic clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datamodels.errors import ClaimLost, StoreError

TIME_TO_LIVE = 120.0
"""Seconds without a heartbeat after which another host may take a row."""


@dataclass(frozen=True)
class Process:
    """Which process, on which machine, since when; equal only for the same living process."""

    host: str
    boot: str  # boot id and process-id namespace: inside one, process ids mean the same
    pid: int
    ticks: str  # when it started, in clock ticks since boot: process ids are used again

    @classmethod
    def current(cls) -> Process:
        return cls(socket.gethostname(), boot_identity(), os.getpid(), start_time(os.getpid()) or "")

    def alive(self) -> bool | None:
        """Whether the process lives, or None where this machine cannot know."""
        if not self.boot or self.boot != boot_identity():
            return None
        return start_time(self.pid) == self.ticks


def boot_identity() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Clock ticks since boot at which a process started, or None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


class Run:
    """This process as one of a store's runs: its record, its heartbeat, its commit lock and the claims it holds."""

    def __init__(
        self, folder: Path, *, network: bool, time_to_live: float = TIME_TO_LIVE, describe: dict[str, Any] | None = None
    ):
        self.folder, self.network, self.time_to_live = folder, network, time_to_live
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self.claims: dict[int, int] = {}  # row -> generation
        self._claims = str(folder / "claims")
        self._seen: dict[str, tuple[Any, float]] = {}  # run elsewhere -> (last beat, when it was first seen)
        self._moving: set[str] = set()
        self._mutex = threading.RLock()
        self._record = {
            "run": self.id,
            **vars(Process.current()),
            "argv": sys.argv,
            "started": time.time(),
            "python": sys.version.split()[0],
            "finished": None,
            "exit": None,
            "beat": 0,
            **(describe or {}),
        }
        for name in ("runs", "claims"):
            (folder / name).mkdir(exist_ok=True)
        self._lock_path = folder / "claims" / f"{self.id}.lock"
        self._lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._last_beat = time.monotonic()
        self._beat()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_for_ever, name="datamodels heartbeat", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ life

    def _beat_for_ever(self) -> None:
        while not self._stop.wait(self.time_to_live / 12):
            with contextlib.suppress(OSError):  # a full disk must not end the run; a beat that failed does not count
                self._beat()

    def _beat(self) -> None:
        with self._mutex:
            now = time.monotonic()
            self._record["beat"] = int(self._record["beat"]) + 1
            path = self.folder / "runs" / f"{self.id}.json"
            beside = path.with_name(f".{path.name}.partial")
            beside.write_text(json.dumps(self._record, indent=1))
            os.replace(beside, path)
            self._last_beat = now

    def close(self, exit_status: int | None = None) -> None:
        """Give back what is held and write how it ended."""
        if self._lock_fd < 0:
            return
        self._stop.set()
        for row in list(self.claims):
            self.release(row, done=False)
        self._record.update(finished=time.time(), exit=exit_status)
        with contextlib.suppress(OSError):
            self._beat()
        with contextlib.suppress(FileNotFoundError):
            self._lock_path.unlink()
        os.close(self._lock_fd)
        self._lock_fd = -1

    # ---------------------------------------------------------------- claims

    def path(self, row: int, generation: int) -> str:
        return f"{self._claims}/{row}.{generation}"

    def take(self, row: int) -> bool:
        """Claim a row: True when this run now holds it alone, False when somebody who lives holds it."""
        if row in self.claims:
            return True
        generation = 0
        while True:
            try:
                os.symlink(self.id, self.path(row, generation))
            except FileExistsError:
                holder = self.holder(row, generation)
                if holder == self.id:  # our own link, acknowledged twice by a network file system
                    self.claims[row] = generation
                    return True
                if holder is None:  # released between the two calls
                    continue
                if os.path.lexists(self.path(row, generation + 1)):
                    generation += 1
                    continue
                taken = self._take_over(row, generation, holder)
                if taken is None:
                    generation += 1
                    continue
                return taken
            except OSError as error:
                raise StoreError(f"{self.path(row, generation)}: cannot claim the row: {error.strerror}") from error
            else:
                self.claims[row] = generation
                return True

    def holder(self, row: int, generation: int) -> str | None:
        try:
            return os.readlink(self.path(row, generation))
        except OSError:
            return None

    def _take_over(self, row: int, generation: int, holder: str) -> bool | None:
        """True: taken. False: the holder lives, or is committing. None: somebody else took it first."""
        if not self._gone(holder):
            return False
        with self._lock_of(holder) as free:
            if not free:
                return False
            try:
                os.symlink(self.id, self.path(row, generation + 1))
            except FileExistsError:
                return None
        self.claims[row] = generation + 1
        return True

    @contextlib.contextmanager
    def _lock_of(self, holder: str) -> Iterator[bool]:
        """Holds another run's commit lock, so that it cannot be in the middle of a commit on this host."""
        try:
            fd = os.open(self.folder / "claims" / f"{holder}.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            yield True
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks; the holder's heartbeat has decided
                pass
            yield True
        finally:
            os.close(fd)

    def _gone(self, holder: str) -> bool:
        """Whether a run has ended: known at once on this host, by its heartbeat standing still elsewhere."""
        record = self.record(holder)
        if record is not None and record.get("finished"):
            return True
        alive = _alive(record)
        if alive is not None:
            return not alive
        beat = None if record is None else record.get("beat")
        before, since = self._seen.setdefault(holder, (beat, time.monotonic()))
        if before != beat:
            self._seen[holder] = (beat, time.monotonic())
            self._moving.add(holder)
            return False
        return time.monotonic() - since > self.time_to_live

    def record(self, run: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / "runs" / f"{run}.json").read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def undecided(self, row: int) -> bool:
        """Whether the row is held by a run of another host that has not been seen to move, and may be gone."""
        generation = 0
        while os.path.lexists(self.path(row, generation + 1)):
            generation += 1
        holder = self.holder(row, generation)
        return (
            holder is not None
            and holder != self.id
            and _alive(self.record(holder)) is None
            and holder not in self._moving
        )

    def held(self, rows: Sequence[int]) -> None:
        """`ClaimLost` unless this run holds every one of `rows`, and on a network file system within its lease."""
        if self.network and time.monotonic() - self._last_beat > self.time_to_live / 2:
            raise ClaimLost(
                f"row {rows[0]}: this process has not renewed its lease for half of "
                f"{self.time_to_live:g} s, so another host may have taken the row; its values are not "
                f"written"
            )
        for row in rows:
            generation = self.claims.get(row)
            if (
                generation is None
                or self.holder(row, generation) != self.id
                or os.path.lexists(self.path(row, generation + 1))
            ):
                self.claims.pop(row, None)
                raise ClaimLost(f"row {row}: another worker holds it now; its values are not written")

    @contextlib.contextmanager
    def committing(self, rows: Sequence[int]) -> Iterator[Callable[[], None]]:
        """The commit lock, with `rows` checked under it; yields the guard to call before every write."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            self.held(rows)
            yield (lambda: self.held(rows)) if self.network else (lambda: None)
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def release(self, row: int, *, done: bool) -> None:
        """Give a row back. Only a row that is done is freed of its older generations: nobody will run it again."""
        generation = self.claims.pop(row, None)
        if generation is None:
            return
        for number in range(generation, -1, -1) if done else (generation,):
            with contextlib.suppress(OSError):
                os.unlink(self.path(row, number))


def _alive(record: dict[str, Any] | None) -> bool | None:
    """Whether the process of a run's record lives, or None where this host cannot know."""
    try:
        return (
            None if record is None else Process(record["host"], record["boot"], record["pid"], record["ticks"]).alive()
        )
    except KeyError:
        return None


def describe_process(cwd: Path | None = None) -> dict[str, Any]:
    """The git commit and whether the tree differs from it, for the run's record; empty outside a checkout."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git_commit": commit, "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
