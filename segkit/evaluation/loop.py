"""The evaluation loop: predictions in, counts out. One batch is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from segkit.evaluation.confusion import count_images
from segkit.evaluation.inference import whole_image
from segkit.evaluation.overlay import visible
from segkit.evaluation.per_image import PerImageCounts, sparse


class LabelledBatch(Protocol):
    """What the loop reads of a batch: images (N, C, h, w), labels uint8 (N, H, W), names and numbers of both."""

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

Gather = Callable[[Any], list[Any]]
"""The picklable value of this rank -> the values of all ranks."""


@dataclass(frozen=True)
class Picture:
    """An image with its label and prediction, for display; all have the size of the label."""

    name: str
    image: NDArray[np.uint8]
    """(H, W, 3), made `visible`"""
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


@dataclass(frozen=True)
class _Image:
    """What is kept of one image: its name, `sparse` counts, and a picture if asked for."""

    name: str
    counts: NDArray[np.int64]
    picture: Picture | None


@dataclass
class _Local:
    """What one rank gathers: images by their number in the data set, and boundary sums."""

    images: dict[int, _Image]
    boundary: BoundaryCounts | None


def evaluate(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    *,
    num_classes: int,
    ignore_index: int = 255,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    predict: Predict = whole_image,
    pictures: Container[int] = (),
    boundary_ratio: float | None = None,
    gather: Gather | None = None,
    progress: Callable[[Iterable[LabelledBatch]], Iterable[LabelledBatch]] | None = None,
) -> Evaluation:
    """Predict every batch and count it against its labels.

    ``dtype``: of autocast; None for none. ``predict`` turns images into predictions of the labels' size. ``pictures``:
    numbers in the data set of the images to keep. ``boundary_ratio`` (such as 0.02, a share of the
    diagonal): also count `BoundaryCounts`. ``gather`` puts the ranks together, each of which holds a part of the data
    set (no image twice). ``progress`` wraps the iterable of batches. The model's train/eval mode is restored.

    Raises `InputError` if there is no image, or as `count_images` and ``predict`` do.
    """
    device = torch.device(device)
    boundary = None
    if boundary_ratio is not None:
        boundary = BoundaryCounts(num_classes, ignore_index=ignore_index, ratio=boundary_ratio)
    local = _Local({}, boundary)
    background = nullcontext() if boundary is None else boundary.in_background()
    with evaluating(model, device, dtype), background as add_boundary:
        for batch in batches if progress is None else progress(batches):
            images = batch.images.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            size = (int(labels.shape[-2]), int(labels.shape[-1]))
            predictions = predict(model, images, size)
            found = count_images(
                predictions, labels, num_classes=num_classes, ignore_index=ignore_index, names=batch.names
            )
            if boundary is not None or any(index in pictures for index in batch.indices):
                predictions = predictions.cpu()
            for i, (index, name) in enumerate(zip(batch.indices, batch.names, strict=True)):
                if index in local.images:
                    raise InputError(f"image {name} (number {index}) was evaluated twice; give every image once")
                picture = _picture(batch, i, predictions[i]) if index in pictures else None
                local.images[index] = _Image(name, sparse(found[i].numpy()), picture)
                if add_boundary is not None:
                    add_boundary(predictions[i].numpy(), batch.labels[i].cpu().numpy().copy())
    return _merge([local] if gather is None else gather(local), num_classes, ignore_index)


@contextmanager
def evaluating(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the context ``model`` is in evaluation mode and records no gradients; `autocast` is on."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, dtype):
            yield
    finally:
        model.train(was_training)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the autocast context of ``dtype``; an empty one for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _picture(batch: LabelledBatch, i: int, prediction: Tensor) -> Picture:
    """Return image ``i`` of the batch, shrunk or enlarged to the size of its label."""
    label = batch.labels[i].cpu().numpy().copy()
    image: NDArray[Any] = visible(batch.images[i].cpu().permute(1, 2, 0).numpy())
    if image.shape[:2] != label.shape:
        image = cv2.resize(image, label.shape[::-1], interpolation=cv2.INTER_AREA)
    return Picture(batch.names[i], image, label, prediction.numpy().copy())


def _merge(parts: Sequence[_Local], num_classes: int, ignore_index: int) -> Evaluation:
    """Put together what the ranks gathered."""
    images: dict[int, _Image] = {}
    boundary = parts[0].boundary
    for part in parts:
        assert not images.keys() & part.images.keys(), "an image was evaluated on two ranks"
        images |= part.images
        if part is not parts[0] and boundary is not None and part.boundary is not None:
            boundary.merge(part.boundary)
    if not images:
        raise InputError("there is no image to evaluate; check dataset.root and dataset.val_split")
    ordered = [images[index] for index in sorted(images)]
    per_image = PerImageCounts.from_sparse(
        [image.counts for image in ordered], [image.name for image in ordered], num_classes=num_classes
    )
    pictures = [image.picture for image in ordered if image.picture is not None]
    return Evaluation(per_image.total(), per_image, ignore_index, pictures, boundary)


def to_results(
    evaluation: Evaluation, *, class_names: Sequence[str], protocol: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of ``results.json``: scores as plain numbers, and how they were measured.

    A score of no pixel is None. ``protocol`` takes any JSON values.
    """
    results = metrics.summary(evaluation.counts, class_names)
    results["num_images"] = evaluation.per_image.num_images
    if evaluation.boundary is not None:
        results["boundary"] = evaluation.boundary.summary()
        for name, score in zip(class_names, evaluation.boundary.iou(), strict=True):
            results["classes"][name]["boundary_iou"] = metrics.number(score)
    measured = {"ignore_index": evaluation.ignore_index, "absent_class": "excluded"}
    results["protocol"] = measured | (protocol or {})
    return results
