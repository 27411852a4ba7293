"""Normalisation of the input, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segkit.errors import InputError
from segkit.models import COPLENet, Segmenter, grouped
from segkit.models.grouped import ByPhases, InFloat32, fit_for_cpu
from segkit.models.segmenter import normalisation


def reference(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    shape = (1, -1, 1, 1)
    mean64, std64 = (torch.tensor(values, dtype=torch.float64).view(shape) for values in (mean, std))
    return (images.double() / 255 - mean64) / std64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_normalises(dtype: torch.dtype) -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    images = torch.randint(0, 256, (2, 3, 5, 7)).to(dtype)
    seen = Segmenter(nn.Identity(), mean=mean, std=std)(images)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen.double(), reference(images, mean, std), rtol=0, atol=2e-6)


def test_defaults() -> None:
    assert Segmenter(nn.Identity()).mean == (0.485, 0.456, 0.406)
    net = nn.Identity()
    net.input_mean, net.input_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    assert Segmenter(net).std == (0.25, 0.25, 0.25)
    assert Segmenter(net, mean=(0.0, 0.0, 0.0)).mean == (0.0, 0.0, 0.0)


def test_state_dict_is_that_of_the_net() -> None:
    net = nn.Conv2d(3, 2, 1)
    segmenter = Segmenter(net)
    assert list(segmenter.state_dict()) == ["net.weight", "net.bias"]
    assert segmenter.net is net
    assert {name for name, _ in segmenter.named_buffers()} == {"scale", "shift"}


def test_keeps_the_memory_format() -> None:
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert Segmenter(nn.Identity())(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,), (0.5, 0.5, 0.5)),
        ((0.5,) * 3, (0.5, 0.5, 0.0)),
        ((0.5,) * 3, (0.5, 0.5, float("inf"))),
        ((0.5, 0.5, float("nan")), (0.2,) * 3),
        ((123.0, 116.0, 103.0), (0.2,) * 3),
    ],
)
def test_bad_values(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"model\.mean is .* the model wants 3 values each, for colours from 0 to 1"):
        Segmenter(COPLENet(3, 2, feature_channels=(8, 16, 32, 64, 128)), mean=mean, std=std)


@pytest.mark.parametrize(
    ("encoder", "mean"),
    [
        ("se_resnext50_32x4d", (0.485, 0.456, 0.406)),
        ("resnet18", (0.485, 0.456, 0.406)),
        ("inceptionv4", (0.5, 0.5, 0.5)),
        ("tu-tf_efficientnet_lite0", (0.5, 0.5, 0.5)),
        ("tu-regnetx_002", (0.485, 0.456, 0.406)),
        ("tu-vit_tiny_patch16_224", (0.5, 0.5, 0.5)),
    ],
)
def test_normalisation_of_encoders(encoder: str, mean: tuple[float, ...]) -> None:
    assert normalisation(encoder)[0] == mean


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("step", [4, 20, 40])
@pytest.mark.parametrize(("groups", "channels"), [(4, 16), (16, 16), (2, 32), (2, 34), (3, 96)])
def test_gradients_of_dilated_groups_are_right_in_bfloat16(groups: int, channels: int, step: int, kind: type) -> None:
    """On a CPU with instructions for bfloat16 they were not, or inf, wherever a map is wider than 28."""
    torch.manual_seed(0)
    net = nn.Sequential(kind(channels, channels, 3, padding=step, dilation=step, groups=groups, bias=False))
    x = torch.randn(2, channels, 32, 32)
    (expected,) = torch.autograd.grad(net(x).square().mean(), net[0].weight)
    fit_for_cpu(net)
    assert type(net[0]).__name__ == kind.__name__
    net.to(memory_format=torch.channels_last)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x.contiguous(memory_format=torch.channels_last))
        assert out.dtype == torch.bfloat16
        (found,) = torch.autograd.grad(out.float().square().mean(), net[0].weight)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x), kind.forward(net[0], x), rtol=0.01, atol=0.01)


def test_gradients_are_right_where_a_graph_keeps_the_plain_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(16, 16, 3, padding=4, dilation=4, groups=16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(net(x).square().mean(), net.weight)
    fit_for_cpu(net)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    (found,) = torch.autograd.grad(out.float().square().mean(), net.weight)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"groups": 32, "kernel_size": 3}, False),
        ({"groups": 32, "kernel_size": 3, "stride": 2}, True),
        ({"groups": 32, "kernel_size": (1, 7)}, True),
        ({"groups": 32, "kernel_size": 3, "dilation": (1, 2)}, True),
        ({"groups": 2, "kernel_size": 3, "dilation": 2}, False),
        ({"groups": 2, "kernel_size": 5, "stride": 2}, False),
        ({"groups": 4, "kernel_size": 3, "dilation": 2}, True),
        ({"groups": 1, "kernel_size": 5, "dilation": 2, "stride": 2}, False),
    ],
)
def test_float32_where_bfloat16_is_wrong_or_slow(options: dict, wanted: bool) -> None:
    layer = nn.Conv2d(32, 32, **options)
    fit_for_cpu(layer)
    assert isinstance(layer, InFloat32) == wanted


@pytest.mark.parametrize("size", [(24, 31), (7, 40), (5, 6), (12, 12)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "dilation": 12, "padding": 12},
        {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False},
        {"kernel_size": 5, "dilation": 3, "padding": 6, "out_channels": 16},
        {"kernel_size": (1, 3), "dilation": (1, 4), "padding": (0, 4)},
    ],
)
def test_a_dilated_depthwise_convolution_by_phases(options: dict, size: tuple[int, int]) -> None:
    """The sums, and all gradients, are those of torch; a map smaller than the dilation has the middle tap alone."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, **{"out_channels": 8, "groups": 8, "dtype": torch.float64} | options)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    slope = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, slope)
    fit_for_cpu(layer)
    assert isinstance(layer, ByPhases)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, slope), gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("step", "size", "side"), [(12, (40, 33), 3), (20, (24, 21), 3), (2, (20, 27), 5)])
