"""Scores against a per-pixel reference, and the policy on absent classes."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from segkit.errors import InputError
from segkit.evaluation import metrics


def reference_scores(pred, target, num_classes, ignore=255):
    """IoU, precision, recall and Dice by sets of pixel numbers and exact fractions; None for 0/0."""
    counted = {i for i, t in enumerate(target) if t != ignore}
    scores = {"iou": [], "precision": [], "recall": [], "dice": []}
    for k in range(num_classes):
        t = {i for i in counted if target[i] == k}
        p = {i for i in counted if pred[i] == k}
        for name, above, below in (
            ("iou", len(t & p), len(t | p)),
            ("precision", len(t & p), len(p)),
            ("recall", len(t & p), len(t)),
            ("dice", 2 * len(t & p), len(t) + len(p)),
        ):
            scores[name].append(float(Fraction(above, below)) if below else float("nan"))
    right = sum(pred[i] == target[i] for i in counted)
    return scores, right / len(counted)


def count(pred, target, num_classes, ignore=255):
    counts = np.zeros((num_classes, num_classes), np.int64)
    for p, t in zip(pred, target, strict=True):
        if t != ignore:
            counts[t, p] += 1
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_per_pixel_definition(seed):
    rng = np.random.default_rng(seed)
    target = rng.choice([0, 1, 2, 3, 255], 200, p=[0.6, 0.2, 0.05, 0.05, 0.1])
    pred = rng.integers(0, 4, 200) if seed else np.zeros(200, int)
    counts = count(pred, target, 6)  # classes 4 and 5 occur nowhere
    expected, accuracy = reference_scores(pred.tolist(), target.tolist(), 6)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(metrics, name)(counts), values, rtol=1e-14)
    assert metrics.pixel_accuracy(counts) == pytest.approx(accuracy)
    assert metrics.mean_iou(counts) == pytest.approx(np.nanmean(expected["iou"]))
    assert metrics.mean_class_accuracy(counts) == pytest.approx(np.nanmean(expected["recall"]))
    share = np.array([(target == k).sum() for k in range(6)]) / (target != 255).sum()
    assert metrics.frequency_weighted_iou(counts) == pytest.approx(np.nansum(share * expected["iou"]))


def test_a_class_that_is_only_predicted_counts_as_zero_and_a_class_without_union_is_left_out():
    counts = np.array([[8, 2, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(metrics.iou(counts), [0.8, 0.0, np.nan])
    assert metrics.mean_iou(counts) == pytest.approx(0.4)
    assert metrics.absent_classes(counts) == [2]
    np.testing.assert_array_equal(metrics.recall(counts), [0.8, np.nan, np.nan])
    np.testing.assert_array_equal(metrics.precision(counts), [1.0, 0.0, np.nan])


def test_nothing_counted_gives_nan_without_a_warning():
    counts = np.zeros((3, 3), np.int64)
    assert np.isnan(metrics.iou(counts)).all()
    for score in (metrics.mean_iou, metrics.pixel_accuracy, metrics.frequency_weighted_iou):
        assert np.isnan(score(counts))


def test_counts_beyond_float_precision_stay_exact():
    counts = np.array([[2**60 + 1, 0], [1, 2**60]])
    tp, target, predicted = metrics.totals(counts)
    assert tp.tolist() == [2**60 + 1, 2**60]
    assert target.tolist() == [2**60 + 1, 2**60 + 1]
    assert predicted.tolist() == [2**60 + 2, 2**60]


def test_merged_classes_equal_counting_merged_labels():
    rng = np.random.default_rng(0)
    target, pred = rng.integers(0, 5, 500), rng.integers(0, 5, 500)
    groups = np.array([0, 1, 1, -1, 0])
    merged = metrics.merge_classes(count(pred, target, 5), groups)
    expected = np.zeros((2, 3), np.int64)
    for t, p in zip(groups[target], groups[pred], strict=True):
        if t >= 0:
            expected[t, p if p >= 0 else 2] += 1
    np.testing.assert_array_equal(merged, expected)
    # A prediction of the class that is not evaluated is a miss of its row and a false alarm of no group.
    tp, row, column = expected[[0, 1], [0, 1]], expected.sum(1), expected[:, :2].sum(0)
    np.testing.assert_allclose(metrics.iou(merged), tp / (row + column - tp))


def test_merge_wants_one_group_per_class():
    counts = np.eye(3, dtype=np.int64)
    with pytest.raises(InputError, match=r"2 groups were given for 3 classes; give one per class"):
        metrics.merge_classes(counts, [0, 1])


def test_summary_is_json_with_none_for_a_score_without_meaning():
    counts = np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
    summary = metrics.summary(counts, ["sky", "road", "bus"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["classes"]["bus"] == {
        "iou": None,
        "precision": None,
        "recall": None,
        "dice": None,
        "target_pixels": 0,
        "predicted_pixels": 0,
    }
    assert summary["classes"]["road"]["iou"] == pytest.approx(10 / 12)
    assert summary["absent_classes"] == ["bus"]
    assert summary["num_classes_averaged"] == 2
    assert summary["mean_iou"] == pytest.approx((0.8 + 10 / 12) / 2)
    with pytest.raises(InputError, match="2 class names were given for 3 classes"):
        metrics.summary(counts, ["sky", "road"])
