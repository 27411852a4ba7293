"""One view of the images (a scale, mirrored or not), computed from top to bottom, and the mean of several.

A model returns logits at its own stride. Overlapping windows are blended at that stride, and only bands of rows are
up-sampled to the label's size. All views go down the image together: a view runs its next row of windows when a band
needs it, and forgets the rows above the band, so it holds little more of its map than the height of one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from segkit.bilinear import Size, resized_rows, source_rows
from segkit.errors import InputError, NonFiniteLogits

Scorer = Callable[[Tensor], Tensor]
"""images (N, C, H, W) -> logits (N, K, h, w): a module, or a function around another runtime."""


def forward(model: Scorer, images: Tensor) -> Tensor:
    """Return the model's logits (N, K, h', w') in float32; InputError if their shape or a value is wrong."""
    logits = model(images)
    if logits.ndim != 4 or len(logits) != len(images):
        raise InputError(
            f"a model must return logits (N, K, h, w), got shape {tuple(logits.shape)} for images of shape "
            f"{tuple(images.shape)}"
        )
    logits = logits.float()
    # The extremes are nan if any value is, and need no second map in memory.
    if not bool(torch.isfinite(torch.stack(logits.aminmax())).all()):
        raise NonFiniteLogits(
            "the model returned logits that are not finite (inf or nan); evaluate with precision fp32, or "
            "take an earlier checkpoint"
        )
    return logits


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the windows of a view lie, in pixels of the scaled image."""

    scaled: Size
    padded: Size
    """``scaled`` plus the padding on the right and at the bottom"""
    tile: Size
    tops: list[int]
    lefts: list[int]


def grid(image: Size, scale: float, *, window: Size | None, overlap: float, multiple: int) -> Grid:
    """Return the windows over an image of size ``image`` scaled by ``scale``; a single one if ``window`` is None.

    An image that is neither scaled nor cut goes to the model as it is; any other is padded to ``multiple``.
    """
    scaled = max(1, round(image[0] * scale)), max(1, round(image[1] * scale))
    padded = scaled
    if window is not None or scaled != image:
        padded = math.ceil(scaled[0] / multiple) * multiple, math.ceil(scaled[1] / multiple) * multiple
    if window is None:
        return Grid(scaled=scaled, padded=padded, tile=padded, tops=[0], lefts=[0])
    tile = min(window[0], padded[0]), min(window[1], padded[1])
    tops, lefts = (starts(padded[axis], tile[axis], overlap=overlap, multiple=multiple) for axis in (0, 1))
    return Grid(scaled=scaled, padded=padded, tile=tile, tops=tops, lefts=lefts)


def starts(length: int, tile: int, *, overlap: float, multiple: int) -> list[int]:
    """Return where tiles of ``tile`` pixels start along an axis of ``length``, all of them multiples of ``multiple``.

    As few tiles as possible whose neighbours share at least ``overlap`` of a tile (rounded to a multiple), spread
    evenly; the first starts at 0, the last ends at ``length``.
    """
    assert length % multiple == 0, (length, multiple)
    assert tile % multiple == 0, (tile, multiple)
    assert tile <= length, (tile, length)
    step = max(multiple, int(round(tile * (1 - overlap), 6)) // multiple * multiple)  # 320 * (1 - 0.8) is below 64
    num_steps = math.ceil((length - tile) / step)
    if num_steps == 0:
        return [0]
    cells = (length - tile) // multiple
    return [cells * i // num_steps * multiple for i in range(num_steps + 1)]


@dataclass(kw_only=True, eq=False)
class View:
    """Logits of one view of ``images`` (N, C, h, w) at the label's ``size``, band by band from the top.

    ``images`` of a ``flipped`` view are mirrored already. If the maps of ``num_views`` such views would exceed 1/8 of
    the memory of full-size scores, logits are held in half precision, less the largest one at every cell. That shifts
    all classes of a pixel alike, so blending, interpolation and softmax give the same; and it leaves the logits of the
    likely classes near 0, where half precision is fine: the relative error of a probability is about 1e-3 at most.
    """

    model: Scorer
    images: Tensor
    size: Size
    windows: Grid
    flipped: bool
    gaussian: bool
    tiles_per_batch: int
    num_views: int
    maps: Tensor = field(init=False)
    """The rows (N, K, h, w) of the map that are held now."""
    _num_done: int = field(default=0, init=False)
    _first: int = field(default=0, init=False)

    def start(self) -> None:
        """Run the first row of windows, from which stride and size of the map follow."""
        self._next_windows(keep=0)

    def reach(self, rows: slice) -> None:
        """Run the windows that the band ``rows`` of the label's size needs, and forget the rows above the band."""
        needed = source_rows(rows, height=self.size[0], extent=self._extent[0], num_rows=self._low[0])
        while self._num_final < needed.stop:
            self._next_windows(keep=needed.start)

    def band(self, rows: slice) -> Tensor:
        """Return logits (N, K, len(rows), W) in float32, after `reach`."""
        held = {"first": self._first, "num_rows": self._low[0]}
        band = resized_rows(self.maps, self.size, rows, extent=self._extent, dtype=torch.float32, **held)
        return band.flip(-1) if self.flipped else band

    @property
    def _num_final(self) -> int:
        """The number of rows of the map that no further window touches."""
        if self._num_done == len(self.windows.tops):
            return self._low[0]
        return self._cells(self.windows.tops[self._num_done])

    def _cells(self, pixels: int) -> int:
        return pixels * self._low[0] // self.windows.padded[0]

    def _next_windows(self, *, keep: int) -> None:
        """Run the next row of windows; ``keep`` is the first row of the map that is still needed."""
        windows = self.windows
        top, num_images = windows.tops[self._num_done], len(self.images)
        strip = _strip(self.images, windows.scaled, slice(top, top + windows.tile[0]), windows.padded)
        for first in range(0, len(windows.lefts), self.tiles_per_batch):
            lefts = windows.lefts[first : first + self.tiles_per_batch]
            tiles = [strip[..., left : left + windows.tile[1]] for left in lefts]
            logits = forward(self.model, tiles[0] if len(tiles) == 1 else torch.cat(tiles))
            if self._num_done == 0 and first == 0:
                self._measure(logits)
            if windows.tile == windows.padded:
                self.maps = _halved(logits) if self._in_halves else logits
                break
            if first == 0:
                self._extend(logits, self._cells(top), keep)
            for number, left in enumerate(lefts):
                part = logits[number * num_images : (number + 1) * num_images]
                self._blend(part, self._cells(top), self._cells(left))
            del logits, part  # otherwise they are in memory beside the next forward pass
        self._num_done += 1

    def _measure(self, logits: Tensor) -> None:
        """Find stride and size of the map from the logits of the first windows."""
        windows, cells = self.windows, (logits.shape[2], logits.shape[3])
        self._low = cells
        if windows.tile != windows.padded:
            stride = windows.tile[0] // cells[0]
            if (cells[0] * stride, cells[1] * stride) != windows.tile:
                raise InputError(
                    f"the model returned logits of {cells[0]}x{cells[1]} for a window of "
                    f"{windows.tile[0]}x{windows.tile[1]}, which is no whole stride; choose another window or whole "
                    "images"
                )
            self._low = windows.padded[0] // stride, windows.padded[1] // stride
        self._extent = (
            self._low[0] * (windows.scaled[0] / windows.padded[0]),
            self._low[1] * (windows.scaled[1] / windows.padded[1]),
        )
        vertical, horizontal = (_window_weights(num, gaussian=self.gaussian).to(logits.device) for num in cells)
        self._weight = vertical[:, None] * horizontal[None, :]
        width = self._low[1]
        self._in_halves = self.num_views > 1 and worth_halving(self.num_views * cells[0] * width, self.size)
        dtype = torch.float16 if self._in_halves else torch.float32
        self.maps = logits.new_empty(len(self.images), logits.shape[1], 0, width, dtype=dtype)
        self._weight_sum = logits.new_empty(0, width)

    def _extend(self, logits: Tensor, top: int, keep: int) -> None:
        """Forget the rows above ``keep``, and append rows for windows whose logits start in row ``top``."""
        keep = min(keep, top)
        kept = slice(keep - self._first, self.maps.shape[2])
        num_kept, num_rows = max(0, kept.stop - kept.start), top + logits.shape[2] - keep
        num_images, num_classes, _, width = self.maps.shape
        maps = self.maps.new_zeros(num_images, num_classes, num_rows, width)
        maps[:, :, :num_kept] = self.maps[:, :, kept]
        weight_sum = self._weight_sum.new_zeros(num_rows, width)
        weight_sum[:num_kept] = self._weight_sum[kept]
        self.maps, self._weight_sum, self._first = maps, weight_sum, keep

    def _blend(self, logits: Tensor, top: int, left: int) -> None:
        """Add the logits (N, K, h, w) of a window to the weighted mean, at cell (top, left) of the map."""
        height, width = logits.shape[2:]
        rows, columns = slice(top - self._first, top - self._first + height), slice(left, left + width)
        self._weight_sum[rows, columns] += self._weight
        share = self._weight / self._weight_sum[rows, columns]
        place = self.maps[:, :, rows, columns]
        if self._in_halves:
            logits = _halved(logits)
        for part in band_slices((height, width), logits.shape[0] * logits.shape[1]):
            place[:, :, part] = torch.lerp(place[:, :, part].float(), logits[:, :, part].float(), share[part])


