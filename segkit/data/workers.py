"""A function of every sample of a data set, in parallel processes, in order."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from segkit.data.samples import SampleSet
from segkit.errors import InputError

Result = TypeVar("Result")


def map_samples(
    function: Callable[[SampleSet, int], Result], dataset: SampleSet, indices: Sequence[int], *, workers: int
) -> Generator[Result, None, None]:
    """``function(dataset, index)`` of every index; ``function`` belongs to a module and its results can be pickled.

    InputError of ``function``, or if a process dies. Close the generator to end the processes early.
    """
    workers = min(workers, len(indices))
    if workers <= 1:
        yield from (function(dataset, index) for index in indices)
        return
    # Forked processes start in milliseconds and share the list of samples.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function, dataset))
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any fork beside threads; decoding uses none (as in the loader).
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
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


_work: tuple[Callable[..., Any], SampleSet] | None = None  # of a worker process


def _start(function: Callable[..., Any], dataset: SampleSet) -> None:
    global _work
    _work = function, dataset
    start_worker()


def _call(index: int) -> Any:
    assert _work is not None
    function, dataset = _work
    return function(dataset, index)


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # numbers of glibc's mallopt
KEEP_BYTES = 2**30


def start_worker() -> None:
    """Set up a forked or spawned worker: one thread, kept memory, and no part in the main process's signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    one_thread()
    keep_memory()


def one_thread() -> None:
    """Threads of OpenCV and torch would compete with the other workers, and do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    if "torch" in sys.modules:  # counting labels does without it; loading it would take each worker seconds
        import torch

        torch.set_num_threads(1)


def keep_memory() -> None:
    """Let glibc keep freed image buffers instead of returning them to the system.

    Every image is a fresh allocation of megabytes; mapping and clearing its pages anew costs as much time as the
    crop and its colour jitter. Does nothing under another C library.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEEP_BYTES)
        mallopt(TRIM_THRESHOLD, KEEP_BYTES)
