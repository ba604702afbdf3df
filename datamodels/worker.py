"""`python -m datamodels.worker`: claim a row, call the user's main, check what came back, commit it.

Exit codes: 0 when every row that it could claim is done; 1 when the row of --worker.index failed, or the store did; 2
for a mistake in the configuration or an import that fails; 3 when rows are left that failed too often; 130 and 143
when it was stopped. SIGUSR1, which SLURM sends before a time limit, ends it with 0 after the row in hand; under SLURM
SIGTERM does so at once, and the row is given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from datamodels import cli
from datamodels.cli import Option
from datamodels.design import RESERVED, Assignment, check_index
from datamodels.errors import ClaimLost, ConfigError, DatamodelsError, RowError, StoreError
from datamodels.row_filter import select
from datamodels.store import Store
from datamodels.store import commit as commits

POOL_VARIABLE = "DATAMODELS_POOL_PID"
GAVE_UP = 3
_STOPS, _LAST_ROW = (signal.SIGTERM, signal.SIGINT), signal.SIGUSR1
_AHEAD = 256  # rows looked at together where others have been
_GRACE = 3.0  # seconds between asking main to stop and killing the process

SECTIONS = {
    "worker": {
        "logdir": Option(str, "the store", required=True),
        "main_import": Option(
            str,
            "dotted module with main(), found from the current folder or the Python path, as in "
            "examples.minimal.train_minimal",
            required=True,
        ),
        "index": Option(int, "run this row and no other; without it, claim pending rows until none is left", min=0),
        "rows": Option(list, "only rows like these: lr=0.1,depth>=3,backbone=vit_s|vit_b,0-99"),
        "batch": Option(int, "rows per call of main_many()", default=1, min=1),
        "retries": Option(int, "how often a row that failed, or whose process died, is tried again", default=2, min=0),
        "job_timeout": Option(int, "seconds after which a call of main is ended and its rows count as failed", min=1),
        "do_if_complete": Option(
            bool,
            "with --worker.index: run a complete row again and replace it once the new values are checked",
            default=False,
        ),
        "sync": Option(
            bool,
            "wait until each commit is on the disk; false is faster and may lose the last seconds to a "
            "power cut, never to a killed process",
            default=True,
        ),
        "time_to_live": Option(
            float, "seconds without a heartbeat after which another host may take over a row", default=120.0, min=1
        ),
        "dry_run": Option(bool, "show what a row would be called with, and stop", default=False),
        "smoke": Option(
            bool,
            "run one row on three batches of data (main's argument `smoke`), check what it returns, write nothing",
            default=False,
        ),
    }
}


class JobTimeout(BaseException):
    """A call of main ran longer than --worker.job_timeout. Not an Exception: a main that catches those still stops."""


class Stopped(BaseException):
    """The process was asked to end; its rows are given back."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


# --------------------------------------------------------------- the user's module


