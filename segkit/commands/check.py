"""``segkit check``: proof before the GPU hour, of the data, and of some real steps of every phase."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from segkit.commands.options import add_shared, check_writable, configuration, count, verb_parser
from segkit.progress import show

EXIT_ERRORS = 1
"""Exit code if errors were found; 0 for none or only warnings, 2 for a mistake in the command."""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "check",
        "Read every file of a data set, then train, evaluate, save and resume a few real steps of a run.",
        example="dataset=cityscapes dataset.root=/data/cityscapes loss=margin_calibration",
    )
    add_shared(verb, "overrides", "--config-dir")
    verb.add_argument(
        "--sample", type=count(1), metavar="N", help="look at N random samples of each split (default: all)"
    )
    verb.add_argument("--skip-step", action="store_true", help="look at the data only")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON as well")
    return verb


def run(argv: Sequence[str]) -> None:
    """Check, print the report, and end the process with :data:`EXIT_ERRORS` if errors were found."""
    arguments = parser().parse_intermixed_args(argv)
    check_writable(arguments, "json")
    from segkit.check.check import check
    from segkit.check.report import as_text, to_json
    from segkit.files import write_json

    report = check(configuration(arguments, "json"), sample=arguments.sample, rehearses=not arguments.skip_step)
    content = to_json(report)
    print(as_text(content))
    if arguments.json:
        write_json(arguments.json, content)
        show(f"written: {arguments.json}", error=True)
    if report.verdict == "errors":
        sys.exit(EXIT_ERRORS)
