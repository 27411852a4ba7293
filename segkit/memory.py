"""How much memory a process has used and may still use, and what to do when it does not suffice."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from segkit.errors import InputError, OutOfMemory, first_line

if TYPE_CHECKING:
    import torch

GIB = 2**30
RESERVE = 256 * 2**20
"""Bytes of the free memory that are left to the system."""

CPU_MESSAGES = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc",
                "Insufficient memory", "Failed to allocate memory")  # fmt: skip
"""What exceptions of torch, OpenCV and onnxruntime say when an allocation on a CPU found no memory."""
LIBRARIES = ("cv2", "onnxruntime")
"""Those of them whose exceptions are no RuntimeError"""

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""(limit, use) of the container that this process runs in, in bytes: version 2 and version 1 of control groups."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # numbers of glibc's mallopt
KEEP_BYTES, OLD_KEEP_BYTES = 2**30, 2**25
"""Freed blocks below this size are kept; older versions of glibc refuse more than the second."""


def keep_freed() -> None:
    """Let glibc keep what this process frees instead of returning it; does nothing with other C libraries.

    Activations and images are fresh allocations of megabytes, whose pages are otherwise mapped and cleared anew in each
    step: 5 to 21 % of the time of one on a CPU. A choice of the user's stays.
    """
    chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if not chosen and (mallopt := _of_glibc("mallopt")):
        mallopt(MMAP_THRESHOLD, KEEP_BYTES) or mallopt(MMAP_THRESHOLD, OLD_KEEP_BYTES)
        mallopt(TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Return what :func:`keep_freed` has kept so far to the system."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Any:
    """The function ``name`` of the C library; None where that is not glibc."""
    import ctypes

    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation on a GPU, by torch or C++ on a CPU, or by Python."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    torch = sys.modules.get("torch")  # not imported for the question: without it there is no such error
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    is_of_library = isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in LIBRARIES
    return is_of_library and any(text in str(error) for text in CPU_MESSAGES)


def _cuda(device: torch.device | None) -> Any:
    """The module torch.cuda for a ``device`` of it, whose memory it knows; else None."""
    return sys.modules["torch"].cuda if device is not None and device.type == "cuda" else None


def peak(device: torch.device | None = None) -> int:
    """The most bytes that this process has held at once: of the GPU's memory, or in RAM."""
    if cuda := _cuda(device):
        return cuda.max_memory_reserved(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total(device: torch.device | None = None) -> int:
    """Bytes that the GPU has, or the machine, or the container if that is less."""
    if cuda := _cuda(device):
        return cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _containers())])


def available(device: torch.device | None = None) -> int:
    """Bytes that this process can still take: free on the GPU, or in RAM within the container's limit."""
    if cuda := _cuda(device):
        reserved_but_unused = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        return cuda.mem_get_info(device)[0] + reserved_but_unused
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    if free is None:  # not Linux: what this process has not taken
        free = total() - peak()
    return max(0, min([free, *(limit - used for limit, used in _containers())]))


def held(device: torch.device | None = None) -> int:
    """Bytes that tensors of this process take on the GPU, or that the process has in RAM now (Linux)."""
    if cuda := _cuda(device):
        return cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


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
    """A value in kB of a file of /proc, in bytes; None where the system has no such file or field."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


@contextlib.contextmanager
def bounded() -> Iterator[int | None]:
    """Let this process take the memory that is available and no more; yields the bytes it may take.

    An allocation beyond that raises an error (:func:`is_out_of_memory` knows it), where the system would end the
    process without a word. Nothing is bounded, and None yielded, where the system does not say what is in use.
    """
    used = _field(Path("/proc/self/status"), "VmData")
    if used is None:
        yield None
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = used + max(0, available() - RESERVE)
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            bound = min(bound, other)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield bound - used
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@dataclass
class Measured:
    """``bytes``: the most that was held at once within :func:`measuring`."""

    bytes: int = 0


def can_measure(device: torch.device) -> bool:
    """Return True where :func:`measuring` works: on a GPU, or under Linux."""
    return device.type == "cuda" or Path("/proc/self/statm").exists()


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[Measured]:
    """Measure the peak within the context: the allocator's own figure on a GPU, a sample every 2 ms on a CPU."""
    result = Measured()
    if cuda := _cuda(device):
        cuda.reset_peak_memory_stats(device)
        yield result
        result.bytes = cuda.max_memory_allocated(device)
        return
    if not can_measure(device):
        raise InputError("auto_batch measures memory on a GPU or under Linux only: set auto_batch=false")
    give_back()
    done = Event()

    def sample() -> None:
        while True:
            result.bytes = max(result.bytes, held())
            if done.wait(0.002):
                return

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


def next_policy(grad_checkpointing: bool | str) -> str:
    """The policy of gradient checkpointing with the next lower need of memory."""
    return {False: "light", "light": "mixed"}.get(grad_checkpointing, "true")


def training_levers(config: dict[str, Any]) -> str:
    """The first three settings of ``config`` (that of the run, as plain values) that would save memory."""
    levers = []
    if config.get("grad_checkpointing") is not True:
        levers.append(f"grad_checkpointing={next_policy(config.get('grad_checkpointing', False))}")
    batch, parts = config.get("batch_size", 1), config.get("accumulate", 1)
    finer = next((number for number in range(parts + 1, batch + 1) if batch % number == 0), None)
    if finer is not None:
        levers.append(f"accumulate={finer} ({batch // finer} of {batch} images at once)")
    crop = config.get("dataset", {}).get("crop")
    levers.append("a smaller dataset.crop" + (f" than {crop}" if crop else ""))
    if config.get("precision", "fp32") == "fp32":
        levers.append("precision=bf16")
    if batch > 1:
        levers.append(f"a smaller batch_size than {batch}")
    return ", or ".join(levers[:3])


def evaluation_levers(config: dict[str, Any]) -> str:
    """What would make an evaluation with ``config`` smaller."""
    levers = []
    batch = config.get("evaluation", {}).get("batch_size", 1)
    if batch > 1:
        levers.append(f"evaluation.batch_size={batch // 2}")
    if config.get("precision", "fp32") == "fp32":
        levers.append("precision=bf16")
    levers.append("dataset.eval_resize.short_side=...")
    return ", or ".join(levers)


def out_of_memory(error: BaseException, *, where: str, levers: str, device: torch.device | None = None) -> OutOfMemory:
    """The exception that says in one sentence what ran out, how much was taken, and what would help."""
    kind = "GPU memory" if _cuda(device) else "RAM"
    return OutOfMemory(
        f"out of memory {where}: at most {peak(device) / GIB:.2f} GiB of {kind} were in use and "
        f"{available(device) / GIB:.2f} GiB are free ({first_line(error)}): set {levers}"
    )
