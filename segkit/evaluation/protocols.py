"""Named ways to turn one confusion matrix into the figure that a benchmark reports. Numpy only.

`standard`: mean IoU over the classes with a union. `cityscapes`: the same, and over the seven categories.
`ade20k`: every class counts, one without a union as 0; the score is (pixel accuracy + mean IoU) / 2.
`bdd100k`: mean over the classes with target pixels. All others are `standard`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segkit.errors import InputError
from segkit.evaluation import metrics
from segkit.evaluation.metrics import number

CITYSCAPES_CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}
"""Categories of the 19 evaluated Cityscapes classes."""


def benchmark_scores(protocol: str, counts: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a named protocol: ``score`` (which ranks), its parts, and the policy on absent classes."""
    if protocol not in PROTOCOLS:
        raise InputError(f"there is no protocol {protocol!r}; allowed are {', '.join(PROTOCOLS)}")
    return {"protocol": protocol, **PROTOCOLS[protocol](counts, class_names)}


def _standard(counts: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    absent = metrics.absent_classes(counts)
    return {
        "score": number(metrics.mean_iou(counts)),
        "mean_iou": number(metrics.mean_iou(counts)),
        "num_classes_averaged": len(class_names) - len(absent),
        "absent_class": "excluded",
    }


def _cityscapes(counts: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    group_of: dict[str, int] = {}
    for g, (group, members) in enumerate(CITYSCAPES_CATEGORIES.items()):
        for name in members:
            if name not in class_names:
                raise InputError(
                    f"group {group!r} names the class {name!r}, which is none of {', '.join(class_names)}: "
                    "give --protocol standard, or the benchmark that has these classes"
                )
            group_of[name] = g
    merged = metrics.merge_classes(counts, [group_of.get(name, -1) for name in class_names])
    return {
        **_standard(counts, class_names),
        "category_mean_iou": number(metrics.mean_iou(merged)),
        "categories": dict(zip(CITYSCAPES_CATEGORIES, map(number, metrics.iou(merged)), strict=True)),
    }


def _ade20k(counts: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    mean_iou = float(np.nan_to_num(metrics.iou(counts)).mean())
    pixel_accuracy = metrics.pixel_accuracy(counts)
    return {
        "score": number((pixel_accuracy + mean_iou) / 2),
        "mean_iou": number(mean_iou),
        "pixel_accuracy": number(pixel_accuracy),
        "num_classes_averaged": len(class_names),
        "absent_class": "counts 0",
    }


def _bdd100k(counts: ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    _, target, _ = metrics.totals(counts)
    mean_iou = metrics.mean_of_present(metrics.iou(counts)[target > 0])
    return {
        "score": number(mean_iou),
        "mean_iou": number(mean_iou),
        "num_classes_averaged": int((target > 0).sum()),
        "absent_class": "excluded where it has no target pixel",
    }


PROTOCOLS: dict[str, Callable[[ArrayLike, Sequence[str]], dict[str, Any]]] = {
    "standard": _standard,
    "cityscapes": _cityscapes,
    "ade20k": _ade20k,
    "bdd100k": _bdd100k,
}
