"""``segkit check``: proof before the GPU hour, of the data, and of one real step of everything."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from segkit.check.check import check
from segkit.errors import InputError

EXIT_ERRORS = 1
"""Exit code if errors were found; 0 for none or only warnings, 2 for a mistake in the command."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="segkit check",
        description="Read every file of a data set, then train, evaluate, save and resume a few real steps of a run.",
        epilog="example: segkit check dataset=cityscapes dataset.root=/data/cityscapes loss=margin_calibration",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: dataset=..., model=...")
    parser.add_argument("--sample", type=int, metavar="N", help="look at N random samples of each split only")
    parser.add_argument("--skip-step", action="store_true", help="look at the data only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON as well")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.sample is not None and arguments.sample < 1:
        raise InputError(f"--sample is {arguments.sample}, but must be at least 1: leave it out to look at everything")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise InputError(
            f"--json is {arguments.json}, but the folder {arguments.json.absolute().parent} does not exist"
        )
    return arguments


def run(argv: Sequence[str]) -> None:
    """Check, show the report, and end the process with :data:`EXIT_ERRORS` if errors were found."""
    import json

    from segkit.check.report import as_text, to_json
    from segkit.config.compose import compose

    arguments = parse(argv)
    report = check(compose(arguments.overrides), sample=arguments.sample, rehearses=not arguments.skip_step)
    content = to_json(report)
    print(as_text(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written: {arguments.json}", file=sys.stderr)
    if report.verdict == "errors":
        sys.exit(EXIT_ERRORS)
