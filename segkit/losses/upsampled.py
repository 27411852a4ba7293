"""A loss on logits below label resolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from segkit.errors import InputError


class UpsampledLoss(nn.Module):
    """``loss`` of logits (N,K,h,w) that are up-sampled bilinearly (align_corners=False) to the size of the
    labels.

    ``banded``: True up-samples band by band and never holds the full-resolution logits; only a
    pixel-decomposable loss can do that. None: True where the loss can.
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
        if logits.dim() == 4 and target.dim() == 3 and logits.shape[2:] != target.shape[1:]:
            logits = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return self.loss(logits, target, denominator=denominator)
