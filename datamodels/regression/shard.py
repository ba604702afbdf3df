"""A fit in shards: its targets are split over the rows of a store, which any executor fills and `merge` puts together.

`compute_datamodels --cfg.shards=N` makes the store in `out_dir/shards`, with plan.json beside its arrays; this module's
`main` is what a row runs: an ordinary fit of a slice of the targets, whose result stays in the row's own folder. What
every target shares (rows, split, columns) is hashed once, and a shard that finds other data refuses to be fitted. No
target's answer depends on the others, so the merged result is that of a fit in one piece: to the bit from solvers for
the CPU, within the certified gap from those that hold many targets in one product of a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodels import files, pool
from datamodels.errors import RegressionError
from datamodels.regression import lasso, result
from datamodels.regression.compute_datamodels import compute, read, say
from datamodels.regression.problem import Problem, count_rows
from datamodels.regression.scale import row_blocks
from datamodels.store import Store
from datamodels.store.arrays import SPEC_FILE

PLAN = "plan.json"
RESULT = "result"  # in the row's own folder
GRAM = "gram"  # what all shards multiply; gone when they are merged
RETRIES = 2
SCHEMA = {
    "targets": {"shape": [2], "dtype": "int64"},  # the first, and the one after the last
    "plan": {"shape": [], "dtype": "U32"},  # its digest
    "digest": {"shape": [], "dtype": "U32"},  # of the result in the row's folder
    "nnz": {"shape": [], "dtype": "int64"},
    "gap": {"shape": [], "dtype": "float64", "allow_nonfinite": True},
    "kkt": {"shape": [], "dtype": "float64", "allow_nonfinite": True},
    "seconds": {"shape": [], "dtype": "float64"},
}
# How options are called where a user sets them, as far as that is not their own name in data or cfg.
KEYS = {
    "target_start": "data.target_start_ind",
    "target_end": "data.target_end_ind",
    "patience": "early_stopping.patience",
    "workers": "cfg.num_workers",
}
# What may change between two shards of one fit: no number of the result depends on it.
FREE = ("workers", "device")


PATHS = ("logdir", "data_path")


@dataclass(frozen=True)
class Plan:
    """What each shard fits, and what it must find when it reads the data.

    source, options: what `read` and `compute` take.  counts: rows that fit and that validate.  bounds: (first, after
    the last) target of each shard, in the numbering of the data.  rows, columns: digests of what all targets share.
    targets: a digest per shard.
    """

    source: Mapping[str, Any]
    options: Mapping[str, Any]
    counts: tuple[int, int]
    bounds: tuple[tuple[int, int], ...]
    rows: str
    columns: str
    targets: tuple[str, ...]

    @classmethod
    def make(cls, source: Mapping[str, Any], options: Mapping[str, Any], shards: int) -> Plan:
        """Read the data and plan the shards; RegressionError for what no shard could fit."""
        lasso.PathOptions(**{field.name: options[field.name] for field in fields(lasso.PathOptions)})
        problem, _ = read(**source)
        T = problem.y.shape[1]
        if shards > T:
            raise RegressionError(f"cfg.shards={shards}: there are {T} targets, and a shard needs at least one")
        start = source.get("target_start", 0)
        ends = [T * shard // shards for shard in range(shards + 1)]
        slices = [slice(first, last) for first, last in itertools.pairwise(ends)]
        count, num_val = count_rows(len(problem.rows), source.get("num_train"), source.get("num_val"))
        rows, columns = _shared(problem)
        return cls(
            source=_plain(source),
            options=_plain(options),
            counts=(count - num_val, num_val),  # "all that are complete" may be more when the next shard looks
            bounds=tuple((start + some.start, start + some.stop) for some in slices),
            rows=rows,
            columns=columns,
            targets=tuple(_own(problem, some) for some in slices),
        )

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """The plan of the shards in `folder`; RegressionError where there is none."""
        try:
            state = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            state["bounds"] = tuple((int(first), int(last)) for first, last in state["bounds"])
            state["counts"], state["targets"] = tuple(state["counts"]), tuple(state["targets"])
            return cls(**state)
        except FileNotFoundError:
            raise RegressionError(
                f"{folder}: holds no {PLAN}; a fit in shards begins with "
                f"python -m datamodels.regression.compute_datamodels … --cfg.shards=N"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise RegressionError(f"{folder / PLAN}: not a plan of shards ({error})") from None

    def save(self, folder: Path) -> None:
        with files.whole(folder / PLAN) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    def digest(self) -> str:
        """The same for plans whose shards have the same results."""
        state = asdict(self)
        for name in FREE:
            state["options"].pop(name, None)
        return _hash(json.dumps(state, sort_keys=True).encode())

    def refuse_other(self, source: Mapping[str, Any], options: Mapping[str, Any], shards: int) -> None:
        """RegressionError, by name, where a command asks for another fit than this one."""
        changes = [] if shards == len(self.bounds) else [f"cfg.shards is {len(self.bounds)} there and {shards} here"]
        for section, old, new in (("data", self.source, _plain(source)), ("cfg", self.options, _plain(options))):
            for name in sorted({*old, *new} - set(FREE)):
                if old.get(name) != new.get(name):
                    key = KEYS.get(name, f"{section}.{name}")
                    changes.append(f"{key} is {old.get(name)} there and {new.get(name)} here")
        if changes:
            raise RegressionError(
                f"the fit that was begun there is another one: {'; '.join(changes)}; give the same options to go on "
                f"with it, or name another cfg.out_dir"
            )

    def check(self, shard: int, problem: Problem) -> None:
        """RegressionError unless the shard's problem is the one that was planned."""
        rows, columns = _shared(problem)
        other = [
            what
            for what, planned, found in (
                ("which rows take part, or which of them validate", self.rows, rows),
                ("the columns", self.columns, columns),
                ("the outcomes", self.targets[shard], _own(problem, slice(None))),
            )
            if planned != found
        ]
        if other:
            raise RegressionError(
                f"the data are not those that the fit was planned on; changed: {', '.join(other)}; rows that are "
                f"completed or run again while a fit goes on change it: begin again in another cfg.out_dir"
            )


