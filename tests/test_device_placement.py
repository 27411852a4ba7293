"""Where tensors lie on a GPU, and who waits for it, on a machine without one.

torch's fake tensors have a device, a shape and a dtype, and no content: whatever mixes two devices raises, and so does
whatever asks for a value. Here such a question is answered with a value that lets the code go on, and noted with the
function that asked: those that may are listed with the reason, so that no other slips in.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import segkit
from segkit import bilinear, losses
from segkit.bilinear import spans
from segkit.evaluation.confusion import count_images
from segkit.evaluation.decision import BiasedModel
from segkit.evaluation.inference import Inference
from segkit.evaluation.miou_rule import MiouRule, ScaledModel
from segkit.losses.checks import labels_checked
from segkit.losses.diagnostics import margin_sums
from segkit.losses.tiles import read_labels
from segkit.models import COPLENet, Segmenter, deeplabv3plus, enable_grad_checkpointing

PACKAGE = Path(segkit.__file__).parent
K, SIZE = 5, (48, 64)
aten = torch.ops.aten
SPAN = bilinear._span

RANGE = {"losses/checks.py:check_labels"}
"""A label out of range is told with its value; without the question the device would abort the process."""
FINITE = {"evaluation/views.py:forward"}
"""A model whose logits are not finite is told as such, once for each forward pass."""


VALUES = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
ANSWERS = {"evaluation/views.py:forward": True}


class Questions(TorchDispatchMode):
    """Notes in ``asked`` which function of segkit asks for the content of a tensor, or moves it to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        if not on_device:
            return function(*args, **kwargs)
        if function in VALUES:
            return ANSWERS.get(self._note(), 0)
        if function is aten.nonzero.default:
            self._note()
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64, device="cuda")
        if function is aten.bincount.default:  # reads the largest value, to know the size of its result
            self._note()
            return torch.zeros(args[2], dtype=torch.int64, device="cuda")
        if function is aten.index.Tensor and any(item is not None and item.dtype == torch.bool for item in args[1]):
            self._note()
            places = [
                None if item is None else torch.zeros(item.numel(), dtype=torch.int64, device="cuda")
                for item in args[1]
            ]
            return function(args[0], places)
        if function is aten._to_copy.default and "device" in kwargs and kwargs["device"].type == "cpu":
            self._note()
        return function(*args, **kwargs)

    def _note(self) -> str:
        frame = sys._getframe(2)
        while not frame.f_code.co_filename.startswith(str(PACKAGE)):
            assert frame.f_back is not None
            frame = frame.f_back
        name = frame.f_code.co_qualname.split(".<locals>")[0].rpartition(".")[2]
        asker = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{name}"
        self.asked.add(asker)
        return asker


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(f, *modules): what f(modules on a fake GPU) returns, and who asked for values meanwhile."""

    def run(function: Any, *modules: nn.Module) -> tuple[Any, set[str]]:
        mode = FakeTensorMode(allow_non_fake_inputs=False)

        def real_span(*arguments: Any) -> Any:  # small matrices that are computed on the CPU, from real numbers
            with _disable_current_modes():
                span = SPAN(*arguments)
                return span._replace(matrix=mode.from_tensor(span.matrix))

        spans.cache_clear()
        monkeypatch.setattr(bilinear, "_span", real_span)
        for module in modules:
            for part in module.modules():
                for held in (part._parameters, part._buffers):
                    for name, tensor in held.items():
                        if tensor is not None:
                            fake = mode.from_tensor(tensor.detach())
                            with mode:
                                moved = fake.to("cuda")
                            is_parameter = held is part._parameters
                            held[name] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        with mode, Questions() as questions:
            result = function(*modules)
        return result, questions.asked

    yield run
    spans.cache_clear()


def batch(dtype: torch.dtype, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, K, *size, dtype=dtype, device="cuda", requires_grad=True)
    return logits, torch.randint(0, K, (2, *SIZE), device="cuda")


MARGINS = {"rho_k0": [0.1] * K, "rho_0k": [0.1] * K}
LOSSES = {
    "cross-entropy": (lambda: losses.CrossEntropyLoss(compile_tiles=False), RANGE),
    "weighted": (lambda: losses.CrossEntropyLoss(weight=torch.ones(K), compile_tiles=False), RANGE),
    "focal": (lambda: losses.FocalLoss(compile_tiles=False), RANGE),
    "margins": (lambda: losses.MarginCalibrationLoss(**MARGINS, compile_tiles=False), RANGE),
    "reference": (lambda: losses.MarginCalibrationLoss(**MARGINS, form="reference", compile_tiles=False), RANGE),
    "dice": (losses.DiceLoss, RANGE),
    "generalized dice": (losses.GeneralizedDiceLoss, RANGE),
    "tversky": (losses.TverskyLoss, RANGE),
    "jaccard": (losses.JaccardMetricLoss, RANGE),
    # the number of hard pixels decides whether the hardest have to be looked for
    "ohem": (losses.OhemCrossEntropyLoss, RANGE | {"losses/pixelwise.py:forward"}),
    # only pixels that can matter are sorted: how many has to be known; images without a valid pixel are left out
    "lovasz": (
        losses.LovaszSoftmaxLoss,
        RANGE | {f"losses/lovasz.py:{name}" for name in ("value_and_gradient", "probabilities", "above")},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_stays_on_its_device(on_gpu, name):
    make, allowed = LOSSES[name]
    for dtype, size in ((torch.float32, SIZE), (torch.bfloat16, (12, 16))):

        def call(loss: nn.Module, dtype: torch.dtype = dtype, size: tuple[int, int] = size) -> torch.Tensor:
            logits, target = batch(dtype, size)
            return loss(logits, target)

        value, asked = on_gpu(call, make())
        assert (value.device.type, value.shape, value.dtype) == ("cuda", (), torch.float32)
        assert RANGE <= asked <= allowed, asked ^ allowed
        with labels_checked(torch.zeros(2, 2), num_classes=K, ignore_index=255):  # as in training
            assert on_gpu(call, make())[1] == asked - RANGE


def test_the_sums_of_the_margins_stay_on_their_device(on_gpu):
    def call(loss: nn.Module) -> dict[str, torch.Tensor]:
        logits, target = batch(torch.float32, (12, 16))
        return margin_sums(logits, target, rho_k0=loss.rho_k0, rho_0k=loss.rho_0k)

    loss = losses.MarginCalibrationLoss(**MARGINS)
    found, asked = on_gpu(call, loss)
    assert {value.device.type for value in found.values()} == {"cuda"}
    assert asked <= RANGE | {
        f"losses/diagnostics.py:{name}" for name in ("margin_sums", "_histogram")
    }  # one step of many


COUNTED = np.array([True] * (K - 1) + [False])
RULE = MiouRule(np.ones(K), np.zeros(K), np.ones(K) / 2, np.ones(K), COUNTED)
MODELS = {
    "coplenet": lambda: COPLENet(3, K, feature_channels=(4, 8, 16, 32, 64), num_groups=2),
    "deeplabv3plus": lambda: deeplabv3plus("resnet18", K, encoder_weights="none"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_without_a_question(on_gpu, name):
    def call(model: nn.Module) -> torch.Tensor:
        images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, device="cuda")
        images = images.contiguous(memory_format=torch.channels_last)
        return model.train()(images)

    net = MODELS[name]()
    enable_grad_checkpointing(net)
    logits, asked = on_gpu(call, Segmenter(net))
    assert (logits.device.type, asked) == ("cuda", set())


PROTOCOLS = {
    "whole": {},
    "windows": {"window": (32, 32), "overlap": 0.5},
    "everything": {"window": (32, 32), "flip": True, "scales": (0.75, 1.0)},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("decision", ["bias", "miou of some classes"])
def test_inference_stays_on_its_device(on_gpu, protocol, decision):
    net: nn.Module = nn.Conv2d(3, K, 4, stride=4)
    decide = None
    if decision == "bias":
        net = BiasedModel(net, np.zeros(K, np.float32))
    else:
        net, decide = ScaledModel(net, RULE), RULE.scores
    model = Segmenter(net, mean=(0.5,) * 3, std=(0.5,) * 3)

    def call(model: nn.Module) -> torch.Tensor:
        images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, device="cuda")
        with torch.inference_mode():
            return Inference(**PROTOCOLS[protocol], decide=decide)(model, images, (50, 70))

    prediction, asked = on_gpu(call, model)
    assert (prediction.device.type, prediction.shape, prediction.dtype) == ("cuda", (2, 50, 70), torch.uint8)
    assert asked <= FINITE, asked


def test_a_batch_is_counted_with_one_copy_to_the_host(on_gpu):
    """The size of the histogram is asked for inside of torch; then all matrices are copied together."""
    copies = []

    def call() -> None:
        labels = torch.zeros(3, 50, 70, dtype=torch.uint8, device="cuda")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or torch.zeros(tensor.shape))
            patch.setattr(torch.Tensor, "numpy", lambda tensor: np.full((3, K * K + 1), 50 * 70 / (K * K + 1)))
            patch.setattr(torch, "from_numpy", lambda array: array)
            count_images(labels, labels.clone(), num_classes=K, names=["a", "b", "c"])

    _, asked = on_gpu(call)
    assert [(tensor.device.type, tensor.shape) for tensor in copies] == [("cuda", (3, K * K + 1))]
    assert asked == {"evaluation/confusion.py:_byte_histograms"}


def test_labels_on_a_device_are_a_mask(on_gpu):
    labels, asked = on_gpu(lambda: read_labels(torch.zeros(4, 4, dtype=torch.uint8, device="cuda"), 255))
    assert (labels.void.dtype, labels.void.device.type, asked) == (torch.bool, "cuda", set())


def test_a_mixed_device_and_a_question_would_be_seen(on_gpu):
    with pytest.raises(RuntimeError, match="at least two devices"):
        on_gpu(lambda: torch.zeros(3, device="cuda") + torch.zeros(3))
    asked = on_gpu(lambda: losses.checks.check_labels(torch.zeros(2, 2, device="cuda"), num_classes=2, ignore_index=9))
    assert asked[1] == RANGE
