"""Evaluation while a phase trains: scores, pictures, and what the margins did."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from segkit.config.schema import plain
from segkit.data import SampleSet
from segkit.data.statistics import LabelCounts
from segkit.errors import Interrupted, NonFiniteLogits
from segkit.evaluation import Evaluation, evaluate, to_results, whole_image
from segkit.evaluation.inference import Inference
from segkit.files import write_atomically
from segkit.losses import add_sums
from segkit.report.pictures import picture_grid, write_pictures
from segkit.report.tables import without_pixels
from segkit.run import charts
from segkit.run.batches import PhaseBatches
from segkit.run.build import evaluation_protocol
from segkit.training import distributed
from segkit.training.failure import smaller_steps
from segkit.training.precision import DTYPES
from segkit.training.tracking import Tracker

SCORES = ("iou", "precision", "recall")
GRACE = 0.5
"""Seconds in which a signal may still come after a loading process has died of it."""


@dataclass(kw_only=True, eq=False)
class Validation:
    """Evaluates a model on the validation split of a phase; ``last`` is the latest evaluation."""

    batches: PhaseBatches
    counts: LabelCounts
    loss: nn.Module
    observer: charts.LossObserver | None
    tracker: Tracker
    device: torch.device
    stop: Callable[[], bool]
    last: Evaluation | None = field(default=None, init=False)

    @property
    def split(self) -> SampleSet:
        """The images that are evaluated, unless some batches of the training are."""
        return self.batches.splits.val

    def evaluate(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Results of ``model`` in the form of results.json, and the sums of an observed loss (else empty)."""
        observed = None if self.observer is None else charts.ObservedEvaluation(self.observer)
        batches = self._until_stopped(self.batches.evaluation())
        config = self.batches.config
        self.last = evaluate(
            model,
            batches if observed is None else observed.batches(batches),
            num_classes=self.split.num_classes,
            ignore_index=self.split.ignore_index,
            device=self.device,
            dtype=DTYPES[config.precision.value],
            pictures=self.batches.spread(config.evaluation.pictures),
            gather=self._gather if distributed.world_size() > 1 else None,
            predict=whole_image if observed is None else observed.predict,
        )
        dataset = config.phase_dataset(self.batches.plan.name)
        protocol = evaluation_protocol(
            dataset,
            Inference(),
            split=dataset.val_split if self.batches.fixed is None else "overfitted batches",
            max_images=config.evaluation.max_images,
            precision=config.precision.value,
        )
        sums = {} if observed is None else _over_ranks(observed.sums)
        return to_results(self.last, class_names=self.split.classes, protocol=protocol), sums

    def __call__(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Evaluate ``model`` after ``step`` and record the scores; returns the results."""
        try:
            results, sums = self.evaluate(model)
        except NonFiniteLogits:
            raise NonFiniteLogits(
                f"after step {step} of phase {(phase := self.batches.plan.name)} the logits of the model are not "
                f"finite (inf or nan): {smaller_steps(plain(self.batches.config), phase)}, or set "
                "clip_norm=1.0 or precision=fp32"
            ) from None
        assert self.last is not None
        classes = {name: {score: values[score] for score in SCORES} for name, values in results["classes"].items()}
        summary = {key: results[key] for key in ("mean_iou", "pixel_accuracy", "num_classes_averaged")}
        self.tracker.evaluation(step, {**summary, "classes": classes})
        self.tracker.scalars(step, charts.error_shares(self.last.counts, self.split.classes))
        self.tracker.scalars(step, charts.running_iou(self.loss, self.split.classes))
        self._show_margins(step, sums)
        if self.last.pictures and distributed.is_main():
            self.tracker.pictures(step, "val/image_label_prediction", self._grid())
        self.tracker.message(
            f"{self.batches.plan.name} step {step}: mean IoU {_four_digits(results['mean_iou'])} over "
            f"{results['num_classes_averaged']} classes, pixel accuracy {_four_digits(results['pixel_accuracy'])}"
        )
        if warning := without_pixels(results):
            self.tracker.message(warning)
        return results

    def write(self, folder: Path) -> None:
        """Write the matrices of all images of the latest evaluation, and its pictures, into ``folder``."""
        assert self.last is not None
        write_atomically(folder / "per_image.npz", self.last.per_image.to_bytes())
        shutil.rmtree(folder / "pictures", ignore_errors=True)  # of an earlier end of a run that was made longer
        (folder / "pictures.png").unlink(missing_ok=True)
        if self.last.pictures:
            Image.fromarray(self._grid()).save(folder / "pictures.png")
            write_pictures(
                folder / "pictures", self.last.pictures, palette=self.split.palette, classes=self.split.classes
            )

    def _grid(self) -> Any:
        assert self.last is not None
        return picture_grid(self.last.pictures, self.split.palette, self.split.classes)

    def _show_margins(self, step: int, sums: dict[str, torch.Tensor]) -> None:
        """Chart what the margins did in this evaluation, and in training before it, where the loss observes that."""
        if self.observer is None:
            return
        if sums:
            self.tracker.scalars(step, charts.bounds(sums))
        trained = _over_ranks(self.observer.take())
        if trained:
            pixels = self.counts.class_pixels
            charts.show_diagnosis(self.tracker, step, trained, classes=self.counts.classes, pixels=pixels)

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, to their end or until the run is to stop; several ranks agree on that afterwards."""
        iterator = iter(batches)
        while True:
            with interrupted_by(self.stop, str(self._interrupted())):
                batch = next(iterator, None)
            if batch is None:
                return
            if self.stop():
                if distributed.world_size() == 1:
                    raise self._interrupted()
                return
            yield batch

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped in an evaluation of phase {self.batches.plan.name}")

    def _gather(self, local: Any) -> list[Any]:
        """What every rank has counted, for :func:`segkit.evaluation.evaluate`."""
        if distributed.any_rank(self.stop(), self.device):
            raise self._interrupted()
        return distributed.gather_objects(local)


@contextmanager
def interrupted_by(stop: Callable[[], bool], text: str) -> Iterator[None]:
    """Raise Interrupted in place of an exception that comes because the run is being stopped.

    A signal to the whole process group ends the loading processes as well, sometimes before this process hears of it.
    """
    try:
        yield
    except Exception as error:
        until = time.monotonic() + GRACE
        while not stop():
            if isinstance(error, Interrupted) or time.monotonic() > until:
                raise
            time.sleep(0.05)
        raise Interrupted(text) from None


def _over_ranks(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of all ranks; a rank without an image has none to add."""
    total: dict[str, torch.Tensor] = {}
    for part in distributed.gather_objects({name: value.cpu().clone() for name, value in sums.items()}):
        add_sums(total, part)
    return total


def _four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
