"""The charts of the page as numbers: what lies where, in percent of the width or height of the drawing.

``plots.html.j2`` makes elements from them. Words are laid out by the browser, which alone knows how wide they are;
colours come from the page's style sheet, where ``s0``..``s7`` colour a series, so that charts follow its theme.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.report.groups import SYMBOLS, Grid, Group, gain
from segkit.report.pictures import data_uri
from segkit.report.runs import RunRecord
from segkit.report.scales import POINT, Scale, Tick, compact, percent_tick, scale
from segkit.report.tables import percent

MOST_POINTS = 240
"""Longer curves are averaged in windows of equally many points."""
LOG_RATIO = 20.0
"""A curve whose largest value is so many times its smallest is drawn on a logarithmic axis."""
MOST_DRAWN = 1e300
"""No axis has ticks for a larger value."""
MOST_MARKS = 6
MOST_WRITTEN = 12
"""A confusion matrix of more classes has no numbers in its cells; they show when pointed at."""
MOST_CELLS = 40
"""A confusion matrix of more classes is a picture without names."""
INK = (44, 110, 200)


def points(value: float, digits: int = 2) -> str:
    """Return a difference of shares in percentage points, with its sign unless it is 0 as written."""
    text = f"{100 * value:+.{digits}f}"
    return text if float(text) else text[1:]


# -- curves over the steps of training, all phases one after the other, from metrics.jsonl ---------------------------


class Series(NamedTuple):
    """A group's values over the steps, and the band (low, high) about them where several runs were averaged."""

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Curve(NamedTuple):
    """A series as drawn: the corners of its line and of its band."""

    name: str
    number: int
    line: list[tuple[float, float]]
    band: list[tuple[float, float]]


class LineChart(NamedTuple):
    """Curves over a common x axis; ``marks`` are vertical lines, each with a word."""

    label: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick]
    curves: list[Curve]


def phase_offsets(run: RunRecord) -> dict[str, int]:
    """Return the step of the whole run at which each phase starts: the last steps of the phases before it, added."""
    offsets, start = {}, 0
    for phase in run.config["schedule"]:
        offsets[phase] = start
        start += max((record["step"] for record in run.metrics if record["phase"] == phase), default=0)
    return offsets


def recorded(run: RunRecord, split: str, key: str) -> dict[int, float]:
    """Return step of the whole run -> value, for the records of ``split`` that have a number under ``key``."""
    offsets = phase_offsets(run)
    return {
        offsets[record["phase"]] + record["step"]: float(record[key])
        for record in run.metrics
        if record.get("split") == split and isinstance(record.get(key), int | float) and abs(record[key]) < MOST_DRAWN
    }


