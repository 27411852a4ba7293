"""A loss on logits below label resolution, without ever holding the logits at label resolution.

Bilinear up-sampling is linear and separable: a block of rows and columns is R X C^T, with R and C the slices of two
small matrices and X the few low-resolution logits that reach the block. So for each block: up-sample, take loss and
gradient G from the tile functions, give R^T G C to the gradient of the low-resolution logits, drop the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkit.bilinear import Span, spans
from segkit.errors import InputError
from segkit.losses.checks import check_inputs, shape
from segkit.losses.diagnostics import margin_sums
from segkit.losses.margin_calibration import MarginCalibrationLoss
from segkit.losses.parallel import each
from segkit.losses.sum import SumLoss
from segkit.losses.tiles import (
    LOGITS,
    Compute,
    KeptGradient,
    PixelLoss,
    TileRule,
    Workspace,
    compute_dtype,
    divides_early,
    fill_columns,
    fill_void,
    pixels_per_tile,
    positive,
    read_labels,
    sum_dtype,
)


class UpsampledLoss(nn.Module):
    """``loss`` of logits (N,K,h,w) that are up-sampled bilinearly (align_corners=False) to the size of the labels.

    ``banded``: True works block by block and never holds the up-sampled logits; only a pixel-decomposable loss can
    do that. None: True where the loss can. False: up-sample all at once. Value and gradient are the same.
    """

    def __init__(self, loss: Any, *, banded: bool | None = None) -> None:
        super().__init__()
        if banded and not loss.pixel_decomposable:
            raise InputError(
                f"{type(loss).__name__} is not a sum over pixels and cannot be computed in bands; set loss.banded=null"
            )
        self.loss = loss
        self.pixel_decomposable: bool = loss.pixel_decomposable
        self.banded = bool(loss.pixel_decomposable) if banded is None else banded

    def denominator(self, target: Tensor) -> Tensor:
        """What ``loss`` divides by."""
        return self.loss.denominator(target)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """The loss, (), of ``logits`` (N,K,h,w) against ``target`` (N,H,W)."""
        if logits.dim() != 4 or target.dim() != 3 or logits.shape[2:] == target.shape[1:]:
            return self.loss(logits, target, denominator=denominator)
        if len(logits) != len(target):
            raise InputError(
                f"logits of shape {shape(logits)} and target of shape {shape(target)} hold different numbers of images"
            )
        if not self.banded:
            scores = logits.to(compute_dtype(logits))
            full = F.interpolate(scores, size=target.shape[1:], mode="bilinear", align_corners=False)
            return self.loss(full, target, denominator=denominator)
        return KeptGradient.apply(logits, banded_mean(self.loss, logits, target, denominator))

    def diagnostics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Sums (K,) of ``segkit.losses.diagnostics.margin_sums``, at the margins of the loss where it has some."""
        for part in self.loss.modules():
            if isinstance(part, MarginCalibrationLoss):
                return part.diagnostics(logits, target)
        return margin_sums(logits, target, ignore_index=self.loss.ignore_index)


class Term(NamedTuple):
    """One loss of a weighted sum: its rule for a tile, what it ignores, its divisor () and its weight."""

    rule: TileRule
    ignore_index: int
    divisor: Tensor
    weight: float


