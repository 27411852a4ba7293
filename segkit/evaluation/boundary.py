"""How well contours are met: boundary IoU, boundary F-score and scores within a trimap. Numpy and OpenCV.

Pixels whose target is void are void in the prediction as well: they are not counted, and the edge of a void area is a
contour of both.

**Boundary IoU** of a class: the IoU of two bands, namely the pixels of the class in the target, and in the prediction,
that lie within ``width`` pixels (in the larger of the two axis distances) of a pixel of another label or of the outside
of the image (Cheng et al., Boundary IoU, 2021). ``width`` is a share of the image's diagonal.

**Boundary F-score** of a class: precision = share of the predicted contour pixels with a target contour pixel of that
class no further than ``width`` away (Euclidean), recall the other way round, F = 2 PR / (P + R) (Csurka et al., 2013;
here over the pixels of all images together). A contour pixel has a pixel of another label among its four neighbours;
the edge of the image is no contour here.

**Trimap**: the confusion matrix of the pixels within ``width`` of a contour of the target.

All are sums over images, so that parts of a data set can be merged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray

from segkit.errors import InputError
from segkit.evaluation.metrics import Floats, Ints, divide, mean_iou, mean_of_present, number

Labels = NDArray[np.integer]
MOST_WAITING = 4
"""Images that may wait for `BoundaryCounts.in_background` before it is given another."""
_OUTSIDE = -1
_VOID = -2


class BoundaryCounts:
    """Running sums of boundary scores; ``width`` is ``ratio`` of an image's diagonal, at least 1 pixel."""

    def __init__(self, num_classes: int, *, ignore_index: int = 255, ratio: float = 0.02) -> None:
        if not 0 < ratio < 1:
            raise InputError(f"the boundary ratio is {ratio}; it is a share of the diagonal between 0 and 1")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.ratio = ratio
        self.both_bands, self.target_band, self.predicted_band = np.zeros((3, num_classes), np.int64)
        self.target_contour, self.target_met = np.zeros((2, num_classes), np.int64)
        self.predicted_contour, self.predicted_met = np.zeros((2, num_classes), np.int64)
        self.trimap = np.zeros((num_classes, num_classes), np.int64)

    def update(self, pred: Labels, target: Labels) -> None:
        """Add one image: class numbers (H, W), the target with ``ignore_index`` where it is void."""
        width = band_width(target.shape, self.ratio)
        void = target == self.ignore_index
        target = np.where(void, _VOID, target.astype(np.int16))
        pred = np.where(void, _VOID, pred.astype(np.int16))
        target_band, predicted_band = near_other_label(target, width), near_other_label(pred, width)
        self.target_band += self._per_class(target, target_band)
        self.predicted_band += self._per_class(pred, predicted_band)
        self.both_bands += self._per_class(target, target_band & predicted_band & (target == pred))

        target_contour, predicted_contour = contour(target), contour(pred)
        self.target_contour += self._per_class(target, target_contour)
        self.predicted_contour += self._per_class(pred, predicted_contour)
        for k in np.intersect1d(target, pred):
            if k < 0:
                continue
            of_target = target_contour & (target == k)
            of_pred = predicted_contour & (pred == k)
            self.target_met[k] += np.count_nonzero(of_target & within(of_pred, width))
            self.predicted_met[k] += np.count_nonzero(of_pred & within(of_target, width))

        counted = within(target_contour, width) & (target >= 0)
        index = target[counted].astype(np.int64) * self.num_classes + pred[counted]
        self.trimap += np.bincount(index, minlength=self.num_classes**2).reshape(self.trimap.shape)

    @contextmanager
    def in_background(self) -> Iterator[Callable[[Labels, Labels], None]]:
        """Yield a function like `update` that returns at once; a thread adds the images, all by the context's end.

        The arrays must stay as they are until then. What `update` raises is raised by a later call, or at the end.
        """
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as pool:

            def update(pred: Labels, target: Labels) -> None:
                if len(waiting) >= MOST_WAITING:
                    waiting.popleft().result()
                waiting.append(pool.submit(self.update, pred, target))

            yield update
            for future in waiting:
                future.result()

    def _per_class(self, labels: Labels, where: NDArray[np.bool_]) -> Ints:
        found = labels[where]
        return np.bincount(found[found >= 0], minlength=self.num_classes).astype(np.int64)

    def merge(self, other: BoundaryCounts) -> None:
        """Add the sums of another part of the data set."""
        for name, value in vars(other).items():
            if isinstance(value, np.ndarray):
                vars(self)[name] += value
            else:
                assert vars(self)[name] == value, (name, value)

    def iou(self) -> Floats:
        """Return the boundary IoU per class (K,); nan where neither has a band."""
        return divide(self.both_bands, self.target_band + self.predicted_band - self.both_bands)

    def f_score(self) -> Floats:
        """Return the boundary F-score per class (K,); nan where neither has a contour, 0 where only one has."""
        precision = divide(self.predicted_met, self.predicted_contour)
        recall = divide(self.target_met, self.target_contour)
        product = np.nan_to_num(precision) * np.nan_to_num(recall)
        f_score = np.nan_to_num(divide(2 * product, np.nan_to_num(precision) + np.nan_to_num(recall)))
        return np.where(np.isnan(precision) & np.isnan(recall), np.nan, f_score)

    def summary(self) -> dict[str, float | None]:
        """Return the means over classes as JSON values."""
        return {
            "boundary_ratio": self.ratio,
            "mean_boundary_iou": number(mean_of_present(self.iou())),
            "mean_boundary_f_score": number(mean_of_present(self.f_score())),
            "trimap_mean_iou": number(mean_iou(self.trimap)),
        }


def band_width(shape: tuple[int, ...], ratio: float) -> int:
    """Return ``ratio`` of the diagonal of an image (height, width) in whole pixels, at least 1."""
    return max(1, round(ratio * float(np.hypot(shape[0], shape[1]))))


def near_other_label(labels: Labels, width: int) -> NDArray[np.bool_]:
    """Return the pixels within ``width`` (along either axis) of another label or of the outside of the image."""
    # One minimum and one maximum filter do it for all classes at once.
    labels, square = labels.astype(np.int16), np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    lowest = cv2.erode(labels, square, borderType=cv2.BORDER_CONSTANT, borderValue=_OUTSIDE)
    highest = cv2.dilate(labels, square, borderType=cv2.BORDER_CONSTANT, borderValue=_OUTSIDE)
    return np.not_equal(lowest, highest)


def contour(labels: Labels) -> NDArray[np.bool_]:
    """Return the pixels with another label among their four neighbours inside the image."""
    found = np.zeros(labels.shape, bool)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    found[1:] |= vertical
    found[:-1] |= vertical
    found[:, 1:] |= horizontal
    found[:, :-1] |= horizontal
    return found


def within(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Return the pixels no further than ``width`` (Euclidean) from a pixel of ``mask``."""
    if not mask.any():
        return np.zeros(mask.shape, bool)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Distances are float32 roots of whole numbers; half a thousandth is more than rounding, less than to the next root.
    return np.less_equal(distance, width + 5e-4)
