"""Losses of overlaps: Dice, generalised Dice, Tversky, Jaccard.

All are functions of three numbers per class, pooled over the valid pixels of the whole batch, with softmax
probabilities p and one-hot labels t:

    hits_k = sum p_k t_k        mass_k = sum p_k        size_k = sum t_k
    false positives FP_k = mass_k - hits_k              false negatives FN_k = size_k - hits_k

A class without a valid pixel in the batch is left out of the mean: it neither costs nor rewards anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import check_number
from segkit.losses import tiles
from segkit.losses.checks import check_inputs, settings
from segkit.losses.elementary import LOG2_E
from segkit.losses.pixelwise import CrossEntropyLoss
from segkit.losses.tiles import Block, GradientSum, Labels, Workspace, compute_dtype, fill_columns, sum_dtype


def softmax_tile(s: Tensor, y: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """p_y (P,) and p (K,P), p = softmax(s): a tile function whose results are no loss and no gradient.

    Not torch.softmax, whose last bits depend on the number of threads.
    """
    p = torch.sub(s, s.amax(0), out=work.buffer("probabilities", s)).mul_(LOG2_E).exp2_()
    p.mul_(1 / p.sum(0))
    return p.gather(0, y[None])[0], p


class _SoftCounts(torch.autograd.Function):
    """Hits, mass and size, (K,) each, of logits (N,K,h,w) at any stride: the head of this file.

    Tile by tile in both directions: the probabilities are computed twice and never stored.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, target)
        ctx.ignore_index = ignore_index
        found = torch.zeros(3, logits.shape[1], dtype=sum_dtype(logits), device=logits.device)

        def count(_: Block, labels: Labels, p_label: Tensor, p: Tensor) -> Tensor:
            part = torch.zeros_like(found)
            part[0].scatter_add_(0, labels.classes, p_label.to(part.dtype))
            part[1] = p.sum(1)
            part[2].scatter_add_(
                0, labels.classes, fill_columns(torch.ones_like(p_label, dtype=part.dtype), labels.void)
            )
            return part

        for blocks in tiles.cut(logits, target):
            found += sum(tiles.run(blocks, softmax_tile, count, ignore_index=ignore_index))
        hits, mass, size = found.to(compute_dtype(logits))
        ctx.mark_non_differentiable(size)
        return hits, mass, size

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_hits: Tensor, d_mass: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        gradient = GradientSum(logits, target)

        def write(block: Block, labels: Labels, p_label: Tensor, p: Tensor) -> Tensor | None:
            # dL/dp_k = v_k = d_mass_k + [k = y] d_hits_k;  dL/ds_k = p_k (v_k - sum_j p_j v_j)
            at_label = labels.classes[None]
            label_slope = p_label * d_hits[labels.classes]
            slope = p * d_mass[:, None]
            # a sum, not a matrix-vector product: the latter may round differently from one call to the next
            mean = slope.sum(0) + label_slope
            slope.scatter_add_(0, at_label, label_slope[None]).addcmul_(p, mean, value=-1)
            return gradient.write(block, slope)

        for blocks in tiles.cut(logits, target):
            gradient.add(blocks, tiles.run(blocks, softmax_tile, write, ignore_index=ctx.ignore_index))
        return gradient.result(), None, None


