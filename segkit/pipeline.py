"""The only place that knows all parts: from a configuration to a finished run folder, phase by phase."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit import runtime
from segkit.config import LOSS_OPTIONS, Config, DatasetConfig, check_targets, instantiate, plain
from segkit.data import SampleSet
from segkit.data.loader import Batch, eval_batches, steps_per_epoch, train_batches
from segkit.data.statistics import LabelCounts, count_labels, fingerprint
from segkit.data.transforms import EvalTransform, TrainTransform
from segkit.errors import InputError
from segkit.evaluation import Evaluation, evaluate, to_results
from segkit.losses import UpsampledLoss
from segkit.models import Segmenter, enable_grad_checkpointing
from segkit.phase_cache import PhaseCache, default_cache_dir, phase_key
from segkit.preflight import Splits
from segkit.report.pictures import picture_grid
from segkit.report.tables import class_table
from segkit.run_folder import RunFolder
from segkit.training import checkpoint, distributed
from segkit.training.optim import parameter_groups
from segkit.training.precision import Mixed
from segkit.training.tracking import Tracker
from segkit.training.trainer import Interrupted, Settings, Trainer


def run(config: Config, folder: Path, phases: dict[str, Splits]) -> float:
    """Train every phase of ``config`` in ``folder``; returns the mean IoU of the last one.

    ``phases`` are the opened splits (:func:`segkit.preflight.open_phases`). A finished phase is not repeated, an
    unfinished one goes on from its last checkpoint.
    """
    check_targets(config)
    runtime.set_determinism(strict=config.determinism.value == "strict")
    device = runtime.resolve_device(config.device)
    with distributed.process_group(device), stop_on_signal() as stop:
        return Run(config, folder, phases, device, stop).train()


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM or SIGINT has come; a second signal acts as it always does."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_model(config: Config, num_classes: int) -> Segmenter:
    """The model of ``config`` for ``num_classes``, with its weights drawn from ``config.seed``."""
    torch.manual_seed(runtime.derive_seed(config.seed, "weights"))
    net = instantiate(config.model, {"num_classes": num_classes, "classes": num_classes}, key="model")
    if config.grad_checkpointing:
        enable_grad_checkpointing(net)
    return Segmenter(net)


def build_loss(node: dict[str, Any], counts: LabelCounts, *, ignore_index: int) -> UpsampledLoss:
    """The loss of ``node`` with margins or weights from ``counts``, up-sampling logits to the labels' size."""
    facts = {
        "class_pixels": counts.class_pixels,
        "class_names": list(counts.classes),
        "num_classes": len(counts.classes),
        "ignore_index": ignore_index,
    }
    return UpsampledLoss(instantiate(node, facts, key="loss"), banded=node.get("banded"))


