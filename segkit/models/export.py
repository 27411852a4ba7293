"""A trained model as one file that runs without segkit: ONNX, or a program of torch.export.

The graph takes the values of image files (colours from 0 to 255), normalises them, and returns logits at the size of
the image, for any batch size, height and width: those of which evaluation takes the argmax. A decision rule on
probabilities can be part of it. Names of classes, palette and normalisation are in the file's metadata.
"""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx.experimental.symbolic_shapes import free_symbols

from segkit.bilinear import resized_rows
from segkit.errors import InputError, first_line
from segkit.models.exported import INPUT, METADATA_KEY, Runner, check_onnx, root_cause, runner, write_onnx
from segkit.models.segmenter import Segmenter
from segkit.models.whole_image import Head, WholeImage, fix_same_padding, size_multiple

FORMATS = ("onnx", "torch_export")
LOGITS, SCORES, CLASSES = "logits", "scores", "classes"
"""Names of what comes out of a graph: logits, the scores of a decision rule, or the numbers of the classes."""
TOLERANCE = 1e-3
"""Largest difference of an ONNX graph from its model, relative to the model's largest logit."""
AGREEMENT = 0.999
"""Least share of pixels of real images to which the file must give the class that the model gives."""

Predict = Callable[[torch.Tensor], torch.Tensor]
"""images (N, C, H, W) float32 in 0..divisor -> classes (N, H, W)"""


@dataclass(frozen=True)
class Agreement:
    """How well a written file and the evaluation of its model agree on real images."""

    num_images: int
    pixels: float
    """Share of all pixels that get the same class"""
    difference: float
    """Largest difference of two logits (or scores), relative to the largest one of the image; of a file that gives
    classes, the largest share of an image that gets another class"""