def worth_halving(num_cells: int, size: Size) -> bool:
    """Return whether maps of ``num_cells`` cells in total are more than an eighth of full-size scores."""
    return 8 * num_cells > math.prod(size)


def _halved(logits: Tensor) -> Tensor:
    """Return ``logits`` in half precision, less the largest one at every cell."""
    halved = torch.empty_like(logits, dtype=torch.float16)
    for rows in band_slices((logits.shape[2], logits.shape[3]), logits.shape[0] * logits.shape[1]):
        band = logits[:, :, rows]
        halved[:, :, rows] = (band - band.amax(1, keepdim=True)).clamp_(min=-6e4)
    return halved


def _strip(images: Tensor, scaled: Size, rows: slice, padded: Size) -> Tensor:
    """Return ``rows`` of the images resized to ``scaled`` and padded to ``padded``: (N, C, len(rows), padded W)."""
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


def _window_weights(num_cells: int, *, gaussian: bool) -> Tensor:
    """Return the weight of each cell of a window along one axis: float32 in (0, 1]."""
    if not gaussian:
        return torch.ones(num_cells)
    centred = (torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells - 0.5
    return torch.exp(-0.5 * (centred / 0.125) ** 2).float()


def averaged(views: Iterable[View], size: Size, *, num_views: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, band)`` from top to bottom: mean probabilities of several views, or the logits of a single one.

    Views that together hold more than the full-size scores (those of models of stride 1) are summed up at full size
    before the next ones begin.
    """
    total: Tensor | None = None
    begun: list[View] = []
    for view in views:
        held = sum(one.maps.numel() * one.maps.element_size() for one in begun)
        if begun and held > 4 * math.prod(begun[0].maps.shape[:2]) * math.prod(size):
            if total is None:
                total = begun[0].maps.new_zeros(*begun[0].maps.shape[:2], *size, dtype=torch.float32)
            for _ in _sums(begun, size, total, softmax=True):
                pass  # adds to ``total`` in place
            begun = []
        view.start()
        begun.append(view)
        if view.maps.shape[1] != begun[0].maps.shape[1] or (total is not None and total.shape[1] != view.maps.shape[1]):
            raise InputError("the model returned different numbers of classes for different image sizes")
    for rows, band in _sums(begun, size, total, softmax=num_views > 1):
        yield rows, band.div_(num_views) if num_views > 1 else band
        del band


def _sums(views: list[View], size: Size, total: Tensor | None, *, softmax: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of the sum over ``views`` and ``total``; the sum is written to ``total`` as well."""
    for rows in band_slices(size, math.prod(views[0].maps.shape[:2])):
        for view in views:
            view.reach(rows)  # all models run before the first band is made, so that it takes no memory beside them
        band = None if total is None else total[:, :, rows]
        for view in views:
            scores = view.band(rows)
            scores = scores.softmax(1) if softmax else scores
            band = scores if band is None else band.add_(scores)
            del scores
        assert band is not None
        yield rows, band
        del band


BAND_ELEMENTS = 1 << 22
"""About the largest number of values in a band (16 MiB in float32)."""


def band_slices(size: Size, num_maps: int) -> Iterator[slice]:
    """Yield rows 0..H-1 in bands of about `BAND_ELEMENTS` values, with ``num_maps`` values to a pixel."""
    height, width = size
    rows = max(1, BAND_ELEMENTS // max(1, num_maps * width))
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def argmax_channel(scores: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return the index of the largest of (N, K, H, W) along K, the first among equals, as ``dtype``."""
    if scores.device.type != "cpu":
        return scores.argmax(1).to(dtype)
    # On the CPU a pass per class over whole rows is several times as fast as a reduction over a strided axis.
    best = scores[:, 0].clone()
    index = torch.zeros_like(best, dtype=dtype)
    for k in range(1, scores.shape[1]):
        index.masked_fill_(scores[:, k] > best, k)
        torch.maximum(best, scores[:, k], out=best)
    return index


def class_dtype(num_classes: int) -> torch.dtype:
    """Return the smallest type for class numbers: uint8 up to 256 classes, int16 beyond."""
    return torch.uint8 if num_classes <= 256 else torch.int16
