"""Bilinear resampling in bands of rows, so that no full-size map of all classes ever exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from segkit.bilinear import Size

BAND_ELEMENTS = 1 << 22
"""A band holds about so many values at most (16 MiB in float32)."""


def band_slices(size: Size, num_maps: int) -> Iterator[slice]:
    """Rows 0..H-1 cut into bands of about `BAND_ELEMENTS` values, ``num_maps`` values to a pixel."""
    height, width = size
    rows = max(1, BAND_ELEMENTS // max(1, num_maps * width))
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def argmax_channel(scores: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Index of the largest of (N, K, H, W) along K, the first one among equals, as ``dtype``."""
    if scores.device.type != "cpu":
        return scores.argmax(1).to(dtype)
    # On the CPU a pass per class over whole rows is several times as fast as a reduction over a strided axis.
    best = scores[:, 0].clone()
    index = torch.zeros_like(best, dtype=dtype)
    for k in range(1, scores.shape[1]):
        index.masked_fill_(scores[:, k] > best, k)
        torch.maximum(best, scores[:, k], out=best)
    return index


def class_dtype(num_classes: int) -> torch.dtype:
    """Smallest type for class numbers: uint8 up to 256 classes, int16 beyond."""
    return torch.uint8 if num_classes <= 256 else torch.int16
