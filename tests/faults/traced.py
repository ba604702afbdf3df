"""One commit, or one run of the worker, under strace from its first call on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.rows import Server


def calls_in(trace: Sequence[str]) -> Counter[str]:
    """How often each system call was made."""
    return Counter(match[1] for line in trace if (match := re.match(r"(\w+)\(", line)))


class Traced:
    """A child of the server that waits at a gate, with strace attached; `go` opens it."""

    def __init__(self, server: Server, folder: Path, options: Sequence[str], **asked: object):
        self.server, self.log = server, folder / "trace"
        server.ask(**asked)
        self.pid = int(server.until("ready")[0])
        self.strace = subprocess.Popen(
            ["strace", "-y", "-o", self.log, *options, "-p", str(self.pid)], stderr=subprocess.PIPE, text=True
        )
        attached = self.strace.stderr.readline()
        assert "attached" in attached, attached

    def go(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """An end without a word, for one who has seen enough."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.strace.wait()
        self.strace.stderr.close()

    def ended(self) -> tuple[int, list[str], list[str]]:
        """(exit code, what the child said, lines of the trace)"""
        said = []
        while (words := self.server.line())[0] != "exit":
            said.append(" ".join(words))
        self.strace.wait()
        self.strace.stderr.close()
        return int(words[2]), said, self.log.read_text(errors="replace").splitlines()
