"""``segkit predict``: label images and overlays for any pictures."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segkit.commands.options import INFERENCE, add_shared, inference, verb_parser
from segkit.config.dataset import RGB
from segkit.errors import InputError
from segkit.progress import show, track


def parser(*, files: bool = True) -> ArgumentParser:
    """Return the parser of the verb's arguments; without ``files`` only of those that change the labels."""
    verb = verb_parser(
        "predict",
        "Predict image files: label PNGs, colour overlays with a legend, probabilities.",
        example="outputs/camvid/RUN --input photos --output predictions",
    )
    add_shared(verb, "run", run={"help": "a run folder, or what segkit export wrote: a folder or a file"})
    if files:
        images = {"metavar": "DIR|FILE|GLOB", "help": "images: a folder, a file, or a pattern in quotes"}
        verb.add_argument("--input", required=True, **images)
        verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
        verb.add_argument("--side-by-side", type=Path, metavar="RUN2", help="another run, to compare with the first")
        verb.add_argument("--probabilities", action="store_true", help="also write class probabilities (NPZ)")
    precision = {"default": "fp32", "help": "of the forward pass"}
    trust = {"help": "packages of your own that the model comes from, torch_export for a .pt2 file (default: none)"}
    shared = ("--phase", "--checkpoint", "--trust", "--decision", "--precision", "--device", "--max-pixels")
    add_shared(verb, *shared, *INFERENCE, precision=precision, trust=trust)
    return verb


def run(argv: Sequence[str]) -> None:
    """Predict all images; exit code 1 if one could not be read."""
    arguments = parser().parse_args(argv)
    from segkit.commands.scorers import check_alike, load
    from segkit.data.decode import orientation
    from segkit.data.files import find_images, walk
    from segkit.data.layout import UNREAD
    from segkit.evaluation.predict import check_output, predict_files
    from segkit.files import check_place, remove_if_empty, written_beside
    from segkit.guard import with_options
    from segkit.runtime import resolve_device

    device = resolve_device(arguments.device)
    was_there = arguments.output.exists()
    check_place(arguments.output)
    check_output(arguments.output)
    images = find_images(arguments.input, output=arguments.output)
    if arguments.side_by_side:
        check_alike(arguments)
    first = load(arguments.run, arguments, device)
    chosen = inference(arguments, first.dataset.crop)
    models = {title(arguments.run): first}
    if arguments.side_by_side:
        other = load(arguments.side_by_side, arguments, device)
        check_alike(arguments, [first, other])
        models[title(arguments.side_by_side) + " "] = other  # the blank tells runs of one title apart
    num_written, failed = predict_files(
        {name: model.predictor(chosen, arguments.precision) for name, model in models.items()},
        images,
        arguments.output,
        read_image=first.read,
        written_beside=written_beside,
        classes=first.classes,
        palette=first.palette,
        probabilities=arguments.probabilities,
        progress=lambda names: track(names, description="predicting", unit="images"),
    )
    for _, reason in failed:
        show(f"skipped: {with_options(reason, 'predict')}", error=True)
    if not num_written and not was_there:
        remove_if_empty(arguments.output)
    show(f"written: {num_written} predictions" + f" in {arguments.output}" * (num_written > 0))
    if unread := walk(Path(arguments.input), UNREAD) if Path(arguments.input).is_dir() else []:
        show(f"note: {len(unread)} images were left out, as their form is not read: {unread[0]} for one", error=True)
    turned = sum(orientation(path) != 1 for path in images.values())
    if turned:
        show(
            f"note: {turned} of the images have an orientation tag, which is ignored as in training: the results match "
            "the pixels as they are stored",
            error=True,
        )
    sys.exit(1 if failed else 0)


def labels(images: Iterable[Any], arguments: Namespace) -> list[np.ndarray]:
    """Return the class map (H, W) of each of ``images``, paths or arrays (H, W, C) of what the model was trained on.

    Those of a list are all looked at before the first is predicted.
    """
    from segkit.commands.scorers import load
    from segkit.runtime import resolve_device

    model = load(arguments.run, arguments, resolve_device(arguments.device))
    kind = model.dataset.kind
    if isinstance(images, list | tuple):
        for image in images:
            _image_of(image, kind)
    predictor = model.predictor(inference(arguments, model.dataset.crop), arguments.precision)
    return [
        predictor.labels(model.read(found) if isinstance(found, Path) else found)
        for found in (_image_of(image, kind) for image in images)
    ]


def _image_of(image: Any, kind: tuple[int, str]) -> Path | np.ndarray:
    """Return ``image`` as the path of a file, or as an array (H, W, C) of ``kind``; InputError if it is neither."""
    from segkit.data.bands import check_bands

    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        if not path.is_file():
            cure = "it is a folder: give a list of the files in it" if path.is_dir() else "correct its path"
            raise InputError(f"there is no image file {path}: {cure}")
        return path
    if (mode := getattr(image, "mode", None)) in ("YCbCr", "LAB", "HSV", "CMYK"):
        raise InputError(f"an image of Pillow has the mode {mode}, whose bands are other colours: give .convert('RGB')")
    if np.ma.is_masked(image):
        raise InputError("an image is an array with masked pixels, which have no value: give .filled(0) of it")
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"an image is a {type(image).__name__}, which is no array ({error}): convert it") from None
    if array.ndim != 3 or (array.shape[2], array.dtype) != kind or not array.size:
        raise InputError(
            f"an image is a {type(image).__name__} of {array.dtype} of the shape {array.shape}, but must be a path, or "
            f"{kind[1]}{' RGB' if kind == RGB else ''} of the shape (H, W, {kind[0]}): convert it"
        )
    check_bands(array, f"of {type(image).__name__}", kind)
    return array


def title(run: Path) -> str:
    """Return a short name for a run: what its folder says about model and loss."""
    return run.resolve().parent.name if (run / "config.yaml").is_file() else run.stem
