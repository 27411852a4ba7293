"""Boundary scores against brute force over all pairs of pixels."""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np
import pytest

from segkit.errors import InputError
from segkit.evaluation.boundary import MOST_WAITING, BoundaryCounts, band_width, contour, near_other_label, within

K, IGNORE = 4, 255


def areas(seed, shape=(24, 31), void=True):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, K, (shape[0] // 6 + 1, shape[1] // 6 + 1)).astype(np.uint8)
    labels = coarse.repeat(6, 0).repeat(6, 1)[: shape[0], : shape[1]].copy()
    if void:
        labels[3:8, 20:26] = IGNORE
        labels[0, 0] = IGNORE
    return labels


def shifted(labels, seed):
    """A prediction: the labels moved by two pixels, some noise, and no void."""
    rng = np.random.default_rng(seed)
    pred = np.roll(labels, (1, 2), (0, 1))
    pred[pred == IGNORE] = 1
    noise = rng.random(pred.shape) < 0.02
    pred[noise] = rng.integers(0, K, noise.sum())
    return pred


def brute_force(pred, target, width):
    """Everything by loops over pixels; K + 1 stands for void, -1 for the outside."""
    height, breadth = target.shape
    void = target == IGNORE
    target, pred = (np.where(void, K + 1, x.astype(int)) for x in (target, pred))

    def label(x, i, j):
        return x[i, j] if 0 <= i < height and 0 <= j < breadth else -1

    def band(x, i, j):
        return any(
            label(x, a, b) != x[i, j] for a in range(i - width, i + width + 1) for b in range(j - width, j + width + 1)
        )

    def edge(x, i, j):
        around = [label(x, i + 1, j), label(x, i - 1, j), label(x, i, j + 1), label(x, i, j - 1)]
        return any(n not in (x[i, j], -1) for n in around)

    pixels = [(i, j) for i in range(height) for j in range(breadth)]
    bands = {(n, i, j) for n, x in (("t", target), ("p", pred)) for i, j in pixels if band(x, i, j)}
    iou, f_score = np.full(K, np.nan), np.full(K, np.nan)
    edges = {n: [(i, j) for i, j in pixels if edge(x, i, j)] for n, x in (("t", target), ("p", pred))}
    trimap = np.zeros((K, K), int)
    for i, j in pixels:
        if not void[i, j] and any((i - a) ** 2 + (j - b) ** 2 <= width**2 for a, b in edges["t"]):
            trimap[target[i, j], pred[i, j]] += 1
    for k in range(K):
        t = {(i, j) for i, j in pixels if target[i, j] == k and ("t", i, j) in bands}
        p = {(i, j) for i, j in pixels if pred[i, j] == k and ("p", i, j) in bands}
        if t | p:
            iou[k] = len(t & p) / len(t | p)
        et = [ij for ij in edges["t"] if target[ij] == k]
        ep = [ij for ij in edges["p"] if pred[ij] == k]

        def met(some, others):
            return sum(any((i - a) ** 2 + (j - b) ** 2 <= width**2 for a, b in others) for i, j in some)

        if et or ep:
            precision = met(ep, et) / len(ep) if ep else 0
            recall = met(et, ep) / len(et) if et else 0
            f_score[k] = 2 * precision * recall / (precision + recall) if precision + recall else 0
    return iou, f_score, trimap


@pytest.mark.parametrize(("seed", "ratio"), [(0, 0.03), (1, 0.08), (2, 0.15)])
def test_scores_equal_brute_force(seed, ratio):
    target = areas(seed)
    pred = shifted(target, seed)
    counts = BoundaryCounts(K, ratio=ratio)
    counts.update(pred, target)
    iou, f_score, trimap = brute_force(pred, target, band_width(target.shape, ratio))
    np.testing.assert_allclose(counts.iou(), iou)
    np.testing.assert_allclose(counts.f_score(), f_score)
    np.testing.assert_array_equal(counts.trimap, trimap)


def test_band_equals_repeated_erosion_of_each_class():
    labels = areas(3, void=False)
    for width in (1, 2, 5):
        band = near_other_label(labels, width)
        for k in range(K):
            mask = cv2.copyMakeBorder((labels == k).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            eroded = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
            np.testing.assert_array_equal(band & (labels == k), (labels == k) & (eroded == 0))


def test_a_perfect_prediction_scores_1_and_void_has_no_say():
    target = areas(4)
    pred = target.copy()
    pred[target == IGNORE] = 2
    counts = BoundaryCounts(K)
    counts.update(pred, target)
    np.testing.assert_array_equal(counts.iou(), np.ones(K))
    np.testing.assert_array_equal(counts.f_score(), np.ones(K))
    summary = counts.summary()
    assert summary["mean_boundary_iou"] == summary["mean_boundary_f_score"] == summary["trimap_mean_iou"] == 1


def test_a_class_in_one_of_the_two_scores_0_and_one_in_neither_nan():
    counts = BoundaryCounts(K)
    target = np.zeros((20, 20), np.uint8)
    pred = target.copy()
    pred[5:9, 5:9] = 2
    counts.update(pred, target)
    assert counts.iou()[2] == 0
    assert counts.f_score()[[0, 2]].tolist() == [0, 0]
    assert np.isnan(counts.iou()[[1, 3]]).all()
    assert np.isnan(counts.f_score()[[1, 3]]).all()


def test_parts_of_a_data_set_merge():
    whole, left, right = BoundaryCounts(K), BoundaryCounts(K), BoundaryCounts(K)
    for seed, part in ((0, left), (1, left), (2, right)):
        target = areas(seed)
        part.update(shifted(target, seed), target)
        whole.update(shifted(target, seed), target)
    left.merge(right)
    np.testing.assert_array_equal(left.iou(), whole.iou())
    np.testing.assert_array_equal(left.f_score(), whole.f_score())
    np.testing.assert_array_equal(left.trimap, whole.trimap)


def test_nothing_but_void_and_single_colour():
    counts = BoundaryCounts(K)
    counts.update(np.zeros((9, 9), np.uint8), np.full((9, 9), IGNORE))
    assert np.isnan(counts.iou()).all()
    assert not contour(np.zeros((5, 5), np.uint8)).any()
    assert not within(np.zeros((5, 5), bool), 3).any()


def test_ratio_is_checked():
    with pytest.raises(InputError, match="the boundary ratio is 2; it is a share of the diagonal between 0 and 1"):
        BoundaryCounts(K, ratio=2)


def test_in_background_counts_the_same_and_keeps_a_few_images_only(monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, 3, (2, 20, 30))) for _ in range(12)]
    one, other = BoundaryCounts(3), BoundaryCounts(3)
    for pair in pairs:
        one.update(*pair)
    begun, given = [], []
    slow = other.update

    def update(pred, target):
        begun.append(threading.get_ident())
        time.sleep(0.01)
        slow(pred, target)

    monkeypatch.setattr(other, "update", update)
    with other.in_background() as add:
        for pair in pairs:
            add(*pair)
            given.append(len(begun))
    assert max(number + 1 - done for number, done in enumerate(given)) <= MOST_WAITING + 1
    assert threading.get_ident() not in begun
    assert len(begun) == 12
    assert one.summary() == other.summary()


def test_what_fails_in_background_is_raised():
    with pytest.raises(ValueError, match="broadcast"), BoundaryCounts(2).in_background() as add:
        add(np.zeros((4, 4), int), np.full((3, 3), 1))
