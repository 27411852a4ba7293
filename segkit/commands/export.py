"""``segkit export``: a trained run as one file that needs no segkit."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import add_shared, dataset_of, verb_parser
from segkit.errors import InputError

NUM_IMAGES = 4
"""Real images on which the file is compared with the model."""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "export",
        "Write a trained model as ONNX or as a program of torch.export; any batch size, height and width.",
        example="outputs/camvid/RUN --format onnx",
    )
    add_shared(verb, "run")
    verb.add_argument("--format", default="onnx", choices=["onnx", "torch_export"], help="kind of file")
    verb.add_argument("--output", type=Path, metavar="FILE", help="(default: RUN/model.onnx or RUN/model.pt2)")
    calibrated = {"help": "put the bias of segkit evaluate --calibrate into the model"}
    root = {"help": "folder of the data set, on whose images the file is checked (default: where it was in training)"}
    add_shared(verb, "--checkpoint", "--calibrated", "--root", calibrated=calibrated, root=root)
    return verb


def run(argv: Sequence[str]) -> None:
    """Write the file, and print how well it agrees with the model."""
    arguments = parser().parse_args(argv)
    from segkit.commands.decision import add_bias
    from segkit.config.schema import plain
    from segkit.models.export import export
    from segkit.run.saved import open_run
    from segkit.run.splits import open_split

    saved = open_run(arguments.run)
    dataset = dataset_of(saved, arguments)
    model = saved.model(arguments.checkpoint)
    if arguments.calibrated:
        add_bias(saved, model)
    counts, resize = saved.label_counts(), plain(dataset.eval_resize)
    metadata = {
        "classes": list(counts["classes"]),
        "palette": counts.get("palette"),
        "dataset": dataset.name,
        "resize": resize,
        "calibrated": arguments.calibrated,
    }
    output = arguments.output or saved.path / f"model.{'onnx' if arguments.format == 'onnx' else 'pt2'}"
    images, unreachable = iter(()), ""
    try:
        images = real_images(open_split(dataset, dataset.val_split), resize)
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
    """Yield up to :data:`NUM_IMAGES` images (H, W, 3) from all over the split, at the size of the evaluation."""
    from segkit.data.transforms import resize_image, target_size

    num_images = min(NUM_IMAGES, len(split))
    for number in range(num_images):
        image = split.image(number * len(split) // num_images)
        yield resize_image(image, target_size(image.shape[:2], resize))
