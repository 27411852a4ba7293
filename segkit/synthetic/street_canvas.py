"""The canvas of synthetic street scenes: textured polygons that paint picture and label alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

_BANK = 512  # side of a noise field in pixels

Points = Sequence[Sequence[float]]
Colour = tuple[float, float, float]


@dataclass
class Canvas:
    """A picture in the making: ``colour`` float32 (H, W, 3) in 0..255, ``label`` uint8 (H, W), the camera.

    ``haze`` float32 (H, W) is 0 (near) to 1 (far).  ``horizon`` (row) and ``vanish`` (column) are in pixels.
    """

    rng: np.random.Generator
    colour: np.ndarray
    label: np.ndarray
    haze: np.ndarray
    horizon: float
    vanish: float

    @property
    def height(self) -> int:
        return self.label.shape[0]

    @property
    def width(self) -> int:
        return self.label.shape[1]

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def ground(self, depth: float) -> float:
        """Row at which a thing stands; ``depth`` 1 is the lower edge of the picture, 0 the horizon."""
        return self.horizon + depth * (self.height - self.horizon)


@lru_cache(maxsize=8)
def _noise(cell: int) -> np.ndarray:
    """A fixed field (512, 512) float32 of mean 0 and deviation 1 whose grains are ``cell`` pixels wide."""
    rng = np.random.default_rng([20, cell])
    side = _BANK // cell
    field = rng.standard_normal((side, side)).astype(np.float32)
    smooth = cv2.INTER_CUBIC if cell > 1 else cv2.INTER_NEAREST
    grown = cv2.resize(field, (_BANK, _BANK), interpolation=smooth).astype(np.float32)
    return (grown - grown.mean()) / grown.std()


def grain(canvas: Canvas, height: int, width: int, cell: int) -> np.ndarray:
    """A (height, width, 1) cut of the noise field at a random place."""
    assert max(height, width) <= _BANK, f"scenes are at most {_BANK} pixels wide and high"
    top = int(canvas.rng.integers(0, _BANK - height + 1))
    left = int(canvas.rng.integers(0, _BANK - width + 1))
    return _noise(cell)[top : top + height, left : left + width, None]


def paint(
    canvas: Canvas,
    points: Points,
    class_id: int | None,
    colour: Colour,
    *,
    grains: Sequence[tuple[int, float]] = (),
    haze: float = 0.0,
    shade: float = 0.0,
) -> None:
    """Fill a polygon (x, y in pixels) with a colour, and its pixels of the label with ``class_id``.

    ``grains`` are (cell size in pixels, strength in grey levels); ``shade`` darkens downwards (0..1);
    ``class_id`` None leaves the label as it is.
    """
    if not grains and not shade:
        paint_flat(canvas, [points], class_id, colour, haze=haze)
        return
    corners = _whole(points)
    left, top = np.maximum(corners.min(0), 0)
    right, bottom = np.minimum(corners.max(0) + 1, (canvas.width, canvas.height))
    if right <= left or bottom <= top:
        return
    inside = np.zeros((bottom - top, right - left), np.uint8)
    cv2.fillPoly(inside, [corners - np.array((left, top), np.int32)], 1)
    height, width = inside.shape
    fill = np.empty((height, width, 3), np.float32)
    fill[:] = colour
    if grains:
        fill += sum(strength * grain(canvas, height, width, cell) for cell, strength in grains)
    if shade:
        fill *= np.linspace(1, 1 - shade, height, dtype=np.float32)[:, None, None]
    region = canvas.colour[top:bottom, left:right]
    cv2.copyTo(fill, inside, region)
    if class_id is not None:
        cv2.fillPoly(canvas.label, [corners], class_id)
        cv2.fillPoly(canvas.haze, [corners], haze)


def paint_flat(
    canvas: Canvas, polygons: Sequence[Points], class_id: int | None, colour: Colour, *, haze: float = 0.0
) -> None:
    """Fill polygons that do not overlap each other with one plain colour."""
    corners = [_whole(points) for points in polygons]
    cv2.fillPoly(canvas.colour, corners, colour)
    if class_id is not None:
        cv2.fillPoly(canvas.label, corners, class_id)
        cv2.fillPoly(canvas.haze, corners, haze)


def _whole(points: Points) -> np.ndarray:
    """Corners in whole pixels, int32 (N, 2); far outside the picture they are cut off."""
    return np.clip(np.rint(np.asarray(points, np.float32)), -4000, 4000).astype(np.int32)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, half_width: float, half_height: float, num: int = 14) -> Points:
    angle = np.linspace(0, 2 * np.pi, num, endpoint=False)
    return np.stack([x + half_width * np.cos(angle), y + half_height * np.sin(angle)], 1).tolist()


def vary(canvas: Canvas, colour: Colour, spread: float) -> Colour:
    """``colour`` with each channel and the brightness moved by up to ``spread`` grey levels."""
    moved = np.asarray(colour) + canvas.rng.uniform(-spread, spread) + canvas.rng.uniform(-spread, spread, 3) / 2
    red, green, blue = np.clip(moved, 5, 250).tolist()
    return red, green, blue


def pick(canvas: Canvas, colours: Sequence[Colour], spread: float = 15) -> Colour:
    return vary(canvas, colours[int(canvas.rng.integers(len(colours)))], spread)


ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, PERSON, SIGN = range(8)
VOID = 255

BRICKS: tuple[Colour, ...] = (
    (150, 90, 75),
    (180, 165, 140),
    (120, 120, 125),
    (200, 190, 180),
    (105, 80, 70),
    (165, 150, 110),
    (90, 105, 120),
)
LEAVES: tuple[Colour, ...] = ((70, 105, 50), (95, 120, 60), (50, 85, 50), (130, 120, 60), (60, 95, 75))
CARS: tuple[Colour, ...] = (
    (170, 40, 40),
    (40, 60, 130),
    (200, 200, 205),
    (60, 60, 65),
    (120, 122, 125),
    (235, 235, 235),
    (40, 90, 60),
    (200, 160, 40),
)
CLOTHES: tuple[Colour, ...] = (
    (180, 50, 50),
    (50, 70, 140),
    (40, 40, 45),
    (200, 200, 190),
    (90, 120, 70),
    (150, 110, 60),
    (120, 60, 120),
)
BOARDS: tuple[Colour, ...] = ((40, 80, 180), (200, 40, 40), (235, 200, 50), (235, 235, 235))


def line(canvas: Canvas, ends: Points, colour: Colour, thickness: int) -> None:
    (x0, y0), (x1, y1) = ends
    cv2.line(canvas.colour, (round(x0), round(y0)), (round(x1), round(y1)), colour, thickness)


def draw_crown(canvas: Canvas, x: float, y: float, half_width: float, half_height: float, *, haze: float) -> None:
    """A ragged ellipse of leaves."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = 1 + canvas.rng.uniform(-0.22, 0.18, 24)
    points = np.stack([x + half_width * radius * np.cos(angle), y + half_height * radius * np.sin(angle)], 1)
    grains = ((8, 12), (4, 12), (1, 8))
    paint(canvas, points.tolist(), VEGETATION, pick(canvas, LEAVES), grains=grains, haze=haze, shade=0.35)


@dataclass(frozen=True)
class Road:
    """Columns of road edges and house fronts at the lower edge of the picture, as multiples of the width."""

    left: float
    right: float
    front_left: float
    front_right: float

    def column(self, canvas: Canvas, at: float, depth: float) -> float:
        """Column at ``depth`` (1 near, 0 horizon) of a line that meets the lower edge at ``at`` widths."""
        return canvas.vanish + depth * (at * canvas.width - canvas.vanish)
