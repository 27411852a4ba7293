"""The table of scores as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from segkit.report.groups import score
from segkit.report.scores import Cell, ScoreTable


def markdown(table: ScoreTable) -> str:
    """A table for a README: in percent, the best in bold, the second best underlined."""
    head = ["", *(_markdown_text(title) for title in table.titles)]
    if _has_seeds(table):
        head.insert(1, "runs")
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for group, cells in zip(table.groups, table.rows, strict=True):
        shown = [_marked(cell, "**{}**", "<u>{}</u>", " ± ") for cell in cells]
        runs = [str(len(group.runs))] if _has_seeds(table) else []
        lines.append(_row([_markdown_text(group.name), *runs, *shown]))
    return "\n".join([*lines, "", _caption(table), ""])


def latex(table: ScoreTable) -> str:
    """A tabular with the rules of booktabs: in percent, the best in bold, the second best underlined."""
    head = [r"\textbf{Loss}", *(latex_text(title) for title in table.titles)]
    if _has_seeds(table):
        head.insert(1, "runs")
    lines = [f"% {_caption(table)}", f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(head) + r" \\", r"\midrule"]
    for group, cells in zip(table.groups, table.rows, strict=True):
        shown = [_marked(cell, r"\textbf{{{}}}", r"\underline{{{}}}", r" $\pm$ ") for cell in cells]
        runs = [str(len(group.runs))] if _has_seeds(table) else []
        lines.append(" & ".join([latex_text(group.name), *runs, *(text.replace("–", "--") for text in shown)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def csv_text(table: ScoreTable) -> str:
    """One row per run, scores from 0 to 1 with every digit of ``results.json``; a missing score is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "run", "phase", "seed", *table.keys])
    for group in table.groups:
        for run in group.runs:
            values = [score(run.results, key) for key in table.keys]
            cells = ["" if value is None else repr(value) for value in values]
            writer.writerow([group.name, str(run.path), run.phase, run.seed, *cells])
    return out.getvalue()


def screen(table: ScoreTable) -> str:
    """The table for a terminal: pixel accuracy and mean IoU only, the best marked with a star."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from segkit.report.tables import render

    shown = Table(box=box.SIMPLE_HEAD, title=escape(_caption(table)))
    shown.add_column("")
    for title in ("runs", *table.titles[:2]):
        shown.add_column(title, justify="right")
    for group, cells in zip(table.groups, table.rows, strict=True):
        scores = [_marked(cell, "{} *", "{}  ", " ± ") for cell in cells[:2]]
        shown.add_row(escape(group.name), str(len(group.runs)), *scores)
    return render(shown)


EXPORTS: dict[str, Callable[[ScoreTable], str]] = {"markdown": markdown, "csv": csv_text, "latex": latex}


def _has_seeds(table: ScoreTable) -> bool:
    return any(len(group.runs) > 1 for group in table.groups)


def _marked(cell: Cell, best: str, second: str, plus_minus: str) -> str:
    form = {1: best, 2: second}.get(cell.rank or 0, "{}")
    return form.format(cell.shown) + (f"{plus_minus}{cell.shown_spread}" if cell.shown_spread else "")


def _caption(table: ScoreTable) -> str:
    run = table.groups[0].runs[0]
    measured = " ".join(str(run.protocol[key]) for key in ("dataset", "split") if key in run.protocol)
    spread = ", mean ± standard deviation over runs" if _has_seeds(table) else ""
    return f"{measured}, {run.results['num_images']} images; in percent{spread}.".lstrip(", ")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "τ": r"$\tau$",
    "υ": r"$\upsilon$",
}
LATEX |= {letter: "\\" + letter for letter in "&%$#_{}"}


def latex_text(text: str) -> str:
    """``text`` with the letters that LaTeX reads as commands written out."""
    return "".join(LATEX.get(letter, letter) for letter in text)
