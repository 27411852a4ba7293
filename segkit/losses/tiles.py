"""Sums over pixels with a closed-form gradient, tile by tile.

A loss that is a sum over pixels needs one visit per pixel: value and gradient come from the same
exponentials, so autograd would only store and reread what is already known. ``pixel_sum`` cuts the logits
into tiles of (K, pixels) that stay in the cache, hands each to a *tile function*, and keeps the gradient for
the backward pass.

A tile function is pure:

    tile(logits (K,P) float32 or float64, label (P,) int64 in [0,K), *parameters) -> loss (P,), gradient (K,P)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segkit.losses.checks import check_inputs

TileFunction = Callable[..., tuple[Tensor, Tensor]]

TILE_ELEMENTS = 256 * 1024
"""Logits per tile on a CPU: 1 MB of float32, so that a tile and its temporaries stay in the cache."""


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for everything narrower."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class PixelLoss(nn.Module):
    """A loss that is a sum over valid pixels, divided by ``denominator(target)``.

    Subclasses give ``tile_function`` and ``tile_parameters``; see the head of this file.
    """

    pixel_decomposable = True

    def __init__(self, *, ignore_index: int = 255, num_classes: int | None = None) -> None:
        super().__init__()
        self.ignore_index = int(ignore_index)
        self.num_classes = num_classes

    tile_function: TileFunction

    def tile_parameters(self, num_classes: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """What the tile function takes after logits and label."""
        raise NotImplementedError

    def denominator(self, target: Tensor) -> Tensor:
        """() float: the number of valid pixels of ``target`` (N,H,W)."""
        return (target != self.ignore_index).sum().to(torch.float32)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """Loss of ``logits`` (N,K,H,W) against ``target`` (N,H,W), () in float32 (float64 for float64
        logits).

        The sum over valid pixels is divided by ``denominator`` where given (summed over accumulation steps
        and ranks by the caller), else by ``self.denominator(target)``; 0 if every pixel is ignored.
        """
        check_inputs(logits, target, ignore_index=self.ignore_index, num_classes=self.num_classes)
        if denominator is None:
            denominator = self.denominator(target)
        return safe_divide(self.pixel_sum(logits, target), denominator)

    def pixel_sum(self, logits: Tensor, target: Tensor) -> Tensor:
        """The sum over valid pixels, not divided; shapes as ``forward``."""
        parameters = self.tile_parameters(logits.shape[1], compute_dtype(logits))
        return _PixelSum.apply(logits, target, self.ignore_index, type(self).tile_function, parameters)

    def pixel_map(self, logits: Tensor, target: Tensor) -> Tensor:
        """(N,H,W) the loss of every pixel, 0 where ignored; shapes as ``forward``."""
        parameters = self.tile_parameters(logits.shape[1], compute_dtype(logits))
        return _PixelMap.apply(logits, target, self.ignore_index, type(self).tile_function, parameters)


def safe_divide(total: Tensor, denominator: Tensor) -> Tensor:
    """``total / denominator``, with 0 / 0 = 0 and the graph kept."""
    return total / torch.where(denominator > 0, denominator, 1).to(total.dtype)


def tile_elements(logits: Tensor) -> int:
    """Logits per tile: what stays in the cache of a CPU; everything at once on an accelerator."""
    return TILE_ELEMENTS if logits.device.type == "cpu" else max(1, logits.numel())


def row_tiles(logits: Tensor, elements: int) -> list[tuple[int, int, int]]:
    """(image, first row, last row) of tiles of at most ``elements`` logits, at least one row each."""
    num, num_classes, height, width = logits.shape
    rows = max(1, min(height, elements // max(1, num_classes * width)))
    return [(n, top, min(top + rows, height)) for n in range(num) for top in range(0, height, rows)]


def sums_and_gradient(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    tile: TileFunction,
    parameters: Sequence[Any],
    gradient: Tensor | None,
    losses: Tensor | None = None,
) -> Tensor:
    """The sum over valid pixels, (); its gradient is written to ``gradient``, its terms to ``losses``, where given."""
    dtype = compute_dtype(logits)
    total = torch.zeros((), dtype=torch.float64 if logits.device.type == "cpu" else dtype, device=logits.device)
    num_classes = logits.shape[1]
    for n, top, bottom in row_tiles(logits, tile_elements(logits)):
        part = logits[n, :, top:bottom].to(dtype).reshape(num_classes, -1)
        label = target[n, top:bottom].reshape(-1).long()
        void = label == ignore_index
        loss, slope = tile(part, torch.where(void, 0, label), *parameters)
        loss = torch.where(void, 0, loss)
        total += loss.sum(dtype=total.dtype)
        if losses is not None:
            losses[n, top:bottom] = loss.view(bottom - top, -1)
        if gradient is not None:
            # where, not a product: whatever stands at a void pixel, nan included, must not reach the gradient
            slope = torch.where(void, 0, slope)
            gradient[n, :, top:bottom] = slope.view(num_classes, bottom - top, -1)
    return total.to(dtype)


class _PixelMap(torch.autograd.Function):
    """The loss of every pixel, (N,H,W), 0 where ignored; its gradient is computed with it and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        tile: TileFunction,
        parameters: tuple[Any, ...],
    ) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = torch.empty(target.shape, dtype=compute_dtype(logits), device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            sums_and_gradient(logits, target, ignore_index, tile, parameters, gradient, losses)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.unsqueeze(1)).to(gradient.dtype), None, None, None, None


class _PixelSum(torch.autograd.Function):
    """The sum over valid pixels; its gradient is computed with it and kept, not divided by any count.

    Not divided because the gradient is kept in the dtype of the logits: g / n of a half precision loss would
    underflow to zero, g times the incoming (loss-scaled) gradient does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        tile: TileFunction,
        parameters: tuple[Any, ...],
    ) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        with torch.autocast(logits.device.type, enabled=False):
            total = sums_and_gradient(logits, target, ignore_index, tile, parameters, gradient)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None
