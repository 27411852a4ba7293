"""Counting pixels: the confusion matrix as int64 counts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from segkit.errors import InputError
from segkit.evaluation import metrics

_BYTE = 256
# A histogram of OpenCV holds float32 bins, which count exactly up to 2**24.
_MAX_HISTOGRAM_PIXELS = 2**24


def count_pixels(pred: Tensor, target: Tensor, *, num_classes: int, ignore_index: int = 255, where: str = "") -> Tensor:
    """Return the confusion matrix of one pair: int64 (K, K) on the CPU, rows = target class, columns = prediction.

    As `count_images` for one image of any shape; ``where`` names it in error messages.
    """
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        kinds = f"{type(pred).__name__} and {type(target).__name__}"
        raise InputError(f"prediction and label must be tensors{_of(where)}, got {kinds}: take torch.as_tensor")
    one = count_images(pred[None], target[None], num_classes=num_classes, ignore_index=ignore_index, names=[where])
    return one[0]


def count_images(
    pred: Tensor, target: Tensor, *, num_classes: int, ignore_index: int = 255, names: Sequence[str]
) -> Tensor:
    """Return the confusion matrix of every image of a batch: int64 (N, K, K) on the CPU, read from the device at once.

    ``pred`` and ``target`` are integer tensors (N, ...) of one shape; pixels whose target is ``ignore_index`` are left
    out, whatever was predicted there. ``names`` of the images are for error messages.

    Raises `InputError` if a target is neither a class nor ``ignore_index``, or if a prediction is not a class.
    """
    if pred.shape != target.shape:
        raise InputError(
            f"prediction and label differ in size{_of(names[0])}: {tuple(pred.shape[1:])} and {tuple(target.shape[1:])}"
        )
    if pred.is_floating_point() or target.is_floating_point():
        raise InputError(
            f"prediction and label must hold class numbers{_of(names[0])}, got {pred.dtype} and {target.dtype}"
        )
    pred = pred.to(target.device)
    if not (0 <= ignore_index < _BYTE and num_classes <= _BYTE and _fits_bytes(pred) and _fits_bytes(target)):
        images = zip(pred, target, names, strict=True)
        return torch.stack([_count_any(p, t, num_classes, ignore_index, name).cpu() for p, t, name in images])
    histograms = _byte_histograms(*(labels.to(torch.uint8).flatten(1) for labels in (pred, target)))
    counts = histograms[:, :num_classes, :num_classes].contiguous()
    if ignore_index < num_classes:
        counts[:, ignore_index] = 0
    void = histograms[:, ignore_index].sum(1, keepdim=True)
    read = torch.cat([counts.flatten(1), void], 1).cpu().numpy()
    for i in np.flatnonzero(read.sum(1) != target[0].numel()).tolist():
        _raise_out_of_range(pred[i], target[i], num_classes, ignore_index, names[i])
    return torch.from_numpy(read[:, :-1].reshape(counts.shape))


def _fits_bytes(labels: Tensor) -> bool:
    if labels.dtype in (torch.uint8, torch.bool) or labels.numel() == 0:
        return True
    low, high = torch.aminmax(labels)
    return int(low) >= 0 and int(high) < _BYTE


def _byte_histograms(pred: Tensor, target: Tensor) -> Tensor:
    """Return how often each pair (target, prediction) of bytes occurs in every row of (N, P): int64 (N, 256, 256)."""
    rows = len(target)
    if target.device.type != "cpu":
        first = torch.arange(rows, device=target.device)[:, None] * _BYTE * _BYTE
        index = target.to(torch.int64).mul_(_BYTE).add_(pred).add_(first)
        return torch.bincount(index.flatten(), minlength=rows * _BYTE * _BYTE).view(rows, _BYTE, _BYTE)
    total = np.zeros((rows, _BYTE, _BYTE), np.int64)
    for row, start in itertools.product(range(rows), range(0, target.shape[1], _MAX_HISTOGRAM_PIXELS)):
        part = slice(start, start + _MAX_HISTOGRAM_PIXELS)
        low_high = [labels[row, part].contiguous().numpy() for labels in (pred, target)]
        # The two bytes of a pixel side by side, read as one 16-bit number target * 256 + prediction.
        pairs = cv2.merge(low_high if sys.byteorder == "little" else low_high[::-1]).view(np.uint16)
        bins = cv2.calcHist([pairs.reshape(1, -1)], [0], None, [_BYTE * _BYTE], [0, _BYTE * _BYTE])
        total[row] += bins.reshape(_BYTE, _BYTE).astype(np.int64)
    return torch.from_numpy(total)


def _count_any(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int, where: str) -> Tensor:
    """Return the confusion matrix of values outside 0..255 too: slower, without a limit on the number of classes."""
    pred, target = pred.reshape(-1).long(), target.reshape(-1).long()
    valid = target != ignore_index
    pred, target = pred[valid], target[valid]
    for values in (pred, target):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= num_classes):
            _raise_out_of_range(pred, target, num_classes, ignore_index, where)
    index = target * num_classes + pred
    return torch.bincount(index, minlength=num_classes * num_classes).view(num_classes, num_classes)


def _raise_out_of_range(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int, where: str) -> None:
    valid = target != ignore_index
    for values, name in ((target[valid], "label"), (pred[valid], "prediction")):
        wrong = values[(values < 0) | (values >= num_classes)]
        if not wrong.numel():
            continue
        unique, num = (part[:5].tolist() for part in torch.unique(wrong, return_counts=True))
        found = ", ".join(f"{value} ({n} pixels)" for value, n in zip(unique, num, strict=True))
        allowed = f"the classes 0..{num_classes - 1}"
        if name == "label":
            allowed += f" and ignore_index {ignore_index}; map the raw labels with the data set's label table"
        else:
            allowed += "; the model must have one output channel per class of the data set"
        raise InputError(f"{name} value {found} out of range{_of(where)}: allowed are {allowed}")
    raise AssertionError("no value is out of range")


def _of(where: str) -> str:
    return f" in {where}" if where else ""


class ConfusionMatrix:
    """A running confusion matrix. ``counts`` is int64 (K, K) on ``device``, rows = target, columns = prediction.

    The scores are float64 tensors (K,) on the CPU, or floats; for their definitions and for the policy on absent
    classes see `segkit.evaluation.metrics`.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, pred: Tensor, target: Tensor, *, where: str = "") -> None:
        """Count a pair of integer tensors of one shape (..., H, W); see `count_pixels`."""
        counts = count_pixels(pred, target, num_classes=self.num_classes, ignore_index=self.ignore_index, where=where)
        self.counts += counts.to(self.counts.device)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix with the same classes."""
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise InputError(
                f"cannot merge a confusion matrix of {other.num_classes} classes (ignore_index "
                f"{other.ignore_index}) into one of {self.num_classes} (ignore_index {self.ignore_index})"
            )
        self.counts += other.counts.to(self.counts.device)

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts.zero_()

    def _numpy(self) -> np.ndarray:
        return self.counts.cpu().numpy()

    def iou(self) -> Tensor:
        """(K,), nan where the union is 0."""
        return torch.from_numpy(metrics.iou(self._numpy()))

    def mean_iou(self) -> float:
        """Mean over the classes with a union."""
        return metrics.mean_iou(self._numpy())

    def absent_classes(self) -> list[int]:
        """Classes with union 0, left out of the mean IoU."""
        return metrics.absent_classes(self._numpy())

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right."""
        return metrics.pixel_accuracy(self._numpy())

    def precision(self) -> Tensor:
        """(K,), nan where a class was never predicted."""
        return torch.from_numpy(metrics.precision(self._numpy()))

    def recall(self) -> Tensor:
        """(K,), nan where a class has no target pixel."""
        return torch.from_numpy(metrics.recall(self._numpy()))

    class_accuracy = recall

    def dice(self) -> Tensor:
        """(K,), nan where a class is neither target nor predicted."""
        return torch.from_numpy(metrics.dice(self._numpy()))

    def frequency_weighted_iou(self) -> float:
        """IoU weighted by the share of target pixels."""
        return metrics.frequency_weighted_iou(self._numpy())
