"""A loss that is a sum over pixels, of logits at any stride; and a gradient that is computed with the value."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkit.losses import tiles
from segkit.losses.checks import check_inputs, settings
from segkit.losses.compiling import TileRule, wants_compiler
from segkit.losses.tiles import Block, GradientSum, Labels, compute_dtype, sum_dtype


def at_label_size(logits: Tensor, target: Tensor) -> Tensor:
    """``logits`` (N,K,h,w) up-sampled bilinearly (align_corners=False) to the size of ``target`` (N,H,W).

    For losses that need all pixels at once; logits that have that size come back as they are, others in float32
    (float64 if they are float64).
    """
    if logits.shape[2:] == target.shape[1:]:
        return logits
    scores = logits.to(compute_dtype(logits))
    return F.interpolate(scores, size=target.shape[1:], mode="bilinear", align_corners=False)


class PixelLoss(nn.Module):
    """A loss that is a sum over valid pixels, divided by ``denominator(target)``.

    Subclasses give ``tile_rule``. ``compile_tiles``: see ``segkit.losses.compiling``.
    """

    pixel_decomposable = True
    extra_repr = settings

    def __init__(
        self, *, ignore_index: int = 255, num_classes: int | None = None, compile_tiles: bool | None = False
    ) -> None:
        super().__init__()
        self.ignore_index = int(ignore_index)
        self.num_classes = num_classes
        self.compile_tiles = compile_tiles

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        """What happens to a tile of ``num_classes`` logits, computed in ``dtype``."""
        raise NotImplementedError

    def denominator(self, target: Tensor) -> Tensor:
        """() float: the number of valid pixels of ``target`` (N,H,W)."""
        return (target != self.ignore_index).sum().to(torch.float32)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """Loss of ``logits`` (N,K,h,w) against ``target`` (N,H,W), () in float32 (float64 for float64 logits).

        Logits of another size than the labels are up-sampled bilinearly (align_corners=False), block by block. The
        sum over valid pixels is divided by ``denominator`` where given (summed over accumulation steps and ranks by
        the caller), else by ``self.denominator(target)``; 0 if every pixel is ignored.
        """
        check_inputs(logits, target, ignore_index=self.ignore_index, num_classes=self.num_classes)
        if denominator is None:
            denominator = self.denominator(target)
        divisor = torch.where(denominator > 0, denominator, 1)  # so that no valid pixel gives 0 / 1
        return KeptGradient.apply(logits, target, self, divisor.to(compute_dtype(logits)))

    def pixel_map(self, logits: Tensor, target: Tensor) -> Tensor:
        """(N,H,W) the loss of every pixel, 0 where ignored, of ``logits`` (N,K,H,W) at label size."""
        return _PixelMap.apply(logits, target, self)


class KeptGradient(torch.autograd.Function):
    """A loss whose gradient is computed together with its value, and kept until the backward pass asks for it.

    ``forward`` is that of ``PixelLoss``. A subclass for another loss saves its logits for the backward pass and sets
    ``ctx.gradient`` (None if none is wanted), ``ctx.divisor`` (() or None) and ``ctx.again``, which applies it to
    other logits. The gradient of the value is gradient / divisor. A divisor is for gradients kept in half precision:
    g / n would underflow to zero there, g times the incoming (loss-scaled) gradient does not.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: PixelLoss, divisor: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.again = lambda leaf: KeptGradient.apply(leaf, target, loss, divisor)
        ctx.divisor = None if divides_early(logits) else divisor
        rule = loss.tile_rule(logits.shape[1], compute_dtype(logits))
        factor = rule.scale if ctx.divisor is not None else rule.scale / divisor
        compile, wanted = wants_compiler(loss.compile_tiles), ctx.needs_input_grad[0]
        ignore_index = loss.ignore_index
        found: tuple[Tensor, Tensor | None] | None = None
        if compile and wanted and logits.shape[2:] == target.shape[1:]:
            found = rule.at_once(logits, target, ignore_index=ignore_index, factor=factor)
        if found is None:
            sums = _Sums(logits, target, factor=factor, wanted=wanted)
            function = rule.function(compile=compile)
            for blocks in tiles.cut(logits, target):
                # a compiled call has threads of its own; no name for what comes back, which would outlive its image
                sums.add(blocks, tiles.run(blocks, function, sums.write, ignore_index=ignore_index, split=not compile))
            found = sums.total, None if sums.gradient is None else sums.gradient.result()
        total, ctx.gradient = found
        return (rule.scale * total / divisor).to(divisor.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second pass through a retained graph: the first one gave the buffer away
            leaf = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(ctx.again(leaf), leaf, grad_output)
            return gradient, None, None, None
        factor = grad_output if ctx.divisor is None else grad_output / ctx.divisor
        if gradient.device.type != "cpu" or float(factor) != 1.0:
            gradient.mul_(factor)
        return gradient, None, None, None


def divides_early(logits: Tensor) -> bool:
    """True where a gradient may be kept divided by the number of pixels."""
    return logits.dtype in (torch.float32, torch.float64)


class _Sums:
    """The sum of a loss over the blocks of a batch, ``total`` (), and ``factor`` times its gradient, or None."""

    def __init__(self, logits: Tensor, target: Tensor, *, factor: Tensor | float, wanted: bool) -> None:
        self.factor = factor
        self.total = torch.zeros((), dtype=sum_dtype(logits), device=logits.device)
        self.gradient = GradientSum(logits, target) if wanted else None

    def write(self, block: Block, _: Labels, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum of the block, and what ``GradientSum.write`` returns."""
        total = loss.sum(dtype=self.total.dtype)
        return total, None if self.gradient is None else self.gradient.write(block, gradient, self.factor)

    def add(self, blocks: list[Block], parts: list[tuple[Tensor, Tensor | None]]) -> None:
        """Add what ``write`` returned for ``blocks``, in their order, so that no bit depends on the threads."""
        for total, _ in parts:
            self.total += total
        if self.gradient is not None:
            self.gradient.add(blocks, [gradient for _, gradient in parts])


class _PixelMap(torch.autograd.Function):
    """The loss of every pixel, (N,H,W), 0 where ignored; the gradient is computed with it and kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: PixelLoss) -> Tensor:
        rule = loss.tile_rule(logits.shape[1], compute_dtype(logits))
        compile = wants_compiler(loss.compile_tiles)
        sums = _Sums(logits, target, factor=rule.scale, wanted=ctx.needs_input_grad[0])
        losses = torch.empty(target.shape, dtype=compute_dtype(logits), device=logits.device)

        def write(block: Block, labels: Labels, loss: Tensor, gradient: Tensor) -> None:
            n, _, rows, columns = block.place
            torch.mul(loss.view(block.target.shape), rule.scale, out=losses[n, rows, columns])
            sums.write(block, labels, loss, gradient)

        for blocks in tiles.cut(logits, target):
            tiles.run(blocks, rule.function(compile=compile), write, ignore_index=loss.ignore_index, split=not compile)
        ctx.save_for_backward(None if sums.gradient is None else sums.gradient.result())
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.unsqueeze(1)).to(gradient.dtype), None, None
