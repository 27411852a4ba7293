"""Losses compiled by torch.compile, where that is asked for and possible.

``compile_tiles`` of a loss: True compiles it (5 to 15 seconds, once per process and number of classes), False does not,
None compiles on a CUDA device with Triton and not elsewhere. Both ways compute the same numbers up to rounding. On a
CPU the plain form costs two to three times the compiled one, a few per cent of a training step: waiting for a compiler
is worth it in long runs. On a GPU every operation of the plain form is a trip through the device's memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

# Temporaries are to live in registers. By default the compiler stores what is read often or took many operations,
# which for a loss means several arrays of the size of the logits.
OPTIONS = {"realize_reads_threshold": 10**6, "realize_opcount_threshold": 10**6, "realize_acc_reads_threshold": 10**6}


class Compiler:
    """Whether compilation has failed in this process: it is then not tried again."""

    failed = False


def wants_compiler(wanted: bool | None, device: torch.device) -> bool:
    """Whether a loss on ``device`` is to be compiled; see the head of this file."""
    if Compiler.failed:
        return False
    if wanted is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return wanted


@functools.cache
def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """``function`` under torch.compile; its result is None where compilation fails or has failed before."""
    fast = torch.compile(function, dynamic=dynamic, options=OPTIONS)  # type: ignore[arg-type]

    def call(*arguments: Any) -> Any:
        if Compiler.failed:
            return None
        try:
            return fast(*arguments)
        except torch.OutOfMemoryError:
            raise  # says nothing about the compiler
        except Exception as error:
            Compiler.failed = True
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]}): the plain form of "
                "the loss is used, with the same numbers but slower (loss.compile_tiles=false avoids the attempt)",
                stacklevel=2,
            )
            return None

    return call
