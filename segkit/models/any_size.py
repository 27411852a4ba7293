"""Images of any size through networks that want multiples of a number.

The image is padded with zeros (the mean colour, for a normalised image) at the bottom and the right; the logits are
cut back so that they cover exactly the image again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from segkit.bilinear import resample


def padded_size(size: int, multiple: int) -> int:
    """Return the least multiple of ``multiple`` that is not less than ``size``."""
    return (size + multiple - 1) // multiple * multiple


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return ``x`` (N, C, H, W) with zeros at the bottom and the right, so that ``multiple`` divides H and W."""
    height, width = x.shape[-2:]
    rows, columns = padded_size(height, multiple) - height, padded_size(width, multiple) - width
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def crop_to(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the upper left ``size`` (height, width) of ``x`` (N, C, H, W)."""
    return x[..., : size[0], : size[1]]


def fit_logits(logits: torch.Tensor, *, padded: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Return logits that cover ``size`` only, from the logits (N, K, h, w) of the image padded to ``padded``.

    Result: (N, K, ceil(H / s), ceil(W / s)) at the stride s = padded height / h, such that bilinear interpolation
    with ``align_corners=False`` to ``size`` puts every logit over the pixels that it was computed from. Where s
    divides the size, that is a crop. Elsewhere the last cell would reach beyond the border, and interpolation would
    stretch the grid by up to s - 1 pixels; so the grid is sampled again at the centres of cells of size H / h.
    """
    for axis, whole, extent in zip((-2, -1), padded, size, strict=True):
        stride = whole / logits.shape[axis]
        cells = -int(-extent // stride)
        logits = resample(logits, axis, slice(0, cells), ratio=extent / (stride * cells))
    return logits


class AnySize(nn.Module):
    """Mixin in front of a network class whose ``size_multiple`` says what its input must be a multiple of."""

    size_multiple: int

    def forward(self, x: torch.Tensor) -> Any:
        padded = pad_to_multiple(x, self.size_multiple)
        logits = super().forward(padded)
        if padded.shape == x.shape:
            return logits
        return fit_logits(logits, padded=padded.shape[-2:], size=x.shape[-2:])


class Windowed(nn.Module):
    """Mixin in front of a network class that takes images of ``window`` x ``window`` only.

    Any other image is cut into such windows side by side, which do not see each other; their logits are put together.
    """

    window: int

    def forward(self, x: torch.Tensor) -> Any:
        side = self.window
        padded = pad_to_multiple(x, side)
        size = padded.shape[-2:]
        rows, columns = size[0] // side, size[1] // side
        tiles = padded.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
        logits = super().forward(tiles.flatten(0, 2)).unflatten(0, (-1, rows, columns))
        logits = logits.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return logits if size == x.shape[-2:] else fit_logits(logits, padded=size, size=x.shape[-2:])


@functools.cache
def _subclass(mixin: Any, cls: Any) -> Any:
    return type(cls.__name__, (mixin, cls), {"__doc__": cls.__doc__})


def mix_in(mixin: Any, module: nn.Module) -> None:
    """Put ``mixin`` in front of the class of ``module``, in place; parameters and their names stay as they are.

    (A wrapping module would put its own name in front of every key of the state dict.)
    """
    cls: Any = type(module)
    module.__class__ = _subclass(mixin, cls)


def accept_any_size(net: nn.Module, *, multiple: int) -> nn.Module:
    """Make ``net`` accept images of any size, in place; returns ``net``."""
    mix_in(AnySize, net)
    vars(net).update(size_multiple=multiple)
    return net
