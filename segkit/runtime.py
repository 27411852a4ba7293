"""Seeds, determinism, the device, and where a result comes from."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.errors import InputError

if TYPE_CHECKING:
    import torch

drawing = threading.RLock()
"""Held by a thread of this process that draws from torch's random numbers, or forks: a fork amid another thread's draw
leaves them locked for ever in the new process, and other draws amid a training step change its numbers."""


@contextmanager
def kept_random() -> Iterator[None]:
    """Put the random states of torch on the CPU, of numpy and of Python back afterwards."""
    import random

    import numpy as np
    import torch

    with drawing:
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        with drawing:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])


@contextmanager
def kept_variables(*names: str) -> Iterator[None]:
    """Put variables of the environment back afterwards."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def usual_torch() -> Iterator[None]:
    """Within it torch computes as in a process of its own; what a notebook has set instead holds again afterwards."""
    import torch

    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if device.type != "cpu":
            stack.callback(torch.set_default_device, device)
            torch.set_default_device(None)
        yield


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it what models allocate has shapes and no values (device meta), except for what they read themselves."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Read(TorchFunctionMode):
        """What is made of given numbers stays on the CPU: encoders take rates of their blocks from it."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            own = {"device": "cpu"} if func in (torch.linspace, torch.arange, torch.tensor) else {}
            return func(*args, **own | (kwargs or {}))

    with torch.device("meta"), Read():
        yield


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU of this process where there is one, and the CPU elsewhere."""
    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps")
    except (RuntimeError, ValueError, OverflowError):
        known = False
    if not known:
        raise InputError(f"device is {name!r}, but must be auto, cpu, cuda, cuda:N or mps: set device=auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device is {name!r}, but no GPU of Apple's is to be had here: set device=auto or device=cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but no CUDA device is to be had here: set device=auto or device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {name!r}, but there are only {torch.cuda.device_count()} CUDA devices: set device=cuda:0"
        )
    return device


def device_name(device: torch.device) -> str:
    """The name of a GPU of CUDA; of any other device its type."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that it was asked for."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def set_determinism(*, strict: bool) -> None:
    """Make every kernel bitwise repeatable (``strict``), or let each library choose its fastest."""
    import torch

    if strict:
        # cuBLAS reads this when it is first used.
        os.environ.setdefault(CUBLAS, ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != strict:  # to set it loads a compiler: seconds
        torch.use_deterministic_algorithms(strict)
    torch.backends.cudnn.benchmark = not strict


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _git(*arguments: str) -> str | None:
    """Output of a git command in the folder of the code, or None where that is no checkout of it."""
    file = Path(__file__).resolve()
    git: dict[str, Any] = {"cwd": file.parent, "capture_output": True, "text": True, "timeout": 5, "check": True}
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", file.name], **git)  # not another project's, around .venv
        return subprocess.run(["git", *arguments], **git).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def let_waiting_threads_sleep() -> None:
    """Let torch's threads give up their core soon while they wait. To be called before torch is imported.

    GNU OpenMP spins far longer by default, on cores that another process could use; not to spin at all costs
    speed where a thread is slow to wake, as on virtual machines. A choice of the user's stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def provenance(*, device: torch.device, seed: int) -> dict[str, Any]:
    """What a reader of the result must know to repeat it: command, code, versions, machine, time."""
    from importlib import metadata

    import torch

    packages = ("segkit", "torch", "torchvision", "segmentation-models-pytorch", "timm", "numpy", "albumentations")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": seed,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain") or ""),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": num_cores(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


@contextmanager
def tidied_up_when_ended() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, with what is half written removed; 143 and 129 follow.

    Afterwards they end it at once: while Python itself ends, an exception would be a traceback.
    """

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in ours:  # not those that are ignored, as under nohup
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def die_with_parent(number: int) -> None:
    """Ask the system to send this process signal ``number`` when its parent process ends (Linux; else nothing)."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if parent == 1 or os.getppid() != parent:  # it ended before the system knew
        os.kill(os.getpid(), number)
