"""Margin calibration: the loss that maximises a lower bound of the mean IoU.

Source: Yu et al., IJCV 130(1), 2022, Algorithm 2 and Eqs. 8, 16-18. For a pixel with scores s_1..s_K, label
y, largest score s_m1 and runner-up s_m2:

    lambda_k = s_k - max_{j != k} s_j  =  s_k - s_m1  (k != m1),   s_m1 - s_m2  (k = m1)
    x_y = rho_y0 - lambda_y            x_k = lambda_k + rho_0k  (k != y)
    loss = sum_k w_k softplus(c x_k) / c,    w_y = w_pos, w_k = 1 otherwise

    form         c     w_pos   divided by
    paper        ln 2  1       valid pixels        Eqs. 16-18, log2(1 + 2^x)
    reference    1     K       valid pixels * K    the authors' released code

The two are different losses. With K >= 5 the paper form raises a wrong top score where scores are nearly uniform,
so it wants a cross-entropy model to start from; the reference form trains from scratch.
A large rho_0k makes the model more reluctant to predict class k: precision up, recall down.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from segkit.errors import InputError, check_choice
from segkit.losses.compiling import TileRule
from segkit.losses.margin_tile import margin_dense, margin_tile
from segkit.losses.pixel_loss import PixelLoss
from segkit.margins import DEFAULT_TAU, compute_margins

__all__ = ["MarginCalibrationLoss", "MarginOffsets", "margin_calibration", "margin_offsets"]

FORMS = ("paper", "reference")


@dataclass(frozen=True)
class MarginOffsets:
    """Margins in logits, float32, shape (K,) each."""

    rho_k0: Tensor
    rho_0k: Tensor


def margin_offsets(class_pixels: Any, **options: Any) -> MarginOffsets:
    """Return the margins for ``class_pixels`` (K,); the options are those of ``segkit.margins.compute_margins``."""
    if isinstance(class_pixels, Tensor):
        class_pixels = class_pixels.detach().cpu().numpy()
    margins = compute_margins(class_pixels, **options)
    return MarginOffsets(*(torch.from_numpy(rho).float() for rho in margins))


margin_offsets.__signature__ = inspect.signature(compute_margins)  # type: ignore[attr-defined]


class MarginCalibrationLoss(PixelLoss):
    """Margin calibration with margins ``rho_k0``, ``rho_0k``, each (K,) in logits; negative ones are a control.

    ``form``: "paper" or "reference", see the head of this file. Call: loss(logits (N,K,h,w), target (N,H,W)).
    """

    rho_k0: Tensor
    rho_0k: Tensor

    def __init__(
        self,
        *,
        rho_k0: Tensor,
        rho_0k: Tensor,
        form: Literal["paper", "reference"] = "paper",
        ignore_index: int = 255,
        compile_tiles: bool | None = False,
    ) -> None:
        check_choice(form, "form", FORMS)
        rho_k0, rho_0k = (torch.as_tensor(rho, dtype=torch.float32).clone() for rho in (rho_k0, rho_0k))
        for name, rho in (("rho_k0", rho_k0), ("rho_0k", rho_0k)):
            if rho.dim() != 1 or len(rho) < 2 or rho.shape != rho_k0.shape:
                raise InputError(
                    "margins must be two vectors of one length K >= 2, got rho_k0 of shape "
                    f"{tuple(rho_k0.shape)} and rho_0k of shape {tuple(rho_0k.shape)}; take both from margin_offsets"
                )
            if not bool(torch.isfinite(rho).all()):
                raise InputError(
                    f"{name} must be finite, got {[round(v, 6) for v in rho.tolist()]}; "
                    "take the margins from margin_offsets of the label counts"
                )
        super().__init__(ignore_index=ignore_index, num_classes=len(rho_k0), compile_tiles=compile_tiles)
        self.form = form
        self.register_buffer("rho_k0", rho_k0)
        self.register_buffer("rho_0k", rho_0k)

    def tile_rule(self, num_classes: int, dtype: torch.dtype) -> TileRule:
        c, w_pos, divisor = (math.log(2.0), 1, 1) if self.form == "paper" else (1.0, num_classes, num_classes)
        margins = {"rho_k0": c * self.rho_k0.to(dtype), "rho_0k": c * self.rho_0k.to(dtype)}
        return TileRule(margin_tile, margin_dense, {**margins, "c": c, "w_pos": float(w_pos)}, scale=1 / divisor)


def margin_calibration(
    class_pixels: Any,
    *,
    class_names: Sequence[str] | None = None,
    tau: float = DEFAULT_TAU,
    upsilon: float = 1.0,
    scale: Literal["tau", "mean"] = "tau",
    mean_margin: float | None = None,
    absent: Literal["max", "zero", "error"] = "max",
    rho_max: float | str | None = None,
    form: Literal["paper", "reference"] = "paper",
    ignore_index: int = 255,
    compile_tiles: bool | None = False,
) -> MarginCalibrationLoss:
    """Return the loss with the margins for ``class_pixels`` (K,); see ``margin_offsets`` for the other arguments."""
    options = {"tau": tau, "upsilon": upsilon, "scale": scale, "mean_margin": mean_margin, "absent": absent}
    offsets = margin_offsets(class_pixels, **options, rho_max=rho_max, class_names=class_names)
    margins = {"rho_k0": offsets.rho_k0, "rho_0k": offsets.rho_0k}
    return MarginCalibrationLoss(**margins, form=form, ignore_index=ignore_index, compile_tiles=compile_tiles)
