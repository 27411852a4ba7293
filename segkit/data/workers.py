"""Worker processes: a function of every sample of a data set, in order, and what a worker sets up when it starts."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from segkit.data.decode import pixel_limit, set_pixel_limit
from segkit.data.samples import SampleSet
from segkit.errors import InputError, first_line
from segkit.memory import keep_freed
from segkit.progress import show
from segkit.runtime import die_with_parent

Result = TypeVar("Result")

START = "fork" if sys.platform == "linux" else "spawn"
"""How workers start: forked ones in milliseconds, and they share the list of samples."""

_work: tuple[Callable[..., Any], SampleSet] | None = None  # of a worker process


def map_samples(
    function: Callable[[SampleSet, int], Result], dataset: SampleSet, indices: Sequence[int], *, workers: int
) -> Generator[Result, None, None]:
    """Yield ``function(dataset, index)`` of every index, in order.

    ``function`` belongs to a module, and its results can be pickled. Raises the InputErrors of ``function``, and one if
    a process dies. Close the generator to end the processes early.
    """
    workers = min(workers, len(indices))
    if workers <= 1:
        yield from (function(dataset, index) for index in indices)
        return
    context = multiprocessing.get_context(START)
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function, dataset, pixel_limit()))
    try:
        with forking():
            results = pool.map(_call, indices, chunksize=max(1, min(16, len(indices) // (4 * workers))))
        yield from results
    except BrokenProcessPool as error:
        raise InputError(
            "a process that reads the data died, probably for want of memory; set workers=0 or fewer"
        ) from error
    except InputError as error:
        raise error from None  # without the worker's traceback
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def forking() -> Iterator[None]:
    """Hold back signals (:func:`signals_later`) and Python's warning of forks while worker processes start."""
    with warnings.catch_warnings(), signals_later():
        # Python 3.12 and later warn of any fork beside threads; the workers never touch CUDA, and use neither OpenCV's
        # nor OpenMP's threads, which a fork would leave broken.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        yield


@contextmanager
def signals_later() -> Iterator[None]:
    """Hold back signals while processes are forked: Python loses an exception that a handler raises in a fork.

    Other threads than the main one get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ours}
    before = {number: handler for number, handler in before.items() if handler is not None}  # None: not Python's
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _start(function: Callable[..., Any], dataset: SampleSet, limit: int) -> None:
    global _work
    _work = function, dataset
    start_worker(limit=limit)


def _call(index: int) -> Any:
    assert _work is not None
    function, dataset = _work
    return function(dataset, index)


def start_worker(number: int = 0, *, limit: int) -> None:
    """Set up a forked or spawned worker: one thread, kept memory, and no part in the main process's signals.

    ``limit`` is the main process's :func:`segkit.data.decode.pixel_limit`, which a spawned worker would not know. The
    ``number`` that torch gives it says nothing.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_not_sent)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    set_pixel_limit(limit)
    one_thread()
    keep_freed()


def _not_sent(error: Exception, item: object) -> None:
    """End this worker, whose ``item`` is lost, as where /dev/shm is full: the main process would wait for ever."""
    show(f"a loading process could not hand over its data ({first_line(error)})", error=True)
    os._exit(1)


def one_thread() -> None:
    """Keep OpenCV and torch to one thread: more would compete with the other workers, and do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    if "torch" in sys.modules:  # counting labels does without it; loading it would take each worker seconds
        import torch

        torch.set_num_threads(1)
