"""Scores as pure functions of a confusion matrix. Numpy only.

``counts`` is an integer array (K, C) with C >= K: ``counts[t, p]`` pixels have target class ``t`` and prediction ``p``.
Columns K.. (usually none) hold predictions that are none of the classes, such as a predicted void: they are misses of
their row and false alarms of no class. Sums are taken in int64, quotients in float64.

With TP_k = counts[k, k], T_k = sum of row k (target pixels) and P_k = sum of column k (predicted pixels):

    IoU_k = TP_k / (T_k + P_k - TP_k)    precision_k = TP_k / P_k    recall_k = TP_k / T_k
    Dice_k = 2 TP_k / (T_k + P_k)

A class whose denominator is 0 has the score nan and stays out of the mean; `absent_classes` lists those of the IoU. A
mean over no class is nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segkit.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def totals(counts: ArrayLike) -> tuple[Ints, Ints, Ints]:
    """Return ``(TP, T, P)``, each int64 (K,): true positives, target pixels, predicted pixels."""
    matrix = np.asarray(counts)
    assert matrix.ndim == 2, matrix.shape
    assert matrix.shape[1] >= matrix.shape[0], matrix.shape
    assert matrix.dtype.kind in "iu", matrix.dtype
    matrix = matrix.astype(np.int64, copy=False)
    num_classes = matrix.shape[0]
    return np.diagonal(matrix).copy(), matrix.sum(1), matrix[:, :num_classes].sum(0)


def divide(part: ArrayLike, whole: ArrayLike) -> Floats:
    """Return ``part / whole`` in float64, nan where ``whole`` is 0."""
    part = np.asarray(part, np.float64)
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def mean_of_present(scores: ArrayLike) -> float:
    """Return the mean of the scores that are not nan; nan if there is none."""
    scores = np.asarray(scores, np.float64)
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if present.size else float("nan")


def iou(counts: ArrayLike) -> Floats:
    """Intersection over union per class (K,); nan where the union is 0."""
    tp, target, predicted = totals(counts)
    return divide(tp, target + predicted - tp)


def mean_iou(counts: ArrayLike) -> float:
    """Mean IoU over the classes with a union; see `absent_classes` for the others."""
    return mean_of_present(iou(counts))


def absent_classes(counts: ArrayLike) -> list[int]:
    """Classes with union 0: neither in the targets nor predicted on a counted pixel."""
    return np.flatnonzero(np.isnan(iou(counts))).tolist()


def pixel_accuracy(counts: ArrayLike) -> float:
    """Share of the counted pixels that are right; nan if no pixel was counted."""
    tp, target, _ = totals(counts)
    return float(divide(tp.sum(), target.sum()))


def precision(counts: ArrayLike) -> Floats:
    """TP / predicted pixels per class (K,); nan where a class was never predicted."""
    tp, _, predicted = totals(counts)
    return divide(tp, predicted)


def recall(counts: ArrayLike) -> Floats:
    """TP / target pixels per class (K,), also called class accuracy; nan where there is no target pixel."""
    tp, target, _ = totals(counts)
    return divide(tp, target)


class_accuracy = recall


def mean_class_accuracy(counts: ArrayLike) -> float:
    """Mean recall over the classes with target pixels."""
    return mean_of_present(recall(counts))


def dice(counts: ArrayLike) -> Floats:
    """Dice (F1) per class (K,); nan where a class is neither in the targets nor predicted."""
    tp, target, predicted = totals(counts)
    return divide(2 * tp, target + predicted)


def frequency_weighted_iou(counts: ArrayLike) -> float:
    """Sum over classes of (share of target pixels) x IoU; nan if no pixel was counted."""
    tp, target, predicted = totals(counts)
    present = target > 0
    union = (target + predicted - tp)[present]
    return float(divide((target[present] * (tp[present] / union)).sum(), target.sum()))


def merge_classes(counts: ArrayLike, groups: Sequence[int]) -> Ints:
    """Return the counts of groups of classes, (G, G + 1): a coarser view of the same pixels.

    ``groups[k]`` is the group of class k, or -1 for a class that is not evaluated: pixels with such a target are
    dropped; a prediction of it on another target is a miss (the last column, as for the extra columns of ``counts``).
    """
    matrix = np.asarray(counts, np.int64)
    num_classes = matrix.shape[0]
    if len(groups) != num_classes:
        raise InputError(f"{len(groups)} groups were given for {num_classes} classes; give one per class")
    group = np.asarray(groups, np.int64)
    size = int(group.max(initial=-1)) + 1
    assert group.min(initial=0) >= -1, groups
    column = np.full(matrix.shape[1], size)
    column[:num_classes] = np.where(group < 0, size, group)
    merged = np.zeros((size, size + 1), np.int64)
    kept = group >= 0
    np.add.at(merged, (group[kept][:, None], column[None, :]), matrix[kept])
    return merged


def summary(counts: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    """Return all scores of one matrix as JSON values, by class name; nan becomes None."""
    tp, target, predicted = totals(counts)
    if len(class_names) != len(tp):
        raise InputError(f"{len(class_names)} class names were given for {len(tp)} classes")
    per_class = {score.__name__: score(counts) for score in (iou, precision, recall, dice)}
    classes: dict[str, dict[str, float | int | None]] = {}
    for k, name in enumerate(class_names):
        row: dict[str, float | int | None] = {key: number(values[k]) for key, values in per_class.items()}
        classes[name] = {**row, "target_pixels": int(target[k]), "predicted_pixels": int(predicted[k])}
    absent = absent_classes(counts)
    return {
        "mean_iou": number(mean_iou(counts)),
        "pixel_accuracy": number(pixel_accuracy(counts)),
        "mean_class_accuracy": number(mean_class_accuracy(counts)),
        "mean_dice": number(mean_of_present(per_class["dice"])),
        "frequency_weighted_iou": number(frequency_weighted_iou(counts)),
        "num_classes_averaged": len(tp) - len(absent),
        "absent_classes": [class_names[k] for k in absent],
        "classes": classes,
    }


def number(value: float) -> float | None:
    """Return a value that JSON can hold: nan becomes None."""
    return None if np.isnan(value) else float(value)
