"""What a row would be called with, and what main returns for it, with nothing written."""

from __future__ import annotations

import inspect
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datamodels.running.ends import last_line
from datamodels.running.routine import Routine, available, unwrapped
from datamodels.running.worker import Worker


def dry_run(worker: Worker, row: int, *, batch: int, rest: Sequence[str]) -> str:
    """What a row would be called with, in a few lines; then what a `describe_row` beside main says of it."""
    store = worker.store
    assignment = store.design.assignment(row)
    routine = worker.routine_for(batch)
    inner = unwrapped(routine.function)[0]
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
        "returns    " + ", ".join(f"{f.name}: {f.dtype} {list(f.shape)}" for f in map(store.field, store.written)),
    ]
    module = sys.modules.get(getattr(inner, "__module__", ""))
    names = [name for name in available(store, many=False) if name not in ("logdir", "smoke")]
    describe = None if module is None else Routine.find(module, "describe_row", names)
    if describe is not None:  # what the module itself can say of a row
        asked = {"keys": tuple(store.written), "measurements": dict(store.spec.measurements or {})}
        given = {"index": row, "seed": assignment.seed, "mask": assignment.mask}
        lines.append(str(describe({**assignment.choices, **given, **asked})))
    return "\n".join(lines)


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsourcefile(function) or "?"
    except TypeError:  # an object with __call__
        return "?"


def smoke(worker: Worker, row: int, *, batch: int) -> str:
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
        if isinstance(value, BaseException):
            lines.append(f"  {key}: failed, {last_line(value)}")
            continue
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        spread = (
            f"min {array.min():.4g}, mean {array.mean():.4g}, max {array.max():.4g}"
            if array.size > 1 and array.dtype.kind in "biuf"
            else str(array.item())
            if array.size == 1
            else ""
        )
        lines.append(f"  {key}: {list(array.shape)} {spread}")
    return "\n".join(lines)
