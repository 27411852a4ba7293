"""Painted scenes with exact labels: streets with eight classes, and any classes side by side for stand-ins.

A scene is a pure function of its generator. A street is a camera over a road that runs to a vanishing point, house
fronts and hedges on both sides, then cars, people, signs and rubbish from far to near, so that near things hide far
ones. Colours overlap between classes on purpose (grey cars on grey roads, red cars before brick, posters that look
like signs): texture, shape and place have to be learnt.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from segkit.data.labels import VOID
from segkit.synthetic.canvas import FIGURES, Canvas, Points, box, ellipse

ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, PERSON, SIGN = range(8)


class Scene(NamedTuple):
    """A picture: ``image`` uint8 (H, W, 3) RGB, ``label`` uint8 (H, W) train ids, ``instances`` uint16 (H, W).

    ``instances`` numbers the objects from 1; 0 is the background behind them, and all of a street.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    instances: NDArray[np.uint16]


class Kind(NamedTuple):
    """Things that stand in a street: their mean ``number``, and ranges (least, most) of the rest.

    ``depth`` is 1 at the lower edge of the picture and 0 at the horizon; ``on_road`` is the probability of the road,
    else the place ``across`` a pavement is 0 at the road and 1 at the houses; ``height`` is in heights of the camera,
    about 1.5 m; ``aspect`` is half the width as a share of the height.
    """

    figure: str
    class_id: int
    number: float
    depth: tuple[float, float]
    on_road: float
    across: tuple[float, float]
    height: tuple[float, float]
    aspect: tuple[float, float]


KINDS = (
    Kind("car", CAR, 2.3, (0.1, 0.65), 1, (0, 0), (0.85, 1.25), (0.5, 0.68)),
    Kind("person", PERSON, 1.2, (0.13, 0.6), 0.25, (0.1, 0.9), (1.05, 1.3), (0.13, 0.18)),
    Kind("sign", SIGN, 0.5, (0.14, 0.42), 0, (0.15, 0.15), (1.75, 2.4), (0.15, 0.17)),
    Kind("tree", VEGETATION, 1.4, (0.1, 0.7), 0, (0.5, 1.2), (2.0, 3.8), (0.22, 0.4)),
    Kind("rubbish", VOID, 0.5, (0.15, 0.9), 0, (0.1, 0.9), (0.2, 0.7), (0.4, 1.1)),
)


