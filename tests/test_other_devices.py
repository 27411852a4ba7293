"""GPUs that are not NVIDIA's, on a machine without one: what is refused, and what must not reach them."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import segkit
from segkit import bilinear, losses
from segkit.config.compose import compose
from segkit.config.schema import Precision
from segkit.errors import InputError
from segkit.guard import explain
from segkit.losses import summarise
from segkit.losses.diagnostics import margin_sums
from segkit.models.any_size import fit_logits
from segkit.run import hardware
from segkit.run.build import build_optimizer
from segkit.runtime import resolve_device

PACKAGE = Path(segkit.__file__).parent
MPS = torch.device("mps")
HAS_MPS = torch.backends.mps.is_available()

CUDA = {
    "runtime.py": "which devices there are, and their names",
    "memory.py": "how much memory they have",
    "data/loader.py": "pinned memory",
    "training/distributed.py": "one GPU a process",
    "training/step.py": "an event that says when a copy is whole",
    "run/hardware.py": "what a generation computes fast",
    "run/auto_batch.py": "memory that was measured is given back",
}
"""Files that may call torch.cuda, and what for; each asks for the type of the device first, or whether there is one."""


def test_torch_cuda_is_called_in_few_places():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "cuda":
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == CUDA.keys()


@pytest.mark.skipif(HAS_MPS, reason="this machine has one")
def test_a_gpu_of_apples_is_refused_where_there_is_none():
    with pytest.raises(InputError, match=r"device is 'mps', but no GPU of Apple's is to be had here: set device=auto"):
        resolve_device("mps")
    with pytest.raises(InputError, match=r"device is 'xpu', but must be auto, cpu, cuda, cuda:N or mps"):
        resolve_device("xpu")


def test_what_apples_gpus_compute_with():
    config = compose(["device=mps", "model=deeplabv3plus_tiny"])
    chosen, reasons = hardware.choose(config, begun=None, device=MPS)
    assert (chosen.precision.value, chosen.channels_last) == ("fp32", False)
    assert reasons["precision"] == "a GPU of Apple's"
    halves = {precision: dataclasses.replace(config, precision=precision) for precision in Precision}
    assert hardware.choose(halves[Precision.bf16], begun=None, device=MPS)[0].precision is Precision.bf16
    with pytest.raises(InputError, match="precision is fp16, but device=mps takes fp32 or bf16: set precision=fp32"):
        hardware.choose(halves[Precision.fp16], begun=None, device=MPS)


def on_fake_mps(module: nn.Module) -> tuple[FakeTensorMode, nn.Module]:
    """``module`` with parameters and buffers that have the device, and no content."""
    mode = FakeTensorMode()
    with mode:
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="mps")
                        held[name] = nn.Parameter(empty) if held is part._parameters else empty
    return mode, module


def test_an_optimizer_is_fused_where_that_is_tried():
    config = compose(["model=deeplabv3plus_tiny"])
    assert build_optimizer(config, nn.Linear(2, 2), None).param_groups[0]["fused"]
    mode, net = on_fake_mps(nn.Linear(2, 2))
    with mode:
        assert not build_optimizer(config, net, None).param_groups[0].get("fused")


SUMS = ("pixels", "margin", "loss_k0", "loss_0k", "loss_k0_fixed", "loss_0k_fixed", "inside_k0", "inside_0k")


def test_nothing_of_float64_reaches_a_gpu_of_apples():
    assert bilinear.widest(torch.device("cpu")) == bilinear.widest(None) == torch.float64
    assert bilinear.widest(MPS) == torch.float32
    with FakeTensorMode():
        logits = torch.empty(2, 4, 9, 13, device="mps")
        found = [
            fit_logits(logits, padded=(72, 104), size=(67, 97)),
            *bilinear.taps(slice(0, 9), ratio=0.7, num_in=5, device=MPS),
            *summarise(dict.fromkeys(SUMS, torch.empty(4, device="mps")), class_pixels=[1, 2, 3, 4]).values(),
        ]
        for tensor in found:
            assert tensor.device.type == "mps"
            assert tensor.dtype in (torch.float32, torch.int64)


def test_taps_in_float32_are_those_in_float64():
    for outputs, ratio, num_in in ((slice(0, 2048), 0.25, 512), (slice(100, 1025), 129 / 1025, 129)):
        exact = bilinear.taps(outputs, ratio=ratio, num_in=num_in)
        places = torch.arange(outputs.start, outputs.stop, dtype=torch.float32)
        rounded = ((places + 0.5) * ratio - 0.5).clamp(0, num_in - 1)
        position = exact.left.double() + exact.share
        assert (rounded.double() - position).abs().max() < 1e-3  # of a cell


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device. More text"),
        TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"),
    ],
)
def test_what_torch_has_not_got_there_is_said_in_one_sentence(error):
    sentence, code = explain(error)
    assert code == 2
    assert str(error).splitlines()[0] in sentence
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in sentence
    assert explain(TypeError("something else")) == (None, 1)


@pytest.mark.mps
@pytest.mark.skipif(not HAS_MPS, reason="no GPU of Apple's")
def test_steps_on_a_gpu_of_apples_are_those_on_the_cpu():
    values = {}
    for device in ("cpu", "mps"):
        torch.manual_seed(0)
        net, images = nn.Conv2d(3, 5, 8, stride=8), torch.rand(2, 3, 64, 96)
        target = torch.randint(0, 5, (2, 64, 96))
        net, images, target = net.to(device), images.to(device), target.to(device)
        loss = losses.MarginCalibrationLoss(rho_k0=[0.1] * 5, rho_0k=[0.1] * 5).to(device)
        value = loss(net(images), target)
        value.backward()
        sums = margin_sums(net(images).detach(), target)
        values[device] = [value.detach().cpu(), net.weight.grad.cpu(), *(item.cpu().float() for item in sums.values())]
    for one, other in zip(*values.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
