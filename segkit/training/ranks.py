"""The processes that torchrun starts, before they form a group: one run folder, one voice. Imports torch only there."""

from __future__ import annotations

import functools
import hashlib
import os
import time
import warnings

from segkit.errors import InputError

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "remote process exited")
"""What the libraries below torch.distributed say when another rank has ended."""
PARENT = os.getppid()


def is_rank() -> bool:
    """True in a process that torchrun, or something like it, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_agent() -> bool:
    """True if torchrun's own process keeps a store for the ranks."""
    return is_rank() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@functools.cache
def start_time(pattern: str) -> str:
    """The time in the form of ``strftime``: under torchrun that of the first rank, also after a restart.

    It stands in the default of hydra.run.dir, on which all ranks must agree, and to which a restart must come back.
    """
    now = time.strftime(pattern)
    if not is_rank():
        return now
    if not has_agent():
        raise InputError(
            "several processes were started without torchrun, so they cannot agree on a run folder: set "
            "hydra.run.dir=DIR"
        )
    from segkit.training.distributed import first_value

    return first_value(f"start_time/{pattern}", now)


def speaks(sentence: str) -> bool:
    """True for the first of the ranks that is to say ``sentence``; the others need not repeat it."""
    if not has_agent() or os.getppid() != PARENT:  # the agent has died, and its store with it
        return True
    from segkit.training.distributed import first_value

    key = hashlib.sha256(sentence.encode()).hexdigest()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return first_value(f"said/{attempt}/{key}", os.environ["RANK"]) == os.environ["RANK"]
    except (RuntimeError, ValueError, LookupError):  # no store: what is to be said is that, perhaps
        return True


def quiet_others() -> None:
    """Leave warnings to rank 0: the others would repeat them."""
    if is_rank() and os.environ["RANK"] != "0":
        warnings.simplefilter("ignore")


def is_lost_peer(error: BaseException) -> bool:
    """True for what a rank sees when another one has ended."""
    return is_rank() and isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)
