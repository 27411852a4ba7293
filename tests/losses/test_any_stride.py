"""Losses of low-resolution logits equal those of logits that were up-sampled first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segkit.errors import InputError
from segkit.losses import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    JaccardMetricLoss,
    LovaszSoftmaxLoss,
    MarginCalibrationLoss,
    OhemCrossEntropyLoss,
    SumLoss,
    at_label_size,
    tiles,
)

LOSSES = {
    "cross-entropy": lambda: CrossEntropyLoss(),
    "weighted cross-entropy": lambda: CrossEntropyLoss(weight=torch.linspace(0.5, 2, 5), label_smoothing=0.1),
    "focal": lambda: FocalLoss(),
    "margin calibration": lambda: MarginCalibrationLoss(rho_k0=torch.rand(5) / 9, rho_0k=torch.rand(5)),
    "reference form": lambda: MarginCalibrationLoss(rho_k0=torch.rand(5), rho_0k=torch.rand(5), form="reference"),
    "sum": lambda: SumLoss(
        terms={
            "a": {"loss": CrossEntropyLoss(weight=torch.linspace(0.5, 2, 5)), "weight": 0.3},
            "b": {"loss": FocalLoss(), "weight": 2.0},
        }
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
WHOLE_LOSSES = {
    "Dice": lambda: DiceLoss(),
    "Jaccard": lambda: JaccardMetricLoss(),
    "Lovasz": lambda: LovaszSoftmaxLoss(),
    "OHEM": lambda: OhemCrossEntropyLoss(min_kept=50),
    "sum with Dice": lambda: SumLoss(
        terms={"a": {"loss": CrossEntropyLoss(), "weight": 1.0}, "b": {"loss": DiceLoss(), "weight": 0.5}}
    ),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks even for tiny images."""
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 100)


def example(low=(5, 4), high=(19, 17), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 5, *low, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (2, *high), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return logits.to(dtype), target


def value_and_gradient(loss, logits, target, scale=1.0):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    (value * scale).backward()
    return value.detach(), leaf.grad


def plain(loss, logits, target):
    """Up-sample by torch, then the loss, with autograd through both."""
    leaf = logits.clone().requires_grad_()
    value = loss(F.interpolate(leaf, size=target.shape[1:], mode="bilinear", align_corners=False), target)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("name", [*LOSSES, *WHOLE_LOSSES])
@pytest.mark.parametrize(
    ("low", "high"), [((5, 4), (19, 17)), ((4, 4), (16, 16)), ((3, 7), (6, 28)), ((6, 5), (4, 5)), ((1, 1), (3, 2))]
)
def test_equals_up_sampling_first(name, low, high):
    loss = (LOSSES | WHOLE_LOSSES)[name]()
    logits, target = example(low, high)
    expected = plain(loss, logits, target)
    value, gradient = value_and_gradient(loss, logits, target)
    torch.testing.assert_close(value, expected[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-8, atol=1e-14)


@every_loss
def test_gradcheck(name):
    loss = LOSSES[name]()
    logits, target = example((2, 2), (5, 4))
    assert torch.autograd.gradcheck(lambda s: loss(s, target), (logits.requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("name", [*LOSSES, *WHOLE_LOSSES])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_low_precision(name, dtype, bound):
    """Also under a loss scale, as GradScaler applies it."""
    loss = (LOSSES | WHOLE_LOSSES)[name]()
    logits, target = example(dtype=dtype)
    value, gradient = plain(loss, logits.double(), target)
    for scale in (1.0, 1024.0):
        low_value, low_gradient = value_and_gradient(loss, logits, target, scale)
        assert low_value.dtype == torch.float32
        assert low_gradient.dtype == dtype
        assert abs(low_value - value) < bound * value
        assert (low_gradient.double() / scale - gradient).norm() < bound * gradient.norm()


@every_loss
def test_under_autocast(name):
    """Autocast would run the matrix products in bfloat16."""
    loss = LOSSES[name]()
    logits, target = example(dtype=torch.float32)
    expected = value_and_gradient(loss, logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradient(loss, logits, target)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@every_loss
def test_accumulation(name):
    """Parts with a common denominator add up to the whole batch."""
    loss = LOSSES[name]()
    logits, target = example()
    target[0, :9] = 255
    value, gradient = value_and_gradient(loss, logits, target)
    common = loss.denominator(target[:1]) + loss.denominator(target[1:])
    leaf = logits.clone().requires_grad_()
    parts = [loss(leaf[i : i + 1], target[i : i + 1], denominator=common) for i in range(2)]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts).detach(), value)
    torch.testing.assert_close(leaf.grad, gradient)


def test_checkpointed_and_twice_backward():
    """A retained graph gives the same gradient again; checkpointing recomputes the forward pass."""
    loss = LOSSES["margin calibration"]()
    logits, target = example()
    expected = value_and_gradient(loss, logits, target)[1]
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    for factor in (1.0, 3.0):
        (gradient,) = torch.autograd.grad(factor * value, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)
    checkpointed = torch.utils.checkpoint.checkpoint(loss, leaf, target, use_reentrant=False)
    checkpointed.backward()
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_void_hides_whatever_stands_there(wild):
    logits, target = example((4, 4), (16, 16))
    logits[1] = wild
    target[1] = 255
    value, gradient = value_and_gradient(CrossEntropyLoss(), logits, target)
    alone = value_and_gradient(CrossEntropyLoss(), logits[:1], target[:1])
    torch.testing.assert_close(value, alone[0])
    torch.testing.assert_close(gradient, torch.cat([alone[1], torch.zeros_like(alone[1])]))


def test_at_label_size():
    logits, target = example((5, 4), (19, 17), torch.bfloat16)
    full = at_label_size(logits, target)
    assert full.dtype == torch.float32
    expected = F.interpolate(logits.float(), size=(19, 17), mode="bilinear", align_corners=False)
    assert torch.equal(full, expected)
    assert at_label_size(full, target) is full


@pytest.mark.parametrize("name", [*LOSSES, *WHOLE_LOSSES])
def test_bad_input(name):
    logits, target = example()
    loss = (LOSSES | WHOLE_LOSSES)[name]()
    with pytest.raises(InputError, match=r"target must have shape .* with the N = 2 images"):
        loss(logits, target[:1])
    with pytest.raises(InputError, match="target holds label 9"):
        loss(logits, torch.full_like(target, 9))
    with pytest.raises(InputError, match="integer labels"):
        loss(logits, target.float())
    with pytest.raises(InputError, match=r"cannot be interpolated to a target of shape .* one of them holds no pixel"):
        loss(logits[:, :, :0], target)


def test_classes_are_counted_at_any_stride():
    logits, target = example()
    with pytest.raises(InputError, match="logits have 4 classes but this loss was built for 5"):
        CrossEntropyLoss(weight=torch.ones(5))(logits[:, :4], target.clamp(max=3))
