"""How much memory a process has used and may still use, and an error in place of a killed process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

RESERVE = 256 * 2**20
"""Bytes of the free memory that are left to the system."""

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files with the limit and the use of a container, in both versions of Linux's control groups."""


def peak_of_process() -> int:
    """The most bytes of memory that this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total() -> int:
    """Bytes that the machine has, or the container if that is less."""
    limits = [limit for limit, _ in _containers()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def available() -> int | None:
    """Bytes that can still be had without swapping, in the container's bounds; None where the system does not say."""
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        return None
    return max(0, min([free, *(limit - used for limit, used in _containers())]))


def _containers() -> list[tuple[int, int]]:
    """(limit, use) in bytes of the control groups that have a limit."""
    found = []
    for names in CGROUPS:
        try:
            limit, used = (Path(name).read_text(encoding="ascii").strip() for name in names)
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():
            found.append((int(limit), int(used)))
    return found


def _field(path: Path, name: str) -> int | None:
    """A value in kB of a file of /proc, in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


@contextlib.contextmanager
def bounded() -> Iterator[int | None]:
    """Let this process take what memory is available and no more; yields the bytes it may take.

    An allocation beyond that raises an error (:func:`is_exhausted` knows it), where the system would end the process
    without a word. Nothing is bounded, and None yielded, where the system does not say what is available.
    """
    free, held = available(), _field(Path("/proc/self/status"), "VmData")
    if free is None or held is None:
        yield None
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = held + max(0, free - RESERVE)
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            bound = min(bound, other)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield bound - held
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_exhausted(error: BaseException) -> bool:
    """True for the error of an allocation that found no memory, on a CPU."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "bad_alloc" in str(error)