def banded_mean(loss: Any, logits: Tensor, target: Tensor, denominator: Tensor | None) -> Compute:
    """What ``KeptGradient`` wants for ``loss`` of ``logits`` (N,K,h,w) against ``target`` (N,H,W), block by block."""
    losses: list[tuple[PixelLoss, float]] = loss.pixel_terms() if isinstance(loss, SumLoss) else [(loss, 1.0)]
    stand_in = logits.new_empty(()).expand(len(target), logits.shape[1], *target.shape[1:])
    for pixel_loss, _ in losses:
        check_inputs(stand_in, target, ignore_index=pixel_loss.ignore_index, num_classes=pixel_loss.num_classes)
    if denominator is None:
        denominator = loss.denominator(target)
    terms = []
    for (pixel_loss, weight), divisor in zip(losses, denominator.reshape(-1), strict=True):
        divisor = positive(divisor).to(compute_dtype(logits))
        terms.append(Term(pixel_loss.rule_for(logits), pixel_loss.ignore_index, divisor, weight))

    def compute(given: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # in half precision only ratios of divisors are applied here, the first divisor itself in the backward pass
        late = None if divides_early(given) else terms[0].divisor
        factors = [t.weight * t.rule.scale / t.divisor * (1 if late is None else late) for t in terms]
        gradient = torch.empty_like(given) if wanted else None
        totals = torch.zeros(len(terms), dtype=sum_dtype(given), device=given.device)
        for n in range(len(given)):
            band_sums(given[n], target[n], terms, factors, totals, None if gradient is None else gradient[n])
        value = sum(t.weight * t.rule.scale * total / t.divisor for t, total in zip(terms, totals, strict=True))
        return torch.as_tensor(value).to(compute_dtype(given)), gradient, late

    return compute


def band_sums(
    logits: Tensor, target: Tensor, terms: list[Term], factors: list[Any], totals: Tensor, gradient: Tensor | None
) -> None:
    """Add the sums of one image, ``logits`` (K,h,w) and ``target`` (H,W), to ``totals`` (T,).

    sum_t factors[t] times the gradient of the t-th sum is written to ``gradient`` (K,h,w) where one is given.
    """
    num_classes = len(logits)
    dtype = compute_dtype(logits)

    def tile(place: tuple[Span, Span], work: Workspace) -> tuple[list[Tensor], Tensor | None]:
        rows, columns = place
        low = logits[:, rows.first : rows.last, columns.first : columns.last].to(dtype)
        r, c = rows.matrix.to(logits.device, dtype), columns.matrix.to(logits.device, dtype)
        label_block = target[rows.out, columns.out]
        block = work.buffer(LOGITS, torch.Size((num_classes, *label_block.shape)))
        block = torch.matmul(r, torch.matmul(low, c.T), out=block).flatten(1)
        sums, slopes = [], None
        for i, term in enumerate(terms):
            label, void = read_labels(label_block, term.ignore_index)
            last = i == len(terms) - 1
            loss, slope = term.rule(fill_void(block if last else block.clone(), void), label, work)
            sums.append(fill_columns(loss, void).sum(dtype=totals.dtype))
            if gradient is not None:
                fill_columns(slope, void)
                if slopes is None:  # the next term would overwrite its workspace
                    slopes = slope.mul_(factors[i]) if last else slope * factors[i]
                else:
                    slopes.addcmul_(slope, factors[i])
        if slopes is None:
            return sums, None
        return sums, torch.matmul(torch.matmul(r.T, slopes.view(num_classes, *label_block.shape)), c)

    places = list(blocks(num_classes, target, logits.shape[1:]))
    split = logits.device.type == "cpu" and not any(term.rule.compile for term in terms)
    results = each(places, tile, lambda: Workspace(logits), split=split)
    whole = torch.zeros_like(logits, dtype=dtype)
    for (rows, columns), (sums, back) in zip(places, results, strict=True):
        totals += torch.stack(sums)
        if back is not None:  # blocks overlap by the inputs that reach both
            whole[:, rows.first : rows.last, columns.first : columns.last] += back
    if gradient is not None:
        gradient.copy_(whole)


def blocks(num_classes: int, target: Tensor, low: tuple[int, ...]) -> Iterator[tuple[Span, Span]]:
    """(rows, columns) of every block of ``target`` (H,W): nearly square, so that few inputs are read twice."""
    height, width = target.shape
    pixels = pixels_per_tile(num_classes, target.device)
    num_rows = min(height, max(1, math.isqrt(pixels)))
    num_columns = min(width, max(1, pixels // num_rows))
    num_rows = min(height, max(1, pixels // num_columns))
    columns = spans(low[1], width, num_columns)
    for rows in spans(low[0], height, num_rows):
        for column in columns:
            yield rows, column
