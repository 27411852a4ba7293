"""The training loop: one phase, from its first step or from its last checkpoint.

Everything random in a step is a pure function of (seed, phase, step): the batch (see ``segkit.data.loader``) and the
generator that dropout draws from. A checkpoint therefore needs no generator state, and going on from step 100,000
costs what going on from step 10 costs.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from segkit import memory
from segkit.errors import InputError, Interrupted, NonFiniteLoss, OutOfMemory
from segkit.runtime import drawing
from segkit.training import checkpoint, distributed, failure
from segkit.training.optim import set_lr
from segkit.training.precision import Mixed
from segkit.training.schedules import lr_factor
from segkit.training.step import Outcome, copies_of, followers_of, restore_followers, split, train_step
from segkit.training.tracking import MUCH_WAITING, Clock, Tracker, loading_lever


@dataclass(kw_only=True)
class Settings:
    """The numbers of one phase. All intervals are in steps."""

    phase: str
    num_steps: int
    seed: int
    lr_schedule: str = "poly"
    warmup_steps: int = 0
    poly_power: float = 0.9
    accumulate: int = 1
    clip_norm: float | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    channels_last: bool = False


@dataclass(frozen=True)
class _Pending:
    """A step whose outcome is still to be read, with its batch and the model's buffers from before it."""

    outcome: Outcome
    batch: Any
    buffers: list[Tensor]


@dataclass
class Progress:
    """What training has done so far; part of the checkpoint."""

    step: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    best_score: float = -math.inf
    best_step: int = 0


