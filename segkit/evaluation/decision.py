"""A bias per class on the logits that maximises the mean IoU: the plain control for any margin method.

The bias must be tuned on training images: tuned on the images that are scored afterwards, it would fit their mix of
classes and flatter the score. `collect_logits` keeps a sample of pixels, `tune_bias` searches on it, and `BiasedModel`
adds the result to a model's logits, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from segkit.errors import MOST_NUMBER, InputError
from segkit.evaluation.loop import LabelledBatch, evaluating
from segkit.evaluation.metrics import Floats, divide, mean_of_present
from segkit.evaluation.views import forward

_AGAIN = "fit it again with `segkit evaluate RUN --decision bias --refit`"
_NUM_CANDIDATES = 81
_FIRST_REACH = 4.0
"""Logits to either side of the present bias that the first round tries; every round halves it."""


@dataclass(frozen=True)
class LogitSample:
    """Logits float32 (P, K) and target classes (P,) of a sample of labelled pixels.

    ``weights`` (P,): how many pixels of the images each one stands for.
    """

    logits: NDArray[np.float32]
    target: NDArray[np.int64]
    weights: Floats
    num_images: int


@dataclass(frozen=True)
class FittedBias:
    """The bias (K,), and the mean IoU on the sample without and with it."""

    bias: NDArray[np.float32]
    mean_iou_before: float
    mean_iou_after: float

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return JSON values, with the bias by class name."""
        assert len(class_names) == len(self.bias)
        return {
            "bias": {name: float(value) for name, value in zip(class_names, self.bias, strict=True)},
            "mean_iou_before": self.mean_iou_before,
            "mean_iou_after": self.mean_iou_after,
        }


def bias_from_json(bias: Any, class_names: Sequence[str]) -> NDArray[np.float32]:
    """Return the bias (K,) in the order of ``class_names`` from the one by class name of `FittedBias.to_json`."""
    if not isinstance(bias, Mapping) or set(bias) != set(class_names):
        raise InputError(f"the stored bias is none of this run's classes: {_AGAIN}")
    values = [bias[name] for name in class_names]
    if not all(type(value) in (int, float) and abs(value) <= MOST_NUMBER for value in values):
        raise InputError(f"the stored bias holds no numbers: {_AGAIN}")
    return np.array(values, np.float32)


class BiasedModel(nn.Module):
    """``model`` with ``bias`` (K,) added to its logits."""

    bias: Tensor

    def __init__(self, model: nn.Module, bias: NDArray[np.float32] | Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("bias", torch.as_tensor(bias, dtype=torch.float32).view(1, -1, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        """Biased logits (N, K, h, w)."""
        logits = self.model(images)
        if logits.shape[1] != self.bias.shape[1]:
            raise InputError(f"the bias has {self.bias.shape[1]} classes and the model {logits.shape[1]}: {_AGAIN}")
        return logits + self.bias.to(logits.dtype)


def collect_logits(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    *,
    num_classes: int,
    ignore_index: int = 255,
    device: torch.device | str = "cpu",
    pixels_per_image: int = 4000,
    seed: int = 0,
    progress: Callable[[Iterable[LabelledBatch]], Iterable[LabelledBatch]] | None = None,
) -> LogitSample:
    """Return the logits at random labelled pixels, up-sampled bilinearly to the labels' size at those pixels only.

    Half of an image's pixels are drawn from all labelled ones, half evenly from the classes in the image, so that
    rare classes are in the sample; the weights correct for it. The draw depends on ``seed`` and on the image's number.
    """
    device = torch.device(device)
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64], Floats]] = []
    with evaluating(model, device, None):
        for batch in batches if progress is None else progress(batches):
            logits = forward(model, batch.images.to(device, non_blocking=True))
            if logits.shape[1] != num_classes:
                raise InputError(f"the model has {logits.shape[1]} classes, the data set {num_classes}")
            for i, index in enumerate(batch.indices):
                labels = batch.labels[i].cpu().numpy()
                rng = np.random.default_rng([seed, index])
                chosen, weights = _draw_pixels(labels, ignore_index, pixels_per_image, rng)
                target = labels.reshape(-1)[chosen].astype(np.int64)
                parts.append((_logits_at(logits[i], chosen, labels.shape), target, weights))
    if not any(len(target) for _, target, _ in parts):
        raise InputError("there is no labelled pixel to fit a decision on: check dataset.root and dataset.train_split")
    sampled, target, weights = (np.concatenate(values) for values in zip(*parts, strict=True))
    if target.max() >= num_classes:
        raise InputError(f"label value {target.max()} is no class 0..{num_classes - 1} and not {ignore_index}")
    return LogitSample(sampled, target, weights, num_images=len(parts))


