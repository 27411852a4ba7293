"""One phase of a run: its data, its loss, its evaluation, its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from segkit import files
from segkit.config.schema import Config, plain
from segkit.config.targets import LOSS_OPTIONS
from segkit.data import SampleSet
from segkit.data.loader import Batch, epoch_order, eval_batches, steps_per_epoch, train_batches
from segkit.data.statistics import LabelCounts, count_labels
from segkit.data.transforms import EvalTransform
from segkit.errors import Interrupted
from segkit.evaluation import Evaluation, evaluate, to_results, whole_image
from segkit.evaluation.inference import Inference
from segkit.losses import ObservedLoss, add_sums
from segkit.models import Segmenter
from segkit.report.pictures import picture_grid
from segkit.report.stored_pictures import write_pictures
from segkit.run import charts
from segkit.run.build import build_loss, build_optimizer, evaluation_protocol, train_transform
from segkit.run.folder import RunFolder
from segkit.run.splits import Splits
from segkit.training import checkpoint, distributed
from segkit.training.precision import Mixed
from segkit.training.tracking import Tracker
from segkit.training.trainer import Settings, Trainer


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a phase shares with the others of its run."""

    config: Config
    folder: RunFolder
    cache_dir: Path
    device: torch.device
    model: Segmenter
    stop: Callable[[], bool]


