"""The little that segkit needs from torch.distributed; every function also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segkit.errors import InputError, first_line
from segkit.progress import show

T = TypeVar("T")


def is_active() -> bool:
    """True in a process of torchrun after :func:`process_group`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; 0 in a single process."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """Number of processes; 1 in a single process."""
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    """True for the one process that writes files."""
    return rank() == 0


def print_main(text: str) -> None:
    """Print the lines of ``text``, on the main process only."""
    for line in text.split("\n") if is_main() else ():
        show(line)


def agent_store() -> dist.TCPStore:
    """The key-value store of torchrun's own process: it is there before the ranks are, and outlives a restart."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))


def first_value(key: str, value: str) -> str:
    """The value that the first rank to ask for ``key`` gave; the same on every rank and after a restart."""
    return agent_store().compare_set(f"segkit/{key}", "", value).decode()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun describes (nccl for GPUs, gloo for CPUs); nothing without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        _join(device)
    except (ValueError, OverflowError, LookupError, dist.DistError) as error:
        raise InputError(
            f"RANK and WORLD_SIZE tell of several processes, but they form no group ({first_line(error)}): "
            "start them with torchrun, or unset RANK and WORLD_SIZE to train in one; SEGKIT_RANK_TIMEOUT_MINUTES, if "
            "it is set, is a number of minutes"
        ) from None
    yield
    # Not after an error: to leave in good order would mean to wait for ranks that wait for this one.
    dist.destroy_process_group()


def _join(device: torch.device) -> None:
    minutes = float(os.environ.get("SEGKIT_RANK_TIMEOUT_MINUTES", "30"))
    if not 0 < minutes < 1e6:
        raise ValueError(f"SEGKIT_RANK_TIMEOUT_MINUTES is {minutes:g}")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE {world_size}")
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store outlives a restart, and with it the addresses of ranks that are dead.
        attempt = f"segkit/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-of-{world_size}"
        store = dist.PrefixStore(attempt, agent_store())
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=minutes),
        store=store,
        rank=rank,
        world_size=world_size,
    )


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all ranks, on every rank."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """The ``value`` of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree(value: Any) -> Any:
    """The main process's ``value`` on every rank."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_main(function: Callable[[], T]) -> T:
    """What ``function`` returns on the main process, on every rank; its InputError is raised on every rank."""
    if world_size() == 1:
        return function()
    outcome: tuple[Any, str | None] = (None, None)
    if is_main():
        try:
            outcome = (function(), None)
        except InputError as error:
            outcome = (None, str(error))
    value, message = agree(outcome)
    if message is not None:
        raise InputError(message)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if ``flag`` is true on one."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def share_buffers(model: nn.Module) -> None:
    """Give every rank the main process's running statistics, which DDP shares only before the next training step."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def replicate(model: nn.Module, device: torch.device, *, sync_batchnorm: bool) -> nn.Module:
    """``model`` with gradients averaged over ranks; the model itself in a single process."""
    if world_size() == 1:
        return model
    if sync_batchnorm:
        if device.type == "cpu":
            raise InputError("sync_batchnorm=true needs GPUs, but the device is the CPU: set sync_batchnorm=false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index or 0] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
