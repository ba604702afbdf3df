"""Ends a worker whose row has run out of time and that no longer listens, and records why.

A signal handler in Python does not run while `main` is stuck in C, and neither does any of its threads while C holds
the interpreter's lock; so the deadline is kept by a process of its own. The worker talks to it in lines on its
standard input: `arm SECONDS ROW:ATTEMPT …` and `off`; the end of the input ends it. It imports nothing until it has
to act.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time


def main() -> int:
    pid, logdir, stacks = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C is for the worker; this ends when its input does
        signal.signal(number, signal.SIG_IGN)
    deadline: float | None = None
    rows: list[str] = []
    buffer = b""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([0], [], [], wait)
        if not ready:
            end(pid, logdir, stacks, rows)
            return 0
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return 0
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            words = line.decode().split()
            deadline, rows = (time.monotonic() + float(words[1]), words[2:]) if words[0] == "arm" else (None, [])


def end(pid: int, logdir: str, stacks: str, rows: list[str]) -> None:
    """Have the worker's stacks written (faulthandler does that even inside C), kill it, record its rows as failed."""
    try:
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    from datamodels.store import Store
    from datamodels.store.claims import start_time

    while start_time(pid) is not None:
        time.sleep(0.01)
    try:
        with open(stacks, encoding="utf-8", errors="replace") as file:
            stack = file.read()
    except OSError:
        stack = ""
    with Store.open(logdir) as store:
        for item in rows:
            row, attempt = map(int, item.split(":"))
            if not store.completed()[row] and store.run.take(row):
                store.fail(
                    row,
                    attempt,
                    f"{stack}\nJobTimeout: row {row} ran longer than --worker.job_timeout and did "
                    f"not stop when asked; the process was killed",
                )
                store.run.release(row, done=False)


if __name__ == "__main__":
    sys.exit(main())
