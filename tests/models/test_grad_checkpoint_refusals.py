"""Networks and policies that gradient checkpointing refuses, each with one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.models import enable_grad_checkpointing


def stack() -> nn.Module:
    """Two blocks of a convolution and its norm."""
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)))


def test_no_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(InputError, match=r"Sequential has no blocks to recompute .* set grad_checkpointing=false"):
        enable_grad_checkpointing(model)


def test_policy_that_is_none() -> None:
    with pytest.raises(InputError, match="grad_checkpointing is 'deep', but must be light, mixed or true"):
        enable_grad_checkpointing(stack(), "deep")
    with pytest.raises(InputError, match=r"grad_checkpointing is 'deep', .* set grad_checkpointing=light"):
        compose(["grad_checkpointing=deep"])
    assert [compose([f"grad_checkpointing={value}"]).grad_checkpointing for value in ("mixed", "true")] == [
        "mixed",
        True,
    ]


def test_twice_is_an_error() -> None:
    model = stack()
    enable_grad_checkpointing(model)
    with pytest.raises(InputError, match="recomputed already"):
        enable_grad_checkpointing(model)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.leaky_relu(x, inplace=True))


def test_block_that_overwrites_its_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(InPlace(), InPlace()))
    enable_grad_checkpointing(model)
    with pytest.raises(InputError, match="a block of class InPlace changes its input in place"):
        model(torch.randn(1, 3, 4, 4))


class OverwritesAnOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(128, 128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.conv(x).mul_(2)).square()


def test_block_that_overwrites_an_output_that_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.Sequential(OverwritesAnOutput(), OverwritesAnOutput()))
    enable_grad_checkpointing(model, "light")
    loss = model(torch.randn(1, 3, 4, 4)).sum()
    with pytest.raises(
        InputError, match=r"a block changes the output of aten\.convolution\.default in place, .*=false"
    ):
        loss.backward()


def test_gradient_that_is_wanted_twice() -> None:
    layers = (nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 5), nn.BatchNorm2d(8), nn.ReLU()))
    model = nn.Sequential(*layers)
    enable_grad_checkpointing(model, "light")
    loss = model(torch.randn(1, 3, 9, 9)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(InputError, match="or its gradient is wanted twice: set grad_checkpointing=false"):
        loss.backward()
