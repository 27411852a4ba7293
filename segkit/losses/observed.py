"""A loss that also keeps the running sums of its margin diagnostics."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ObservedLoss(nn.Module):
    """``loss`` with the same value and gradient; keeps the sums of ``loss.diagnostics(logits, target)``.

    ``loss`` is an ``UpsampledLoss``, or another with ``diagnostics``. One call in ``every`` enters the sums, and the
    first after each ``take``.
    """

    def __init__(self, loss: Any, *, every: int = 1) -> None:
        super().__init__()
        assert every >= 1, every
        self.loss, self.every = loss, every
        self.pixel_decomposable: bool = loss.pixel_decomposable
        self._sums: dict[str, Tensor] = {}
        self._calls = 0

    def denominator(self, target: Tensor) -> Tensor:
        """What ``loss`` divides by."""
        return self.loss.denominator(target)

    def forward(self, logits: Tensor, target: Tensor, *, denominator: Tensor | None = None) -> Tensor:
        """The loss, (); see ``loss``."""
        if self._calls % self.every == 0:
            add_sums(self._sums, self.loss.diagnostics(logits.detach(), target))
        self._calls += 1
        return self.loss(logits, target, denominator=denominator)

    def take(self) -> dict[str, Tensor]:
        """The sums since the last call of this method (see ``margin_sums``); empty if there was no step."""
        sums, self._sums, self._calls = self._sums, {}, 0
        return sums


def add_sums(sums: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add ``part`` to ``sums``, key by key."""
    for name, value in part.items():
        sums[name] = sums[name] + value if name in sums else value
