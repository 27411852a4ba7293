"""One update of the weights."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import NonFiniteLoss
from segkit.training import distributed
from segkit.training.precision import Mixed


def split(batch: Any, parts: int) -> list[tuple[Tensor, Tensor]]:
    """``parts`` equal slices (images, labels) of a batch."""
    return list(zip(batch.images.chunk(parts), batch.labels.chunk(parts), strict=True))


LEAST_SCALE = 2.0**-10
"""Factor of the loss in fp16 below which nothing is gained by halving it once more: it starts at 2^16."""


def train_step(
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: list[tuple[Tensor, Tensor]],
    *,
    mixed: Mixed,
    scaler: torch.amp.GradScaler,
    clip_norm: float | None = None,
) -> tuple[float, float]:
    """One update from ``parts`` of a batch; returns (loss, norm of the gradient before clipping).

    The gradient is that of the whole batch over all ranks in one piece: a pixel-wise loss is divided by the valid
    pixels of all parts and ranks. Other losses (Dice, Lovasz, ...) are averaged over the parts. A non-finite loss or
    gradient raises :class:`NonFiniteLoss` before the weights are touched. In fp16 the scaler skips such a gradient; the
    exception comes once it has skipped so many that its scale is below :data:`LEAST_SCALE`.
    """
    device, world = mixed.device, distributed.world_size()
    moved = [(images.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for images, labels in parts]
    targets = [labels.long() for _, labels in moved]
    denominator = None
    if loss.pixel_decomposable:
        # one number, or one for each term of a sum of losses
        count: Any = loss.denominator
        denominator = distributed.sum_over_ranks(torch.stack([count(target) for target in targets]).sum(0))
    total = torch.zeros((), device=device)
    followers: Any = followers_of(loss).values()
    seen: list[list[Tensor]] = [[] for _ in followers]
    optimizer.zero_grad(set_to_none=True)
    for index, ((images, _), target) in enumerate(zip(moved, targets, strict=True)):
        with _no_sync(model, index < len(moved) - 1):
            with mixed.autocast():
                logits = model(images)
            if denominator is not None:
                # DDP averages gradients over ranks; this sum is divided by the pixels of all ranks already.
                value = loss(logits, target, denominator=denominator) * world
            else:
                value = loss(logits, target) / len(moved)
            scaler.scale(value).backward()
        for counts, follower in zip(seen, followers, strict=True):
            counts.append(follower.counts_of(logits, target))
        total += value.detach()
    mean = float(distributed.sum_over_ranks(total)) / world
    if not math.isfinite(mean):
        raise NonFiniteLoss(f"the loss is {mean}")
    scaler.unscale_(optimizer)
    limit = math.inf if clip_norm is None else clip_norm
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise NonFiniteLoss(f"the loss is {mean:.6g}, but the norm of its gradient {norm}")
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        raise NonFiniteLoss(f"the gradient of step after step is not finite in fp16, at a loss of {mean:.6g}")
    for counts, follower in zip(seen, followers, strict=True):
        follower.follow(distributed.sum_over_ranks(torch.stack(counts).sum(0)))
    return mean, norm


def followers_of(loss: nn.Module) -> dict[str, Any]:
    """The parts of ``loss`` that follow the training, by name: with ``counts_of``, ``follow`` and ``running``."""
    return {name: part for name, part in loss.named_modules() if hasattr(part, "follow")}


def _no_sync(model: nn.Module, active: bool) -> AbstractContextManager[Any]:
    """Context that keeps DDP from exchanging gradients before the last part."""
    no_sync: Any = getattr(model, "no_sync", nullcontext)
    return no_sync() if active else nullcontext()