class Trainer:
    """Trains ``model`` (bare; it is wrapped for DDP here if needed) with ``loss`` in ``folder``.

    ``validate`` is called as ``validate(model, step)`` and returns the results of an evaluation, with ``mean_iou``;
    ``config`` is stored in failure bundles and checkpoints. ``stop`` is asked after every step whether to end.
    ``names_of(step)`` are the samples of a step that could not be read. ``checked(labels)`` checks those of a batch, on
    the CPU; within the context the loss does not ask the device again.
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
        ema: AveragedModel | None = None,
        sync_batchnorm: bool = False,
        compile_model: bool = False,
        stop: Callable[[], bool] = lambda: False,
        names_of: Callable[[int], Sequence[str]] = lambda step: (),
        checked: Callable[[Tensor], AbstractContextManager[None]] = lambda labels: nullcontext(),
    ) -> None:
        self.model, self.loss, self.optimizer, self.ema = model, loss, optimizer, ema
        self.settings, self.mixed, self.tracker = settings, mixed, tracker
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.validate, self.config, self.stop, self.names_of = validate, config, stop, names_of
        self.checked = checked
        self.scaler = mixed.scaler()
        self.progress = Progress()
        self.results: dict[str, Any] = {}
        self.wrapped = distributed.replicate(model, mixed.device, sync_batchnorm=sync_batchnorm)
        if compile_model:
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        self._clock, self._advised = Clock(), False
        self._pending: _Pending | None = None
        self._asked_to_stop, self._failed = False, False

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that training needs to go on."""
        self._settle()
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
            "loss": {name: part.running for name, part in followers_of(self.loss).items()},
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
        # lr, weight decay and the like are the configuration's, which may have changed; the rest is the checkpoint's
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if state["scaler"]:  # empty of a run that was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        restore_followers(self.loss, state["loss"])
        self.progress = Progress(**state["progress"])
        self.tracker.truncate(state["metrics_size"], step=self.progress.step, earlier=earlier)

    def save(self, *, must: bool = False) -> None:
        """Write last.pt. A failed write (disk full) is told, training goes on, and the one before is kept.

        OSError instead if it ``must`` succeed, because the run ends here.
        """
        self._settle()  # on every rank: what is evaluated next is the moving average after this step
        if not distributed.is_main():
            return
        try:
            checkpoint.save_last(self.checkpoints, self.state())
        except OSError as error:
            if must:
                raise
            self.tracker.message(f"warning: {error}")

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, make_batches: Callable[[int], Iterable[Any]]) -> dict[str, Any]:
        """Train from ``self.progress.step`` to ``settings.num_steps``; ``make_batches(step)`` yields from there on.

        Returns the results of the last evaluation. Raises Interrupted if ``stop`` says so, with the state saved. A
        checkpoint comes before the evaluation of its step: whatever happens there costs no training, and going on from
        a checkpoint begins with that evaluation.
        """
        settings = self.settings
        if self._evaluates():
            self._evaluate()
        if self.progress.step >= settings.num_steps:
            return self.results
        batches = iter(make_batches(self.progress.step))
        self.wrapped.train()
        while (batch := self._next(batches)) is not None:
            with drawing:
                self._step(batch)
            step, evaluates = self.progress.step, self._evaluates()
            if step % settings.log_every == 0 or step == settings.num_steps:
                self._log()
            # of several ranks, once all know that one was asked to in an earlier step
            stopping = self._asked_to_stop if distributed.world_size() > 1 else self.stop()
            if evaluates or stopping or _due(step, settings.checkpoint_every):
                self.save(must=stopping or step == settings.num_steps)
            if stopping:
                raise Interrupted(f"stopped at step {step} of phase {settings.phase}")
            if evaluates:
                self._evaluate()
            if step == settings.num_steps:
                break
        return self.results

    def _evaluates(self) -> bool:
        """True if an evaluation follows the present step."""
        step, settings = self.progress.step, self.settings
        return step > 0 and (step >= settings.num_steps or _due(step, settings.evaluate_every))

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, or None at the end. An error of the loader leaves the state saved and a failure bundle."""
        start = time.perf_counter()
        try:
            batch = next(batches, None)
        except Exception as error:
            self._loading_failed(error)
        self._clock.waited += time.perf_counter() - start
        _ignore_dead_children()
        return batch

    def _step(self, batch: Any) -> None:
        settings, progress = self.settings, self.progress
        torch.manual_seed(self._where().seed(settings.seed))
        factor = lr_factor(
            progress.step,
            num_steps=settings.num_steps,
            schedule=settings.lr_schedule,
            warmup_steps=settings.warmup_steps,
            power=settings.poly_power,
        )
        self.lr = set_lr(self.optimizer, factor)
        parts = split(batch, settings.accumulate)
        buffers = copies_of(self.model.buffers())
        settled = functools.partial(self._settle, buffers)
        try:
            with self.checked(batch.labels):
                outcome = train_step(
                    self.wrapped,
                    self.loss,
                    self.optimizer,
                    parts,
                    mixed=self.mixed,
                    scaler=self.scaler,
                    channels_last=settings.channels_last,
                    clip_norm=settings.clip_norm,
                    stop=distributed.world_size() > 1 and self.stop(),
                    before_update=settled,
                )
        except (ValueError, RuntimeError, MemoryError) as error:
            if self._failed:  # the step before this one
                raise
            settled()
            self._put_back(buffers)
            self._step_failed(error, batch)
        progress.step += 1
        self._clock.images += len(batch.names) * distributed.world_size()
        self._pending = _Pending(outcome, batch, buffers)

    def _settle(self, buffers: list[Tensor] | None = None) -> None:
        """Read the outcome of the latest step, if that is still to be done: its failure, or its moving average.

        ``buffers``: those of the model after that step, where the next one has changed them already.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        progress = self.progress
        try:
            value, self.grad_norm, self._asked_to_stop = pending.outcome.read()
        except NonFiniteLoss as error:
            self._failed = True
            progress.step -= 1
            self._put_back(pending.buffers)
            self._step_failed(error, pending.batch)
        if self.ema is not None:
            then: Any = SimpleNamespace(parameters=self.model.parameters, buffers=lambda: buffers)
            self.ema.update_parameters(self.model if buffers is None else then)
        progress.window_loss += value
        progress.window_steps += 1

    def _put_back(self, buffers: list[Tensor]) -> None:
        """Undo what a forward pass has done to the running statistics."""
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    # -- failures ------------------------------------------------------------------------------------------------

    def _where(self) -> failure.Where:
        return failure.Where(phase=self.settings.phase, step=self.progress.step, rank=distributed.rank())

    def _bundle(self, error: BaseException, names: Sequence[str], **content: Any) -> str:
        """Write a failure bundle; returns where it is. A failure of that is told, and does not hide ``error``."""
        try:
            bundle = failure.save_bundle(
                self.folder, self._where(), error=error, names=names, config=self.config, **content
            )
        except (OSError, RuntimeError, MemoryError) as second:
            return f"no folder, as that could not be written ({second})"
        return str(bundle)

    def _step_failed(self, error: Exception, batch: Any) -> NoReturn:
        """Keep what the step needs to be repeated, and say what happened. Errors of another kind go through."""
        where = f"at step {self.progress.step + 1} of phase {self.settings.phase}"
        if memory.is_out_of_memory(error):
            levers = memory.training_levers(self.config)
            described = memory.out_of_memory(error, device=self.mixed.device, where=where, levers=levers)
            bundle = self._bundle(described, batch.names, batch=batch, state=self.state())
            raise OutOfMemory(
                f"{described}; the batch is in {bundle}; the run goes on from its last checkpoint with that setting, "
                "its hydra.run.dir and ignore_config_change=true (a smaller crop or batch_size takes a new run)"
            ) from error
        if not isinstance(error, NonFiniteLoss):
            raise error
        self._bundle(error, batch.names, batch=batch, state=self.state())  # first: the look at it may fail as well
        try:
            seed = self._where().seed(self.settings.seed)
            findings = failure.examine(self.model, self.loss, batch, mixed=self.mixed, seed=seed)
        except Exception as second:  # also of a loss of the user's own
            findings = {"error": str(second)}
        bundle = self._bundle(error, batch.names, findings=findings)
        raise NonFiniteLoss(
            f"{error} {where} for the images {', '.join(batch.names)}; the batch and the state before it are in "
            f"{bundle} (`segkit replay` repeats the step): {failure.smaller_steps(self.config, self.settings.phase)}, "
            "set clip_norm=1.0 or precision=bf16, or look at these images"
        ) from None

    def _loading_failed(self, error: Exception) -> NoReturn:
        self._settle()
        step, phase = self.progress.step, self.settings.phase
        if step and not self._evaluates():  # else it was saved before its evaluation
            self.save(must=True)
        if self.stop():  # a signal to the whole process group ends the loading processes first
            raise Interrupted(f"stopped at step {step} of phase {phase}") from None
        bundle = self._bundle(error, self.names_of(step))
        text = f"step {step + 1} of phase {phase} had no batch, see {bundle} (`segkit replay` reads it again)"
        if isinstance(error, InputError):
            raise InputError(f"{error}; {text}, and the state before it is saved") from error
        error.add_note(text)
        raise error

    def _log(self) -> None:
        self._settle()
        progress = self.progress
        mean = progress.window_loss / max(progress.window_steps, 1)
        progress.window_loss, progress.window_steps = 0.0, 0
        values = {"loss": mean, "lr": self.lr, "grad_norm": self.grad_norm}
        self.tracker.training(progress.step, values)
        speed = self._clock.lap()
        if speed["data_wait_share"] > MUCH_WAITING and self._clock.laps > 1 and not self._advised:
            self._advised = True
            self.tracker.message(loading_lever(self.config.get("workers", 0)))
        self.tracker.timing(progress.step, speed)
        shown = {"loss": f"{mean:.4f}", "lr": f"{self.lr:.2e}", "images/s": f"{speed['images_per_second']:.1f}"}
        self.tracker.show(progress.step, {**shown, "data-wait": f"{speed['data_wait_share']:.0%}"})

    def _evaluate(self) -> None:
        progress = self.progress
        with self._clock.paused():
            evaluated = self.model if self.ema is None else self.ema.module
            distributed.share_buffers(evaluated)
            try:
                self.results = self.validate(evaluated, progress.step)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                where = f"in the evaluation after step {progress.step} of phase {self.settings.phase}"
                levers = memory.evaluation_levers(self.config)
                raise memory.out_of_memory(error, device=self.mixed.device, where=where, levers=levers) from error
            self.wrapped.train()
            score = self.results["mean_iou"]
            if score is not None and score > progress.best_score and self._save_best(evaluated):
                progress.best_score, progress.best_step = score, progress.step

    def _save_best(self, evaluated: nn.Module) -> bool:
        """Make the weights those of best.pt; returns whether they are, or would be but for another rank."""
        if not distributed.is_main():
            return True
        state = {"format": 1, "phase": self.settings.phase, "config": self.config, "step": self.progress.step}
        try:
            checkpoint.save_best(self.checkpoints, {**state, "model": checkpoint.network(evaluated).state_dict()})
        except OSError as error:
            self.tracker.message(f"warning: {error}")
            return False
        return True


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _ignore_dead_children() -> None:
    """Take back the signal handler that torch's loader sets for its processes.

    It raises wherever the main thread is when one of them dies, also between two halves of an update. The next batch
    reports a dead process as well, and then the state is whole.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
