"""What a person reads of a store's progress: a few lines, drawn in place on a terminal, or a line now and then."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from datamodels.store.status import FailedKey, Progress, progress
from datamodels.store.store import Store

_ON_A_TERMINAL, _ELSEWHERE = 2.0, 15.0  # seconds between two looks


def lines(name: str, state: Progress) -> list[str]:
    """All that there is to say, the most important first."""
    share = 100 * state.completed / state.num_models
    out = [
        f"{name}: {state.completed:,} of {state.num_models:,} rows complete ({share:.1f} %), "
        f"{state.running:,} running, {state.failed:,} failed, {state.pending:,} to do"
    ]
    if speed := _speed(state):
        out.append(f"  {speed}")
    for key, rows in state.keys.items():
        if rows < state.completed:
            out.append(f"  {key}: {rows:,} of the complete rows have it{_failed_key(state.failed_keys.get(key))}")
    if state.stale:
        out.append(f"  {state.stale:,} of those to do {_are(state.stale)} held by nobody any more:")
        out += [f"    row {row.row}: {row.run}, which {_gone(row.state)}" for row in state.stale_rows]
    for failure in state.failures:
        times = f"{failure.attempts} attempt{'s' * (failure.attempts != 1)}"
        out.append(f"  row {failure.row}: {times}, {failure.error or 'no traceback'}")
    if state.failed > len(state.failures):
        out.append(f"  … and {state.failed - len(state.failures):,} more that failed (--failures)")
    if state.unfinished:
        out.append("  grow or add-key is at work, or was cut short; run it again to be sure")
    return out


def _failed_key(failed: FailedKey | None) -> str:
    if failed is None:
        return ""
    return f"; it failed in {failed.rows:,}, as in row {failed.first}: {failed.error or 'no traceback'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _gone(state: str) -> str:
    return {"silent": "has been silent for longer than its time to live"}.get(state, state)


def _speed(state: Progress) -> str:
    parts = []
    if state.rate is not None and state.rate_seconds is not None:
        parts.append(f"{_number(state.rate)} in the last {duration(state.rate_seconds)}")
    if state.workers:
        parts.append(f"{state.workers:,} process{'es' * (state.workers != 1)} at work")
    elif state.seconds_left is None:
        parts.append("nobody at work")
    if state.seconds_left is not None:
        parts.append(f"{duration(state.seconds_left)} left")
    return ", ".join(parts) if state.completed < state.num_models else ""


def _number(rate: float) -> str:
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if rate * size >= 1 or unit == "h":
            break
    return f"{rate * size:,.3g} rows/{unit}" if rate * size < 100 else f"{rate * size:,.0f} rows/{unit}"


def duration(seconds: float) -> str:
    """`50 s`, `12 min`, `3 h 20 min`, `4 d 6 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def bar(state: Progress, width: int) -> str:
    """The share of rows that are complete, and of those that failed."""
    size = max(10, width - 2)
    done, failed = (size * part // state.num_models for part in (state.completed, state.failed))
    return "[" + "#" * done + "-" * (size - done - failed) + "x" * failed + "]"


def watch(path: str, *, failures: int = 20, as_json: bool = False, interval: float | None = None) -> None:
    """Show the progress again and again, until all rows are complete.

    On a terminal it is drawn in place; elsewhere, and as JSON, it is a line each time.
    """
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not as_json
    pause = interval or (_ON_A_TERMINAL if sys.stdout.isatty() else _ELSEWHERE)
    frame = Frame()
    store = Store.open(path)
    try:
        while True:
            if store.changed():
                store.close()
                store = Store.open(path)
            state = progress(store, failures=failures)
            if as_json:
                print(json.dumps(asdict(state)), flush=True)
            elif terminal:
                frame.draw(lines(path, state), state)
            else:
                print(line(state), flush=True)
            if state.completed == state.num_models:
                return
            time.sleep(pause)
    finally:
        store.close()


def line(state: Progress) -> str:
    """All in one line, for a log."""
    share = 100 * state.completed / state.num_models
    parts = [f"{state.completed:,}/{state.num_models:,} rows ({share:.1f} %)", _speed(state)]
    parts += [f"{count:,} {what}" for count, what in ((state.failed, "failed"), (state.stale, "stale")) if count]
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}  " + ", ".join(part for part in parts if part)


class Frame:
    """Lines on a terminal that take the place of those before, without a flicker: one write, nothing cleared first."""

    def __init__(self) -> None:
        self._drawn = 0
        self._size = (0, 0)

    def draw(self, text: Sequence[str], state: Progress) -> None:
        size = tuple(shutil.get_terminal_size((80, 24)))
        columns, rows = size
        stamp = f"{datetime.now():%H:%M:%S}"
        shown = [text[0], f"{bar(state, columns - 1 - len(stamp) - 1)} {stamp}", *text[1:]]
        if len(shown) > rows - 1:
            shown = [*shown[: rows - 2], f"  … and {len(shown) - rows + 2} lines more"]
        # Where the window has another size, nobody knows where the lines are now.
        start = f"\x1b[{self._drawn}F" if self._drawn and size == self._size else "\x1b[2J\x1b[H" * bool(self._drawn)
        body = "".join(f"{each[: columns - 1]}\x1b[K\n" for each in shown)
        sys.stdout.write(f"{start}{body}\x1b[J")
        sys.stdout.flush()
        self._drawn, self._size = len(shown), (columns, rows)
