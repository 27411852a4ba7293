"""From images to predictions of the label's size: whole images, sliding windows, flips, several scales.

:mod:`segkit.evaluation.views` computes the scores in bands of rows, so full-size scores of all classes never exist: one
band at a time is up-sampled bilinearly to the label's size. Several views are averaged there as class probabilities
(softmax); a single view is decided by its logits. A decision rule other than the largest score takes probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.bilinear import Size
from segkit.errors import InputError
from segkit.evaluation.views import Scorer, View, argmax_channel, averaged, class_dtype, grid

ADE20K_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales that are averaged, with flips, in the usual ADE20K protocol."""

LEAST_SCALE, MOST_SCALE = 0.01, 16
_BLENDINGS = ("gaussian", "uniform")


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How images become predictions; an instance is a ``predict`` for `segkit.evaluation.evaluate`.

    It is called with the model, images (N, C, h, w) as that takes them, and the size (H, W) of the labels.

    ``window`` (height, width): slide a window of that size over the image (at every scale); None for the whole image at
    once. ``overlap``: least share of the window that neighbours have in common. ``blending`` of overlapping windows:
    "gaussian" (standard deviation an eighth of the window, so that its middle counts most) or "uniform".
    ``tiles_per_batch``: windows in one forward pass. ``flip``: average with the mirrored image. ``scales``: factors of
    the image size. ``multiple``: windows start and end on multiples of it, and images that are scaled or cut are padded
    to it by repeating their last row and column; the model's stride must divide it. ``decide``: a decision rule, from
    probabilities (N, K, rows, W) to scores whose argmax is the class; None for the most probable class.
    """

    window: Size | None = None
    overlap: float = 0.5
    blending: str = "gaussian"
    tiles_per_batch: int = 1
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    multiple: int = 32
    decide: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.blending not in _BLENDINGS:
            raise InputError(f"blending is {self.blending!r}; allowed are {', '.join(_BLENDINGS)}")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap is {self.overlap}; it must be at least 0 and less than 1")
        differ = len(set(self.scales)) == len(self.scales)
        if not self.scales or not differ or not all(LEAST_SCALE <= scale <= MOST_SCALE for scale in self.scales):
            raise InputError(
                f"scales are {list(self.scales)}; give one or more different factors from {LEAST_SCALE} to {MOST_SCALE}"
            )
        if self.tiles_per_batch < 1 or self.multiple < 1:
            raise InputError(
                f"tiles_per_batch is {self.tiles_per_batch} and multiple {self.multiple}; both must be at least 1"
            )
        if self.window is not None and any(side < 1 or side % self.multiple for side in self.window):
            fitting = [max(1, math.ceil(side / self.multiple)) * self.multiple for side in self.window]
            raise InputError(
                f"window is {list(self.window)}; both sides must be multiples of {self.multiple}, such as {fitting}"
            )

    def __call__(self, model: Scorer, images: Tensor, size: Size) -> Tensor:
        """Return predictions (N, H, W) on the device of ``images`` (N, C, h, w): uint8, or int16 beyond 256 classes."""
        best: Tensor | None = None
        for rows, band in self._bands(model, images, size):
            if best is None:
                dtype = class_dtype(band.shape[1])
                best = torch.empty(len(images), *size, dtype=dtype, device=band.device)
            if self.decide is not None:
                band = self.decide(band.softmax(1) if self._num_views == 1 else band)
            best[:, rows] = argmax_channel(band, best.dtype)
            del band  # otherwise it is in memory beside the next one
        assert best is not None
        return best

    def probabilities(self, model: Scorer, images: Tensor, size: Size) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(rows, band)`` from top to bottom: class probabilities (N, K, len(rows), W) in float32."""
        for rows, band in self._bands(model, images, size):
            yield rows, band.softmax(1) if self._num_views == 1 else band

    def describe(self) -> dict[str, object]:
        """Return the settings but ``decide`` as JSON values, for the protocol beside a score."""
        described: dict[str, object] = {"scales": list(self.scales), "flip": self.flip, "window": None}
        if self.window is not None:
            described |= {"window": list(self.window), "overlap": self.overlap, "blending": self.blending}
        return described

    @property
    def _num_views(self) -> int:
        return len(self.scales) * (2 if self.flip else 1)

    def _bands(self, model: Scorer, images: Tensor, size: Size) -> Iterator[tuple[slice, Tensor]]:
        return averaged(self._views(model, images, size), size, num_views=self._num_views)

    def _views(self, model: Scorer, images: Tensor, size: Size) -> Iterator[View]:
        sources = {False: images, True: images.flip(-1)} if self.flip else {False: images}
        for scale in self.scales:
            shape = int(images.shape[-2]), int(images.shape[-1])
            windows = grid(shape, scale, window=self.window, overlap=self.overlap, multiple=self.multiple)
            for flipped, source in sources.items():
                yield View(
                    model=model,
                    images=source,
                    size=size,
                    windows=windows,
                    flipped=flipped,
                    gaussian=self.blending == "gaussian",
                    tiles_per_batch=self.tiles_per_batch,
                    num_views=self._num_views,
                )


whole_image = Inference()
"""One forward pass per batch."""
