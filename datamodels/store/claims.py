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

import atexit
import contextlib
import fcntl
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from datamodels import files
from datamodels.errors import ClaimLost, StoreError

TIME_TO_LIVE = 120.0
"""Seconds without a heartbeat after which another host may take a row."""

_LOCK_LEASES = 4
"""Leases for which the commit lock of a silent run on another host is waited for."""

_LOOK_AGAIN = 1.0
"""Seconds between two looks at all claims of a commit (its lease is checked before every write), or at a living run."""


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
    return _boot_identity(os.getpid())  # a child can have process ids of its own


@lru_cache(maxsize=1)
def _boot_identity(pid: int) -> str:
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


def _now() -> float:
    """Seconds on a clock that also runs while the machine sleeps, where there is one: a lease does not sleep."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody removed it
        return None


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
        self._lived: dict[str, tuple[float, dict[str, Any] | None]] = {}  # run not ended -> when seen, its record
        self._mutex = threading.RLock()
        self._record = {
            "run": self.id,
            **vars(Process.current()),
            "argv": sys.orig_argv,  # sys.argv is the user's while their module runs
            "cwd": _current_folder(),
            "started": time.time(),
            "finished": None,
            "exit": None,
            "time_to_live": time_to_live,
            "beat": 0,
            **(describe or {}),
        }
        self.pid = os.getpid()
        self._commits = threading.Lock()
        self._lock_path = folder / "claims" / f"{self.id}.lock"
        self._lock_fd = -1
        self._last_beat = _now()
        try:
            for name in ("runs", "claims"):
                (folder / name).mkdir(exist_ok=True)
            self._lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._beat()
        except OSError as error:
            self._close_lock()
            raise StoreError(
                f"{folder}: cannot enter this process as one of the store's runs: {error.strerror}; to claim or commit "
                f"a row, the folder must be writable and have space"
            ) from error
        self._clear_locks()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_for_ever, name="datamodels heartbeat", daemon=True)
        self._thread.start()
        _RUNS.add(self)
        atexit.register(self.close)

    def _clear_locks(self) -> None:
        """Remove locks of runs that were killed; some at a time, for there may be thousands of living ones."""
        locks = [name for name in os.listdir(self._claims) if name.endswith(".lock")]
        for name in random.sample(locks, min(len(locks), 32)):
            if self._dead(name.removesuffix(".lock")):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._claims}/{name}")

    # ------------------------------------------------------------------ life

    def _beat_for_ever(self) -> None:
        while not self._stop.wait(self.time_to_live / 12):
            with contextlib.suppress(OSError):  # a full disk must not end the run; a beat that failed does not count
                self._beat()

    def _beat(self) -> None:
        with self._mutex:
            now = _now()
            self._record["beat"] = int(self._record["beat"]) + 1
            with files.whole(self.folder / "runs" / f"{self.id}.json", sync=False) as file:
                file.write(json.dumps(self._record, indent=1).encode())
            self._last_beat = now

    def note(self, **facts: Any) -> None:
        """Have the record say more; on the disk with the next heartbeat, or when the run is closed."""
        with self._mutex:
            self._record.update(facts)

    def close(self, exit_status: int | None = None) -> None:
        """Give back what is held and write how it ended."""
        if self._lock_fd < 0 or os.getpid() != self.pid:  # what a process holds is not for its children to give back
            return
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join(timeout=5)
        for row in list(self.claims):
            self.release(row, done=False)
        self._record.update(finished=time.time(), exit=exit_status)
        with contextlib.suppress(OSError):
            self._beat()
        self._close_lock()

    def _close_lock(self) -> None:
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._lock_path)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def forked(self) -> None:
        """In a forked child: let go of the lock's descriptor, or the child would hold the lock after its parent."""
        if self._lock_fd >= 0:
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
            made = self._link(row, generation)
            holder = self.id if made else self.holder(row, generation)
            if holder is None:  # released between two calls
                continue
            if os.path.lexists(self.path(row, generation + 1)):
                # One made just now, below one that is held, says nothing. An older one of ours has to stay: two that
                # are missing in a row would hide what is held above them.
                if made:
                    os.unlink(self.path(row, generation))
                generation += 1
            elif holder == self.id:
                self.claims[row] = generation
                return True
            else:
                with self._overtaking(holder) as allowed:
                    if not allowed:
                        return False
                    made = self._link(row, generation + 1)
                generation += 1
                if made and self.holder(row, generation - 1) != holder:
                    # Since that was looked at, others have taken the row and given it back, with all its claims; who
                    # has it now may not have seen ours.
                    os.unlink(self.path(row, generation))
                    generation = 0

    def _link(self, row: int, generation: int) -> bool:
        """Make a claim unless there is one; whether it was made."""
        try:
            os.symlink(self.id, self.path(row, generation))
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(f"{self.path(row, generation)}: cannot claim the row: {error.strerror}") from error
        return True

    def holder(self, row: int, generation: int) -> str | None:
        try:
            return os.readlink(self.path(row, generation))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"{self.path(row, generation)}: not a claim of this package ({error.strerror}); move it away"
            ) from None

    @contextlib.contextmanager
    def _overtaking(self, holder: str) -> Iterator[bool]:
        """Whether the rows of another run may be taken. While this lasts it cannot be in a commit on this host."""
        if not self._gone(holder):
            yield False
            return
        lock = self.folder / "claims" / f"{holder}.lock"
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            yield True
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not self._left_behind(holder):
                    yield False
                    return
            except OSError:  # a file system without locks; the holder's heartbeat has decided
                pass
            yield True
            if self._dead(holder):
                with contextlib.suppress(OSError):
                    os.unlink(lock)
        finally:
            os.close(fd)

    def _left_behind(self, holder: str) -> bool:
        """Whether nobody may be there to give up the lock of a silent run.

        NFS 3 keeps the locks of a machine that lost its power in a commit until it comes back, which may be never.
        """
        since = self._seen[holder][1] if holder in self._seen else time.monotonic()
        return self.network and time.monotonic() - since > _LOCK_LEASES * self.time_to_live

    def _dead(self, holder: str) -> bool:
        """Whether a run has certainly ended; one of another host that is merely silent has not."""
        return ended(self.record(holder))

    def _gone(self, holder: str) -> bool:
        """Whether a run has ended: known at once on this host, by its heartbeat standing still elsewhere.

        The record of one that lived is not read again within a second: at the end of a large store it holds many rows.
        """
        looked, record = self._lived.get(holder, (-_LOOK_AGAIN, None))
        if time.monotonic() - looked < min(_LOOK_AGAIN, self.time_to_live / 12):
            return _alive(record) is False
        record = self.record(holder)
        if ended(record):
            return True
        self._lived[holder] = (time.monotonic(), record)
        if _alive(record):
            return False
        beat = None if record is None else record.get("beat")
        before, since = self._seen.setdefault(holder, (beat, time.monotonic()))
        if before != beat:
            self._seen[holder] = (beat, time.monotonic())
            self._moving.add(holder)
            return False
        gone = time.monotonic() - since > self.time_to_live
        if gone:
            del self._lived[holder]
        return gone

    def record(self, run: str) -> dict[str, Any] | None:
        return run_record(self.folder, run)

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
        self._within_lease(rows)
        if self.network:
            # A machine that stood still, its clocks too, knows nothing of the time that passed, and NFS may answer from
            # what it remembers of the folder; to open the folder is what makes it ask.
            with contextlib.suppress(OSError):  # one that cannot be read has no claims either
                os.close(os.open(self._claims, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for row in rows:
            if not self.holds(row):
                self.claims.pop(row, None)
                raise ClaimLost(f"row {row}: another worker holds it now; its values are not written")

    def holds(self, row: int) -> bool:
        """Whether the row's highest claim is this run's."""
        generation = self.claims.get(row)
        if generation is None or self.holder(row, generation) != self.id:
            return False
        for wait in (0.01, 0.1, 0.0):  # a claim made upon an old look is withdrawn at once
            if not os.path.lexists(self.path(row, generation + 1)):
                return True
            time.sleep(wait)
        return False

    def _within_lease(self, rows: Sequence[int]) -> None:
        silent = _now() - self._last_beat
        if self.network and silent > self.time_to_live / 2:
            raise ClaimLost(
                f"row {rows[0]}: this process has not renewed its lease for {silent:.0f} s, so another host may have "
                f"taken the row; its values are not written; if main holds the interpreter's lock for so long, give a "
                f"larger --worker.time_to_live than {self.time_to_live:g}"
            )

    def _catch_up(self) -> None:
        """Renew a lease that main has kept this process from renewing, while certainly nobody has taken its rows."""
        if self.network and self.time_to_live / 4 < _now() - self._last_beat < self.time_to_live * 3 / 4:
            with contextlib.suppress(OSError):
                self._beat()

    @contextlib.contextmanager
    def committing(self, rows: Sequence[int]) -> Iterator[Callable[[], None]]:
        """The commit lock, with `rows` checked under it; yields the guard to call before every write."""
        looked = _now()

        def guard() -> None:
            # Within the lease nobody can have taken a row, so looking at all of them can be rarer.
            nonlocal looked
            self._within_lease(rows)
            if _now() - looked > min(_LOOK_AGAIN, self.time_to_live / 4):
                self.held(rows)
                looked = _now()

        self._catch_up()
        with self._commits:  # a thread of this process would share the lock's descriptor, and so the lock
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                self.held(rows)
                yield guard if self.network else (lambda: None)
            finally:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def release(self, row: int, *, done: bool) -> None:
        """Give a row back, and with it the older generations of a row that is done, or whose holders are all dead."""
        generation = self.claims.pop(row, None)
        if generation is None:
            return
        with contextlib.suppress(OSError, StoreError):
            if os.path.lexists(self.path(row, generation + 1)):
                return  # overtaken; with a hole below it, the higher claim would not be found
            older = range(generation)
            if not done and not all(self._dead(self.holder(row, number) or "") for number in older):
                older = range(0)
            for number in (*older, generation):  # the highest last: it is the one that keeps others out
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(row, number))


_RUNS: weakref.WeakSet[Run] = weakref.WeakSet()


def _after_fork() -> None:
    for run in list(_RUNS):
        run.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_record(folder: Path, run: str) -> dict[str, Any] | None:
    """What a run says of itself, or None where it cannot be read."""
    try:
        record = json.loads((folder / "runs" / f"{run}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def ended(record: dict[str, Any] | None) -> bool:
    """Whether a run is over for certain: it said so, or its process on this host is gone."""
    return record is not None and (bool(record.get("finished")) or _alive(record) is False)


def life(folder: Path, run: str) -> str:
    """Whether a run goes on: running, ended, died, silent or unknown; see `Store.run_of`."""
    record = run_record(folder, run)
    if record is None:
        return "unknown"
    if record.get("finished"):
        return "ended"
    alive = _alive(record)
    if alive is not None:
        return "running" if alive else "died"
    with contextlib.suppress(OSError):
        silent = time.time() - os.stat(folder / "runs" / f"{run}.json").st_mtime
        return "silent" if silent > record.get("time_to_live", TIME_TO_LIVE) else "running"
    return "unknown"


def living(folder: Path) -> list[str]:
    """Ids of the runs that have not ended, as far as this host can know."""
    names = sorted(path.stem for path in (folder / "runs").glob("*.json"))
    return [run for run in names if life(folder, run) == "running"]


def who(folder: Path, run: str) -> str:
    """A run in words: its id, host and process."""
    record = run_record(folder, run) or {}
    return f"run {run} on {record.get('host', 'an unknown host')}, process {record.get('pid', 'unknown')}"


def claimants(folder: Path, names: Sequence[str]) -> dict[int, str]:
    """Rows of the claims named, each with the run of the highest generation, dead or alive."""
    top: dict[int, int] = {}
    for name in names:
        row, _, generation = name.partition(".")
        if row.isdecimal() and generation.isdecimal():
            top[int(row)] = max(int(generation), top.get(int(row), 0))
    found: dict[int, str] = {}
    for number, highest in top.items():
        with contextlib.suppress(OSError):
            found[number] = os.readlink(folder / "claims" / f"{number}.{highest}")
    return found


def claimed(folder: Path, names: Sequence[str]) -> dict[int, str]:
    """The same, without the claims of runs that have ended."""
    found = claimants(folder, names)
    over = {run: ended(run_record(folder, run)) for run in set(found.values())}
    return {row: run for row, run in found.items() if not over[run]}


def _alive(record: dict[str, Any] | None) -> bool | None:
    """Whether the process of a run's record lives, or None where this host cannot know."""
    try:
        return (
            None if record is None else Process(record["host"], record["boot"], record["pid"], record["ticks"]).alive()
        )
    except KeyError:
        return None
