"""A loss that also keeps the running sums of its margin diagnostics."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ObservedLoss(nn.Module):
    """``loss`` with the same value and gradient; every call adds ``loss.diagnostics(logits, target)`` to sums (K,).

    ``loss`` is an ``UpsampledLoss``, or another with ``diagnostics``.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        self.pixel_decomposable: bool = loss.pixel_decomposable
        self._sums: dict[str, Tensor] = {}

    def denominator(self, target: Tensor) -> Tensor:
        """What ``loss`` divides by."""
        return self.loss.denominator(target)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """The loss, (); see ``loss``."""
        for name, value in self.loss.diagnostics(logits.detach(), target).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return self.loss(logits, target, denominator=denominator)

    def take(self) -> dict[str, Tensor]:
        """The sums since the last call of this method, each (K,) float64; empty if there was no step."""
        sums, self._sums = self._sums, {}
        return sums