def main(*, index: int, logdir: str) -> dict[str, Any]:
    """Fit one shard; what the worker calls. The result stays in `logdir`, the row's own folder."""
    folder = Path(logdir)
    plan = Plan.load(folder.parents[1])
    first, last = plan.bounds[index]
    out_dir = folder / RESULT
    result.remove(out_dir)  # of an attempt that ended before its row was committed
    result.remove_unfinished(out_dir)
    source: dict[str, Any] = {
        name: Path(value) if name in PATHS and value else value for name, value in plan.source.items()
    }
    num_train, num_val = plan.counts
    source |= {"num_train": num_train, "num_val": num_val, "target_start": first, "target_end": last}
    started = time.monotonic()
    model = compute(
        out_dir=out_dir,
        check=partial(plan.check, index),
        keep=folder.parents[1] / GRAM,  # the plan refuses other columns, rows and splits
        picture=False,
        **source,
        **{**plan.options, "workers": plan.options["workers"] or _threads()},
    )
    return {
        "targets": np.array([first, last]),
        "plan": plan.digest(),
        "digest": result.digest(model),
        "nnz": int(model.nnz.sum()),
        "gap": model.gap.max(),
        "kkt": model.kkt.max(),
        "seconds": time.monotonic() - started,
    }


def run(
    out_dir: Path, shards: int, source: Mapping[str, Any], options: Mapping[str, Any], pool_options: Sequence[str]
) -> int:
    """Begin a fit in shards, or go on with it, on the workers of a pool, and merge it; the exit code."""
    from datamodels.regression import merge

    out_dir = Path(os.path.abspath(out_dir))
    folder = out_dir / result.SHARDS
    if not (folder / SPEC_FILE).exists():
        result.refuse(out_dir, shards=False)
        plan = Plan.make(source, options, shards)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (folder / SPEC_FILE).exists():  # or somebody else has begun it meanwhile
                plan.save(folder)
                Store.create(folder, {"num_models": shards, "schema": SCHEMA}).close()
    plan = Plan.load(folder)
    plan.refuse_other(source, options, shards)
    if plan.options != _plain(options):
        plan = replace(plan, options=_plain(options))
        plan.save(folder)
    with Store.open(folder) as store:
        done = int(store.completed().sum())
        tried = int(store.layout.row_records()["attempts"][~store.completed()].max(initial=0))
    worker = [f"--worker.logdir={folder}", f"--worker.main_import={__name__}"]
    if done < shards:
        say(
            f"{shards} shards of {plan.bounds[-1][1] - plan.bounds[0][0]} targets, {done} of them done; others may "
            f"help: python -m datamodels.pool {' '.join(worker)}"
        )
        # Whoever gives the command again wants what failed tried again.
        code = pool.main([*worker, f"--worker.retries={tried + RETRIES}", *pool_options])
        if code == 1:
            say("give the same command again to go on from the shards that are done")
        if code:
            return code
    merge.merge(out_dir)
    return 0


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process at a time; RegressionError for a second one."""
    with open(folder / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RegressionError(f"{folder}: another process is at work on it; wait until it is done") from None
        yield


def _threads() -> int | None:
    """This worker's share of the cores, where the pool has set one."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    return int(share) if share.isdigit() and int(share) else None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back, and with whole paths: a worker may run elsewhere."""
    whole = {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in settings.items()}
    plain: dict[str, Any] = json.loads(json.dumps(whole))
    return plain


def _shared(problem: Problem) -> tuple[str, str]:
    """Digests of the rows and their split, and of the columns with their names."""
    rows = _hash(*(np.asarray(part, dtype=np.int64) for part in (problem.rows, problem.train, problem.val)))
    blocks = row_blocks(np.arange(len(problem.x)), problem.x.shape[1])
    penalty = problem.penalty if problem.penalty is not None and problem.penalty.ndim == 1 else None
    return rows, _hash(
        json.dumps([problem.columns, problem.x.dtype.str]).encode(),
        b"" if penalty is None else penalty,
        *(problem.x[block] for block in blocks),
    )


def _own(problem: Problem, targets: slice) -> str:
    """Digest of some targets: their names, outcomes, offsets, and penalties of their own."""
    penalty = problem.penalty if problem.penalty is not None and problem.penalty.ndim == 2 else None
    return _hash(
        json.dumps([problem.targets[targets], problem.y.dtype.str]).encode(),
        *(b"" if part is None else part[:, targets] for part in (problem.y, problem.offset, penalty)),
    )


def _hash(*parts: bytes | np.ndarray) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else np.ascontiguousarray(part).data
        total.update(f"{len(part)} ".encode())
        total.update(data)
    return total.hexdigest()
