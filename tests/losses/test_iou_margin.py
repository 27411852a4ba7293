"""The IoU margin loss against plain arithmetic in float64, and the running IoU that it follows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from segkit.errors import InputError
from segkit.losses import CrossEntropyLoss, IouMarginLoss
from segkit.losses.iou_margin import STRIDE

IOU = torch.tensor([0.9, 0.3, 0.01, 1.0], dtype=torch.float64)  # the third is below the floor
VOID = 255


def example(seed=0, size=(2, 9, 10)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size[0], 4, *size[1:], generator=generator, dtype=torch.float64)
    target = torch.randint(4, size, generator=generator)
    target[torch.rand(size, generator=generator) < 0.2] = VOID
    return logits, target


def loss_at(iou, **options):
    loss = IouMarginLoss(num_classes=len(iou), **options)
    loss.running.copy_(torch.stack([iou, torch.ones_like(iou)]) / len(iou))
    return loss


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_cross_entropy_form(a):
    logits, target = example()
    logits.requires_grad_()
    shift = a * torch.tensor([math.log(max(float(i), 0.05)) for i in IOU])
    expected = cross_entropy(logits + shift[:, None, None], target, ignore_index=VOID)
    value = loss_at(IOU, a=a)(logits, target)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, logits) for x in (value, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


def test_margin_calibration_form():
    """Pixel by pixel: log2(1 + 2^x), x_y = a log(1 / I_y) - lambda_y, x_k = lambda_k."""
    logits, target = example(size=(1, 4, 5))
    total, pixels = 0.0, 0
    for s, y in zip(logits[0].flatten(1).T.tolist(), target.flatten().tolist(), strict=True):
        if y == VOID:
            continue
        pixels += 1
        for k in range(4):
            lam = s[k] - max(s[j] for j in range(4) if j != k)
            x = -0.5 * math.log(max(float(IOU[k]), 0.05)) - lam if k == y else lam
            total += math.log2(1 + 2**x)
    value = loss_at(IOU, a=0.5, form="margin_calibration")(logits, target)
    assert float(value) == pytest.approx(total / pixels, rel=1e-9)


def test_it_is_cross_entropy_where_every_class_is_perfect_or_a_is_0():
    logits, target = example()
    expected = CrossEntropyLoss()(logits, target)
    assert torch.equal(IouMarginLoss(num_classes=4)(logits, target), expected)
    assert torch.equal(loss_at(IOU, a=0.0)(logits, target), expected)
    assert loss_at(IOU)(logits, target) > 1.05 * expected


def test_the_running_iou_is_an_average_of_counts():
    """Against sets of pixels; the second batch has logits below the size of the labels."""
    loss = IouMarginLoss(num_classes=4, momentum=0.75)
    shares = [[0.25, 0.25] for _ in range(4)]
    for seed in range(3):
        logits, target = example(seed)
        scores = logits
        if seed == 1:
            scores = logits[:, :, ::2, ::2]
            logits = interpolate(scores, size=target.shape[1:], mode="bilinear", align_corners=False)
        rows, columns = range(STRIDE // 2, 9, STRIDE), range(STRIDE // 2, 10, STRIDE)
        places = [(n, r, c) for n in range(2) for r in rows for c in columns if target[n, r, c] != VOID]
        for k in range(4):
            own = {p for p in places if target[p] == k}
            chosen = {(n, r, c) for n, r, c in places if int(logits[n, :, r, c].argmax()) == k}
            for i, part in enumerate((own & chosen, own | chosen)):
                shares[k][i] = 0.75 * shares[k][i] + 0.25 * len(part) / len(places)
        loss.follow(loss.counts_of(scores, target))
    expected = torch.tensor([hits / union for hits, union in shares], dtype=torch.float64)
    torch.testing.assert_close(loss.iou, expected.clamp(0.05, 1))
    torch.testing.assert_close(loss.margins, -expected.clamp(0.05, 1).log())


def test_counts_of_parts_add_up():
    loss, (logits, target) = IouMarginLoss(num_classes=4), example()
    parts = [loss.counts_of(logits[n : n + 1], target[n : n + 1]) for n in range(2)]
    assert torch.equal(sum(parts), loss.counts_of(logits, target))


def test_nothing_counted_moves_nothing_and_a_class_that_is_gone_stays_finite():
    loss, (logits, target) = IouMarginLoss(num_classes=4, momentum=0.0), example()
    before = loss.running.clone()
    loss.follow(loss.counts_of(logits, torch.full_like(target, VOID)))
    assert torch.equal(loss.running, before)
    logits[:, 3], target[target == 3] = -100.0, 0
    loss.follow(loss.counts_of(logits, target))
    assert float(loss.running[1, 3]) == 0
    assert float(loss.iou[3]) == 1
    assert bool(torch.isfinite(loss(logits, target)))


def test_it_starts_from_an_evaluation():
    loss = IouMarginLoss(num_classes=4)
    loss.start_from([[6, 2, 0, 0], [1, 3, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0]])
    assert loss.iou.tolist() == pytest.approx([6 / 17, 3 / 6, 0.05, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1, but margins need at least 2 classes"),
        ({"num_classes": 3, "a": -0.5}, "a must be a finite number at least 0, got -0.5; set loss.a"),
        ({"num_classes": 3, "momentum": 1.5}, "momentum must be a finite number at least 0 and at most 1, got 1.5"),
        ({"num_classes": 3, "form": "paper"}, "form must be one of cross_entropy, margin_calibration, got 'paper'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        IouMarginLoss(**options)
