"""``segkit submit``: predictions in the format of a benchmark's server."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.commands.options import (
    INFERENCE,
    add_shared,
    check_spares,
    check_writable,
    inference,
    open_scored,
    verb_parser,
)
from segkit.progress import show

if TYPE_CHECKING:
    from segkit.evaluation.submission import Submission


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "submit",
        "Predict a split and pack it as the benchmark's server wants it; names, sizes and values checked.",
        example="outputs/cityscapes/RUN --output cityscapes.zip --split test",
    )
    add_shared(verb, "run", "--phase", "--trust")
    verb.add_argument("--output", type=Path, required=True, metavar="FILE.zip", help="a .zip, .tar, .tar.gz or .tgz")
    verb.add_argument("--split", default="test", help="split to predict; a labelled one is scored again from the files")
    verb.add_argument("--competition", choices=["comp5", "comp6"], help="of VOC (default: comp6, any data)")
    shared = ("--checkpoint", "--decision", "--root", "--precision", "--device", "--workers", "--max-pixels")
    add_shared(verb, *shared, *INFERENCE)
    return verb


def run(argv: Sequence[str]) -> None:
    """Write the archive; on a labelled split, score what is in it."""
    arguments = parser().parse_args(argv)
    check_writable(arguments, "output")
    from segkit.commands.decision import model_and_decision
    from segkit.data.bands import image_size
    from segkit.evaluation.submission import Submission, check_ending
    from segkit.runtime import resolve_device

    check_ending(arguments.output)
    saved, dataset, split = open_scored(arguments.run, arguments, phase=arguments.phase, split=arguments.split)
    check_spares(arguments, [dataset.root], "output")
    form = Submission(dataset.name.removesuffix("_coarse"), split.table, arguments.split, arguments.competition)
    chosen, device = inference(arguments, dataset.crop), resolve_device(arguments.device)
    sizes = {Path(sample.name).name: image_size(sample.image) for sample in split.samples}
    form.check_images(sizes)
    model, decision = model_and_decision(saved, arguments.decision, checkpoint=arguments.checkpoint)
    model = decision.around(model.to(device))
    predict = replace(chosen, decide=decision.decide)
    precision = arguments.precision or saved.config.precision.value
    files = predictions(predict, dataset, split, model, device, precision, workers=arguments.workers)
    number = form.write(arguments.output, files, sizes)
    show(f"written: {number} predictions in {arguments.output}")
    if split.labelled:
        show(f"mean IoU of the files: {100 * score(form, arguments.output, split):.2f} %")


def predictions(
    predict: Any, dataset: Any, split: Any, model: Any, device: Any, precision: str, *, workers: int
) -> Iterator[tuple[str, Any]]:
    """Yield (name, train ids of the image's size) of every image."""
    from segkit.config.schema import plain
    from segkit.data.loader import eval_batches
    from segkit.data.transforms import EvalTransform
    from segkit.evaluation.loop import evaluating
    from segkit.progress import track
    from segkit.training.precision import DTYPES

    transform = EvalTransform(resize=plain(dataset.eval_resize))
    batches = eval_batches(split, transform=transform, workers=workers)
    for batch in track(batches, description="predicting", total=len(split), unit="images"):
        height, width = batch.labels.shape[-2:]
        with evaluating(model, device, DTYPES[precision]):
            predicted = predict(model, batch.images.to(device), (height, width))
        yield from zip(batch.names, predicted.cpu().numpy(), strict=True)


def score(form: Submission, archive: Path, split: Any) -> float:
    """Return the mean IoU of the files in ``archive`` against the labels of ``split``."""
    import torch

    from segkit.evaluation import ConfusionMatrix

    matrix = ConfusionMatrix(split.num_classes, split.ignore_index)
    index = {Path(sample.name).name: number for number, sample in enumerate(split.samples)}
    for name, prediction in form.read(archive):
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(split.label(index[name])))
    return matrix.mean_iou()
