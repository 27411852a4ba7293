"""Benchmark protocols: equality with the evaluator of cityscapesScripts, ADE20K's definition, class groups."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.errors import InputError
from segkit.evaluation import ConfusionMatrix, metrics
from segkit.evaluation.protocols import CITYSCAPES_CATEGORIES, benchmark_scores

EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
NAMES = [name for members in CITYSCAPES_CATEGORIES.values() for name in members]


def id_map(rng, *, absent=()):
    """Areas of all 34 ids, voids among them, with noise."""
    ids = np.array([i for i in range(34) if i not in absent], np.uint8)
    coarse = rng.choice(ids, (8, 16))
    labels = coarse.repeat(8, 0).repeat(8, 1)
    noise = rng.random(labels.shape) < 0.1
    labels[noise] = rng.choice(ids, noise.sum())
    return labels


def cityscapes_scripts_scores(folder, pairs):
    """Write the pairs as files and run the official evaluator on them (without instance scores)."""
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    predictions, targets = [], []
    for i, (pred, target) in enumerate(pairs):
        name = f"lindau_{i:06d}_000019"
        for labels, kind, paths in ((pred, "pred", predictions), (target, "gtFine_labelIds", targets)):
            path = folder / f"{name}_{kind}.png"
            Image.fromarray(labels).save(path)
            paths.append(str(path))
    args = evaluator.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    return evaluator.evaluateImgLists(predictions, targets, args)


@pytest.mark.parametrize("void_is_predicted", [False, True])
def test_scores_equal_those_of_cityscapes_scripts(tmp_path, void_is_predicted):
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(3):
        target = id_map(rng, absent=(31,))
        pred = np.where(rng.random(target.shape) < 0.6, target, id_map(rng))
        pred[pred == 31] = 7  # the train occurs nowhere: union 0
        if not void_is_predicted:
            pred[~np.isin(pred, EVALUATED)] = 26
        pairs.append((pred, target))
    official = cityscapes_scripts_scores(tmp_path, pairs)
    matrix = ConfusionMatrix(34)
    for pred, target in pairs:
        matrix.update(torch.from_numpy(pred), torch.from_numpy(target))
    train_id = [EVALUATED.index(i) if i in EVALUATED else -1 for i in range(34)]
    counts = metrics.merge_classes(matrix.counts.numpy(), train_id)
    assert (counts[:, -1].sum() > 0) == void_is_predicted

    scores = benchmark_scores("cityscapes", counts, NAMES)
    labels = official["labels"]
    expected = [official["classScores"][name] for name in sorted(labels, key=labels.get) if labels[name] in EVALUATED]
    assert sorted(labels, key=labels.get)[7] == "road"
    np.testing.assert_allclose(metrics.iou(counts), expected, rtol=1e-12)
    assert scores["mean_iou"] == pytest.approx(official["averageScoreClasses"], rel=1e-12)
    assert scores["num_classes_averaged"] == 18
    assert scores["category_mean_iou"] == pytest.approx(official["averageScoreCategories"], rel=1e-12)
    for name, value in scores["categories"].items():
        assert value == pytest.approx(official["categoryScores"][name], rel=1e-12)


def test_train_id_counting_gives_the_same_as_raw_ids():
    rng = np.random.default_rng(1)
    to_train = np.full(34, 255, np.uint8)
    to_train[list(EVALUATED)] = np.arange(19)
    target, pred = id_map(rng), rng.choice(np.array(EVALUATED, np.uint8), (64, 128))
    raw, trained = ConfusionMatrix(34), ConfusionMatrix(19)
    raw.update(torch.from_numpy(pred), torch.from_numpy(target))
    trained.update(torch.from_numpy(to_train[pred]), torch.from_numpy(to_train[target]))
    groups = [int(i) if i < 19 else -1 for i in to_train]
    np.testing.assert_array_equal(metrics.merge_classes(raw.counts.numpy(), groups)[:, :19], trained.counts.numpy())


def test_ade20k_counts_an_absent_class_as_zero():
    counts = np.array([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    scores = benchmark_scores("ade20k", counts, ["wall", "door", "lake"])
    # Intersections and unions as in the toolkit's definition: sums over classes, 0 / (0 + tiny) for an absent one.
    intersection, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    mean_iou = (intersection / (union + np.spacing(1))).mean()
    accuracy = 7 / 10
    assert scores["mean_iou"] == pytest.approx(mean_iou)
    assert scores["mean_iou"] == pytest.approx((6 / 9 + 1 / 4) / 3)
    assert scores["score"] == pytest.approx((mean_iou + accuracy) / 2)
    assert scores["num_classes_averaged"] == 3
    assert benchmark_scores("standard", counts, ["a", "b", "c"])["mean_iou"] == pytest.approx((6 / 9 + 1 / 4) / 2)


def test_bdd100k_averages_over_classes_with_target_pixels():
    counts = np.array([[6, 2, 2], [0, 0, 0], [0, 0, 0]])
    assert benchmark_scores("standard", counts, ["a", "b", "c"])["score"] == pytest.approx(0.2)
    scores = benchmark_scores("bdd100k", counts, ["a", "b", "c"])
    assert scores["score"] == pytest.approx(0.6)
    assert scores["num_classes_averaged"] == 1
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_unknown_protocols_classes_and_double_membership_are_named():
    counts = np.eye(2, dtype=np.int64)
    with pytest.raises(InputError, match="there is no protocol 'coco'; allowed are standard, cityscapes, ade20k"):
        benchmark_scores("coco", counts, ["a", "b"])
    with pytest.raises(InputError, match="group 'flat' names the class 'road', which is none of a, b: give --pro"):
        benchmark_scores("cityscapes", counts, ["a", "b"])
    members = [name for group in CITYSCAPES_CATEGORIES.values() for name in group]
    assert len(set(members)) == len(members)
