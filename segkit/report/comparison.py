"""Read runs, check that they may be compared, pool folds, and group those that differ in their seed alone.

Scores may stand in one table if they are of the same data and classes, measured in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from segkit.errors import InputError
from segkit.report.folds import pool_folds
from segkit.report.groups import Group, differences, flatten, group_runs
from segkit.report.runs import RunRecord, find_runs
from segkit.report.tables import ScoreTable, score_table


@dataclass(frozen=True)
class Comparison:
    """What a report is made of. ``mixed`` lists in what the runs were not evaluated alike (normally nothing)."""

    groups: tuple[Group, ...]
    baseline: Group
    notes: tuple[str, ...]
    mixed: tuple[str, ...]

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
        return score_table(self.groups)

    @property
    def advice(self) -> str | None:
        """Which way margins must point for the rare half of the classes, by precision and recall of the baseline.

        A margin rho_0k > 0 makes class k be predicted less. None where the rare classes do not agree.
        """
        rows = [run.results["classes"] for run in self.baseline.runs]
        rare = sorted(rows[0], key=lambda name: rows[0][name].get("target_pixels") or 0)[: len(rows[0]) // 2]
        lean = dict.fromkeys(rare, 0.0)
        for row, name in ((row, name) for row in rows for name in rare):
            recall, precision = row[name].get("recall"), row[name].get("precision")
            if recall is not None:  # a class that is never predicted is missed, at whatever precision
                lean[name] += recall - (1.0 if precision is None else precision)
        missed, overdone = ([name for name in rare if sign * lean[name] > 0] for sign in (-1, 1))
        start = f"advice: the baseline, {self.baseline.name}, has recall"
        if len(missed) > len(overdone):
            return (
                f"{start} below precision for {len(missed)} of the {len(rare)} rarest classes ({', '.join(missed)}): "
                "larger margins rho_0k are the wrong direction; try --decision miou"
            )
        if len(overdone) > len(missed):
            return (
                f"{start} above precision for {len(overdone)} of the {len(rare)} rarest classes "
                f"({', '.join(overdone)}): they are predicted too often, and larger margins rho_0k may pay"
            )
        return None

    def mean_iou(self, group: Group) -> float:
        """Return the mean IoU of a group, averaged over its runs; -1 if it has none, so that it sorts last."""
        mean = self.table.rows[self.groups.index(group)][self.table.keys.index("mean_iou")].mean
        return -1.0 if mean is None else mean

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
    mixed: list[str] = []
    if allow_mixed_protocols:
        mixed = differing_protocols(runs)
    else:
        check_comparable(runs)
    groups = tuple(group_runs(runs))
    return Comparison(groups, groups[0], tuple(dict.fromkeys(notes)), tuple(mixed))


# -- protocols -----------------------------------------------------------------------------------------------------


def differing_protocols(runs: Sequence[RunRecord]) -> list[str]:
    """Return one phrase for every way in which the evaluations of ``runs`` differ from that of the first run."""
    phrases = []
    measured = [{**flatten(run.protocol), "number of images": run.results["num_images"]} for run in runs]
    for key, values in differences(measured).items():
        at = next(index for index, value in enumerate(values) if value != values[0])
        phrases.append(
            f"{key} is {_written(values[0])} in {runs[0].path} and {_written(values[at])} in {runs[at].path}"
        )
    differing = next((run for run in runs if run.classes != runs[0].classes), None)
    if differing is not None:
        classes = [f"{_classes(run)} in {run.path}" for run in (runs[0], differing)]
        phrases.append(f"the classes are {' and '.join(classes)}")
    images = [(run.path, sorted(run.per_image.names)) for run in runs if run.per_image is not None]
    other = next((path for path, names in images if names != images[0][1]), None)
    if not phrases and other is not None:
        phrases.append(f"the images of {images[0][0]} and of {other} have different names")
    return phrases


def check_comparable(runs: Sequence[RunRecord]) -> None:
    """Raise InputError, which names what differs, if the runs were not evaluated alike."""
    phrases = differing_protocols(runs)
    if phrases:
        raise InputError(
            f"these runs were not evaluated alike: {'; '.join(phrases)}. Compare runs of one protocol, evaluate them "
            "alike with `segkit evaluate`, or give --allow-mixed-protocols to show them side by side all the same"
        )


def comparable(one: RunRecord, other: RunRecord) -> bool:
    """Return True if a paired test of the two makes sense: same protocol, same classes, same images by name."""
    if one.per_image is None or other.per_image is None:
        return False
    return not differing_protocols([one, other])


def _classes(run: RunRecord) -> str:
    first = ", ".join(run.classes[:4])
    return f"{len(run.classes)} ({first}{', ...' if len(run.classes) > 4 else ''})"


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | list | type(None)) else "not given"
