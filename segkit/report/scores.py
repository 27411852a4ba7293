"""The table of scores: one row per group of runs, pixel accuracy, mean IoU and the IoU of every class."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from segkit.report.groups import Group

DIGITS = 2
"""Digits behind the point of a score in percent; scores that look equal are ranked as equal."""


@dataclass(frozen=True)
class Cell:
    """A score of one group, 0..1: the mean over its runs, and their sample standard deviation."""

    values: tuple[float, ...]
    rank: int | None = None
    """1 for the best of the column, 2 for the second best, else None."""

    @property
    def mean(self) -> float | None:
        """Mean over the runs; None where no run has the score."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs (divisor n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def shown(self) -> str:
        """The mean in percent."""
        return "–" if self.mean is None else f"{100 * self.mean:.{DIGITS}f}"

    @property
    def shown_spread(self) -> str:
        """The spread in percent, empty where there is none."""
        return "" if self.spread is None else f"{100 * self.spread:.{DIGITS}f}"


@dataclass(frozen=True)
class ScoreTable:
    """``rows[i][j]`` is the score ``keys[j]`` of ``groups[i]``; ``titles`` are the keys as a reader knows them."""

    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def score_table(groups: Sequence[Group]) -> ScoreTable:
    """The table of ``groups``, best and second best of each column marked."""
    classes = dict.fromkeys(name for group in groups for name in group.classes)
    keys = ("pixel_accuracy", "mean_iou", *(f"iou/{name}" for name in classes))
    columns = [_ranked([Cell(tuple(group.scores(key))) for group in groups]) for key in keys]
    rows = tuple(tuple(column[index] for column in columns) for index in range(len(groups)))
    return ScoreTable(tuple(groups), keys, ("pixel acc.", "mIoU", *classes), rows)


def _ranked(cells: Sequence[Cell]) -> list[Cell]:
    """Mark the best where there are two different scores, the second best where there are three."""
    levels = sorted({float(cell.shown) for cell in cells if cell.mean is not None}, reverse=True)
    marked = levels[: min(2, len(levels) - 1)] if len(levels) > 1 else []
    return [
        Cell(cell.values, marked.index(float(cell.shown)) + 1)
        if cell.mean is not None and float(cell.shown) in marked
        else cell
        for cell in cells
    ]
