"""The hook that keeps the margin sums of a loss."""

from __future__ import annotations

import pytest
import torch

from segkit.losses import (
    CrossEntropyLoss,
    DiceLoss,
    MarginCalibrationLoss,
    OhemCrossEntropyLoss,
    SumLoss,
    margin_sums,
)
from segkit.run.charts import LossObserver


@pytest.mark.parametrize("with_margins", [True, False])
def test_the_loss_is_the_same_and_the_sums_add_up(with_margins):
    torch.manual_seed(0)
    margins = {"rho_k0": torch.zeros(3), "rho_0k": torch.tensor([0.1, 0.5, 1.0])}
    plain, observed = (MarginCalibrationLoss(**margins) if with_margins else CrossEntropyLoss() for _ in range(2))
    observer = LossObserver(observed)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(3):
        target = torch.randint(0, 3, (2, 32, 32))
        target[0, :4] = 255
        one, other = (torch.randn(2, 3, 8, 8).requires_grad_() for _ in range(2))
        other.data.copy_(one.data)
        ours, theirs = observed(one, target), plain(other, target)
        assert torch.equal(ours, theirs)
        ours.backward()
        theirs.backward()
        assert torch.equal(one.grad, other.grad)
        part = margin_sums(one, target, **(margins if with_margins else {}))
        expected = {name: expected.get(name, 0) + value for name, value in part.items()}
    sums = observer.take()
    assert sums.keys() == expected.keys()
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name])
    assert observer.take() == {}


def test_only_some_calls_are_looked_at():
    """One in three, and the first after the sums were taken."""
    loss = CrossEntropyLoss()
    observer = LossObserver(loss, every=3)
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    for calls, looked_at in ((7, 3), (1, 1), (3, 1)):
        for _ in range(calls):
            loss(torch.randn(1, 3, 8, 8), target)
        assert observer.take()["pixels"].tolist() == [looked_at, 0, 0]  # one pixel of 8 x 8 enters


def test_every_loss_can_be_observed():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(4, (2, 24, 24), generator=generator)
    margins = {"rho_k0": torch.tensor([0.0, 0.5, 2.0, 0.0]), "rho_0k": torch.tensor([3.0, 1.0, 0.0, 0.5])}
    margin = MarginCalibrationLoss(**margins)
    expected = margin_sums(logits, target, **margins)
    both = SumLoss(terms={"dice": {"loss": DiceLoss(), "weight": 1.0}, "margin": {"loss": margin, "weight": 1.0}})
    without = margin_sums(logits, target)
    assert not torch.equal(without["loss_0k"], expected["loss_0k"])
    for loss, sums in (
        (margin, expected),
        (both, expected),
        (CrossEntropyLoss(), without),
        (DiceLoss(), without),
        (OhemCrossEntropyLoss(), without),
    ):
        observer = LossObserver(loss)
        loss(logits, target)
        torch.testing.assert_close(observer.take(), sums)
