"""What scenes are painted with: materials, figures made of parts, and a canvas for the picture and its label.

Points are float arrays (..., N, 2) of x and y: in pixels on a canvas, y downwards; in a figure, x is -1 to 1 from its
left to its right edge and y is 0 to 1 from the ground to its top.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

NOISE_SIDE = 512  # height and width of a noise field in pixels

Points = NDArray[np.float64]
Colour = tuple[float, float, float]


class Material(NamedTuple):
    """What a surface looks like.

    ``colours`` to choose from are RGB in hexadecimal; one is moved by up to ``spread`` grey levels. ``grains`` are
    noise: (size of a grain in pixels, strength in grey levels). ``shade`` 0 to 1 is how much darker the lower end is.
    Corners move towards the middle or away from it by up to the share ``ragged`` of their distance.
    """

    colours: str
    spread: float = 15
    grains: tuple[tuple[int, float], ...] = ()
    shade: float = 0
    ragged: float = 0


MATERIALS = {
    "asphalt": Material("5f5f62 787673 4b4c50", 12, ((32, 5), (1, 6))),
    "paving": Material("96918c 7d7878 a59687", 12, ((8, 5), (2, 6))),
    "marking": Material("d7d7cd d7d7cd d7d7cd d7d7cd d7b446", 0),
    "wall": Material("965a4b b4a58c 78787d c8beb4 695046 a5966e 5a6978", 20, ((8, 6), (2, 4))),
    "window": Material("2d323c 8ca0af 5a5f5a d2be78"),
    "leaves": Material("466932 5f783c 325532 82783c 3c5f4b", 15, ((8, 12), (4, 12), (1, 8)), 0.35, 0.2),
    "bark": Material("554637 46413c", 15, ((2, 8),)),
    "paint": Material("aa2828 283c82 c8c8cd 3c3c41 787a7d ebebeb 285a3c c8a028", 18, ((16, 4),), 0.3),
    "glass": Material("282d37 6e7d8c", 12),
    "lamp": Material("c8281e f0ebc8", 0),
    "rubber": Material("1e1e20", 0),
    "cloth": Material("b43232 32468c 28282d c8c8be 5a7846 966e3c 783c78", 15, ((2, 8),)),
    "trousers": Material("b43232 32468c 28282d c8c8be 5a7846 966e3c 783c78"),
    "skin": Material("dcb496 966950 5f4132", 12),
    "metal": Material("828487", 0),
    "board": Material("2850b4 c82828 ebc832 ebebeb", 12),
    "rim": Material("2850b4 c82828 ebc832 ebebeb", 12),
    "symbol": Material("1e1e1e f0f0f0", 0),
    "rubbish": Material("aa2828 283c82 c8c8cd 3c3c41 787a7d 285a3c 965a4b b4a58c 695046 5a6978", 20, ((4, 10),)),
    "bonnet": Material("282a30 5a1e1e", 15, (), 0.3),
    "tissue": Material("aa5046 963c3c", 12, ((64, 14), (16, 6))),
    "sky": Material("5a8cd2 96a5b9 bec3c8 7896c8 cdaa96"),
    "mist": Material("c8cdd2 d7cdbe"),
}


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """The corners of an upright rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)


def ellipse(x: float, y: float, half_width: float, half_height: float, corners: int = 14, turn: float = 0.0) -> Points:
    """A polygon on an ellipse; its first corner lies at the angle ``turn`` in radians."""
    angle = turn + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + half_width * np.cos(angle), y + half_height * np.sin(angle)], 1)


def taper(low: float, low_half: float, high: float, high_half: float) -> Points:
    """A trapezium about x = 0 between two heights, with half its width at each of them."""
    return np.array([(-low_half, low), (-high_half, high), (high_half, high), (low_half, low)])


Figure = list[tuple[str, Points]]  # parts from back to front: the name of a material, and the outline


