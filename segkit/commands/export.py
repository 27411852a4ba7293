"""``segkit export``: a trained run as one file that needs no segkit."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Entry point of the verb."""
    from segkit.train import guarded

    guarded(run)


def run() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        prog="segkit export",
        description="Write a trained model as ONNX or as a program of torch.export; any batch size, height and width.",
        epilog="example: segkit export outputs/camvid/RUN --format onnx",
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--format", default="onnx", choices=["onnx", "torch_export"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/model.onnx or RUN/model.pt2")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--calibrated", action="store_true", help="put the bias of evaluate --calibrate into the model")
    arguments = parser.parse_args()

    from segkit.config import plain
    from segkit.models.export import export
    from segkit.saved_run import open_run

    saved = open_run(arguments.run)
    dataset = saved.config.phase_dataset(saved.phase_name)
    model = saved.model(arguments.checkpoint)
    if arguments.calibrated:
        from segkit.commands.calibration import add_bias

        add_bias(saved, model)
    counts = saved.label_counts()
    metadata = {
        "classes": counts["classes"],
        "palette": counts.get("palette"),
        "dataset": dataset.name,
        "resize": plain(dataset.eval_resize),
        "calibrated": arguments.calibrated,
    }
    suffix = "onnx" if arguments.format == "onnx" else "pt2"
    output = arguments.output or saved.path / f"model.{suffix}"
    export(model, output, format=arguments.format, metadata=metadata)
    print(f"written: {output}")
