"""Tables of results: the scores of a comparison, for the screen and as Markdown, CSV and LaTeX; one run by class."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from segkit.evaluation.bootstrap import MeanIoUInterval
from segkit.progress import shortened
from segkit.report.groups import Group, differing_protocols, score
from segkit.report.text import for_csv, for_latex, for_markdown, for_terminal
from segkit.report.uncertainty import best_rows, intervals

DIGITS = 2
"""Digits behind the point of a score in percent."""


def percent(value: float | None, missing: str = "-") -> str:
    """Return a share in percent with two digits; ``missing`` where it has no meaning."""
    return missing if value is None or value != value else f"{100 * value:.{DIGITS}f}"


def screen_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: Collection[str] = (),
    foot: Iterable[Sequence[str]] = (), width: int | None = None,
) -> str:  # fmt: skip
    """Return a table as text for a terminal of ``width`` columns; every cell shows its text as it is written.

    The columns named in ``left`` are aligned to the left, the others to the right. ``foot`` are rows below a line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def cell(text: str) -> str:
        return for_terminal(shortened(text))

    table = Table(box=box.SIMPLE_HEAD, title=cell(title) or None)
    for name in head:
        table.add_column(cell(name), justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    table.add_section()
    for row in foot:
        table.add_row(*map(cell, row))
    out = io.StringIO()
    width = width or max(80, shutil.get_terminal_size((100, 24)).columns)
    Console(file=out, width=width, force_terminal=False, markup=False, emoji=False, highlight=False).print(table)
    return out.getvalue().rstrip()


def class_table(results: dict[str, Any]) -> str:
    """Return the per-class table of a ``results.json``: IoU, precision and recall in percent, pixels of the label."""
    protocol = results.get("protocol", {})
    rows = [
        [name, *(percent(scores[key]) for key in ("iou", "precision", "recall")), f"{scores['target_pixels']:,}"]
        for name, scores in results["classes"].items()
    ]
    mean = [f"mean over {results['num_classes_averaged']} classes", percent(results["mean_iou"]), "", "", ""]
    text = screen_table(
        ["class", "IoU", "precision", "recall", "pixels"],
        rows,
        title=f"{protocol.get('dataset', '')} {protocol.get('split', '')}, {results['num_images']} images, in percent",
        left=["class"],
        foot=[mean, ["pixel accuracy", percent(results["pixel_accuracy"]), "", "", ""]],
    )
    absent = ", ".join(map(for_terminal, results.get("absent_classes") or ()))
    note = without_pixels(results) or (absent and f"not averaged, because absent: {absent}")
    return f"{text}\n{note}" if note else text


def without_pixels(results: dict[str, Any]) -> str:
    """Return a warning where no pixel was scored, as all labels are ignored; otherwise an empty text."""
    if any(scores["target_pixels"] for scores in results["classes"].values()):
        return ""
    return (
        f"warning: the labels of the {results['num_images']} images have no valid pixel, all have a value that is "
        "ignored, so there are no scores: mend the labels, or choose another split"
    )


# -- scores of a comparison ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A score of one group, 0..1: the mean over its runs, and their sample standard deviation."""

    values: tuple[float, ...]
    is_best: bool = False
    """True if it is larger than all others of its column, and the paired tests support that."""

    @property
    def mean(self) -> float | None:
        """Mean over the runs; None if no run has the score."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs (divisor n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def mean_text(self) -> str:
        """The mean in percent."""
        return percent(self.mean, "–")

    @property
    def spread_text(self) -> str:
        """The spread in percent, empty where there is none."""
        return percent(self.spread, "")


@dataclass(frozen=True)
class ScoreTable:
    """``rows[i][j]`` is the score ``keys[j]`` of ``groups[i]``; ``titles`` are the keys as a reader knows them."""

    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    intervals: dict[int, MeanIoUInterval]
    """Of the mean IoU, by the number of the row."""
    num_samples: int

    @property
    def has_seeds(self) -> bool:
        """True if a row stands for several runs."""
        return any(len(group.runs) > 1 for group in self.groups)

    @property
    def caption(self) -> str:
        """What was measured, on how many images, and whether that is one thing in all rows."""
        runs = [run for group in self.groups for run in group.runs]
        protocol, images = runs[0].protocol, runs[0].results["num_images"]
        measured = " ".join(str(protocol[key]) for key in ("dataset", "split") if key in protocol)
        spread = ", mean ± standard deviation over runs" if self.has_seeds else ""
        text = f"{measured}, {images} images; in percent{spread}.".lstrip(", ")
        if phrases := differing_protocols(runs):
            text = f"Not evaluated alike: {'; '.join(phrases)}. In percent{spread}."
        return text + (f" {MARKED}" if len(self.groups) > 1 else "")


MARKED = "Marked: better than every other row (paired randomisation tests over images, p <= 0.05, Bonferroni)."


def score_table(groups: Sequence[Group], *, num_samples: int = 2000) -> ScoreTable:
    """Return pixel accuracy, mean IoU and the IoU of every class for ``groups``, the best of a column marked.

    See :func:`segkit.report.uncertainty.best_rows`. ``num_samples`` is that of the tests and of the intervals.
    """
    classes = dict.fromkeys(name for group in groups for name in group.classes)
    keys = ("pixel_accuracy", "mean_iou", *(f"iou/{name}" for name in classes))
    best = best_rows(groups, keys, num_samples=num_samples)
    columns = [
        [Cell(tuple(group.scores(key)), is_best=at == first) for at, group in enumerate(groups)]
        for key, first in zip(keys, best, strict=True)
    ]
    rows = tuple(zip(*columns, strict=True))
    found = dict(intervals(groups, num_samples=num_samples))
    return ScoreTable(tuple(groups), keys, ("pixel acc.", "mIoU", *classes), rows, found, num_samples)


def _marked(cell: Cell, best: str, plus_minus: str) -> str:
    form = best if cell.is_best else "{}"
    return form.format(cell.mean_text) + (f"{plus_minus}{cell.spread_text}" if plus_minus and cell.spread_text else "")


def _written(table: ScoreTable, escape: Callable[[str], str], best: str, plus_minus: str) -> Iterable[list[str]]:
    """Yield the head and the rows of the table in the marks of a text format.

    The standard deviation and the interval of the mean IoU have columns of their own.
    """
    runs, std = (["runs"], ["std"]) if table.has_seeds else ([], [])
    yield ["", *runs, *map(escape, (*table.titles[:2], *std, "95 % interval", *table.titles[2:]))]
    for at, (group, (accuracy, mean, *rest)) in enumerate(zip(table.groups, table.rows, strict=True)):
        runs, std = ([str(len(group.runs))], [mean.spread_text or "–"]) if table.has_seeds else ([], [])
        one = table.intervals.get(at)
        interval = "–" if one is None else f"{percent(one.low)}–{percent(one.high)}"
        own = [_marked(accuracy, best, plus_minus), _marked(mean, best, ""), *std, interval]
        yield [escape(group.name), *runs, *own, *(_marked(cell, best, plus_minus) for cell in rest)]


def markdown(table: ScoreTable) -> str:
    """Return a table for a README: in percent, in bold what is marked."""
    head, *rows = _written(table, for_markdown, "**{}**", " ± ")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join([*lines, "", for_markdown(table.caption), ""])


def latex(table: ScoreTable) -> str:
    """Return a tabular with the rules of booktabs: in percent, in bold what is marked."""
    head, *rows = _written(table, for_latex, r"\textbf{{{}}}", r" $\pm$ ")
    head[0] = r"\textbf{Loss}"
    head_line, *lines = [" & ".join(cells).replace("–", "--") + r" \\" for cells in (head, *rows)]
    top = [f"% {for_terminal(table.caption)}", f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    return "\n".join([*top, head_line, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""])


def csv_text(table: ScoreTable) -> str:
    """Return one row per run, scores from 0 to 1 with every digit of ``results.json``; a missing score is empty.

    Beside the mean IoU stand the 95 % interval of the run and the standard deviation over the runs of its group.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [key.removeprefix("iou/") for key in table.keys[2:]]
    keys = [*table.keys, *(f"{kind}/{name}" for kind in ("precision", "recall") for name in names)]
    more = ["mean_iou_low", "mean_iou_high", "mean_iou_std"]
    writer.writerow(["group", "run", "phase", "seed", *map(for_csv, [*keys[:2], *more, *keys[2:]])])
    single = [(cells[1], Group(group.name, (run,)))
              for group, cells in zip(table.groups, table.rows, strict=True) for run in group.runs]  # fmt: skip
    found = dict(intervals([group for _, group in single], num_samples=table.num_samples))
    for at, (cell, group) in enumerate(single):
        (run,), one = group.runs, found.get(at)
        own = [score(run.results, key) for key in keys]
        values = [*own[:2], *((one.low, one.high) if one else (None, None)), cell.spread, *own[2:]]
        texts = map(for_csv, (group.name, str(run.path), run.phase))
        writer.writerow([*texts, run.seed, *("" if value is None else repr(value) for value in values)])
    return out.getvalue()


def screen(table: ScoreTable) -> str:
    """Return the table for a terminal: pixel accuracy and mean IoU only, with a star what is marked."""
    rows = [
        [group.name, str(len(group.runs)), *(_marked(cell, "{} *", " ± ") for cell in cells[:2])]
        for group, cells in zip(table.groups, table.rows, strict=True)
    ]
    return screen_table(["", "runs", *table.titles[:2]], rows, title=table.caption, left=[""])


EXPORTS: dict[str, Callable[[ScoreTable], str]] = {"markdown": markdown, "csv": csv_text, "latex": latex}
