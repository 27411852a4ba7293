"""One phase of a run: prepared before anything is trained, then trained to its end."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segkit import memory
from segkit.config.schema import Config, plain
from segkit.config.targets import LOSS_OPTIONS
from segkit.data.labels import VOID
from segkit.data.statistics import LabelCounts, check_labels, count_labels
from segkit.errors import InputError, first_line
from segkit.evaluation.per_image import PerImageCounts
from segkit.files import write_json
from segkit.losses.checks import labels_checked
from segkit.models import Segmenter
from segkit.run import charts
from segkit.run.batches import PhaseBatches
from segkit.run.build import build_loss, build_optimizer, build_sampler
from segkit.run.folder import RunFolder
from segkit.run.own import try_loss, try_model
from segkit.run.plan import PhasePlan, plan_phase
from segkit.run.splits import Splits
from segkit.run.validation import Validation
from segkit.training import checkpoint, distributed
from segkit.training.precision import Mixed
from segkit.training.sinks import Row
from segkit.training.step import followers_of
from segkit.training.tracking import Tracker
from segkit.training.trainer import Settings, Trainer


@dataclass(kw_only=True)
class Phase:
    """One phase, with everything that could be refused already built."""

    name: str
    config: Config
    plan: PhasePlan
    batches: PhaseBatches
    counts: LabelCounts
    model: Segmenter
    loss: nn.Module
    observer: charts.LossObserver | None
    optimizer: torch.optim.Optimizer
    device: torch.device

    @property
    def is_last(self) -> bool:
        """True for the phase whose results are those of the run."""
        return self.name == list(self.config.schedule)[-1]

    def validation(self, tracker: Tracker, stop: Callable[[], bool]) -> Validation:
        """The evaluation of the phase, which writes to ``tracker``."""
        return Validation(
            batches=self.batches,
            counts=self.counts,
            loss=self.loss,
            observer=self.observer,
            tracker=tracker,
            device=self.device,
            stop=stop,
        )


def prepare_phase(
    config: Config, name: str, *, splits: Splits, model: Segmenter, device: torch.device, cache_dir: Path
) -> Phase:
    """Count and check the labels of phase ``name``, and build its loss and its optimizer. Raises what they refuse."""
    for split in (splits.train, splits.val):
        split[0]  # a first image shows what is wrong with all
    counts = distributed.on_main(lambda: count_labels(splits.train, workers=config.workers, cache_dir=cache_dir))
    if config.overfit_batches is None:
        evaluated = splits.val[: config.evaluation.max_images]
        distributed.on_main(lambda: check_labels(evaluated, workers=config.workers, cache_dir=cache_dir))
    plan = plan_phase(config, name, len(splits.train))
    loss = build_loss(config, name, counts)
    absent = [label for label, pixels in zip(counts.classes, counts.class_pixels, strict=True) if not pixels]
    if absent and not charts.margin_buffers(loss):  # a loss with margins says what it makes of them
        distributed.print_main(
            f"warning: no training pixel of phase {name} is of class {', '.join(absent)}: mend the label table or the "
            "split, or expect nothing of it"
        )
    try_loss(loss.to(device), config, name, splits.train, device)
    try_model(model, config, name, splits.val, device)
    observed = config.phase_loss(name).get("diagnostics")
    return Phase(
        name=name,
        config=config,
        plan=plan,
        batches=PhaseBatches(
            config=config,
            plan=plan,
            splits=splits,
            pin_memory=device.type == "cuda",
            sampler=distributed.on_main(lambda: build_sampler(config, name, splits.train, cache_dir=cache_dir)),
        ),
        counts=counts,
        model=model,
        loss=loss,
        observer=charts.LossObserver(loss, every=config.log_every * config.accumulate) if observed else None,
        optimizer=build_optimizer(config, model, name),
        device=device,
    )


def train_phase(phase: Phase, run_folder: RunFolder, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train ``phase`` from its last checkpoint, or its first step, to its end; returns its results.

    A finished phase is not repeated. Raises Interrupted, with the state saved, once ``stop()`` is true.
    """
    folder = run_folder.phase(phase.name)
    distributed.on_main(lambda: _write_facts(phase, folder))  # also of a finished one: damaged ones are whole again
    names = list(phase.config.schedule)
    offset = sum(run_folder.results(name)["step"] for name in names[: names.index(phase.name)])
    tracker = Tracker(
        folder if distributed.is_main() else None,
        phase=phase.name,
        run_metrics=run_folder.metrics,
        num_steps=phase.plan.num_steps,
        offset=offset,
        kind=phase.config.tracker.value,
    )
    if run_folder.is_finished(phase.name):
        distributed.print_main(f"phase {phase.name}: finished already")
        run_folder.join_metrics(phase.name)
        distributed.on_main(lambda: tracker.show_finished(is_last=phase.is_last))
        return run_folder.results(phase.name)
    validation = phase.validation(tracker, stop)
    trainer = make_trainer(phase, folder, tracker=tracker, validate=validation, stop=stop)
    if phase.is_last:
        run_folder.link_last_phase()  # a run can be evaluated while it trains, and after it was stopped
    last = distributed.on_main(lambda: checkpoint.find_last(folder / "checkpoints"))
    earlier = run_folder.earlier_metrics(phase.name)
    with contextlib.closing(tracker):
        if last is None:
            tracker.truncate(0, step=0, earlier=earlier)
            if offset == 0:
                distributed.on_main(tracker.open)
            _start_from_last_phase(phase, run_folder)
            _open_charts(phase, tracker)
        else:
            _restore(trainer, last, earlier=earlier)
            distributed.print_main(
                f"phase {phase.name}: going on from step {trainer.progress.step} of {phase.plan.num_steps}"
            )
        results = trainer.fit(phase.batches.training)
        tracker.finished(is_last=phase.is_last)
    results = {**results, **_training_facts(phase, trainer)}

    def write() -> None:
        validation.write(folder)
        write_json(folder / "results.json", results)  # the last file: with it the phase is finished

    distributed.on_main(write)
    return results


