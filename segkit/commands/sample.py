"""``segkit sample``: a small synthetic data set in the official layout of any of the real ones."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from segkit.commands.options import count, verb_parser
from segkit.errors import InputError
from segkit.progress import show


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "sample",
        "Write a small synthetic data set in the official layout of a real one, quirks included.",
        example="dataset=cityscapes --n 8 --output /tmp/cityscapes",
    )
    verb.add_argument("dataset", metavar="dataset=NAME", help="a name of configs/dataset")
    verb.add_argument("--n", type=count(1, most=10**5), default=8, metavar="N", help="images of the training split")
    verb.add_argument("--seed", type=int, default=0, help="of the pictures")
    size = "size of the images, relative to the official, 0.01 to 1; at least 32 pixels a side"
    verb.add_argument("--scale", type=float, default=0.25, metavar="S", help=size)
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty or a new folder")
    return verb


def run(argv: Sequence[str]) -> None:
    """Write the data set; print a command that uses it."""
    arguments = parser().parse_args(argv)
    key, _, name = arguments.dataset.partition("=")
    if key != "dataset" or not name:
        raise InputError(f"the first argument is {arguments.dataset!r}, but must be dataset=NAME, as for train.py")
    from segkit.config.compose import quoted
    from segkit.files import check_place
    from segkit.synthetic.sample_maker import make_sample

    check_place(arguments.output)
    make_sample(name, arguments.output, num_images=arguments.n, seed=arguments.seed, scale=arguments.scale)
    show(f"written: {arguments.output}")
    is_plain = re.fullmatch(r"[\w./-]+", str(arguments.output), re.ASCII)
    root = arguments.output if is_plain else quoted(arguments.output)
    show(f"try: segkit check dataset={name} {shlex.quote(f'dataset.root={root}')}")
