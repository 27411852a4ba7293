"""Evaluation: counts first, then pure functions of counts.

The names below are imported on first use, so that ``segkit.evaluation.metrics``, ``.per_image`` and
``.bootstrap`` (numpy only) can be used without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segkit.evaluation.boundary import BoundaryCounts as BoundaryCounts
    from segkit.evaluation.confusion import ConfusionMatrix as ConfusionMatrix
    from segkit.evaluation.confusion import count_pixels as count_pixels
    from segkit.evaluation.inference import Inference as Inference
    from segkit.evaluation.inference import whole_image as whole_image
    from segkit.evaluation.loop import Evaluation as Evaluation
    from segkit.evaluation.loop import evaluate as evaluate
    from segkit.evaluation.loop import to_results as to_results
    from segkit.evaluation.per_image import PerImageCounts as PerImageCounts
    from segkit.evaluation.protocols import benchmark_scores as benchmark_scores

_NAMES = {
    "boundary": ("BoundaryCounts",),
    "confusion": ("ConfusionMatrix", "count_pixels"),
    "inference": ("Inference", "whole_image"),
    "loop": ("Evaluation", "evaluate", "to_results"),
    "per_image": ("PerImageCounts",),
    "protocols": ("benchmark_scores",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"segkit.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module 'segkit.evaluation' has no attribute {name!r}")
