"""What the tracker shows of a phase beside its records: margins, errors, lambda, the hyper-parameters.

A score of a class is a chart of its own, ``iou/road``: each run is one line there. "HParams" has a row for each run, of
its last phase, with the final scores, and looks alike in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from segkit.config.schema import Config
from segkit.config.targets import short_name
from segkit.evaluation import metrics, whole_image
from segkit.evaluation.overlay import visible
from segkit.losses import LAMBDA_EDGES, add_sums, margin_sums, summarise
from segkit.report import pictures
from segkit.report.groups import loss_name
from segkit.report.text import for_markdown
from segkit.training.step import followers_of
from segkit.training.tracking import Tracker

SCORES = ("curves/mean_iou", "val/pixel_accuracy")
NUMBER, TEXT = 0.0, ""
HPARAMS: dict[str, float | str] = {
    **dict.fromkeys(("dataset", "model", "loss", "schedule", "optimizer", "precision"), TEXT),
    **dict.fromkeys(("lr", "batch_size", "steps", "seed", "ema_decay", "clip_norm", "encoder_lr_factor"), NUMBER),
    **dict.fromkeys(("tau", "upsilon", "mean_margin", "rho_max"), NUMBER),
    **dict.fromkeys(("scale", "absent", "form"), TEXT),
    **dict.fromkeys(("gamma", "label_smoothing", "threshold", "min_kept", "smooth", "alpha", "beta"), NUMBER),
    **dict.fromkeys(("a", "momentum", "ce_weight", "jaccard_weight", "per_image"), NUMBER),
    **dict.fromkeys(("weighting", "classes"), TEXT),
}
"""Hyper-parameters with their kind, the arguments of all losses included: TensorBoard takes the columns of one run for
all, so every run names the same ones."""

FIRST_HPARAMS = ("loss", "lr", "seed", "tau", "upsilon")
"""Those that the table begins with: the first five are shown without asking."""


def hparams(config: Config, phase: str, *, lr: float, num_steps: int) -> dict[str, float | str]:
    """The hyper-parameters of phase ``phase`` that are set, by their names in :data:`HPARAMS`."""
    loss = config.phase_loss(phase)
    parts = (short_name(config.model), config.model.get("arch"), config.model.get("encoder"))
    values: dict[str, Any] = {
        **{key: value for key, value in loss.items() if key in HPARAMS},
        "dataset": config.phase_dataset(phase).name,
        "model": " ".join(part for part in parts if isinstance(part, str)),
        "loss": loss_name(loss),
        "schedule": " ".join(config.schedule),
        "optimizer": short_name(config.optimizer),
        "precision": config.precision.value,
        "lr": lr,
        "steps": num_steps,
        **{key: getattr(config, key) for key in ("batch_size", "seed", "ema_decay", "clip_norm", "encoder_lr_factor")},
    }
    if values.get("rho_max") == "none":
        values["rho_max"] = math.inf
    # A column holds numbers or texts, not both; an argument of the user's own of such a name may be anything.
    return {key: one for key, one in values.items() if isinstance(one, str if HPARAMS[key] == TEXT else int | float)}


def _with_margins(loss: nn.Module) -> Any:
    """``loss`` or the part of it that has margins; None for a loss without margins."""
    return next((part for part in loss.modules() if hasattr(part, "rho_0k")), None)


def margin_buffers(loss: Any) -> dict[str, list[float]]:
    """rho_0k and rho_k0, K numbers each, of the module ``loss`` or a part of it; empty for a loss without margins."""
    found = _with_margins(loss)
    return {} if found is None else {name: getattr(found, name).tolist() for name in ("rho_0k", "rho_k0")}


def running_iou(loss: nn.Module, classes: Sequence[str]) -> dict[str, float]:
    """Scalars: the running IoU I_k of a loss that follows the training, and the margins a log(1 / I_k) that follow."""
    return {
        f"{chart}/{label}": float(value)
        for part in followers_of(loss).values()
        for chart, values in (("running_iou", part.iou), ("iou_margins", part.margins))
        for label, value in zip(classes, values, strict=True)
    }


def show_margins(tracker: Tracker, margins: dict[str, list[float]], *, classes: Sequence[str], pixels: Any) -> None:
    """The margins (:func:`margin_buffers`) of each class, once, as a table beside its ``pixels``."""
    if not margins:
        return
    share = np.asarray(pixels) / np.sum(pixels)
    rows = zip(classes, share, margins["rho_0k"], margins["rho_k0"], strict=True)
    table = [f"| {for_markdown(label)} | {part:.3%} | {own:.4g} | {other:.4g} |" for label, part, own, other in rows]
    head = ["| class | share of the pixels | rho_0k, logits | rho_k0, logits |", "|---|---|---|---|"]
    tracker.text("margins", "\n".join([*head, *table]))


def show_crops(tracker: Tracker, crops: Sequence[tuple[np.ndarray, np.ndarray]], *, palette: Any, classes: Any) -> None:
    """Show training crops, image (h, w, C) beside label (h, w), and a legend; nothing without crops."""
    if crops:
        rows = [np.concatenate([visible(image), pictures.colours(palette)[label]], axis=1) for image, label in crops]
        grid = [*rows, pictures.legend(palette, classes, rows[0].shape[1])]
        tracker.pictures(0, "training crops", np.concatenate(grid))


def error_shares(counts: Any, classes: Sequence[str]) -> dict[str, float]:
    """Scalars: false positives and false negatives of each class as shares of its union; IoU is 1 minus both.

    ``counts`` (K,K) int64, rows = target. NaN for a class without a union.
    """
    tp, target, predicted = metrics.totals(counts)
    union = target + predicted - tp
    kinds = {"false_positive": predicted - tp, "false_negative": target - tp}
    return {
        f"union_{kind}/{label}": float(share)
        for kind, pixels in kinds.items()
        for label, share in zip(classes, metrics.divide(pixels, union), strict=True)
    }


def show_diagnosis(
    tracker: Tracker, step: int, sums: dict[str, Tensor], *, classes: Sequence[str], pixels: Any
) -> None:
    """What the margins did to the training pixels in ``sums`` (``margin_sums``); ``pixels`` (K,) of the data set."""
    for name, value in summarise(sums, class_pixels=pixels).items():
        if value.dim() == 0:
            tracker.scalars(step, {f"margins/{name}": float(value)})
        else:
            named = zip(classes, value.tolist(), strict=True)
            tracker.scalars(step, {f"margins_{name}/{label}": number for label, number in named})
    histogram = sums["histogram"].cpu().numpy()
    tracker.histogram(step, "lambda", histogram.sum(0), LAMBDA_EDGES)
    for label, counts in zip(classes, histogram, strict=True):
        tracker.histogram(step, f"lambda_of_class/{label}", counts, LAMBDA_EDGES)


class LossObserver:
    """A forward hook of ``loss`` that keeps the margin sums of its calls: value and gradient stay as they are.

    One call in ``every`` enters the sums, and the first after each :meth:`take`.
    """

    def __init__(self, loss: nn.Module, *, every: int = 1) -> None:
        assert every >= 1, every
        self.loss, self.every = loss, every
        self._sums: dict[str, Tensor] = {}
        self._calls = 0
        loss.register_forward_hook(self._hook)

    def _hook(self, _: nn.Module, inputs: tuple[Tensor, Tensor], __: Tensor) -> None:
        if self._calls % self.every == 0:
            logits, target = inputs
            add_sums(self._sums, self.sums_of(logits.detach(), target))
        self._calls += 1

    def sums_of(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The sums of :func:`margin_sums` for one batch, at the margins of the loss or of a term; else at 0."""
        part = _with_margins(self.loss)
        if part is None:
            return margin_sums(logits, target, ignore_index=self.loss.ignore_index)  # type: ignore[arg-type]
        return margin_sums(logits, target, rho_k0=part.rho_k0, rho_0k=part.rho_0k, ignore_index=part.ignore_index)

    def take(self) -> dict[str, Tensor]:
        """Return the sums since the last call of this method; empty if there was no step."""
        sums, self._sums, self._calls = self._sums, {}, 0
        return sums


class ObservedEvaluation:
    """Margin sums of an evaluation: give :meth:`predict` and :meth:`batches` to ``evaluate``, then read ``sums``."""

    def __init__(self, observer: LossObserver) -> None:
        self.observer = observer
        self.sums: dict[str, Tensor] = {}
        self._logits: Tensor | None = None

    def predict(self, model: Any, images: Tensor, size: tuple[int, int]) -> Tensor:
        """``whole_image``, which also keeps the logits until the next batch."""

        def scores(images: Tensor) -> Tensor:
            self._logits = model(images)
            return self._logits

        return whole_image(scores, images, size)

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; each is looked at after its prediction."""
        for batch in batches:
            yield batch
            assert self._logits is not None
            labels = batch.labels.to(self._logits.device).long()
            add_sums(self.sums, self.observer.sums_of(self._logits, labels))
            self._logits = None


def bounds(sums: dict[str, Tensor]) -> dict[str, float]:
    """Scalars: the lower bounds of the validation's mean IoU, at the margins of the loss and at FIXED_MARGIN."""
    found = summarise(sums)
    return {f"curves/{name}": float(found[name]) for name in ("mean_iou_bound", "mean_iou_bound_fixed")}
