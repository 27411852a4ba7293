"""Sums over pixels with a closed-form gradient, tile by tile.

A loss that is a sum over pixels needs one visit per pixel: value and gradient come from the same exponentials, so
autograd would only store and reread what is already known. Here the logits are cut into tiles of (K, pixels) that
stay in the cache, each is handed to a *tile function*, and the gradient is kept for the backward pass.

A tile function takes the logits of P pixels, which it must not write to:

    tile(s (K,P) float32 or float64, label (P,) int64 in [0,K), work, *parameters) -> loss (P,), gradient (K,P)

``work`` is a ``Workspace`` with buffers 0..4 for its temporaries and its result, or None.

Inside, classes are told apart by arithmetic with masks of 0 and 1 in floating point rather than by boolean masks:
on a CPU the former run at the speed of an addition, the latter about eight times slower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segkit.losses.checks import check_inputs
from segkit.losses.compiling import compiled, wants_compiler
from segkit.losses.parallel import each

TileFunction = Callable[..., tuple[Tensor, Tensor]]
Compute = Callable[[Tensor, bool], tuple[Tensor, Tensor | None, Tensor | None]]

TILE_ELEMENTS = 256 * 1024
"""Logits per tile on a CPU: 1 MB of float32. Smaller tiles stay in a faster cache but pay more for every call."""

ACCELERATOR_TILE_ELEMENTS = 16 * 1024 * 1024
"""Logits per tile elsewhere: 64 MB of float32, so that launches cost nothing and temporaries little memory."""


@dataclass(frozen=True)
class TileRule:
    """A tile function, its parameters, and a factor for both of its results.

    ``dense`` gives the same results for logits (..,K,P) and labels (..,P), in a form that a compiler can fuse.
    """

    function: TileFunction
    dense: TileFunction
    parameters: tuple[Any, ...] = ()
    scale: float = 1.0
    compile: bool = False

    def __call__(self, s: Tensor, label: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
        if self.compile:
            found = compiled(self.dense, dynamic=True)(s, label, None, *self.parameters)
            if found is not None:
                return found
        return self.function(s, label, work, *self.parameters)

    def at_once(
        self, logits: Tensor, target: Tensor, *, ignore_index: int, gradient_scale: Tensor | float
    ) -> tuple[Tensor, Tensor] | None:
        """Sum () and gradient of all tiles in one compiled call, as ``run_tiles``; None if that is not to be had."""
        if not self.compile:
            return None
        dtype = compute_dtype(logits)
        scale = gradient_scale * torch.full((), self.scale, dtype=dtype, device=logits.device)
        found = compiled(_whole(self.dense))(logits, target, ignore_index, scale, dtype, *self.parameters)
        if found is None:
            return None
        losses, gradient = found
        return losses.sum(dtype=sum_dtype(logits)) * self.scale, gradient


@functools.cache
def _whole(dense: TileFunction) -> Callable[..., tuple[Tensor, Tensor]]:
    """``dense`` of whole batches (N,K,H,W) with void pixels: loss (N,HW), gradient times ``scale`` (N,K,H,W)."""

    def whole(
        logits: Tensor, target: Tensor, ignore_index: int, scale: Tensor, dtype: torch.dtype, *parameters: Any
    ) -> tuple[Tensor, Tensor]:
        label = target.flatten(1)
        valid = label != ignore_index
        label = torch.where(valid, label, 0).int()  # half as wide: compared with every class
        loss, gradient = dense(logits.flatten(2).to(dtype), label, None, *parameters)
        gradient = torch.where(valid.unsqueeze(1), gradient * scale, 0.0)
        return torch.where(valid, loss, 0.0), gradient.to(logits.dtype).view(logits.shape)

    return whole


class PixelLoss(nn.Module):
    """A loss that is a sum over valid pixels, divided by ``denominator(target)``.

    Subclasses give ``tile_rule``. ``compile_tiles``: see ``segkit.losses.compiling``.
    """

    pixel_decomposable = True

    def __init__(
        self, *, ignore_index: int = 255, num_classes: int | None = None, compile_tiles: bool | None = None
    ) -> None:
        super().__init__()
        self.ignore_index = int(ignore_index)
        self.num_classes = num_classes
        self.compile_tiles = compile_tiles

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        """What happens to a tile of ``num_classes`` logits, computed in ``dtype``."""
        raise NotImplementedError

    def rule_for(self, logits: Tensor) -> TileRule:
        """The rule for ``logits`` (N,K,..), compiled where that is asked for."""
        rule = self.tile_rule(logits.shape[1], compute_dtype(logits))
        return dataclasses.replace(rule, compile=wants_compiler(self.compile_tiles, logits.device))

    def denominator(self, target: Tensor) -> Tensor:
        """() float: the number of valid pixels of ``target`` (N,H,W)."""
        return (target != self.ignore_index).sum().to(torch.float32)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """Loss of ``logits`` (N,K,H,W) against ``target`` (N,H,W), () in float32 (float64 for float64 logits).

        The sum over valid pixels is divided by ``denominator`` where given (summed over accumulation steps and
        ranks by the caller), else by ``self.denominator(target)``; 0 if every pixel is ignored.
        """
        check_inputs(logits, target, ignore_index=self.ignore_index, num_classes=self.num_classes)
        if denominator is None:
            denominator = self.denominator(target)
        rule, divisor = self.rule_for(logits), positive(denominator)

        def compute(given: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
            gradient: Tensor | None
            early = divides_early(given)
            scale = 1 / divisor.to(compute_dtype(given)) if early else 1.0
            ignore = self.ignore_index
            fused = rule.at_once(given, target, ignore_index=ignore, gradient_scale=scale) if wanted else None
            if fused is not None:
                total, gradient = fused
            else:
                gradient = torch.empty_like(given) if wanted else None
                plain = self.rule_for(given)  # asked again: the compiler may just have failed
                total = run_tiles(
                    given, target, ignore_index=ignore, rule=plain, gradient=gradient, gradient_scale=scale
                )
            return (total / divisor).to(compute_dtype(given)), gradient, None if early else divisor

        return KeptGradient.apply(logits, compute)

    def pixel_map(self, logits: Tensor, target: Tensor) -> Tensor:
        """(N,H,W) the loss of every pixel, 0 where ignored; shapes as ``forward``."""
        return _PixelMap.apply(logits, target, self.ignore_index, self.rule_for(logits))


def positive(denominator: Tensor) -> Tensor:
    """``denominator``, 1 where it is 0: so that no valid pixel gives 0 / 1."""
    return torch.where(denominator > 0, denominator, 1)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for everything narrower."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def not_on_cpu(tensor: Tensor) -> bool:
    """True where asking a tensor for a value is slow (another device) or impossible (under compilation)."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


