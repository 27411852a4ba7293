"""Losses of the class probabilities of one pixel: cross-entropy and its relatives."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from segkit.errors import InputError, check_choice, check_number
from segkit.losses.checks import check_inputs, check_labels, settings
from segkit.losses.compiling import TileRule
from segkit.losses.elementary import LOG2_E, expm1
from segkit.losses.pixel_loss import PixelLoss, at_label_size
from segkit.losses.tiles import Workspace
from segkit.margins import checked_counts

WEIGHTINGS = (None, "inverse", "inverse_sqrt", "median_frequency", "enet")


def class_weights(class_pixels: Any, *, weighting: str) -> Tensor:
    """Return (K,) float32 weights for the label counts ``class_pixels`` (K,), with P_k the share of class k.

    "inverse": 1 / P_k; "inverse_sqrt": 1 / sqrt(P_k); "median_frequency": median(P) / P_k (Eigen & Fergus,
    ICCV 2015, with dataset-wide shares); "enet": 1 / ln(1.02 + P_k) (Paszke et al., 2016), which never
    exceeds 50.5. Each is then divided by its mean over the classes that occur, so that the mean weight is 1.
    A class without pixels gets weight 0: no pixel can ask for it. Raises InputError for counts that are none.
    """
    check_choice(weighting, "weighting", WEIGHTINGS[1:])
    counts = checked_counts(class_pixels.cpu() if isinstance(class_pixels, Tensor) else class_pixels)
    present = counts > 0
    share = counts[present] / np.float64(counts.sum())
    formula = {
        "inverse": lambda p: 1 / p,
        "inverse_sqrt": lambda p: 1 / np.sqrt(p),
        "median_frequency": lambda p: np.median(p) / p,
        "enet": lambda p: 1 / np.log(1.02 + p),
    }
    weights = np.zeros(len(counts))
    weights[present] = formula[weighting](share)
    return torch.from_numpy(weights / weights[present].mean()).float()


def softmax_parts(s: Tensor, y: Tensor, work: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(s - max s) (K,P), its sum over classes (P,) and log p_y (P,), p = softmax(s), of s (K,P), y (P,)."""
    s = torch.sub(s, s.amax(0), out=work.buffer("exponentials", s))
    label_s = s.gather(0, y.unsqueeze(0))[0]
    total = s.mul_(LOG2_E).exp2_().sum(0)
    return s, total, label_s - total.log()


def cross_entropy_tile(s: Tensor, y: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P) of -log p_y with p = softmax(s); the gradient is p_k - [k = y]."""
    exps, total, log_py = softmax_parts(s, y, work)
    gradient = exps.mul_(1 / total)
    return -log_py, gradient.scatter_(0, y.unsqueeze(0), expm1(log_py)[None])


def softmax_dense(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return [k = y] (..,K,P), log p (..,K,P), log p_y (..,1,P) and p_y - 1 (..,1,P) of s (..,K,P) and y (..,P)."""
    is_label = torch.arange(s.shape[-2], device=s.device, dtype=y.dtype)[:, None] == y.unsqueeze(-2)
    s = s - s.amax(-2, keepdim=True)
    log_p = s - s.exp().sum(-2, keepdim=True).log()
    log_py = torch.where(is_label, log_p, 0.0).sum(-2, keepdim=True)
    return is_label, log_p, log_py, expm1(log_py)


