"""Losses compiled by torch.compile, where that is asked for and possible.

``compile_tiles`` of a loss: True compiles it (5 to 30 seconds, once per process and number of classes). Both ways
compute the same numbers up to rounding. On a CPU with AVX-512 the plain form takes 1.1 to 1.6 times as long as the
compiled one, a few per cent of a training step: waiting for a compiler pays in long runs. Without, both cost the same.
On an H100 the plain form took 1.0 ms for logits of 4 x 19 x 256 x 256, and the compiled one, whose call costs more than
its arithmetic there, 1.5 ms.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from segkit.errors import first_line
from segkit.losses.tiles import TileFunction, Workspace, compute_dtype, sum_dtype

# Temporaries are to live in registers. By default the compiler stores what is read often or took many operations,
# which for a loss means several arrays of the size of the logits.
OPTIONS = {"realize_reads_threshold": 10**6, "realize_opcount_threshold": 10**6, "realize_acc_reads_threshold": 10**6}


@dataclass(frozen=True)
class TileRule:
    """What happens to a tile, in two forms with the same results, and a factor for these.

    ``plain`` is called as ``plain(s (K,P), label (P,), work, **parameters)``, see ``segkit.losses.tiles``, and
    ``dense`` as ``dense(s (..,K,P), label (..,P), **parameters)``: a form without indices, for a compiler to fuse.
    """

    plain: TileFunction
    dense: TileFunction
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0

    def function(self, *, compile: bool) -> TileFunction:
        """The tile function without its factor, compiled where ``compile`` says so and that succeeds."""
        plain = functools.partial(self.plain, **self.parameters)
        if not compile:
            return plain
        fast = compiled(self.dense, dynamic=True)

        def function(s: Tensor, label: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
            found = fast(s, label, **self.parameters)
            return plain(s, label, work) if found is None else found

        return function

    def at_once(
        self, logits: Tensor, target: Tensor, *, ignore_index: int, factor: Tensor | float
    ) -> tuple[Tensor, Tensor] | None:
        """The sum, (), over the valid pixels of logits at label size, and ``factor`` times its gradient (N,K,H,W).

        One compiled call for all tiles; returns None if the compiler fails. The sum lacks the factor of the rule.
        """
        dtype = compute_dtype(logits)
        factor = torch.as_tensor(factor, dtype=dtype, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            found = compiled(_whole(self.dense))(logits, target, ignore_index, factor, dtype, **self.parameters)
        return None if found is None else (found[0].sum(dtype=sum_dtype(logits)), found[1])


@functools.cache
def _whole(dense: TileFunction) -> TileFunction:
    """``dense`` of whole batches (N,K,H,W) with void pixels: loss (N,HW), gradient times ``factor`` (N,K,H,W)."""

    def whole(
        logits: Tensor, target: Tensor, ignore_index: int, factor: Tensor, dtype: torch.dtype, **parameters: Any
    ) -> tuple[Tensor, Tensor]:
        label = target.flatten(1)
        valid = label != ignore_index
        label = torch.where(valid, label, 0).int()  # half as wide: compared with every class
        scores = logits.flatten(2).to(dtype)
        loss, gradient = dense(scores, label, **parameters)
        loss = loss + 0 * scores.amin(1)  # of -inf; see ``segkit.losses.tiles.tile``
        gradient = torch.where(valid.unsqueeze(1), gradient * factor, 0.0)
        return torch.where(valid, loss, 0.0), gradient.to(logits.dtype).view(logits.shape)

    return whole


class Compiler:
    """Whether compilation has failed in this process: it is then not tried again."""

    failed = False


def wants_compiler(wanted: bool | None) -> bool:
    """Whether a loss is to be compiled; None, of runs by older versions, is False."""
    return bool(wanted) and not Compiler.failed


@functools.cache
def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """``function`` under torch.compile; its result is None where compilation fails or has failed before."""
    fast = torch.compile(function, dynamic=dynamic, options=OPTIONS)  # type: ignore[arg-type]

    def call(*arguments: Any, **options: Any) -> Any:
        if Compiler.failed:
            return None
        try:
            return fast(*arguments, **options)
        except torch.OutOfMemoryError:
            raise  # says nothing about the compiler
        except Exception as error:
            Compiler.failed = True
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {first_line(error)}): the plain form of "
                "the loss is used, with the same numbers but slower (loss.compile_tiles=false avoids the attempt)",
                stacklevel=2,
            )
            return None

    return call
