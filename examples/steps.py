"""How the runners of examples show what they do: a title for each step, and commands that also work by themselves."""

from __future__ import annotations

import shlex
import subprocess
import sys


def step(title: str) -> None:
    print(f"\n{title}", flush=True)


def command(module: str, *options: object) -> None:
    """Run `python -m module …`, shown; end this script where it fails."""
    words = [module, *map(str, options)]
    print(f"   $ python -m {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *words], check=False).returncode
    if code:
        sys.exit(code)
