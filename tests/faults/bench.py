"""What an experiment is, and the table that the bench prints when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

FULL = "FAULTS_FULL"  # set by `python -m tests.faults`: the amounts that are too many for every run


class Lost(AssertionError):
    """The store broke one of its promises."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise Lost(what)


@dataclass(frozen=True)
class Experiment:
    """A fault, done to a store again and again. `run(folder, amount)` returns how often it was; `Lost` when it hurt.

    Amounts: `fast` in every run of the tests, `slow` with --runslow, `full` in the bench of its own; None is never.
    `inside`: the store is used in this process, so that this is where a mutant has to be. `quick`: one that catches a
    mutant does so within a second.
    """

    fault: str
    run: Callable[[Path, int], int]
    fast: int | None = None
    slow: int | None = None
    full: int | None = None
    inside: bool = False
    quick: bool = False
    needs: Callable[[], None] = lambda: None  # of tests/needs.py

    def amount(self, *, longer: bool) -> int:
        amount = self.fast if not longer else self.full if os.environ.get(FULL) and self.full else self.slow
        assert amount is not None
        return amount


def table(faults: Iterable[dict], mutants: Iterable[dict]) -> str:
    """Faults that were tried, and which experiment caught which mutant."""
    total: dict[str, list[float]] = {}
    for fault in faults:
        line = total.setdefault(fault["fault"], [0, 0, 0.0])
        for place, what in enumerate(("tried", "lost", "seconds")):
            line[place] += fault[what]
    wide = max(map(len, total), default=0)
    lines = [f"{'fault':{wide}}  {'tried':>8}  {'lost':>4}  {'time':>7}"] if total else []
    lines += [f"{name:{wide}}  {tried:8,}  {lost:4,}  {time:5.1f} s" for name, (tried, lost, time) in total.items()]
    caught: dict[str, list[str]] = {}
    for mutant in mutants:
        caught.setdefault(mutant["mutant"], []).extend([mutant["by"]] if mutant["caught"] else [])
    if caught:
        wide = max(map(len, caught))
        lines += ["", f"{'mutant':{wide}}  caught by"]
        lines += [f"{name:{wide}}  {'; '.join(by) or 'NOBODY: a hole in the bench'}" for name, by in caught.items()]
        lines += ["", f"mutants caught: {sum(map(bool, caught.values()))} of {len(caught)}"]
    return "\n".join(lines)
