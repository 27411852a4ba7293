"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from typing import Any

from segkit.errors import InputError


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how images become predictions."""
    parser.add_argument("--tta", default="", metavar="flip,ms", help="test-time augmentation: flip, ms (multi-scale)")
    parser.add_argument("--scales", metavar="S,S,...", help="scales of --tta ms (default: 0.5 to 1.75 in quarters)")
    parser.add_argument("--slide", nargs="?", const="crop", metavar="HxW", help="sliding window (default: the crop)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share that neighbouring windows have in common")
    parser.add_argument("--blending", default="gaussian", choices=["gaussian", "uniform"])


def inference(arguments: argparse.Namespace, crop: list[int]) -> Any:
    """The :class:`segkit.evaluation.Inference` that the options describe."""
    from segkit.evaluation.inference import ADE20K_SCALES, Inference

    modes = {mode for mode in arguments.tta.split(",") if mode}
    if modes - {"flip", "ms"}:
        raise InputError(f"--tta is {arguments.tta!r}, but takes flip, ms, or both with a comma between")
    scales: tuple[float, ...] = (1.0,)
    if "ms" in modes:
        scales = numbers(arguments.scales, "--scales") if arguments.scales else ADE20K_SCALES
    elif arguments.scales:
        raise InputError("--scales is given without --tta ms: add --tta ms")
    window = None
    if arguments.slide:
        height, width = crop if arguments.slide == "crop" else window_size(arguments.slide)
        window = (-(-height // 32) * 32, -(-width // 32) * 32)
    return Inference(
        window=window, overlap=arguments.overlap, blending=arguments.blending, flip="flip" in modes, scales=scales
    )


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} is {text!r}, but takes numbers with commas between, as 0.5,1.0,1.5") from None


def window_size(text: str) -> tuple[int, int]:
    """Height and width from ``HxW``."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--slide is {text!r}, but takes HxW, as 800x800") from None
    return height, width
