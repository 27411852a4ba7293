"""A trainer of a tiny network on drawn batches, for the tests beside this file."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from segkit.training.optim import parameter_groups
from segkit.training.precision import Mixed
from segkit.training.tracking import Tracker
from segkit.training.trainer import Settings, Trainer

CPU = torch.device("cpu")


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    names: list
    indices: list


def make_batches(start: int, stop: int = 10_000):
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (4, 8, 8), generator=generator, dtype=torch.uint8)
        labels[torch.rand(4, 8, 8, generator=generator) < 0.2] = 255
        labels[0, step % 8 :] = 255  # parts with different numbers of valid pixels
        yield Batch(images, labels, [f"image{step}-{i}" for i in range(4)], list(range(4)))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.2, batchnorm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images):
        return self.head(self.dropout(F.relu(self.norm(self.encoder(images.float() / 255)))))


class MeanCrossEntropy(nn.Module):
    pixel_decomposable = True

    def denominator(self, target):
        return (target != 255).sum().float()

    def forward(self, logits, target, *, denominator=None):
        total = F.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum")
        return total / (self.denominator(target) if denominator is None else denominator)


def build(
    folder,
    *,
    net=None,
    loss=None,
    precision="fp32",
    validate=None,
    ema_decay=None,
    compile_model=False,
    stop=lambda: False,
    fused=True,
    **numbers,
):
    net = net or Net()
    groups = parameter_groups(net, lr=0.01)
    settings = Settings(**{"phase": "train", "num_steps": 12, "seed": 0, "log_every": 1, **numbers})
    ema = None
    if ema_decay:
        ema = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=True
        )
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model=net,
        loss=loss or MeanCrossEntropy(),
        optimizer=torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=fused),
        settings=settings,
        mixed=Mixed(precision, CPU),
        tracker=Tracker(folder, phase="train", run_metrics=folder.parent / "all.jsonl", num_steps=settings.num_steps),
        folder=folder,
        validate=validate or (lambda model, step: {"mean_iou": step / 100}),
        config={"key": "value"},
        ema=ema,
        compile_model=compile_model,
        stop=stop,
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
