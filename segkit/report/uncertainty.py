"""How certain the scores of a comparison are: intervals over images, and paired tests against the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from segkit.evaluation.bootstrap import MeanIoUInterval, PairedComparison, bootstrap_mean_iou, compare_totals, stacked
from segkit.report.groups import Group, comparable
from segkit.report.runs import RunRecord


@dataclass(frozen=True)
class PairedTest:
    """A group against the baseline; ``holm`` is the p-value corrected for the number of groups tested."""

    group: Group
    result: PairedComparison
    num_pairs: int
    holm: float


LEVEL = 0.05
"""Of the tests that mark the best row of a column."""


def best_rows(groups: Sequence[Group], keys: Sequence[str], *, num_samples: int) -> list[int | None]:
    """Return, for each score of ``keys``, the number of the group that is better than every other one.

    It is if the paired randomisation tests against each have p-values of at most :data:`LEVEL` divided by the number
    of others (Bonferroni); None if not, and where groups cannot be paired.
    """
    compared = cache(lambda one, other: compare_groups(groups[one], groups[other], num_samples=num_samples))

    def is_better(one: int, other: int, key: str, level: float) -> bool:
        result, num_pairs = compared(other, one)
        at = ["mean_iou", "pixel_accuracy", *(f"iou/{name}" for name in groups[one].classes)].index(key)
        return num_pairs > 0 and bool(result.differences[at] > 0 and result.p_values[at] <= level)

    found: list[int | None] = []
    for key in keys:
        means = {at: statistics.fmean(values) for at, group in enumerate(groups) if (values := group.scores(key))}
        first, *others = sorted(means, key=lambda at: -means[at]) or [-1]
        is_best = others and all(is_better(first, at, key, LEVEL / len(others)) for at in others)
        found.append(first if is_best else None)
    return found


def compare_groups(one: Group, other: Group, *, num_samples: int) -> tuple[Any, int]:
    """Return the comparison (PairedComparison) of ``other`` with ``one``, and of how many pairs of runs; None and 0
    if they cannot be paired."""
    pairs = _pairs(one, other)
    if not pairs or pairs[0][0].results["num_images"] < 2:
        return None, 0
    both = stacked([run.per_image for runs in zip(*pairs, strict=True) for run in runs if run.per_image is not None])
    return compare_totals(both[: len(pairs)], both[len(pairs) :], num_samples=num_samples), len(pairs)


def intervals(groups: Sequence[Group], *, num_samples: int) -> list[tuple[int, MeanIoUInterval]]:
    """Return (number of the group, interval of its mean IoU) for groups with counts of at least two images."""
    found = []
    for index, group in enumerate(groups):
        runs = group.counted
        known = [run.per_image for run in runs if run is runs[0] or comparable(runs[0], run)]
        if runs and runs[0].results["num_images"] > 1:
            found.append((index, bootstrap_mean_iou(*filter(None, known), num_samples=num_samples)))
    return found


def paired_tests(groups: Sequence[Group], baseline: Group, *, num_samples: int) -> list[PairedTest]:
    """Test every other group against ``baseline`` on the same images; groups that cannot be paired are left out."""
    others = [group for group in groups if group is not baseline]
    tested = [(group, *compare_groups(baseline, group, num_samples=num_samples)) for group in others]
    found = [one for one in tested if one[2]]
    corrected = holm([result.p_value for _, result, _ in found])
    return [PairedTest(*one, p_value) for one, p_value in zip(found, corrected, strict=True)]


def _pairs(baseline: Group, group: Group) -> list[tuple[RunRecord, RunRecord]]:
    """Return pairs of runs with the same seed (else in their order) that share images, classes and protocol."""
    ours, theirs = baseline.counted, group.counted
    by_seed = {run.seed: run for run in ours}
    pairs = [(by_seed[run.seed], run) for run in theirs if run.seed in by_seed]
    if not pairs:
        pairs = list(zip(ours, theirs, strict=False))
    return [
        (one, other) for one, other in pairs if comparable(one, other) and (one is ours[0] or comparable(ours[0], one))
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's correction, which may be read together, in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
