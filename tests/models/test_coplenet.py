"""COPLE-Net: the published figures, any size, bad arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.errors import InputError
from segkit.models import COPLENet

PUBLISHED = {"in_channels": 1, "num_classes": 2, "feature_channels": (32, 64, 128, 256, 512), "norm": "batch"}
PAPER = {"in_channels": 3, "num_classes": 5, "feature_channels": (16, 32, 64, 128, 256), "norm": "group"}

# Logits of our own code at (0, c, 31, 40) for the weights and input of `fill` and `wave`, taken after it had
# reproduced all reference points of both networks (test_reference): they guard the network where the reference
# file is not at hand.
GOLDEN = {
    "batch": (10521666, PUBLISHED, [0.05019786581397057, 0.03156129643321037]),
    "group": (
        2634869,
        PAPER,
        [0.06403122842311859, 0.12069404125213623, 0.1557740718126297, 0.16000336408615112, 0.1355726271867752],
    ),
}


def fill(net: torch.nn.Module) -> None:
    """Deterministic weights: sines that depend on the position in the state dict, scaled by what the entry is."""
    state = {}
    for i, (name, value) in enumerate(net.state_dict().items()):
        if not value.is_floating_point():
            state[name] = value
            continue
        wave = np.sin(0.7 * np.arange(value.numel()) + 1.3 * i)
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            wave = 1 + 0.1 * wave
        elif value.dim() == 1:
            wave = 0.05 * wave
        else:
            wave = 0.4 * wave / math.sqrt(math.prod(value.shape[1:]))
        state[name] = torch.from_numpy(wave.reshape(tuple(value.shape))).float()
    net.load_state_dict(state)


def wave(channels: int) -> torch.Tensor:
    return torch.sin(0.01 * torch.arange(channels * 64 * 96, dtype=torch.float64)).float().reshape(1, channels, 64, 96)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_golden_logits(norm: str) -> None:
    num_parameters, arguments, golden = GOLDEN[norm]
    net = COPLENet(**arguments).eval()
    assert sum(value.numel() for value in net.parameters()) == num_parameters
    fill(net)
    with torch.no_grad():
        logits = net(wave(arguments["in_channels"]))
    torch.testing.assert_close(logits[0, :, 31, 40], torch.tensor(golden), atol=1e-4, rtol=0)


@pytest.mark.data
@pytest.mark.parametrize("name", ["published", "paper_robotic"])
def test_reference(shared_data: Path, name: str) -> None:
    """Names, shapes and outputs of the published networks: their weights load and compute the same."""
    reference = json.loads((shared_data / "reference" / "coplenet.json").read_text(encoding="utf-8"))[name]
    arguments = reference["args"]
    net = COPLENet(
        arguments["in_chns"],
        arguments["class_num"],
        feature_channels=arguments["feature_chns"],
        dropout=arguments["dropout"],
        norm="batch" if name == "published" else "group",
    ).eval()
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == reference["state_dict"]
    assert sum(value.numel() for value in net.parameters()) == reference["num_parameters"]
    fill(net)
    with torch.no_grad():
        logits = net(wave(arguments["in_chns"]))
    assert list(logits.shape) == reference["output_shape"]
    for index, value in reference["points"]:
        assert logits[tuple(index)].item() == pytest.approx(value, abs=1e-4)
    assert logits.mean().item() == pytest.approx(reference["output_mean"], abs=1e-5)
    assert logits.std().item() == pytest.approx(reference["output_std"], abs=1e-5)


def small(**changes: object) -> COPLENet:
    arguments = {"in_channels": 3, "num_classes": 4, "feature_channels": (8, 16, 32, 64, 128)}
    return COPLENet(**(arguments | changes))


@pytest.mark.parametrize("size", [(32, 48), (37, 53), (1, 1)])
def test_any_size(size: tuple[int, int]) -> None:
    net = small().eval()
    with torch.no_grad():
        logits = net(torch.randn(2, 3, *size))
    assert logits.shape == (2, 4, *size)


def test_padding_is_zeros_at_the_bottom_and_right() -> None:
    net = small().eval()
    images = torch.randn(1, 3, 37, 53)
    padded = torch.zeros(1, 3, 48, 64)
    padded[..., :37, :53] = images
    with torch.no_grad():
        torch.testing.assert_close(net(images), net(padded)[..., :37, :53], rtol=0, atol=0)


def test_dropout_acts_in_training_only() -> None:
    net = small(dropout=(0.5,) * 5)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(net(images), net(images))
        net.eval()
        assert torch.equal(net(images), net(images))


def test_input_normalisation_fits_the_channels() -> None:
    assert small().input_mean == (0.485, 0.456, 0.406)
    assert small(in_channels=1).input_mean == (0.5,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, r"model\.norm is 'layer', but must be 'batch' .* or 'group'"),
        ({"feature_channels": (8, 16, 32, 64)}, r"model\.feature_channels is \[8, 16, 32, 64\], .* five even numbers"),
        ({"feature_channels": (8, 16, 32, 64, 65)}, "each twice the one before"),
        ({"num_groups": 3}, r"model\.num_groups is 3, but must divide 4"),
        ({"feature_channels": (10, 20, 40, 80, 160)}, r"is 4, but must divide 5, .*set model\.num_groups=1$"),
        (
            {"dropout": (0.5, 0.5)},
            r"model\.dropout is \[0\.5, 0\.5\], but COPLE-Net has five levels, each with a share",
        ),
        (
            {"dropout": (0, 0, 0, 0, -0.5)},
            r"model\.dropout is \[.*-0\.5\], but .* each with a share from 0 to 1: set mo",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**changes)
