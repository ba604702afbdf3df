"""What a person sees while a pool works: one progress bar, or lines, and in the end what is left to do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from math import inf

import numpy as np
from tqdm import tqdm

from datamodels.executors.share import Share
from datamodels.store import Status
from datamodels.store.reset import clearing

_NAMED = 5


def _after(began: float) -> float:
    """When to do again what began then and has just ended, so that it takes a twentieth of the time at most."""
    now = time.monotonic()
    return now + 20 * (now - began)


def undone(share: Share, status: Status) -> str:
    """What is left of rows that should all be complete, and what to do about it."""
    lines = [
        f"{status.completed} of {status.num_models} rows{share.kind} are complete; {status.failed} failed, "
        f"{status.running} held by other workers, {status.pending} not done"
    ]
    lines += failures(status)
    if status.failures:
        keys = f" --worker.keys={','.join(share.store.keys)}" if share.store.keys else ""
        lines.append(
            f"tracebacks: {share.store.path}/workers/<row>/attempt-*.json; when the cause is gone, "
            f"--worker.index=<row>{keys} runs a row again, and {clearing(share.store)} has the next worker try all of "
            f"them"
        )
    lines += [lacking(share, failed)] if (failed := share.failed_keys()) else []
    return "\n".join(lines)


def lacking(share: Share, failed: Mapping[str, np.ndarray]) -> str:
    """What complete rows do without, and what to do about it; "" where they have all."""
    if not failed:
        return ""
    named = [f"{key} in {len(rows):,}" for key, rows in list(failed.items())[:_NAMED]]
    more = f" and {len(failed) - _NAMED} keys more" if len(failed) > _NAMED else ""
    return (
        f"{counted(failed)}: {', '.join(named)}{more}; see python -m datamodels.store status {share.store.path}; when "
        f"the cause is gone, --worker.keys={','.join(failed)} fills them in"
    )


def counted(failed: Mapping[str, np.ndarray]) -> str:
    """As in `60 keys failed in 40 rows`."""
    keys, rows = sum(map(len, failed.values())), len(np.unique(np.concatenate(list(failed.values()))))
    return f"{keys:,} key{'s' * (keys != 1)} failed in {rows:,} row{'s' * (rows != 1)}"


def failures(status: Status) -> list[str]:
    """A line for each failed row that the status describes, and one for the others."""
    lines = [
        f"  row {f.row}: {f.attempts} attempt{'s' * (f.attempts != 1)}, {f.error or 'no traceback'}"
        for f in status.failures
    ]
    if status.failed > len(status.failures):
        lines.append(f"  … and {status.failed - len(status.failures)} more that failed")
    return lines


class Watch:
    """One progress bar for the rows; off a terminal, a line every fifteen seconds."""

    def __init__(self, share: Share, progress: bool):
        self._share = share
        self._done = int(share.completed().sum())
        terminal = sys.stderr.isatty()
        self._lines = progress and not terminal
        self._started, self._first, self._next = time.monotonic(), self._done, time.monotonic() + 15
        self._looked, self._counted, self._note = -inf, -inf, ""  # from when on to look again
        self._failed, self._lost = share.status(0).failed, share.failed_keys()
        # tqdm shows nothing on a terminal that does not know its size, as under `docker run -t`.
        sized = terminal and all(os.get_terminal_size(sys.stderr.fileno()))
        self._bar = tqdm(
            total=share.count,
            initial=self._done,
            unit="row",
            smoothing=0.1,
            disable=not (progress and terminal),
            **({"dynamic_ncols": True} if sized else {"ncols": 80, "nrows": 24}),
        )

    def look(self, waiting: int = 0, *, now: bool = False) -> int:
        """Show what has changed; how many rows are complete, of late where it takes long to find out, unless `now`.

        `waiting`: workers that have no place yet.
        """
        began = time.monotonic()
        if began < self._looked and not now:
            return self._done
        done = int(self._share.completed().sum())
        self._looked = _after(began)
        if done != self._done:
            self._bar.update(done - self._done)
            self._done = done
        if began > self._counted:
            self._news()
            self._counted = max(_after(began), began + 2)
        self._show(waiting)
        if self._lines and began > self._next:
            self._next = began + 15
            self._line(began)
        return done

    def _news(self) -> None:
        """Count what failed. The first of it is news; later ones are counted."""
        status, lost = self._share.status(0), self._share.failed_keys()
        if status.failed and not self._failed:
            status = self._share.status(1)
            for line in failures(status)[:1]:
                self.write(f"{line.strip()}; see {self._share.store.path}/workers/{status.failures[0].row}")
        if lost and not self._lost:
            key, row = min(((key, int(rows[0])) for key, rows in lost.items()), key=lambda pair: pair[1])
            error = self._share.store.key_error(row, key) or "no traceback"
            self.write(f"row {row}: {key} failed, {error}; see {self._share.store.path}/workers/{row}")
        self._failed, self._lost = status.failed, lost

    def _show(self, waiting: int) -> None:
        notes = [f"{self._failed} failed"] if self._failed else []
        notes += [counted(self._lost)] if self._lost else []
        notes += [f"{waiting} worker{'s' * (waiting > 1)} waiting for a place"] if waiting else []
        if (note := ", ".join(notes)) != self._note:
            self._note = note
            self._bar.set_postfix_str(note)

    def _line(self, now: float) -> None:
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = f", {(self._share.count - self._done) / rate:.0f} s left" if rate else ""
        note = f", {self._note}" if self._note else ""
        line = f"{self._done}/{self._share.count} rows, {rate:.1f} rows/s{left}{note}"
        print(line, file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        done = int(self._share.completed().sum())
        self._bar.update(done - self._done)
        self._done, self._lost = done, self._share.failed_keys()
        self._show(0)
        self._bar.close()
        if self._lines and done > self._first:
            self._line(time.monotonic())
        self._lines = False
