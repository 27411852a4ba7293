"""A trained model as one file that runs without segkit: ONNX, or a program of torch.export.

The graph takes colours from 0 to 255, normalises them, and returns logits at the size of the image, for any batch size,
height and width. Names of classes, palette and normalisation are in the file's metadata.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.nn import functional as F

from segkit.errors import InputError, first_line
from segkit.models.any_size import AnySize, crop_to, padded_size
from segkit.models.coplenet import STRIDE, COPLENet
from segkit.models.segmenter import Segmenter

FORMATS = ("onnx", "torch_export")
INPUT, OUTPUT = "images", "logits"
METADATA_KEY = "segkit"
"""Key of the metadata, a JSON object, in an ONNX file; the name of an extra file in one of torch.export."""
OPSET = 18
TOLERANCE = 1e-3
"""Largest difference of an ONNX graph from its model, relative to the model's largest logit."""
AGREEMENT = 0.999
"""Least share of pixels of real images to which the file must give the class that the model gives."""

Runner = Callable[[torch.Tensor], torch.Tensor]
"""images (N, C, H, W) float32 in 0..255 -> logits (N, K, H, W)"""


@dataclass(frozen=True)
class Agreement:
    """How well a written file and its model agree on real images."""

    num_images: int
    pixels: float
    """Share of all pixels that get the same class"""
    difference: float
    """Largest difference of two logits, relative to the largest logit of the image"""


class WholeImage(nn.Module):
    """Images (N, 3, H, W) float in 0..255 -> logits (N, K, H, W).

    The image is padded here to the multiple that the network wants, the logits are up-sampled by the network's stride
    and cropped. Where the stride divides the image's size, these are the logits of ``segmenter`` interpolated to the
    image; elsewhere they lack the second interpolation with which :mod:`segkit.models.any_size` fits the grid to the
    image, and are a little sharper.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.multiple = size_multiple(segmenter.net)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        normalised = self.segmenter.normalise(images)
        rows, columns = padded_size(height, self.multiple), padded_size(width, self.multiple)
        # Both cuts below remove at least one row and one column, whatever the size: where a cut may remove nothing,
        # the tracer ties the graph to what it did for the example.
        padded = crop_to(F.pad(normalised, (0, self.multiple, 0, self.multiple)), (rows, columns))
        logits = self.segmenter.net(padded)
        whole = F.interpolate(logits.float(), size=(rows, columns), mode="bilinear", align_corners=False)
        return crop_to(F.pad(whole, (0, 1, 0, 1)), (height, width))


def size_multiple(net: nn.Module) -> int:
    """Return what the sides of the input of ``net`` must be multiples of."""
    if isinstance(net, AnySize):
        return net.size_multiple
    return STRIDE if isinstance(net, COPLENet) else 1


def export(
    segmenter: Segmenter,
    path: str | Path,
    *,
    format: str = "onnx",
    metadata: Mapping[str, Any] | None = None,
    images: Iterable[NDArray[np.uint8]] = (),
    opset: int = OPSET,
) -> Agreement:
    """Write ``segmenter`` to ``path`` as a graph with input ``images`` and output ``logits``.

    ``images``: (N, C, H, W) float32 in 0..255, H and W larger than the multiple that the network needs; ``logits``:
    (N, K, H, W) float32. ``format``: ``onnx`` (needs the extra ``export``) or ``torch_export`` (torch.export.load
    reads it). ``metadata``: what else a reader of the file should know, as JSON values: the label table for
    example; normalisation and sizes are added. The file gets its name once it computes what the model does: an ONNX
    graph on noise of an odd size, either kind on the real ``images`` (H, W, C), whose `Agreement` is returned.
    ``segmenter`` itself is not changed.

    InputError for an unknown format, a missing package, a folder that is not there, a network that cannot be traced
    for arbitrary sizes, or a file that does not compute the same.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"the format is {format!r}, but can be {' or '.join(FORMATS)}: give --format onnx")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written, since there is no folder {path.parent}: create it first")
    model = WholeImage(copy.deepcopy(segmenter).cpu()).eval()
    if model.multiple > 1:
        _fix_same_padding(model)
    text = json.dumps({**(metadata or {}), **_facts(model)})
    program = _trace(model)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        if format == "torch_export":
            torch.export.save(program, temporary, extra_files={METADATA_KEY: text})
        else:
            _write_onnx(program, temporary, text, opset=opset)
            _check_noise(temporary, segmenter)
        found = agreement(temporary, segmenter, images)
        if not (found.pixels >= AGREEMENT and found.difference < TOLERANCE):
            raise InputError(
                f"the exported {type(segmenter.net).__name__} gives {100 * found.pixels:.2f} % of the pixels of "
                f"{found.num_images} images the class that the model gives, and its logits differ by "
                f"{found.difference:.3g} of the largest, so it was not kept: give another --format, or choose another "
                "model, such as model=deeplabv3plus"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _check_noise(path: Path, segmenter: Segmenter) -> None:
    difference = largest_difference(path, segmenter)
    if not difference < TOLERANCE:
        raise InputError(
            f"the ONNX graph of {type(segmenter.net).__name__} differs from the model by {difference:.3g} of its "
            "largest logit at a size other than the traced one, so it was not kept: give --format torch_export, or "
            "choose another model, such as model=deeplabv3plus"
        )


class StaticSameConv2d(nn.Conv2d):
    """A convolution with the ``SAME`` padding of TensorFlow for inputs that its stride divides.

    timm computes that padding from the size at hand, which entangles every layer's shape with the image's and makes
    tracing take minutes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            pads = [total // 2, total - total // 2, *pads]  # F.pad begins with the last axis
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _fix_same_padding(model: nn.Module) -> None:
    """Give timm's convolutions with dynamic padding a fixed one; the image is padded to a multiple of all strides."""
    for module in model.modules():
        if type(module).__name__ == "Conv2dSame":
            module.__class__ = StaticSameConv2d


def _facts(model: WholeImage) -> dict[str, Any]:
    """Return what the metadata says of the graph itself."""
    segmenter = model.segmenter
    return {
        "input": INPUT,
        "output": OUTPUT,
        "input_range": [0, 255],
        "mean": list(segmenter.mean),
        "std": list(segmenter.std),
        "normalised_inside": True,
        "size_multiple": model.multiple,
    }


def _trace(model: WholeImage) -> torch.export.ExportedProgram:
    """Return the graph of ``model`` with dynamic batch size, height and width."""
    side = 4 * max(model.multiple, 8)
    # Sizes that are no multiples of each other or of the stride, so that no coincidence ends up in the graph.
    example = torch.linspace(0, 255, 2 * len(model.segmenter.mean) * (side + 6) * (2 * side + 10))
    example = example.reshape(2, -1, side + 6, 2 * side + 10)
    dynamic = torch.export.Dim.AUTO
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about its own internals
            program = torch.export.export(model, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    except Exception as error:  # the tracer's errors share no base class
        raise InputError(
            f"{type(model.segmenter.net).__name__} cannot be exported ({_reason(error)}): choose "
            "another model, such as model=deeplabv3plus"
        ) from error
    shape = next(node for node in program.graph.nodes if node.name == INPUT).meta["val"].shape
    if not all(free_symbols(shape[axis]) for axis in (0, 2, 3)):
        raise InputError(
            f"{type(model.segmenter.net).__name__} can be exported for images of one size only, because its layers "
            "depend on the size: choose another model, such as model=deeplabv3plus"
        )
    return program


def _reason(error: BaseException) -> str:
    """Return the first line of the error that is the cause of all causes of ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, text: str, *, opset: int) -> None:
    """Translate ``program`` to ONNX and write it with the metadata ``text``."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX needs the package {error.name}, which is not installed: pip install 'segkit[export]', or give "
            "--format torch_export"
        ) from None
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it repeats what the error below says
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the translator, about its own internals
            translated = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except Exception as error:  # the translator's errors share no base class
        raise InputError(
            f"the model cannot be translated to ONNX ({_reason(error)}): give --format torch_export, or choose another "
            "model, such as model=deeplabv3plus"
        ) from error
    finally:
        logger.setLevel(level)
    assert translated is not None
    model = translated.model_proto
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, str(path))


