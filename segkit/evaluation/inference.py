"""From images to predictions of the label's size: whole images, sliding windows, flips, several scales.

A model returns logits at its own stride. They are kept at that stride: the logits of the windows of one scale are
blended there into one map per view (a view is one scale, flipped or not). Only at the end are the maps
up-sampled bilinearly to the label's size, in bands of rows; several views are averaged there as class
probabilities (softmax), a single one needs none. So memory holds one stack of tiles at a time and, in place of
full-size scores, maps that are smaller by the square of the stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.errors import InputError
from segkit.evaluation.resample import Size, argmax_channel, band_slices, class_dtype, resized_rows

Scorer = Callable[[Tensor], Tensor]
"""images (N, 3, H, W) -> logits (N, K, h, w): a module, or a function around another runtime."""

ADE20K_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales that are averaged, with flips, in the usual ADE20K protocol."""

_BLENDINGS = ("gaussian", "uniform")


def whole_image(model: Scorer, images: Tensor, size: Size) -> Tensor:
    """Predictions (N, H, W) of one forward pass per batch.

    ``images`` (N, 3, h, w) as the model takes them, ``size`` = (H, W) of the labels. uint8 up to 256 classes,
    int16 beyond.
    """
    return _WHOLE_IMAGE(model, images, size)


def forward(model: Scorer, images: Tensor) -> Tensor:
    """The model's logits (N, K, h', w') in float32, checked."""
    logits = model(images)
    if logits.ndim != 4 or len(logits) != len(images):
        raise InputError(
            f"a model must return logits (N, K, h, w), got shape {tuple(logits.shape)} for images of shape "
            f"{tuple(images.shape)}"
        )
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "the model returned logits that are not finite (inf or nan); evaluate with precision fp32, or "
            "take an earlier checkpoint"
        )
    return logits


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How images become predictions; an instance is a ``predict`` for `segkit.evaluation.evaluate`.

    ``window`` (height, width): slide a window of that size over the image (at every scale), or None for the whole
    image at once. ``overlap``: share of the window that neighbours have in common, at least. ``blending`` of
    overlapping windows: "gaussian" (standard deviation an eighth of the window: the middle counts most) or
    "uniform". ``tiles_per_batch``: windows to one forward pass. ``flip``: also the mirrored image. ``scales``:
    factors of the image size. ``multiple``: windows start and end on multiples of it, and images that are scaled
    or cut are padded to it by repeating their last row and column; the model's stride must divide it.
    """

    window: Size | None = None
    overlap: float = 0.5
    blending: str = "gaussian"
    tiles_per_batch: int = 1
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    multiple: int = 32

    def __post_init__(self) -> None:
        if self.blending not in _BLENDINGS:
            raise InputError(f"blending is {self.blending!r}; allowed are {', '.join(_BLENDINGS)}")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap is {self.overlap}; it must be at least 0 and less than 1")
        if not self.scales or min(self.scales) <= 0:
            raise InputError(f"scales are {list(self.scales)}; give one or more positive factors")
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
        """Predictions (N, H, W) on the device of ``images`` (N, 3, h, w): uint8, or int16 beyond 256 classes."""
        best: Tensor | None = None
        for rows, band in self._views(model, images, size).bands():
            if best is None:
                dtype = class_dtype(band.shape[1])
                best = torch.empty(len(images), *size, dtype=dtype, device=band.device)
            best[:, rows] = argmax_channel(band, best.dtype)
        assert best is not None
        return best

    def probabilities(self, model: Scorer, images: Tensor, size: Size) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(rows, band)`` from top to bottom: class probabilities (N, K, len(rows), W) in float32."""
        views = self._views(model, images, size)
        for rows, band in views.bands():
            yield rows, band.softmax(1) if views.num_views == 1 else band

    def describe(self) -> dict[str, object]:
        """The settings as plain values, for the protocol beside a score."""
        described: dict[str, object] = {"scales": list(self.scales), "flip": self.flip, "window": None}
        if self.window is not None:
            described |= {"window": list(self.window), "overlap": self.overlap, "blending": self.blending}
        return described

    def _views(self, model: Scorer, images: Tensor, size: Size) -> _Views:
        mirrors = (False, True) if self.flip else (False,)
        views = _Views(size, num_views=len(self.scales) * len(mirrors))
        height, width = images.shape[-2:]
        for scale in self.scales:
            scaled = max(1, round(height * scale)), max(1, round(width * scale))
            for flipped in mirrors:
                source = images.flip(-1) if flipped else images
                if self.window is None:
                    view = self._view_of_whole(model, source, scaled)
                else:
                    view = self._view_of_windows(model, source, scaled, self.window)
                views.add(*view, flipped=flipped)
        return views

    def _view_of_whole(self, model: Scorer, images: Tensor, scaled: Size) -> tuple[Tensor, tuple[float, float]]:
        if scaled == tuple(images.shape[-2:]):
            inputs = images
        else:
            padded = _padded(scaled, self.multiple)
            inputs = _strip(images, scaled, slice(0, padded[0]), padded)
        logits = forward(model, inputs)
        return logits, (
            logits.shape[2] * (scaled[0] / inputs.shape[2]),
            logits.shape[3] * (scaled[1] / inputs.shape[3]),
        )

    def _view_of_windows(
        self, model: Scorer, images: Tensor, scaled: Size, window: Size
    ) -> tuple[Tensor, tuple[float, float]]:
        padded = _padded(scaled, self.multiple)
        tile = min(window[0], padded[0]), min(window[1], padded[1])
        tops, lefts = (
            starts(padded[axis], tile[axis], overlap=self.overlap, multiple=self.multiple) for axis in (0, 1)
        )
        blend = _Blend(padded, tile, gaussian=self.blending == "gaussian")
        for top in tops:
            strip = _strip(images, scaled, slice(top, top + tile[0]), padded)
            for first in range(0, len(lefts), self.tiles_per_batch):
                batch = lefts[first : first + self.tiles_per_batch]
                tiles = torch.cat([strip[..., left : left + tile[1]] for left in batch])
                for left, logits in zip(batch, forward(model, tiles).split(len(images)), strict=True):
                    blend.add(logits, top, left)
        stride = blend.stride
        return blend.mean(), (scaled[0] / stride, scaled[1] / stride)


