"""``segkit export``: a trained run as one file that needs no segkit."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segkit.commands.options import add_shared, check_writable, dataset_of, verb_parser
from segkit.errors import InputError
from segkit.progress import show

NUM_IMAGES = 4
"""Real images on which the file is compared with the model."""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "export",
        "Write a trained model as ONNX or as a program of torch.export; any batch size, height and width.",
        example="outputs/camvid/RUN --format onnx",
    )
    add_shared(verb, "run", "--phase", "--trust")
    verb.add_argument("--format", default="onnx", choices=["onnx", "torch_export"], help="kind of file")
    verb.add_argument("--output", type=Path, metavar="FILE", help="(default: RUN/model.onnx or RUN/model.pt2)")
    decision = {"help": "put the decision that segkit evaluate has fitted into the graph"}
    root = {"help": "folder of the data set, on whose images the file is checked (default: where it was in training)"}
    add_shared(verb, "--checkpoint", "--decision", "--root", decision=decision, root=root)
    return verb


def run(argv: Sequence[str]) -> None:
    """Write the file, and print how well it agrees with the model."""
    arguments = parser().parse_args(argv)
    check_writable(arguments, "output")
    from segkit.commands.decision import add_bias, decision_of
    from segkit.config.schema import plain
    from segkit.models.export import agreement, export
    from segkit.run.saved import check_classes, open_run

    saved = open_run(arguments.run, phase=arguments.phase)
    dataset = dataset_of(saved, arguments)
    split, unreachable = validation_split(dataset)
    if split is not None:
        check_classes(saved, split.classes)
    decision = decision_of(saved, arguments.decision, checkpoint=arguments.checkpoint)
    model, evaluated = (saved.model(arguments.checkpoint) for _ in range(2))
    if decision.name == "bias":
        add_bias(saved, model, decision.bias)
    head = decision.rule.decide if decision.name == "miou" else None
    counts, resize = saved.label_counts(), plain(dataset.eval_resize)
    metadata = {
        "classes": list(counts["classes"]),
        "palette": counts.get("palette"),
        "dataset": dataset.name,
        "resize": resize,
        **decision.protocol(),
    }
    output = arguments.output or saved.folder / f"model.{'onnx' if arguments.format == 'onnx' else 'pt2'}"
    found = export(
        model,
        output,
        format=arguments.format,
        metadata=metadata,
        images=real_images(split, resize),
        head=head,
        predict=predictor(decision, evaluated, "fp32"),
    )
    show(f"written: {output}")
    if split is None:
        show(f"not checked on real images, as there are none: {unreachable} (or give --root)")
        return
    show(
        f"checked on {found.num_images} images of {dataset.val_split}: {100 * found.pixels:.3f} % of the pixels get "
        f"the class of the evaluation in fp32, logits differ by up to {found.difference:.1e} of the largest"
    )
    precision = saved.config.precision.value
    if precision != "fp32":
        same = agreement(output, model, real_images(split, resize), predict=predictor(decision, evaluated, precision))
        show(f"in {precision}, the precision of the run, evaluation gives that class to {100 * same.pixels:.3f} %")


def validation_split(dataset: Any) -> tuple[Any, str]:
    """Return the validation split, or None and a sentence why it cannot be opened."""
    from segkit.run.splits import open_split

    try:
        return open_split(dataset, dataset.val_split), ""
    except InputError as error:
        return None, str(error)


def predictor(decision: Any, model: Any, precision: str) -> Any:
    """Return the function from images to classes that ``segkit evaluate`` computes for whole images."""
    import torch

    from segkit.evaluation.inference import Inference
    from segkit.evaluation.loop import evaluating
    from segkit.training.precision import DTYPES

    wrapped, inference, device = decision.around(model), Inference(decide=decision.decide), torch.device("cpu")

    def predict(images: Any) -> Any:
        with evaluating(wrapped, device, DTYPES[precision]):
            return inference(wrapped, images, (images.shape[-2], images.shape[-1]))

    return predict


def real_images(split: Any, resize: dict[str, Any]) -> Iterator[Any]:
    """Yield up to :data:`NUM_IMAGES` images (H, W, 3) from all over the split, at the size of the evaluation.

    Every second one is cut to odd sides, which no stride divides. None for a split that is not there.
    """
    from segkit.data.transforms import resize_image, target_size

    num_images = min(NUM_IMAGES, len(split)) if split is not None else 0
    for number in range(num_images):
        image = split.image(number * len(split) // num_images)
        image = resize_image(image, target_size(image.shape[:2], resize))
        if number % 2 == 0:
            yield image
        if number % 2 == 1 or num_images == 1:
            yield image[: image.shape[0] - 1 | 1, : image.shape[1] - 1 | 1]
