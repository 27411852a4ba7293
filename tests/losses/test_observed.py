from __future__ import annotations

import pytest
import torch

from segkit.losses import CrossEntropyLoss, MarginCalibrationLoss, ObservedLoss, UpsampledLoss, margin_sums


@pytest.mark.parametrize("with_margins", [True, False])
def test_the_loss_is_the_same_and_the_sums_add_up(with_margins):
    torch.manual_seed(0)
    margins = {"rho_k0": torch.zeros(3), "rho_0k": torch.tensor([0.1, 0.5, 1.0])}
    inner = MarginCalibrationLoss(**margins) if with_margins else CrossEntropyLoss()
    plain, observed = UpsampledLoss(inner), ObservedLoss(UpsampledLoss(inner))
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
    sums = observed.take()
    assert sums.keys() == expected.keys()
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name])
    assert observed.take() == {}
    assert torch.equal(observed.denominator(target), plain.denominator(target))


def test_only_some_calls_are_looked_at():
    """One in three, and the first after the sums were taken."""
    observed = ObservedLoss(UpsampledLoss(CrossEntropyLoss()), every=3)
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    for calls, looked_at in ((7, 3), (1, 1), (3, 1)):
        for _ in range(calls):
            observed(torch.randn(1, 3, 8, 8), target)
        assert observed.take()["pixels"].tolist() == [looked_at, 0, 0]  # one pixel of 8 x 8 enters
