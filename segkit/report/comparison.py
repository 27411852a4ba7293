"""Read runs, check that they may be compared, pool folds, and group those that differ in their seed alone.

Scores may stand in one table if they are of the same data and classes, measured in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from segkit.errors import InputError
from segkit.report.folds import pool_folds
from segkit.report.groups import Group, differing_protocols, group_runs
from segkit.report.runs import RunRecord, find_runs
from segkit.report.tables import ScoreTable, score_table
from segkit.report.uncertainty import LEVEL


@dataclass(frozen=True)
class Comparison:
    """What a report is made of. ``mixed`` lists in what the runs were not evaluated alike (normally nothing)."""

    groups: tuple[Group, ...]
    baseline: Group
    notes: tuple[str, ...]
    mixed: tuple[str, ...]
    num_samples: int = 2000
    """Bootstrap resamples, and swaps of a test."""

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def folders(self) -> list[RunRecord]:
        """The records of all run folders: of each fold where folds are pooled."""
        return [one for run in self.runs for one in run.folders]

    @cached_property
    def table(self) -> ScoreTable:
        """The table of scores."""
        return score_table(self.groups, num_samples=self.num_samples)

    @property
    def advice(self) -> str | None:
        """Which way margins must point for the rare half of the classes, by precision and recall of the baseline.

        A margin rho_0k > 0 makes class k be predicted less. None where the rare classes do not agree.
        """
        rows = [run.results["classes"] for run in self.baseline.runs]
        labelled = [name for name, row in rows[0].items() if row.get("target_pixels")]
        rare = sorted(labelled, key=lambda name: rows[0][name]["target_pixels"])[: len(labelled) // 2]
        lean = dict.fromkeys(rare, 0.0)
        for row, name in ((row, name) for row in rows for name in rare):
            recall, precision = row[name].get("recall"), row[name].get("precision")
            if recall is not None:  # a class that is never predicted is missed, at whatever precision
                lean[name] += recall - (1.0 if precision is None else precision)
        missed, overdone = ([name for name in rare if sign * lean[name] > 0] for sign in (-1, 1))
        more = max(missed, overdone, key=len)
        of = f"{len(more)} of the {len(rare)} rarest classes" if len(rare) > 1 else "the rarest class"
        what = f"precision for {of} ({', '.join(more)})"
        start = f"advice: the baseline, {self.baseline.name}, has recall"
        if len(missed) > len(overdone):
            return f"{start} below {what}: larger margins rho_0k are the wrong direction; try --decision miou"
        if len(overdone) > len(missed):
            return f"{start} above {what}: predicted too often, and larger margins rho_0k may pay"
        return None

    def mean_iou(self, group: Group) -> float:
        """Return the mean IoU of a group, averaged over its runs; -1 if it has none, so that it sorts last."""
        return statistics.fmean(group.scores("mean_iou") or [-1.0])

    @property
    def ranked_runs(self) -> list[RunRecord]:
        """The runs by which images are ranked: the first of the baseline, and that of the contender."""
        return [group.runs[0] for group in (self.baseline, self.contender) if group is not None]

    @property
    def best(self) -> Group:
        """The group with the largest mean IoU."""
        return max(self.groups, key=self.mean_iou)

    @property
    def contender(self) -> Group | None:
        """The group with the largest mean IoU apart from the baseline; None if there is no other group."""
        return max((group for group in self.groups if group is not self.baseline), key=self.mean_iou, default=None)


def compare(
    paths: Sequence[Path | str],
    *,
    baseline: Path | str | None = None,
    evaluation: str | None = None,
    allow_mixed_protocols: bool = False,
    num_samples: int = 2000,
) -> Comparison:
    """Read the runs in ``paths``, pool their folds and group them.

    The baseline is the first one's group, or that of ``baseline``. ``evaluation`` is as in
    :func:`segkit.report.runs.find_runs`.

    Raises InputError for a run that cannot be read, and for runs that were not
    evaluated alike, unless ``allow_mixed_protocols``.
    """
    named = [baseline, *paths] if baseline is not None else list(paths)
    runs, notes = find_runs(named, evaluation=evaluation)
    runs, missing = pool_folds(runs)
    notes += missing
    mixed = differing_protocols(runs)
    if mixed and not allow_mixed_protocols:
        raise InputError(
            f"these runs were not evaluated alike: {'; '.join([*mixed, *missing])}. Compare runs of one protocol, "
            "evaluate them alike with `segkit evaluate`, or give --allow-mixed-protocols to show them side by side "
            "all the same"
        )
    groups = tuple(group_runs(runs))
    if num_samples + 1 < (needed := round((len(groups) - 1) / LEVEL)):
        notes.append(
            f"no row of {len(groups)} can be bold by {num_samples} samples, of which no p-value is below "
            f"1/{num_samples + 1}: give --samples {needed}"
        )
    return Comparison(groups, groups[0], tuple(dict.fromkeys(notes)), tuple(mixed), num_samples)