def import_main(name: str) -> ModuleType:
    """The user's module. `ConfigError` where there is none, saying which path was tried, or where its import fails."""
    if not name or "/" in name or name.startswith(".") or name.endswith(".py"):
        raise ConfigError(
            f"--worker.main_import: expected a dotted name as in examples.minimal.train_minimal, got {name!r}; it is "
            f"not a path: leave out .py and write . for /"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            path = Path.cwd() / (name.replace(".", "/") + ".py")
            raise ConfigError(
                f"--worker.main_import: there is no module {name!r}; tried {path} and the Python path "
                f"(sys.path[0] is {sys.path[0]!r}); run it from the folder that the name begins in"
            ) from None
        raise _not_importable(name) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(name) from error


def _not_importable(name: str) -> ConfigError:
    traceback.print_exc()
    error = sys.exc_info()[1]
    assert error is not None
    return ConfigError(f"--worker.main_import: importing {name} failed: {_last_line(error)}; its traceback is above")


@dataclass(frozen=True)
class Routine:
    """A function of the user's module, and which of our arguments it asks for by name."""

    function: Callable[..., Any]
    name: str
    wanted: tuple[str, ...]
    required: tuple[str, ...] = ()  # those among them that have no default

    @classmethod
    def find(cls, module: ModuleType, name: str, available: Sequence[str]) -> Routine | None:
        """The module's function of that name; `ConfigError` when it needs an argument that nobody has."""
        function = getattr(module, name, None)
        if function is None:
            return None
        where = f"{module.__name__}.{name}"
        if not callable(function):
            raise ConfigError(f"{where}: expected a function, got {type(function).__name__}")
        inner, filled = _unwrap(function)
        wanted: list[str] = []
        required: list[str] = []
        missing: list[str] = []
        for parameter in inspect.signature(inner).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                wanted += [n for n in available if n not in wanted]
            elif parameter.kind is parameter.VAR_POSITIONAL:
                continue
            elif parameter.name in available and parameter.kind is not parameter.POSITIONAL_ONLY:
                wanted.append(parameter.name)
                if parameter.default is parameter.empty and parameter.name not in filled:
                    required.append(parameter.name)
            elif parameter.default is parameter.empty and parameter.name not in filled:
                missing.append(parameter.name)
        if missing:
            raise ConfigError(
                f"{where}: asks for {', '.join(missing)}, which a row does not have; it has "
                f"{', '.join(available)}{_hint(missing, available)}; give the argument a default, or name "
                f"a factor of the design"
            )
        return cls(function, where, tuple(wanted), tuple(required))

    def check_blocks(self, store: Store) -> None:
        """`ConfigError` for a block whose rows do not have a factor that the function cannot do without."""
        for number, block in enumerate(store.design.blocks):
            for factor in store.design.factors:
                if factor in self.required and factor not in block.cells[0]:
                    raise ConfigError(
                        f"{self.name}: asks for {factor}, and the rows of design[{number}] ({block.role}) do not have "
                        f"that factor; give the argument a default, or the block `choices` (a block has only its own)"
                    )

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Call it with what it wants of `arguments`: a factor that a row's block does not have is left out."""
        try:
            return self.function(**{name: arguments[name] for name in self.wanted if name in arguments})
        except (Exception, JobTimeout, Stopped):
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                raise  # a real Ctrl-C
            what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
            raise RuntimeError(f"{self.name} {what}; a row ends by returning its values") from error


def _hint(missing: Sequence[str], available: Sequence[str]) -> str:
    return " (the design of this store defines no masks)" if {"mask", "masks"} & set(missing) else ""


def _unwrap(function: Callable[..., Any]) -> tuple[Callable[..., Any], set[str]]:
    """The function inside fastargs' `@param` decorators, and the arguments that they fill."""
    wrapper = getattr(function, "__fastarg_wrapper", function)
    filled: set[str] = set()
    while hasattr(wrapper, "arg_paths") and hasattr(wrapper, "func"):
        filled |= {alias for _, _, alias in wrapper.arg_paths}
        wrapper = getattr(wrapper.func, "__fastarg_wrapper", wrapper.func)
    return wrapper, filled


def available(store: Store, *, many: bool) -> list[str]:
    """Names that `main` (or `main_many`) may ask for."""
    masks = any(block.sampler for block in store.design.blocks)
    names = ["indices", "seeds", "logdirs", "smoke"] if many else ["index", "seed", "logdir", "smoke"]
    names += (["masks"] if many else ["mask"]) if masks else []
    return names + [f for f in store.design.factors if f not in RESERVED]


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and, where it is loaded, torch's global generators from a row's seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    else:
        _LATE_TORCH.seed = seed
        if _LATE_TORCH not in sys.meta_path:
            sys.meta_path.insert(0, _LATE_TORCH)


class _SeedLateTorch(importlib.abc.MetaPathFinder):
    """Seeds torch when it is imported only by main, after the row's seeds were set."""

    seed = 0

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                module.manual_seed(self.seed)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_LATE_TORCH = _SeedLateTorch()


# ------------------------------------------------------------------- the worker


@dataclass
class Tally:
    """What one worker did."""

    committed: int = 0
    failed: int = 0  # attempts that failed
    given_up: int = 0  # rows among them that will not be tried again


class Worker:
    """Runs rows of one store with one module's `main` and `main_many`."""

    def __init__(
        self,
        store: Store,
        main: Routine | None,
        main_many: Routine | None,
        *,
        batch: int = 1,
        retries: int = 2,
        job_timeout: int | None = None,
        rows: np.ndarray | None = None,
    ):
        self.store, self.main, self.main_many = store, main, main_many
        self.batch, self.retries = batch, retries
        self._mine = np.ones(store.num_models, bool) if rows is None else rows  # those that it may run, bool (rows,)
        self._limit = retries  # a row whose attempts are more is not tried again
        self.tally = Tally()
        self._attempts: dict[int, int] = {}  # rows claimed now -> number of this attempt
        self._deadline = Deadline(store, job_timeout)
        self._interruptible = True
        self._stop: int | None = None  # the signal that asked this process to end
        self._last = False  # asked to end after the rows in hand
        self._pid = os.getpid()

    # ------------------------------------------------------------- which rows

    def run_all(self, bar: Callable[[int], object] = lambda rows: None) -> None:
        """Claim and run pending rows until none is left that this worker could claim."""
        while True:
            moved = False
            fresh, again = self._pending()
            # A row that took its process down would take the others of a batch with it, so it is tried again alone.
            for queue, size in ((deque(fresh), self.batch), (deque(again), 1)):
                while rows := self._claim_some(queue, size):
                    before = self.tally.committed
                    self._run_claimed(rows)
                    bar(self.tally.committed - before)
                    moved = True
            # What others failed, gave back or left behind meanwhile is found by another look.
            if self._last or (not moved and not self._wait([*fresh, *again])):
                return

    def _pending(self) -> tuple[list[int], list[int]]:
        """Incomplete rows never tried, and those tried but not too often; from a place of this worker's own onwards."""
        completed, records = self.store.completed(), self.store.layout.row_records()
        rows = np.flatnonzero(self._mine & ~completed & ~self._spent(records))
        offset = int(self.store.run.id[-8:], 16) % self.store.num_models
        rows = np.roll(rows, -int(np.searchsorted(rows, offset)))
        tried = records["attempts"][rows] > 0
        return rows[~tried].tolist(), rows[tried].tolist()

    def _spent(self, records: np.ndarray) -> np.ndarray:
        spent: np.ndarray = (records["state"] == commits.FAILED) & (records["attempts"] > self.retries)
        return spent

    def given_up(self) -> int:
        """How many rows are incomplete and will not be tried again, whoever failed them."""
        return int((self._mine & ~self.store.completed() & self._spent(self.store.layout.row_records())).sum())

    def _claim_some(self, queue: deque[int], size: int) -> list[int]:
        rows: list[int] = []
        while queue and len(rows) < size and not self._last:
            some = sorted(queue.popleft() for _ in range(min(len(queue), size - len(rows))))
            done = self.store.layout.completed(some)  # by another worker; far cheaper to see before claiming
            rows += self._claim([row for row, flag in zip(some, done, strict=True) if not flag])
            if done.any():
                self._skip(queue)
        return sorted(rows)

    def _skip(self, queue: deque[int]) -> None:
        """Drop rows from the front of a queue that are complete: another worker may be many rows ahead of this one."""
        while queue:
            ahead = [queue.popleft() for _ in range(min(len(queue), _AHEAD))]
            order = sorted(ahead)
            done = dict(zip(order, self.store.layout.completed(order), strict=True))
            left = [row for row in ahead if not done[row]]
            queue.extendleft(reversed(left))
            if left:
                return

    def _claim(self, rows: list[int], *, anew: bool = False, complete_too: bool = False) -> list[int]:
        """Claim rows and count an attempt of each; those where there is something (left) to do for this worker."""
        with self._uninterrupted():
            taken = [row for row in rows if self.store.run.take(row)]
            completed, records = self.store.layout.completed(taken), self.store.layout.row_records(taken)
            ready = []
            for place, (row, complete, record) in enumerate(zip(taken, completed, records, strict=True)):
                if complete and not complete_too:
                    self.store.run.release(row, done=True)
                elif not complete and record["attempts"] > self.retries and not anew:
                    if record["state"] != commits.FAILED:
                        self._record_death(row, record)
                    self.store.run.release(row, done=False)
                else:
                    ready.append(place)
            rows = [taken[place] for place in ready]
            begun = self.store.begin(rows, complete=completed[ready], records=records[ready])
            self._attempts.update(zip(rows, begun, strict=True))
            return rows

    def _record_death(self, row: int, record: np.void) -> None:
        attempts, run = int(record["attempts"]), record["run"].decode(errors="replace")
        self.store.fail(
            row,
            attempts,
            f"The process that ran this row died without leaving a word, {attempts} times (killed, out of memory, or "
            f"the machine went down); the last one was runs/{run}.json",
            finished=float(record["started"]),  # it is known when it began
        )
        print(f"row {row}: its process died {attempts} times; it will not be tried again", file=sys.stderr, flush=True)

    def _wait(self, rows: Iterable[int]) -> bool:
        """Wait while another host may have died holding one of these rows; whether to look again."""
        if not any(self.store.run.undecided(row) for row in rows):
            return False
        time.sleep(self.store.run.time_to_live / 12)
        return True

    def run_one(self, row: int, *, do_if_complete: bool = False) -> bool:
        """Run one row, and again while it fails and may be retried; whether it is complete at the end."""
        row = check_index(row, self.store.num_models)
        replace = do_if_complete and bool(self.store.layout.completed([row])[0])
        tried = 0
        while not self.tally.committed and not self.tally.given_up and not self._last:
            if not self._claim([row], anew=tried == 0, complete_too=do_if_complete):
                if self.store.layout.completed([row])[0]:
                    print(f"row {row}: already complete, nothing to do (--worker.do_if_complete runs it again)")
                    return True
                if tried:
                    return False
                raise RowError(f"row {row}: another worker is running it; wait for it, or stop it")
            if replace:  # a complete row's record stays that of the values it holds, so its attempts are counted here
                self._limit = self._attempts[row] + self.retries - 1
                self._attempts[row] += tried
            tried += 1
            self._run_claimed([row], replace=do_if_complete)
        return self.tally.committed > 0

    # ---------------------------------------------------------------- run them

    def _run_claimed(self, rows: list[int], *, replace: bool = False) -> None:
        """Run rows that are claimed, commit what is right, record what is not, and give all of them back."""
        if self.routine_for(len(rows)) is self.main:
            for row in rows:
                try:
                    with self._watched([row]):
                        result = self.call(row)
                except (Exception, JobTimeout) as error:
                    self._failed(row, error)
                else:
                    self._commit({row: result}, replace=replace)
            return
        try:
            with self._watched(rows):
                results = self.call_many(rows)
        except (Exception, JobTimeout) as error:
            if len(rows) == 1:
                self._failed(rows[0], error)
                return
            print(
                f"rows {rows[0]}…{rows[-1]}: main_many failed for the batch ({_last_line(error)}); running its "
                f"{len(rows)} rows one by one",
                file=sys.stderr,
                flush=True,
            )
            for row in rows:
                self._run_claimed([row], replace=replace)
        else:
            self._commit(results, replace=replace)

    def routine_for(self, rows: int) -> Routine:
        """Which function runs so many rows at once: main_many several, and one where there is no main."""
        routine = self.main if self.main is not None and (rows == 1 or self.main_many is None) else self.main_many
        assert routine is not None  # the entry point refuses a module with neither
        return routine

    def call(self, row: int, *, smoke: bool = False, logdir: str | None = None) -> Mapping[str, Any]:
        """What main returns for a row, with the design's own values filled in."""
        if self.main is None:
            (result,) = self.call_many([row], smoke=smoke, logdir=logdir).values()
            return result
        routine = self.main
        assignment = self.store.design.assignment(row)
        seed_everything(assignment.seed)
        with self._folders(routine, "logdir", [row], logdir) as folders:
            result = routine(
                {
                    **assignment.choices,
                    "index": row,
                    "seed": assignment.seed,
                    "mask": assignment.mask,
                    "smoke": smoke,
                    "logdir": folders[0],
                }
            )
        if not isinstance(result, Mapping):
            raise RowError(
                f"row {row}: {routine.name} must return a dict from key to value, got "
                f"{type(result).__name__}; return "
                f"{{{', '.join(f'{k!r}: …' for k in self.store.spec.schema)}}}"
            )
        return self._filled(assignment, result)

    def call_many(
        self, rows: list[int], *, smoke: bool = False, logdir: str | None = None
    ) -> dict[int, Mapping[str, Any]]:
        """What main_many returns for rows, taken apart by row."""
        routine = self.main_many
        assert routine is not None
        assignments = [self.store.design.assignment(row) for row in rows]
        arguments: dict[str, Any] = {
            "indices": np.array(rows, np.int64),
            "seeds": np.array([a.seed for a in assignments], np.int64),
            "smoke": smoke,
        }
        if "masks" in routine.wanted:
            unmasked = [a.row for a in assignments if a.mask is None]
            if unmasked:
                raise RowError(f"row {unmasked[0]}: {routine.name} asks for masks, and the design gives this row none")
            arguments["masks"] = np.stack([a.mask for a in assignments if a.mask is not None])
        for factor in self.store.design.factors:
            arguments[factor] = [a.choices.get(factor) for a in assignments]
        seed_everything(assignments[0].seed)
        with self._folders(routine, "logdirs", rows, logdir) as folders:
            result = routine({**arguments, "logdirs": folders})
        if not isinstance(result, Mapping):
            raise RowError(
                f"rows {rows[0]}…{rows[-1]}: {routine.name} must return a dict from key to an array with a "
                f"leading axis of {len(rows)}, got {type(result).__name__}"
            )
        for key, values in result.items():
            if not hasattr(values, "__len__") or len(values) != len(rows):
                got = list(values.shape) if hasattr(values, "shape") else type(values).__name__
                raise RowError(
                    f"rows {rows[0]}…{rows[-1]}, {key!r}: {routine.name} must return a leading axis of "
                    f"{len(rows)}, one entry per row of `indices`, got {got}"
                )
        return {
            a.row: self._filled(a, {key: values[i] for key, values in result.items()})
            for i, a in enumerate(assignments)
        }

    def _filled(self, assignment: Assignment, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The result with masks and factors of the design where main left them out, and checked where it did not."""
        audit = self.store.audit(assignment)
        for key, value in audit.items():
            if key in result:
                field, where = self.store.spec.schema[key], f"row {assignment.row}"
                if field.encode(result[key], where=where).tobytes() != field.encode(value, where=where).tobytes():
                    raise RowError(
                        f"{where}, {key!r}: main returned something else than the design gives this row; "
                        f"train on the `mask` (or factor) that main is given, or leave it out of the design"
                    )
        return {**audit, **result}

    @contextlib.contextmanager
    def _folders(self, routine: Routine, name: str, rows: list[int], logdir: str | None) -> Iterator[list[str]]:
        """The rows' own folders, made when the routine takes them, gone again where nothing was put in."""
        if name not in routine.wanted:
            yield [""] * len(rows)
            return
        folders = [Path(logdir) / str(row) if logdir else self.store.path / "workers" / str(row) for row in rows]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            yield [str(folder) for folder in folders]
        finally:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    @contextlib.contextmanager
    def _watched(self, rows: list[int]) -> Iterator[None]:
        with self._deadline.over([(row, self._attempts[row]) for row in rows]):
            yield
        if self._stop is not None:  # main went on in spite of it
            raise Stopped(self._stop)

    # -------------------------------------------------------- what came of them

    def _commit(self, results: Mapping[int, Mapping[str, Any]], *, replace: bool) -> None:
        encoded: dict[int, dict[str, bytes]] = {}
        for row, values in results.items():
            try:
                encoded[row] = self.store.encode(row, values)
            except RowError as error:
                self._failed(row, error)
        with self._uninterrupted():
            try:
                self.store.commit_encoded(encoded, replace=replace)
            except StoreError as error:
                if len(encoded) == 1:
                    self._failed(next(iter(encoded)), error)
                    return
                for row, blobs in encoded.items():
                    self._commit_one(row, blobs, replace=replace)
            except ClaimLost:
                for row, blobs in encoded.items():
                    self._commit_one(row, blobs, replace=replace)
            else:
                for row in encoded:
                    self._done(row, replace=replace)

    def _commit_one(self, row: int, blobs: Mapping[str, bytes], *, replace: bool) -> None:
        if not replace and self.store.layout.completed([row])[0]:  # the batch got as far as this row
            self._done(row, replace=replace)
            return
        try:
            self.store.commit_encoded({row: blobs}, replace=replace)
        except ClaimLost as error:
            if self.store.run.holds(row):  # the lease had run out and nobody has come for the row
                self._failed(row, error)
                return
            self._attempts.pop(row, None)
            self.store.run.release(row, done=False)
            print(f"{error}", file=sys.stderr)
        except StoreError as error:
            self._failed(row, error)
        else:
            self._done(row, replace=replace)

    def _done(self, row: int, *, replace: bool) -> None:
        self.tally.committed += 1
        self._attempts.pop(row, None)
        self.store.run.release(row, done=not replace)

    def _failed(self, row: int, error: BaseException) -> None:
        with self._uninterrupted():
            attempts = self._attempts.pop(row)
            again = attempts <= self._limit
            try:
                where = self.store.fail(row, attempts, "".join(traceback.format_exception(error)))
                place = f"; traceback in {where}"
            except StoreError as full:
                place = f"; and its traceback could not be kept ({full})"
            print(
                f"row {row}: attempt {attempts} failed: {_last_line(error)}{place}"
                f"{'; it will be tried again' if again else ''}",
                file=sys.stderr,
                flush=True,
            )
            self.tally.failed += 1
            self.tally.given_up += not again
            self.store.run.release(row, done=False)

    # ------------------------------------------------------------------ signals

    def _in_child(self, number: int) -> bool:
        if os.getpid() == self._pid:
            return False
        signal.signal(number, signal.SIG_DFL)  # a process that main forked ends as if we had never been there
        os.kill(os.getpid(), number)
        return True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._in_child(number):
            return
        self._stop = number
        if self._interruptible:  # a commit takes milliseconds; what it holds is weeks of work
            raise Stopped(number)

    def on_last_row(self, number: int, frame: FrameType | None) -> None:
        """The time is nearly up: finish what is in hand, and claim nothing more."""
        if self._in_child(number) or self._last:
            return
        self._last = True
        os.write(2, b"asked to end: the rows in hand are finished, no other is begun\n")  # print may be at work already

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        if before and self._stop is not None:
            raise Stopped(self._stop)

    def close(self) -> None:
        """Give back the rows in hand, uncounted: that this process ends says nothing against them."""
        self._interruptible = False
        for row, attempts in self._attempts.items():
            with contextlib.suppress(StoreError):
                self.store.give_back(row, attempts)
            self.store.run.release(row, done=False)
        self._attempts.clear()
        self._deadline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _last_line(error: BaseException) -> str:
    if isinstance(error, (DatamodelsError, JobTimeout)):
        return f"{type(error).__name__}: {error}"
    return traceback.format_exception_only(error)[-1].strip()


class Deadline:
    """Ends a call of main in time: first by a signal, then, if it is stuck in C or does not listen, by the watchdog."""

    def __init__(self, store: Store, seconds: int | None):
        self.seconds = seconds
        if seconds is None:
            return
        self._stacks = store.path / "runs" / f"{store.run.id}.stacks"
        self._file = open(self._stacks, "w")  # noqa: SIM115 - faulthandler keeps it until close()
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        read, self._pipe = os.pipe()
        self._dog = subprocess.Popen(
            [sys.executable, "-m", "datamodels.watchdog", str(os.getpid()), str(store.path), str(self._stacks)],
            stdin=read,
            start_new_session=True,
        )
        os.close(read)

    @contextlib.contextmanager
    def over(self, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        """`rows` are (row, attempt); raises `JobTimeout` inside when their time is up."""
        if self.seconds is None:
            yield
            return

        def ring(number: int, frame: FrameType | None) -> None:
            raise JobTimeout(f"ran longer than --worker.job_timeout={self.seconds} s")

        before = signal.signal(signal.SIGALRM, ring)
        self._say(f"arm {self.seconds + _GRACE} " + " ".join(f"{row}:{attempt}" for row, attempt in rows))
        try:
            signal.alarm(self.seconds)
            yield
        finally:
            try:
                signal.alarm(0)  # it may ring just before this
            finally:
                self._say("off")
                signal.signal(signal.SIGALRM, before)

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody ended the watchdog; the alarm still rings
            os.write(self._pipe, line.encode() + b"\n")

    def close(self) -> None:
        if self.seconds is not None:
            self._say("end")  # what main forked may hold the pipe open
            os.close(self._pipe)
            self._dog.wait()
            faulthandler.unregister(signal.SIGUSR2)
            self._file.close()
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()


# --------------------------------------------------------------- the entry point


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = cli.parse(
        "python -m datamodels.worker",
        "Run rows of a store: call main() of a module of yours, check what it returns, and commit it.",
        SECTIONS,
        argv,
        passthrough=True,
        help_later="worker.main_import",
        elsewhere=("pool",),
    )
    program = sys.argv[0]
    sys.argv = [program, *args.rest]  # what the user's module sees, from its import on
    if args.help_requested:
        import_main(args["worker.main_import"])
        cli.collect_user(args)
    one, index = args.get("worker.index") is not None, args.get("worker.index")
    if args["worker.do_if_complete"] and not one:
        raise ConfigError("--worker.do_if_complete: replaces one complete row; name it with --worker.index=ROW")
    leave_with_parent()
    store = Store.open(args["worker.logdir"], sync=args["worker.sync"], time_to_live=args["worker.time_to_live"])
    showing = args["worker.dry_run"] or args["worker.smoke"]
    if one:  # before anything is imported or trained
        try:
            check_index(index, store.num_models)
        except RowError as error:
            raise ConfigError(f"--worker.index ({args.where('worker.index')}): {error}") from None
        if not args["worker.do_if_complete"] and not showing and store.layout.completed([index])[0]:
            print(f"row {index}: already complete, nothing to do (--worker.do_if_complete runs it again)")
            return 0
    rows: np.ndarray | None = None
    if args.given("worker.rows"):
        where = f"--worker.rows ({args.where('worker.rows')})"
        if one:
            raise ConfigError(f"{where}: chooses among many rows, and --worker.index names one; leave one of them out")
        rows = select(store.design, args["worker.rows"], where=where)
    module = import_main(args["worker.main_import"])
    cli.collect_user(args)
    single = Routine.find(module, "main", available(store, many=False))
    many = Routine.find(module, "main_many", available(store, many=True))
    if single is not None:
        single.check_blocks(store)  # main_many is given a list, with None where a row does not have a factor
    if single is None and many is None:
        raise ConfigError(f"{module.__name__} ({getattr(module, '__file__', '?')}): has neither main() nor main_many()")
    if args["worker.batch"] > 1 and many is None:
        raise ConfigError(
            f"--worker.batch: {module.__name__} has no main_many() that could run several rows at once; "
            f"write one, or leave the option out"
        )
    for routine in (single, many):
        if routine is not None and _blind(routine, store):
            print(
                f"note: the design gives rows masks, and {routine.name} does not ask for `mask`: unless it returns the "
                f"mask itself, rows are recorded with masks that it may not have trained on",
                file=sys.stderr,
            )
    if showing:
        with Worker(store, single, many) as worker:
            row = index if one else _first_pending(store, rows)
            show = dry_run if args["worker.dry_run"] else smoke
            print(show(worker, row, batch=1 if one else args["worker.batch"], rest=args.rest))
        return 0
    exit_status: int | None = None
    before = {number: signal.getsignal(number) for number in (*_STOPS, _LAST_ROW)}
    try:
        with contextlib.suppress(OSError), open(store.path / "cmds.txt", "a", encoding="utf-8") as commands:
            commands.write(shlex.join([program, *argv]) + "\n")
        exit_status = _work(store, single, many, args, one, index, rows)
    finally:
        for number in before:  # it is ending already
            signal.signal(number, signal.SIG_IGN)
        store.close(exit_status)
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_status


def _work(
    store: Store,
    single: Routine | None,
    many: Routine | None,
    args: cli.Arguments,
    one: bool,
    index: int | None,
    rows: np.ndarray | None,
) -> int:
    started = time.monotonic()
    with Worker(
        store,
        single,
        many,
        batch=args["worker.batch"],
        retries=args["worker.retries"],
        job_timeout=args.get("worker.job_timeout"),
        rows=rows,
    ) as worker:
        try:
            for number in _STOPS:
                signal.signal(number, worker.on_signal)
            signal.signal(_LAST_ROW, worker.on_last_row)
            if one:
                assert index is not None
                complete = worker.run_one(index, do_if_complete=args["worker.do_if_complete"])
                if complete and worker.tally.committed:
                    print(f"row {index}: complete ({time.monotonic() - started:.1f} s)")
                return 0 if complete else 1
            quiet = not sys.stderr.isatty() or POOL_VARIABLE in os.environ
            mine = np.ones(store.num_models, bool) if rows is None else rows
            done = int((mine & store.completed()).sum())
            with tqdm(total=int(mine.sum()), initial=done, unit="row", disable=quiet) as bar:
                worker.run_all(bar.update)
        except Stopped as stop:
            print(
                f"stopped by {signal.Signals(stop.number).name}; {worker.tally.committed} rows committed, rows in hand "
                f"are given back",
                file=sys.stderr,
            )
            return 0 if stop.number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ else 128 + stop.number
    given_up = worker.given_up()
    print(
        f"{worker.tally.committed} rows committed, {worker.tally.failed} attempts failed"
        + (f"; {given_up} rows of the store failed too often to be tried again" if given_up else "")
    )
    return GAVE_UP if given_up else 0


def leave_with_parent() -> None:
    """Under a pool, be asked to stop when the pool dies, so that no orphan goes on training."""
    parent = os.environ.get(POOL_VARIABLE)
    if parent and hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            raise SystemExit(143)


def _blind(routine: Routine, store: Store) -> bool:
    """Whether the design has masks that the routine does not ask for."""
    return any(block.sampler for block in store.design.blocks) and not {"mask", "masks"} & set(routine.wanted)


def _first_pending(store: Store, rows: np.ndarray | None) -> int:
    mine = np.arange(store.num_models) if rows is None else np.flatnonzero(rows)
    pending = mine[~store.completed()[mine]]
    return int((pending if len(pending) else mine)[0])


def dry_run(worker: Worker, row: int, *, batch: int, rest: Sequence[str]) -> str:
    """What a row would be called with, in a few lines."""
    store = worker.store
    assignment = store.design.assignment(row)
    routine = worker.routine_for(batch)
    inner = _unwrap(routine.function)[0]
    absent = set(store.design.factors) - set(assignment.choices) if routine is worker.main else set()
    passed = [name for name in routine.wanted if name not in absent]
    mask = (
        "none"
        if assignment.mask is None
        else f"{int(assignment.mask.sum()):,} of {assignment.mask.size:,} examples (block {assignment.block}, mask "
        f"{assignment.mask_id}, repeat {assignment.repeat})"
    )
    lines = [
        f"row        {row} of {store.num_models} ({assignment.role})",
        f"seed       {assignment.seed}",
        f"mask       {mask}",
        f"choices    {', '.join(f'{k}={v!r}' for k, v in assignment.choices.items()) or 'none'}",
        f"calls      {routine.name}({', '.join(passed)}) in {_source(inner)}",
        f"sys.argv   {' '.join(rest) or '(empty)'}",
        "returns    " + ", ".join(f"{k}: {f.dtype} {list(f.shape)}" for k, f in store.spec.schema.items()),
    ]
    return "\n".join([*lines, *cli.user_values()])


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsourcefile(function) or "?"
    except TypeError:  # an object with __call__
        return "?"


def smoke(worker: Worker, row: int, *, batch: int, rest: Sequence[str]) -> str:
    """Run a row (or a batch from it) on three batches of data, check what it returns, write nothing."""
    store, started = worker.store, time.monotonic()
    routine = worker.routine_for(batch)
    if "smoke" not in routine.wanted:
        print(f"note: {routine.name} takes no argument `smoke`, so the whole row is run", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="datamodels-smoke-") as folder:
        if routine is worker.main_many:
            rows = list(range(row, min(row + batch, store.num_models)))
            results = worker.call_many(rows, smoke=True, logdir=folder)
        else:
            results = {row: worker.call(row, smoke=True, logdir=folder)}
    encoded = {r: store.encode(r, values) for r, values in results.items()}
    lines = [
        f"smoke: {len(encoded)} row{'s' if len(encoded) > 1 else ''} from {row} in {time.monotonic() - started:.1f} s; "
        f"every value fits the schema; nothing was written"
    ]
    for key, value in results[row].items():
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        spread = (
            f"min {array.min():.4g}, mean {array.mean():.4g}, max {array.max():.4g}"
            if array.size and array.dtype.kind in "biuf"
            else ""
        )
        lines.append(f"  {key}: {list(array.shape)} {spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        cli.run(main)
    except DatamodelsError as error:  # raised while a signal ended the process
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
