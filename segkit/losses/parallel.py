"""Tiles side by side, one per thread.

A tile is some forty small operations. Splitting each of them between the threads of torch would cost as many barriers,
at every one of which a thread that another process (a data worker) keeps from its core holds up all others. So whole
tiles are handed to Python threads whose operations are not split further; torch releases the interpreter lock while it
computes. Results come back in the order of the tiles, so that sums do not depend on who finished first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
State = TypeVar("State")
Result = TypeVar("Result")


def each(
    items: Iterable[Item], do: Callable[[Item, State], Result], make_state: Callable[[], State], *, split: bool
) -> list[Result]:
    """``do(item, state)`` of every item, in order; each thread has a state of its own.

    ``split``: use as many threads as torch does (``torch.get_num_threads``); otherwise the calling one alone.
    """
    todo = list(items)
    threads = min(torch.get_num_threads(), len(todo)) if split else 1
    results: list[Result | None] = [None] * len(todo)
    queue = iter(range(len(todo)))  # next() of it is atomic

    def work() -> None:
        state = make_state()
        with torch.no_grad():  # a property of each thread
            for i in queue:
                results[i] = do(todo[i], state)

    if threads <= 1:
        work()
    else:
        futures = [_pool(torch.get_num_threads()).submit(work) for _ in range(threads)]
        for future in futures:
            future.result()
        # a thread of the pool has set the number for itself and for threads yet to come; here it still stands
        torch.set_num_threads(torch.get_num_threads())
    return results  # type: ignore[return-value]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "segkit-tiles", initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_pool.cache_clear)
