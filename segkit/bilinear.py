"""The one bilinear interpolation (align_corners=False): positions, rows of a map, small matrices for one axis.

Output i lies at (i + 1/2) ratio - 1/2 on the input axis, within its first and last cell, between two neighbours;
``ratio`` is the number of inputs to an output.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""(height, width) in pixels"""


class Taps(NamedTuple):
    """For each output the two inputs that it mixes, int64, and the share of the second (of :func:`widest`)."""

    left: Tensor
    right: Tensor
    share: Tensor


def widest(device: torch.device | None) -> torch.dtype:
    """float64, or float32 on a GPU of Apple's (MPS), which has no wider type."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def taps(outputs: slice, *, ratio: float, num_in: int, device: torch.device | None = None) -> Taps:
    """What the ``outputs`` start..stop-1 of an axis of ``num_in`` inputs are made of."""
    places = torch.arange(outputs.start, outputs.stop, device=device, dtype=widest(device))
    position = ((places + 0.5) * ratio - 0.5).clamp(0, num_in - 1)
    left = position.long()
    return Taps(left, (left + 1).clamp(max=num_in - 1), position - left)


def resample(x: Tensor, axis: int, outputs: slice, *, ratio: float) -> Tensor:
    """``x`` interpolated along ``axis`` at the ``outputs``, in its own dtype; a view where ``ratio`` is 1.

    (``F.interpolate`` copies its input, whatever the scale, where the sizes happen to be equal.)
    """
    if ratio == 1.0:
        return x.narrow(axis, outputs.start, outputs.stop - outputs.start)
    mixed = taps(outputs, ratio=ratio, num_in=x.shape[axis], device=x.device)
    shape = [1] * x.dim()
    shape[axis] = len(mixed.left)
    return torch.lerp(
        x.index_select(axis, mixed.left), x.index_select(axis, mixed.right), mixed.share.to(x.dtype).view(shape)
    )


class Span(NamedTuple):
    """Output positions ``out`` of one axis, the input positions first..last-1 that reach them, and the weights."""

    out: slice
    first: int
    last: int
    matrix: Tensor


@functools.lru_cache(maxsize=64)
def spans(
    num_in: int, num_out: int, size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Span, ...]:
    """All outputs of one axis in spans of at most ``size``; matrices (outputs, inputs), kept on their ``device``."""
    count = -(-num_out // size)
    edges = [round(i * num_out / count) for i in range(count + 1)]
    found = (_span(num_in, num_out, slice(start, stop)) for start, stop in itertools.pairwise(edges))
    return tuple(span._replace(matrix=span.matrix.to(device, dtype)) for span in found)


def _span(num_in: int, num_out: int, outputs: slice) -> Span:
    left, right, share = taps(outputs, ratio=num_in / num_out, num_in=num_in)
    first, last = int(left[0]), int(right[-1]) + 1
    matrix = torch.zeros(len(left), last - first, dtype=torch.float64)
    matrix.scatter_add_(1, (left - first)[:, None], 1 - share[:, None])
    matrix.scatter_add_(1, (right - first)[:, None], share[:, None])
    return Span(outputs, first, last, matrix)


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
        upper, lower, share = taps(rows, ratio=high / height, num_in=num_rows, device=maps.device)
        above, below = maps[:, :, upper - first].to(dtype), maps[:, :, lower - first].to(dtype)
        band = torch.lerp(above, below, share.to(dtype)[:, None])
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
