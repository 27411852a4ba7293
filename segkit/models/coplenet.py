"""COPLE-Net, a U-shaped network with squeeze-and-excitation blocks.

G. Wang et al., "A Noise-robust Framework for Automatic Segmentation of COVID-19 Pneumonia Lesions from CT Images",
IEEE Transactions on Medical Imaging, 2020. What sets it apart from a U-Net: max pooling and average pooling side by
side, a bridge that halves the channels of every skip connection, atrous spatial pyramid pooling at the bottom,
up-sampling without learnt kernels, and a residual connection around each block.

The names of parameters are those of the published weights, which load as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from segkit.errors import InputError
from segkit.models.any_size import crop_to, pad_to_multiple
from segkit.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, set_normalisation
from segkit.models.weights import load_model_weights

NUM_LEVELS = 5
STRIDE = 2 ** (NUM_LEVELS - 1)
ASPP_DILATIONS = (2, 4, 6)
"""Of the three 3x3 branches of the pyramid; the first branch is a 1x1 convolution."""
SQUEEZE = 2
"""Factor by which a squeeze-and-excitation block narrows the channels."""

Norm = Callable[[int], nn.Module]


class ChannelGate(nn.Module):
    """Squeeze and excitation with a residual: ``x * (1 + g(mean(x)))`` with a gate g >= 0 for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se_layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // SQUEEZE, kernel_size=1),
            nn.LeakyReLU(),
            nn.Conv2d(channels // SQUEEZE, channels, kernel_size=1),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x * self.se_layers(x)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with a norm and a leaky ReLU, dropout between them, then a channel gate."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.conv_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            norm(out_channels),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            norm(out_channels),
            nn.LeakyReLU(),
            ChannelGate(out_channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_conv(x)


class Down(nn.Module):
    """Halve the size by max and average pooling side by side, then a residual :class:`DoubleConv`.

    The two poolings double the channels, and the residual wants as many channels behind the block.
    """

    def __init__(self, channels: int, *, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.conv = DoubleConv(2 * channels, 2 * channels, norm=norm, dropout=dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], dim=1)
        return pooled + self.conv(pooled)


class Up(nn.Module):
    """Narrow, double the size bilinearly, put the bridged skip connection in front, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(in_channels, out_channels // 2, kernel_size=1)
        self.conv = DoubleConv(out_channels, out_channels, norm=norm, dropout=dropout)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(self.conv1x1(x), scale_factor=2.0, mode="bilinear", align_corners=True)
        joined = torch.cat([skip, x], dim=1)
        return joined + self.conv(joined)


class Bridge(nn.Module):
    """A 1x1 convolution that halves the channels of a skip connection."""

    def __init__(self, channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=1), norm(channels // 2), nn.LeakyReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: four convolutions of growing dilation, a quarter of the channels each."""

    def __init__(self, channels: int, *, norm: Norm) -> None:
        super().__init__()
        part = channels // 4
        self.conv_1 = nn.Conv2d(channels, part, kernel_size=1)
        self.conv_2, self.conv_3, self.conv_4 = (
            nn.Conv2d(channels, part, kernel_size=3, padding=dilation, dilation=dilation) for dilation in ASPP_DILATIONS
        )
        self.conv_1x1 = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1), norm(channels), nn.LeakyReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        return self.conv_1x1(torch.cat(branches, dim=1))


class COPLENet(nn.Module):
    """COPLE-Net: images (N, in_channels, H, W) float -> logits (N, num_classes, H, W), for any H and W.

    ``feature_channels``: channels of the five levels, each twice the one before. ``norm``: ``batch`` is the
    published network, ``group`` (``num_groups`` groups) the one of the margin calibration paper. ``dropout``: the
    probability inside the blocks of each level, on the way down and on the way up. ``weights``: a file with the
    whole state dict, of the published network or a checkpoint of segkit.

    Sizes that are no multiples of 16 are padded with zeros at the bottom and the right, and the logits cropped.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        feature_channels: Sequence[int] = (16, 32, 64, 128, 256),
        norm: Literal["batch", "group"] = "group",
        num_groups: int = 4,
        dropout: Sequence[float] = (0.0, 0.0, 0.3, 0.4, 0.5),
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        make_norm = _norm(norm, num_groups=num_groups, feature_channels=feature_channels)
        if len(dropout) != NUM_LEVELS or not all(0 <= share <= 1 for share in dropout):
            raise InputError(
                f"model.dropout is {list(dropout)}, but COPLE-Net has five levels, each with a share from 0 to 1: "
                "set model.dropout=[0.0,0.0,0.3,0.4,0.5]"
            )
        channels = list(feature_channels)
        self.in_conv = DoubleConv(in_channels, channels[0], norm=make_norm, dropout=dropout[0])
        for level in range(1, NUM_LEVELS):
            self.add_module(f"down{level}", Down(channels[level - 1], norm=make_norm, dropout=dropout[level]))
        for level in range(NUM_LEVELS - 1):
            self.add_module(f"bridge{level}", Bridge(channels[level], norm=make_norm))
        for step, level in enumerate(reversed(range(NUM_LEVELS - 1)), start=1):
            up = Up(channels[level + 1], channels[level], norm=make_norm, dropout=dropout[level])
            self.add_module(f"up{step}", up)
        self.aspp = Pyramid(channels[-1], norm=make_norm)
        self.out_conv = nn.Conv2d(channels[0], num_classes, kernel_size=3, padding=1)
        colour = in_channels == len(IMAGENET_MEAN)
        other = (0.5,) * in_channels
        set_normalisation(self, IMAGENET_MEAN if colour else other, IMAGENET_STD if colour else other)
        if weights is not None:
            load_model_weights(self, weights)

    def checkpoint_blocks(self) -> list[nn.Module]:
        """Return the blocks that gradient checkpointing recomputes."""
        return [module for name, module in self.named_children() if name != "out_conv"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes, H, W) of the normalised images ``x`` (N, in_channels, H, W)."""
        size = x.shape[-2:]
        x = self.in_conv(pad_to_multiple(x, STRIDE))
        skips = []
        for level in range(NUM_LEVELS - 1):
            skips.append(self.get_submodule(f"bridge{level}")(x))
            x = self.get_submodule(f"down{level + 1}")(x)
        x = self.aspp(x)
        for step in range(1, NUM_LEVELS):
            x = self.get_submodule(f"up{step}")(x, skips.pop())
        return crop_to(self.out_conv(x), size)


def _norm(norm: str, *, num_groups: int, feature_channels: Sequence[int]) -> Norm:
    """Return the norm layer by name; InputError unless the channels fit it and each other."""
    channels = list(feature_channels)
    doubling = len(channels) == NUM_LEVELS and all(b == 2 * a for a, b in itertools.pairwise(channels))
    if not doubling or channels[0] < 2 or channels[0] % 2:
        raise InputError(
            f"model.feature_channels is {channels}, but COPLE-Net needs five even numbers, each twice the one before: "
            "set model.feature_channels=[16,32,64,128,256]"
        )
    if norm == "batch":
        return nn.BatchNorm2d
    if norm != "group":
        raise InputError(
            f"model.norm is {norm!r}, but must be 'batch' (the published network) or 'group' (the paper's): "
            "set model.norm=group"
        )
    if num_groups < 1 or (channels[0] // 2) % num_groups:
        raise InputError(
            f"model.num_groups is {num_groups}, but must divide {channels[0] // 2}, the channels of the narrowest "
            f"layer (half of the first of model.feature_channels): set model.num_groups={math.gcd(channels[0] // 2, 4)}"
        )
    return lambda num_channels: nn.GroupNorm(num_groups, num_channels)