class PhaseRun:
    """What one phase needs: data, loss, evaluation, files."""

    def __init__(self, run: Surroundings, name: str, splits: Splits) -> None:
        self.run, self.config, self.name, self.splits = run, run.config, name, splits
        self.settings_of = run.config.schedule[name]
        self.dataset_config = run.config.phase_dataset(name)
        self.loss_node = run.config.phase_loss(name)
        self.folder = run.folder.phase(name)
        self.num_steps, self.per_epoch = self._count_steps()
        self.evaluation: Evaluation | None = None
        self.validation_sums: dict[str, torch.Tensor] = {}
        self.loss: nn.Module | None = None
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.counts = self._count_labels()
        self.mixed = Mixed(self.config.precision.value, run.device)
        self.fixed = self._fixed_batches()
        self.tracker = Tracker(
            self.folder if distributed.is_main() else None,
            phase=name,
            run_metrics=run.folder.metrics,
            num_steps=self.num_steps,
        )

    def _count_steps(self) -> tuple[int, int]:
        per_epoch = steps_per_epoch(len(self.splits.train), self.config.batch_size)
        phase = self.settings_of
        steps = phase.steps if phase.steps is not None else math.ceil((phase.epochs or 0) * per_epoch)
        return min(steps, self.config.limit_steps or steps), per_epoch

    def _count_labels(self) -> LabelCounts:
        def count() -> str:
            counts = count_labels(self.splits.train, workers=self.config.workers, cache_dir=self.run.cache_dir)
            palette = self.splits.train.palette.tolist()  # so that a prediction needs no data set
            files.write_json(self.folder / "label_counts.json", {**json.loads(counts.to_json()), "palette": palette})
            return counts.to_json()

        return LabelCounts.from_json(distributed.on_main(count))

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

    def names_of(self, step: int) -> list[str]:
        """The samples of ``step``, in the order of the batch over all ranks."""
        if self.fixed is not None:
            return list(self.fixed[step % len(self.fixed)].names)
        samples, size = self.splits.train.samples, self.config.batch_size
        epoch, place = divmod(step, self.per_epoch)
        order = epoch_order(len(samples), seed=self.config.seed, phase=self.name, epoch=epoch)
        return [samples[index].name for index in order[place * size : (place + 1) * size]]

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

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, to their end or until the run is to stop; several ranks agree on that afterwards."""
        for batch in batches:
            if self.run.stop():
                if distributed.world_size() == 1:
                    raise self._stopped()
                return
            yield batch

    def _stopped(self) -> Interrupted:
        return Interrupted(f"stopped in an evaluation of phase {self.name}")

    def _sum_and_gather(self, counts: torch.Tensor, local: Any) -> tuple[torch.Tensor, list[Any]]:
        """The reduction of :func:`segkit.evaluation.evaluate` over the ranks."""
        if distributed.any_rank(self.run.stop(), self.run.device):
            raise self._stopped()
        return distributed.sum_over_ranks(counts), distributed.gather_objects(local)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Evaluate ``model`` on the validation split; the results in the form of results.json."""
        observed = charts.ObservedEvaluation(self.loss) if isinstance(self.loss, ObservedLoss) else None
        batches = self._until_stopped(self._eval_batches())
        self.evaluation = evaluate(
            model,
            batches if observed is None else observed.batches(batches),
            num_classes=self.splits.val.num_classes,
            ignore_index=self.splits.val.ignore_index,
            device=self.run.device,
            precision=self.config.precision.value,
            pictures=self.config.evaluation.pictures,
            reduce=self._sum_and_gather if distributed.world_size() > 1 else None,
            predict=whole_image if observed is None else observed.predict,
        )
        self.validation_sums = {} if observed is None else self._over_ranks(observed.sums)
        protocol = evaluation_protocol(
            self.dataset_config,
            Inference(),
            split=self.dataset_config.val_split if self.fixed is None else "overfitted batches",
            max_images=self.config.evaluation.max_images,
            precision=self.config.precision.value,
        )
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
        assert self.evaluation is not None
        self.tracker.scalars(step, scalars | charts.error_shares(self.evaluation.counts, self.splits.val.classes))
        self._diagnose(step)
        if self.evaluation.pictures and distributed.is_main():
            grid = picture_grid(self.evaluation.pictures, self.splits.val.palette, self.splits.val.classes)
            self.tracker.pictures(step, "val/image_label_prediction", grid)
        self.tracker.say(
            f"{self.name} step {step}: mean IoU {shown(results['mean_iou'])} over "
            f"{results['num_classes_averaged']} classes, pixel accuracy {shown(results['pixel_accuracy'])}"
        )
        return results

    def _diagnose(self, step: int) -> None:
        """Show what the margins did in the last evaluation, and in training before it, where the loss keeps that."""
        if not isinstance(self.loss, ObservedLoss):
            return
        if self.validation_sums:
            self.tracker.scalars(step, charts.bounds(self.validation_sums))
        sums = self._over_ranks(self.loss.take())
        if sums:
            pixels = self.counts.class_pixels
            charts.show_diagnosis(self.tracker, step, sums, classes=self.counts.classes, pixels=pixels)

    def _over_ranks(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums of all ranks; a rank without an image has none to add."""
        total: dict[str, torch.Tensor] = {}
        for part in distributed.gather_objects({name: value.cpu().clone() for name, value in sums.items()}):
            add_sums(total, part)
        return total

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
        self.loss = build_loss(
            self.loss_node,
            self.counts,
            ignore_index=self.splits.train.ignore_index,
            observe_every=self.config.log_every * self.config.accumulate,
        )
        if distributed.is_main():
            write_margins(self.folder, self.loss, self.loss_node, self.counts.classes)
        ema = None
        if self.config.ema_decay is not None:
            averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema_decay)
            ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
        return Trainer(
            model=model,
            loss=self.loss.to(self.run.device),
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
            names_of=self.names_of,
        )

    def train(self) -> dict[str, Any]:
        """Train the phase to its end and write its results."""
        trainer = self.trainer()
        last = distributed.on_main(lambda: checkpoint.find_last(self.folder / "checkpoints"))
        earlier = self.run.folder.earlier_metrics(self.name)
        if last is None:
            self.tracker.truncate(0, step=0, earlier=earlier)
            self._open_charts()
        else:
            trainer.restore(checkpoint.load(last), earlier=earlier)
            say(f"phase {self.name}: going on from step {trainer.progress.step} of {self.num_steps}")
        try:
            results = trainer.fit(self.batches)
            if self._is_last:
                self.tracker.finished()
        finally:
            self.tracker.close()
        return self._finish(results, trainer)

    @property
    def _is_last(self) -> bool:
        return self.name == list(self.config.schedule)[-1]

    def _open_charts(self) -> None:
        """What TensorBoard shows once a phase; a run that goes on has it already."""
        assert self.loss is not None
        observed = isinstance(self.loss, ObservedLoss)
        self.tracker.layout(charts.LAYOUT | charts.MARGIN_LAYOUT if observed else charts.LAYOUT)
        margins = charts.margin_buffers(self.loss)
        charts.show_margins(self.tracker, margins, classes=self.counts.classes, pixels=self.counts.class_pixels)
        if self._is_last:
            lr = self.settings_of.lr if self.settings_of.lr is not None else self.config.optimizer["lr"]
            values = charts.hparams(self.config, self.name, lr=lr, num_steps=self.num_steps)
            self.tracker.hparams(values, columns=charts.HPARAMS, first=charts.FIRST_HPARAMS, scores=charts.SCORES)

    def _finish(self, results: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        progress = trainer.progress
        results = {
            **results,
            "phase": self.name,
            "step": progress.step,
            "best": {"mean_iou": progress.best_score, "step": progress.best_step},
            "training": {
                "loss": self.loss_node,
                "model": self.config.model,
                "seed": self.config.seed,
                "batch_size": self.config.batch_size,
            },
        }
        if distributed.is_main():
            assert self.evaluation is not None
            self.evaluation.per_image.save(self.folder / "per_image.npz")
            if self.evaluation.pictures:
                table = self.splits.val.table
                grid = picture_grid(self.evaluation.pictures, table.palette, table.classes)
                Image.fromarray(grid).save(self.folder / "pictures.png")
                write_pictures(
                    self.folder / "pictures", self.evaluation.pictures, palette=table.palette, classes=table.classes
                )
            files.write_json(self.folder / "results.json", results)
        distributed.agree(None)
        return results


def write_margins(folder: Path, loss: Any, node: dict[str, Any], classes: Sequence[str]) -> None:
    """Note the margins that ``loss`` trains with in margins.json; nothing for a loss without margins."""
    margins = charts.margin_buffers(loss)
    if margins:
        options = {key: value for key, value in node.items() if key not in ("_target_", *LOSS_OPTIONS)}
        files.write_json(folder / "margins.json", {"classes": list(classes), **margins, **options})


def numbered(batches: list[Batch]) -> Iterator[Batch]:
    """The batches with the images numbered from 0, as an evaluation wants them."""
    count = 0
    for batch in batches:
        yield batch._replace(indices=list(range(count, count + len(batch.names))))
        count += len(batch.names)


def shown(value: float | None) -> str:
    """A score with four digits; a dash where it has no meaning."""
    return "-" if value is None else f"{value:.4f}"


def say(text: str) -> None:
    """Print a line, on the main process only."""
    if distributed.is_main():
        print(text, flush=True)