def _car(width: float, roof: float) -> Figure:
    """A car from behind or, wide and with a short roof, from the side."""
    wheels = [("rubber", ellipse(side * 0.65, 0.19, 0.17, 0.19)) for side in (-1, 1)]
    lamps = [("lamp", box(side * 0.8 - 0.14, 0.35, side * 0.8 + 0.14, 0.47)) for side in (-1, 1)]
    body = [("paint", box(-1, 0.55, 1, 0.15)), ("paint", taper(0.54, 0.95, 1, roof))]
    parts = [*wheels, *body, ("glass", taper(0.55, 0.8, 0.93, roof - 0.12)), *lamps]
    return [(material, points * (width, 1)) for material, points in parts]


def _person(stride: float, swing: float) -> Figure:
    legs = [np.array([(s * 0.55, 0.5), (0, 0.5), (s * stride - 0.3, 0), (s * stride + 0.3, 0)]) for s in (-1, 1)]
    arms = [np.array([(s * 0.8 - 0.2, 0.8), (s * 0.8 + 0.2, 0.8), (s * 1.1 + swing, 0.48)]) for s in (-1, 1)]
    trunk, head = taper(0.45, 0.65, 0.82, 0.8), ellipse(0, 0.91, 0.48, 0.09)
    return [*(("trousers", leg) for leg in legs), *(("cloth", part) for part in (trunk, *arms)), ("skin", head)]


def _sign(corners: int, turn: float) -> Figure:
    """A board on a post, with a rim and a symbol."""
    rim, board = (ellipse(0, 0.86, size, 0.14 * size, corners, turn * np.pi) for size in (1, 0.78))
    post, symbol = box(-0.13, 0.86, 0.13, 0), box(-0.35, 0.88, 0.35, 0.84)
    return [("metal", post), ("rim", rim), ("board", board), ("symbol", symbol)]


def _tree(*crowns: tuple[float, float, float]) -> Figure:
    leaves = [("leaves", ellipse(x, y, 0.8, height, 24)) for x, y, height in crowns]
    return [("bark", taper(0, 0.12, 0.75, 0.1)), *leaves]


FIGURES: dict[str, list[Figure]] = {
    "car": [_car(1, 0.8), _car(1, 0.8), _car(2.1, 0.55)],
    "person": [_person(stride, swing) for stride in (0.15, 0.5, 0.85) for swing in (-0.4, 0, 0.4)],
    "sign": [_sign(16, 0), _sign(3, 0.5), _sign(4, 0.25), _sign(8, 0.125)],
    "tree": [_tree((-0.3, 0.7, 0.25), (0.2, 0.8, 0.2)), _tree((0.3, 0.65, 0.2), (-0.3, 0.75, 0.25), (0.1, 0.85, 0.17))],
    "rubbish": [[("rubbish", box(-1, 1, 1, 0))], [("rubbish", ellipse(0, 0.5, 1, 0.5))]],
}
"""Name to variants of a figure."""


