"""What happens to a pair of image and label before it enters a batch.

Training: scale, crop and flip are one transform that draws its window first and then resizes only that window; colour
jitter runs on the crop. All randomness comes from the generator that is passed in, in a fixed number of draws, so that
a crop is a pure function of the generator's seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from segkit.config.dataset import JitterConfig
from segkit.data.decode import pixel_limit
from segkit.data.labels import VOID
from segkit.errors import InputError

if TYPE_CHECKING:
    from segkit.data.augment import Augment

PAD_COLOUR = (124, 116, 104)
"""Mean colour of ImageNet: close to 0 after normalisation."""

JITTER = asdict(JitterConfig())
"""Strengths of the colour jitter."""

AREA_BELOW = 0.5
"""Images shrunk below this factor are averaged over areas; bilinear sampling would skip pixels there."""

Size = tuple[int, int]
Resize = Mapping[str, Any] | None


def target_size(size: Size, resize: Resize, *, name: str = "an image") -> Size:
    """Return (height, width) of an image of ``size`` after ``resize``.

    ``resize`` is None, {"short_side": pixels} (aspect kept, rounded to whole pixels) or {"size": [height, width]}; a
    key whose value is None counts as absent. InputError, which begins with ``name``, for more pixels than an image may
    have.
    """
    given = resize or {}
    height, width = given.get("size") or size
    if short := given.get("short_side"):
        factor = short / min(size)
        height, width = (max(1, round(side * factor)) for side in size)
        height, width = (short, width) if size[0] <= size[1] else (height, short)
    if (height, width) != tuple(size) and height * width > pixel_limit():
        raise InputError(
            f"{name} of {size[0]}x{size[1]} is resized to {height}x{width}, more than {pixel_limit()} pixels: "
            "set a smaller dataset.resize or dataset.eval_resize, or max_pixels to more"
        )
    return height, width


class Span(NamedTuple):
    """One axis of a crop: whole source pixels ``start:stop``, resized to ``length`` pixels from ``pad`` of it on."""

    start: int
    stop: int
    length: int
    pad: int


@dataclass(frozen=True)
class Window:
    """A drawn crop: rows and columns of the full-size pair, alike for image and label, and what comes after.

    ``shrink`` (1, 2 or 4): an image decoded at that fraction of its size is fine enough. ``seed``: of the transforms
    behind the crop.
    """

    rows: Span
    columns: Span
    flip: bool
    jitter: dict[str, Any] | None
    shrink: int
    seed: int = 0

    def cut(self, part: np.ndarray, shrink: int = 1) -> np.ndarray:
        """Return the window's part of a label, or of an image that was decoded at 1/``shrink`` of its size; a view."""
        rows, columns = (slice(span.start // shrink, -(-span.stop // shrink)) for span in (self.rows, self.columns))
        return part[rows, columns]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainTransform:
    """Random scale, crop, flip and colour jitter to exactly ``crop`` = (height, width).

    The pair is thought to be resized (``resize``, see :func:`target_size`), then scaled by a factor uniform in
    ``scale``, then cropped at a uniform place, then mirrored with probability ``flip``; in fact only the window
    that the crop needs is cut out (at whole pixels) and resized once: bilinear (area-averaged below half size) for
    the image, nearest for the label.  Where the scaled pair is smaller than the crop, the rest is ``pad``, one
    value a channel, and :data:`VOID`, at a uniform place.  ``color_jitter`` is the probability of a colour jitter,
    ``jitter`` its strengths (:data:`JITTER`).  ``augment`` comes last.
    """

    crop: Size
    resize: Resize = None
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    color_jitter: float = 0.0
    jitter: Mapping[str, float] = field(default_factory=JITTER.copy)
    augment: Augment | None = None
    pad: tuple[float, ...] = PAD_COLOUR

    def __post_init__(self) -> None:
        if self.color_jitter:
            import segkit.data.augment  # noqa: F401 (once here, and not in each process that loads)

    def draw(self, size: Size, rng: np.random.Generator, *, hold: Size | None = None, name: str = "an image") -> Window:
        """Draw the window for a pair of ``size`` (height, width); always the same number of draws from ``rng``.

        With ``hold``, a (row, column) of the pair, it is one of those that have this pixel. ``name`` as in
        :func:`target_size`.
        """
        scale = rng.uniform(*self.scale)
        place = rng.random(4).tolist()
        flip = rng.random() < self.flip
        jitter_on = rng.random() < self.color_jitter
        about = {key: float(key != "hue") for key in JITTER}  # factors vary about 1, the turn of the hue about 0
        jitter = {key: rng.uniform(x - self.jitter[key], x + self.jitter[key]) for key, x in about.items()}
        order = rng.permutation(4).tolist()
        resized = target_size(size, self.resize, name=name)
        scaled = [max(1, round(side * scale)) for side in resized]
        shrink = _shrink(max(scaled[0] / size[0], scaled[1] / size[1]))
        held = hold or (None, None)
        rows, columns = (
            _span(size[i], scaled[i], self.crop[i], shrink, place=place[i], pad=place[i + 2], hold=held[i])
            for i in (0, 1)
        )
        return Window(
            rows,
            columns,
            flip=bool(flip),
            jitter={**jitter, "order": order} if jitter_on else None,
            shrink=shrink,
            seed=0 if self.augment is None else int(rng.integers(2**32)),
        )

    def finish(self, image_cut: np.ndarray, label_cut: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the crop from the two parts that ``window`` cuts out: jitter, resize, pad, flip, augment."""
        size = (window.rows.length, window.columns.length)
        # The colours are jittered at the smaller of the two sizes, and never in the padding.
        early = image_cut.shape[0] * image_cut.shape[1] < size[0] * size[1]
        if early:
            image_cut = _jittered(image_cut, window)
        image = resize_image(image_cut, size)
        if not early:
            image = _jittered(image, window)
        label = resize_label(label_cut, size)
        if size != self.crop:
            image = self._padded(image, window, self.pad)
            label = self._padded(label, window, VOID)
        if window.flip:
            # OpenCV drops an axis of one channel, and takes 128 channels at most
            image = cv2.flip(image, 1) if image.shape[2] == 3 else image[:, ::-1]
            label = cv2.flip(label, 1)
        if self.augment is not None:
            image, label = self.augment(image, label, window.seed)
        return np.array(image, copy=None, order="C"), np.array(label, copy=None, order="C")

    def _padded(self, part: np.ndarray, window: Window, value: Any) -> np.ndarray:
        whole = np.empty((*self.crop, *part.shape[2:]), part.dtype)
        whole[:] = value
        rows, columns = (slice(span.pad, span.pad + span.length) for span in (window.rows, window.columns))
        whole[rows, columns] = part
        return whole


def _jittered(image: np.ndarray, window: Window) -> np.ndarray:
    if window.jitter is None:
        return image
    from segkit.data.augment import COLOR_JITTER

    return COLOR_JITTER.apply(np.ascontiguousarray(image), **window.jitter)


def _shrink(factor: float) -> int:
    """Fraction of its size at which an image that is scaled by ``factor`` may be decoded: never below the target."""
    return 4 if factor <= 0.25 else 2 if factor <= 0.5 else 1


def _span(size: int, scaled: int, crop: int, shrink: int, *, place: float, pad: float, hold: int | None) -> Span:
    """The span along one axis of ``size`` pixels that is scaled to ``scaled``; ``place`` and ``pad`` lie in [0, 1).

    Start and stop are multiples of ``shrink`` so that a shrunk image is cut at the same lines as the label. The pixel
    ``hold`` lies between them.
    """
    length = min(crop, scaled)
    first, last = 0, scaled - length
    if hold is not None:
        centre = int((hold + 0.5) * scaled / size)
        first, last = min(max(0, centre - length + 1), last), min(centre, last)
    offset = first + math.floor(place * (last - first + 1))
    start = min(round(offset * size / scaled), size - 1)
    stop = max(start + 1, min(size, round((offset + length) * size / scaled)))
    if hold is not None:  # which rounding may have left out
        start, stop = min(start, hold), max(stop, hold + 1)
    start, stop = start // shrink * shrink, min(size, -(-stop // shrink) * shrink)
    return Span(start, stop, length, pad=math.floor(pad * (crop - length + 1)))


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Return image (H, W, C) at ``size`` (height, width): bilinear, or area-averaged where it shrinks below half."""
    if image.shape[:2] == size:
        return image.copy()
    factor = min(size[0] / image.shape[0], size[1] / image.shape[1])
    method = cv2.INTER_AREA if factor < AREA_BELOW else cv2.INTER_LINEAR
    if image.shape[2] == 3:
        return cv2.resize(image, (size[1], size[0]), interpolation=method)
    # OpenCV averages areas of four channels at most, and drops an axis of one channel
    parts = (image[..., first : first + 4] for first in range(0, image.shape[2], 4))
    return np.dstack([cv2.resize(part, (size[1], size[0]), interpolation=method) for part in parts])


def resize_label(label: np.ndarray, size: Size) -> np.ndarray:
    """Return label (H, W) at ``size``: the pixel whose centre is nearest, at the same centres as the bilinear image.

    (OpenCV's plain INTER_NEAREST takes the pixel to the upper left instead: a shift by up to half a pixel.)
    """
    if label.shape == size:
        return label.copy()
    return cv2.resize(label, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Resize the image for evaluation; the label keeps its own size, or follows with ``labels="resized"``.

    ``resize`` as in :func:`target_size`. With "original" labels the prediction is scaled up to the label's size before
    it is counted.
    """

    resize: Resize = None
    labels: str = "original"

    def __call__(
        self, image: np.ndarray, label: np.ndarray, *, name: str = "an image"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return image (h, w, C), and label uint8 (H, W) or (h, w); ``name`` as in :func:`target_size`."""
        size = target_size((image.shape[0], image.shape[1]), self.resize, name=name)
        image = resize_image(image, size)
        return image, resize_label(label, size) if self.labels == "resized" else label