def series(groups: Sequence[Group], split: str, key: str) -> list[Series]:
    """Return one series per group: the mean over its runs at the steps that all have, and the band of its runs.

    Runs without two steps in common are interpolated at those of the first.
    """
    found = []
    for index, group in enumerate(groups):
        folders = [one for run in group.runs for one in run.folders]
        known = [values for one in folders if (values := recorded(one, split, key))]
        if not known:
            continue
        common = sorted(set.intersection(*map(set, known)))
        steps = common if len(common) > 1 else sorted(known[0])  # folds of unequal size are evaluated at other steps
        drawn = [np.interp(steps, list(one), list(one.values())).tolist() for one in known]
        columns = list(zip(*drawn, strict=True))
        mean, low, high = ([take(values) for values in columns] for take in (statistics.fmean, min, max))
        window = -(-len(steps) // MOST_POINTS)
        thinned = [_thin([float(value) for value in values], window) for values in (steps, mean, low, high)]
        band = thinned[2:] if len(known) > 1 else [[], []]
        found.append(Series(group.name, index, thinned[0], thinned[1], *band))
    return found


def _thin(values: list[float], window: int) -> list[float]:
    return [statistics.fmean(values[at : at + window]) for at in range(0, len(values), window)]


def marks(groups: Sequence[Group]) -> list[tuple[float, str]]:
    """Return where phases start (except the first), with their names; at most :data:`MOST_MARKS`."""
    found = {
        (float(step), phase)
        for group in groups
        for run in group.runs
        if run.metrics
        for phase, step in phase_offsets(run).items()
        if step > 0
    }
    return sorted(found)[:MOST_MARKS]


def line_chart(drawn: Sequence[Series], key: str, marks: Sequence[tuple[float, str]] = ()) -> LineChart:
    """Return the chart of ``drawn``, values of ``key`` over the steps; ``marks`` are (step, word).

    ``mean_iou`` is a share, on the validation split; the training ``loss`` may need a logarithmic axis.
    """
    is_loss, heights = key == "loss", [value for one in drawn for value in one.y]
    spanned = [value for one in drawn for value in (*one.y, *one.low, *one.high)]
    log = is_loss and min(spanned) > 0 and max(heights) > LOG_RATIO * min(heights)
    label = "Training loss" if is_loss else "Mean IoU during training"
    y_label = "training loss" + (", logarithmic" if log else "") if is_loss else "mean IoU, validation, %"
    x = scale([value for one in drawn for value in one.x], zero=True)
    y = scale(spanned, log=log, least=0.0 if is_loss else POINT)
    curves = []
    for one in drawn:
        line, low, high = ([(x(a), 100 - y(b)) for a, b in zip(one.x, values, strict=False)]
                           for values in (one.y, one.low, one.high))  # fmt: skip
        curves.append(Curve(one.name, one.number, line, [*high, *low[::-1]] if low != high else []))
    lines = [(x(step), word) for step, word in marks]
    y_ticks = [(100 - at, text) for at, text in y.ticks(compact if is_loss else percent_tick)]
    return LineChart(label, "step", y_label, x.ticks(compact), y_ticks, lines, curves)


def training_curve(groups: Sequence[Group], key: str) -> LineChart | None:
    """Return ``mean_iou`` on the validation split or the training ``loss`` over the steps; None without records."""
    drawn = series(groups, "train" if key == "loss" else "val", key)
    return line_chart(drawn, key, marks(groups)) if drawn else None


# -- bars, dots and intervals --------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A row of a bar chart; ``kind`` is a class of the style sheet, empty for a row without a bar."""

    name: str
    text: str
    start: float = 0.0
    width: float = 0.0
    kind: str = ""


class Dot(NamedTuple):
    """One value of a series as a position and in words; ``low`` and ``high`` where it has an interval."""

    number: int
    name: str
    at: float
    text: str
    low: float | None = None
    high: float | None = None


class AxisChart(NamedTuple):
    """Bars, intervals, or rows of dots with their names; ``zero`` is the position of 0 where that has a line."""

    label: str
    rows: list[Any]
    zero: float | None = None
    x_label: str = ""
    ticks: Sequence[Tick] = ()


def interval_chart(
    rows: Sequence[tuple[int, str, float, float, float]], *, label: str, x_label: str, text: Callable[[float], str],
    zero: bool = False,
) -> AxisChart:  # fmt: skip
    """Return the chart of rows (series, name, low, value, high), all shares; ``zero`` puts 0 on the axis."""
    axis = scale([value for row in rows for value in row[2:]], zero=zero, least=POINT)
    drawn = [
        Dot(number, name, axis(value), f"{text(value)} [{text(low)}, {text(high)}]", axis(low), axis(high))
        for number, name, low, value, high in rows
    ]
    return AxisChart(label, drawn, axis(0.0) if zero else None, x_label, axis.ticks(percent_tick, 6))


def class_order(groups: Sequence[Group]) -> tuple[list[str], dict[str, float]]:
    """Return all classes from most to fewest training pixels, and their shares if the label counts are known."""
    names = list(dict.fromkeys(name for group in groups for name in group.classes))
    for group in groups:
        counts = group.runs[0].counts
        if counts and set(counts) >= set(names):
            total = sum(counts.values()) or 1
            return sorted(names, key=lambda name: -counts[name]), {name: counts[name] / total for name in names}
    return names, {}


def gain_charts(groups: Sequence[Group], baseline: Group) -> list[tuple[Group, AxisChart]]:
    """Return, for each group except the baseline, bars of its gain in IoU per class, all on one scale."""
    order, _ = class_order(groups)
    gains = [
        (group, [(name, gain(group, baseline, f"iou/{name}")[0]) for name in order])
        for group in groups
        if group is not baseline
    ]
    axis = scale([value for _, rows in gains for _, value in rows if value is not None], zero=True, least=POINT)
    return [
        (group, AxisChart(f"IoU per class, {group.name} less {baseline.name}",
                          [_gain_bar(name, value, axis) for name, value in rows], axis(0.0)))
        for group, rows in gains
    ]  # fmt: skip


def _gain_bar(name: str, value: float | None, axis: Scale) -> Bar:
    if value is None:
        return Bar(name, "none")
    ends = sorted((axis(0.0), axis(value)))
    return Bar(name, points(value, 1), ends[0], round(ends[1] - ends[0], 2), "gain" if value >= 0 else "loss")


def share_chart(groups: Sequence[Group]) -> AxisChart | None:
    """Return the share of every class in the training labels on a logarithmic axis; None without label counts."""
    order, shares = class_order(groups)
    known = [share for share in shares.values() if share > 0]
    if not shares:
        return None
    least, most = min(known, default=0.1), max(known, default=1.0)
    axis = Scale(min(10 ** math.floor(math.log10(least) - 1e-9), most / 10), most, log=True)
    bars = [
        Bar(name, f"{100 * shares[name]:.3g} %", 0.0, axis(shares[name]), "s7") if shares[name] > 0
        else Bar(name, "none")
        for name in order
    ]  # fmt: skip
    return AxisChart("Share of training pixels per class", bars, 0.0)


def margin_chart(groups: Sequence[Group], key: str) -> AxisChart | None:
    """Return margins ``key`` (``rho_0k`` or ``rho_k0``) per class, one colour per group; None if there are none.

    The axis is logarithmic where a margin is larger than 0, and those that are 0 have no dot there.
    """
    order, _ = class_order(groups)
    known = [
        (index, group, dict(zip(margins["classes"], map(float, margins[key]), strict=True)))
        for index, group in enumerate(groups)
        if (margins := group.runs[0].margins)
    ]
    values = [margins[name] for _, _, margins in known for name in order if name in margins]
    if not values:
        return None
    log = any(value > 0 for value in values)
    axis = scale([value for value in values if value > 0] if log else values, log=log, zero=not log, least=0.1)
    rows = [
        (name, [Dot(index, group.name, axis(margins[name]), f"{margins[name]:.4g}")
                for index, group, margins in known if name in margins and (margins[name] > 0 or not log)])
        for name in order
    ]  # fmt: skip
    return AxisChart(f"Margins {key} per class", rows, x_label="logits", ticks=axis.ticks(compact))


# -- heat maps: grids of two settings, confusion matrices ----------------------------------------------------------


HeatCell = tuple[str, int | None]
"""A value in words, and its strength from 0 to 100; None where there is no value."""


class HeatMap(NamedTuple):
    """Coloured cells, paler for less. ``is_matrix``: square cells, and the names of the columns upright."""

    label: str
    row_label: str
    column_label: str
    columns: list[str]
    rows: list[tuple[str, list[HeatCell]]]
    is_matrix: bool = False
    is_written: bool = True


def _heat_cell(value: float | None, low: float, high: float, text: Callable[[float], str], missing: str) -> HeatCell:
    if value is None or math.isnan(value):
        return missing, None
    return text(value), round(100 * (value - low) / (high - low))


def grid_chart(grid: Grid) -> HeatMap:
    """Return the mean IoU over the two numbers of a grid."""
    means = [
        [statistics.fmean(scores) if cell and (scores := cell.scores("mean_iou")) else None for cell in row]
        for row in grid.cells
    ]
    axis = scale([value for row in means for value in row if value is not None], least=POINT)
    names = [SYMBOLS.get(last, last) for key in (grid.row_key, grid.column_key) for last in [key.rpartition(".")[2]]]
    rows = [
        (f"{value:g}", [_heat_cell(mean, axis.low, axis.high, percent, "not run") for mean in row])
        for value, row in zip(grid.rows, means, strict=True)
    ]
    columns = [f"{value:g}" for value in grid.columns]
    return HeatMap(f"Mean IoU by {names[0]} and {names[1]}", names[0], names[1], columns, rows)


def confusion(group: Group) -> NDArray[np.int64] | None:
    """Return pixel counts (K, K) summed over images and runs, rows the target; None without per-image counts."""
    known = [run.per_image.total() for run in group.runs if run.per_image is not None]
    return np.sum(known, axis=0) if known else None


def row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each row divided by its sum; nan for a class without target pixels."""
    totals = counts.sum(1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)


def confusion_chart(counts: NDArray[np.int64], classes: Sequence[str]) -> HeatMap | str:
    """Return the share of each target class (row) predicted as each class (column).

    For many classes the address of a picture: one pixel per cell, ink on nothing, so that it suits any background.
    """
    shares = row_shares(counts)
    if len(classes) > MOST_CELLS:
        strength = np.sqrt(np.nan_to_num(shares))[..., None]  # the root shows small confusions
        pixels = np.concatenate([np.broadcast_to(INK, (*shares.shape, 3)), 255 * strength], axis=2)
        return data_uri(Image.fromarray(pixels.astype(np.uint8)), "PNG", optimize=True)
    rows = [
        (name, [_heat_cell(float(value), 0.0, 1.0, lambda value: f"{100 * value:.1f}", "no pixels") for value in row])
        for name, row in zip(classes, shares, strict=True)
    ]
    written = len(classes) <= MOST_WRITTEN
    return HeatMap("Confusion matrix", "label", "prediction", list(classes), rows, is_matrix=True, is_written=written)


def top_confusions(counts: NDArray[np.int64], classes: Sequence[str], most: int = 5) -> list[tuple[str, str, float]]:
    """Return the largest (label, prediction, share of the label's pixels) off the diagonal, largest first.

    None is so small that it would be written as 0.0 %.
    """
    shares = np.nan_to_num(row_shares(counts))
    np.fill_diagonal(shares, 0.0)
    flat = np.argsort(-shares, axis=None, kind="stable")[:most]
    pairs = [divmod(int(at), shares.shape[1]) for at in flat]
    return [(classes[row], classes[at], float(shares[row, at])) for row, at in pairs if shares[row, at] >= 0.0005]
