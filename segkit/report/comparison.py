"""Runs made ready for comparison: read, checked against each other, grouped over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from segkit.report.groups import Group, group_runs
from segkit.report.protocols import check_comparable, differing_protocols
from segkit.report.runs import RunRecord, find_runs
from segkit.report.scores import ScoreTable, score_table


@dataclass(frozen=True)
class Comparison:
    """What a report is made of. ``mixed`` says in which ways the runs were not evaluated alike (normally empty)."""

    groups: tuple[Group, ...]
    baseline: Group
    notes: tuple[str, ...]
    mixed: tuple[str, ...]

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @cached_property
    def table(self) -> ScoreTable:
        """The scores."""
        return score_table(self.groups)

    def mean_iou(self, group: Group) -> float:
        """Mean IoU of a group, averaged over its runs; -1 where it has none, so that it sorts last."""
        mean = self.table.rows[self.groups.index(group)][self.table.keys.index("mean_iou")].mean
        return -1.0 if mean is None else mean

    @property
    def best(self) -> Group:
        """The group of the largest mean IoU."""
        return max(self.groups, key=self.mean_iou)

    @property
    def contender(self) -> Group | None:
        """The group of the largest mean IoU but for the baseline; None if there is no other."""
        return max((group for group in self.groups if group is not self.baseline), key=self.mean_iou, default=None)


def compare(
    paths: Sequence[Path | str],
    *,
    baseline: Path | str | None = None,
    evaluation: str | None = None,
    allow_mixed_protocols: bool = False,
) -> Comparison:
    """Read the runs in ``paths`` and group them; the first one's group is the baseline, or that of ``baseline``.

    ``evaluation`` is as in :func:`segkit.report.runs.find_runs`.

    Raises InputError for a run that cannot be read, and for runs that were not
    evaluated alike, unless ``allow_mixed_protocols``.
    """
    named = [baseline, *paths] if baseline is not None else list(paths)
    runs, notes = find_runs(named, evaluation=evaluation)
    mixed: list[str] = []
    if allow_mixed_protocols:
        mixed = differing_protocols(runs)
    else:
        check_comparable(runs)
    groups = tuple(group_runs(runs))
    return Comparison(groups, groups[0], tuple(dict.fromkeys(notes)), tuple(mixed))