def export(
    segmenter: Segmenter,
    path: str | Path,
    *,
    format: str = "onnx",
    metadata: Mapping[str, Any] | None = None,
    images: Iterable[NDArray[Any]] = (),
    head: Head | None = None,
    predict: Predict | None = None,
    classes: bool = False,
) -> Agreement:
    """Write ``segmenter`` to ``path`` as a graph with input ``images`` and output ``logits``.

    ``images``: (N, C, H, W) float32 in 0..divisor; ``logits``: (N, K, H, W) float32, or the output ``scores`` that
    ``head`` computes from them, or with ``classes`` the output ``classes`` (N, H, W), uint8 for up to 256 classes and
    int64 beyond. ``format``: ``onnx`` (needs the extra ``export``) or ``torch_export`` (torch.export.load reads it).
    ``metadata``: what else a reader of the file should know, as JSON values: the label table for
    example; normalisation and sizes are added. The file gets its name once it computes what evaluation does with the
    model: an ONNX graph on noise of an odd size, either kind on the real ``images`` (H, W, C), whose `Agreement` is
    returned. ``predict`` gives the classes of the evaluation (None: from the logits of ``segmenter``, interpolated as
    :mod:`segkit.bilinear` does it, and ``head``). ``segmenter`` itself is not changed.

    InputError for an unknown format, a missing package, a folder that is not there, a network that cannot be traced
    for arbitrary sizes, or a file that does not compute the same.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"the format is {format!r}, but can be {' or '.join(FORMATS)}: give --format onnx")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written, since there is no folder {path.parent}: create it first")
    if format == "onnx":
        check_onnx()
    plain = copy.deepcopy(segmenter).cpu()
    for parameter in plain.parameters():  # channels-last ones are no whole tensors for torch.export
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    model = WholeImage(plain, head, classes=classes).eval()
    if model.multiple > 1:
        fix_same_padding(model)
    text = json.dumps({**(metadata or {}), **_facts(model)})
    program = _trace(model)
    temporary = path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")
    try:
        if format == "torch_export":
            _save(program, temporary, text)
        else:
            write_onnx(program, temporary, text, output=_output(model))
            _check_noise(temporary, segmenter, head)
        found = agreement(temporary, segmenter, images, head=head, predict=predict)
        if not (found.pixels >= AGREEMENT and found.difference < TOLERANCE):
            raise InputError(
                f"the exported {type(segmenter.net).__name__} gives {100 * found.pixels:.2f} % of the pixels of "
                f"{found.num_images} images the class that evaluation gives, and its logits differ by "
                f"{found.difference:.3g} of the largest, so it was not kept: give another --format, or choose another "
                "model, such as model=deeplabv3plus"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _check_noise(path: Path, segmenter: Segmenter, head: Head | None) -> None:
    difference = largest_difference(path, segmenter, head=head)
    same = 1.0
    if head is not None:  # its scores may be of very different sizes, so that the largest says little
        noise = torch.randint(0, 256, (67, 45, len(segmenter.mean)), generator=torch.Generator().manual_seed(0))
        same = agreement(path, segmenter, [(noise * (segmenter.divisor / 255)).numpy()], head=head).pixels
    if not (difference < TOLERANCE and same >= AGREEMENT):
        raise InputError(
            f"the ONNX graph of {type(segmenter.net).__name__} differs from the model by {difference:.3g} of its "
            "largest logit at a size other than the traced one, so it was not kept: give --format torch_export, or "
            "choose another model, such as model=deeplabv3plus"
        )


def _facts(model: WholeImage) -> dict[str, Any]:
    """Return what the metadata says of the graph itself."""
    segmenter = model.segmenter
    return {
        "input": INPUT,
        "output": _output(model),
        "input_range": [0, round(segmenter.divisor)] if segmenter.divisor > 1 else None,
        "mean": list(segmenter.mean),
        "std": list(segmenter.std),
        "normalised_inside": True,
        "size_multiple": model.multiple,
    }


def _output(model: WholeImage) -> str:
    return CLASSES if model.classes else LOGITS if model.head is None else SCORES


def _trace(model: WholeImage) -> torch.export.ExportedProgram:
    """Return the graph of ``model`` with dynamic batch size, height and width."""
    side = 4 * max(model.multiple, 8)
    # Sizes that are no multiples of each other or of the stride, so that no coincidence ends up in the graph.
    example = torch.linspace(0, model.segmenter.divisor, 2 * len(model.segmenter.mean) * (side + 6) * (2 * side + 10))
    example = example.reshape(2, -1, side + 6, 2 * side + 10)
    dynamic = torch.export.Dim.AUTO
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about its own internals
            program = torch.export.export(model, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    except Exception as error:  # the tracer's errors share no base class
        raise InputError(
            f"{type(model.segmenter.net).__name__} cannot be exported ({root_cause(error)}): choose "
            "another model, such as model=deeplabv3plus"
        ) from error
    shape = next(node for node in program.graph.nodes if node.name == INPUT).meta["val"].shape
    if not all(free_symbols(shape[axis]) for axis in (0, 2, 3)):
        raise InputError(
            f"{type(model.segmenter.net).__name__} can be exported for images of one size only, because its layers "
            "depend on the size: choose another model, such as model=deeplabv3plus"
        )
    return program


def _save(program: torch.export.ExportedProgram, path: Path, text: str) -> None:
    content = io.BytesIO()  # torch's own writing to a disk that is full ends the process
    try:
        torch.export.save(program, content, extra_files={METADATA_KEY: text})
    except Exception as error:  # of an operation that the format does not know; they share no base class
        raise InputError(
            f"torch cannot write the program of the model ({first_line(error)}): give --format onnx, or take another "
            "model, such as model=deeplabv3plus"
        ) from error
    path.write_bytes(content.getbuffer())


def _as_evaluated(segmenter: Segmenter, head: Head | None) -> Runner:
    """Return the function that evaluation computes: the logits of ``segmenter``, interpolated to the image's size."""
    model = copy.deepcopy(segmenter).cpu().eval()

    def run(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        logits = resized_rows(model(images).float(), (height, width), slice(0, height))
        return logits if head is None else head(logits)

    return run


def agreement(
    path: str | Path | Runner,
    segmenter: Segmenter,
    images: Iterable[NDArray[Any]],
    *,
    head: Head | None = None,
    predict: Predict | None = None,
) -> Agreement:
    """Compare the file ``path`` with the evaluation of ``segmenter`` on ``images`` (H, W, C), each at its own size.

    A function of the same kind may stand for the file. ``predict`` and ``head`` are those of :func:`export`.
    """
    evaluated, run = _as_evaluated(segmenter, head), path if callable(path) else runner(path)
    num_images = num_pixels = num_equal = 0
    difference = 0.0
    for image in images:
        batch = torch.tensor(image).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            logits, expected = _computed(run, batch), evaluated(batch)
            classes = expected.argmax(1) if predict is None else predict(batch)
        difference = float(np.maximum(difference, _difference(logits, expected)))  # NaN stays
        num_equal += int(((logits if logits.dim() == 3 else logits.argmax(1)) == classes).sum())
        num_pixels += image.shape[0] * image.shape[1]
        num_images += 1
    return Agreement(num_images, num_equal / num_pixels if num_pixels else 1.0, difference)


def _computed(run: Runner, batch: torch.Tensor) -> torch.Tensor:
    """Return what a file computes of ``batch``; InputError if it cannot: a program may not take small images."""
    try:
        return run(batch)
    except AssertionError as error:  # of a guard in the program
        raise InputError(
            f"the file that was traced cannot compute an image of {batch.shape[-2]} x {batch.shape[-1]} pixels (height "
            f"x width; {first_line(error)}), so it was not kept: give --format onnx, or hub, which traces nothing"
        ) from None


def largest_difference(path: str | Path, segmenter: Segmenter, *, head: Head | None = None) -> float:
    """Return the largest difference of logits, or of scores of ``head``, between a file and the evaluation.

    It is relative to the largest one of ``segmenter``; of a file that gives classes, the share of pixels that get
    another one. The input is noise, of a batch and size that are neither the traced ones nor multiples of anything.
    Translators get layers wrong silently (adaptive pooling for example becomes a pooling with the window of the traced
    size), and only another size reveals it. Infinite if the graph cannot run.
    """
    evaluated = _as_evaluated(segmenter, head)
    side = 5 * max(size_multiple(segmenter.net), 8)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, len(segmenter.mean), side + 3, side - 1, generator=generator) * segmenter.divisor
    run = runner(path)
    with torch.no_grad():
        expected = evaluated(images)
    try:
        logits = run(images)
    except Exception:  # the runtime's errors share no public base class
        return float("inf")
    return _difference(logits, expected)


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    if logits.dim() == 3:
        return (logits != expected.argmax(1)).float().mean().item()
    return ((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
