"""Rule (*) against brute force on small distributions whose posteriors are known, and against its derivation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from segkit.errors import InputError
from segkit.evaluation.decision import LogitSample
from segkit.evaluation.miou_rule import MiouRule, fit_miou_rule, fit_vector_scaling, fixed_point, rule_from_json


def mean_iou(decision, joint):
    """Slow and separate: class by class, cell by cell."""
    scores = []
    for k in range(joint.shape[1]):
        both = sum(joint[c, k] for c in range(len(joint)) if decision[c] == k)
        target = sum(joint[c, k] for c in range(len(joint)))
        predicted = sum(joint[c].sum() for c in range(len(joint)) if decision[c] == k)
        if target > 0:
            scores.append(both / (target + predicted - both))
    return sum(scores) / len(scores)


def problem(seed, cells, classes):
    """Masses of cells, and posteriors in which some classes are rare and hard."""
    rng = np.random.default_rng(seed)
    posteriors = rng.dirichlet(1 / np.arange(1, classes + 1), size=cells)
    return posteriors, posteriors * rng.dirichlet(np.full(cells, 3.0))[:, None]


def decide(posteriors, iou, union):
    return (((1 + iou) * posteriors - iou) / union).argmax(1)


@pytest.mark.parametrize(("cells", "classes"), [(7, 3), (10, 2), (5, 4)])
def test_the_rule_reaches_the_best_assignment(cells, classes):
    """Never below the argmax; on most problems the optimum itself, and close to it on all."""
    gaps, gains = [], []
    for seed in range(12):
        posteriors, joint = problem(seed, cells, classes)
        best = max(mean_iou(choice, joint) for choice in itertools.product(range(classes), repeat=cells))
        iou, union, score = fixed_point(posteriors, joint)
        plain = mean_iou(posteriors.argmax(1), joint)
        assert score >= plain - 1e-12
        if score > plain + 1e-12:  # the numbers that are returned are those of the score
            assert mean_iou(decide(posteriors, iou, union), joint) == pytest.approx(score, abs=1e-12)
        gaps.append(best - score)
        gains.append(score - plain)
    assert min(gaps) > -1e-12
    assert np.mean(np.array(gaps) < 1e-9) > 0.5
    assert np.mean(gaps) < 0.25 * np.mean(gains)


def test_no_small_change_of_the_decision_gains_to_first_order():
    """Many light cells: to move any one of them elsewhere changes the mean IoU by less than second order."""
    posteriors, joint = problem(3, 400, 4)
    iou, union, score = fixed_point(posteriors, joint)
    decision = decide(posteriors, iou, union)
    largest = joint.sum(1).max()
    for cell in range(0, 400, 7):
        for k in range(4):
            changed = decision.copy()
            changed[cell] = k
            assert mean_iou(changed, joint) - score < 20 * largest**2


def test_the_first_order_change_is_that_of_finite_differences():
    posteriors, joint = problem(0, 30, 3)
    decision = posteriors.argmax(1)
    counts = np.array([[joint[decision == k, j].sum() for k in range(3)] for j in range(3)])
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = np.diag(counts) / union
    small = 1e-7
    for k in range(3):
        added = np.array([0.2, 0.5, 0.3])  # posterior of a pixel that is predicted as k in addition
        more = counts.copy()
        more[:, k] += small * added
        target = counts.sum(1)  # the shares of the classes are the data's
        changed = np.diag(more) / (target + more.sum(0) - np.diag(more))
        expected = ((1 + iou[k]) * added[k] - iou[k]) / (3 * union[k])
        assert (changed.mean() - iou.mean()) / small == pytest.approx(expected, rel=1e-4)


def sample_of(seed=0, pixels=4000, classes=4, factor=2.0, offset=0.7):
    """Logits that are those of the truth, spoilt by a factor and an offset per class."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(pixels, classes)) * 1.5 - np.arange(classes)
    p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    target = (p.cumsum(1) > rng.random((pixels, 1))).argmax(1)
    spoilt = (true - offset * np.arange(classes)) / factor
    return LogitSample(spoilt.astype(np.float32), target.astype(np.int64), np.ones(pixels), 5), true


