"""How much memory a step takes, how much there is, and what to do when it does not suffice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from segkit.errors import InputError

GIB = 2**30
CPU_MESSAGES = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""(limit, use) of the container this process is in, in bytes; version 2 and version 1."""


class OutOfMemory(RuntimeError):
    """A step did not fit into memory; the message says how much was taken and what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation on a GPU, by torch on a CPU, or by Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_MESSAGES)


def peak(device: torch.device) -> int:
    """The most bytes that this process has held at once: of the GPU's memory, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available(device: torch.device) -> int:
    """Bytes that this process could still take: free on the GPU, or in RAM under the container's limit."""
    if device.type == "cuda":
        reserved_but_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved_but_unused
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit_file, use_file in CGROUP_FILES:
        if Path(limit_file).exists() and Path(use_file).exists():
            limit = Path(limit_file).read_text(encoding="ascii").strip()
            if limit != "max":
                free = min(free, max(0, int(limit) - int(Path(use_file).read_text(encoding="ascii"))))
    return free


def resident() -> int:
    """Bytes of this process that are in RAM now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Measured:
    """``bytes``: the most that was held at once within :func:`measuring`."""

    bytes: int = 0


@contextmanager
def measuring(device: torch.device) -> Iterator[Measured]:
    """Measure the peak within the context: the allocator's own figure on a GPU, a sample every 2 ms on a CPU."""
    result = Measured()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.bytes = torch.cuda.max_memory_allocated(device)
        return
    if not Path("/proc/self/statm").exists():
        raise InputError("auto_batch measures memory on a GPU or under Linux only: set auto_batch=false")
    done = Event()

    def sample() -> None:
        while True:
            result.bytes = max(result.bytes, resident())
            if done.wait(0.002):
                return

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


def training_levers(config: dict[str, Any]) -> str:
    """The first three settings of ``config`` (that of the run, as plain values) that would save memory."""
    levers = []
    if not config.get("grad_checkpointing"):
        levers.append("grad_checkpointing=true")
    batch, parts = config.get("batch_size", 1), config.get("accumulate", 1)
    finer = next((number for number in range(parts + 1, batch + 1) if batch % number == 0), None)
    if finer is not None:
        levers.append(f"accumulate={finer} ({batch // finer} of {batch} images at once)")
    crop = config.get("dataset", {}).get("crop")
    levers.append("a smaller dataset.crop" + (f" than {crop}" if crop else ""))
    if config.get("precision", "fp32") == "fp32":
        levers.append("precision=bf16")
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


def out_of_memory(error: BaseException, *, device: torch.device, where: str, levers: str) -> OutOfMemory:
    """The exception that says in one sentence what ran out, how much was taken, and what would help."""
    kind = "GPU memory" if device.type == "cuda" else "RAM"
    first = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return OutOfMemory(
        f"out of memory {where}: at most {peak(device) / GIB:.2f} GiB of {kind} were in use and "
        f"{available(device) / GIB:.2f} GiB are free ({first}): set {levers}"
    )
