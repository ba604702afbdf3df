"""What a person sees while a pool works: one progress bar, or lines, and in the end what is left to do."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm

from datamodels.executors.share import Share
from datamodels.store import Status


def undone(share: Share, status: Status) -> str:
    """What is left of rows that should all be complete, and what to do about it."""
    lines = [
        f"{status.completed} of {status.num_models} rows{share.kind} are complete; {status.failed} failed, "
        f"{status.running} held by other workers, {status.pending} not done"
    ]
    lines += failures(status)
    if status.failures:
        lines.append(
            f"tracebacks: {share.store.path}/workers/<row>/attempt-*.json; when the cause is gone, "
            f"--worker.index=<row> runs a row again, or a larger --worker.retries all of them"
        )
    return "\n".join(lines)


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
        self._failed_at, self._failed, self._note = 0.0, share.status(0).failed, ""
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

    def look(self, waiting: int = 0) -> int:
        """Show what has changed; how many rows are complete. `waiting`: workers that have no place yet."""
        now = time.monotonic()
        done = int(self._share.completed().sum())
        if done != self._done:
            self._bar.update(done - self._done)
            self._done = done
        if now - self._failed_at > 2:
            self._failed_at = now
            status = self._share.status(0)
            if status.failed and not self._failed:  # the first one is news; later ones are counted
                status = self._share.status(1)
                for line in failures(status)[:1]:
                    self.write(f"{line.strip()}; see {self._share.store.path}/workers/{status.failures[0].row}")
            self._failed = status.failed
        notes = [f"{self._failed} failed"] if self._failed else []
        notes += [f"{waiting} worker{'s' * (waiting > 1)} waiting for a place"] if waiting else []
        if (note := ", ".join(notes)) != self._note:
            self._note = note
            self._bar.set_postfix_str(note)
        if self._lines and now > self._next:
            self._next = now + 15
            self._line(now)
        return done

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
        self._done, self._note = done, f"{self._failed} failed" if self._failed else ""
        self._bar.set_postfix_str(self._note)
        self._bar.close()
        if self._lines and done > self._first:
            self._line(time.monotonic())
        self._lines = False
