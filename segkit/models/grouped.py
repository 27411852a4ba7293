"""Convolutions with groups on a CPU, where oneDNN is wrong, or several times as slow as it might be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from segkit.models.any_size import mix_in


class ByPhases(nn.Module):
    """Mixin in front of a depthwise convolution with a dilation d: on a CPU, one without, of d x d small images.

    Each has every d-th pixel of the map, and no tap of the kernel leads from one to another: the same sums, which
    oneDNN computes in a tenth to two thirds of the time. Taps that reach beyond every border are left out.
    """

    dilation: tuple[int, int]
    weight: torch.Tensor
    bias: torch.Tensor | None
    groups: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_split(x):
            return super().forward(x)
        height, width = x.shape[-2:]
        kernel, steps = self.weight, list(self.dilation)
        for axis, extent in enumerate((height, width)):
            if steps[axis] >= extent:
                kernel = kernel.narrow(2 + axis, kernel.shape[2 + axis] // 2, 1)
                steps[axis] = 1
        small = _to_phases(F.pad(x, (0, -width % steps[1], 0, -height % steps[0])), *steps)
        found = F.conv2d(small, kernel, self.bias, padding=[side // 2 for side in kernel.shape[2:]], groups=self.groups)
        found = _from_phases(found, *steps)[..., :height, :width]
        return found.contiguous(memory_format=torch.channels_last)

    def is_split(self, x: torch.Tensor) -> bool:
        """False where the plain convolution is wanted: on other devices, and in graphs."""
        return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    def gains_by_bfloat16(self, x: torch.Tensor) -> bool:
        """True for ``x`` that is split, unless the kernel is large or a small image has two pixels along a side."""
        steps = zip(self.dilation, x.shape[-2:], strict=True)
        sides = (-(-extent // step) for step, extent in steps if step < extent)
        return self.is_split(x) and max(self.weight.shape[2:]) <= 3 and 2 not in sides


def _to_phases(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(N,C,H,W) to (N rows columns, C, H / rows, W / columns): pixels (i, j) of each remainder in an image."""
    num, channels, height, width = x.shape
    grid = x.permute(0, 2, 3, 1).reshape(num, height // rows, rows, width // columns, columns, channels)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _from_phases(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The reverse of :func:`_to_phases`."""
    num, channels, height, width = x.shape
    grid = x.permute(0, 2, 3, 1).reshape(num // (rows * columns), rows, columns, height, width, channels)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class InFloat32(nn.Module):
    """Mixin in front of a convolution: trained on a CPU under autocast, it computes in float32, if it gains by it."""

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        plain = not (self.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
        if plain or (isinstance(self, ByPhases) and self.gains_by_bfloat16(x)):
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