def test_phases_in_bfloat16(step: int, size: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several parts, with phases of 1, 2 and more pixels a side; nothing but the input and the weight is kept."""
    torch.manual_seed(0)
    monkeypatch.setattr(grouped, "PART_ELEMENTS", 1000)
    layer = nn.Conv2d(32, 32, side, padding=step * (side // 2), dilation=step, groups=32)
    fit_for_cpu(layer)
    x = torch.randn(2, 32, *size).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value),
        torch.autocast("cpu", torch.bfloat16),
    ):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert {value.data_ptr() for value in kept} == {x.data_ptr(), layer.weight.data_ptr()}
    x64 = x.detach().double().requires_grad_()
    expected = F.conv2d(
        x64, layer.weight.double(), layer.bias.double(), padding=layer.padding, dilation=step, groups=32
    )
    torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.02)
    slope = torch.randn_like(found)
    of_x, of_weight, of_bias = torch.autograd.grad(found, (x, layer.weight, layer.bias), slope)
    wanted = torch.autograd.grad(expected, (x64, layer.weight, layer.bias), slope.double())
    torch.testing.assert_close(of_x.double(), wanted[0], rtol=0.01, atol=0.02)
    torch.testing.assert_close(of_weight, wanted[1], rtol=0.01, atol=0.01 * float(wanted[1].abs().max()))
    torch.testing.assert_close(of_bias, wanted[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_phases_of_what_needs_no_gradient(frozen: str) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    fit_for_cpu(layer)
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    inputs = {"x": x, "weight": layer.weight, "bias": layer.bias}
    inputs[frozen].requires_grad_(False)
    layer(x).square().sum().backward()
    assert [name for name, value in inputs.items() if value.grad is None] == [frozen]


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2, "padding": 1},
        {"dilation": 2, "padding": 2, "stride": 2},
        {"dilation": 2, "padding": 2, "groups": 4},
        {"dilation": 2, "padding": "valid"},
        {"dilation": 2, "padding": 2, "padding_mode": "reflect"},
        {"padding": 1},
    ],
)
def test_other_convolutions_are_not_taken_apart(options: dict) -> None:
    layer = nn.Conv2d(8, 8, 3, **{"groups": 8} | options)
    fit_for_cpu(layer)
    assert not isinstance(layer, ByPhases)