def _draw_pixels(
    labels: NDArray[np.integer], ignore_index: int, num_pixels: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Floats]:
    """Return the numbers of the drawn pixels, and their weights: 1 / (expected number of draws of that pixel)."""
    valid = np.flatnonzero(labels != ignore_index)
    if valid.size == 0:
        return valid, np.zeros(0)
    classes = labels.reshape(-1)[valid]
    _, inverse, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    rate = 0.5 / valid.size + 0.5 / (len(sizes) * sizes[inverse])
    drawn = rng.choice(valid.size, num_pixels, p=rate / rate.sum())
    return valid[drawn], 1 / (num_pixels * rate[drawn])


def _logits_at(logits: Tensor, pixels: NDArray[np.int64], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the logits (P, K) of a map (K, h, w) at numbered pixels of its bilinear enlargement to ``size``."""
    y, x = np.divmod(pixels, size[1])
    # grid_sample measures from -1 to 1, the outer edges of the map.
    place = np.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], axis=-1)
    grid = torch.from_numpy(place).float().to(logits.device)[None, None]
    sampled = F.grid_sample(logits[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T.contiguous().cpu().numpy()


def tune_bias(sample: LogitSample, *, num_rounds: int = 6) -> FittedBias:
    """Return the bias that coordinate ascent finds: one class after the other, on an ever finer grid.

    The objective is the mean IoU of argmax(logits + bias), as it is scored: a class without target pixels counts where
    it is predicted. Such a class keeps the bias 0, as the sample says nothing about it, and where that costs nothing
    the others get no bias below 0, so that it is not predicted in their place.
    A step is taken only if it raises the objective, so the result is never worse than no bias.
    """
    num_classes = sample.logits.shape[1]
    present = np.bincount(sample.target, minlength=num_classes) > 0
    bias = np.zeros(num_classes, np.float32)
    before = best = weighted_mean_iou(sample, bias)
    reach = _FIRST_REACH
    for _ in range(num_rounds):
        for k in np.flatnonzero(present):
            candidates = (bias[k] + np.linspace(-reach, reach, _NUM_CANDIDATES)).astype(np.float32)
            objective = _objective_of_candidates(sample, sample.logits + bias, int(k), candidates - bias[k])
            trial = bias.copy()
            trial[k] = candidates[int(np.argmax(objective))]
            # The grid's figures may differ from the score at ties and by rounding, so the score itself decides.
            score = weighted_mean_iou(sample, trial)
            if score > best:
                best, bias = score, trial
        reach /= 2
    raised = np.where(present, bias - min(0, bias[present].min()), 0).astype(np.float32)
    if not present.all() and (score := weighted_mean_iou(sample, raised)) >= best:
        best, bias = score, raised
    return FittedBias(bias, before, best)


def weighted_mean_iou(sample: LogitSample, bias: NDArray[np.float32]) -> float:
    """Return the mean IoU of the biased predictions over the classes with a union, in weighted pixels."""
    num_classes = sample.logits.shape[1]
    predicted = (sample.logits + bias).argmax(1)
    hit = predicted == sample.target
    tp = np.bincount(sample.target[hit], sample.weights[hit], num_classes)
    target = np.bincount(sample.target, sample.weights, num_classes)
    columns = np.bincount(predicted, sample.weights, num_classes)
    return mean_of_present(divide(tp, target + columns - tp))


def _objective_of_candidates(
    sample: LogitSample, scores: NDArray[np.float32], k: int, shifts: NDArray[np.float32]
) -> Floats:
    """Return the mean IoU for each of the sorted ``shifts`` of class k's score, from one pass over the pixels.

    A pixel goes to class k as soon as the shift exceeds the lead of the best other class over k. So the pixels are
    counted by the first shift that moves them, and cumulative sums give the counts for every shift.
    """
    num_classes, num_bins = scores.shape[1], len(shifts) + 1
    own = scores[:, k].copy()
    scores[:, k] = -np.inf
    other = scores.argmax(1)
    lead = np.take_along_axis(scores, other[:, None], axis=1)[:, 0] - own
    first = np.searchsorted(shifts, lead, side="right")
    weights, target = sample.weights, sample.target
    right = np.where(other == target, weights, 0.0)

    def moved(values: Floats) -> Floats:
        """Return sums (num_shifts, K) by former class over the pixels that each shift has moved."""
        table = np.bincount(first * num_classes + other, values, num_bins * num_classes)
        return table.reshape(num_bins, num_classes)[:-1].cumsum(0)

    lost, lost_right = moved(weights), moved(right)
    columns = np.bincount(other, weights, num_classes) - lost
    tp = np.bincount(other, right, num_classes) - lost_right
    columns[:, k] = lost.sum(1)
    tp[:, k] = np.bincount(first, np.where(target == k, weights, 0.0), num_bins)[:-1].cumsum()
    rows = np.bincount(target, weights, num_classes)
    union = rows + columns - tp  # sums that cancel leave less than 1e-6, which no pixel weighs
    return np.nanmean(divide(tp, np.where(union > 1e-6, union, 0)), axis=1)
