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

    @property
    def best(self) -> Group:
        """The group of the largest mean IoU."""
        at = self.table.keys.index("mean_iou")
        means = [row[at].mean for row in self.table.rows]
        known = [-1.0 if mean is None else mean for mean in means]
        return self.groups[known.index(max(known))]


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