def _start_from_last_phase(phase: Phase, run_folder: RunFolder) -> None:
    """Give a loss that follows the training the last evaluation of the phase before, where there is one."""
    names = list(phase.config.schedule)
    path = run_folder.phase(names[names.index(phase.name) - 1]) / "per_image.npz"
    if phase.name != names[0] and (followers := followers_of(phase.loss)):
        confusion = distributed.on_main(lambda: PerImageCounts.load(path).total())
        for part in followers.values():
            part.start_from(confusion)


def make_trainer(
    phase: Phase, folder: Path, *, tracker: Tracker, validate: Callable[..., Any], stop: Callable[[], bool]
) -> Trainer:
    """The trainer of ``phase``, at its first step."""
    config, plan, settings = phase.config, phase.plan, phase.config.schedule[phase.name]
    ema = None
    if config.ema_decay is not None:
        ema = AveragedModel(phase.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    return Trainer(
        model=phase.model,
        loss=phase.loss,
        optimizer=phase.optimizer,
        settings=Settings(
            phase=phase.name,
            num_steps=plan.num_steps,
            seed=config.seed,
            lr_schedule=settings.lr_schedule.value,
            warmup_steps=settings.warmup_steps,
            poly_power=settings.poly_power,
            accumulate=config.accumulate,
            clip_norm=config.clip_norm,
            log_every=config.log_every,
            evaluate_every=plan.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            channels_last=config.channels_last is True,
        ),
        mixed=Mixed(config.precision.value, phase.device),
        tracker=tracker,
        folder=folder,
        validate=validate,
        config=plain(config),
        ema=ema,
        sync_batchnorm=config.sync_batchnorm,
        compile_model=config.compile,
        stop=stop,
        names_of=phase.batches.names,
        checked=functools.partial(labels_checked, num_classes=len(phase.counts.classes), ignore_index=VOID),
    )


def _restore(trainer: Trainer, last: Path, *, earlier: bytes) -> None:
    """Let ``trainer`` go on from the checkpoint ``last``; InputError if that lacks something or has another type."""
    try:
        trainer.restore(checkpoint.load(last), earlier=earlier)
        if not all(type(value) in (int, float) for value in vars(trainer.progress).values()):
            raise TypeError("its progress is not of numbers")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError) or memory.is_out_of_memory(error):
            raise
        raise InputError(
            f"{last} holds weights, but no state to go on from ({type(error).__name__}: {first_line(error)}): it is "
            f"damaged; start another run from its weights, init_from={last}"
        ) from None


def _write_facts(phase: Phase, folder: Path) -> None:
    """Write what the phase trains with: label counts, with the palette so that a prediction needs no data, margins."""
    folder.mkdir(parents=True, exist_ok=True)
    palette = phase.batches.splits.train.palette.tolist()
    write_json(folder / "label_counts.json", {**phase.counts.as_dict(), "palette": palette})
    write_margins(folder, phase.loss, phase.config.phase_loss(phase.name), phase.counts.classes)


def write_margins(folder: Path, loss: Any, node: dict[str, Any], classes: Sequence[str]) -> None:
    """Write the margins that ``loss`` trains with to margins.json; a loss without margins leaves no such file."""
    if margins := charts.margin_buffers(loss):
        options = {key: value for key, value in node.items() if key not in ("_target_", *LOSS_OPTIONS)}
        write_json(folder / "margins.json", {"classes": list(classes), **margins, **options})
    else:
        (folder / "margins.json").unlink(missing_ok=True)  # of an earlier start with another loss


def _open_charts(phase: Phase, tracker: Tracker) -> None:
    """Show what is shown once a phase; a run that goes on has it already."""
    config, counts = phase.config, phase.counts
    own = config.schedule[phase.name].lr
    lr = own if own is not None else config.optimizer["lr"]
    values = charts.hparams(config, phase.name, lr=lr, num_steps=phase.plan.num_steps)
    row = Row(values, charts.HPARAMS, charts.FIRST_HPARAMS, charts.SCORES)
    if phase.is_last:
        tracker.describe(row)
    table = phase.batches.splits.train
    crops = phase.batches.first_crops(config.evaluation.pictures) if distributed.is_main() else []
    charts.show_crops(tracker, crops, palette=table.palette, classes=table.classes)
    charts.show_margins(tracker, charts.margin_buffers(phase.loss), classes=counts.classes, pixels=counts.class_pixels)


def _training_facts(phase: Phase, trainer: Trainer) -> dict[str, Any]:
    """What results.json says beside the scores."""
    config, progress = phase.config, trainer.progress
    return {
        "phase": phase.name,
        "step": progress.step,
        "best": {"mean_iou": progress.best_score, "step": progress.best_step},
        "training": {
            "loss": config.phase_loss(phase.name),
            "model": config.model,
            "seed": config.seed,
            "batch_size": config.batch_size,
        },
    }
