"""A trained model as one file that runs without segkit: ONNX, or a program of torch.export.

The graph takes colours from 0 to 255, normalises them, and returns logits at the size of the image, for any batch size,
height and width: those of which evaluation takes the argmax. A decision rule on probabilities can be part of it. Names
of classes, palette and normalisation are in the file's metadata.
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

from segkit.bilinear import resized_rows
from segkit.errors import InputError, first_line
from segkit.models.any_size import AnySize, crop_to, padded_size
from segkit.models.coplenet import STRIDE, COPLENet
from segkit.models.segmenter import Segmenter

FORMATS = ("onnx", "torch_export")
INPUT, LOGITS, SCORES = "images", "logits", "scores"
"""Names of what goes into a graph and of what comes out: logits, or the scores of a decision rule."""
METADATA_KEY = "segkit"
"""Key of the metadata, a JSON object, in an ONNX file; the name of an extra file in one of torch.export."""
OPSET = 18
TOLERANCE = 1e-3
"""Largest difference of an ONNX graph from its model, relative to the model's largest logit."""
AGREEMENT = 0.999
"""Least share of pixels of real images to which the file must give the class that the model gives."""

Runner = Callable[[torch.Tensor], torch.Tensor]
"""images (N, C, H, W) float32 in 0..255 -> logits (N, K, H, W), or scores"""
Head = Callable[[torch.Tensor], torch.Tensor]
"""logits (N, K, H, W) -> scores (N, K, H, W) whose argmax is the class"""
Predict = Callable[[torch.Tensor], torch.Tensor]
"""images (N, C, H, W) float32 in 0..255 -> classes (N, H, W)"""


@dataclass(frozen=True)
class Agreement:
    """How well a written file and the evaluation of its model agree on real images."""

    num_images: int
    pixels: float
    """Share of all pixels that get the same class"""
    difference: float
    """Largest difference of two logits (or scores), relative to the largest one of the image"""


