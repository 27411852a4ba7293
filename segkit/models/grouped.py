"""Convolutions with groups on a CPU, where oneDNN is wrong, or several times as slow as it might be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from segkit.models.any_size import mix_in

PART_ELEMENTS = 2**20
"""Values of a map that are convolved at once: 2 MB of bfloat16."""


class ByPhases(nn.Module):
    """Mixin in front of a depthwise convolution with a dilation d: on a CPU, one without, of d x d small images.

    Each has every d-th pixel of the map, and no tap of the kernel leads from one to another: the same sums, in a
    fraction of the time of oneDNN's own. Taps that reach beyond every border are left out.
    """

    dilation: tuple[int, int]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_split(x):
            return super().forward(x)
        kernel, steps = self.weight, list(self.dilation)
        for axis, extent in enumerate(x.shape[-2:]):
            if steps[axis] >= extent:
                kernel = kernel.narrow(2 + axis, kernel.shape[2 + axis] // 2, 1)
                steps[axis] = 1
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        is_slow = self.training and max(kernel.shape[2:]) > 3  # in bfloat16
        inner = torch.promote_types(dtype, torch.float32) if is_slow else dtype
        return _Phases.apply(x, kernel, self.bias, steps, inner, dtype)

    def is_split(self, x: torch.Tensor) -> bool:
        """False where the plain convolution is wanted: on other devices, and in graphs."""
        return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


class _Phases(torch.autograd.Function):
    """The convolution of ``ByPhases``, computed in ``inner``, given in ``dtype``; ``x`` is all that is kept of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernel: torch.Tensor,
        bias: torch.Tensor | None,
        steps: list[int],
        inner: torch.dtype,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.steps, ctx.inner = steps, inner
        out = torch.empty((len(x), len(kernel), *x.shape[2:]), dtype=dtype, memory_format=torch.channels_last)
        weight, shift = kernel.to(inner), None if bias is None else bias.to(inner)
        padding = [side // 2 for side in kernel.shape[2:]]
        with torch.autocast("cpu", enabled=False):
            for place, part in zip(_parts(out, steps), _parts(x, steps), strict=True):
                _write(place, F.conv2d(_images(part, inner), weight, shift, padding=padding, groups=x.shape[1]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, kernel = ctx.saved_tensors
        of_x = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
        of_kernel, weight, inner = torch.zeros_like(kernel), kernel.to(ctx.inner), ctx.inner
        sides = kernel.shape[2:]
        options = (None, [1, 1], [side // 2 for side in sides], [1, 1], False, [0, 0], x.shape[1])
        find = torch.ops.aten.convolution_backward
        for place, part, slope in zip(*(_parts(value, ctx.steps) for value in (of_x, x, gradient)), strict=True):
            images, slopes = _images(part, inner), _images(slope, inner)
            if ctx.needs_input_grad[0]:
                _write(place, find(slopes, images, weight, *options, [True, False, False])[0])
            if ctx.needs_input_grad[1]:
                wide = (_at_least(value, sides) for value in (slopes, images))
                of_kernel += find(*wide, weight, *options, [False, True, False])[1]
        of_bias = gradient.sum((0, 2, 3), dtype=kernel.dtype) if ctx.needs_input_grad[2] else None
        return (of_x, of_kernel, of_bias, None, None, None)


def _parts(x: torch.Tensor, steps: Sequence[int]) -> Iterator[torch.Tensor]:
    """Views (N,a,b,h,w,C) of ``x`` (N,C,H,W), its N a b small images of one size, in parts that stay in the cache."""
    x = x.permute(0, 2, 3, 1)
    for top, rows in _offsets(x.shape[1], steps[0]):
        for left, columns in _offsets(x.shape[2], steps[1]):
            windows = x[:, top:, left:].unfold(1, rows, steps[0]).unfold(2, columns, steps[1])
            images = windows.permute(0, 4, 5, 1, 2, 3)
            yield from images.split(max(1, PART_ELEMENTS // max(1, images[:, :1].numel())), dim=1)


def _offsets(extent: int, step: int) -> list[tuple[int, int]]:
    """First offset and number of the offsets at which ``extent`` has one pixel more than at others, and of those."""
    longer = extent % step
    return [(first, count) for first, count in ((0, longer), (longer, step - longer)) if count and first < extent]


def _images(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N,a,b,h,w,C) to (N a b,C,h,w), channels last, in ``dtype``."""
    return part.flatten(0, 2).permute(0, 3, 1, 2).to(dtype)


def _write(place: torch.Tensor, images: torch.Tensor) -> None:
    """The reverse of :func:`_images`, into ``place``."""
    place.copy_(images.permute(0, 2, 3, 1).reshape(place.shape))


def _at_least(images: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """``images`` with zeros at the end of what is shorter than ``sides``: oneDNN takes 50 times as long without."""
    missing = [max(0, side - extent) for side, extent in zip(sides, images.shape[2:], strict=True)]
    return F.pad(images, (0, missing[1], 0, missing[0])) if any(missing) else images


class InFloat32(nn.Module):
    """Mixin in front of a convolution: trained on a CPU under autocast, it computes in float32, unless it is split."""

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        plain = not (self.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
        if plain or (isinstance(self, ByPhases) and self.is_split(x)):
            return super().forward(x, *rest, **named)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float(), *rest, **named).to(torch.get_autocast_dtype("cpu"))


def fit_for_cpu(net: nn.Module) -> None:
    """Put :class:`ByPhases` and :class:`InFloat32` in front of the convolutions of ``net`` that need it, in place."""
    for module in net.modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.groups == 1:
            continue
        wrong_or_slow = _is_wrong(module) or _is_slow(module)
        if _keeps_size(module) and type(module).forward is nn.Conv2d.forward:
            mix_in(ByPhases, module)
        if wrong_or_slow:
            mix_in(InFloat32, module)


def _keeps_size(layer: Any) -> bool:
    """True for depthwise convolutions with a dilation whose output has the size of their input."""
    sides = zip(layer.dilation, layer.kernel_size, layer.padding, strict=False)
    return (
        layer.groups == layer.in_channels
        and max(layer.dilation) > 1 == max(layer.stride)
        and layer.padding_mode == "zeros"
        and all(side % 2 == 1 and padding == step * (side // 2) for step, side, padding in sides)
    )


def _is_wrong(layer: Any) -> bool:
    """True where the gradient of the weights, in bfloat16 and channels last, is memory that nobody wrote.

    Seen with oneDNN 3 on maps wider than 28; where the dilation is 24 or more, the process may crash.
    """
    widths = (channels // layer.groups for channels in (layer.in_channels, layer.out_channels))
    return max(layer.dilation) > 1 and any(width % 16 for width in widths)


def _is_slow(layer: Any) -> bool:
    """True for depthwise convolutions with strides or of more than 3 x 3: 1.5 to 7 times as fast in float32.

    A step of DeepLabV3+ on EfficientNet-Lite0 takes three quarters of the time so.
    """
    is_depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels
    return is_depthwise and (max(layer.kernel_size) > 3 or max(layer.stride) > 1)
