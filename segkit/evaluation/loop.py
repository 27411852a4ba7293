"""The evaluation loop: predictions in, counts out. One batch is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segkit.errors import InputError
from segkit.evaluation import metrics
from segkit.evaluation.boundary import BoundaryCounts
from segkit.evaluation.confusion import count_pixels
from segkit.evaluation.inference import whole_image
from segkit.evaluation.per_image import PerImageCounts

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class LabelledBatch(Protocol):
    """What the loop reads of a batch: images uint8 (N, 3, h, w), labels uint8 (N, H, W), and whose they
    are."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def indices(self) -> Sequence[int]: ...


Predict = Callable[[nn.Module, Tensor, tuple[int, int]], Tensor]
"""(model, images on the device, (H, W)) -> predictions (N, H, W)."""

Reduce = Callable[[Tensor, Any], tuple[Tensor, list[Any]]]
"""(counts, local) -> (counts summed over all ranks, the picklable ``local`` of every rank)."""


@dataclass(frozen=True)
class Picture:
    """One validation image with its label and prediction, for display; all of the label's size."""

    name: str
    image: NDArray[np.uint8]
    """(H, W, 3)"""
    label: NDArray[np.uint8]
    """(H, W), train ids and ignore_index"""
    prediction: NDArray[np.integer]
    """(H, W)"""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` counted. Images are in the order of the data set."""

    counts: NDArray[np.int64]
    """(K, K), rows = target class, columns = prediction"""
    per_image: PerImageCounts
    ignore_index: int
    pictures: list[Picture] = field(default_factory=list)
    boundary: BoundaryCounts | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Image names."""
        return self.per_image.names

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.per_image.num_images

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes with a union."""
        return metrics.mean_iou(self.counts)


@dataclass
class _Local:
    """What one rank gathers: sparse matrices and pictures by data set index."""

    matrices: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]
    names: dict[int, str]
    pictures: dict[int, Picture]
    boundary: BoundaryCounts | None


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    *,
    num_classes: int,
    ignore_index: int = 255,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    predict: Predict = whole_image,
    pictures: int = 0,
    boundary_ratio: float | None = None,
    reduce: Reduce | None = None,
    progress: Callable[[Iterable[LabelledBatch]], Iterable[LabelledBatch]] | None = None,
) -> Evaluation:
    """Predict every batch and count it against its labels.

    ``precision`` is "fp32", "bf16" or "fp16" (autocast). ``predict`` turns images into predictions of the
    labels' size. ``pictures`` keeps the images with data set index below it. ``boundary_ratio`` (such as 0.02, a
    share of the diagonal) also counts `BoundaryCounts`. ``reduce`` sums the counts and gathers the rest over the
    ranks where every rank holds a part of the data set (no image twice). ``progress`` wraps the iterable of
    batches. The model's train/eval mode is restored.

    Raises `InputError` if there is no image, or as `count_pixels` and ``predict`` do.
    """
    device = torch.device(device)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    boundary = None
    if boundary_ratio is not None:
        boundary = BoundaryCounts(num_classes, ignore_index=ignore_index, ratio=boundary_ratio)
    local = _Local({}, {}, {}, boundary)
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            for batch in batches if progress is None else progress(batches):
                images = batch.images.to(device, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                size = (int(labels.shape[-2]), int(labels.shape[-1]))
                predictions = predict(model, images, size)
                counts += _count_batch(batch, predictions, labels, num_classes, ignore_index, local)
                _keep_pictures(batch, predictions, pictures, local)
    finally:
        model.train(was_training)
    parts = [local]
    if reduce is not None:
        counts, parts = reduce(counts, local)
    return _merge(counts, parts, num_classes, ignore_index)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a precision name; nothing for "fp32"."""
    if precision not in _AUTOCAST:
        raise InputError(f"precision is {precision!r}; allowed are {', '.join(_AUTOCAST)}")
    dtype = _AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _count_batch(
    batch: LabelledBatch,
    predictions: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    local: _Local,
) -> Tensor:
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=labels.device)
    for i, index in enumerate(batch.indices):
        name = batch.names[i]
        if index in local.names:
            raise InputError(f"image {name} (number {index}) was evaluated twice; give every image once")
        counts = count_pixels(predictions[i], labels[i], num_classes=num_classes, ignore_index=ignore_index, where=name)
        total += counts
        if local.boundary is not None:
            local.boundary.update(predictions[i].cpu().numpy(), batch.labels[i].cpu().numpy())
        matrix = counts.cpu().numpy()
        row, column = np.nonzero(matrix)
        local.matrices[index] = (row, column, matrix[row, column])
        local.names[index] = name
    return total


def _keep_pictures(batch: LabelledBatch, predictions: Tensor, pictures: int, local: _Local) -> None:
    for i, index in enumerate(batch.indices):
        if index >= pictures:
            continue
        label = batch.labels[i].cpu().numpy().copy()
        image = np.ascontiguousarray(batch.images[i].cpu().permute(1, 2, 0).numpy())
        if image.shape[:2] != label.shape:
            image = cv2.resize(image, label.shape[::-1], interpolation=cv2.INTER_AREA)
        local.pictures[index] = Picture(batch.names[i], image, label, predictions[i].cpu().numpy().copy())


def _merge(counts: Tensor, parts: Sequence[_Local], num_classes: int, ignore_index: int) -> Evaluation:
    names: dict[int, str] = {}
    matrices: dict[int, tuple[NDArray[np.int64], ...]] = {}
    pictures: dict[int, Picture] = {}
    for part in parts:
        assert not names.keys() & part.names.keys(), "an image was evaluated on two ranks"
        names |= part.names
        matrices |= part.matrices
        pictures |= part.pictures
        if part is not parts[0] and parts[0].boundary is not None and part.boundary is not None:
            parts[0].boundary.merge(part.boundary)
    if not names:
        raise InputError("there is no image to evaluate; check dataset.root and dataset.val_split")
    order = sorted(names)
    sizes = [len(matrices[index][0]) for index in order]
    image = np.repeat(np.arange(len(order)), sizes)
    entries = [np.concatenate([matrices[index][j] for index in order]).astype(np.int64) for j in range(3)]
    per_image = PerImageCounts(
        image, entries[0], entries[1], entries[2], tuple(names[index] for index in order), num_classes
    )
    summed = counts.cpu().numpy()
    assert np.array_equal(per_image.total(), summed), "per-image counts and their sum differ"
    kept = [pictures[index] for index in sorted(pictures)]
    return Evaluation(summed, per_image, ignore_index, kept, parts[0].boundary)


def to_results(
    evaluation: Evaluation, *, class_names: Sequence[str], protocol: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of ``results.json``: scores as plain numbers and how they were measured.

    A score without meaning (no pixel) is None. ``protocol`` takes any JSON values.
    """
    results = metrics.summary(evaluation.counts, class_names)
    results["num_images"] = evaluation.num_images
    if evaluation.boundary is not None:
        results["boundary"] = evaluation.boundary.summary()
        for name, score in zip(class_names, evaluation.boundary.iou(), strict=True):
            results["classes"][name]["boundary_iou"] = metrics.number(score)
    measured = {"ignore_index": evaluation.ignore_index, "absent_class": "excluded"}
    results["protocol"] = measured | (protocol or {})
    return results
