"""Weighted sums of losses by configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import InputError, check_number
from segkit.losses.tiles import PixelLoss


class SumLoss(nn.Module):
    """sum_i weight_i loss_i of ``terms``: {name: {"loss": loss, "weight": number}}.

    Pixel-decomposable if every term is; ``denominator`` then holds one number per term, shape (T,): class
    weights may differ between the terms.
    """

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
            self.losses[name] = term["loss"]
            self.weights[name] = check_number(term["weight"], f"terms.{name}.weight", low=0.0)
        self.ignore_index: int = self._terms()[0].ignore_index
        self.pixel_decomposable = all(loss.pixel_decomposable for loss in self.losses.values())

    def denominator(self, target: Tensor) -> Tensor:
        """(T,) float: the denominators of the terms, nested sums flattened."""
        assert self.pixel_decomposable, "a term is not a sum over pixels"
        return torch.cat([loss.denominator(target).reshape(-1) for loss in self._terms()])

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """() loss of ``logits`` (N,K,H,W) against ``target`` (N,H,W)."""
        assert denominator is None or self.pixel_decomposable, "a term is not a sum over pixels"
        total: Any = 0.0
        first = 0
        for name, loss in self.losses.items():
            part = None
            if denominator is not None:
                count = loss.num_denominators if isinstance(loss, SumLoss) else 1
                part = denominator[first : first + count].reshape(() if count == 1 else (count,))
                first += count
            total = total + self.weights[name] * loss(logits, target, denominator=part)
        return total

    def pixel_terms(self) -> list[tuple[PixelLoss, float]]:
        """The terms with their weights, nested sums flattened, in the order of ``denominator``."""
        assert self.pixel_decomposable, "a term is not a sum over pixels"
        terms: list[tuple[Any, float]] = []
        for name, loss in self.losses.items():
            inner = loss.pixel_terms() if isinstance(loss, SumLoss) else [(loss, 1.0)]
            terms += [(pixel_loss, self.weights[name] * weight) for pixel_loss, weight in inner]
        return terms

    def _terms(self) -> list[Any]:
        return list(self.losses.values())

    @property
    def num_denominators(self) -> int:
        """T: the number of denominators of this sum, nested sums counted through."""
        return sum(loss.num_denominators if isinstance(loss, SumLoss) else 1 for loss in self._terms())

    def extra_repr(self) -> str:
        return f"weights={self.weights}"
