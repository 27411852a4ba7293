"""Intervals and paired tests against loops over resamples, and their statistical behaviour."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from segkit.errors import InputError
from segkit.evaluation import bootstrap, metrics
from segkit.evaluation.bootstrap import bootstrap_mean_iou, compare_totals
from segkit.evaluation.per_image import PerImageCounts, sparse


def make_run(num_images=30, num_classes=4, *, accuracy=0.7, seed=0, label_seed=0, names=None):
    """Images with their own mix of classes and their own difficulty."""
    labels = np.random.default_rng(label_seed)
    rng = np.random.default_rng([seed, 7])
    matrices = []
    for _ in range(num_images):
        pixels = labels.multinomial(500, labels.dirichlet(np.full(num_classes, 0.7)))
        right = np.clip(accuracy + rng.normal(0, 0.1), 0.05, 0.95)
        share = np.full((num_classes, num_classes), (1 - right) / (num_classes - 1))
        np.fill_diagonal(share, right)
        matrices.append(np.stack([rng.multinomial(pixels[k], share[k]) for k in range(num_classes)]))
    names = [f"image{i}" for i in range(num_images)] if names is None else names
    return PerImageCounts.from_sparse([sparse(matrix) for matrix in matrices], names, num_classes=num_classes)


def compare_runs(first, second, **options):
    both = bootstrap.stacked([first, second])
    return compare_totals(both[:1], both[1:], **options)


def interval_by_loop(run, *, chunks, seed):
    """The interval from dense matrices; the correction itself is tested against scipy."""
    rng, number = np.random.default_rng(seed), run.num_images
    draws = np.concatenate([rng.multinomial(number, np.full(number, 1 / number), size=rows) for rows in chunks])
    means = [metrics.mean_iou(sum(n * run.matrix(i) for i, n in enumerate(drawn))) for drawn in draws]
    left_out = [metrics.mean_iou(run.total() - run.matrix(i)) for i in range(number)]
    return bootstrap._bca(metrics.mean_iou(run.total()), np.array(means), np.array(left_out), 0.95)


def test_resampled_scores_equal_a_loop_over_dense_matrices(monkeypatch):
    run = make_run(12)
    monkeypatch.setattr(bootstrap, "_CHUNK", 12 * 40)  # several chunks
    result = bootstrap_mean_iou(run, num_samples=150, seed=3)
    assert result.mean_iou == pytest.approx(metrics.mean_iou(run.total()))
    assert (result.low, result.high) == pytest.approx(interval_by_loop(run, chunks=(40, 40, 40, 30), seed=3))
    assert result.low < result.mean_iou < result.high


def test_corrected_interval_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    data = rng.exponential(size=40)
    samples = data[rng.integers(0, 40, (4000, 40))].mean(1)
    left_out = (data.sum() - data) / 39
    low, high = bootstrap._bca(data.mean(), samples, left_out, 0.95)
    expected = stats.bootstrap((data,), np.mean, n_resamples=20000, method="BCa", rng=1).confidence_interval
    assert low == pytest.approx(expected.low, rel=0.03)
    assert high == pytest.approx(expected.high, rel=0.03)


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_the_interval_covers_the_score_of_many_images_about_as_often_as_it_says(confidence):
    truth = metrics.mean_iou(make_run(4000).total())
    hits = 0
    for seed in range(100):
        run = make_run(40, seed=seed, label_seed=seed)
        result = bootstrap_mean_iou(run, num_samples=200, confidence=confidence, seed=seed)
        hits += result.low <= truth <= result.high
    assert abs(hits / 100 - confidence) < 0.13


def test_p_value_equals_all_swaps():
    a, b = make_run(8, accuracy=0.7, seed=1), make_run(8, accuracy=0.74, seed=2)
    result = compare_runs(a, b, num_samples=20000)
    matrices = [(a.matrix(i), b.matrix(i)) for i in range(8)]
    differences = []
    for swap in itertools.product((0, 1), repeat=8):
        first = sum(pair[s] for pair, s in zip(matrices, swap, strict=True))
        second = sum(pair[1 - s] for pair, s in zip(matrices, swap, strict=True))
        differences.append(metrics.mean_iou(second) - metrics.mean_iou(first))
    assert result.difference == pytest.approx(differences[0])
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    assert 0.02 < exact < 0.98
    assert result.p_value == pytest.approx(exact, abs=0.015)


def test_a_better_run_is_found_and_equal_runs_are_not():
    base, better = make_run(seed=1), make_run(seed=2, accuracy=0.8)
    result = compare_runs(base, better)
    assert result.p_value < 0.01
    assert 0 < result.low < result.difference < result.high
    same = compare_runs(base, base)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    p_values = [
        compare_runs(make_run(seed=2 * s), make_run(seed=2 * s + 1), num_samples=300).p_value for s in range(60)
    ]
    assert 0.3 < np.mean(p_values) < 0.7
    assert np.mean(np.array(p_values) < 0.1) < 0.25


def test_the_order_of_the_images_does_not_matter():
    first, second = make_run(10, seed=1), make_run(10, seed=2)
    order = np.random.default_rng(0).permutation(10)
    shuffled = PerImageCounts.from_sparse(
        [sparse(second.matrix(i)) for i in order], [second.names[i] for i in order], num_classes=4
    )
    assert compare_runs(first, shuffled).p_value == compare_runs(first, second).p_value


def test_a_class_that_occurs_nowhere_is_not_averaged_and_a_rare_one_where_it_is_drawn():
    run = make_run(20)
    matrices = [np.pad(run.matrix(i), ((0, 2), (0, 2))) for i in range(20)]
    matrices[3][4, 4] = 50  # class 4 in one image only, class 5 in none
    counts = PerImageCounts.from_sparse([sparse(matrix) for matrix in matrices], run.names, num_classes=6)
    result = bootstrap_mean_iou(counts, num_samples=200)
    assert (result.low, result.high) == pytest.approx(interval_by_loop(counts, chunks=(200,), seed=0))


def test_runs_that_cannot_be_compared():
    run = make_run(5)
    with pytest.raises(InputError, match="the runs have 4 and 5 classes"):
        compare_runs(run, make_run(5, num_classes=5))
    with pytest.raises(InputError, match=r"different images \(2 are in one of them only: image4, other\)"):
        compare_runs(run, make_run(5, names=["image0", "image1", "image2", "image3", "other"]))
    with pytest.raises(InputError, match="scored against different labels"):
        compare_runs(run, make_run(5, label_seed=9))
    with pytest.raises(InputError, match="there is 1 image; an interval over images needs at least 2"):
        bootstrap_mean_iou(make_run(1))
    with pytest.raises(InputError, match="num_samples is 10; an interval needs at least 100"):
        bootstrap_mean_iou(run, num_samples=10)
    with pytest.raises(InputError, match=r"confidence is 95; it must lie between 0 and 1, such as 0\.95"):
        bootstrap_mean_iou(run, confidence=95)


def test_two_thousand_resamples_of_ade20k_size_take_seconds():
    rng = np.random.default_rng(0)
    num_images, num_classes, entries = 2000, 150, 40
    image = np.repeat(np.arange(num_images), entries)
    target = rng.integers(0, num_classes, image.size)
    prediction = np.where(rng.random(image.size) < 0.6, target, rng.integers(0, num_classes, image.size))
    names = tuple(map(str, range(num_images)))
    run = PerImageCounts(image, target, prediction, np.full(image.size, 100), names, num_classes)
    start = time.perf_counter()
    bootstrap_mean_iou(run, num_samples=2000)
    assert time.perf_counter() - start < 20


def test_intervals_need_no_torch():
    code = (
        "import sys, segkit.evaluation.bootstrap, segkit.evaluation.protocols, segkit.evaluation.per_image; "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_seeds_and_images_are_drawn_and_swapped_together():
    """Against every swap and every resample of three images and two seeds, enumerated with fractions of the IoU."""
    rng = np.random.default_rng(5)
    target = rng.integers(20, 40, (3, 2))
    tp = [np.minimum(target, rng.integers(10, 40, (2, 3, 2))) for _ in range(2)]
    predicted = [part + rng.integers(0, 15, part.shape) for part in tp]
    a, b = (np.concatenate([t, target + p], axis=2).astype(float) for t, p in zip(tp, predicted, strict=True))

    def mean_iou(totals):
        return float(np.mean([np.mean(both[:2] / (both[2:] - both[:2])) for both in totals]))

    def difference(one, other):
        return mean_iou(other) - mean_iou(one)

    found = compare_totals(a, b, num_samples=20_000)
    observed = difference(a.sum(1), b.sum(1))
    assert found.difference == pytest.approx(observed, rel=1e-12)
    swapped = []
    for swap in itertools.product([0, 1], repeat=3):
        mask = np.array(swap)[None, :, None]
        swapped.append(abs(difference((a + mask * (b - a)).sum(1), (b + mask * (a - b)).sum(1))))
    assert found.p_value == pytest.approx(np.mean(np.array(swapped) >= abs(observed) - 1e-12), abs=0.02)
    drawn = [
        difference(a[list(seeds)][:, list(images)].sum(1), b[list(seeds)][:, list(images)].sum(1))
        for seeds in itertools.product(range(2), repeat=2)
        for images in itertools.product(range(3), repeat=3)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    span = high - low
    assert found.low == pytest.approx(low, abs=0.05 * span)
    assert found.high == pytest.approx(high, abs=0.05 * span)


def test_every_score_is_tested_by_swapping_images():
    """Against all 2^6 swaps of six images, with scores from dense matrices; a class without pixels has no p-value."""
    runs = [make_run(6, 4, accuracy=accuracy, seed=seed) for accuracy, seed in ((0.6, 1), (0.75, 2))]
    matrices = np.array([[run.matrix(image) for image in range(6)] for run in runs])
    matrices[..., 0] += matrices[..., 3]
    matrices[..., 3, :] = matrices[..., 3] = 0  # class 3 is absent
    runs = [PerImageCounts.from_sparse([sparse(m) for m in part], runs[0].names, num_classes=4) for part in matrices]

    def scores(matrix):
        iou = [matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]) for k in range(3)]
        return np.array([np.mean(iou), np.trace(matrix) / matrix.sum(), *iou])

    observed = scores(matrices[1].sum(0)) - scores(matrices[0].sum(0))
    swapped = []
    for swap in itertools.product([0, 1], repeat=6):
        sides = [sum(matrices[side ^ s][image] for image, s in enumerate(swap)) for side in (0, 1)]
        swapped.append(np.abs(scores(sides[1]) - scores(sides[0])))
    found = compare_runs(*runs, num_samples=20_000)
    np.testing.assert_allclose(found.differences[:5], observed, rtol=1e-12)
    np.testing.assert_allclose(
        found.p_values[:5], np.mean(np.array(swapped) >= np.abs(observed) - 1e-12, axis=0), atol=0.02
    )
    assert np.isnan([found.differences[5], found.p_values[5]]).all()
    assert (found.difference, found.p_value) == (found.differences[0], found.p_values[0])
