"""Bilinear resampling in bands of rows, so that no full-size map of all classes ever exists."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_ELEMENTS = 1 << 22
"""A band holds about so many values at most (16 MiB in float32)."""

Size = tuple[int, int]
"""(height, width) in pixels"""


def band_slices(size: Size, num_maps: int) -> Iterator[slice]:
    """Rows 0..H-1 cut into bands of about `BAND_ELEMENTS` values, ``num_maps`` values to a pixel."""
    height, width = size
    rows = max(1, BAND_ELEMENTS // max(1, num_maps * width))
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def source_rows(rows: slice, *, height: int, extent: float, num_rows: int) -> slice:
    """Rows of a map that `resized_rows` mixes for the rows ``rows`` of ``height``; ``extent`` is the vertical one."""
    if extent == height:
        return rows
    ends = (min(max((y + 0.5) * (extent / height) - 0.5, 0), num_rows - 1) for y in (rows.start, rows.stop - 1))
    upper, lower = (math.floor(position) for position in ends)
    return slice(upper, min(lower + 2, num_rows))


def resized_rows(
    maps: Tensor,
    size: Size,
    rows: slice,
    *,
    extent: tuple[float, float] | None = None,
    first: int = 0,
    num_rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows ``rows`` of ``maps`` (N, C, h, w) resized bilinearly to ``size``: float (N, C, len(rows), W).

    Equal but for rounding to those rows of ``F.interpolate(maps, size, mode="bilinear", align_corners=False)``:
    the interpolation is separable, so the few input rows of the band are mixed first, and each row after that.

    ``extent`` (height, width), in cells of ``maps``, is the part that becomes ``size``; cells to the right of it
    and below were computed from padding. Default: all. Of maps with ``num_rows`` rows, ``maps`` may hold only those
    from ``first`` on, as long as those of `source_rows` are among them. ``dtype`` of the result: that of ``maps``,
    or float32 for integers.
    """
    num_rows, low_width = maps.shape[2] if num_rows is None else num_rows, maps.shape[3]
    high, wide = (float(num_rows), float(low_width)) if extent is None else extent
    height, width = size
    if dtype is None:
        dtype = maps.dtype if maps.is_floating_point() else torch.float32
    if high == height:
        band = maps[:, :, rows.start - first : rows.stop - first].to(dtype)
    else:
        # Row y of the output lies at (y + 1/2) h / H - 1/2 of the input, held within its first and last row.
        y = torch.arange(rows.start, rows.stop, device=maps.device, dtype=torch.float64)
        position = ((y + 0.5) * (high / height) - 0.5).clamp(0, num_rows - 1)
        upper = position.floor().long()
        lower = (upper + 1).clamp(max=num_rows - 1)
        fraction = (position - upper).to(dtype)[:, None]
        upper, lower = upper - first, lower - first
        band = torch.lerp(maps[:, :, upper].to(dtype), maps[:, :, lower].to(dtype), fraction)
    if wide == width:
        return band[..., :width]
    if wide == low_width:
        return F.interpolate(band, size=(band.shape[2], width), mode="bilinear", align_corners=False)
    stretched = F.interpolate(
        band,
        scale_factor=(1.0, width / wide),
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )
    return stretched[..., :width]


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
