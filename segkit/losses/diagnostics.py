"""What margins do to a model: the lower bound of its IoU, and how far pixels stand from the decision boundary.

Source: Yu et al., IJCV 130(1), 2022, Eqs. 11-12 and Theorem 1. With the rho-margin loss phi and the margins lambda of
``segkit.losses.margin_calibration``:

    phi_rho(l) = min(1, max(0, 1 - l / rho)),  [l <= 0] for rho = 0
    l_k0 = (1/N) sum_{i in Y_k} phi_{rho_k0}(lambda_ik)      l_0k = (1/N) sum_{i not in Y_k} phi_{rho_0k}(-lambda_ik)
    lower bound of IoU_k = (P_k - l_k0) / (P_k + l_0k)

Batches are added up as sums over pixels, (K,) vectors, and divided once at the end: a mean of ratios of batches
would be something else. With the margins of the paper (tau = 10) the bound almost equals the IoU, so it is computed at
a fixed margin of ``FIXED_MARGIN`` logits too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit.bilinear import spans, widest
from segkit.errors import InputError, check_number
from segkit.losses.checks import check_inputs
from segkit.losses.tiles import compute_dtype

FIXED_MARGIN = 1.0
STRIDE = 8
"""Every 8th row and column of the labels enters: 1/64 of the pixels."""
LAMBDA_EDGES = np.sinh(np.arange(-30, 31) / 6)
"""Edges (61,) of the bins in which lambda_y is counted: fine around 0, which is one of them; up to 74 logits."""


def rho_margin_loss(margin: Tensor, rho: Tensor) -> Tensor:
    """Return phi_rho of ``margin`` (..): 1 where it is 0 or less, 0 from ``rho`` on, linear between; broadcasts."""
    inside = torch.where(rho > 0, rho, 1)
    return torch.where(rho > 0, (1 - margin / inside).clamp(0, 1), (margin <= 0).to(margin.dtype))


def class_margins(scores: Tensor) -> Tensor:
    """lambda (K,P) of ``scores`` (K,P): s_k - max over j != k of s_j."""
    first, second = scores.topk(2, dim=0).values
    is_top = scores == first
    return torch.where(is_top, first - second, scores - first)


@torch.no_grad()
def margin_sums(
    logits: Tensor,
    target: Tensor,
    *,
    rho_k0: Tensor | None = None,
    rho_0k: Tensor | None = None,
    ignore_index: int = 255,
    stride: int = STRIDE,
) -> dict[str, Tensor]:
    """Return sums over every ``stride``-th row and column of a batch, float64, to be added over batches and ranks.

    ``logits`` (N,K,h,w) may be below the resolution of ``target`` (N,H,W): they are interpolated at the chosen
    pixels only. Without margins (None) the margins are 0. The keys, each (K,) but the last:

    pixels       pixels of class k                 margin       sum of lambda_ik over them
    loss_k0      sum of phi_{rho_k0}(lambda_ik) over the pixels of class k; loss_k0_fixed: with FIXED_MARGIN
    loss_0k      sum of phi_{rho_0k}(-lambda_ik) over the pixels of other classes; loss_0k_fixed: with FIXED_MARGIN
    inside_k0    pixels of class k with lambda_ik < rho_k0
    inside_0k    pixels of other classes with -lambda_ik < rho_0k
    histogram    (K, 60): pixels of class k by lambda_ik, in bins (low, high] of LAMBDA_EDGES; the outer two are open
    """
    num_classes = logits.shape[1]
    check_inputs(logits, target, ignore_index=ignore_index, num_classes=None if rho_k0 is None else len(rho_k0))
    scores, label = subsampled(logits, target, stride)
    valid = label != ignore_index
    scores, label = scores[:, valid], label[valid]
    zero = torch.zeros(num_classes, dtype=scores.dtype, device=scores.device)
    rho_k0, rho_0k = ((zero if rho is None else rho.to(zero))[:, None] for rho in (rho_k0, rho_0k))
    lam = class_margins(scores)
    own = torch.arange(num_classes, device=label.device)[:, None] == label
    fixed = torch.full_like(rho_k0, FIXED_MARGIN)

    def total(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0).sum(1, dtype=widest(values.device))

    return {
        "pixels": own.sum(1).to(widest(own.device)),
        "margin": total(lam, own),
        "loss_k0": total(rho_margin_loss(lam, rho_k0), own),
        "loss_0k": total(rho_margin_loss(-lam, rho_0k), ~own),
        "loss_k0_fixed": total(rho_margin_loss(lam, fixed), own),
        "loss_0k_fixed": total(rho_margin_loss(-lam, fixed), ~own),
        "inside_k0": total((lam < rho_k0).to(lam.dtype), own),
        "inside_0k": total((-lam < rho_0k).to(lam.dtype), ~own),
        "histogram": _histogram(lam, label),
    }


def _histogram(lam: Tensor, label: Tensor) -> Tensor:
    """How often lambda_y lies in each bin of LAMBDA_EDGES, (K, bins) float64, of ``lam`` (K,P) and ``label`` (P,)."""
    inner = torch.as_tensor(LAMBDA_EDGES[1:-1], dtype=lam.dtype, device=lam.device)
    bins = torch.bucketize(lam.gather(0, label[None])[0], inner)
    size = (len(lam), len(LAMBDA_EDGES) - 1)
    return torch.bincount(label * size[1] + bins, minlength=size[0] * size[1]).view(size).to(widest(lam.device))


def subsampled(logits: Tensor, target: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Float scores (K,P) and labels (P,) at every ``stride``-th row and column, of what ``margin_sums`` takes."""
    dtype, size = compute_dtype(logits), target.shape[1:]
    offset = min(stride // 2, size[0] - 1, size[1] - 1)
    if logits.shape[2:] == size:
        chosen = logits[:, :, offset::stride, offset::stride].to(dtype)
    else:
        (rows,), (columns,) = (spans(num_in, out, out) for num_in, out in zip(logits.shape[2:], size, strict=True))
        r, c = (span.matrix[offset::stride].to(logits.device, dtype) for span in (rows, columns))
        with torch.autocast(logits.device.type, enabled=False):
            chosen = r @ logits[:, :, rows.first : rows.last, columns.first : columns.last].to(dtype) @ c.T
    return chosen.movedim(1, 0).flatten(1), target[:, offset::stride, offset::stride].reshape(-1).long()


def add_sums(sums: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add ``part`` to ``sums``, key by key."""
    for name, value in part.items():
        sums[name] = sums[name] + value if name in sums else value


def summarise(sums: dict[str, Tensor], *, class_pixels: Any = None) -> dict[str, Tensor]:
    """Return the figures of summed ``margin_sums``, in their dtype: (K,), nan for a class without pixels; means ().

    iou_bound (K,) and mean_iou_bound () at the margins of the loss, iou_bound_fixed and mean_iou_bound_fixed at
    FIXED_MARGIN; mean_margin (K,): mean lambda_y of a class; inside_k0, inside_0k (K,): shares of the pixels of
    class k, and of the other classes, that lie inside their margin. With ``class_pixels`` (K,), the counts of the
    whole data set, the two kinds of loss are weighted as those counts say (random crops shift the shares).
    """
    pixels = sums["pixels"]
    others = pixels.sum() - pixels
    share = pixels / pixels.sum()
    if class_pixels is not None:
        counts = torch.as_tensor(np.asarray(class_pixels), dtype=pixels.dtype, device=pixels.device)
        if counts.shape != pixels.shape:
            raise InputError(f"class_pixels has {tuple(counts.shape)} entries for sums of {len(pixels)} classes")
        share = counts / counts.sum()
    found: dict[str, Tensor] = {}
    for suffix in ("", "_fixed"):
        loss_k0 = share * sums["loss_k0" + suffix] / pixels
        loss_0k = (1 - share) * torch.where(others > 0, sums["loss_0k" + suffix] / others, 0)
        bound = (share - loss_k0) / (share + loss_0k)
        found["iou_bound" + suffix] = bound
        found["mean_iou_bound" + suffix] = bound.nanmean()
    found["mean_margin"] = sums["margin"] / pixels
    found["inside_k0"] = sums["inside_k0"] / pixels
    found["inside_0k"] = sums["inside_0k"] / others
    return found


def epsilon(class_pixels: Any, *, rho_0k: Any, ratios: Any, complexity: float) -> float:
    """Return the epsilon of Theorem 1 for margins ``rho_0k`` (K,) and ratios mu_k = rho_k0 / rho_0k.

    (1/K) sum_k [sqrt(N - N_k) + sqrt(N_k) / mu_k] / [N_k rho_0k / (4 K C) - sqrt(N - N_k)], with the unknown constant
    C = ``complexity``. inf if a denominator is not positive: the theorem says nothing about margins so small. The
    ratios are those of ``margin_ratios``.
    """
    counts = np.asarray(class_pixels, dtype=np.float64)
    rho, mu = np.asarray(rho_0k, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    if not (counts.shape == rho.shape == mu.shape) or (counts <= 0).any() or (mu <= 0).any():
        raise InputError("epsilon needs counts, margins and ratios of one length K, with pixels of every class")
    check_number(complexity, "complexity", low=0.0, open_low=True)
    others = np.sqrt(counts.sum() - counts)
    below = counts * rho / (4 * len(counts) * complexity) - others
    if (below <= 0).any():
        return float("inf")
    return float(np.mean((others + np.sqrt(counts) / mu) / below))
