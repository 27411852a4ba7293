"""How sure a mean IoU is: bootstrap intervals over images, and a paired test between two runs. Numpy only.

The mean IoU of a data set is a function of sums over images, so a resample of the images is a weighted sum of their
sparse counts, and all resamples together are one matrix product. Images are taken as independent draws. Frames of one
video are not independent, so their intervals come out too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from segkit.errors import InputError
from segkit.evaluation.metrics import Floats, divide
from segkit.evaluation.per_image import PerImageCounts

_CHUNK = 1 << 22
"""Weights that are drawn at a time, at most."""


@dataclass(frozen=True)
class MeanIoUInterval:
    """Mean IoU of a run, or mean of it over several, with a confidence interval."""

    mean_iou: float
    low: float
    high: float
    num_images: int


@dataclass(frozen=True)
class PairedComparison:
    """Mean IoU of the second run minus that of the first, on the same images.

    ``low``, ``high``: bootstrap interval of the difference. ``p_value``: two-sided, of the randomisation test.
    ``differences`` and ``p_values`` (2 + K,): of mean IoU, pixel accuracy and the IoU of every class; nan for a class
    without a union.
    """

    difference: float
    low: float
    high: float
    p_value: float
    differences: Floats
    p_values: Floats


def bootstrap_mean_iou(
    *runs: PerImageCounts, num_samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> MeanIoUInterval:
    """Return the interval of the mean IoU when images are drawn with replacement ``num_samples`` times.

    For several runs it is that of the mean over the runs, with the same images drawn for all.

    The interval is the bias-corrected and accelerated one (BCa, Efron 1987), with the acceleration from leaving out
    each image in turn. A class without a union in a resample stays out of its mean, as it does in the score itself.
    """
    _check(num_samples, confidence)
    totals = stacked(runs)
    mean_iou = float(_mean(_iou(totals.sum(1))).mean())
    weights = _resamples(runs[0].num_images, num_samples, seed)
    resampled = np.concatenate([_mean(_iou(np.tensordot(drawn, totals, (1, 1)))).mean(1) for drawn in weights])
    left_out = _mean(_iou(totals.sum(1, keepdims=True) - totals)).mean(0)
    low, high = _bca(mean_iou, resampled, left_out, confidence)
    return MeanIoUInterval(mean_iou, low, high, runs[0].num_images)


def compare_totals(
    a: Floats, b: Floats, *, num_samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> PairedComparison:
    """Return whether the runs ``b`` are better than ``a``, beyond what the choice of images explains.

    Both are of :func:`stacked`, (seeds, images, 2 K), and the figures means over the seeds. The bootstrap is
    hierarchical: it draws seeds, then images, the same ones for all seeds and both sides. The p-value is that of the
    paired randomisation test: under the null hypothesis the two predictions of an image are exchangeable, so they are
    swapped at random for each image, for all seeds at once, ``num_samples`` times; p is the share of the swaps (with
    the observed order as one of them) whose difference is at least the observed one in absolute value. An image may be
    a block of dependent ones, such as frames of a video, added up.
    """
    _check(num_samples, confidence)
    num_seeds, num_images = a.shape[:2]
    means, rng = [], np.random.default_rng([seed, 2])
    for weights in _resamples(num_images, num_samples, seed):
        drawn = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(weights)) / num_seeds
        iou_a, iou_b = (_iou(np.tensordot(weights, totals, (1, 1))) for totals in (a, b))
        means.append((drawn * (_mean(iou_b) - _mean(iou_a))).sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])

    both = a.sum(1) + b.sum(1)
    differences = (_scores(b.sum(1)) - _scores(a.sum(1))).mean(0)
    num_extreme = np.zeros(len(differences))
    for swap in _swaps(num_images, num_samples, seed):
        swapped_a = a.sum(1) + np.tensordot(swap, b - a, (1, 1))
        swapped = (_scores(both - swapped_a) - _scores(swapped_a)).mean(1)
        num_extreme += np.count_nonzero(np.abs(swapped) >= np.abs(differences) - 1e-12, axis=0)
    p_values = np.where(np.isnan(differences), np.nan, (num_extreme + 1) / (num_samples + 1))
    return PairedComparison(float(differences[0]), float(low), float(high), float(p_values[0]), differences, p_values)


def _check(num_samples: int, confidence: float) -> None:
    if num_samples < 100:
        raise InputError(f"num_samples is {num_samples}; an interval needs at least 100 resamples")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95")


def stacked(runs: Sequence[PerImageCounts]) -> Floats:
    """Return (runs, images, 2 K): TP, then T + P, of every class, images in the order of the first run.

    Raises `InputError` unless all runs have the same images, classes and labels.
    """
    return np.stack([_totals(run if run is runs[0] else _aligned(runs[0], run)) for run in runs])


def _totals(counts: PerImageCounts) -> Floats:
    """Return (num_images, 2 K): TP, then T + P, of every class. Float64 holds these counts exactly."""
    if counts.num_images < 2:
        raise InputError(f"there is {counts.num_images} image; an interval over images needs at least 2")
    tp, target, predicted = counts.class_totals()
    return np.stack([tp, target + predicted], axis=1).astype(np.float64).reshape(counts.num_images, -1)


def _iou(totals: Floats) -> Floats:
    """Return the IoU (..., K) of totals (..., 2 K); nan where the union is 0."""
    tp, both = np.split(totals, 2, axis=-1)
    return divide(tp, both - tp)


def _scores(totals: Floats) -> Floats:
    """Return (..., 2 + K): mean IoU, pixel accuracy, and the IoU of every class. T and P add up to all pixels each."""
    iou = _iou(totals)
    tp, both = np.split(totals, 2, axis=-1)
    accuracy = divide(2 * tp.sum(-1, keepdims=True), both.sum(-1, keepdims=True))
    return np.concatenate([_mean(iou)[..., None], accuracy, iou], axis=-1)


def _mean(iou: Floats) -> Floats:
    """Return the mean over the classes with a union, along the last axis; 0 if there is none."""
    present = ~np.isnan(iou)
    return np.where(present, iou, 0).sum(-1) / np.maximum(present.sum(-1), 1)


def _chunks(num_images: int, num_samples: int) -> list[int]:
    """Return numbers of samples to draw at a time, which add up to ``num_samples``."""
    rows = max(1, _CHUNK // num_images)
    return [min(rows, num_samples - start) for start in range(0, num_samples, rows)]


def _resamples(num_images: int, num_samples: int, seed: int) -> Iterator[Floats]:
    """Yield (rows, num_images): how often each image was drawn in each resample."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(num_images, num_samples):
        yield rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=rows).astype(np.float64)


