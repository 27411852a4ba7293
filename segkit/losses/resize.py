"""Bilinear interpolation (align_corners=False) as small matrices, one for each axis.

Output i of ``num_out`` lies at (i + 1/2) num_in / num_out - 1/2 on the input axis, not below 0, between two neighbours.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Output positions ``out`` of one axis, the input positions first..last-1 that reach them, and the weights."""

    out: slice
    first: int
    last: int
    matrix: Tensor


@functools.lru_cache(maxsize=64)
def spans(num_in: int, num_out: int, size: int) -> tuple[Span, ...]:
    """All outputs of one axis in spans of at most ``size``; matrices (outputs, inputs) in float64 on the CPU."""
    count = -(-num_out // size)
    edges = [round(i * num_out / count) for i in range(count + 1)]
    return tuple(_span(num_in, num_out, start, stop) for start, stop in itertools.pairwise(edges))


def _span(num_in: int, num_out: int, start: int, stop: int) -> Span:
    position = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * (num_in / num_out) - 0.5).clamp(min=0)
    left = position.long().clamp(max=num_in - 1)
    right = (left + 1).clamp(max=num_in - 1)
    first, last = int(left[0]), int(right[-1]) + 1
    share = (position - left)[:, None]
    matrix = torch.zeros(stop - start, last - first, dtype=torch.float64)
    matrix.scatter_add_(1, (left - first)[:, None], 1 - share).scatter_add_(1, (right - first)[:, None], share)
    return Span(slice(start, stop), first, last, matrix)


def bilinear_matrix(num_in: int, num_out: int) -> Tensor:
    """(num_out, num_in) float64: the whole axis."""
    span = spans(num_in, num_out, num_out)[0]
    matrix = torch.zeros(num_out, num_in, dtype=torch.float64)
    matrix[:, span.first : span.last] = span.matrix
    return matrix
