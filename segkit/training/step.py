"""One update of the weights, without a wait for the device.

The value of a step is read once the next one is under way (:class:`Outcome`). Until then a step whose loss or gradient
is not finite must have left the weights alone: fused optimizers read a flag on the device, and skip. Others, fp16 with
its scaler, a loss that follows the training, and the first step of an optimizer, when it makes its state, read before
they update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segkit.errors import InputError, NonFiniteLoss
from segkit.training import distributed
from segkit.training.precision import Mixed


def split(batch: Any, parts: int) -> list[tuple[Tensor, Tensor]]:
    """``parts`` equal slices (images, labels) of a batch."""
    return list(zip(batch.images.chunk(parts), batch.labels.chunk(parts), strict=True))


def copies_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A copy of each tensor, made by one call for each type: on a GPU, a call costs more than what it copies."""
    tensors = list(tensors)
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        torch._foreach_copy_(
            [item for item in copies if item.dtype == dtype], [item for item in tensors if item.dtype == dtype]
        )
    return copies


LEAST_SCALE = 2.0**-10
"""Factor of the loss in fp16 below which nothing is gained by halving it once more: it starts at 2^16."""


@dataclass
class Outcome:
    """What a step computed: ``values`` (3,) on the host, once ``copied``, the loss, the norm of the gradient, and how
    many ranks want to stop."""

    values: Tensor
    copied: torch.cuda.Event | None
    scaled: bool

    def read(self) -> tuple[float, float, bool]:
        """(loss, norm before clipping, whether a rank wants to stop); NonFiniteLoss if the step was skipped."""
        if self.copied is not None:
            self.copied.synchronize()
        total, norm, stop = self.values.tolist()
        mean = total / distributed.world_size()
        if not math.isfinite(mean):
            raise NonFiniteLoss(f"the loss is {mean}")
        if not math.isfinite(norm) and not self.scaled:
            raise NonFiniteLoss(f"the loss is {mean:.6g}, but the norm of its gradient {norm}")
        return mean, norm, stop > 0


def train_step(
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: list[tuple[Tensor, Tensor]],
    *,
    mixed: Mixed,
    scaler: torch.amp.GradScaler,
    channels_last: bool = False,
    clip_norm: float | None = None,
    stop: bool = False,
    before_update: Callable[[], None] = lambda: None,
) -> Outcome:
    """One update from ``parts`` of a batch; ``before_update`` is called between the gradient and the new weights.

    The gradient is that of the whole batch over all ranks in one piece: a pixel-wise loss is divided by the valid
    pixels of all parts and ranks. Other losses (Dice, Lovasz, ...) are averaged over the parts. A non-finite loss or
    gradient leaves the weights as they are, and raises :class:`NonFiniteLoss` here or where the outcome is read. In
    fp16 the scaler skips such a gradient; the exception comes once its scale is below :data:`LEAST_SCALE`.
    """
    device, world = mixed.device, distributed.world_size()
    moved = [(images.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for images, labels in parts]
    if channels_last:  # on the device: a copy made here would not lie in pinned memory, and moving it would wait
        moved = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in moved]
    targets = [labels.long() for _, labels in moved]
    denominator = None
    if getattr(loss, "pixel_decomposable", False):
        # one number, or one for each term of a sum of losses
        count: Any = loss.denominator
        denominator = distributed.sum_over_ranks(torch.stack([count(target) for target in targets]).sum(0))
    followers: Any = followers_of(loss).values()
    seen: list[list[Tensor]] = [[] for _ in followers]
    sums = torch.zeros(2, device=device)
    sums[1].fill_(float(stop))
    optimizer.zero_grad(set_to_none=True)
    for index, ((images, _), target) in enumerate(zip(moved, targets, strict=True)):
        with _no_sync(model, index < len(moved) - 1):
            with mixed.autocast():
                logits = model(images)
            value = loss(logits, target, **({} if denominator is None else {"denominator": denominator}))
            check_value(value)
            # DDP averages gradients over ranks; with a denominator this sum is divided by the pixels of all of them.
            value = value / len(moved) if denominator is None else value * world
            scaler.scale(value).backward()
        for counts, follower in zip(seen, followers, strict=True):
            counts.append(follower.counts_of(logits, target))
        sums[0] += value.detach()
    sums = distributed.sum_over_ranks(sums)
    before_update()
    outcome = _update(model, optimizer, sums, scaler=scaler, clip_norm=clip_norm, reads=bool(seen))
    for counts, follower in zip(seen, followers, strict=True):
        follower.follow(distributed.sum_over_ranks(torch.stack(counts).sum(0)))
    return outcome


def check_value(value: object, what: str = "the loss") -> None:
    """Raise InputError unless ``value``, of the loss ``what``, is a real number () from which a gradient flows."""
    if isinstance(value, Tensor) and not value.dim() and value.is_floating_point() and value.requires_grad:
        return
    got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    flows = " without a gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
    raise InputError(f"{what} gives {got}{flows}, but must give one real number, of shape (), with a gradient: mend it")


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Tensor,
    *,
    scaler: Any,
    clip_norm: float | None,
    reads: bool,
) -> Outcome:
    """Update the weights unless a gradient, or the loss in ``sums`` (loss, stop), is not finite.

    ``reads``: the outcome is read before the update in any case.
    """
    scaler.unscale_(optimizer)
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([item.grad for item in parameters if item.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    values = torch.stack([sums[0], norm.to(sums.dtype), sums[1]])
    has_events = values.device.type == "cuda"  # elsewhere nothing would tell when the copy is whole
    outcome = Outcome(values.to("cpu", non_blocking=has_events), None, scaler.is_enabled())
    if has_events:
        outcome.copied = torch.cuda.Event()
        outcome.copied.record()
    if skips_by_itself(optimizer) and not scaler.is_enabled() and not reads:
        optimizer.found_inf = 1 - values[:2].isfinite().all().to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return outcome
    mean = outcome.read()[0]
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        raise NonFiniteLoss(f"the gradient of step after step is not finite in fp16, at a loss of {mean:.6g}")
    return outcome


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """True for one in its fused form, which reads ``found_inf`` on the device, once it has its state."""
    return bool(optimizer.state) and all(group.get("fused") for group in optimizer.param_groups)


def followers_of(loss: nn.Module) -> dict[str, Any]:
    """The parts of ``loss`` that follow the training, by name: with ``counts_of``, ``follow`` and ``running``."""
    return {name: part for name, part in loss.named_modules() if hasattr(part, "follow")}


def restore_followers(loss: nn.Module, running: Mapping[str, Tensor]) -> None:
    """Put back what a checkpoint holds of :func:`followers_of` ``loss``: ``running``, by name."""
    for name, part in followers_of(loss).items():
        part.running.copy_(running[name])


def _no_sync(model: nn.Module, active: bool) -> AbstractContextManager[Any]:
    """Context that keeps DDP from exchanging gradients before the last part."""
    no_sync: Any = getattr(model, "no_sync", nullcontext)
    return no_sync() if active else nullcontext()