@cache
def _noise(cell: int) -> NDArray[np.float32]:
    """A fixed square of mean 0 and deviation 1 whose grains are ``cell`` pixels wide."""
    field = np.random.default_rng([20, cell]).standard_normal((NOISE_SIDE // cell,) * 2).astype(np.float32)
    smooth = cv2.INTER_CUBIC if cell > 1 else cv2.INTER_NEAREST
    grown = cv2.resize(field, (NOISE_SIDE, NOISE_SIDE), interpolation=smooth).astype(np.float32)
    return (grown - grown.mean()) / grown.std()


class Canvas:
    """A picture in the making, of ``size`` (height, width), with all that is random drawn from ``rng``.

    ``colour`` float32 (H, W, 3) is in 0..255, ``label`` uint8 (H, W) starts as ``label``, and ``haze`` float32 (H, W)
    is 0 for what is near and 1 for what is far.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], label: int) -> None:
        self.rng, self.size, (self.height, self.width) = rng, size, size
        self.colour = np.zeros((*size, 3), np.float32)
        self.label = np.full(size, label, np.uint8)
        self.haze = np.zeros(size, np.float32)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def pick(self, material: str) -> Colour:
        """One of the colours of a material, somewhat moved."""
        colours, spread = MATERIALS[material].colours.split(), MATERIALS[material].spread
        whole, *single = self.rng.uniform(-spread, spread, 4).tolist()
        moved = zip(bytes.fromhex(colours[int(self.rng.integers(len(colours)))]), single, strict=True)
        red, green, blue = (min(max(value + whole + shift / 2, 5), 250) for value, shift in moved)
        return red, green, blue

    def grain(self, height: int, width: int, cell: int) -> NDArray[np.float32]:
        """A (height, width, 1) cut of the noise field at a random place; mirrored where the field is too small."""
        rows, columns = min(height, NOISE_SIDE), min(width, NOISE_SIDE)
        top = int(self.rng.integers(0, NOISE_SIDE - rows + 1))
        left = int(self.rng.integers(0, NOISE_SIDE - columns + 1))
        cut = _noise(cell)[top : top + rows, left : left + columns]
        if (rows, columns) != (height, width):
            cut = np.pad(cut, ((0, height - rows), (0, width - columns)), mode="symmetric")
        return cut[..., None]

    def paint(
        self, points: ArrayLike, class_id: int | None, material: str, *, colour: Colour | None = None, haze: float = 0.0
    ) -> None:
        """Fill polygons (..., N, 2), none of which overlap, with a material, and the label in them with ``class_id``.

        With ``class_id`` None the label stays as it is. ``colour`` is chosen from the material unless given.
        """
        _, _, grains, shade, ragged = MATERIALS[material]
        colour = self.pick(material) if colour is None else colour
        outline = np.asarray(points, float)
        if ragged:
            middle = outline.mean(-2, keepdims=True)
            outline = middle + (outline - middle) * (1 + ragged * self.rng.uniform(-1, 1, (*outline.shape[:-1], 1)))
        # Far outside the picture polygons are cut off, where OpenCV would overflow.
        polygons = np.clip(np.rint(outline), -4000, 4000).astype(np.int32).reshape(-1, *outline.shape[-2:])
        left, top = np.maximum(polygons.min((0, 1)), 0).tolist()
        right, bottom = np.minimum(polygons.max((0, 1)) + 1, (self.width, self.height)).tolist()
        if right <= left or bottom <= top:
            return
        if grains or shade:
            fill = np.full((bottom - top, right - left, 3), colour, np.float32)
            fill += sum(strength * self.grain(bottom - top, right - left, cell) for cell, strength in grains)
            if shade:
                fill *= np.linspace(1, 1 - shade, bottom - top, dtype=np.float32)[:, None, None]
            inside = np.zeros(fill.shape[:2], np.uint8)
            cv2.fillPoly(inside, list(polygons - np.array((left, top), np.int32)), 1)
            cv2.copyTo(fill, inside, self.colour[top:bottom, left:right])
        else:
            cv2.fillPoly(self.colour, list(polygons), colour)
        if class_id is not None:
            cv2.fillPoly(self.label, list(polygons), class_id)
            cv2.fillPoly(self.haze, list(polygons), haze)

    def photograph(self, *, variety: float = 1.0) -> NDArray[np.uint8]:
        """Light, haze, lens and sensor: the picture as uint8 (H, W, 3); ``variety`` 0 (always alike) to 1."""
        haze = self.haze[..., None] * self.uniform(0.0, 0.75)
        picture = self.colour * (1 - haze) + haze * np.asarray(self.pick("mist"), np.float32)
        left, right = (1 + variety * self.uniform(-0.25, 0.25) for _ in range(2))
        light = 1 + self.uniform(0.03, 0.12) * variety * self.grain(*self.size, 64)
        light = light * np.linspace(left, right, self.width, dtype=np.float32)[None, :, None]
        warmth = variety * self.uniform(-0.12, 0.12)
        gain = (1 + variety * self.uniform(-0.55, 0.25)) * np.array([1 + warmth, 1, 1 - warmth], np.float32)
        lit = picture * (light * gain) + np.float32(variety * self.uniform(-8, 12))
        soft = cv2.GaussianBlur(lit, (3, 3), 0.3 + variety * self.uniform(0.1, 0.5))
        noise = np.concatenate([self.grain(*self.size, 1) for _ in range(3)], axis=2)
        return np.clip(np.rint(soft + np.float32(self.uniform(2, 7)) * noise), 0, 255).astype(np.uint8)
