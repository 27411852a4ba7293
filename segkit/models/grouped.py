"""Convolutions with groups in bfloat16 on a CPU: where oneDNN's gradient is wrong, or several times as slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from segkit.models.any_size import mix_in


class InFloat32(nn.Module):
    """Mixin in front of a convolution: trained on a CPU under autocast, it computes in float32."""

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if not (self.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x, *rest, **named)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float(), *rest, **named).to(torch.get_autocast_dtype("cpu"))


def prefer_float32(net: nn.Module) -> None:
    """Put :class:`InFloat32` in front of the convolutions of ``net`` that need it, or gain by it, in place."""
    for module in net.modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.groups == 1:
            continue
        if _is_wrong(module) or _is_slow(module):
            mix_in(InFloat32, module)


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
