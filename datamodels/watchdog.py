"""Ends a worker whose row has run out of time and that no longer listens, and records why.

A signal handler in Python does not run while `main` is stuck in C, and neither does any of its threads while C holds
the interpreter's lock; so the deadline is kept by a process of its own. The worker talks to it in lines on its
standard input: `arm SECONDS ROW:ATTEMPT …`, `off` and `end`. It ends with the worker too, and imports nothing until
it has to act.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

_STACK_SECONDS = 3.0  # a busy machine may take longer than the blink that it needs


def main() -> int:
    pid, logdir, stacks = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C is for the worker; this ends when the worker does
        signal.signal(number, signal.SIG_IGN)
    watched = [0]
    with contextlib.suppress(AttributeError, OSError):
        watched.append(os.pidfd_open(pid))  # what main forked may keep standard input open
    deadline: float | None = None
    rows: list[str] = []
    buffer = b""
    while os.getppid() == pid:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(watched, [], [], wait)
        if not ready:
            end(pid, logdir, stacks, rows)
            return 0
        if 0 not in ready:
            return 0
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return 0
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            words = line.decode().split()
            if words[0] == "end":
                return 0
            deadline, rows = (time.monotonic() + float(words[1]), words[2:]) if words[0] == "arm" else (None, [])
    return 0


def end(pid: int, logdir: str, stacks: str, rows: list[str]) -> None:
    """Have the worker's stacks written (faulthandler does that even inside C), record its rows as failed, kill it.

    The worker is stopped before its rows are recorded and killed after: whoever sees it end sees the record too.
    """
    from datamodels.running.output import printed
    from datamodels.store import Store

    if os.getppid() != pid:
        return
    os.kill(pid, signal.SIGUSR2)
    size, latest = -1, time.monotonic() + _STACK_SECONDS
    while time.monotonic() < latest and not 0 < size == os.path.getsize(stacks):  # until it has come, and whole
        size = os.path.getsize(stacks)
        time.sleep(0.1)
    os.kill(pid, signal.SIGSTOP)
    try:
        with open(stacks, encoding="utf-8", errors="replace") as file:
            stack = file.read()
        run = os.path.basename(stacks).removesuffix(".stacks")
        with Store.open(logdir) as store:
            for item in rows:
                row, attempt = map(int, item.split(":"))
                if not store.layout.completed([row])[0]:
                    store.fail(
                        row,
                        attempt,
                        f"{stack}\nJobTimeout: row {row} ran longer than --worker.job_timeout and did not stop when "
                        f"asked; the process was killed",
                        run=run,
                        log=printed(store.path, run, row),
                    )
    finally:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