class WholeImage(nn.Module):
    """Images (N, 3, H, W) float in 0..255 -> logits (N, K, H, W), those that evaluation makes of ``segmenter``.

    The image is padded here to the multiple that the network wants; its logits are fitted to the image as
    :mod:`segkit.models.any_size` does it, and interpolated to the size of the image. ``head``: what is computed from
    them, the scores of a decision rule for example.
    """

    def __init__(self, segmenter: Segmenter, head: Head | None = None) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.head = head
        self.multiple = size_multiple(segmenter.net)
        self.stride = _stride(segmenter, self.multiple)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        whole = self._logits(images)
        return whole if self.head is None else self.head(whole)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        images = self.segmenter.normalise(images)
        if self.multiple > 1:
            # The cuts here and below remove at least one row and one column, whatever the size: where a cut may remove
            # nothing, the tracer ties the graph to what it did for the example.
            padded = padded_size(height, self.multiple), padded_size(width, self.multiple)
            images = crop_to(F.pad(images, (0, self.multiple, 0, self.multiple)), padded)
        logits = self.segmenter.net(images).float()
        if self.stride == 1:
            return crop_to(F.pad(logits, (0, 1, 0, 1)), (height, width))
        if self.multiple > 1:
            logits = _fitted(_fitted(logits, -2, height, stride=self.stride), -1, width, stride=self.stride)
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def _fitted(logits: torch.Tensor, axis: int, extent: int, *, stride: int) -> torch.Tensor:
    """Return ``logits`` sampled along ``axis`` at ceil(extent / stride) cells that cover ``extent`` pixels exactly.

    The same as :func:`segkit.models.any_size.fit_logits`, in operations that can be traced for any ``extent``.
    """
    cells = torch.arange((extent + stride - 1) // stride, device=logits.device)
    position = ((cells.double() + 0.5) * extent / (stride * ((extent + stride - 1) // stride)) - 0.5).clamp(min=0)
    left = position.long()
    right = torch.minimum(left + 1, cells[-1])
    shape = [1] * logits.dim()
    shape[axis] = -1
    share = (position - left).to(logits.dtype).view(shape)
    lower = logits.index_select(axis, left)
    return lower + share * (logits.index_select(axis, right) - lower)


def _stride(segmenter: Segmenter, multiple: int) -> int:
    """Return the stride of the logits of a network that pads its images to ``multiple``; 0 for one that does not."""
    if multiple == 1:
        return 0
    net = segmenter.net
    was_training, parameter = net.training, next(net.parameters(), torch.zeros(()))
    net.eval()
    with torch.no_grad():
        logits = net(torch.zeros(1, len(segmenter.mean), 4 * multiple, 4 * multiple, device=parameter.device))
    net.train(was_training)
    return 4 * multiple // logits.shape[-2]


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
    head: Head | None = None,
    predict: Predict | None = None,
    opset: int = OPSET,
) -> Agreement:
    """Write ``segmenter`` to ``path`` as a graph with input ``images`` and output ``logits``.

    ``images``: (N, C, H, W) float32 in 0..255; ``logits``: (N, K, H, W) float32, or the output ``scores`` that ``head``
    computes from them. ``format``: ``onnx`` (needs the extra ``export``) or ``torch_export`` (torch.export.load
    reads it). ``metadata``: what else a reader of the file should know, as JSON values: the label table for
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
    model = WholeImage(copy.deepcopy(segmenter).cpu(), head).eval()
    if model.multiple > 1:
        _fix_same_padding(model)
    text = json.dumps({**(metadata or {}), **_facts(model)})
    program = _trace(model)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        if format == "torch_export":
            torch.export.save(program, temporary, extra_files={METADATA_KEY: text})
        else:
            _write_onnx(program, temporary, text, output=_output(model), opset=opset)
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
        same = agreement(path, segmenter, [noise.to(torch.uint8).numpy()], head=head).pixels
    if not (difference < TOLERANCE and same >= AGREEMENT):
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
        "output": _output(model),
        "input_range": [0, 255],
        "mean": list(segmenter.mean),
        "std": list(segmenter.std),
        "normalised_inside": True,
        "size_multiple": model.multiple,
    }


def _output(model: WholeImage) -> str:
    return LOGITS if model.head is None else SCORES


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


def _write_onnx(program: torch.export.ExportedProgram, path: Path, text: str, *, output: str, opset: int) -> None:
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
                program, dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[output], verbose=False
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
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _as_evaluated(segmenter: Segmenter, head: Head | None) -> Runner:
    """Return the function that evaluation computes: the logits of ``segmenter``, interpolated to the image's size."""
    model = copy.deepcopy(segmenter).cpu().eval()

    def run(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        logits = resized_rows(model(images).float(), (height, width), slice(0, height))
        return logits if head is None else head(logits)

    return run


def agreement(
    path: str | Path,
    segmenter: Segmenter,
    images: Iterable[NDArray[np.uint8]],
    *,
    head: Head | None = None,
    predict: Predict | None = None,
) -> Agreement:
    """Compare the file ``path`` with the evaluation of ``segmenter`` on ``images`` (H, W, C), each at its own size.

    ``predict`` and ``head`` are those of :func:`export`.
    """
    evaluated, run = _as_evaluated(segmenter, head), runner(path)
    num_images = num_pixels = num_equal = 0
    difference = 0.0
    for image in images:
        batch = torch.tensor(image).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            logits, expected = run(batch), evaluated(batch)
            classes = expected.argmax(1) if predict is None else predict(batch)
        difference = max(difference, _difference(logits, expected))
        num_equal += int((logits.argmax(1) == classes).sum())
        num_pixels += image.shape[0] * image.shape[1]
        num_images += 1
    return Agreement(num_images, num_equal / num_pixels if num_pixels else 1.0, difference)


def largest_difference(path: str | Path, segmenter: Segmenter, *, head: Head | None = None, seed: int = 0) -> float:
    """Return the largest difference of logits, or of scores of ``head``, between a file and the evaluation.

    It is relative to the largest one of ``segmenter``. The input is noise, of a batch and size that are neither the
    traced ones nor multiples of anything. Translators get layers wrong silently (adaptive pooling for example becomes a
    pooling with the window of the traced size), and only another size reveals it. Infinite if the graph cannot run.
    """
    evaluated = _as_evaluated(segmenter, head)
    side = 5 * max(size_multiple(segmenter.net), 8)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, len(segmenter.mean), side + 3, side - 1, generator=generator) * 255
    run = runner(path)
    with torch.no_grad():
        expected = evaluated(images)
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