class RegionLoss(nn.Module):
    """A loss of (hits, mass, size); subclasses give ``of_counts``."""

    pixel_decomposable = False
    extra_repr = settings

    def __init__(self, *, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = int(ignore_index)

    def of_counts(self, hits: Tensor, mass: Tensor, size: Tensor) -> Tensor:
        """() loss of the three (K,) vectors."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor, *, denominator: None = None) -> Tensor:
        """() loss of ``logits`` (N,K,h,w) against ``target`` (N,H,W); 0 if every pixel is ignored."""
        assert denominator is None, "not a sum over pixels: there is nothing to divide by"
        check_inputs(logits, target, ignore_index=self.ignore_index)
        return self.of_counts(*_SoftCounts.apply(logits, target, self.ignore_index))


class TverskyLoss(RegionLoss):
    """1 - mean over present classes of the Tversky index (Salehi et al., MLMI 2017).

    index_k = (hits_k + smooth) / (hits_k + alpha FP_k + beta FN_k + smooth), ``smooth`` in pixels. alpha =
    beta = 0.5 is Dice, alpha = beta = 1 is Jaccard; beta > alpha punishes missed pixels more than false
    alarms.
    """

    def __init__(self, *, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__(ignore_index=ignore_index)
        self.alpha = check_number(alpha, "alpha", low=0.0)
        self.beta = check_number(beta, "beta", low=0.0)
        self.smooth = check_number(smooth, "smooth", low=0.0)

    def of_counts(self, hits: Tensor, mass: Tensor, size: Tensor) -> Tensor:
        top = hits + self.smooth
        bottom = top + self.alpha * (mass - hits) + self.beta * (size - hits)
        index = torch.where(bottom == 0, 1, top / torch.where(bottom == 0, 1, bottom))  # 1 where it is 0 / 0
        present = size > 0
        return torch.where(present, 1 - index, 0).sum() / present.sum().clamp(min=1)


class DiceLoss(TverskyLoss):
    """1 - mean over present classes of 2 (hits + smooth) / (mass + size + 2 smooth), ``smooth`` in pixels.

    ``smooth`` counts as so many more hits (2 smooth on both sides), which keeps Dice = Tversky(0.5, 0.5) and
    Jaccard = Dice / (2 - Dice) exact.
    """

    def __init__(self, *, smooth: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__(alpha=0.5, beta=0.5, smooth=smooth, ignore_index=ignore_index)


class GeneralizedDiceLoss(RegionLoss):
    """1 - 2 sum_k w_k hits_k / sum_k w_k (mass_k + size_k), w_k = 1 / size_k^2 (Sudre et al., DLMIA 2017).

    The weights are pooled over the batch. A class without pixels has weight 0 (the formula would give it all
    the weight there is); what the model gives to it is missing from the hits of the others.
    """

    def of_counts(self, hits: Tensor, mass: Tensor, size: Tensor) -> Tensor:
        # relative to the smallest class: 1 / size^2 itself leaves the range of float32 for large batches
        smallest = torch.where(size > 0, size, torch.inf).amin()
        weight = torch.where(size > 0, (smallest / size.clamp(min=1)) ** 2, 0)
        bottom = (weight * (mass + size)).sum()
        index = 2 * (weight * hits).sum() / torch.where(bottom > 0, bottom, 1)
        return torch.where(bottom > 0, 1 - index, 0 * index)


class JaccardMetricLoss(nn.Module):
    """``ce_weight`` cross-entropy + ``jaccard_weight`` Jaccard metric loss (Wang et al., NeurIPS 2023).

    The Jaccard metric loss of class k, with L1 norms over the valid pixels of the batch, is
    1 - (|p + t| - |p - t|) / (|p + t| + |p - t|); for one-hot t that is the soft Jaccard loss
    1 - hits / (mass + size - hits), averaged over present classes.
    """

    pixel_decomposable = False

    def __init__(self, *, ce_weight: float = 0.25, jaccard_weight: float = 0.75, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = int(ignore_index)
        self.ce_weight = check_number(ce_weight, "ce_weight", low=0.0)
        self.jaccard_weight = check_number(jaccard_weight, "jaccard_weight", low=0.0)
        self.cross_entropy = CrossEntropyLoss(ignore_index=ignore_index)
        self.jaccard = TverskyLoss(alpha=1.0, beta=1.0, smooth=0.0, ignore_index=ignore_index)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: None = None) -> Tensor:
        """() loss of ``logits`` (N,K,h,w) against ``target`` (N,H,W); 0 if every pixel is ignored."""
        assert denominator is None, "not a sum over pixels: there is nothing to divide by"
        check_inputs(logits, target, ignore_index=self.ignore_index)
        return self.ce_weight * self.cross_entropy(logits, target) + self.jaccard_weight * self.jaccard(logits, target)
