"""``segkit predict``: label images and overlays for any pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.commands.scorers import load
from segkit.errors import InputError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    from segkit.commands.options import add_inference_arguments

    parser = argparse.ArgumentParser(
        prog="segkit predict",
        description="Predict image files: label PNGs, colour overlays with a legend, probabilities.",
        epilog="example: segkit predict outputs/camvid/RUN --input photos --output predictions",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a model.onnx of segkit export")
    parser.add_argument("--input", required=True, metavar="DIR|FILE|GLOB")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--side-by-side", type=Path, metavar="RUN2", help="another run, shown beside the first")
    parser.add_argument("--probabilities", action="store_true", help="also write class probabilities (NPZ)")
    parser.add_argument("--calibrated", action="store_true", help="use the bias of segkit evaluate --calibrate")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    add_inference_arguments(parser)
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Predict all images; exit code 1 if one could not be read."""
    from segkit.commands.options import inference
    from segkit.data.decode import read_rgb
    from segkit.data.files import find_images
    from segkit.evaluation.predict import Outputs, predict_files
    from segkit.progress import track
    from segkit.runtime import resolve_device

    arguments = parse(argv)
    device = resolve_device(arguments.device)
    images = find_images(arguments.input, output=arguments.output)
    scorer, crop, classes, palette = load(arguments.run, arguments, device)
    scorers: Any = scorer
    if arguments.side_by_side:
        other, _, other_classes, _ = load(arguments.side_by_side, arguments, device)
        if other_classes != classes:
            raise InputError(
                f"{arguments.side_by_side} predicts {len(other_classes)} classes and {arguments.run} {len(classes)}, "
                "or others: name two runs of one data set"
            )
        scorers = {title(arguments.run): scorer, title(arguments.side_by_side) + " ": other}
    report = predict_files(
        scorers,
        images,
        arguments.output,
        read_image=read_rgb,
        classes=classes,
        palette=palette,
        device=device,
        precision=arguments.precision,
        inference=inference(arguments, crop),
        outputs=Outputs(probabilities=arguments.probabilities),
        progress=lambda names: track(names, description="predicting", unit="images"),
    )
    for _, reason in report.failed:
        print(f"skipped: {reason}", file=sys.stderr)
    print(f"written: {report.num_written} predictions in {arguments.output}")
    sys.exit(report.exit_code)


def title(run: Path) -> str:
    """A short name for a run: what its folder says about model and loss."""
    return run.resolve().parent.name if (run / "config.yaml").is_file() else run.stem
