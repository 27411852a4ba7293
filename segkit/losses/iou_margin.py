"""IoU margin: margins from difficulty instead of frequency.

The decision that maximises the mean IoU predicts class k against "not k" from p_k = I_k / (1 + I_k) on, with I_k the
IoU of the class (``segkit.evaluation.miou_rule``): about log(1 / I_k) logits earlier than the argmax. To have the
argmax decide so, training must ask class k to win by as much, in one of two forms with one number a:

    cross_entropy        cross-entropy of s_k + a log I_k
    margin_calibration   the paper form of margin calibration with rho_k0 = a log(1 / I_k), rho_0k = 0

I_k is the running IoU of the training pixels, at least `FLOOR`: an exponential average of intersections and unions over
the steps, which a trainer feeds (``counts_of``, ``follow``). Where every I_k is 1 the first form is cross-entropy.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from segkit.errors import InputError, check_choice, check_number
from segkit.losses.compiling import TileRule
from segkit.losses.diagnostics import subsampled
from segkit.losses.margin_tile import margin_dense, margin_tile
from segkit.losses.pixel_loss import PixelLoss
from segkit.losses.pixelwise import cross_entropy_dense, cross_entropy_tile
from segkit.losses.tiles import Workspace

FORMS = ("cross_entropy", "margin_calibration")
FLOOR = 0.05
"""Least I_k, as in the decision: no margin is larger than 3 a logits."""
STRIDE = 4
"""Every 4th row and column of the labels enters the running IoU."""


class IouMarginLoss(PixelLoss):
    """Cross-entropy or margin calibration with margins a log(1 / I_k), see the head of this file.

    ``running`` (2, K) float64: shares of the pixels that are in the intersection and in the union of each class, at
    first such that every I_k is 1. It changes by :meth:`follow` only, at a rate of 1 - ``momentum`` a step; a call of
    the loss leaves it as it is.
    """

    running: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        a: float = 1.0,
        form: Literal["cross_entropy", "margin_calibration"] = "cross_entropy",
        momentum: float = 0.98,
        ignore_index: int = 255,
        compile_tiles: bool | None = False,
    ) -> None:
        if num_classes < 2:
            raise InputError(f"num_classes is {num_classes}, but margins need at least 2 classes")
        check_choice(form, "form", FORMS)
        super().__init__(ignore_index=ignore_index, num_classes=num_classes, compile_tiles=compile_tiles)
        self.form = form
        self.a = check_number(a, "a", low=0.0)
        self.momentum = check_number(momentum, "momentum", low=0.0, high=1.0)
        self.register_buffer("running", torch.full((2, num_classes), 1 / num_classes, dtype=torch.float64))

    @property
    def iou(self) -> Tensor:
        """I_k (K,) float64, from `FLOOR` to 1."""
        return (self.running[0] / self.running[1]).nan_to_num(1.0).clamp(FLOOR, 1)

    @property
    def margins(self) -> Tensor:
        """a log(1 / I_k) (K,) float64, in logits."""
        return -self.a * self.iou.log()

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        margins = self.margins.to(dtype)
        if self.form == "cross_entropy":
            return TileRule(shifted_cross_entropy_tile, shifted_cross_entropy_dense, {"margins": margins})
        c = math.log(2.0)
        parameters = {"rho_k0": c * margins, "rho_0k": torch.zeros_like(margins), "c": c, "w_pos": 1.0}
        return TileRule(margin_tile, margin_dense, parameters)

    @torch.no_grad()
    def counts_of(self, logits: Tensor, target: Tensor) -> Tensor:
        """Pixels (2, K) float64 in intersection and union of the classes, at every `STRIDE`-th row and column.

        To be summed over the parts of a batch and over ranks, and given to :meth:`follow`. ``logits`` (N,K,h,w) may
        be below the resolution of ``target`` (N,H,W).
        """
        scores, label = subsampled(logits.detach(), target, STRIDE)
        chosen, valid = scores.argmax(0), label != self.ignore_index
        label, chosen = label[valid], chosen[valid]
        hits, labels, choices = (
            torch.bincount(part, minlength=logits.shape[1]) for part in (label[label == chosen], label, chosen)
        )
        return torch.stack([hits, labels + choices - hits]).to(self.running.dtype)

    def follow(self, counts: Tensor) -> None:
        """Move the running IoU by the ``counts`` (2, K) of one step over all ranks; none counted, none moved."""
        pixels = counts.sum() / 2  # intersections and unions of all classes add up to twice the pixels
        if pixels > 0:
            self.running.lerp_(counts / pixels, 1 - self.momentum)

    def start_from(self, confusion: Any) -> None:
        """Take I_k from the matrix ``confusion`` (K, K), rows = target; 1 for a class without a union."""
        counts = torch.as_tensor(confusion, dtype=torch.float64)
        hits = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - hits
        found = torch.stack([hits, union]) / counts.sum().clamp(min=1)
        self.running.copy_(torch.where(union > 0, found, 1 / len(hits)))


def shifted_cross_entropy_tile(s: Tensor, y: Tensor, work: Workspace, margins: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P) of the cross-entropy of s - margins, of s (K,P), y (P,), margins (K,)."""
    return cross_entropy_tile(torch.sub(s, margins[:, None], out=work.buffer("shifted", s)), y, work)


def shifted_cross_entropy_dense(s: Tensor, y: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """``shifted_cross_entropy_tile`` without indices, for a compiler."""
    return cross_entropy_dense(s - margins[:, None], y)
