"""``segkit export``: a trained run as one file that needs no segkit."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NUM_IMAGES = 4
"""Real images on which the file is compared with the model."""


def run(argv: Sequence[str]) -> None:
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
    parser.add_argument("--root", help="folder of the data set, where it moved; the file is checked on its images")
    arguments = parser.parse_args(argv)

    from segkit.config.schema import plain
    from segkit.errors import InputError
    from segkit.models.export import export
    from segkit.run.saved import open_run
    from segkit.run.splits import open_split

    saved = open_run(arguments.run)
    dataset = saved.config.phase_dataset(saved.phase_name)
    model = saved.model(arguments.checkpoint)
    if arguments.calibrated:
        from segkit.commands.calibration import add_bias

        add_bias(saved, model)
    counts = saved.label_counts()
    metadata = {
        "classes": list(counts["classes"]),
        "palette": counts.get("palette"),
        "dataset": dataset.name,
        "resize": plain(dataset.eval_resize),
        "calibrated": arguments.calibrated,
    }
    suffix = "onnx" if arguments.format == "onnx" else "pt2"
    output = arguments.output or saved.path / f"model.{suffix}"
    if arguments.root:
        dataset = dataclasses.replace(dataset, root=arguments.root)
    images, unreachable = iter(()), ""
    try:
        images = real_images(open_split(dataset, dataset.val_split), plain(dataset.eval_resize))
    except InputError as error:
        unreachable = str(error)
    found = export(model, output, format=arguments.format, metadata=metadata, images=images)
    print(f"written: {output}")
    if unreachable:
        print(f"not checked on real images, as there are none: {unreachable} (or give --root)")
    else:
        print(
            f"checked on {found.num_images} images of {dataset.val_split}: {100 * found.pixels:.3f} % of the pixels "
            f"get the class of the torch model, logits differ by up to {found.difference:.1e} of the largest"
        )


def real_images(split: Any, resize: dict[str, Any]) -> Iterator[Any]:
    """Up to :data:`NUM_IMAGES` images (H, W, 3) from all over the split, at the size of the evaluation."""
    from segkit.data.transforms import resize_image, target_size

    num_images = min(NUM_IMAGES, len(split))
    for number in range(num_images):
        image = split.image(number * len(split) // num_images)
        yield resize_image(image, target_size(image.shape[:2], resize))
