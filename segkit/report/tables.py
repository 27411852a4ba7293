"""Tables of results: the scores of a comparison, for the screen and as Markdown, CSV and LaTeX; one run by class."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from segkit.report.groups import Group, score
from segkit.report.text import for_csv, for_latex, for_markdown, for_terminal

DIGITS = 2
"""Digits behind the point of a score in percent; scores that look equal are ranked as equal."""


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

    table = Table(box=box.SIMPLE_HEAD, title=for_terminal(title) or None)
    for name in head:
        table.add_column(for_terminal(name), justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*map(for_terminal, row))
    table.add_section()
    for row in foot:
        table.add_row(*map(for_terminal, row))
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
    return f"{text}\nnot averaged, because absent: {absent}" if absent else text


# -- scores of a comparison ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A score of one group, 0..1: the mean over its runs, and their sample standard deviation."""

    values: tuple[float, ...]
    rank: int | None = None
    """1 for the best of the column, 2 for the second best, else None."""

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

    @property
    def has_seeds(self) -> bool:
        """True if a row stands for several runs."""
        return any(len(group.runs) > 1 for group in self.groups)

    @property
    def caption(self) -> str:
        """What was measured, and on how many images."""
        run = self.groups[0].runs[0]
        measured = " ".join(str(run.protocol[key]) for key in ("dataset", "split") if key in run.protocol)
        spread = ", mean ± standard deviation over runs" if self.has_seeds else ""
        return f"{measured}, {run.results['num_images']} images; in percent{spread}.".lstrip(", ")


def score_table(groups: Sequence[Group]) -> ScoreTable:
    """Return pixel accuracy, mean IoU and the IoU of every class for ``groups``, the best two of a column marked."""
    classes = dict.fromkeys(name for group in groups for name in group.classes)
    keys = ("pixel_accuracy", "mean_iou", *(f"iou/{name}" for name in classes))
    columns = [_ranked([Cell(tuple(group.scores(key))) for group in groups]) for key in keys]
    rows = tuple(tuple(column[index] for column in columns) for index in range(len(groups)))
    return ScoreTable(tuple(groups), keys, ("pixel acc.", "mIoU", *classes), rows)


def _ranked(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with the best marked if two scores differ, and the second best if three do."""
    levels = sorted({float(cell.mean_text) for cell in cells if cell.mean is not None}, reverse=True)
    ranks = {level: rank for rank, level in enumerate(levels[: min(2, len(levels) - 1)], start=1)}
    return [replace(cell, rank=ranks.get(float(cell.mean_text))) if cell.mean is not None else cell for cell in cells]


def _marked(cell: Cell, best: str, second: str, plus_minus: str) -> str:
    form = {1: best, 2: second}.get(cell.rank or 0, "{}")
    return form.format(cell.mean_text) + (f"{plus_minus}{cell.spread_text}" if cell.spread_text else "")


def _written(
    table: ScoreTable, escape: Callable[[str], str], best: str, second: str, plus_minus: str
) -> Iterable[list[str]]:
    """Yield the head and the rows of the table in the marks of a text format."""
    runs = ["runs"] if table.has_seeds else []
    yield ["", *runs, *map(escape, table.titles)]
    for group, cells in zip(table.groups, table.rows, strict=True):
        runs = [str(len(group.runs))] if table.has_seeds else []
        yield [escape(group.name), *runs, *(_marked(cell, best, second, plus_minus) for cell in cells)]


def markdown(table: ScoreTable) -> str:
    """Return a table for a README: in percent, the best in bold, the second best underlined."""
    head, *rows = _written(table, for_markdown, "**{}**", "<u>{}</u>", " ± ")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join([*lines, "", for_markdown(table.caption), ""])


def latex(table: ScoreTable) -> str:
    """Return a tabular with the rules of booktabs: in percent, the best in bold, the second best underlined."""
    head, *rows = _written(table, for_latex, r"\textbf{{{}}}", r"\underline{{{}}}", r" $\pm$ ")
    head[0] = r"\textbf{Loss}"
    head_line, *lines = [" & ".join(cells).replace("–", "--") + r" \\" for cells in (head, *rows)]
    top = [f"% {for_terminal(table.caption)}", f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    return "\n".join([*top, head_line, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""])


def csv_text(table: ScoreTable) -> str:
    """Return one row per run, scores from 0 to 1 with every digit of ``results.json``; a missing score is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "run", "phase", "seed", *map(for_csv, table.keys)])
    for group in table.groups:
        for run in group.runs:
            values = [score(run.results, key) for key in table.keys]
            names = map(for_csv, (group.name, str(run.path), run.phase))
            writer.writerow([*names, run.seed, *("" if value is None else repr(value) for value in values)])
    return out.getvalue()


def screen(table: ScoreTable) -> str:
    """Return the table for a terminal: pixel accuracy and mean IoU only, the best marked with a star."""
    rows = [
        [group.name, str(len(group.runs)), *(_marked(cell, "{} *", "{}  ", " ± ") for cell in cells[:2])]
        for group, cells in zip(table.groups, table.rows, strict=True)
    ]
    return screen_table(["", "runs", *table.titles[:2]], rows, title=table.caption, left=[""])


EXPORTS: dict[str, Callable[[ScoreTable], str]] = {"markdown": markdown, "csv": csv_text, "latex": latex}