def _swaps(num_images: int, num_samples: int, seed: int) -> Iterator[Floats]:
    """Yield (rows, num_images) of zeros and ones."""
    rng = np.random.default_rng([seed, 1])
    for rows in _chunks(num_images, num_samples):
        yield rng.integers(0, 2, (rows, num_images)).astype(np.float64)


def _bca(estimate: float, samples: Floats, left_out: Floats, confidence: float) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval."""
    normal = NormalDist()
    below = (np.count_nonzero(samples < estimate) + np.count_nonzero(samples == estimate) / 2) / len(samples)
    bias = normal.inv_cdf(min(max(below, 0.5 / len(samples)), 1 - 0.5 / len(samples)))
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(samples, ends)
    return float(low), float(high)


def _aligned(first: PerImageCounts, second: PerImageCounts) -> PerImageCounts:
    """Return ``second`` with its images in the order of ``first``; InputError unless both scored the same labels."""
    if first.num_classes != second.num_classes:
        raise InputError(
            f"the runs have {first.num_classes} and {second.num_classes} classes; compare runs on one data set"
        )
    only = set(first.names) ^ set(second.names)
    if only or len(set(first.names)) != len(first.names) or len(second.names) != len(first.names):
        examples = ", ".join(sorted(only)[:3]) or "a name occurs twice"
        raise InputError(
            f"the runs were evaluated on different images ({len(only)} are in one of them only: {examples}); "
            "evaluate both on the same split"
        )
    aligned = PerImageCounts.joined([second], first.names)
    if not np.array_equal(first.class_totals()[1], aligned.class_totals()[1]):
        raise InputError(
            "the runs were scored against different labels; evaluate both with the same resize and label table"
        )
    return aligned
