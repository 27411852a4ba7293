"""The sections of the page: from a comparison to HTML. A section that has nothing to show is empty."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from segkit.report import curves, figures, html, svg, uncertainty
from segkit.report.comparison import Comparison
from segkit.report.groups import find_grids, score
from segkit.report.scores import DIGITS

MARKS = {1: "best", 2: "second"}
MARGINS = (
    (
        "rho_0k",
        "Margin ρ₀ₖ",
        "What a pixel of another class must keep against class k: the rarer k, the larger. It makes the model "
        "reluctant to predict k: precision up, recall down.",
    ),
    ("rho_k0", "Margin ρₖ₀", "What a pixel of class k itself must reach."),
)
OPEN_CHARTS = 4
"""Charts per group beyond this many are folded away."""


def scores(c: Comparison) -> str:
    """The table in the form of the paper: losses as rows, accuracy, mean IoU and IoU per class as columns."""
    seeds = any(len(group.runs) > 1 for group in c.groups)
    head = ["", *(["runs"] if seeds else []), *(escape(title) for title in c.table.titles)]
    rows = []
    for index, (group, cells) in enumerate(zip(c.groups, c.table.rows, strict=True)):
        shown = [
            html.number_cell(
                cell.mean, cell.shown, key=key, mark=MARKS.get(cell.rank or 0, ""), spread=cell.shown_spread
            )
            for key, cell in zip(c.table.keys, cells, strict=True)
        ]
        runs = [f'<td class="num">{len(group.runs)}</td>'] if seeds else []
        rows.append([html.group_head(index, group.name), *runs, *shown])
    over = sorted({run.results["num_classes_averaged"] for run in c.runs})
    absent = sorted({name for run in c.runs for name in run.results.get("absent_classes", ())})
    lead = (
        f"In percent. mIoU is the mean over {' or '.join(map(str, over))} classes"
        + (f"; absent and not averaged: {', '.join(absent)}" if absent else "")
        + ". Best of a column in bold, second best underlined."
        + (" ± is the standard deviation over runs that differ in their seed alone." if seeds else "")
    )
    return html.paragraph(lead) + html.table(head, rows, class_="scores") + _every_run(c)


def _every_run(c: Comparison) -> str:
    head = ["run", "row", "seed", "phase", "step", "mIoU", "pixel acc.", "best mIoU in training"]
    rows = []
    for index, group in enumerate(c.groups):
        for run in group.runs:
            best = run.results.get("best") or {}
            values = {key: score(run.results, key) for key in ("mean_iou", "pixel_accuracy")}
            cells = [html.number_cell(value, _percent(value), key=key) for key, value in values.items()]
            reached = f"{_percent(best.get('mean_iou'))} at step {best.get('step', '–')}" if best else "–"
            rows.append([
                escape(str(run.path)), html.group_head(index, group.name), str(run.seed), escape(run.phase),
                escape(str(run.results.get("step", "–"))), *cells, escape(reached),
            ])  # fmt: skip
    return html.details(f"Every run ({len(rows)})", html.table(head, rows, class_="runs"))


def _percent(value: float | None) -> str:
    return "–" if not isinstance(value, int | float) or value < 0 else f"{100 * value:.{DIGITS}f}"


def certainty(c: Comparison, *, num_samples: int) -> str:
    """Bootstrap intervals, and paired tests against the baseline."""
    charts, table = [], ""
    found = uncertainty.intervals(c.groups, num_samples=num_samples)
    if found:
        rows = [(at, c.groups[at].name, one.low, one.mean_iou, one.high) for at, one in found]
        chart = svg.interval_chart(
            rows, label="Mean IoU with intervals", x_label="mean IoU, %", value_text=figures.percent
        )
        note = (
            f"95 % intervals over images: BCa bootstrap, {num_samples:,} resamples of {found[0][1].num_images} images. "
            "They say how much the choice of images matters, not the choice of the seed. Frames of one video are not "
            "independent: for those the intervals are too narrow."
        )
        if any(len(group.runs) > 1 for group in c.groups):
            note += " For a row of several runs their counts are added, which comes near the mean in the table."
        charts.append(html.card(chart, title="Mean IoU", note=note))
    tests = uncertainty.paired_tests(c.groups, c.baseline, num_samples=num_samples)
    if tests:
        numbers = {id(group): at for at, group in enumerate(c.groups)}
        rows = [
            (numbers[id(test.group)], test.group.name, test.result.low, test.result.difference, test.result.high)
            for test in tests
        ]
        chart = svg.interval_chart(
            rows,
            label=f"Mean IoU less that of {c.baseline.name}",
            x_label="difference in mean IoU, points",
            value_text=_points,
            zero=True,
        )
        note = "95 % percentile intervals, the same images drawn for both."
        charts.append(html.card(chart, title=f"Gain over {c.baseline.name}", note=note))
        note = _test_note(c, tests)
        table = html.cards([html.card(_test_table(tests, numbers), title="Paired randomisation test", note=note)])
    return html.cards(charts) + table if charts else ""


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _test_table(tests: Sequence[uncertainty.PairedTest], numbers: dict[int, int]) -> str:
    corrected = len(tests) > 1
    head = ["", "difference", "95 % interval", "p", *(["p (Holm)"] if corrected else []), "pairs of runs"]
    rows = []
    for test in tests:
        one = test.result
        rows.append([
            html.group_head(numbers[id(test.group)], test.group.name),
            html.number_cell(one.difference, _points(one.difference), key="difference"),
            f'<td class="num">{_points(one.low)} to {_points(one.high)}</td>',
            html.number_cell(one.p_value, f"{one.p_value:.4f}", key="p_value"),
            *([html.number_cell(test.holm, f"{test.holm:.4f}", key="p_holm")] if corrected else []),
            f'<td class="num">{test.num_pairs}</td>',
        ])  # fmt: skip
    return html.table(head, rows)


def _test_note(c: Comparison, tests: Sequence[uncertainty.PairedTest]) -> str:
    pooled = any(test.num_pairs > 1 for test in tests)
    return (
        f"Against {c.baseline.name}, in points of mean IoU; p of swapping the two predictions of each image at random, "
        "two-sided. A small p: the difference is not due to the choice of images; other seeds may still differ."
        + (" Where several runs of a row are paired, their counts are added image by image first." if pooled else "")
        + (" Holm's correction allows for reading all rows together." if len(tests) > 1 else "")
    )


def grids(c: Comparison) -> str:
    """A heat map for every grid of two numbers."""
    items = []
    for grid in find_grids(c.groups):
        cells = [cell for row in grid.cells for cell in row if cell]
        means = {cell.name: statistics.fmean(values) for cell in cells if (values := cell.scores("mean_iou"))}
        best = max(means, key=lambda name: means[name]) if means else "none"
        note = f"Mean IoU in percent; the stronger the colour, the better; an empty cell was not run. Best: {best}."
        items.append(html.card(figures.grid_chart(grid), title=f"{grid.row_key} by {grid.column_key}", note=note))
    return html.cards(items) if items else ""


def training(c: Comparison) -> str:
    """Mean IoU and loss over the steps."""
    score_chart, loss_chart = curves.score_curve(c.groups), curves.loss_curve(c.groups)
    items = []
    if score_chart:
        items.append(html.card(score_chart, title="Mean IoU during training"))
    if loss_chart:
        names = {str(group.runs[0].loss.get("_target_")) for group in c.groups}
        note = (
            "Losses of different kinds have different units: compare the shape, not the height."
            if len(names) > 1
            else ""
        )
        items.append(html.card(loss_chart, title="Training loss", note=note))
    if not items:
        return ""
    band = (
        " Bands go from the least to the most of a row's runs."
        if any(len(group.runs) > 1 for group in c.groups)
        else ""
    )
    return (
        html.paragraph(f"All phases one after the other; dashed lines are where a phase starts.{band}")
        + html.legend(c.groups)
        + html.cards(items)
    )


def classes(c: Comparison) -> str:
    """Gain per class against the baseline."""
    charts = figures.gain_charts(c.groups, c.baseline)
    if not charts:
        return ""
    _, shares = figures.class_order(c.groups)
    charts.sort(key=lambda item: -c.mean_iou(item[0]))
    drawn = [html.card(html.tall(chart), title=group.name) for group, chart in charts]
    lead = f"IoU less that of {c.baseline.name}, in points, all on one scale; rows with the largest mean IoU first."
    lead += " Classes from most to fewest training pixels." if shares else ""
    more = drawn[OPEN_CHARTS:]
    folded = html.details(f"{len(more)} more", html.cards(more)) if more else ""
    return html.paragraph(lead) + html.cards(drawn[:OPEN_CHARTS]) + folded


def labels(c: Comparison) -> str:
    """Label distribution and margins per class."""
    items = []
    share = figures.share_chart(c.groups)
    if share:
        items.append(
            html.card(
                html.tall(share), title="Share of training pixels", note="Counted in the label files; logarithmic axis."
            )
        )
    for key, title, note in MARGINS:
        chart = figures.margin_chart(c.groups, key, "logits")
        if chart:
            items.append(html.card(html.tall(chart), title=title, note=note))
    if not items:
        return ""
    known = [index for index, group in enumerate(c.groups) if group.runs[0].margins]
    return (html.legend(c.groups, known) if known else "") + html.cards(items)


def confusions(c: Comparison) -> str:
    """Confusion matrices: of the baseline and of the best other row open, the rest folded."""
    shown = {id(c.baseline), id(c.contender)}
    opened: list[str] = []
    folded: list[str] = []
    for group in sorted(c.groups, key=lambda one: one is not c.baseline):
        counts = figures.confusion(group)
        if counts is None:
            continue
        worst = figures.top_confusions(counts, group.classes)
        words = "; ".join(f"{a} taken for {b} {100 * share:.1f} %" for a, b, share in worst[:5])
        item = html.card(
            figures.confusion_chart(counts, group.classes),
            title=group.name,
            note=f"Percent of each label's pixels. Most frequent errors: {words}." if words else "",
        )
        (opened if id(group) in shown else folded).append(item)
    if not opened and not folded:
        return ""
    more = html.details(f"{len(folded)} more", html.cards(folded)) if folded else ""
    return html.cards(opened) + more
