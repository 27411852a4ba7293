"""Values against independent references, and identities between the losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segkit.errors import InputError
from segkit.losses import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    JaccardMetricLoss,
    LovaszSoftmaxLoss,
    OhemCrossEntropyLoss,
    SumLoss,
    TverskyLoss,
    class_weights,
    cross_entropy,
)

VOID = 255
TERM = {"loss": FocalLoss(), "weight": 1.0}


def example(num_classes=4, size=(2, 5, 6), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size[0], num_classes, *size[1:], generator=generator, dtype=dtype)
    target = torch.randint(num_classes, size, generator=generator)
    target[torch.rand(size, generator=generator) < 0.15] = VOID
    return logits, target


def valid_pixels(logits, target):
    """Probabilities (P,K) and labels (P,) of the valid pixels."""
    valid = target != VOID
    return logits.softmax(1).movedim(1, -1)[valid], target[valid]


# cross-entropy and its relatives


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torch(weighted, smoothing):
    logits, target = example()
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0]) if weighted else None
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(leaf, target)
    expected = F.cross_entropy(
        other,
        target,
        weight=None if weight is None else weight.double(),
        label_smoothing=smoothing,
        ignore_index=VOID,
    )
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0, 2.0, 5.0])
def test_focal_is_the_formula(gamma):
    logits, target = example()
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = FocalLoss(gamma=gamma)(leaf, target)
    p, y = valid_pixels(other, target)
    py = p.gather(1, y[:, None])
    expected = (-((1 - py) ** gamma) * py.log()).mean()
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(leaf.grad, other.grad)


def test_focal_gamma_zero_is_cross_entropy():
    logits, target = example()
    torch.testing.assert_close(FocalLoss(gamma=0.0)(logits, target), CrossEntropyLoss()(logits, target))


@pytest.mark.parametrize("gamma", [0.0, 0.4, 2.0])
def test_focal_has_no_pole_at_certainty(gamma):
    logits = torch.tensor([200.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    FocalLoss(gamma=gamma)(logits, torch.zeros(1, 1, 1, dtype=torch.long)).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 0), (0.2, 0), (0.01, 7), (0.0, 1), (0.5, 10**6), (0.0, 0)])
def test_ohem_is_the_mean_of_the_hardest(threshold, min_kept):
    logits, target = example()
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = OhemCrossEntropyLoss(threshold=threshold, min_kept=min_kept)(leaf, target)
    p, y = valid_pixels(other, target)
    py = p.gather(1, y[:, None])[:, 0].sort().values
    kept = py[: max(int((py < threshold).sum()), min(min_kept, len(py)))]
    expected = -kept.log().mean() if len(kept) else 0 * py.sum()
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(leaf.grad, other.grad)


def test_class_weights():
    counts = [600, 300, 0, 100]
    p = np.array([0.6, 0.3, 0.1])
    expected = {
        "inverse": 1 / p,
        "inverse_sqrt": p**-0.5,
        "median_frequency": 0.3 / p,
        "enet": 1 / np.log(1.02 + p),
    }
    for weighting, raw in expected.items():
        weights = class_weights(counts, weighting=weighting)
        np.testing.assert_allclose(weights[[0, 1, 3]], raw / raw.mean(), rtol=1e-6)
        assert weights[2] == 0
        assert torch.equal(cross_entropy(counts, weighting=weighting).weight, weights)
    assert cross_entropy(counts).weight is None


@pytest.mark.parametrize("counts", [[math.nan, 1.0], [math.inf, 1.0], ["a", "b"], [0, 0], [3, -1], [[1, 2]]])
def test_class_weights_of_no_counts_are_refused(counts):
    with pytest.raises(InputError, match=r"^class_pixels must"):
        class_weights(counts, weighting="inverse")


@pytest.mark.parametrize("gamma", [np.float32(2), np.int64(2)])
def test_numbers_of_numpy_are_numbers(gamma):
    assert FocalLoss(gamma=gamma).gamma == 2


# overlaps


def counts_by_loop(p, y, k):
    """hits, mass, size of one class as Python sums."""
    hits = sum(float(p[i, k]) for i in range(len(y)) if y[i] == k)
    mass = sum(float(p[i, k]) for i in range(len(y)))
    return hits, mass, sum(1 for label in y if label == k)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_and_tversky_are_the_formulas(smooth):
    logits, target = example()
    target[target == 1] = 0  # class 1 is absent and left out
    p, y = valid_pixels(logits, target)
    dice, tversky = [], []
    for k in (0, 2, 3):
        hits, mass, size = counts_by_loop(p, y, k)
        dice.append(2 * (hits + smooth) / (mass + size + 2 * smooth))
        bottom = hits + 0.3 * (mass - hits) + 0.7 * (size - hits) + smooth
        tversky.append((hits + smooth) / bottom)
    assert float(DiceLoss(smooth=smooth)(logits, target)) == pytest.approx(1 - np.mean(dice), rel=1e-12)
    assert float(TverskyLoss(smooth=smooth)(logits, target)) == pytest.approx(1 - np.mean(tversky), rel=1e-12)


def test_generalised_dice_is_the_formula():
    logits, target = example()
    target[target == 1] = 0
    p, y = valid_pixels(logits, target)
    top = bottom = 0.0
    for k in (0, 2, 3):
        hits, mass, size = counts_by_loop(p, y, k)
        top += hits / size**2
        bottom += (mass + size) / size**2
    assert float(GeneralizedDiceLoss()(logits, target)) == pytest.approx(1 - 2 * top / bottom, rel=1e-12)


def test_jaccard_metric_loss_is_the_formula_in_norms():
    logits, target = example()
    target[target == 1] = 0
    p, y = valid_pixels(logits, target)
    t = F.one_hot(y, 4).double()
    plus, minus = (p + t).abs().sum(0), (p - t).abs().sum(0)
    jml = (1 - (plus - minus) / (plus + minus))[[0, 2, 3]].mean()
    expected = 0.25 * CrossEntropyLoss()(logits, target) + 0.75 * jml
    torch.testing.assert_close(JaccardMetricLoss()(logits, target), expected)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_tversky_identities(smooth):
    logits, target = example()
    dice = DiceLoss(smooth=smooth)(logits, target)
    torch.testing.assert_close(TverskyLoss(alpha=0.5, beta=0.5, smooth=smooth)(logits, target), dice)
    jaccard_term = JaccardMetricLoss(ce_weight=0.0, jaccard_weight=1.0)(logits, target)
    torch.testing.assert_close(TverskyLoss(alpha=1, beta=1, smooth=0)(logits, target), jaccard_term)
    one, other = (TverskyLoss(alpha=a, beta=1 - a, smooth=smooth)(logits, target) for a in (0.3, 0.7))
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_and_jaccard_obey_their_relation(smooth):
    """J = D / (2 - D); one class at a time, because both are means over classes."""
    logits, _ = example()
    target = torch.full((2, 5, 6), VOID)
    target[0, :3] = 2
    wrong = target == 2
    dice = 1 - DiceLoss(smooth=smooth)(logits, target)
    jaccard = 1 - TverskyLoss(alpha=1, beta=1, smooth=smooth)(logits, target)
    assert bool(wrong.any())
    torch.testing.assert_close(jaccard, dice / (2 - dice))


# Lovasz


def textbook_lovasz(p, y, classes="present"):
    """Algorithm 1 of the paper, one class after the other."""
    losses = []
    for k in range(p.shape[1]):
        inside = (y == k).double()
        if classes == "present" and inside.sum() == 0:
            continue
        errors, order = torch.sort((inside - p[:, k]).abs(), descending=True)
        inside = inside[order]
        union = inside.sum() + (1 - inside).cumsum(0)
        jaccard = 1 - (inside.sum() - inside.cumsum(0)) / union
        growth = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(errors @ growth)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("sharpness", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("num_classes", [2, 5, 20])
def test_lovasz_is_the_textbook_form(num_classes, sharpness, classes):
    logits, target = example(num_classes, size=(2, 12, 10))
    target[target == 1] = 0
    logits = logits * sharpness
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = LovaszSoftmaxLoss(classes=classes)(leaf, target)
    expected = textbook_lovasz(*valid_pixels(other, target), classes)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-15)
    single = LovaszSoftmaxLoss(classes=classes)(logits.float(), target)
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lovasz_at_one_hot_probabilities_is_one_minus_iou(dtype):
    _, target = example(5, size=(2, 12, 10))
    predicted = torch.randint(5, (2, 12, 10), generator=torch.Generator().manual_seed(7))
    logits = 200 * F.one_hot(predicted, 5).movedim(-1, 1).to(dtype)
    valid = target != VOID
    losses = []
    for k in target[valid].unique():
        a, b = (predicted == k) & valid, (target == k) & valid
        losses.append(1 - int((a & b).sum()) / int((a | b).sum()))
    value = LovaszSoftmaxLoss()(logits, target)
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-6)


def test_lovasz_per_image_is_the_mean_over_images_with_valid_pixels():
    logits, target = example(size=(3, 5, 6))
    target[1] = VOID
    whole = LovaszSoftmaxLoss()
    expected = (whole(logits[:1], target[:1]) + whole(logits[2:], target[2:])) / 2
    torch.testing.assert_close(LovaszSoftmaxLoss(per_image=True)(logits, target), expected)


# sums, denominators, options


def test_sum_is_the_weighted_sum():
    logits, target = example()
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    terms = {
        "weighted": {"loss": CrossEntropyLoss(weight=weight), "weight": 2.0},
        "focal": {"loss": FocalLoss(), "weight": 0.5},
        "plain": {"loss": CrossEntropyLoss(), "weight": 1},
    }
    loss = SumLoss(terms=terms)
    first, second = CrossEntropyLoss(weight=weight)(logits, target), FocalLoss()(logits, target)
    torch.testing.assert_close(loss(logits, target), 2 * first + 0.5 * second + CrossEntropyLoss()(logits, target))
    assert loss.pixel_decomposable
    denominator = loss.denominator(target)
    assert denominator.shape == (3,)
    torch.testing.assert_close(loss(logits, target, denominator=denominator), loss(logits, target))
    assert not SumLoss(terms={"dice": {"loss": DiceLoss(), "weight": 1.0}}).pixel_decomposable


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropyLoss(),
        CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), label_smoothing=0.1),
        FocalLoss(),
        SumLoss(terms={"a": {"loss": CrossEntropyLoss(), "weight": 1.0}, "b": {"loss": FocalLoss(), "weight": 2.0}}),
    ],
    ids=["ce", "weighted ce", "focal", "sum"],
)
def test_parts_with_the_common_denominator_add_up(loss):
    """What accumulation and data parallelism do: unequal parts, one denominator."""
    logits, target = example(size=(4, 5, 6))
    target[0, :4] = VOID
    parts = [slice(0, 1), slice(1, 4)]
    common = sum(loss.denominator(target[part]) for part in parts)
    total = sum(loss(logits[part], target[part], denominator=common) for part in parts)
    torch.testing.assert_close(total, loss(logits, target))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cross_entropy([1, 2], weighting="log"), "weighting must be one of null, inverse, .*got 'log'"),
        (lambda: cross_entropy(weighting="inverse"), "weighting = inverse needs the label counts"),
        (lambda: cross_entropy([0, 0], weighting="inverse"), "must count at least one pixel, got"),
        (lambda: CrossEntropyLoss(weight=torch.tensor([1.0, -1.0])), "finite class weights, none negative"),
        (lambda: CrossEntropyLoss(weight=torch.ones(2, 2)), "vector of K finite class weights"),
        (lambda: CrossEntropyLoss(label_smoothing=1.5), "label_smoothing must be .* at most 1, got 1.5"),
        (lambda: FocalLoss(gamma=-1.0), "gamma must be a finite number at least 0, got -1.0; set loss.gamma"),
        (lambda: FocalLoss(gamma=math.nan), "gamma must be a finite number"),
        (lambda: TverskyLoss(alpha="a"), "alpha must be a finite number at least 0, got 'a'"),
        (lambda: DiceLoss(smooth=-1), "smooth must be a finite number at least 0"),
        (lambda: LovaszSoftmaxLoss(classes="some"), "classes must be one of present, all, got 'some'"),
        (lambda: OhemCrossEntropyLoss(threshold=2.0), "threshold must be .* at most 1"),
        (lambda: OhemCrossEntropyLoss(min_kept=0.5), r"min_kept is 0\.5, but counts pixels, so it is a whole number"),
        (lambda: JaccardMetricLoss(ce_weight=-0.1), "ce_weight must be a finite number"),
        (lambda: SumLoss(terms={}), "needs at least one term"),
        (lambda: SumLoss(terms={"a": {"loss": FocalLoss()}}), "term a .* needs the keys loss and weight, got"),
        (lambda: SumLoss(terms={"a": 3}), "term a .* got int"),
        (lambda: SumLoss(terms={"train": TERM}), "a term of a weighted sum cannot be named 'train': give it another"),
        (lambda: SumLoss(terms={"a.b": TERM}), "a term of a weighted sum cannot be named 'a.b': give it another"),
        (
            lambda: SumLoss(terms={"a": {"loss": SumLoss(terms={"b": TERM}), "weight": 1.0}}),
            "term a of a weighted sum is itself a weighted sum, .*list its terms in loss.terms",
        ),
        (lambda: SumLoss(terms={"a": {"loss": FocalLoss(), "weight": -1}}), "terms.a.weight must be a finite number"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_weights_of_another_number_of_classes():
    logits, target = example()
    with pytest.raises(InputError, match="logits have 4 classes but this loss was built for 2"):
        CrossEntropyLoss(weight=torch.ones(2))(logits, target)