def cross_entropy_dense(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``cross_entropy_tile`` without indices, for a compiler."""
    is_label, log_p, log_py, off = softmax_dense(s, y)
    return -log_py.squeeze(-2), torch.where(is_label, off, log_p.exp())


def weighted_cross_entropy_tile(
    s: Tensor, y: Tensor, work: Workspace, weight: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P) of -sum_k q_k log p_k with p = softmax(s).

    q_k = (1 - smoothing) w_y [k = y] + smoothing w_k / K (as torch defines it); the gradient is p_k sum(q) - q_k.
    """
    on_label = (1 - smoothing) * weight[y]
    spread = smoothing / len(s) * weight
    top = s.amax(0)
    spread_s = (s * spread[:, None]).sum(0) - spread.sum() * top
    exps, total, log_py = softmax_parts(s, y, work)
    loss = spread.sum() * total.log() - spread_s - on_label * log_py
    gradient = exps.mul_((on_label + spread.sum()) / total).sub_(spread[:, None])
    at_label = y.unsqueeze(0)
    return loss, gradient.scatter_(0, at_label, gradient.gather(0, at_label) - on_label)


def weighted_cross_entropy_dense(s: Tensor, y: Tensor, weight: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """``weighted_cross_entropy_tile`` without indices, for a compiler."""
    is_label, log_p, _, _ = softmax_dense(s, y)
    q = torch.where(is_label, (1 - smoothing) * weight[:, None], 0.0) + (smoothing / s.shape[-2] * weight)[:, None]
    return -(q * log_p).sum(-2), log_p.exp() * q.sum(-2, keepdim=True) - q


class CrossEntropyLoss(PixelLoss):
    """Mean cross-entropy over valid pixels; with ``weight`` (K,) the weighted mean, as torch defines it.

    ``label_smoothing`` in [0, 1] mixes the uniform distribution into the target.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        compile_tiles: bool | None = False,
    ) -> None:
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float32).clone()
            if weight.dim() != 1 or not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
                raise InputError(
                    "weight must be a vector of K finite class weights, none negative, "
                    f"got {[round(v, 6) for v in weight.flatten().tolist()]} of shape {tuple(weight.shape)}"
                )
        num_classes = None if weight is None else len(weight)
        super().__init__(ignore_index=ignore_index, num_classes=num_classes, compile_tiles=compile_tiles)
        self.label_smoothing = check_number(label_smoothing, "label_smoothing", low=0.0, high=1.0)
        self.register_buffer("weight", weight)

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        if self.weight is None and self.label_smoothing == 0.0:
            return TileRule(cross_entropy_tile, cross_entropy_dense)
        weight = torch.ones(num_classes) if self.weight is None else self.weight
        parameters = {"weight": weight.to(dtype), "smoothing": self.label_smoothing}
        return TileRule(weighted_cross_entropy_tile, weighted_cross_entropy_dense, parameters)

    def denominator(self, target: Tensor) -> Tensor:
        """() float: valid pixels of ``target`` (N,H,W), or the sum of their class weights."""
        if self.weight is None:
            return super().denominator(target)
        check_labels(target, num_classes=len(self.weight), ignore_index=self.ignore_index)
        valid = target != self.ignore_index
        return torch.where(valid, self.weight[torch.where(valid, target, 0).long()], 0).sum()


def focal_tile(s: Tensor, y: Tensor, work: Workspace, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P) of -(1 - p_y)^gamma log p_y with p = softmax(s).

    With q = 1 - p_y and r = log(p_y) / q (-1 at q = 0) the gradient is q^gamma (gamma p_y r - 1) ([k = y] - p_k):
    written so that gamma < 1 has no pole at p_y = 1.
    """
    exps, total, log_py = softmax_parts(s, y, work)
    q, scale, slope = focal_slope(log_py, gamma)
    gradient = exps.mul_(-slope / total)
    return -scale * log_py, gradient.scatter_(0, y.unsqueeze(0), (slope * q)[None])


def focal_slope(log_py: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """q = 1 - p_y, q^gamma and q^gamma (gamma p_y r - 1), see ``focal_tile``, in the shape of ``log_py``."""
    q = -expm1(log_py)
    r = torch.where(q > 0, log_py / torch.where(q > 0, q, 1), -1)
    scale = q**gamma
    return q, scale, scale * (gamma * (1 - q) * r - 1)


def focal_dense(s: Tensor, y: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """``focal_tile`` without indices, for a compiler."""
    is_label, log_p, log_py, _ = softmax_dense(s, y)
    q, scale, slope = focal_slope(log_py, gamma)
    return -(scale * log_py).squeeze(-2), slope * torch.where(is_label, q, -log_p.exp())


class FocalLoss(PixelLoss):
    """Mean over valid pixels of -(1 - p_y)^gamma log p_y, p the softmax (Lin et al., ICCV 2017, on a softmax).

    gamma = 0 is cross-entropy.
    """

    def __init__(self, *, gamma: float = 2.0, ignore_index: int = 255, compile_tiles: bool | None = False) -> None:
        super().__init__(ignore_index=ignore_index, compile_tiles=compile_tiles)
        self.gamma = check_number(gamma, "gamma", low=0.0)

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        return TileRule(focal_tile, focal_dense, {"gamma": self.gamma})


class OhemCrossEntropyLoss(nn.Module):
    """Mean cross-entropy over the hard pixels of the batch (online hard example mining, Shrivastava et al., 2016).

    Hard are the valid pixels with p_y < ``threshold``; if those are fewer than ``min_kept``, the ``min_kept``
    pixels with the smallest p_y (with all that tie with the last of them, so that the order of pixels does
    not matter). The choice is not differentiated. 0 where no pixel is hard.
    """

    pixel_decomposable = False
    extra_repr = settings

    def __init__(self, *, threshold: float = 0.7, min_kept: int = 100_000, ignore_index: int = 255) -> None:
        super().__init__()
        self.threshold = check_number(threshold, "threshold", low=0.0, high=1.0)
        self.min_kept = int(check_number(min_kept, "min_kept", low=0))
        if self.min_kept != min_kept:
            raise InputError(f"min_kept is {min_kept}, but counts pixels, so it is a whole number: set loss.min_kept")
        self.ignore_index = int(ignore_index)
        self.cross_entropy = CrossEntropyLoss(ignore_index=ignore_index)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: None = None) -> Tensor:
        """() loss of ``logits`` (N,K,h,w) against ``target`` (N,H,W)."""
        assert denominator is None, "a choice among all pixels: there is nothing to divide by"
        check_inputs(logits, target, ignore_index=self.ignore_index)
        losses = self.cross_entropy.pixel_map(at_label_size(logits, target), target)
        with torch.no_grad():
            valid = target != self.ignore_index
            py = torch.where(valid, torch.exp(-losses), torch.inf)
            hard = ~(py >= self.threshold)  # NaN is hard
            wanted = min(self.min_kept, int(valid.sum()))
            if int(hard.sum()) < wanted:
                hard = ~(py > torch.kthvalue(py.flatten(), wanted).values)
        return torch.where(hard, losses, 0).sum() / hard.sum().clamp(min=1)


def cross_entropy(
    class_pixels: Any = None,
    *,
    weighting: Literal["inverse", "inverse_sqrt", "median_frequency", "enet"] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    compile_tiles: bool | None = False,
) -> CrossEntropyLoss:
    """Return cross-entropy, with the ``class_weights`` of ``class_pixels`` (K,) where a ``weighting`` is given."""
    check_choice(weighting, "weighting", WEIGHTINGS)
    weight = None
    if weighting is not None:
        if class_pixels is None:
            raise InputError(f"weighting = {weighting} needs the label counts, got no class_pixels")
        weight = class_weights(class_pixels, weighting=weighting)
    return CrossEntropyLoss(
        weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, compile_tiles=compile_tiles
    )
