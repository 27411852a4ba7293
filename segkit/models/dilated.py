"""Dilated convolutions with groups in bfloat16 on a CPU, whose gradient oneDNN gets wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from segkit.models.any_size import mix_in


class InFloat32(nn.Module):
    """Mixin in front of a convolution: trained on a CPU under autocast, it computes in float32.

    oneDNN's gradient of the weights, of convolutions with groups and a dilation, in bfloat16 and channels last, is
    memory that nobody wrote where a map is wider than 28 and the inputs of a group are no multiple of 16; where the
    dilation is 24 or more, the process may crash. Depthwise ones take half of the time in float32.
    """

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if not (self.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x, *rest, **named)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float(), *rest, **named).to(torch.get_autocast_dtype("cpu"))


def protect_gradients(net: nn.Module) -> None:
    """Put :class:`InFloat32` in front of every convolution of ``net`` that needs it, in place."""
    for module in net.modules():
        if not isinstance(module, nn.Conv2d) or module.groups == 1 or max(module.dilation) == 1:
            continue
        if module.in_channels // module.groups % 16:
            mix_in(InFloat32, module)