_WHOLE_IMAGE = Inference()


def starts(length: int, tile: int, *, overlap: float, multiple: int) -> list[int]:
    """Where tiles of ``tile`` pixels start along an axis of ``length``; both and the results are multiples.

    As few tiles as possible whose neighbours share at least ``overlap`` of a tile (rounded to a multiple), spread
    evenly; the first starts at 0, the last ends at ``length``.
    """
    assert length % multiple == 0, (length, multiple)
    assert tile % multiple == 0, (tile, multiple)
    assert tile <= length, (tile, length)
    step = max(multiple, int(tile * (1 - overlap)) // multiple * multiple)
    num_steps = math.ceil((length - tile) / step)
    if num_steps == 0:
        return [0]
    cells = (length - tile) // multiple
    return [cells * i // num_steps * multiple for i in range(num_steps + 1)]


def _padded(size: Size, multiple: int) -> Size:
    return (math.ceil(size[0] / multiple) * multiple, math.ceil(size[1] / multiple) * multiple)


def _strip(images: Tensor, scaled: Size, rows: slice, padded: Size) -> Tensor:
    """Rows ``rows`` of the images resized to ``scaled`` and padded to ``padded``: (N, C, len(rows), padded W)."""
    inside = slice(min(rows.start, scaled[0] - 1), min(rows.stop, scaled[0]))
    if scaled == tuple(images.shape[-2:]):
        strip = images[:, :, inside]
    else:
        strip = resized_rows(images, scaled, inside)
        if not images.is_floating_point():
            strip = strip.round_().to(images.dtype)
    missing = rows.stop - rows.start - strip.shape[2], padded[1] - scaled[1]
    if missing == (0, 0):
        return strip
    y = torch.arange(rows.start, rows.stop, device=images.device).clamp(max=scaled[0] - 1) - inside.start
    x = torch.arange(padded[1], device=images.device).clamp(max=scaled[1] - 1)
    return strip[:, :, y][..., x]


class _Blend:
    """The weighted mean of overlapping tiles of logits, at the logits' own stride."""

    def __init__(self, padded: Size, tile: Size, *, gaussian: bool) -> None:
        self.padded = padded
        self.tile = tile
        self.gaussian = gaussian
        self.stride = 0
        self.total: Tensor | None = None

    def _start(self, logits: Tensor) -> None:
        """The first tile tells the stride and the number of classes."""
        stride = self.tile[0] // logits.shape[2]
        if (logits.shape[2] * stride, logits.shape[3] * stride) != self.tile:
            raise InputError(
                f"the model returned logits of {logits.shape[2]}x{logits.shape[3]} for a window of "
                f"{self.tile[0]}x{self.tile[1]}, which is no whole stride; choose another window or whole images"
            )
        self.stride = stride
        low = self.padded[0] // stride, self.padded[1] // stride
        self.total = logits.new_zeros(len(logits), logits.shape[1], *low)
        self.weight_sum = logits.new_zeros(low)
        vertical, horizontal = (
            _window_weights(side // stride, gaussian=self.gaussian).to(logits.device) for side in self.tile
        )
        self.weight = vertical[:, None] * horizontal[None, :]

    def add(self, logits: Tensor, top: int, left: int) -> None:
        """Add the logits (N, K, h, w) of the tile at (top, left), in pixels."""
        if self.total is None:
            self._start(logits)
        assert self.total is not None
        rows = slice(top // self.stride, (top + self.tile[0]) // self.stride)
        columns = slice(left // self.stride, (left + self.tile[1]) // self.stride)
        self.total[:, :, rows, columns].addcmul_(logits, self.weight)
        self.weight_sum[rows, columns] += self.weight

    def mean(self) -> Tensor:
        """The blended logits (N, K, h, w)."""
        assert self.total is not None
        return self.total.div_(self.weight_sum)


def _window_weights(num_cells: int, *, gaussian: bool) -> Tensor:
    """Weight of each cell of a window along one axis, float32, at most 1 and never 0."""
    if not gaussian:
        return torch.ones(num_cells)
    centred = (torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells - 0.5
    return torch.exp(-0.5 * (centred / 0.125) ** 2).float()


class _Views:
    """Logit maps of several views of the same images, averaged as probabilities at ``size``.

    Maps that together exceed an eighth of the memory of full-size scores go on in half precision, after the
    largest logit has been taken off at every cell. Neither softmax nor bilinear interpolation sees that (it
    shifts all classes of a pixel alike), and it leaves the logits of the classes that compete near 0, where half
    precision is fine: probabilities err by about 1e-3 of themselves at most. Maps that exceed the full-size
    scores (models of stride 1) are summed up at full size.
    """

    def __init__(self, size: Size, *, num_views: int) -> None:
        self.size = size
        self.num_views = num_views
        self._maps: list[tuple[Tensor, tuple[float, float], bool]] = []
        self._sum: Tensor | None = None

    def add(self, logits: Tensor, extent: tuple[float, float], *, flipped: bool) -> None:
        """Add a map (N, K, h, w); ``extent`` as in `resized_rows`; ``flipped``: of the mirrored images."""
        if self._maps and self._maps[0][0].shape[1] != logits.shape[1]:
            raise InputError("the model returned different numbers of classes for different image sizes")
        full_size = 4 * logits.shape[0] * logits.shape[1] * self.size[0] * self.size[1]
        held = sum(maps.numel() * maps.element_size() for maps, _, _ in self._maps)
        if held > full_size:
            self._fold()
        self._maps.append((logits, extent, flipped))
        if self.num_views > 1 and held + 4 * logits.numel() > full_size // 8:
            self._maps = [(_halved(maps), extent, flipped) for maps, extent, flipped in self._maps]

    def _fold(self) -> None:
        first = self._maps[0][0]
        shape = (*first.shape[:2], *self.size)
        total = torch.empty(shape, device=first.device) if self._sum is None else self._sum
        for rows, band in self._summed():
            total[:, :, rows] = band
        self._sum = total
        self._maps.clear()

    def _summed(self) -> Iterator[tuple[slice, Tensor]]:
        """Bands of the sum of all probabilities."""
        reference = self._maps[0][0] if self._sum is None else self._sum
        for rows in band_slices(self.size, reference.shape[0] * reference.shape[1]):
            total = None if self._sum is None else self._sum[:, :, rows]
            for maps, extent, flipped in self._maps:
                band = resized_rows(maps, self.size, rows, extent=extent, dtype=torch.float32).softmax(1)
                band = band.flip(-1) if flipped else band
                total = band if total is None else total + band
            assert total is not None
            yield rows, total

    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """``(rows, band)``: mean probabilities of several views, but the logits of a single one."""
        if self.num_views > 1:
            for rows, total in self._summed():
                yield rows, total / self.num_views
            return
        maps, extent, flipped = self._maps[0]
        assert not flipped
        for rows in band_slices(self.size, maps.shape[0] * maps.shape[1]):
            yield rows, resized_rows(maps, self.size, rows, extent=extent)


def _halved(logits: Tensor) -> Tensor:
    if logits.dtype == torch.float16:
        return logits
    halved = torch.empty_like(logits, dtype=torch.float16)
    for rows in band_slices((logits.shape[2], logits.shape[3]), logits.shape[0] * logits.shape[1]):
        band = logits[:, :, rows]
        halved[:, :, rows] = (band - band.amax(1, keepdim=True)).clamp_(min=-6e4)
    return halved
