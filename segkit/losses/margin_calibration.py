"""Margin calibration: the loss that maximises a lower bound of the mean IoU.

Source: Yu et al., IJCV 130(1), 2022, Algorithm 2 and Eqs. 8, 16-18. For a pixel with scores s_1..s_K, label
y, largest score s_m1 and runner-up s_m2:

    lambda_k = s_k - max_{j != k} s_j  =  s_k - s_m1  (k != m1),   s_m1 - s_m2  (k = m1)
    x_y = rho_y0 - lambda_y            x_k = lambda_k + rho_0k  (k != y)
    loss = sum_k w_k softplus(c x_k) / c,    w_y = w_pos, w_k = 1 otherwise

    form         c     w_pos   divided by
    paper        ln 2  1       valid pixels        Eqs. 16-18, log2(1 + 2^x)
    reference    1     K       valid pixels * K    the authors' released code

The two differ for real. With K >= 5 the paper form raises a wrong top score where scores are nearly uniform,
so it wants a cross-entropy model to start from; the reference form trains from scratch.
A large rho_0k makes the model more reluctant to predict class k: precision up, recall down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.errors import InputError
from segkit.losses.checks import check_choice
from segkit.losses.diagnostics import margin_sums
from segkit.losses.margins import DEFAULT_TAU, MarginOffsets, margin_offsets
from segkit.losses.tiles import PixelLoss, TileRule, Workspace, mask_of, not_on_cpu, room

__all__ = ["MarginCalibrationLoss", "MarginOffsets", "margin_calibration", "margin_offsets"]

FORMS = ("paper", "reference")


SMALL_MARGIN = 4.0
"""Margins (times c) up to which exp(x) = g / (1 - g) is exact to float32 for g = sigmoid(x), x <= margin."""

BIG = 1e30


def margin_tile(
    s: Tensor,
    y: Tensor,
    work: Workspace | None,
    rho_k0: Tensor,
    rho_0k: Tensor,
    c: float,
    w_pos: float,
    small: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (K,P) of logits ``s`` (K,P) with labels ``y`` (P,): the head of this file.

    ``rho_k0`` and ``rho_0k`` (K,) are margins times c; ``small`` says that no rho_0k exceeds SMALL_MARGIN. With
    g_y = -w_pos sigmoid(c x_y), g_k = sigmoid(c x_k) and G their sum, the gradient is g_k, except 2 g_m1 - G at the
    maximum and g_m2 - g_m1 at the runner-up. Tied scores share equally what one of them would get: of t > 1 tied
    maxima each pays (G - G_M) / t for the classes outside the tie (G_M: sum of g inside) and (G_M - g_k) / (t - 1)
    for the others inside, whose runner-up it is; of r tied runner-ups each pays g_m1 / r. That is a sub-gradient,
    sums to zero and does not depend on the order of the classes.
    """
    s = torch.sub(s, s.amax(0), out=room(work, 0, s))
    is_top = mask_of(s, 0, room(work, 1, s))
    ties = is_top.sum(0)
    alone = mask_of(ties, 1)  # the maximum is unique
    spare = room(work, 2, s)
    second = torch.sub(s, is_top, alpha=torch.finfo(s.dtype).max, out=spare).amax(0)
    is_second = mask_of(s, second, room(work, 3, s))
    gap = -second * alone  # lambda at the maximum
    label_s = s.gather(0, y.unsqueeze(0))[0]
    hit = mask_of(label_s, 0) * alone  # the label is the unique maximum
    label_x = rho_k0[y] - c * (label_s + hit * gap)
    top_x = torch.addcmul(rho_0k @ is_top, gap, alone, value=c)
    x = torch.add(rho_0k[:, None], s, alpha=c, out=s).addcmul_(is_top, gap, value=c)
    g = torch.sigmoid(x, out=spare)

    # The sum over all classes but a unique maximum, then put right, pixel by pixel, at maximum and label.
    loss = softplus_sum(x, g, is_top, alone, work, small)
    loss = loss - (1 - hit) * F.softplus(torch.addcmul(rho_0k[y], label_s, 1 - hit, value=c), threshold=60.0)
    loss += w_pos * F.softplus(label_x, threshold=60.0) + (alone - hit) * F.softplus(top_x, threshold=60.0)

    label_g = -w_pos * torch.sigmoid(label_x)
    g.scatter_(0, y.unsqueeze(0), label_g[None])
    outside = g.sum(0)
    if not_on_cpu(g) or bool((ties > 1).any()):
        at_top = torch.mul(g, is_top, out=x)
        inside = at_top.sum(0)
        share = (1 - alone) / (ties - 1).clamp(min=1)
        g.addcmul_(at_top, share)
        outside += ties * share * inside
    else:
        inside = torch.lerp(torch.sigmoid(top_x), label_g, hit)
    outside -= inside
    g.addcmul_(is_top, outside / ties, value=-1)
    g.addcmul_(is_second, inside * alone / is_second.sum(0).clamp(min=1), value=-1)
    return loss / c, g


