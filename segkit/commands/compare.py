"""``segkit compare RUN RUN ...``: tables, curves, intervals and pictures of finished runs, in one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from segkit.commands.options import check_writable, verb_parser
from segkit.errors import InputError
from segkit.progress import show


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb's arguments."""
    made = verb_parser(
        "compare",
        "Compare finished runs: one HTML file that works offline, and tables. "
        "Runs that differ only in their seed become one row, and the folds of a cross-validation one run.",
        example="RUN_A RUN_B --output report.html",
    )
    made.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, the folder of one of its phases, or a sweep's folder"
    )
    made.add_argument("--baseline", metavar="RUN", help="the run that others are compared with (default: the first)")
    made.add_argument(
        "--evaluation",
        metavar="NAME",
        help="compare RUN/evaluations/NAME.json, as segkit evaluate wrote it; the hash at the end of NAME may be left "
        "out (default: the scores after training)",
    )
    made.add_argument(
        "--output", type=Path, metavar="FILE", help="the report (default: report.html, if no other file is asked for)"
    )
    for kind in ("markdown", "csv", "latex"):
        made.add_argument(
            f"--{kind}", type=Path, metavar="FILE", help=f"write the table of scores as {kind.capitalize()}"
        )
    made.add_argument("--pictures", type=int, default=6, metavar="N", help="images side by side (default: 6)")
    made.add_argument("--samples", type=int, default=2000, metavar="N", help="bootstrap resamples (default: 2000)")
    made.add_argument(
        "--allow-mixed-protocols",
        action="store_true",
        help="show runs together although they were not evaluated alike; the report lists what differs",
    )
    return made


def run(argv: Sequence[str]) -> None:
    """Read the runs, print the table and write the files that were asked for."""
    arguments = parser().parse_args(argv)
    from segkit.report.comparison import compare
    from segkit.report.tables import EXPORTS, screen

    if arguments.samples < 100:
        raise InputError(f"--samples is {arguments.samples}, but an interval needs at least 100: give --samples 2000")
    if arguments.pictures < 0:
        raise InputError(f"--pictures is {arguments.pictures}, but must be 0 or more")
    check_writable(arguments, "output", *EXPORTS, makes_folders=True)
    comparison = compare(
        arguments.runs,
        baseline=arguments.baseline,
        evaluation=arguments.evaluation,
        allow_mixed_protocols=arguments.allow_mixed_protocols,
    )
    for note in comparison.notes:
        show(f"note: {note}")
    for phrase in comparison.mixed:
        show(f"warning: not evaluated alike: {phrase}")
    print(screen(comparison.table))
    if comparison.advice:
        show(comparison.advice)
    asked = {kind: getattr(arguments, kind) for kind in EXPORTS if getattr(arguments, kind)}
    for kind, path in asked.items():
        write(path, EXPORTS[kind](comparison.table))
    if arguments.output or not asked:
        from segkit.report.page import page

        text = page(comparison, num_samples=arguments.samples, pictures=arguments.pictures)
        write(arguments.output or Path("report.html"), text)


def write(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path``, creating missing folders, and print its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    show(f"written: {path}")
