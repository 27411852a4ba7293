"""``segkit submit``: predictions in the format of a benchmark's server."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    from segkit.commands.options import add_inference_arguments

    parser = argparse.ArgumentParser(
        prog="segkit submit",
        description="Predict a split and pack it as the benchmark's server wants it; names, sizes and values checked.",
        epilog="example: segkit submit outputs/cityscapes/RUN --output cityscapes.zip --split test",
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.zip")
    parser.add_argument(
        "--split", default="test", help="default: test; a labelled split is scored again from the files"
    )
    parser.add_argument("--competition", default="comp6", choices=["comp5", "comp6"], help="of VOC")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--root", help="folder of the data set, where it moved")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: that of the run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    add_inference_arguments(parser)
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Write the archive; on a labelled split, score what is in it."""
    from segkit.evaluation.submission import check_images, write_submission
    from segkit.run.saved import open_run
    from segkit.run.splits import open_split
    from segkit.runtime import resolve_device

    arguments = parse(argv)
    saved = open_run(arguments.run)
    dataset = saved.config.phase_dataset(saved.phase_name)
    if arguments.root:
        dataset = dataclasses.replace(dataset, root=arguments.root)
    split = open_split(dataset, arguments.split)
    form, sizes = dataset.name.removesuffix("_coarse"), image_sizes(split)
    check_images(sizes, format=form, split=arguments.split)
    device = resolve_device(arguments.device)
    model = saved.model(arguments.checkpoint).to(device)
    precision = arguments.precision or saved.config.precision.value
    number = write_submission(
        arguments.output,
        predictions(arguments, dataset, split, model, device, precision),
        format=form,
        table=split.table,
        split=arguments.split,
        competition=arguments.competition,
        image_sizes=sizes,
    )
    print(f"written: {number} predictions in {arguments.output}")
    if split.labelled:
        print(f"mean IoU of the files: {100 * score(arguments, dataset, split):.2f} %")


def image_sizes(split: Any) -> dict[str, tuple[int, int]]:
    """Names, as the server knows them, and (height, width) of all images, from the headers of their files."""
    from segkit.data.decode import image_size

    return {Path(sample.name).name: image_size(sample.image) for sample in split.samples}


def predictions(
    arguments: argparse.Namespace, dataset: Any, split: Any, model: Any, device: Any, precision: str
) -> Iterator[tuple[str, Any]]:
    """(name, train ids of the image's size) of every image."""
    import torch

    from segkit.commands.options import inference
    from segkit.config.schema import plain
    from segkit.data.loader import eval_batches
    from segkit.data.transforms import EvalTransform
    from segkit.evaluation.loop import autocast
    from segkit.progress import track

    predict = inference(arguments, dataset.crop)
    transform = EvalTransform(resize=plain(dataset.eval_resize))
    batches = eval_batches(split, transform=transform, workers=arguments.workers)
    for batch in track(batches, description="predicting", total=len(split), unit="images"):
        with torch.inference_mode(), autocast(device, precision):
            predicted = predict(model, batch.images.to(device), tuple(batch.labels.shape[-2:]))
        yield from zip(batch.names, predicted.cpu().numpy(), strict=True)


def score(arguments: argparse.Namespace, dataset: Any, split: Any) -> float:
    """Mean IoU of the files in the archive against the labels of the split."""
    import torch

    from segkit.evaluation import ConfusionMatrix
    from segkit.evaluation.submission import read_submission

    matrix = ConfusionMatrix(split.num_classes, split.ignore_index)
    index = {Path(sample.name).name: number for number, sample in enumerate(split.samples)}
    files = read_submission(
        arguments.output,
        format=dataset.name.removesuffix("_coarse"),
        table=split.table,
        split=arguments.split,
        competition=arguments.competition,
    )
    for name, prediction in files:
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(split.label(index[name])))
    return matrix.mean_iou()
