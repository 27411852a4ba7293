"""Weighted sums of losses by configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import InputError, check_number
from segkit.losses.checks import settings


class SumLoss(nn.Module):
    """sum_i weight_i loss_i of ``terms``: {name: {"loss": loss, "weight": number}}; no term is itself a sum.

    Pixel-decomposable if every term is; ``denominator`` then holds one number per term, shape (T,): class
    weights may differ between the terms.
    """

    extra_repr = settings

    def __init__(self, *, terms: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not terms:
            raise InputError("a weighted sum needs at least one term; set loss.terms.NAME.loss and .weight")
        self.losses = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for name, term in terms.items():
            if not isinstance(term, Mapping) or set(term) != {"loss", "weight"}:
                got = sorted(term) if isinstance(term, Mapping) else type(term).__name__
                raise InputError(f"term {name} of a weighted sum needs the keys loss and weight, got {got}")
            if not isinstance(term["loss"], nn.Module):
                raise InputError(
                    f"term {name} of a weighted sum has {term['loss']!r} for its loss, but needs one: set "
                    f"loss.terms.{name}.loss._target_=..., or take the term out, ~loss.terms.{name}"
                )
            if isinstance(term["loss"], SumLoss):
                raise InputError(
                    f"term {name} of a weighted sum is itself a weighted sum, but a term must be a single loss; "
                    "list its terms in loss.terms, with their weights multiplied out"
                )
            try:
                self.losses[name] = term["loss"]
            except (KeyError, TypeError):  # torch keeps its own names, and dots
                raise InputError(f"a term of a weighted sum cannot be named {name!r}: give it another name") from None
            self.weights[name] = check_number(term["weight"], f"terms.{name}.weight", low=0.0)
        first: Any = next(iter(self.losses.values()))
        self.ignore_index: int = getattr(first, "ignore_index", 255)
        self.pixel_decomposable = all(getattr(loss, "pixel_decomposable", False) for loss in self.losses.values())

    def denominator(self, target: Tensor) -> Tensor:
        """(T,) float: the denominators of the terms."""
        assert self.pixel_decomposable, "a term is not a sum over pixels"
        losses: list[Any] = list(self.losses.values())
        return torch.stack([loss.denominator(target) for loss in losses])

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """() loss of ``logits`` (N,K,h,w) against ``target`` (N,H,W); ``denominator``: (T,)."""
        assert denominator is None or self.pixel_decomposable, "a term is not a sum over pixels"
        total: Any = 0.0
        for i, (name, loss) in enumerate(self.losses.items()):
            part = {} if denominator is None else {"denominator": denominator[i]}
            total = total + self.weights[name] * loss(logits, target, **part)
        return total
