"""``segkit compare RUN RUN ...``: tables, curves, intervals and pictures of finished runs, in one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segkit.commands.options import add_shared, check_spares, check_writable, count, open_scored, verb_parser
from segkit.errors import InputError
from segkit.files import write_atomically
from segkit.progress import show

if TYPE_CHECKING:
    from segkit.report.comparison import Comparison
    from segkit.report.pictures import StoredPicture
    from segkit.report.runs import RunRecord


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
    for form in ("Markdown", "CSV", "LaTeX"):
        made.add_argument(f"--{form.lower()}", type=Path, metavar="FILE", help=f"write the table of scores as {form}")
    made.add_argument("--pictures", type=count(0), default=6, metavar="N", help="images side by side (default: 6)")
    made.add_argument(
        "--predict",
        action="store_true",
        help="predict the images with the largest gains and losses for the report; needs data and checkpoints "
        "(default: show pictures that the runs stored)",
    )
    made.add_argument("--samples", type=int, default=2000, metavar="N", help="bootstrap resamples (default: 2000)")
    made.add_argument(
        "--allow-mixed-protocols",
        action="store_true",
        help="show runs together although they were not evaluated alike; the report lists what differs",
    )
    add_shared(made, "--root", "--device", "--trust")
    return made


def run(argv: Sequence[str]) -> None:
    """Read the runs, print the table and write the files that were asked for."""
    arguments = parser().parse_args(argv)
    from segkit.report.comparison import compare
    from segkit.report.page import page
    from segkit.report.tables import EXPORTS, screen
    from segkit.runtime import resolve_device

    if not 100 <= arguments.samples <= 10**6:
        raise InputError(
            f"--samples is {arguments.samples}, but an interval needs at least 100 and at most a million: "
            "give --samples 2000"
        )
    if arguments.predict and arguments.evaluation:
        raise InputError("--predict shows what was scored after training, which --evaluation is not: leave one out")
    for option in ("root", "device") if not arguments.predict else ():
        if getattr(arguments, option) not in (None, "auto"):
            raise InputError(f"--{option} is for --predict, which is not given: leave it out, or add --predict")
    asked = [kind for kind in EXPORTS if getattr(arguments, kind)]
    arguments.output = arguments.output or (None if asked else Path("report.html"))
    if arguments.predict and not arguments.output:
        raise InputError("--predict is for the report, which no option asks for: add --output report.html")
    if arguments.predict:
        resolve_device(arguments.device)  # refused before the tests and the tables
    check_writable(arguments, "output", *EXPORTS, makes_folders=True)
    comparison = compare(
        arguments.runs,
        baseline=arguments.baseline,
        evaluation=arguments.evaluation,
        allow_mixed_protocols=arguments.allow_mixed_protocols,
        num_samples=arguments.samples,
    )
    roots = [arguments.root, *(one.dataset.get("root") for one in comparison.folders)]
    check_spares(arguments, [root for root in roots if isinstance(root, str)], "output", *EXPORTS)
    for note in comparison.notes:
        show(f"note: {note}")
    for phrase in comparison.mixed:
        show(f"warning: not evaluated alike: {phrase}")
    print(screen(comparison.table))
    if comparison.advice:
        show(comparison.advice)
    if arguments.output and arguments.predict:
        predict_extremes(comparison, arguments)
    texts = {kind: EXPORTS[kind](comparison.table) for kind in asked}
    if arguments.output:
        texts["output"] = page(comparison, pictures=arguments.pictures)
    for kind, text in texts.items():  # once nothing can be refused any more
        write(getattr(arguments, kind), text)


def predict_extremes(comparison: Comparison, arguments: argparse.Namespace) -> None:
    """Predict the images with the largest gains and losses that the runs of the report have no pictures of."""
    from segkit.report.page import extremes, image_ranking, shown_runs

    names = [one.name for one in extremes(image_ranking(*comparison.ranked_runs), arguments.pictures)]
    for _, record in shown_runs(comparison):
        missing = [name for name in names if name not in record.pictures]
        for one in record.folders:
            record.pictures.update(predicted(one, missing, arguments))


def predicted(record: RunRecord, names: Sequence[str], arguments: argparse.Namespace) -> dict[str, StoredPicture]:
    """Predict those of the images ``names`` that ``record`` scored again; returns what it stored.

    That is RUN/PHASE/evaluations/pictures.

    InputError if its data or checkpoint are not there, or are not what was scored.
    """
    import numpy as np

    from segkit.commands import decision, evaluate
    from segkit.report.pictures import read_pictures, write_pictures
    from segkit.runtime import resolve_device

    scored = record.per_image
    if scored is None or not (known := set(names) & set(scored.names)):
        return {}
    top = record.path if (record.path / "config.yaml").is_file() else record.path.resolve().parent
    saved, dataset, split = open_scored(top, arguments, phase=record.phase, split=str(record.protocol.get("split")))
    folder = evaluate.folder_of(saved) / "pictures"
    split = split.subset([at for at, sample in enumerate(split.samples) if sample.name in known])
    show(f"predicting {len(known)} images with {record.path}")
    options, pictures = evaluate.parser().parse_args(["--workers=0", "--", str(top)]), range(len(known))
    model, argmax = saved.model().to(resolve_device(arguments.device)), decision.Decision()
    _, found = evaluate.evaluate_split(options, saved, dataset, split, model, argmax, pictures)
    for at, name in enumerate(found.per_image.names):
        before = scored.matrix(scored.names.index(name))
        moved = np.abs(found.per_image.matrix(at) - before).sum()
        if moved > 0.02 * before.sum():  # more than another machine explains
            raise InputError(
                f"the prediction of {name} is not the one that {record.path} has the score of: its data or its "
                "checkpoint have changed; leave --predict out, or train again"
            )
    write_pictures(folder, found.pictures, palette=split.palette, classes=split.classes)
    return read_pictures(folder)


def write(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path``, creating missing folders, and print its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode(errors="backslashreplace"))
    show(f"written: {path}")
