"""``segkit export``: a trained run as a file or folder that travels without it."""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segkit import __version__
from segkit.commands.options import add_shared, check_writable, dataset_of, verb_parser
from segkit.errors import InputError
from segkit.progress import show

NUM_IMAGES = 4
"""Real images on which the file is compared with the model."""
FORMATS = {"onnx": "model.onnx", "torch_export": "model.pt2", "safetensors": "model.safetensors", "hub": "hub"}
"""Format -> name of the file or folder in the run folder"""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "export",
        "Write a trained model as a graph for any batch size, height and width (ONNX, torch.export), as its weights "
        "(safetensors), or as a folder with weights, configuration and model card (hub).",
        example="outputs/camvid/RUN --format onnx",
    )
    add_shared(verb, "run", "--phase", "--trust")
    verb.add_argument("--format", default="onnx", choices=list(FORMATS), help="kind of file")
    verb.add_argument(
        "--output", type=Path, metavar="FILE", help="file, or folder of hub (default: RUN/model.onnx, ...)"
    )
    verb.add_argument("--classes", action="store_true", help="the graph returns the number of the class, not logits")
    decision = {"help": "put the decision that segkit evaluate has fitted into the file"}
    root = {"help": "folder of the data set, on whose images the file is checked (default: where it was in training)"}
    add_shared(verb, "--checkpoint", "--decision", "--root", decision=decision, root=root)
    return verb


def run(argv: Sequence[str]) -> None:
    """Write the file or folder, and print how well it agrees with the model."""
    arguments = parser().parse_args(argv)
    is_graph = arguments.format in ("onnx", "torch_export")
    if arguments.classes and not is_graph:
        raise InputError(f"--classes is for a graph, not for --format {arguments.format}: leave it out")
    from segkit.commands.decision import add_bias, model_and_decision
    from segkit.models.export import agreement, export
    from segkit.run.portable import check_folder, facts_of
    from segkit.run.saved import check_classes, open_run

    saved = open_run(arguments.run, phase=arguments.phase)
    arguments.output = output = arguments.output or saved.folder / FORMATS[arguments.format]
    endings = {name: Path(place).suffix for name, place in FORMATS.items()}
    if output.suffix != (ending := endings[arguments.format]) and (ending or output.suffix in endings.values()):
        wanted = f"end with {ending}" if ending else "not end as a file of another format"
        raise InputError(f"--output is {output}, but must {wanted} for --format {arguments.format}")
    if arguments.format == "hub":
        check_folder(output)
    else:
        check_writable(arguments, "output")
    dataset = dataset_of(saved, arguments)
    split, unreachable = validation_split(dataset, given=arguments.root is not None)
    if split is not None:
        check_classes(saved, split.classes)
    model, decision = model_and_decision(saved, arguments.decision, checkpoint=arguments.checkpoint)
    evaluated = copy.deepcopy(model)
    if decision.bias is not None:
        add_bias(saved, model, decision.bias)
    described = facts_of(saved, checkpoint=arguments.checkpoint, decision=decision.protocol())
    facts = {"segkit": __version__, **described}
    head = None if decision.rule is None else decision.rule.decide
    expected, images = predictor(decision, evaluated, "fp32"), list(real_images(split, facts["resize"]))
    if is_graph:
        options = {"format": arguments.format, "classes": arguments.classes, "head": head, "predict": expected}
        found, written = export(model, output, metadata=facts, images=images, **options), output
    else:
        if decision.rule is not None:
            facts["rule"] = decision.rule.to_json(facts["classes"])
        written = write_portable(arguments, output, model, facts)
        found = agreement(written, model, images, head=head, predict=expected)
    show(f"written: {output}")
    if split is None:
        show(f"not checked on real images, as there are none: {unreachable} (or give --root)")
        return
    differ = f", logits differ by up to {found.difference:.1e} of the largest"
    show(
        f"checked on {found.num_images} images of {dataset.val_split}: {100 * found.pixels:.3f} % of the pixels get "
        f"the class of the evaluation in fp32{differ if is_graph and not arguments.classes else ''}"
    )
    precision = saved.config.precision.value
    if precision != "fp32":
        same = agreement(written, model, images, predict=predictor(decision, evaluated, precision))
        show(f"in {precision}, the precision of the run, evaluation gives that class to {100 * same.pixels:.3f} %")


def write_portable(arguments: Namespace, output: Path, model: Any, facts: dict[str, Any]) -> Any:
    """Write weights and facts; return the function from images to classes of the model that is read again."""
    import torch

    from segkit.commands.decision import exported
    from segkit.run.portable import open_portable, write_file, write_folder

    (write_folder if arguments.format == "hub" else write_file)(output, model, facts)
    opened, _, again = open_portable(output)
    state = model.state_dict()
    if any(not torch.equal(value, state[name]) for name, value in again.state_dict().items()):
        raise InputError(f"{output} does not hold the weights of the model: write it again, elsewhere")
    return predictor(exported(opened), again, "fp32")


def validation_split(dataset: Any, *, given: bool) -> tuple[Any, str]:
    """Return the validation split, or None and a sentence why it cannot be opened, which a ``given`` folder must."""
    from segkit.run.splits import open_split

    try:
        return open_split(dataset, dataset.val_split), ""
    except InputError as error:
        if given:
            raise
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
    """Yield up to :data:`NUM_IMAGES` images (H, W, C) from all over the split, at the size of the evaluation.

    Every second one is cut to odd sides, which no stride divides. Nothing comes of a split that is None.
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