def test_vector_scaling_finds_what_was_spoilt():
    sample, true = sample_of(pixels=40000)
    factor, offset = fit_vector_scaling(sample)
    np.testing.assert_allclose(factor, 2.0, rtol=0.06)
    fitted = sample.logits * factor + offset
    difference = (fitted - true) - (fitted - true).mean(1, keepdims=True)
    assert np.abs(difference).mean() < 0.06


def test_the_fit_is_never_worse_than_the_argmax_where_it_was_fitted():
    for seed in range(5):
        sample, _ = sample_of(seed)
        fitted = fit_miou_rule(sample)
        logits = torch.from_numpy(sample.logits)
        scores = fitted.rule.scores(fitted.rule.calibrated(logits).softmax(1))
        joint = np.eye(4)[sample.target]
        assert mean_iou(logits.argmax(1).numpy(), joint) == pytest.approx(fitted.mean_iou_before, abs=1e-9)
        assert mean_iou(scores.argmax(1).numpy(), joint) == pytest.approx(fitted.mean_iou_after, abs=2e-4)
        assert fitted.mean_iou_after > fitted.mean_iou_before


def test_a_class_that_was_not_seen_keeps_its_pixels():
    sample, _ = sample_of()
    kept = sample.target != 3
    fitted = fit_miou_rule(LogitSample(sample.logits[kept], sample.target[kept], np.ones(kept.sum()), 5))
    assert fitted.rule.counted.tolist() == [True, True, True, False]
    p = (3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))).softmax(1)
    scores = fitted.rule.scores(p)
    assert bool(torch.isfinite(scores).all())
    decision = scores.argmax(1)
    assert torch.equal(decision == 3, p.argmax(1) == 3)
    assert bool((decision == 3).any())


def test_maps_of_any_shape_and_json():
    sample, _ = sample_of()
    rule = fit_miou_rule(sample).rule
    again = rule_from_json(rule.to_json(["a", "b", "c", "d"]), ["a", "b", "c", "d"])
    logits = torch.from_numpy(sample.logits[:24]).view(2, 3, 4, 4).movedim(-1, 1)
    flat = logits.movedim(1, -1).reshape(-1, 4)
    scores = again.scores(again.calibrated(logits).softmax(1))
    torch.testing.assert_close(
        scores.movedim(1, -1).reshape(-1, 4), rule.scores(rule.calibrated(flat).softmax(1)), rtol=1e-5, atol=1e-5
    )
    reordered = rule_from_json(rule.to_json(["b", "a", "c", "d"]), ["a", "b", "c", "d"])
    assert reordered.iou[0] == rule.iou[1]


RULE = {"factor": 1.0, "offset": 0.0, "iou": 0.5, "union": 0.2, "counted": True}


@pytest.mark.parametrize(
    "content",
    [
        *(None, 3, {}, {"a": 1, "b": 2}, {"a": {}, "b": {}}, {"x": {"factor": 1.0}, "b": {}}),
        *({"a": RULE, "b": RULE | {key: "1"}} for key in RULE),
        *({"a": RULE, "b": RULE | {key: [1.0]}} for key in RULE),
        {"a": RULE, "b": RULE | {"counted": 7}},
        {"a": RULE, "b": RULE | {"factor": float("inf")}},
        {"a": RULE, "b": RULE | {"factor": 1e300}},
        {"a": RULE, "b": RULE | {"union": 0.0}},
    ],
)
def test_a_rule_of_other_classes_is_refused(content):
    with pytest.raises(InputError, match="is none of this run's classes: fit it again"):
        rule_from_json(content, ["a", "b"])


def test_a_neutral_rule_is_the_argmax():
    rule = MiouRule(np.ones(3), np.zeros(3), np.zeros(3), np.ones(3), np.ones(3, bool))
    p = torch.rand(5, 3, 4, 4).softmax(1)
    assert torch.equal(rule.scores(p).argmax(1), p.argmax(1))
