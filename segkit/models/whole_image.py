"""A network with all that evaluation does around it, in operations that can be traced for any batch and size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from segkit.models.any_size import AnySize, crop_to, padded_size
from segkit.models.coplenet import STRIDE, COPLENet
from segkit.models.segmenter import Segmenter

Head = Callable[[torch.Tensor], torch.Tensor]
"""logits (N, K, H, W) -> scores (N, K, H, W) whose argmax is the class"""


class WholeImage(nn.Module):
    """Images (N, C, H, W) float in 0..divisor -> logits (N, K, H, W), those that evaluation makes of ``segmenter``.

    The image is padded here to the multiple that the network wants; its logits are fitted to the image as
    :mod:`segkit.models.any_size` does it, and interpolated to the size of the image. ``head``: what is computed from
    them, the scores of a decision rule for example. ``classes``: return the number of the class with the largest logit
    or score instead, (N, H, W), uint8 for up to 256 classes and int64 beyond.
    """

    def __init__(self, segmenter: Segmenter, head: Head | None = None, *, classes: bool = False) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.head, self.classes = head, classes
        self.multiple = size_multiple(segmenter.net)
        self.stride = _stride(segmenter, self.multiple)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        whole = self._logits(images)
        whole = whole if self.head is None else self.head(whole)
        return whole.argmax(1).to(torch.uint8 if whole.shape[1] <= 256 else torch.int64) if self.classes else whole

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        images = self.segmenter.normalise(images)
        if self.multiple > 1:
            # The cuts here and below remove at least one row and one column, whatever the size: where a cut may remove
            # nothing, the tracer ties the graph to what it did for the example.
            padded = padded_size(height, self.multiple), padded_size(width, self.multiple)
            images = crop_to(F.pad(images, (0, self.multiple, 0, self.multiple)), padded)
        logits = self.segmenter.net(images).float()
        if self.stride == 1:
            return crop_to(F.pad(logits, (0, 1, 0, 1)), (height, width))
        if self.multiple > 1:
            logits = _fitted(_fitted(logits, -2, height, stride=self.stride), -1, width, stride=self.stride)
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def _fitted(logits: torch.Tensor, axis: int, extent: int, *, stride: int) -> torch.Tensor:
    """Return ``logits`` sampled along ``axis`` at ceil(extent / stride) cells that cover ``extent`` pixels exactly.

    The same as :func:`segkit.models.any_size.fit_logits`, in operations that can be traced for any ``extent``.
    """
    cells = torch.arange((extent + stride - 1) // stride, device=logits.device)
    position = ((cells.double() + 0.5) * extent / (stride * ((extent + stride - 1) // stride)) - 0.5).clamp(min=0)
    left = position.long()
    right = torch.minimum(left + 1, cells[-1])
    shape = [1] * logits.dim()
    shape[axis] = -1
    share = (position - left).to(logits.dtype).view(shape)
    lower = logits.index_select(axis, left)
    return lower + share * (logits.index_select(axis, right) - lower)


def _stride(segmenter: Segmenter, multiple: int) -> int:
    """Return the stride of the logits of a network that pads its images to ``multiple``; 0 for one that does not."""
    if multiple == 1:
        return 0
    net = segmenter.net
    was_training, parameter = net.training, next(net.parameters(), torch.zeros(()))
    net.eval()
    with torch.no_grad():
        logits = net(torch.zeros(1, len(segmenter.mean), 4 * multiple, 4 * multiple, device=parameter.device))
    net.train(was_training)
    return 4 * multiple // logits.shape[-2]


def size_multiple(net: nn.Module) -> int:
    """Return what the sides of the input of ``net`` must be multiples of."""
    if isinstance(net, AnySize):
        return net.size_multiple
    return STRIDE if isinstance(net, COPLENet) else 1


class _StaticSame(nn.Module):
    """A layer with the ``SAME`` padding of TensorFlow for inputs that its stride divides.

    timm computes that padding from the size at hand, which entangles every layer's shape with the image's, makes
    tracing take minutes, and ends in programs that torch cannot write.
    """

    kernel_size: Any
    stride: Any
    dilation: Any = (1, 1)
    fill = 0.0

    def forward(self, x: torch.Tensor) -> Any:
        pads: list[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            pads = [total // 2, total - total // 2, *pads]  # F.pad begins with the last axis
        return super().forward(F.pad(x, pads, value=self.fill))  # of the layer, which itself pads nothing


class _Conv(_StaticSame, nn.Conv2d):
    pass


class _AvgPool(_StaticSame, nn.AvgPool2d):
    pass


class _MaxPool(_StaticSame, nn.MaxPool2d):
    fill = -math.inf


STATIC = {"Conv2dSame": _Conv, "AvgPool2dSame": _AvgPool, "MaxPool2dSame": _MaxPool}
"""What stands in for layers of timm"""


def fix_same_padding(model: nn.Module) -> None:
    """Give timm's layers with dynamic padding a fixed one; the image is padded to a multiple of all strides."""
    for module in model.modules():
        module.__class__ = STATIC.get(type(module).__name__, type(module))
