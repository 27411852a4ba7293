from __future__ import annotations

import pytest
import torch
from torch import nn

from segkit.training.optim import parameter_groups, set_lr


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def test_groups_cover_every_trained_parameter_once():
    net = Net()
    groups = parameter_groups(net, lr=0.1, encoder_lr_factor=0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(item) for item in net.parameters() if item.requires_grad)
    rates = {id(item): group["lr"] for group in groups for item in group["params"]}
    decays = {id(item): group.get("weight_decay", "default") for group in groups for item in group["params"]}
    assert rates[id(net.encoder[0].weight)] == 0.05
    assert rates[id(net.head.bias)] == 0.1
    assert decays[id(net.encoder[1].weight)] == 0.0
    assert decays[id(net.head.weight)] == "default"


def test_set_lr_scales_every_group():
    groups = parameter_groups(Net(), lr=0.1, encoder_lr_factor=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert set_lr(optimizer, 0.5) == pytest.approx(0.05)
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [0.025, 0.05]
