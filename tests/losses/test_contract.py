"""The loss contract: every loss of the package keeps every point; ``--loss-table=FILE`` writes what was measured."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import segkit.losses as package
from segkit.losses import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    IouMarginLoss,
    JaccardMetricLoss,
    LovaszSoftmaxLoss,
    MarginCalibrationLoss,
    OhemCrossEntropyLoss,
    SumLoss,
    TverskyLoss,
)

VOID = 255
NUM_CLASSES = 5


def class_vector(order, low, high):
    """One number per class, permuted as the classes are."""
    return torch.linspace(low, high, max(order) + 1)[torch.tensor(order)]


def margin(order, form):
    return MarginCalibrationLoss(rho_k0=class_vector(order, 0, 0.2), rho_0k=class_vector(order, 1, 3), form=form)


def iou_margin(order, form):
    loss = IouMarginLoss(num_classes=len(order), form=form)
    loss.running[0] = class_vector(order, 0.3, 0.9) * loss.running[1]  # I_k
    return loss


@dataclass(frozen=True)
class Case:
    """How to build a loss for classes in a given order, and which points need a reason."""

    build: object
    duplicate: float = 1e-6  # relative change allowed when the batch is doubled
    exempt: dict[str, str] = field(default_factory=dict)


SMOOTH = 0.05  # one pixel of smoothing is not doubled with the batch
PER_K = {"absent": "weights depend on K"}
CASES = {
    "cross-entropy": Case(lambda order: CrossEntropyLoss()),
    "cross-entropy, class weights": Case(lambda order: CrossEntropyLoss(weight=class_vector(order, 0.5, 2))),
    "focal, gamma = 2": Case(lambda order: FocalLoss()),
    "focal, gamma = 0.4": Case(lambda order: FocalLoss(gamma=0.4)),
    "margin calibration, paper": Case(lambda order: margin(order, "paper")),
    "margin calibration, reference": Case(lambda order: margin(order, "reference"), exempt=PER_K),
    "IoU margin, cross-entropy": Case(lambda order: iou_margin(order, "cross_entropy")),
    "IoU margin, margin calibration": Case(lambda order: iou_margin(order, "margin_calibration")),
    "Lovasz-softmax": Case(lambda order: LovaszSoftmaxLoss()),
    "Lovasz-softmax, per image": Case(lambda order: LovaszSoftmaxLoss(per_image=True)),
    "Lovasz-softmax, all classes": Case(
        lambda order: LovaszSoftmaxLoss(classes="all"), exempt={"absent": "averages over K"}
    ),
    "Dice": Case(lambda order: DiceLoss(), duplicate=SMOOTH),
    "Dice, smooth = 0": Case(lambda order: DiceLoss(smooth=0.0)),
    "generalised Dice": Case(lambda order: GeneralizedDiceLoss()),
    "Tversky": Case(lambda order: TverskyLoss(), duplicate=SMOOTH),
    "Jaccard metric loss": Case(lambda order: JaccardMetricLoss()),
    "OHEM cross-entropy": Case(lambda order: OhemCrossEntropyLoss()),
    "OHEM cross-entropy, min_kept = 0": Case(lambda order: OhemCrossEntropyLoss(min_kept=0)),
    "sum: cross-entropy + Dice": Case(
        lambda order: SumLoss(
            terms={
                "cross_entropy": {"loss": CrossEntropyLoss(), "weight": 1.0},
                "dice": {"loss": DiceLoss(), "weight": 0.5},
            }
        ),
        duplicate=SMOOTH,
    ),
}
every_loss = pytest.mark.parametrize("name", CASES)
PER_IMAGE = "per image"


def build(name, order=None):
    return CASES[name].build(list(range(NUM_CLASSES)) if order is None else order)


def example(num_classes=NUM_CLASSES, seed=0, void=True, size=(2, 6, 7)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size[0], num_classes, *size[1:], generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, size, generator=generator)
    if void:
        target[torch.rand(size, generator=generator) < 0.2] = VOID
    return logits, target


def value_and_gradient(loss, logits, target):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, target)
    assert value.shape == ()
    value.backward()
    return value.detach(), leaf.grad


def test_every_public_loss_is_in_the_table():
    public = {
        value for value in vars(package).values() if inspect.isclass(value) and issubclass(value, torch.nn.Module)
    }
    assert {type(build(name)) for name in CASES} == public


@every_loss
def test_perfect_prediction_costs_nothing(name, record):
    """Point 1, at sizes from one pixel to a million."""
    worst = 0.0
    for size in ((1, 1, 1), (2, 7, 5), (1, 128, 128), (1, 1024, 1024)):
        num_classes = NUM_CLASSES if size[1] < 1024 else 3
        target = torch.arange(size[0] * size[1] * size[2]).view(size) % num_classes
        # one class with few pixels at the large sizes
        target[target == 2] = torch.where(torch.arange(int((target == 2).sum())) < 9, 2, 1)
        logits = torch.full((size[0], num_classes, *size[1:]), -60.0).scatter_(1, target[:, None], 60.0)
        worst = max(worst, float(build(name, list(range(num_classes)))(logits, target)))
    assert -1e-6 < worst < 1e-4
    record(name, "perfect", f"{worst:.0e}" if worst > 0 else "0")


@every_loss
def test_void_pixels_do_not_exist(name, record):
    """Point 2: no gradient, no influence, whatever their logits are."""
    loss = build(name)
    logits, target = example(size=(1, 9, 8))
    value, gradient = value_and_gradient(loss, logits, target)
    void = target == VOID
    assert void.any()
    for wild in (0.0, 1e30, torch.nan, torch.inf):
        other = logits.masked_fill(void[:, None], wild)
        other_value, other_gradient = value_and_gradient(loss, other, target)
        assert other_value == value
        assert torch.equal(other_gradient.movedim(1, -1)[void], torch.zeros(int(void.sum()), NUM_CLASSES).double())
        torch.testing.assert_close(other_gradient, gradient)
    only = logits.movedim(1, -1)[~void].T.reshape(1, NUM_CLASSES, 1, -1)
    only_value, only_gradient = value_and_gradient(loss, only, target[~void].view(1, 1, -1))
    torch.testing.assert_close(only_value, value)
    torch.testing.assert_close(gradient.movedim(1, -1)[~void].T.reshape_as(only), only_gradient)
    record(name, "void", "gradient 0, value unchanged")


@every_loss
def test_symmetries(name, record):
    """Point 3: order of pixels, order of classes, a shift of all logits of a pixel."""
    logits, target = example()
    value, gradient = value_and_gradient(build(name), logits, target)
    pixels = torch.randperm(42, generator=torch.Generator().manual_seed(1))
    if PER_IMAGE not in name:  # across images too
        pixels = torch.randperm(84, generator=torch.Generator().manual_seed(1))

    def move(x: Tensor) -> Tensor:
        """Permute the pixels of (N,H,W) or (N,K,H,W)."""
        channels = x if x.dim() == 4 else x[:, None]
        if len(pixels) == 42:
            moved = channels.flatten(2)[:, :, pixels].view_as(channels)
        else:
            flat = channels.movedim(1, 0).flatten(1)[:, pixels]
            moved = flat.view(len(flat), *x.shape[:1], *x.shape[-2:]).movedim(0, 1)
        return moved.contiguous() if x.dim() == 4 else moved[:, 0]

    moved_value, moved_gradient = value_and_gradient(build(name), move(logits), move(target))
    torch.testing.assert_close(moved_value, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved_gradient, move(gradient), rtol=1e-9, atol=1e-14)

    order = [3, 0, 4, 2, 1]
    renamed = torch.where(target == VOID, VOID, torch.tensor(order).argsort()[target.clamp(max=4)])
    class_value, class_gradient = value_and_gradient(build(name, order), logits[:, order], renamed)
    torch.testing.assert_close(class_value, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(class_gradient, gradient[:, order], rtol=1e-9, atol=1e-14)

    shift = torch.randn(2, 1, 6, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shift_value, shift_gradient = value_and_gradient(build(name), logits + 5 * shift, target)
    torch.testing.assert_close(shift_value, value, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(shift_gradient, gradient, rtol=1e-7, atol=1e-12)
    assert gradient.sum(1).abs().max() < 1e-14
    record(name, "symmetry", "equal")


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_void(name, dtype, record):
    """Point 4: 0, and the backward pass works."""
    logits, target = example()
    value, gradient = value_and_gradient(build(name), logits.to(dtype), torch.full_like(target, VOID))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    record(name, "all_void", "0, gradient 0")


@every_loss
def test_one_valid_pixel(name, record):
    """Point 5: finite, and a step against the gradient lowers the loss."""
    loss = build(name)
    logits, _ = example()
    target = torch.full((2, 6, 7), VOID)
    target[1, 2, 3] = 4
    value, gradient = value_and_gradient(loss, logits, target)
    assert value > 0
    assert bool(torch.isfinite(gradient).all())
    assert int((gradient != 0).any(1).sum()) == 1
    assert loss(logits - 1e-3 * gradient / gradient.norm(), target) < value
    record(name, "one_pixel", "works")


@every_loss
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inputs_are_not_written_to(name, layout, record):
    """Point 6, for both memory layouts, which also give the same numbers."""
    loss = build(name)
    logits, target = example()
    expected = value_and_gradient(loss, logits, target)
    leaf = logits.clone().contiguous(memory_format=layout).requires_grad_()
    before, labels = leaf.detach().clone(), target.clone()
    versions = leaf._version, target._version
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    value = loss(leaf, target)
    value.backward()
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(target, labels)
    assert versions == (leaf._version, target._version)
    assert all(torch.equal(v, state[k]) for k, v in loss.state_dict().items())
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-10, atol=1e-15)
    record(name, "read_only", "yes")


@every_loss
def test_gradcheck(name, record):
    """Point 7: the analytical gradient is the numerical one, in float64."""
    loss = build(name)
    logits, target = example(size=(2, 3, 4))
    assert torch.autograd.gradcheck(lambda s: loss(s, target), (logits.requires_grad_(),), atol=1e-6)
    record(name, "gradcheck", "gradcheck")


@every_loss
def test_half_precision(name, record):
    """Point 7: relative error of value and gradient against float64 on the same logits; no overflow."""
    loss = build(name)
    logits, target = example(size=(2, 16, 16))
    found = []
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        given = logits.to(dtype)
        value, gradient = value_and_gradient(loss, given.double(), target)
        low_value, low_gradient = value_and_gradient(loss, given, target)
        assert low_value.dtype == torch.float32
        assert low_gradient.dtype == dtype
        errors = (
            float(abs(low_value - value) / value),
            float((low_gradient.double() - gradient).norm() / gradient.norm()),
        )
        assert max(errors) < bound
        found.append(f"{max(errors):.0e}")
        largest = 1e30 if dtype == torch.bfloat16 else torch.finfo(dtype).max / 2
        huge = (given.double() * (largest / given.double().abs().max())).to(dtype)
        huge_value, huge_gradient = value_and_gradient(loss, huge, target)
        assert bool(torch.isfinite(huge_value)) == bool(torch.isfinite(huge_gradient).all()) == True  # noqa: E712
    record(name, "half", " / ".join(found))


@every_loss
def test_duplicated_batch(name, record):
    """Point 8: a mean stays what it is; smoothing in pixels moves it by little."""
    loss = build(name)
    logits, target = example(size=(2, 16, 16))
    value = loss(logits, target)
    twice = loss(logits.repeat(2, 1, 1, 1), target.repeat(2, 1, 1))
    change = float(abs(twice - value) / value)
    assert change < CASES[name].duplicate
    record(name, "duplicate", "unchanged" if change < 1e-6 else f"{change:.0e} (smooth)")


@every_loss
def test_absent_class(name, record):
    """Point 9: a class that no pixel has and the model does not predict changes nothing."""
    loss = build(name)
    logits, target = example()
    target[target == 4] = 0
    value, gradient = value_and_gradient(loss, logits, target)
    assert bool(torch.isfinite(value)) == bool(torch.isfinite(gradient).all()) == True  # noqa: E712
    if "absent" in CASES[name].exempt:
        record(name, "absent", f"finite; {CASES[name].exempt['absent']}")
        return
    unlikely = logits.clone()
    unlikely[:, 4] = -200.0
    with_class = loss(unlikely, target)
    without = build(name, list(range(4)) if "margin" not in name and "weights" not in name else None)
    if isinstance(loss, IouMarginLoss):
        without = IouMarginLoss(num_classes=4, form=loss.form)
        without.running = loss.running[:, :4]
    elif "margin" in name:
        without = MarginCalibrationLoss(rho_k0=loss.rho_k0[:4], rho_0k=loss.rho_0k[:4], form=loss.form)
    elif "weights" in name:
        without = CrossEntropyLoss(weight=loss.weight[:4])
    torch.testing.assert_close(with_class, without(logits[:, :4], target), rtol=1e-12, atol=0)
    record(name, "absent", "no influence")


@every_loss
def test_two_classes(name, record):
    """Point 10."""
    loss = build(name, [0, 1])
    logits, target = example(num_classes=2, size=(2, 3, 4))
    assert torch.autograd.gradcheck(lambda s: loss(s, target), (logits.requires_grad_(),), atol=1e-6)
    record(name, "two_classes", "gradcheck")


@every_loss
@pytest.mark.parametrize("stride", [1, 2])
def test_non_finite_logits_give_a_non_finite_loss(name, stride, record):
    """Point 11: one logit of one valid pixel is enough, whether it is the label's, another's, or all are."""
    loss = build(name)
    logits, target = example(size=(2, 6, 8))
    logits = logits[:, :, ::stride, ::stride]
    image, row, column = (target[:, ::stride, ::stride] != VOID).nonzero()[3].tolist()
    label = int(target[:, ::stride, ::stride][image, row, column])
    for bad in (torch.nan, torch.inf, -torch.inf):
        for classes in (label, (label + 1) % NUM_CLASSES, slice(None)):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                broken = logits.to(dtype).clone()
                broken[image, classes, row, column] = bad
                assert not bool(torch.isfinite(loss(broken, target))), (bad, classes, dtype)
    record(name, "non_finite", "non-finite")


@every_loss
def test_non_finite_logits_of_a_void_pixel_do_not_matter_at_label_size_only(name):
    """Point 2 and its limit: below label size a logit also reaches valid pixels, and then the loss is non-finite."""
    loss = build(name)
    logits, target = example(size=(2, 6, 8))
    target[0, 2:4, 2:4] = VOID
    expected = loss(logits, target)
    low = logits[:, :, ::2, ::2]
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = logits.clone()
        broken[0, 1, 2:4, 2:4] = bad
        assert loss(broken, target) == expected
        broken = low.clone()
        broken[0, 1, 1, 1] = bad
        assert not bool(torch.isfinite(loss(broken, target)))
