"""What a look at a failed step finds."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segkit.training.failure import Where, examine
from segkit.training.precision import Mixed

MIXED = Mixed("fp32", torch.device("cpu"))


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


BATCH = Batch(torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def net(factor: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Scaled(1.0), nn.Conv2d(3, 4, 1), Scaled(factor), nn.Conv2d(4, 2, 1))


class Model(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.net = net(factor)

    def forward(self, images):
        return self.net(images.float())


class CrossEntropy(nn.Module):
    def forward(self, logits, target):
        return F.cross_entropy(logits, target)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.losses = nn.ModuleDict({"one": CrossEntropy(), "square": Square()})

    def forward(self, logits, target):
        return self.losses["one"](logits, target) + 2 * self.losses["square"](logits, target)


class Square(nn.Module):
    def forward(self, logits, target):
        return logits.square().mean()


def test_a_finite_step_against_plain_autograd():
    model = Model()
    found = examine(model, Sum(), BATCH, mixed=MIXED, seed=0)
    logits = model(BATCH.images)
    target = BATCH.labels.long()
    one, square = F.cross_entropy(logits, target), logits.square().mean()
    total = one + 2 * square
    gradients = torch.autograd.grad(total, list(model.parameters()))
    assert found["terms"] == pytest.approx({"one": one.item(), "square": square.item()}, rel=1e-5)
    assert found["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(
        math.sqrt(sum(float(item.square().sum()) for item in gradients)), rel=1e-5
    )
    assert found["logits"] == pytest.approx(
        {"least": logits.min().item(), "greatest": logits.max().item(), "not_finite": 0}, rel=1e-5
    )
    assert found["first_non_finite_module"] is None
    assert found["first_non_finite_gradient"] is None
    assert set(found["gradient_norms"]) == {"net.1", "net.3"}


def test_the_first_module_that_breaks_is_named():
    loss = CrossEntropy()
    loss.losses = ["a name", "that a loss of one's own may use"]
    found = examine(Model(math.inf), loss, BATCH, mixed=MIXED, seed=0)
    assert found["terms"].keys() == {"CrossEntropy"}
    assert found["first_non_finite_module"] == "net.2"
    assert found["first_non_finite_gradient"] == "net.1.weight"
    assert found["logits"]["not_finite"] == 2 * 2 * 4 * 4
    assert math.isnan(found["loss"])


def test_seeds_differ_by_step_and_rank():
    seeds = {Where(phase=phase, step=step, rank=rank).seed(0) for phase in "ab" for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8
