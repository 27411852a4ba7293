"""Tile functions compiled by torch.compile, where that is asked for and possible.

``compile_tiles`` of a loss: True compiles its tile function (seconds, once per process and number of classes),
False does not, None compiles on a CUDA device with Triton and not elsewhere. Both ways compute the same numbers up
to rounding. On a CPU the plain form already costs less than torch's own cross-entropy, so waiting for a compiler
is worth it only in long runs; on a GPU every operation of the plain form is a trip through the device's memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], *, wanted: bool | None, device: torch.device) -> Callable[..., Any]:
    """``function``, or its compiled form; see the head of this file."""
    if wanted is None:
        wanted = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return _compiled(function) if wanted else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile; the plain form, with one warning, if compilation fails."""
    fast: Callable[..., Any] | None = torch.compile(function, dynamic=True)

    def call(*arguments: Any) -> Any:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*arguments)
            except Exception as error:
                fast = None
                warnings.warn(
                    f"torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]}): the plain form of "
                    "the loss is used, with the same numbers but slower (loss.compile_tiles=false avoids the attempt)",
                    stacklevel=2,
                )
        return function(*arguments)

    return call
