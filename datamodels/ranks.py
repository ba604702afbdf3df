"""A row that needs several GPUs or nodes: the ranks that torchrun started are one worker.

    torchrun --nproc_per_node=2 -m datamodels.worker --worker.logdir=DIR --worker.main_import=MODULE

Rank 0 claims rows, tells the others which and commits what its own `main` returns; every rank calls `main` with the
same arguments. They talk through torchrun's own TCP store, at MASTER_ADDR:MASTER_PORT. A row that fails on one rank
has failed, and ends the worker on all of them, because what they had in common (a process group, say) is of no more
use: torchrun exits with an error, or starts them again with --max_restarts. torch is imported under torchrun alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from datamodels.errors import ConfigError, RowError
from datamodels.running.ends import Stopped
from datamodels.store import Store
from datamodels.store.claims import Process

_GOING = 0.2  # seconds from a killed rank's broken connections until its process is seen to be gone
_GRACE = 3.0  # seconds in which rank 0 is to hear of another rank's failure, before that one ends and all are ended


class Ranks:
    """This process among those that torchrun started for one worker."""

    def __init__(self) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ConfigError("torchrun: ranks cannot talk to each other; start it with --rdzv_backend=c10d or static")
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        agent = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        self._keys = PrefixStore(f"datamodels/{attempt}", agent)
        self._calls, self._parent = 0, os.getppid()
        self._set(f"process/{self.rank}", vars(Process.current()))
        if attempt != "0":
            # main's process group would find addresses there of ranks that ended, before new ones have replaced them.
            if self.rank == 0:
                self._fresh = TCPStore(address, 0, is_master=True, wait_for_workers=False)
                self._set("port", self._fresh.port)
            self._keys.wait(["port"])
            os.environ["MASTER_PORT"] = str(self._get("port"))

    # ---------------------------------------------------------------- rank 0

    @contextlib.contextmanager
    def together(self, attempts: Sequence[tuple[int, int]], **call: Any) -> Iterator[None]:
        """Around rank 0's call of main: the others make the same one, and all must have come to its end.

        `attempts` are (row, number of its attempt). Raises `RowError` where another rank failed or died.
        """
        number, self._calls = self._calls, self._calls + 1
        self._set(f"call/{number}", {"attempts": attempts, **call})
        try:
            yield
            for rank in range(1, self.size):
                while self._get(f"end/{number}/{rank}") is None:
                    time.sleep(0.01)
            if problem := self._problem(number):
                raise RowError(problem)
        except (Exception, Stopped) as error:
            cause = error if isinstance(error, (ConfigError, RowError)) else self._cause(number, error)
            if cause is error:
                raise
            raise cause from error
        finally:
            self._set(f"over/{number}", True)

    def _cause(self, number: int, error: Exception | Stopped) -> Exception | Stopped:
        """Why a call ended: another rank that failed shows here as a broken connection, then as torchrun ending us."""
        if isinstance(error, RuntimeError):
            try:
                time.sleep(_GOING)
            except Stopped as stop:
                error = stop
        if os.getppid() != self._parent:  # torchrun itself was killed, which says nothing against the row
            return Stopped(signal.SIGTERM)
        problem = self._problem(number)
        return error if problem is None else RowError(problem)

    def _problem(self, number: int) -> str | None:
        for rank in range(1, self.size):
            end = self._get(f"end/{number}/{rank}")
            if end is not None and end["traceback"]:
                return f"rank {rank} failed:\n{end['traceback']}"
            if end is None and self._get(f"stopped/{rank}") is None:
                process = self._get(f"process/{rank}")
                if process is not None and Process(**process).alive() is False:
                    return f"rank {rank} died without leaving a word (killed, or out of memory)"
        return None

    # ------------------------------------------------------------ other ranks

    def follow(self, store: Store, invoke: Callable[..., Any]) -> int:
        """Make the calls that rank 0 announces until it says that there are no more; the exit code."""
        while True:
            number, self._calls = self._calls, self._calls + 1
            wait = 0.001
            while (call := self._get(f"call/{number}")) is None:
                if self._get("end") is not None:
                    return 0
                time.sleep(wait)
                wait = min(2 * wait, 0.1)
            attempts = call.pop("attempts")
            try:
                invoke([row for row, _ in attempts], **call)
            except Stopped:
                self._set(f"stopped/{self.rank}", True)
                raise
            except Exception as error:
                words = "".join(traceback.format_exception(error))
                self._set(f"end/{number}/{self.rank}", {"traceback": words})
                self._leave_word(store, number, attempts, words)
                return 1
            self._set(f"end/{number}/{self.rank}", {"traceback": None})

    def _leave_word(self, store: Store, number: int, attempts: Sequence[tuple[int, int]], words: str) -> None:
        """See that the traceback is kept, also where rank 0 hangs in a call to this one and will be killed."""
        end = time.monotonic() + _GRACE
        while time.monotonic() < end:
            if self._get(f"over/{number}") is not None:
                return
            time.sleep(0.02)
        for row, attempt in attempts:
            name = f"workers/{row}/{store.attempt_name}-{attempt}-rank{self.rank}.json"
            report = {"row": row, "attempt": attempt, "rank": self.rank, "run": store.run.id, "traceback": words}
            store.disk.put(name, (json.dumps(report, indent=1) + "\n").encode())

    # ------------------------------------------------------------------ both

    def close(self) -> None:
        if self.rank == 0:
            self._set("end", True)

    def _set(self, key: str, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun has gone, and ends us
            self._keys.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        """The value of a key, or None where there is none."""
        return json.loads(self._keys.get(key)) if self._keys.check([key]) else None


@contextlib.contextmanager
def joined() -> Iterator[Ranks | None]:
    """The ranks that this process is one of, or None where torchrun did not start it, or not with others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield None
        return
    # PR_SET_PDEATHSIG: end when torchrun is killed. Rank 0 has rows to give back, and wakes when the others are gone.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM if os.environ["RANK"] == "0" else signal.SIGKILL)
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()
