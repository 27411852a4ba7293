"""``segkit models``: encoders with their size and stride, where their weights come from, and whether they are here."""

from __future__ import annotations

import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from segkit.commands.options import verb_parser
from segkit.errors import InputError
from segkit.progress import show, track

MOST_ROWS = 100


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "models",
        "List encoders for model.encoder: size, stride of their last features, and where their ImageNet weights come "
        "from. Without NAME those of the shipped models, and those whose weights are here.",
        example="convnext",
    )
    verb.add_argument(
        "name", nargs="?", metavar="NAME", help="a part of a name, of segmentation_models_pytorch or timm (tu-NAME)"
    )
    return verb


def run(argv: Sequence[str]) -> None:
    """Print the table."""
    arguments = parser().parse_args(argv)
    from segkit.models.smp_model import encoder_names
    from segkit.report.tables import screen_table

    names = encoder_names(arguments.name)
    if not names:
        raise InputError(f"no encoder has {arguments.name!r} in its name: run segkit models without it")
    rows = [row_of(name) for name in track(names[:MOST_ROWS], description="building", unit="encoders")]
    head = ["encoder", "million weights", "stride", "ImageNet weights", "here"]
    print(screen_table(head, rows, left=["encoder", "ImageNet weights"], width=120))
    if arguments.name is None or len(names) > MOST_ROWS:
        show("segkit models NAME lists others, by a part of their names: resnet, efficientnet, tu-convnext, ...")


def row_of(name: str) -> list[str]:
    """The cells of one encoder, which is built without its weights where that is possible."""
    import torch
    from segmentation_models_pytorch.encoders import get_encoder

    from segkit.models.weights import weights_origin

    size, stride = "no encoder", ""
    for place in ("meta", "cpu"):  # a few compute with values while they are built
        with torch.device(place), warnings.catch_warnings(), suppress(Exception):  # of a model that is no encoder
            warnings.simplefilter("ignore")
            encoder: Any = get_encoder(name, weights=None)
            size = f"{sum(weight.numel() for weight in encoder.parameters()) / 1e6:.1f}"
            stride = str(encoder.output_stride)
            break
    origin, here = weights_origin(name)
    return [name, size, stride, origin or "none", "yes" if here else "no"]
