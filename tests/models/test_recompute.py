"""What checkpoints keep and take again: random numbers, means, statistics of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segkit.models import enable_grad_checkpointing


class Gate(nn.Module):
    """A block with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return F.relu(x + y * self.gate(y))


@pytest.mark.parametrize("policy", ["light", "mixed", True])
def test_channels_last(policy: bool | str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(Gate(), Gate(), Gate()))
    plain.double().to(memory_format=torch.channels_last)
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped, policy)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    losses = [model(images).square().mean() for model in (wrapped, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for key, value in wrapped.named_parameters():
        expected = dict(plain.named_parameters())[key].grad
        torch.testing.assert_close(value.grad, expected, rtol=1e-9, atol=1e-13)


class Draws(nn.Module):
    """A block that draws in every way: into a mask, as numbers, with a slope that the layer remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.rrelu = nn.RReLU()
        self.dropout = nn.Dropout(0.4)
        self.alpha = nn.AlphaDropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.rrelu(self.norm(self.conv(x))))
        y = y * torch.rand(len(y), 1, 1, 1, dtype=y.dtype).add_(0.8).floor_().div_(0.8)
        y = y * torch.rand(len(y), 1, 1, 1, out=torch.empty(len(y), 1, 1, 1, dtype=y.dtype))
        y = self.alpha(F.dropout(y * torch.rand(len(y), 1, 1, 1, dtype=y.dtype), 0.2))
        return x + y * torch.empty_like(y).normal_()


class OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = self.statistics = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.drawn += torch.Tag.nondeterministic_seeded in function.tags
        self.statistics += function is torch.ops.aten.native_batch_norm.default and args[5]
        return function(*args, **(kwargs or {}))


def test_nothing_is_drawn_again() -> None:
    """Nor are statistics of a batch computed again; the generator is where it is without checkpointing."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Draws(), Draws(), Draws())).double()
    wrapped = copy.deepcopy(plain)
    enable_grad_checkpointing(wrapped)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for model in (plain, wrapped):
        torch.manual_seed(1)
        with OperationCounter() as counter:
            loss = model(images).square().mean()
            loss.backward()
        gradients = [value.grad for value in model.parameters()]
        found.append((counter.drawn, counter.statistics, float(torch.rand(())), loss.detach(), *gradients))
    assert found[0][0] == 3 * 8
    assert found[0][1] == 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-13)
