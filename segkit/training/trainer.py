"""The training loop: one phase, from its first step or from its last checkpoint.

Everything random in a step is a pure function of (seed, phase, step): the batch (see ``segkit.data.loader``) and the
generator that dropout draws from. A checkpoint therefore needs no generator state, and going on from step 100,000
costs what going on from step 10 costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.runtime import derive_seed
from segkit.training import checkpoint, distributed
from segkit.training.failure import NonFiniteLoss, save_bundle
from segkit.training.optim import lr_factor, set_lr
from segkit.training.precision import Mixed
from segkit.training.tracking import Tracker


class Interrupted(Exception):
    """Training was asked to stop (SIGTERM, SIGINT); its state is saved."""


@dataclass(kw_only=True)
class Settings:
    """The numbers of one phase. All intervals are in steps."""

    phase: str
    num_steps: int
    seed: int
    warmup_steps: int = 0
    poly_power: float = 0.9
    accumulate: int = 1
    clip_norm: float | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    channels_last: bool = False


@dataclass
class Progress:
    """What training has done so far; part of the checkpoint."""

    step: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    results: dict[str, Any] = field(default_factory=dict)


def split(batch: Any, parts: int) -> list[tuple[Tensor, Tensor]]:
    """``parts`` equal slices (images, labels) of a batch."""
    return list(zip(batch.images.chunk(parts), batch.labels.chunk(parts), strict=True))


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
    pixels of all parts and ranks. Other losses (Dice, Lovasz, ...) are averaged over the parts. A non-finite loss
    raises :class:`NonFiniteLoss` before the weights are touched.
    """
    device, world = mixed.device, distributed.world_size()
    moved = [(images.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for images, labels in parts]
    targets = [labels.long() for _, labels in moved]
    denominator = None
    if loss.pixel_decomposable:
        denominator = distributed.sum_over_ranks(torch.stack([loss.denominator(target) for target in targets]).sum())
    total = torch.zeros((), device=device)
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
        total += value.detach()
    mean = float(distributed.sum_over_ranks(total)) / world
    if not math.isfinite(mean):
        raise NonFiniteLoss(f"the loss is {mean}")
    scaler.unscale_(optimizer)
    limit = math.inf if clip_norm is None else clip_norm
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    return mean, float(norm)


def _no_sync(model: nn.Module, active: bool) -> Any:
    """Context that keeps DDP from exchanging gradients before the last part."""
    from contextlib import nullcontext

    return model.no_sync() if active and hasattr(model, "no_sync") else nullcontext()


class Trainer:
    """Trains ``model`` (bare; it is wrapped for DDP here if needed) with ``loss`` in ``folder``.

    ``validate`` is called as ``validate(model, step)`` and returns the results of an evaluation, with ``mean_iou``;
    ``config`` is stored in failure bundles and checkpoints. ``stop`` is asked after every step whether to end.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        mixed: Mixed,
        tracker: Tracker,
        folder: Path,
        validate: Callable[[nn.Module, int], dict[str, Any]],
        config: dict[str, Any],
        ema: nn.Module | None = None,
        sync_batchnorm: bool = False,
        compile_model: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.loss, self.optimizer, self.ema = model, loss, optimizer, ema
        self.settings, self.mixed, self.tracker = settings, mixed, tracker
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.validate, self.config, self.stop = validate, config, stop
        self.scaler = mixed.scaler()
        self.progress = Progress()
        self.wrapped = distributed.replicate(model, mixed.device, sync_batchnorm=sync_batchnorm)
        if compile_model:
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        self._clock = Clock()

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that training needs to go on."""
        progress = self.progress
        return {
            "format": 1,
            "phase": self.settings.phase,
            "config": self.config,
            "model": checkpoint.network(self.model).state_dict(),
            "ema": None if self.ema is None else checkpoint.network(self.ema.module).state_dict(),
            "ema_updates": None if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dict(vars(progress)),
            "metrics_size": self.tracker.size(),
        }

    def restore(self, state: dict[str, Any], *, earlier: bytes = b"") -> None:
        """Go on from ``state``; ``earlier`` is the metrics.jsonl of the phases before."""
        source = self.checkpoints / checkpoint.LAST
        checkpoint.load_weights(self.model, state["model"], source=source)
        if self.ema is not None and state["ema"] is not None:
            checkpoint.load_weights(self.ema.module, state["ema"], source=source)
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.tracker.truncate(state["metrics_size"], step=self.progress.step, earlier=earlier)

    def save(self) -> None:
        """Write last.pt. A failed write (disk full) is reported; training goes on, the one before is kept."""
        if not distributed.is_main():
            return
        try:
            checkpoint.save_last(self.checkpoints, self.state())
        except OSError as error:
            if self.progress.step >= self.settings.num_steps:
                raise
            self.tracker.say(f"warning: {error}")

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, make_batches: Callable[[int], Iterable[Any]]) -> dict[str, Any]:
        """Train from ``self.progress.step`` to ``settings.num_steps``; ``make_batches(step)`` yields from there on.

        Returns the results of the last evaluation. Raises Interrupted after saving if ``stop`` says so.
        """
        settings = self.settings
        batches = self._timed(make_batches(self.progress.step))
        self.wrapped.train()
        for batch in batches:
            self._step(batch)
            step, last = self.progress.step, self.progress.step >= settings.num_steps
            if step % settings.log_every == 0 or last:
                self._log()
            evaluates = last or _due(step, settings.evaluate_every)
            if evaluates:
                self._evaluate()
            stopping = distributed.any_rank(self.stop(), self.mixed.device)
            if evaluates or stopping or _due(step, settings.checkpoint_every):
                self.save()
            if stopping and not last:
                raise Interrupted(f"stopped at step {step} of phase {settings.phase}")
            if last:
                break
        return self.progress.results

    def _timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the time spent waiting for them goes to the clock."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._clock.waited += time.perf_counter() - start
            yield batch

    def _step(self, batch: Any) -> None:
        settings, progress = self.settings, self.progress
        torch.manual_seed(derive_seed(settings.seed, settings.phase, progress.step, distributed.rank()))
        factor = lr_factor(
            progress.step,
            num_steps=settings.num_steps,
            warmup_steps=settings.warmup_steps,
            power=settings.poly_power,
        )
        self.lr = set_lr(self.optimizer, factor)
        parts = split(batch, settings.accumulate)
        if settings.channels_last:
            parts = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in parts]
        try:
            value, self.grad_norm = train_step(
                self.wrapped,
                self.loss,
                self.optimizer,
                parts,
                mixed=self.mixed,
                scaler=self.scaler,
                clip_norm=settings.clip_norm,
            )
        except NonFiniteLoss as error:
            self._report_failure(error, batch)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        progress.step += 1
        progress.window_loss += value
        progress.window_steps += 1
        self._clock.images += len(batch.names) * distributed.world_size()

    def _report_failure(self, error: NonFiniteLoss, batch: Any) -> None:
        step = self.progress.step
        bundle = save_bundle(
            self.folder, error=str(error), step=step, batch=batch, state=self.state(), config=self.config
        )
        raise NonFiniteLoss(
            f"{error} at step {step + 1} of phase {self.settings.phase} for the images {', '.join(batch.names)}; the "
            f"batch and the state before it are in {bundle}: lower optimizer.lr, set clip_norm=1.0 or "
            "precision=bf16, or look at these images"
        ) from None

    def _log(self) -> None:
        progress = self.progress
        mean = progress.window_loss / max(progress.window_steps, 1)
        progress.window_loss, progress.window_steps = 0.0, 0
        values = {"loss": mean, "lr": self.lr, "grad_norm": self.grad_norm}
        self.tracker.record(progress.step, {"split": "train", **values})
        self.tracker.scalars(progress.step, {f"train/{name}": value for name, value in values.items()})
        speed = self._clock.lap()
        self.tracker.timing(progress.step, speed)
        self.tracker.show(
            progress.step,
            {
                "loss": f"{mean:.4f}",
                "lr": f"{self.lr:.2e}",
                "images/s": f"{speed['images_per_second']:.1f}",
                "data-wait": f"{speed['data_wait_share']:.0%}",
            },
        )

    def _evaluate(self) -> None:
        progress = self.progress
        with self._clock.paused():
            evaluated = self.model if self.ema is None else self.ema.module
            progress.results = self.validate(evaluated, progress.step)
            self.wrapped.train()
            score = progress.results["mean_iou"]
            if score is not None and score > progress.best_score:
                progress.best_score, progress.best_step = score, progress.step
                if distributed.is_main():
                    best = {"format": 1, "phase": self.settings.phase, "config": self.config, "step": progress.step}
                    checkpoint.save_best(self.checkpoints, {**best, "model": checkpoint.network(evaluated).state_dict()})


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class Clock:
    """Images a second and the share of time spent waiting for data, without the time of evaluations."""

    def __init__(self) -> None:
        self.images, self.waited, self.start = 0, 0.0, time.perf_counter()

    def lap(self) -> dict[str, float]:
        """The figures since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        figures = {"images_per_second": self.images / seconds, "data_wait_share": self.waited / seconds}
        self.images, self.waited, self.start = 0, 0.0, now
        return figures

    def paused(self) -> Any:
        """Context whose duration does not count."""
        from contextlib import contextmanager

        @contextmanager
        def pause() -> Iterator[None]:
            begun = time.perf_counter()
            yield
            self.start += time.perf_counter() - begun

        return pause()
