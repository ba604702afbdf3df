"""FFCV itself as the engine that reads and writes .beton files, kept on a leash.

FFCV 1.0.2 waits for ever when something raises inside it: its loader for a batch of a thread that has died, its writer
for rows of a process that has. So its loader is watched from here, and its writer runs in a process of its own that
watches its children, and that is gone with us.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from datamodels.errors import RegressionError
from datamodels.regression import beton as betons
from datamodels.regression.beton import Beton, Layout
from datamodels.regression.columns import Source, encode, open_source

PATIENCE = 300.0  # seconds without a row until FFCV counts as stuck; compiling takes it up to 20
ADVICE = "use --{section}.engine=numpy, which reads and writes the same files and needs no FFCV"
_WAIT = 0.2


def require(section: str) -> None:
    """RegressionError where FFCV is not installed."""
    from importlib.util import find_spec

    if find_spec("ffcv") is None:
        raise RegressionError(
            f"{section}.engine=ffcv: FFCV is not installed; run make ffcv, or {ADVICE.format(section=section)}"
        )


def read(
    beton: Beton,
    count: int,
    take: Callable[[int, np.ndarray, np.ndarray], None],
    workers: int | None = None,
    patience: float | None = None,
) -> None:
    """The first `count` rows through FFCV's Loader, in order; take(first, x, y) gets them batch by batch.

    Raises RegressionError where FFCV is missing, raises, or gives no batch for `patience` seconds.
    """
    require("data")
    beton.check_table()  # FFCV trusts it
    reading = _Reading(beton, count, take, workers)
    thread = threading.Thread(target=reading.run, daemon=True, name="ffcv")
    before, threading.excepthook = threading.excepthook, reading.hook
    patience = PATIENCE if patience is None else patience
    try:
        thread.start()
        seen, since = -1, time.monotonic()
        while thread.is_alive() and reading.error is None:
            thread.join(_WAIT)
            if reading.done != seen:
                seen, since = reading.done, time.monotonic()
            elif time.monotonic() - since > patience:
                reading.error = TimeoutError(f"no rows for {patience:.0f} s")
    finally:
        reading.stopped = True
        threading.excepthook = before
    if isinstance(reading.error, RegressionError):
        raise reading.error
    if reading.error is not None:
        raise RegressionError(
            f"{beton.path}: FFCV's loader failed after {max(reading.done, 0)} of {count} rows "
            f"({_told(reading.error)}); {ADVICE.format(section='data')}"
        ) from reading.error


class _Reading:
    """One pass of the Loader, in a thread that can be left behind."""

    def __init__(
        self, beton: Beton, count: int, take: Callable[[int, np.ndarray, np.ndarray], None], workers: int | None
    ):
        self._beton, self._count, self._take, self._workers = beton, count, take, workers
        self.done = -1
        self.error: BaseException | None = None
        self.stopped = False
        self._thread: threading.Thread | None = None

    def hook(self, args: Any) -> None:
        """The loader's own thread dies here; nobody inside FFCV hears of it."""
        if self.error is None:
            self.error = args.exc_value

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = self.error or error

    def _run(self) -> None:
        import torch
        from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor

        beton = self._beton
        row_bytes = beton.columns * beton.x_dtype.itemsize + beton.targets * beton.y_dtype.itemsize
        batch = max(1, min(self._count, 4096, betons.BLOCK_BYTES // row_bytes))
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = torch.get_num_threads()
        loader = Loader(
            str(beton.path),
            batch_size=batch,
            num_workers=min(self._workers or usable, _numba_threads()),
            order=OrderOption.SEQUENTIAL,
            indices=np.arange(self._count),
            drop_last=False,
            os_cache=True,
            pipelines={
                "mask": [NDArrayDecoder(), ToTensor()],
                "targets": [NDArrayDecoder(), ToTensor()],
                "idx": [IntDecoder(), ToTensor()],
            },
        )
        self.done = 0
        for x, y, idx in loader:
            if self.stopped:
                return
            first, last = self.done, self.done + len(x)
            rows = idx.numpy().reshape(-1)
            if not np.array_equal(rows, beton.rows[first:last]):
                raise RegressionError(f"{beton.path}: FFCV gave rows {rows[:3]}…, expected {beton.rows[first:][:3]}…")
            beton.check(first, x.numpy(), y.numpy())
            self._take(first, x.numpy(), y.numpy())
            self.done = last
        if self.done != self._count:
            raise RegressionError(f"{beton.path}: FFCV gave {self.done} of {self._count} rows")
        torch.set_num_threads(threads)


def _numba_threads() -> int:
    from numba import config

    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__


# -- writing ----------------------------------------------------------------------------------------------


def write(
    name: str,
    layout: Layout,
    source: Mapping[str, Any],
    rows: np.ndarray,
    *,
    progress: Callable[[int], None] | None = None,
    patience: float | None = None,
) -> None:
    """Have FFCV's DatasetWriter fill the empty file `name` with these rows of a source.

    source: what columns.open_source takes, for it is opened once more over there.
    Raises RegressionError where FFCV is missing, raises, or writes no row for `patience` seconds.
    """
    require("cfg")
    order = {
        "name": name,
        "samples": layout.samples,
        "columns": layout.columns,
        "targets": layout.targets,
        "x_dtype": layout.x_dtype.name,
        "y_dtype": layout.y_dtype.name,
        "page": layout.page,
        "patience": PATIENCE if patience is None else patience,
        "source": dict(source),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(order)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    asked, said, complained = process.stdin, process.stdout, process.stderr
    assert asked is not None
    assert said is not None
    assert complained is not None
    told: list[bytes] = []
    listener = threading.Thread(target=lambda: told.append(complained.read()), daemon=True)
    listener.start()
    threading.Thread(target=_outlive, args=(process,), daemon=True).start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it has died already, and says why
            asked.write(rows.astype("<i8").tobytes())
            asked.close()
        seen = 0
        for line in said:
            if line.strip().isdigit() and progress is not None:
                progress(int(line) - seen)
                seen = int(line)
        status = process.wait()
    finally:
        with contextlib.suppress(BrokenPipeError):
            asked.close()
        said.close()  # tells it that we are gone, however we go
        process.wait()
        listener.join()
        complained.close()
    if status != 0:
        lines = [line for line in b"".join(told).decode(errors="replace").splitlines() if line.strip()]
        why = f"its process ended by signal {-status}" if status < 0 else lines[-1] if lines else f"status {status}"
        raise RegressionError(f"FFCV's writer failed ({why}); {ADVICE.format(section='cfg')}")


def _outlive(process: subprocess.Popen[bytes]) -> None:
    """When the process is gone, end what it may have left: a worker would hold our pipes open for ever."""
    process.wait()
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)  # which the tracker of shared memory ignores, to tidy up


class _Rows:
    """What FFCV's writer asks: one row at a time, in whichever of its processes; read a block at a time."""

    def __init__(self, source: Source, layout: Layout, counter: Any):
        self._source, self._layout, self._counter = source, layout, counter
        self._first, self._x, self._y = 0, np.empty((0, 0)), np.empty((0, 0))

    def __len__(self) -> int:
        return self._layout.samples

    def __getitem__(self, sample: int) -> tuple[np.ndarray, np.ndarray, int]:
        sample = int(sample)
        if not self._first <= sample < self._first + len(self._x):
            first = sample // 100 * 100  # FFCV hands out a hundred rows at a time
            last = min(first + 100, len(self))
            self._x, self._y = encode(self._source, first, last, self._layout.x_dtype, self._layout.y_dtype)
            self._first = first
        with self._counter.get_lock():
            self._counter.value += 1
        at = sample - self._first
        return self._x[at], self._y[at], int(self._source.rows[sample])


def _child(order: Mapping[str, Any]) -> None:
    """In the process of its own: write, and end it all as soon as anything in it fails or our parent is gone."""
    import multiprocessing

    import ffcv.writer
    from ffcv.fields import IntField, NDArrayField

    multiprocessing.set_start_method("fork", force=True)  # its workers inherit the source
    started: list[Any] = []

    class Watched(multiprocessing.Process):
        def start(self) -> None:
            super().start()
            started.append(self)

    ffcv.writer.Process = Watched  # it forgets its workers and never asks how they ended
    ffcv.writer.tqdm = partial(ffcv.writer.tqdm, disable=True)  # the bar is the parent's
    counter = multiprocessing.Value("Q", 0)
    layout = Layout(
        order["samples"], order["columns"], order["targets"], np.dtype(order["x_dtype"]), np.dtype(order["y_dtype"])
    )
    source = open_source(**order["source"])
    source.rows = np.frombuffer(sys.stdin.buffer.read(8 * layout.samples), dtype="<i8")
    writer = ffcv.writer.DatasetWriter(
        order["name"],
        {
            "mask": NDArrayField(dtype=layout.x_dtype, shape=(layout.columns,)),
            "targets": NDArrayField(dtype=layout.y_dtype, shape=(layout.targets,)),
            "idx": IntField(),
        },
        page_size=order["page"],
        num_workers=min(8, -(-layout.samples // 100), len(os.sched_getaffinity(0))),
    )
    leash = (writer, counter, started, layout.samples, order["patience"])
    threading.Thread(target=_watch, args=leash, daemon=True).start()
    writer.from_indexed_dataset(_Rows(source, layout, counter))


def _watch(writer: Any, counter: Any, workers: list[Any], samples: int, patience: float) -> None:
    """Report rows on stdout; end the process when a worker fails, nothing moves, or the parent has gone."""
    seen, since, why = 0, time.monotonic(), ""
    try:
        while True:
            time.sleep(_WAIT)
            done = min(counter.value, samples)
            print(done, flush=True)  # if nobody reads it any more, our parent has gone, and this raises
            if done != seen:
                seen, since = done, time.monotonic()
            failed = [worker.exitcode for worker in workers if worker.exitcode]
            if failed:
                why = "" if failed[0] > 0 else f"a process of it ended by signal {-failed[0]}"
                break
            if time.monotonic() - since > patience:
                why = f"no rows for {patience:.0f} s"
                break
        print(why, file=sys.stderr, flush=True)  # after what the worker has said
    finally:  # nothing may keep us here, least of all a pipe that nobody reads
        for worker in workers:
            worker.kill()
        with contextlib.suppress(Exception):
            writer.metadata_sm.unlink()
        os._exit(1)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
