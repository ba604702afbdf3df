"""Targets in threads, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event


def each_chunk(
    task: Callable[[slice], tuple[int, int]], T: int, workers: int, size: int, stop: Event
) -> Iterator[tuple[int, int]]:
    """Run task over slices of `size` targets in threads that each have one core; what each returns, as they end.

    When the caller stops listening, `stop` is set: Ctrl-C must not wait for the targets that are still in the queue,
    nor long for those begun.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(task, slice(first, min(first + size, T))) for first in range(0, T, size)]
        try:
            for done in as_completed(tasks):
                yield done.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
