"""``segkit sample``: a small synthetic data set in the official layout of any of the real ones."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from segkit.errors import InputError
from segkit.progress import show


def run(argv: Sequence[str]) -> None:
    """Write the data set; print a command that uses it."""
    parser = argparse.ArgumentParser(
        prog="segkit sample",
        description="Write a small synthetic data set in the official layout of a real one, quirks included.",
        epilog="example: segkit sample dataset=cityscapes --n 8 --output /tmp/cityscapes",
    )
    parser.add_argument("dataset", metavar="dataset=NAME", help="a name of configs/dataset")
    parser.add_argument("--n", type=int, default=8, metavar="N", help="images of the training split (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (default: 0)")
    parser.add_argument(
        "--scale",
        type=float,
        default=0.25,
        metavar="S",
        help="size of the images, relative to the official (default: 0.25)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty or a new folder")
    arguments = parser.parse_args(argv)
    key, _, name = arguments.dataset.partition("=")
    if key != "dataset" or not name:
        raise InputError(f"the first argument is {arguments.dataset!r}, but must be dataset=NAME, as for train.py")
    from segkit.synthetic.sample_maker import make_sample

    make_sample(name, arguments.output, num_images=arguments.n, seed=arguments.seed, scale=arguments.scale)
    show(f"written: {arguments.output}")
    show(f"try: segkit check dataset={name} {shlex.quote(f'dataset.root={arguments.output}')}")
