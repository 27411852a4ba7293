"""Margin calibration against a literal double loop in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from segkit.errors import InputError
from segkit.losses import MarginCalibrationLoss, margin_calibration

FORMS = ("paper", "reference")


def literal(logits, target, rho_k0, rho_0k, form, ignore_index=255):
    """Value and gradient, class by class; each max hands its slope to one of its arguments."""
    num, k_all, height, width = logits.shape
    gradient = torch.zeros_like(logits)
    total, count = 0.0, 0
    c, w_pos, divisor = (math.log(2), 1, 1) if form == "paper" else (1.0, k_all, k_all)
    for n, i, j in itertools.product(range(num), range(height), range(width)):
        y = int(target[n, i, j])
        if y == ignore_index:
            continue
        count += 1
        s = logits[n, :, i, j].tolist()
        for k in range(k_all):
            rival = max((m for m in range(k_all) if m != k), key=lambda m: s[m])
            lam = s[k] - s[rival]
            x, sign, weight = (rho_k0[k] - lam, -1, w_pos) if k == y else (lam + rho_0k[k], 1, 1)
            total += weight * math.log1p(math.exp(c * x)) / c / divisor
            slope = sign * weight / (1 + math.exp(-c * x)) / divisor
            gradient[n, k, i, j] += slope
            gradient[n, rival, i, j] -= slope
    return total / count, gradient / count


def example(num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, num_classes, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (2, 4, 5), generator=generator)
    target[0, 0, :3] = 255
    rho = torch.rand(2, num_classes, generator=generator)
    return logits, target, rho[0] / 10, rho[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_classes", "factor"), [(2, 1), (3, 1), (3, 20), (7, 1), (9, 20), (19, 1)])
def test_equals_the_double_loop(form, num_classes, factor):
    """``factor`` 20: margins too large for the quick way to sum softplus."""
    logits, target, rho_k0, rho_0k = example(num_classes)
    rho_0k = rho_0k * factor
    loss = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k, form=form)
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    expected, gradient = literal(logits, target, loss.rho_k0.double(), loss.rho_0k.double(), form)
    assert value.item() == pytest.approx(float(expected), rel=1e-12)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    logits, target, rho_k0, rho_0k = example(5)
    loss = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k, form=form)
    assert torch.autograd.gradcheck(lambda s: loss(s, target), (logits.requires_grad_(),))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("certain", [0.0, 3.0, 12.0, 20.0])
@pytest.mark.parametrize("factor", [0.0, 1.0, 5.0])
def test_float32_keeps_small_losses(form, certain, factor):
    """The value of a nearly perfect model is a sum of tiny terms: none may drown in a 1."""
    logits, target, rho_k0, rho_0k = example(19)
    logits = logits / 3 + certain * torch.nn.functional.one_hot(target.clamp(max=18), 19).movedim(-1, 1)
    loss = MarginCalibrationLoss(rho_k0=rho_k0 * factor, rho_0k=rho_0k * factor, form=form)
    leaf, low = logits.clone().requires_grad_(), logits.float().requires_grad_()
    value, low_value = loss(leaf, target), loss(low, target)
    value.backward()
    low_value.backward()
    assert low_value.item() == pytest.approx(value.item(), rel=2e-5)
    torch.testing.assert_close(low.grad.double(), leaf.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("margin", [2.0, 8.0, 9.99, 19.99, 20.01, 60.0])
@pytest.mark.parametrize("num_classes", [2, 7, 11, 15, 17, 30])
def test_float32_holds_large_margins(num_classes, margin):
    """Of scores that are nearly equal each costs about its margin: products of exponentials must not overflow."""
    logits = torch.linspace(0, 1e-3, num_classes, dtype=torch.float64).view(1, num_classes, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.int64)
    rho_k0, rho_0k = torch.zeros(num_classes), torch.full((num_classes,), margin)
    leaf = logits.float().requires_grad_()
    value = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k, form="reference")(leaf, target)
    value.backward()
    expected, gradient = literal(logits, target, rho_k0.double(), rho_0k.double(), "reference")
    assert value.item() == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [8, 30, 100])
def test_large_gaps_cost_what_they_are(form, dtype, rtol, scale):
    """Beyond the score at which exponentials overflow, the loss of a confident mistake is its gap."""
    logits, target, rho_k0, rho_0k = example(9)
    logits = (logits / 3 * scale).to(dtype).double()
    leaf = logits.to(dtype).requires_grad_()
    loss = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=8 * rho_0k, form=form)
    value = loss(leaf, target)
    value.backward()
    expected, gradient = literal(logits, target, loss.rho_k0.double(), loss.rho_0k.double(), form)
    assert value.item() == pytest.approx(float(expected), rel=rtol)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=100 * rtol, atol=rtol)


def test_golden_values():
    """One pixel, worked out by hand: s = (2, 0, -1), y = 0, margins (.1, .2, .3) and (1, 2, 3)."""
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64).view(1, 3, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.int64)
    margins = {"rho_k0": torch.tensor([0.1, 0.2, 0.3]), "rho_0k": torch.tensor([1.0, 2.0, 3.0])}
    x = (0.1 - 2.0, -2.0 + 2.0, -3.0 + 3.0)  # lambda = 2, -2, -3
    paper = sum(math.log2(1 + 2**v) for v in x)
    reference = (3 * math.log1p(math.exp(x[0])) + 2 * math.log(2)) / 3
    assert MarginCalibrationLoss(**margins)(logits, target).item() == pytest.approx(paper, rel=1e-7)
    loss = MarginCalibrationLoss(**margins, form="reference")
    assert loss(logits, target).item() == pytest.approx(reference, rel=1e-7)


@pytest.mark.parametrize("num_classes", [2, 5, 19])
def test_paper_form_is_the_natural_form_scaled(num_classes):
    """L_paper(s, rho) = L_nat(s ln2, rho ln2) / ln2; with w_pos = 1 the natural form is written out here."""
    logits, target, rho_k0, rho_0k = example(num_classes)
    value = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k)(logits, target)
    ln2 = math.log(2)
    s, valid = (logits * ln2).movedim(1, -1)[target != 255], target[target != 255]
    others = torch.stack([s[:, [j for j in range(num_classes) if j != k]].amax(1) for k in range(num_classes)], 1)
    lam = s - others
    x = torch.where(
        torch.nn.functional.one_hot(valid, num_classes).bool(),
        rho_k0.double() * ln2 - lam,
        lam + rho_0k.double() * ln2,
    )
    natural = torch.nn.functional.softplus(x, threshold=100).sum(1).mean()
    torch.testing.assert_close(value, natural / ln2, rtol=1e-12, atol=0)


def test_two_classes_without_margins_have_a_closed_form():
    """K = 2, rho = 0: both terms are softplus of the wrong minus the right score."""
    logits, target, _, _ = example(2)
    zero = torch.zeros(2)
    wrong_by = (logits[:, 1] - logits[:, 0]) * torch.where(target == 0, 1, -1)
    wrong_by = wrong_by[target != 255]
    paper = 2 * torch.log2(1 + 2**wrong_by).mean()
    reference = (3 * torch.log1p(torch.exp(wrong_by)) / 2).mean()
    loss = MarginCalibrationLoss(rho_k0=zero, rho_0k=zero)
    torch.testing.assert_close(loss(logits, target), paper)
    loss = MarginCalibrationLoss(rho_k0=zero, rho_0k=zero, form="reference")
    torch.testing.assert_close(loss(logits, target), reference)


@pytest.mark.parametrize("form", FORMS)
def test_larger_margin_never_lowers_the_loss(form):
    logits, target, rho_k0, rho_0k = example(6)
    value = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k, form=form)(logits, target)
    for k in range(6):
        for which in ("rho_k0", "rho_0k"):
            margins = {"rho_k0": rho_k0.clone(), "rho_0k": rho_0k.clone()}
            margins[which][k] += 0.5
            larger = MarginCalibrationLoss(**margins, form=form)(logits, target)
            assert larger >= value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 1.0, 0.0, -1.0],  # two tied maxima
        [1.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [2.0, 1.0, 1.0, 0.0],  # two tied runner-ups
        [2.0, 1.0, 1.0, 1.0],
    ],
)
def test_ties_give_a_sub_gradient_that_keeps_symmetry(form, scores):
    """Sums to zero, follows a permutation of the classes, and is the mean over the ways to break the tie."""
    rho_k0, rho_0k = torch.tensor([0.1, 0.2, 0.0, 0.3]), torch.tensor([1.0, 0.5, 2.0, 0.0])

    def gradient_at(s, order, y):
        loss = MarginCalibrationLoss(rho_k0=rho_k0[order], rho_0k=rho_0k[order], form=form)
        leaf = s[order].view(1, 4, 1, 1).clone().requires_grad_()
        loss(leaf, torch.tensor([[[order.index(y)]]])).backward()
        return leaf.grad.flatten()[torch.tensor(order).argsort()]

    s = torch.tensor(scores, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for y in range(4):
        plain = gradient_at(s, [0, 1, 2, 3], y)
        assert plain.sum().abs() < 1e-14
        for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
            torch.testing.assert_close(gradient_at(s, order, y), plain)
        # break the tie by every order of the classes, by far less than a gap between scores
        broken = s[:, None] + 1e-9 * torch.rand(4, 20_000, generator=generator).argsort(0)
        leaf = broken.view(1, 4, 1, -1).requires_grad_()
        loss = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k, form=form)
        loss(leaf, torch.full((1, 1, 20_000), y)).backward()
        torch.testing.assert_close(leaf.grad.sum((0, 2, 3)), plain, rtol=0, atol=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [1, 3, 20])
def test_ties_beside_others(form, every):
    """A pixel whose scores are tied has the gradient that it has alone, whether few pixels are tied or all."""
    logits, target, rho_k0, rho_0k = example(6)
    low = logits.movedim(1, -1).reshape(-1, 6)
    low[::every, 2:4] = low[::every].amax(1, keepdim=True)
    loss = MarginCalibrationLoss(rho_k0=rho_k0, rho_0k=rho_0k, form=form)
    leaf = low.T.reshape(1, 6, 1, -1).clone().requires_grad_()
    value = loss(leaf, target.reshape(1, 1, -1), denominator=torch.ones(()))
    value.backward()
    total = 0.0
    for scores, label, gradient in zip(low, target.flatten(), leaf.grad[0, :, 0].T, strict=True):
        alone = scores.view(1, 6, 1, 1).clone().requires_grad_()
        own = loss(alone, label.view(1, 1, 1), denominator=torch.ones(()))
        own.backward()
        total += own.item()
        torch.testing.assert_close(gradient, alone.grad.flatten(), rtol=1e-12, atol=1e-14)
    assert value.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho_k0": [0.0, 0.0, math.nan], "rho_0k": [0.0] * 3}, "rho_k0 must be finite, got"),
        ({"rho_k0": [0.0] * 3, "rho_0k": [0.0, math.inf, 0.0]}, "rho_0k must be finite, got"),
        ({"rho_k0": [0.0] * 3, "rho_0k": [0.0] * 4}, "two vectors of one length K >= 2"),
        ({"rho_k0": [0.0], "rho_0k": [0.0]}, "two vectors of one length K >= 2"),
        ({"rho_k0": [0.0] * 3, "rho_0k": [0.0] * 3, "form": "log3"}, "form must be one of paper, reference"),
    ],
)
def test_bad_margins(options, message):
    with pytest.raises(InputError, match=message):
        MarginCalibrationLoss(**options)


def test_margins_of_another_number_of_classes():
    logits, target, _, _ = example(5)
    loss = margin_calibration([100, 20, 30])
    with pytest.raises(InputError, match="logits have 5 classes but this loss was built for 3"):
        loss(logits, target)


def test_margins_are_copied():
    margins = torch.ones(3)
    loss = MarginCalibrationLoss(rho_k0=margins, rho_0k=margins)
    margins += 5
    assert loss.rho_0k.tolist() == [1.0, 1.0, 1.0]
