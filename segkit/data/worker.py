"""What every process that reads data sets up for itself."""

from __future__ import annotations

import ctypes
import signal
import sys

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