def build_optimizer(config: Config, model: nn.Module, lr: float | None) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over the parameter groups of ``model``; ``lr`` replaces its learning rate."""
    node = dict(config.optimizer)
    if lr is not None:
        node["lr"] = lr
    if "lr" not in node:
        raise InputError("optimizer.lr is needed: set optimizer.lr=...")
    groups = parameter_groups(model, lr=node["lr"], encoder_lr_factor=config.encoder_lr_factor)
    return instantiate({**node, "params": groups}, key="optimizer")


def train_transform(dataset: DatasetConfig, *, augment: bool, ignore_index: int) -> TrainTransform:
    """Scale-crop-flip and colour jitter of ``dataset``; only the crop without ``augment``."""
    return TrainTransform(
        crop=(dataset.crop[0], dataset.crop[1]),
        resize=plain(dataset.resize),
        scale=(dataset.scale[0], dataset.scale[1]) if augment else (1.0, 1.0),
        flip=dataset.flip if augment else 0.0,
        color_jitter=dataset.color_jitter if augment else 0.0,
        ignore_index=ignore_index,
    )


@dataclass
class Run:
    """One run: its configuration, its folder, and the model that goes through all phases."""

    config: Config
    path: Path
    phases: dict[str, Splits]
    device: torch.device
    stop: Callable[[], bool]
    folder: RunFolder = field(init=False)
    cache_dir: Path = field(init=False)
    model: Segmenter = field(init=False)

    def __post_init__(self) -> None:
        self.path = Path(distributed.agree(str(self.path)))
        self.folder = RunFolder(self.path, self.config, writes=distributed.is_main())
        self.cache_dir = Path(self.config.cache_dir) if self.config.cache_dir else default_cache_dir()

    def train(self) -> float:
        """Train all phases; returns the mean IoU of the last."""
        origin = runtime.provenance(device=self.device, seed=self.config.seed)
        fingerprints = {name: fingerprint(splits.train) for name, splits in self.phases.items()}
        self.folder.start({**origin, "data": fingerprints, "world_size": distributed.world_size()})
        for note in dict.fromkeys(note for splits in self.phases.values() for note in splits.train.notes):
            say(f"note: {note}")
        first = next(iter(self.phases.values())).train
        self.model = build_model(self.config, first.num_classes).to(self.device)
        if self.config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.init_from:
            self._initialise(Path(self.config.init_from))
        if self.config.profile_steps:
            return self._profile()
        machine = {"versions": origin["versions"], "device": origin["device"], "threads": origin["threads"]}
        results: dict[str, Any] = {}
        for name in self.config.schedule:
            if name == list(self.config.schedule)[-1]:
                self.folder.link_last_phase()  # a run that is watched, or stopped, shows its checkpoints there
                results = self._phase(name)
                self.folder.link_last_phase()
            else:
                key = phase_key(self.config, name, fingerprints=fingerprints, machine=machine)
                results = self._shared_phase(name, key)
            self._load_phase(name)
        say(class_table(results))
        say(f"run folder: {self.path}")
        return float(results["mean_iou"])

    def _initialise(self, source: Path) -> None:
        path = source / "checkpoints" / checkpoint.LAST if source.is_dir() else source
        checkpoint.load_weights(self.model, checkpoint.weights(checkpoint.load(path)), source=path)

    def _load_phase(self, name: str) -> None:
        """Load the weights that phase ``name`` ended with: the next phase starts from them."""
        path = self.folder.phase(name) / "checkpoints" / checkpoint.LAST
        checkpoint.load_weights(self.model, checkpoint.weights(checkpoint.load(path)), source=path)

    def _shared_phase(self, name: str, key: str) -> dict[str, Any]:
        """A phase that others build on: from the run folder, from the cache, or trained and then kept there."""
        if distributed.agree(self.folder.is_finished(name)):
            return self._phase(name)
        cache, cached = PhaseCache(self.cache_dir), False
        with ExitStack() as stack:
            if distributed.is_main():
                waiting = f"phase {name}: another run trains it; waiting for that"
                stack.enter_context(cache.locked(key, on_wait=lambda: say(waiting)))
                unfinished = (self.folder.phase(name) / "checkpoints").exists()
                cached = not unfinished and cache.fetch(key, self.folder.phase(name))
                if cached:
                    say(f"phase {name}: taken from the cache ({key})")
            distributed.agree(None)
            results = self._phase(name)
            if distributed.is_main() and not cached:
                cache.store(key, self.folder.phase(name))
        return results

    # -- one phase -----------------------------------------------------------------------------------------------

    def _phase(self, name: str) -> dict[str, Any]:
        if self.folder.is_finished(name):
            say(f"phase {name}: finished already")
            if distributed.is_main():
                metrics = self.folder.phase(name) / "metrics.jsonl"
                self.folder.metrics.write_bytes(self.folder.earlier_metrics(name) + metrics.read_bytes())
            return self.folder.results(name)
        return PhaseRun(self, name).train()

    def _profile(self) -> float:
        from segkit.training.profile import profile_steps

        name = next(iter(self.config.schedule))
        phase = PhaseRun(self, name)
        trainer = phase.trainer()
        say(profile_steps(trainer, phase.batches(0), num_steps=self.config.profile_steps, folder=self.path))
        return math.nan


class PhaseRun:
    """What one phase needs: data, loss, evaluation, files."""

    def __init__(self, owner: Run, name: str) -> None:
        self.run, self.config, self.name = owner, owner.config, name
        self.settings_of = owner.config.schedule[name]
        self.dataset_config = owner.config.phase_dataset(name)
        self.loss_node = owner.config.phase_loss(name)
        self.splits = owner.phases[name]
        self.folder = owner.folder.phase(name)
        self.num_steps, self.per_epoch = self._count_steps()
        self.evaluation: Evaluation | None = None
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.counts = self._count_labels()
        self.mixed = Mixed(self.config.precision.value, owner.device)
        self.fixed = self._fixed_batches()
        self.tracker = Tracker(
            self.folder if distributed.is_main() else None,
            phase=name,
            run_metrics=owner.folder.metrics,
            num_steps=self.num_steps,
        )

    def _count_steps(self) -> tuple[int, int]:
        per_epoch = steps_per_epoch(len(self.splits.train), self.config.batch_size)
        phase = self.settings_of
        steps = phase.steps if phase.steps is not None else math.ceil((phase.epochs or 0) * per_epoch)
        return min(steps, self.config.limit_steps or steps), per_epoch

    def _count_labels(self) -> LabelCounts:
        arguments = {"workers": self.config.workers, "cache_dir": self.run.cache_dir}
        if distributed.is_main():
            counts = count_labels(self.splits.train, **arguments)
            runtime.write_json(self.folder / "label_counts.json", json.loads(counts.to_json()))
        distributed.agree(None)  # the other ranks then read the cache
        return counts if distributed.is_main() else count_labels(self.splits.train, **arguments)

    # -- data ----------------------------------------------------------------------------------------------------

    def _fixed_batches(self) -> list[Batch] | None:
        """The batches of ``overfit_batches``, which are trained on again and again."""
        number = self.config.overfit_batches
        return None if number is None else list(self._load(0, number, augment=False))

    def _load(self, start: int, stop: int, *, augment: bool) -> Iterable[Batch]:
        ignore_index = self.splits.train.ignore_index
        return train_batches(
            self.splits.train,
            transform=train_transform(self.dataset_config, augment=augment, ignore_index=ignore_index),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            phase=self.name,
            start_step=start,
            num_steps=stop,
            workers=self.config.workers,
            pin_memory=self.run.device.type == "cuda",
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def batches(self, start: int) -> Iterable[Batch]:
        """The batches from step ``start`` to the end of the phase."""
        if self.fixed is None:
            return self._load(start, self.num_steps, augment=True)
        return (self.fixed[step % len(self.fixed)] for step in range(start, self.num_steps))

    def _eval_batches(self) -> Iterable[Any]:
        if self.fixed is not None:
            return numbered(self.fixed)
        limit = self.config.evaluation.max_images
        split: SampleSet = self.splits.val if limit is None else self.splits.val[:limit]
        transform = EvalTransform(
            resize=plain(self.dataset_config.eval_resize), labels=self.dataset_config.eval_labels.value
        )
        return eval_batches(
            split,
            transform=transform,
            batch_size=self.config.evaluation.batch_size,
            workers=self.config.workers,
            pin_memory=self.run.device.type == "cuda",
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Evaluate ``model`` on the validation split; the results in the form of results.json."""
        self.evaluation = evaluate(
            model,
            self._eval_batches(),
            num_classes=self.splits.val.num_classes,
            ignore_index=self.splits.val.ignore_index,
            device=self.run.device,
            precision=self.config.precision.value,
            pictures=self.config.evaluation.pictures,
            reduce=sum_and_gather if distributed.world_size() > 1 else None,
        )
        protocol = {
            "dataset": self.dataset_config.name,
            "split": self.dataset_config.val_split if self.fixed is None else "overfitted batches",
            "max_images": self.config.evaluation.max_images,
            "resize": plain(self.dataset_config.eval_resize),
            "labels": self.dataset_config.eval_labels.value,
            "inference": "whole image",
            "precision": self.config.precision.value,
        }
        return to_results(self.evaluation, class_names=self.splits.val.classes, protocol=protocol)

    def validate(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Evaluate during training, and note the scores."""
        results = self.evaluate(model)
        scores = ("iou", "precision", "recall")
        classes = {name: {score: values[score] for score in scores} for name, values in results["classes"].items()}
        summary = {key: results[key] for key in ("mean_iou", "pixel_accuracy", "num_classes_averaged")}
        self.tracker.record(step, {"split": "val", **summary, "classes": classes})
        scalars = {f"val/{key}": value for key, value in summary.items() if value is not None}
        for score in scores:
            scalars |= {
                f"val_{score}/{name}": values[score] for name, values in classes.items() if values[score] is not None
            }
        self.tracker.scalars(step, scalars)
        assert self.evaluation is not None
        if self.evaluation.pictures and distributed.is_main():
            grid = picture_grid(self.evaluation.pictures, self.splits.val.palette, self.splits.val.classes)
            self.tracker.pictures(step, "val/image_label_prediction", grid)
        self.tracker.say(
            f"{self.name} step {step}: mean IoU {shown(results['mean_iou'])} over "
            f"{results['num_classes_averaged']} classes, pixel accuracy {shown(results['pixel_accuracy'])}"
        )
        return results

    # -- training ------------------------------------------------------------------------------------------------

    def settings(self) -> Settings:
        """The numbers of the phase, in steps."""
        evaluation = self.config.evaluation
        every = evaluation.every_steps
        if evaluation.every_epochs is not None:
            every = max(1, round(evaluation.every_epochs * self.per_epoch))
        return Settings(
            phase=self.name,
            num_steps=self.num_steps,
            seed=self.config.seed,
            warmup_steps=self.settings_of.warmup_steps,
            poly_power=self.settings_of.poly_power,
            accumulate=self.config.accumulate,
            clip_norm=self.config.clip_norm,
            log_every=self.config.log_every,
            evaluate_every=every,
            checkpoint_every=self.config.checkpoint_every,
            channels_last=self.config.channels_last,
        )

    def trainer(self) -> Trainer:
        """The trainer of the phase, at its start."""
        model = self.run.model
        loss = build_loss(self.loss_node, self.counts, ignore_index=self.splits.train.ignore_index)
        if distributed.is_main():
            write_margins(self.folder, loss.loss, self.loss_node, self.counts.classes)
        ema = None
        if self.config.ema_decay is not None:
            averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema_decay)
            ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
        return Trainer(
            model=model,
            loss=loss.to(self.run.device),
            optimizer=build_optimizer(self.config, model, self.settings_of.lr),
            settings=self.settings(),
            mixed=self.mixed,
            tracker=self.tracker,
            folder=self.folder,
            validate=self.validate,
            config=plain(self.config),
            ema=ema,
            sync_batchnorm=self.config.sync_batchnorm,
            compile_model=self.config.compile,
            stop=self.run.stop,
        )

    def train(self) -> dict[str, Any]:
        """Train the phase to its end and write its results."""
        trainer = self.trainer()
        state = checkpoint.load_last(self.folder / "checkpoints")
        earlier = self.run.folder.earlier_metrics(self.name)
        if state is None:
            self.tracker.truncate(0, step=0, earlier=earlier)
        else:
            trainer.restore(state, earlier=earlier)
            say(f"phase {self.name}: going on from step {trainer.progress.step} of {self.num_steps}")
        try:
            results = trainer.fit(self.batches) if trainer.progress.step < self.num_steps else {}
        finally:
            self.tracker.close()
        if self.evaluation is None:  # stopped between the last checkpoint and the results
            results = self.evaluate(trainer.model if trainer.ema is None else trainer.ema.module)
        return self._finish(results, trainer)

    def _finish(self, results: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        progress = trainer.progress
        results = {
            **results,
            "phase": self.name,
            "step": progress.step,
            "best": {"mean_iou": progress.best_score, "step": progress.best_step},
            "training": {"loss": self.loss_node, "model": self.config.model, "seed": self.config.seed},
        }
        if distributed.is_main():
            assert self.evaluation is not None
            self.evaluation.per_image.save(self.folder / "per_image.npz")
            runtime.write_json(self.folder / "results.json", results)
        distributed.agree(None)
        return results


def write_margins(folder: Path, loss: Any, node: dict[str, Any], classes: Sequence[str]) -> None:
    """Note the margins that ``loss`` trains with in margins.json; nothing for a loss without margins."""
    if hasattr(loss, "rho_0k"):
        margins = {name: getattr(loss, name).tolist() for name in ("rho_0k", "rho_k0")}
        options = {key: value for key, value in node.items() if key not in ("_target_", *LOSS_OPTIONS)}
        runtime.write_json(folder / "margins.json", {"classes": list(classes), **margins, **options})


def numbered(batches: list[Batch]) -> Iterator[Batch]:
    """The batches with the images numbered from 0, as an evaluation wants them."""
    count = 0
    for batch in batches:
        yield batch._replace(indices=list(range(count, count + len(batch.names))))
        count += len(batch.names)


def sum_and_gather(counts: torch.Tensor, local: Any) -> tuple[torch.Tensor, list[Any]]:
    """The reduction of :func:`segkit.evaluation.evaluate` over the ranks."""
    return distributed.sum_over_ranks(counts), distributed.gather_objects(local)


def shown(value: float | None) -> str:
    """A score with four digits; a dash where it has no meaning."""
    return "-" if value is None else f"{value:.4f}"


def say(text: str) -> None:
    """Print a line, on the main process only."""
    if distributed.is_main():
        print(text, flush=True)


__all__ = ["LOSS_OPTIONS", "Interrupted", "Run", "build_loss", "build_model", "build_optimizer", "run"]