class Workspace:
    """Buffers for the large temporaries of a tile, reused from tile to tile.

    On a CPU fresh memory costs several times what the arithmetic on it does: every page is mapped, zeroed, unmapped.
    """

    def __init__(self, logits: Tensor) -> None:
        self._empty = torch.empty(0, dtype=compute_dtype(logits), device=logits.device)
        self._buffers: dict[int, Tensor] = {}

    def buffer(self, i: int, shape: torch.Size) -> Tensor:
        """The ``i``-th buffer as a contiguous tensor of ``shape``, with whatever stood there."""
        numel = shape.numel()
        if i not in self._buffers or self._buffers[i].numel() < numel:
            self._buffers[i] = self._empty.new_empty(numel)
        return self._buffers[i][:numel].view(shape)


def room(work: Workspace | None, i: int, like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like ``like``: buffer ``i`` of ``work``, or a new one without ``work``."""
    if work is None:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return work.buffer(i, like.shape)


def mask_of(values: Tensor, other: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1 where ``values`` equals ``other``, else 0, in the dtype of ``values``."""
    return torch.eq(values, other, out=torch.empty_like(values) if out is None else out)


def sum_dtype(logits: Tensor) -> torch.dtype:
    """float64 on a CPU, where it is free; elsewhere the dtype of the computation."""
    return torch.float64 if logits.device.type == "cpu" else compute_dtype(logits)


def pixels_per_tile(num_classes: int, device: torch.device) -> int:
    """P: how many pixels of ``num_classes`` logits make a tile."""
    return max(1, (TILE_ELEMENTS if device.type == "cpu" else ACCELERATOR_TILE_ELEMENTS) // num_classes)


def rows_per_tile(num_classes: int, height: int, width: int, device: torch.device) -> int:
    """Rows of an image of that size in one tile."""
    return max(1, min(height, pixels_per_tile(num_classes, device) // max(1, width)))


def row_tiles(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """(image, rows) of every tile of ``logits`` (N,K,H,W)."""
    num, num_classes, height, width = logits.shape
    rows = rows_per_tile(num_classes, height, width, logits.device)
    for n in range(num):
        for top in range(0, height, rows):
            yield n, slice(top, min(top + rows, height))


def read_labels(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Labels (P,) int64, 0 where void, and which of them are void, None if none is, of ``target`` (rows, W).

    Void pixels are given as indices on a CPU and as a boolean mask elsewhere (indices would wait for the device).
    """
    label = target.reshape(-1).long()
    void = label == ignore_index
    if label.device.type != "cpu":
        return label.masked_fill(void, 0), void
    indices = void.nonzero()[:, 0]
    if len(indices) == 0:
        return label, None
    return label.index_fill(0, indices, 0), indices


def fill_columns(matrix: Tensor, void: Tensor | None, value: float = 0.0) -> Tensor:
    """``matrix`` (.., P) with ``value`` written into the void columns, in place; see ``read_labels``."""
    if void is None:
        return matrix
    if void.dtype == torch.bool:
        return matrix.masked_fill_(void, value)
    return matrix.index_fill_(-1, void, value)


LOGITS = 5
"""Buffer of a ``Workspace`` for the logits themselves, where they have to be copied."""


def tile_logits(part: Tensor, void: Tensor | None, work: Workspace) -> Tensor:
    """(K,P) of ``part`` (K, rows, W) for a tile function: a view where that is possible, else a copy.

    Nothing of a void pixel, nan included, gets in: it becomes (1, 0, ..., 0), a unique maximum, so that it takes no
    path reserved for ties.
    """
    if void is None and part.dtype == compute_dtype(part) and part[0].is_contiguous():
        return part.flatten(1)
    copy = work.buffer(LOGITS, part.shape).copy_(part)
    return fill_void(copy.flatten(1), void)


def fill_void(s: Tensor, void: Tensor | None) -> Tensor:
    """``s`` (K,P) with (1, 0, ..., 0) at the void pixels, in place."""
    fill_columns(s, void)
    fill_columns(s[0], void, 1.0)
    return s


def run_tiles(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    rule: TileRule,
    gradient: Tensor | None,
    gradient_scale: Tensor | float = 1.0,
    losses: Tensor | None = None,
) -> Tensor:
    """The sum over valid pixels of ``logits`` (N,K,H,W) and ``target`` (N,H,W), (), in ``sum_dtype``.

    ``gradient_scale`` times the gradient of that sum is written to ``gradient`` (N,K,H,W), the loss of every pixel
    to ``losses`` (N,H,W), where these are given.
    """
    scale = gradient_scale * torch.full((), rule.scale, dtype=compute_dtype(logits), device=logits.device)
    kind = sum_dtype(logits)

    def tile(place: tuple[int, slice], work: Workspace) -> Tensor:
        n, band = place
        part = logits[n, :, band]
        label, void = read_labels(target[n, band], ignore_index)
        loss, slope = rule(tile_logits(part, void, work), label, work)
        fill_columns(loss, void)
        if losses is not None:
            losses[n, band] = loss.view(part.shape[1:]) * rule.scale
        if gradient is not None:
            fill_columns(slope, void)
            torch.mul(slope.view(part.shape), scale, out=gradient[n, :, band])
        return loss.sum(dtype=kind)

    split = logits.device.type == "cpu" and not rule.compile  # a compiled call has threads of its own
    sums = each(row_tiles(logits), tile, lambda: Workspace(logits), split=split)
    total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=kind, device=logits.device)
    return total * rule.scale


class KeptGradient(torch.autograd.Function):
    """A loss whose gradient is computed together with its value, and kept until the backward pass asks for it.

    ``compute(logits, wanted)`` returns (value (), gradient or None, divisor () or None): the gradient of the value is
    gradient / divisor. A divisor is for gradients kept in half precision: g / n would underflow to zero there, g
    times the incoming (loss-scaled) gradient does not.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, compute: Compute) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            value, ctx.gradient, ctx.divisor = compute(logits, ctx.needs_input_grad[0])
        ctx.compute = compute
        ctx.save_for_backward(logits)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        if ctx.gradient is None:  # a second pass through a retained graph: the first one gave the buffer away
            with torch.autocast(logits.device.type, enabled=False):
                _, ctx.gradient, ctx.divisor = ctx.compute(logits, True)
        gradient, ctx.gradient = ctx.gradient, None
        factor = grad_output if ctx.divisor is None else grad_output / ctx.divisor
        if gradient.device.type != "cpu" or float(factor) != 1.0:
            gradient.mul_(factor)
        return gradient, None


def divides_early(logits: Tensor) -> bool:
    """True where a gradient may be kept divided by the number of pixels."""
    return logits.dtype in (torch.float32, torch.float64)


class _PixelMap(torch.autograd.Function):
    """The loss of every pixel, (N,H,W), 0 where ignored; the gradient is computed with it and kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, rule: TileRule) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = torch.empty(target.shape, dtype=compute_dtype(logits), device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            run_tiles(logits, target, ignore_index=ignore_index, rule=rule, gradient=gradient, losses=losses)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.unsqueeze(1)).to(gradient.dtype), None, None, None