class Street(Canvas):
    """A canvas with a camera over a road; columns at the lower edge of the picture are multiples of its width."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        super().__init__(rng, size, SKY)
        self.horizon, self.vanish = self.height * self.uniform(0.36, 0.50), self.width * self.uniform(0.35, 0.65)
        left, right = self.road = self.uniform(-0.5, 0.05), self.uniform(0.95, 1.5)
        self.pavements = (left, left - self.uniform(0.15, 0.5)), (right, right + self.uniform(0.15, 0.5))

    def at(self, across: ArrayLike, depth: ArrayLike, rise: ArrayLike = 0.0) -> Points:
        """Points (..., 2) in pixels, for arguments that are broadcast against each other.

        They lie on lines from the vanishing point to column ``across`` of the lower edge, at ``depth`` (1 near, 0 far),
        ``rise`` picture heights (at depth 1) above the ground.
        """
        depth = np.asarray(depth, float)
        x = self.vanish + depth * (np.asarray(across) * self.width - self.vanish)
        y = self.horizon + depth * (self.height - self.horizon - np.asarray(rise) * self.height)
        return np.stack(np.broadcast_arrays(x, y), -1)


def paint_street(rng: np.random.Generator, *, size: tuple[int, int]) -> Scene:
    """A street of ``size`` (height, width) with the classes 0..7 and 255."""
    street = Street(rng, size)
    _sky(street)
    _ground(street)
    for _, front in street.pavements:
        _side(street, front)
    _things(street)
    if street.rng.random() < 0.3:  # the camera's own car
        middle, half = street.uniform(0.45, 0.55) * street.width, street.uniform(0.3, 0.45) * street.width
        street.paint(ellipse(middle, street.height, half, street.uniform(0.04, 0.09) * street.height), VOID, "bonnet")
    return Scene(street.photograph(), street.label, np.zeros(size, np.uint16))


def _sky(street: Street) -> None:
    """The sky with clouds; far houses and trees at the horizon."""
    down = np.linspace(0, 1, street.height, dtype=np.float32)[:, None, None]
    street.colour[:] = np.asarray(street.pick("sky"), np.float32) * (1 - down) + street.uniform(190, 235) * down
    clouds = street.grain(*street.size, 64) + 0.5 * street.grain(*street.size, 16)
    street.colour += street.uniform(5, 30) * np.maximum(clouds, 0)
    left = 0.0
    while left < street.width:
        right = left + street.uniform(0.05, 0.18) * street.width
        tall, kind = street.uniform(0.02, 0.16) * street.height, street.rng.random()
        house = box(left, street.horizon - tall, right, street.horizon + 3)
        crown = ellipse((left + right) / 2, street.horizon - tall / 2, (right - left) * 0.6, tall * 0.6, 24)
        if kind < 0.6:
            street.paint(house, BUILDING, "wall", haze=0.7)
        elif kind < 0.92:
            street.paint(crown, VEGETATION, "leaves", haze=0.7)
        left = right


def _ground(street: Street) -> None:
    """Pavements with slabs, the road with markings, and sometimes a shadow across, which is not in the label."""
    paving = street.pick("paving")
    street.paint(box(0, street.horizon, street.width, street.height), SIDEWALK, "paving", colour=paving, haze=0.3)
    across = np.array(street.pavements)
    joints = street.at(across, 0.06 * 1.35 ** np.arange(10)[:, None, None]).reshape(-1, 2, 2)
    edges = street.at([[at, at] for at in (*across[:, 0], *across.mean(1))], [0, 1])
    cv2.polylines(
        street.colour, list(np.rint([*joints, *edges]).astype(np.int32)), False, [0.8 * value for value in paving]
    )
    street.paint(street.at([0, *street.road], [0, 1, 1]), ROAD, "asphalt", haze=0.2)
    middle = sum(street.road) / 2 + street.uniform(-0.1, 0.1)
    dashes = 0.08 * 1.6 ** np.arange(6)[:, None] * [1, 1, 1.25, 1.25]
    street.paint(street.at(middle + 0.012 * np.array([-1, 1, 1, -1]), dashes), None, "marking")
    if street.rng.random() < 0.25:
        stripes = np.arange(street.road[0] + 0.06, street.road[1] - 0.08, 0.16)[:, None] + [0, 0.08, 0.08, 0]
        crossing = street.uniform(0.25, 0.6) * np.array([1, 1, 1.3, 1.3])
        street.paint(street.at(stripes, crossing), None, "marking")
    if street.rng.random() < 0.4:
        far = street.uniform(0.15, 0.7)
        top, bottom = street.at(0, [far, far + street.uniform(0.05, 0.3)])[:, 1].astype(int)
        street.colour[top:bottom] *= street.uniform(0.5, 0.75)


def _side(street: Street, front: float) -> None:
    """House fronts, hedges and gaps along one side, far ones first."""
    far = street.uniform(0.04, 0.08)
    while far < 1.6:
        near, kind = far * street.uniform(1.35, 2.3), street.rng.random()
        if kind < 0.68:
            _house(street, front, far, near)
        elif kind < 0.88:
            rise = street.uniform(0.2, 0.9)
            for depth in np.geomspace(far, near, 4):
                (x, y), half = street.at(front, depth, rise * 0.45), rise * depth * street.height
                bush = ellipse(x, y, half * street.uniform(0.5, 0.9), half * 0.6, 24)
                street.paint(bush, VEGETATION, "leaves", haze=_haze(depth))
        far = near


def _haze(depth: float) -> float:
    return 0.5 * max(0.0, 1 - 2 * depth)


def _house(street: Street, front: float, far: float, near: float) -> None:
    """A wall with windows, and sometimes a poster that belongs to the building."""
    rise, storey, columns = street.uniform(0.9, 3.0), street.uniform(0.22, 0.34), int(street.rng.integers(2, 5))

    def on_wall(left: ArrayLike, right: ArrayLike, low: ArrayLike, high: ArrayLike) -> Points:
        """Rectangles (..., 4, 2), broadcast, between two depths and two heights."""
        corners = np.broadcast_arrays(left, right, right, left), np.broadcast_arrays(low, low, high, high)
        return street.at(front, *(np.stack(values, -1) for values in corners))

    street.paint(on_wall(far, near, 0, rise), BUILDING, "wall", haze=1.2 * _haze(far))
    depths = far * (near / far) ** (np.arange(1, 2 * columns + 1) / (2 * columns + 1))
    floors = storey * np.arange(1, int(rise / storey))[:, None]
    street.paint(on_wall(depths[::2], depths[1::2], floors, floors + 0.6 * storey), None, "window")
    if street.rng.random() < 0.35:
        left, low = street.uniform(far, near * 0.9), street.uniform(0.1, 0.3)
        street.paint(on_wall(left, left * street.uniform(1.05, 1.15), low, low + 0.15), None, "board")


def _things(street: Street) -> None:
    """Random numbers of things of every kind at random depths, far ones first; their shadows are not in the label."""
    things: list[tuple[float, Kind]] = []
    for kind in KINDS:
        low, high = np.sqrt(kind.depth)
        things += [(street.uniform(low, high) ** 2, kind) for _ in range(street.rng.poisson(kind.number))]
    for depth, kind in sorted(things):
        if street.rng.random() < kind.on_road:
            across = street.uniform(street.road[0] + 0.08, street.road[1] - 0.08)
        else:
            inner, outer = street.pavements[int(street.rng.integers(2))]
            across = inner + street.uniform(*kind.across) * (outer - inner)
        foot, unit = street.at(across, depth), depth * (street.height - street.horizon)
        tall = unit * street.uniform(*kind.height)
        half = tall * street.uniform(*kind.aspect)
        figure = FIGURES[kind.figure][int(street.rng.integers(len(FIGURES[kind.figure])))]
        reach = 1.3 * half * np.abs(figure[0][1][:, 0]).max(), 0.1 * unit  # of the part that is on the ground
        (left, top), (right, bottom) = np.clip((foot - reach, foot + reach), 0, None).astype(int)
        street.colour[top:bottom, left:right] *= 0.55
        colours = {material: street.pick(material) for material, _ in figure}
        for material, points in figure:
            outline = foot + points * (half, -tall)
            street.paint(outline, kind.class_id, material, colour=colours[material], haze=_haze(depth))


def paint_classes(
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    num_classes: int,
    classes: Sequence[int],
    void_border: int = 0,
    void_share: float = 0.0,
) -> Scene:
    """A scene of ``size`` (height, width) in which each class of ``classes`` covers some pixels.

    Every one of the ``num_classes`` classes has a colour and a stripe pattern of its own, the same in every scene, so
    that a model can learn it. The first class fills the background, every class then has a figure in a cell of its
    own. ``void_border`` pixels along the outline of each figure become void, and so does the share ``void_share`` of
    the picture at its lower edge.
    """
    colours, waves = _class_looks(num_classes)
    shapes = *FIGURES["rubbish"], FIGURES["car"][0]  # compact: when small and without a border, something is left
    canvas = Canvas(rng, size, 0)  # with the numbers of figures as labels, until it is done
    canvas.colour[:] = colours[classes[0]]
    height, width = size[0] - (max(1, round(size[0] * void_share)) if void_share else 0), size[1]
    columns = int(np.ceil(np.sqrt(len(classes) * width / height)))
    rows = int(np.ceil(len(classes) / columns))
    cells = rng.permutation(rows * columns)[: len(classes)]
    for number, (k, cell) in enumerate(zip(classes, cells.tolist(), strict=True), start=1):
        half, tall = width / columns / 2 * canvas.uniform(0.8, 1.0), height / rows * canvas.uniform(0.8, 1.0)
        foot = (cell % columns + 0.5) * width / columns, (cell // columns + 0.5) * height / rows + tall / 2
        for _, points in shapes[int(rng.integers(len(shapes)))]:
            outline = points * (half, -tall) + foot - 0.5
            canvas.paint(outline, number, "metal", colour=colours[k].tolist())
    label = np.array([classes[0], *classes], np.uint8)[canvas.label]
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    canvas.colour += 18 * np.sin(waves[label, 0] * x + waves[label, 1] * y)[..., None]
    canvas.colour[height:] *= 0.4
    kernel = np.ones((void_border + 1, void_border + 1), np.uint8)
    label[cv2.dilate(canvas.label, kernel) != cv2.erode(canvas.label, kernel)] = VOID
    label[height:] = VOID
    return Scene(canvas.photograph(variety=0.05), label, canvas.label.astype(np.uint16))


def _class_looks(num_classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (K, 3) in 0..255 and stripe frequencies (K, 2) in radians a pixel."""
    k = np.arange(num_classes)
    value, saturation, hue = 0.95 - 0.3 * (k % 3 == 1), 0.9 - 0.45 * (k % 2), (k * 0.61803) % 1
    colours = [colorsys.hsv_to_rgb(*row) for row in np.stack([hue, saturation, value], 1).tolist()]
    waves = (0.25 + 0.09 * (k % 7))[:, None] * np.stack([np.cos(k * 2.39996), np.sin(k * 2.39996)], 1)
    return 255 * np.array(colours, np.float32), waves.astype(np.float32)