def runner(path: str | Path) -> Runner:
    """Return the function in the file ``path``; onnxruntime computes that of an ONNX file."""
    if Path(path).suffix != ".onnx":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def agreement(path: str | Path, segmenter: Segmenter, images: Iterable[NDArray[np.uint8]]) -> Agreement:
    """Compare the file ``path`` with ``segmenter`` on real ``images`` (H, W, C), each at its own size."""
    model, run = WholeImage(copy.deepcopy(segmenter).cpu()).eval(), runner(path)
    num_images = num_pixels = num_equal = 0
    difference = 0.0
    for image in images:
        batch = torch.tensor(image).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            logits, expected = run(batch), model(batch)
        difference = max(difference, _difference(logits, expected))
        num_equal += int((logits.argmax(1) == expected.argmax(1)).sum())
        num_pixels += image.shape[0] * image.shape[1]
        num_images += 1
    return Agreement(num_images, num_equal / num_pixels if num_pixels else 1.0, difference)


def largest_difference(path: str | Path, segmenter: Segmenter, *, seed: int = 0) -> float:
    """Return the largest difference of logits between the ONNX file ``path`` and ``segmenter``, over the largest logit.

    The input is noise, of a batch and size that are neither the traced ones nor multiples of anything. Translators get
    layers wrong silently (adaptive pooling for example becomes a pooling with the window of the traced size), and only
    another size reveals it. Infinite if the graph cannot run there.
    """
    model = WholeImage(copy.deepcopy(segmenter).cpu()).eval()
    side = 5 * max(model.multiple, 8)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, len(segmenter.mean), side + 3, side - 1, generator=generator) * 255
    run = runner(path)
    with torch.no_grad():
        expected = model(images)
    try:
        logits = run(images)
    except Exception:  # the runtime's errors share no public base class
        return float("inf")
    return _difference(logits, expected)


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a file that :func:`export` wrote; InputError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no exported model {path}: write one with segkit export")
    try:
        if path.suffix == ".onnx":
            import onnx

            properties = onnx.load(str(path), load_external_data=False).metadata_props
            text = {item.key: item.value for item in properties}[METADATA_KEY]
        else:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith(f"/{METADATA_KEY}"))
                text = archive.read(name).decode("utf-8")
        return json.loads(text)
    except Exception:  # what the readers of the formats raise for a foreign file is not one family
        raise InputError(f"{path} is not a model that segkit exported: write one with segkit export") from None
