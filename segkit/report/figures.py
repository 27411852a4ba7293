"""The charts of a comparison: classes against the baseline, labels and margins, grids, confusion matrices."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.report import svg
from segkit.report.groups import SYMBOLS, Grid, Group

MOST_WRITTEN = 12
"""A confusion matrix of more classes has no numbers in its cells; they show when pointed at."""
MOST_CELLS = 40
"""A confusion matrix of more classes is a picture without names."""


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.2f}"


def class_order(groups: Sequence[Group]) -> tuple[list[str], dict[str, float]]:
    """All classes from most to fewest training pixels, and their shares where the label counts are known."""
    names = list(dict.fromkeys(name for group in groups for name in group.classes))
    for group in groups:
        counts = group.runs[0].counts
        if counts and set(counts) >= set(names):
            total = sum(counts.values()) or 1
            return sorted(names, key=lambda name: -counts[name]), {name: counts[name] / total for name in names}
    return names, {}


def class_gains(group: Group, baseline: Group, order: Sequence[str]) -> list[tuple[str, float | None]]:
    """IoU of ``group`` less that of ``baseline``, class by class, means over runs; None where one has no score."""
    rows: list[tuple[str, float | None]] = []
    for name in order:
        own, other = group.scores(f"iou/{name}"), baseline.scores(f"iou/{name}")
        rows.append((name, statistics.fmean(own) - statistics.fmean(other) if own and other else None))
    return rows


def gain_charts(groups: Sequence[Group], baseline: Group) -> list[tuple[Group, str]]:
    """Per group but the baseline: bars of its gain in IoU per class, all on one scale."""
    order, _ = class_order(groups)
    others = [group for group in groups if group is not baseline]
    rows = {id(group): class_gains(group, baseline, order) for group in others}
    most = max((abs(value) for gains in rows.values() for _, value in gains if value is not None), default=0.0)
    return [
        (
            group,
            svg.bar_chart(
                rows[id(group)],
                label=f"IoU per class, {group.name} less {baseline.name}",
                value_text=points,
                limit=most or None,
            ),
        )
        for group in others
    ]


def share_chart(groups: Sequence[Group]) -> str:
    """Share of every class in the training labels, on a logarithmic axis; empty without label counts."""
    order, shares = class_order(groups)
    if not shares:
        return ""
    return svg.bar_chart(
        [(name, shares[name]) for name in order],
        label="Share of training pixels per class",
        value_text=lambda value: f"{100 * value:.3g} %",
        log=True,
        series=7,
    )


def margin_chart(groups: Sequence[Group], key: str, x_label: str) -> str:
    """Margins ``key`` (``rho_0k`` or ``rho_k0``) per class as dots, one colour per group; empty if no group has any."""
    order, _ = class_order(groups)
    known = [(index, group, margins) for index, group in enumerate(groups) if (margins := group.runs[0].margins)]
    rows = []
    for name in order:
        dots = [
            (index, group.name, float(margins[key][margins["classes"].index(name)]))
            for index, group, margins in known
            if name in margins["classes"]
        ]
        rows.append((name, dots))
    values = [value for _, dots in rows for _, _, value in dots]
    if not values:
        return ""
    return svg.dot_chart(rows, label=f"Margins {key} per class", x_label=x_label, log=any(v > 0 for v in values))


def grid_chart(grid: Grid) -> str:
    """Mean IoU over the two numbers of a grid."""
    values = [
        [statistics.fmean(scores) if cell and (scores := cell.scores("mean_iou")) else None for cell in row]
        for row in grid.cells
    ]
    row_label, column_label = (
        SYMBOLS.get(key.rpartition(".")[2], key.rpartition(".")[2]) for key in (grid.row_key, grid.column_key)
    )
    return svg.heat_map(
        [f"{value:g}" for value in grid.rows],
        [f"{value:g}" for value in grid.columns],
        values,
        label=f"Mean IoU by {row_label} and {column_label}",
        value_text=percent,
        row_label=row_label,
        column_label=column_label,
    )


# -- confusion matrices --------------------------------------------------------------------------------------------


def confusion(group: Group) -> NDArray[np.int64] | None:
    """Pixel counts (K, K) summed over images and runs, rows the target; None without per-image counts."""
    known = [run.per_image.total() for run in group.runs if run.per_image is not None]
    return np.sum(known, axis=0) if known else None


def row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each row divided by its sum; nan for a class without target pixels."""
    totals = counts.sum(1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)


def confusion_chart(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Share of each target class (row) predicted as each class (column)."""
    shares = row_shares(counts)
    if len(classes) > MOST_CELLS:
        return _confusion_picture(shares)
    values = [[None if np.isnan(value) else float(value) for value in row] for row in shares]
    return svg.heat_map(
        classes,
        classes,
        values,
        label="Confusion matrix",
        value_text=lambda value: f"{100 * value:.1f}",
        row_label="label",
        column_label="prediction",
        bounds=(0.0, 1.0),
        cell_text=len(classes) <= MOST_WRITTEN,
        turned=True,
        width=520.0,
    )


def _confusion_picture(shares: NDArray[np.float64]) -> str:
    strength = np.sqrt(np.nan_to_num(shares))[..., None]  # the root shows small confusions
    paper, ink = np.array([240, 243, 248]), np.array([20, 60, 140])
    pixels = (paper + strength * (ink - paper)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    source = data_uri(out.getvalue(), "png")
    return f'<img class="matrix" alt="Confusion matrix, rows label, columns prediction" src="{source}">'


def top_confusions(counts: NDArray[np.int64], classes: Sequence[str], most: int = 6) -> list[tuple[str, str, float]]:
    """The largest (label, prediction, share of the label's pixels) off the diagonal, largest first."""
    shares = np.nan_to_num(row_shares(counts))
    np.fill_diagonal(shares, 0.0)
    flat = np.argsort(-shares, axis=None, kind="stable")[:most]
    pairs = [divmod(int(at), shares.shape[1]) for at in flat]
    return [
        (classes[row], classes[column], float(shares[row, column])) for row, column in pairs if shares[row, column] > 0
    ]


def data_uri(content: bytes, kind: str) -> str:
    """An address that holds a picture of ``kind`` itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
