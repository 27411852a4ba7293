"""Curves over the steps of training, all phases one after the other, from ``metrics.jsonl``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from segkit.report import svg
from segkit.report.groups import Group
from segkit.report.runs import RunRecord

MOST_POINTS = 240
"""Longer curves are averaged in windows of equally many points."""
LOG_RATIO = 20.0
"""A curve whose largest value is so many times its smallest is drawn on a logarithmic axis."""


def phase_offsets(run: RunRecord) -> dict[str, int]:
    """Step of the whole run at which each phase starts: the sum of the last steps of the phases before it."""
    offsets, start = {}, 0
    for phase in run.config["schedule"]:
        offsets[phase] = start
        start += max((record["step"] for record in run.metrics if record["phase"] == phase), default=0)
    return offsets


def points(run: RunRecord, split: str, key: str) -> dict[int, float]:
    """Step of the whole run -> value, for the records of ``split`` that have a number under ``key``."""
    offsets = phase_offsets(run)
    return {
        offsets[record["phase"]] + record["step"]: float(record[key])
        for record in run.metrics
        if record.get("split") == split and isinstance(record.get(key), int | float)
    }


def series(groups: Sequence[Group], split: str, key: str) -> list[svg.Series]:
    """One curve per group: the mean over its runs at the steps that all have, with a band from least to most."""
    curves = []
    for index, group in enumerate(groups):
        known = [found for run in group.runs if (found := points(run, split, key))]
        if not known:
            continue
        steps = sorted(set.intersection(*(set(found) for found in known)))
        columns = [[found[step] for found in known] for step in steps]
        mean, low, high = ([take(values) for values in columns] for take in (statistics.fmean, min, max))
        if steps:
            window = -(-len(steps) // MOST_POINTS)
            thinned = [_thin([float(value) for value in values], window) for values in (steps, mean, low, high)]
            band = thinned[2:] if len(known) > 1 else [[], []]
            curves.append(svg.Series(group.name, index, thinned[0], thinned[1], *band))
    return curves


def _thin(values: list[float], window: int) -> list[float]:
    return [statistics.fmean(values[at : at + window]) for at in range(0, len(values), window)]


def marks(groups: Sequence[Group]) -> list[tuple[float, str]]:
    """Where phases start (but the first), with their names; at most six."""
    found = {
        (float(step), phase)
        for group in groups
        for run in group.runs
        if run.metrics
        for phase, step in phase_offsets(run).items()
        if step > 0
    }
    return sorted(found)[:6]


def score_curve(groups: Sequence[Group]) -> str:
    """Mean IoU on the validation split during training; empty without records."""
    curves = series(groups, "val", "mean_iou")
    if not curves:
        return ""
    return svg.line_chart(
        curves,
        label="Mean IoU during training",
        x_label="step",
        y_label="mean IoU, validation, %",
        y_text=svg.percent_tick,
        marks=marks(groups),
    )


def loss_curve(groups: Sequence[Group]) -> str:
    """Training loss; empty without records."""
    curves = series(groups, "train", "loss")
    if not curves:
        return ""
    values = [value for one in curves for value in one.y]
    log = min(values) > 0 and max(values) > LOG_RATIO * min(values)
    return svg.line_chart(
        curves,
        label="Training loss",
        x_label="step",
        y_label="training loss" + (", logarithmic" if log else ""),
        log_y=log,
        marks=marks(groups),
    )
