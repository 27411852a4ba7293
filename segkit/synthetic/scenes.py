"""Drawn street scenes with exact labels: the content of the synthetic data set.

A scene is a pure function of its generator: a camera over a road that runs to a vanishing point, house fronts
and hedges on both sides, then cars, people, signs and clutter from far to near, so that near things hide far
ones.  Colours overlap between classes on purpose (grey cars on grey roads, red cars before brick, posters
that look like signs): texture, shape and place have to be learnt.
"""

from __future__ import annotations

import cv2
import numpy as np

from segkit.synthetic.street_canvas import (
    BOARDS,
    BRICKS,
    BUILDING,
    ROAD,
    SIDEWALK,
    SKY,
    VOID,
    Canvas,
    Colour,
    Road,
    box,
    draw_crown,
    ellipse,
    grain,
    line,
    paint,
    paint_flat,
    pick,
)
from segkit.synthetic.street_things import draw_things


def draw_scene(rng: np.random.Generator, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 (H, W, 3) RGB and label uint8 (H, W) with 0..7 and 255; all from ``rng``."""
    canvas = Canvas(
        rng=rng,
        colour=np.zeros((height, width, 3), np.float32),
        label=np.full((height, width), SKY, np.uint8),
        haze=np.ones((height, width), np.float32),
        horizon=height * float(rng.uniform(0.36, 0.50)),
        vanish=width * float(rng.uniform(0.35, 0.65)),
    )
    _draw_sky(canvas)
    _draw_skyline(canvas)
    road = _draw_ground(canvas)
    for side in (-1, 1):
        _draw_side(canvas, side, road)
    draw_things(canvas, road)
    if canvas.chance(0.3):
        _draw_bonnet(canvas)
    return _photograph(canvas), canvas.label


def _draw_sky(canvas: Canvas) -> None:
    high = pick(canvas, ((90, 140, 210), (150, 165, 185), (190, 195, 200), (120, 150, 200), (205, 170, 150)))
    rows = np.linspace(0, 1, canvas.height, dtype=np.float32)[:, None, None]
    canvas.colour[:] = np.asarray(high, np.float32) * (1 - rows) + (canvas.uniform(190, 235)) * rows
    clouds = grain(canvas, canvas.height, canvas.width, 64) + 0.5 * grain(canvas, canvas.height, canvas.width, 16)
    canvas.colour += canvas.uniform(5, 30) * np.maximum(clouds, 0)
    canvas.haze[:] = 0


def _draw_skyline(canvas: Canvas) -> None:
    """Far houses and trees behind everything else."""
    left = 0.0
    while left < canvas.width:
        right = left + canvas.uniform(0.05, 0.18) * canvas.width
        top = canvas.horizon - canvas.uniform(0.02, 0.16) * canvas.height
        if canvas.chance(0.6):
            paint(
                canvas,
                box(left, top, right, canvas.horizon + 3),
                BUILDING,
                pick(canvas, BRICKS),
                haze=0.7,
                grains=((4, 6),),
            )
        elif canvas.chance(0.8):
            middle, half = (left + right) / 2, (right - left) * 0.6
            draw_crown(canvas, middle, (top + canvas.horizon) / 2, half, (canvas.horizon - top) * 0.6, haze=0.7)
        left = right


def _draw_ground(canvas: Canvas) -> Road:
    left, right = canvas.uniform(-0.5, 0.05), canvas.uniform(0.95, 1.5)
    pavement = canvas.uniform(0.15, 0.5), canvas.uniform(0.15, 0.5)
    road = Road(left, right, left - pavement[0], right + pavement[1])
    vanishing = (canvas.vanish, canvas.horizon)
    lower = canvas.height
    paving = pick(canvas, ((150, 145, 140), (125, 120, 120), (165, 150, 135)), 12)
    paint(
        canvas,
        box(0, canvas.horizon, canvas.width, lower),
        SIDEWALK,
        paving,
        grains=((8, 5), (2, 6)),
        haze=0.3,
    )
    _draw_slabs(canvas, road, paving)
    asphalt = pick(canvas, ((95, 95, 98), (120, 118, 115), (75, 76, 80)), 12)
    edges = ((left * canvas.width, lower), (right * canvas.width, lower))
    paint(canvas, (vanishing, *edges), ROAD, asphalt, grains=((32, 5), (1, 6)), haze=0.2)
    _draw_markings(canvas, road)
    if canvas.chance(0.4):  # a shadow across everything on the ground: the label stays
        depth = canvas.uniform(0.15, 0.7)
        rows = slice(int(canvas.ground(depth)), int(canvas.ground(depth + canvas.uniform(0.05, 0.3))))
        canvas.colour[rows] *= canvas.uniform(0.5, 0.75)
    return road


def _draw_slabs(canvas: Canvas, road: Road, paving: Colour) -> None:
    """Joints of the pavement: rows that lie closer towards the horizon."""
    darker: Colour = (paving[0] * 0.8, paving[1] * 0.8, paving[2] * 0.8)
    for depth in 0.06 * 1.35 ** np.arange(10):
        row = canvas.ground(float(depth))
        for near, far in ((road.left, road.front_left), (road.right, road.front_right)):
            ends = (road.column(canvas, near, depth), row), (road.column(canvas, far, depth), row)
            line(canvas, ends, darker, 1)
    for near, far in ((road.left, road.front_left), (road.right, road.front_right)):
        for share in (0.0, 0.5):
            at = near + share * (far - near)
            edge = (road.column(canvas, at, 1.0), canvas.height)
            line(canvas, ((canvas.vanish, canvas.horizon), edge), darker, 1 + int(share == 0))


def _draw_markings(canvas: Canvas, road: Road) -> None:
    white: Colour = (215, 215, 205) if canvas.chance(0.8) else (215, 180, 70)
    middle = (road.left + road.right) / 2 + canvas.uniform(-0.1, 0.1)
    half = 0.012
    for depth in 0.08 * 1.6 ** np.arange(6):
        rows = canvas.ground(depth), canvas.ground(depth * 1.25)
        at = [
            road.column(canvas, middle + s * half, d)
            for d, s in ((depth, -1), (depth, 1), (depth * 1.25, 1), (depth * 1.25, -1))
        ]
        paint(canvas, ((at[0], rows[0]), (at[1], rows[0]), (at[2], rows[1]), (at[3], rows[1])), None, white)
    if canvas.chance(0.25):
        far = canvas.uniform(0.25, 0.6)
        near = far * 1.3
        for stripe in np.arange(road.left + 0.06, road.right - 0.08, 0.16):
            corners = [
                (road.column(canvas, stripe + dx, d), canvas.ground(d))
                for dx, d in ((0, far), (0.08, far), (0.08, near), (0, near))
            ]
            paint(canvas, corners, None, white, grains=((2, 10),))


def _draw_side(canvas: Canvas, side: int, road: Road) -> None:
    """House fronts and hedges along one side, from the vanishing point to the edge of the picture."""
    at = road.front_left if side < 0 else road.front_right
    far = canvas.uniform(0.04, 0.08)
    while far < 1.6:
        near = far * canvas.uniform(1.35, 2.3)
        kind = canvas.rng.random()
        if kind < 0.68:
            _draw_house(canvas, road, at, far, near)
        elif kind < 0.88:
            _draw_hedge(canvas, road, at, far, near)
        far = near


def _front(canvas: Canvas, road: Road, at: float, depth: float, rise: float) -> tuple[float, float]:
    """Point on a house front at ``depth``, ``rise`` (in picture heights at depth 1) above the ground."""
    return road.column(canvas, at, depth), canvas.ground(depth) - rise * depth * canvas.height


def _on_wall(
    canvas: Canvas, road: Road, at: float, depths: tuple[float, float], rises: tuple[float, float]
) -> list[tuple[float, float]]:
    """The four corners of a rectangle on a house front, between two depths and two heights."""
    (far, near), (low, high) = depths, rises
    return [_front(canvas, road, at, d, r) for d, r in ((far, low), (near, low), (near, high), (far, high))]


def _draw_house(canvas: Canvas, road: Road, at: float, far: float, near: float) -> None:
    rise = canvas.uniform(0.9, 3.0)
    colour = pick(canvas, BRICKS, 20)
    haze = 0.6 * max(0.0, 1 - far * 2)
    wall = _on_wall(canvas, road, at, (far, near), (0, rise))
    paint(canvas, wall, BUILDING, colour, grains=((8, 6), (2, 4)), haze=haze)
    glass = pick(canvas, ((45, 50, 60), (140, 160, 175), (90, 95, 90), (210, 190, 120)), 15)
    num_columns, storey = int(canvas.rng.integers(2, 5)), canvas.uniform(0.22, 0.34)
    steps = np.arange(num_columns * 2 + 1) / (num_columns * 2 + 1)
    depths = (far * (near / far) ** steps).tolist()
    windows = [
        _on_wall(
            canvas,
            road,
            at,
            (depths[2 * column + 1], depths[2 * column + 2]),
            (floor * storey, (floor + 0.6) * storey),
        )
        for column in range(num_columns)
        for floor in range(1, int(rise / storey))
    ]
    if windows:
        paint_flat(canvas, windows, None, glass)
    if canvas.chance(0.35):  # a poster or shop sign on the wall belongs to the building
        d0 = canvas.uniform(far, near * 0.9)
        d1, low = d0 * canvas.uniform(1.05, 1.15), canvas.uniform(0.1, 0.3)
        poster = _on_wall(canvas, road, at, (d0, d1), (low, low + 0.15))
        paint(canvas, poster, None, pick(canvas, BOARDS, 25))


def _draw_hedge(canvas: Canvas, road: Road, at: float, far: float, near: float) -> None:
    """Bushes in a row: overlapping crowns of leaves."""
    rise = canvas.uniform(0.2, 0.9)
    for depth in np.geomspace(far, near, 4):
        x, y = _front(canvas, road, at, float(depth), rise * 0.45)
        half = rise * depth * canvas.height
        draw_crown(canvas, x, y, half * canvas.uniform(0.5, 0.9), half * 0.6, haze=0.5 * max(0.0, 1 - 2 * depth))


def _draw_bonnet(canvas: Canvas) -> None:
    """The camera's own car at the lower edge: void."""
    half = canvas.uniform(0.3, 0.45) * canvas.width
    rise = canvas.uniform(0.04, 0.09) * canvas.height
    middle = canvas.width / 2 + canvas.uniform(-0.05, 0.05) * canvas.width
    paint(
        canvas,
        ellipse(middle, canvas.height, half, rise),
        VOID,
        pick(canvas, ((40, 42, 48), (90, 30, 30))),
        shade=0.3,
    )


def _photograph(canvas: Canvas) -> np.ndarray:
    """Light, haze, lens and sensor: float colours to a uint8 picture."""
    height, width = canvas.label.shape
    haze = canvas.haze[..., None] * canvas.uniform(0.0, 0.75)
    picture = canvas.colour * (1 - haze) + haze * np.asarray(
        pick(canvas, ((200, 205, 210), (215, 205, 190))), np.float32
    )
    light = 1 + canvas.uniform(0.03, 0.12) * grain(canvas, height, width, 64)
    light = light * np.linspace(canvas.uniform(0.75, 1.25), canvas.uniform(0.75, 1.25), width)[None, :, None]
    warmth = canvas.uniform(-0.12, 0.12)
    gain = canvas.uniform(0.45, 1.25) * np.array([1 + warmth, 1.0, 1 - warmth])
    lit = picture * (light * gain).astype(np.float32) + np.float32(canvas.uniform(-8, 12))
    soft = cv2.GaussianBlur(lit, (3, 3), canvas.uniform(0.4, 0.8))
    noise = np.concatenate([grain(canvas, height, width, 1) for _ in range(3)], axis=2)
    return np.clip(np.rint(soft + canvas.uniform(2, 7) * noise), 0, 255).astype(np.uint8)