def softplus_sum(x: Tensor, g: Tensor, is_top: Tensor, alone: Tensor, work: Workspace | None, small: bool) -> Tensor:
    """(P,): sum of softplus(x) (K,P) over the classes that are no unique maximum; ``x`` is overwritten, g = sigmoid(x).

    Small margins: exp(x) = g / (1 - g), and one logarithm for eight classes,
    sum log(1 + e) = log1p(prod(1 + e) - 1), with q = prod(1 + e) - 1 built up as q + e + q e: nothing cancels.
    """
    if not small:
        return F.softplus(x.addcmul_(is_top, alone, value=-BIG), threshold=60.0).sum(0)
    below = torch.sub(1, g, out=x).addcmul_(is_top, alone, value=BIG)
    q = torch.div(g, below, out=below)
    for _ in range(3):
        half = len(q) // 2
        if half:
            lower, upper, odd = q[:half], q[half : 2 * half], q[2 * half :]
            q = torch.addcmul(upper, lower, torch.add(upper, 1, out=room(work, 4, upper)), out=lower)
            if len(odd):
                q[:1].addcmul_(q[:1], odd).add_(odd)
    return torch.log1p(q).sum(0)


class MarginCalibrationLoss(PixelLoss):
    """Margin calibration with margins ``rho_k0``, ``rho_0k``, each (K,) in logits and not negative.

    ``form``: "paper" or "reference", see the head of this file. Call: loss(logits (N,K,H,W), target (N,H,W)).
    """

    rho_k0: Tensor
    rho_0k: Tensor

    def __init__(
        self,
        *,
        rho_k0: Tensor,
        rho_0k: Tensor,
        form: str = "paper",
        ignore_index: int = 255,
        compile_tiles: bool | None = None,
    ) -> None:
        check_choice(form, "form", FORMS)
        rho_k0, rho_0k = (torch.as_tensor(r, dtype=torch.float32).clone() for r in (rho_k0, rho_0k))
        for name, rho in (("rho_k0", rho_k0), ("rho_0k", rho_0k)):
            if rho.dim() != 1 or len(rho) < 2 or rho.shape != rho_k0.shape:
                raise InputError(
                    "margins must be two vectors of one length K >= 2, got rho_k0 of shape "
                    f"{tuple(rho_k0.shape)} "
                    f"and rho_0k of shape {tuple(rho_0k.shape)}; take both from margin_offsets"
                )
            if not bool(torch.isfinite(rho).all()) or bool((rho < 0).any()):
                raise InputError(
                    f"{name} must be finite and not negative, got {[round(v, 6) for v in rho.tolist()]}; "
                    "take the margins from margin_offsets of the label counts"
                )
        super().__init__(ignore_index=ignore_index, num_classes=len(rho_k0), compile_tiles=compile_tiles)
        self.form = form
        self.small = float(rho_0k.max()) * (math.log(2.0) if form == "paper" else 1.0) <= SMALL_MARGIN
        self.register_buffer("rho_k0", rho_k0)
        self.register_buffer("rho_0k", rho_0k)

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        c, w_pos, divisor = (math.log(2.0), 1, 1) if self.form == "paper" else (1.0, num_classes, num_classes)
        parameters = (c * self.rho_k0.to(dtype), c * self.rho_0k.to(dtype), c, float(w_pos), self.small)
        return TileRule(margin_tile, parameters, scale=1 / divisor)

    def diagnostics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Sums (K,) of ``segkit.losses.diagnostics.margin_sums`` at the margins of this loss."""
        return margin_sums(logits, target, rho_k0=self.rho_k0, rho_0k=self.rho_0k, ignore_index=self.ignore_index)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, form={self.form!r}, ignore_index={self.ignore_index}"


def margin_calibration(
    class_pixels: Any,
    *,
    class_names: Sequence[str] | None = None,
    tau: float = DEFAULT_TAU,
    upsilon: float = 1.0,
    scale: str = "tau",
    mean_margin: float | None = None,
    absent: str = "max",
    rho_max: float | None = None,
    form: str = "paper",
    ignore_index: int = 255,
    compile_tiles: bool | None = None,
) -> MarginCalibrationLoss:
    """The loss with the margins of ``class_pixels`` (K,); the arguments are those of ``margin_offsets``."""
    offsets = margin_offsets(
        class_pixels,
        tau=tau,
        upsilon=upsilon,
        scale=scale,
        mean_margin=mean_margin,
        absent=absent,
        rho_max=rho_max,
        class_names=class_names,
    )
    return MarginCalibrationLoss(
        rho_k0=offsets.rho_k0,
        rho_0k=offsets.rho_0k,
        form=form,
        ignore_index=ignore_index,
        compile_tiles=compile_tiles,
    )
