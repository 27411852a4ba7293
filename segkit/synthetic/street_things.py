"""The things that stand in a synthetic street: trees, cars, people, signs, clutter; far ones first."""

from __future__ import annotations

import numpy as np

from segkit.synthetic.street_canvas import (
    BOARDS,
    BRICKS,
    CAR,
    CARS,
    CLOTHES,
    PERSON,
    SIGN,
    VEGETATION,
    VOID,
    Canvas,
    Colour,
    Road,
    box,
    draw_crown,
    ellipse,
    paint,
    pick,
)

KINDS = ("car", "person", "sign", "tree", "clutter")
MEAN_NUMBER = {"car": 2.3, "person": 1.2, "sign": 0.5, "tree": 1.4, "clutter": 0.5}
DEPTHS = {
    "car": (0.1, 0.65),
    "person": (0.13, 0.6),
    "sign": (0.14, 0.42),
    "tree": (0.1, 0.7),
    "clutter": (0.15, 0.9),
}


def draw_things(canvas: Canvas, road: Road) -> None:
    """Random numbers of every kind at random depths (1 at the lower edge, 0 at the horizon), far first."""
    things: list[tuple[float, str]] = []
    for kind in KINDS:
        low, high = DEPTHS[kind]
        number = int(canvas.rng.poisson(MEAN_NUMBER[kind]))
        things += [(canvas.uniform(low**0.5, high**0.5) ** 2, kind) for _ in range(number)]
    draw = {"car": _car, "person": _person, "sign": _sign, "tree": _tree, "clutter": _clutter}
    for depth, kind in sorted(things):
        draw[kind](canvas, road, depth)


def _unit(canvas: Canvas, depth: float) -> float:
    """Pixels of the camera's height (about 1.5 m) at ``depth``."""
    return depth * (canvas.height - canvas.horizon)


def _haze(depth: float) -> float:
    return 0.5 * max(0.0, 1 - 2 * depth)


def _on_pavement(canvas: Canvas, road: Road, depth: float) -> float:
    """A random column of the pavement on either side."""
    near, far = (road.left, road.front_left) if canvas.chance(0.5) else (road.right, road.front_right)
    return road.column(canvas, near + canvas.uniform(0.1, 0.9) * (far - near), depth)


def _shadow(canvas: Canvas, x: float, y: float, half_width: float, half_height: float) -> None:
    """A soft dark spot under a thing: the label stays what the ground is."""
    left, right = max(int(x - half_width), 0), min(int(x + half_width), canvas.width)
    top, bottom = max(int(y - half_height), 0), min(int(y + half_height), canvas.height)
    if left < right and top < bottom:
        canvas.colour[top:bottom, left:right] *= 0.55


def _car(canvas: Canvas, road: Road, depth: float) -> None:
    """A car from behind, from the front or from the side, on the road or at its edge."""
    unit = _unit(canvas, depth)
    at = canvas.uniform(road.left + 0.08, road.right - 0.08)
    x, y = road.column(canvas, at, depth), canvas.ground(depth)
    body = pick(canvas, CARS, 18)
    glass: Colour = pick(canvas, ((40, 45, 55), (110, 125, 140)), 12)
    wide = canvas.chance(0.3)
    half = unit * (canvas.uniform(1.1, 1.5) if wide else canvas.uniform(0.55, 0.7))
    tall = unit * canvas.uniform(0.85, 1.25)
    roof, haze = (0.55 if wide else 0.8), _haze(depth)
    _shadow(canvas, x, y, half * 1.1, unit * 0.12)
    for wheel in (-0.65, 0.65):
        size = unit * 0.2
        tyre = ellipse(x + wheel * half, y - size, size * (1 if wide else 0.6), size)
        paint(canvas, tyre, CAR, (30, 30, 32), haze=haze)
    belt = y - 0.55 * tall
    paint(
        canvas,
        box(x - half, belt, x + half, y - 0.15 * tall),
        CAR,
        body,
        grains=((16, 4),),
        haze=haze,
        shade=0.3,
    )
    cabin = (
        (x - half * 0.95, belt + 1),
        (x - half * roof, y - tall),
        (x + half * roof, y - tall),
        (x + half * 0.95, belt + 1),
    )
    paint(canvas, cabin, CAR, body, haze=haze)
    pane = (
        (x - half * 0.8, belt),
        (x - half * (roof - 0.12), y - 0.93 * tall),
        (x + half * (roof - 0.12), y - 0.93 * tall),
        (x + half * 0.8, belt),
    )
    paint(canvas, pane, CAR, glass, haze=haze)
    lamp: Colour = (200, 40, 30) if canvas.chance(0.5) else (240, 235, 200)
    for side in (-1, 1):
        edge = x + side * half * 0.8
        paint(
            canvas,
            box(edge - half * 0.14, belt + 0.08 * tall, edge + half * 0.14, belt + 0.2 * tall),
            CAR,
            lamp,
            haze=haze,
        )


def _person(canvas: Canvas, road: Road, depth: float) -> None:
    """Legs, trunk, arms and head; mostly on the pavement."""
    unit = _unit(canvas, depth)
    if canvas.chance(0.75):
        x = _on_pavement(canvas, road, depth)
    else:
        x = road.column(canvas, canvas.uniform(road.left, road.right), depth)
    y, tall, haze = canvas.ground(depth), unit * canvas.uniform(1.05, 1.3), _haze(depth)
    wide = tall * canvas.uniform(0.13, 0.18)
    stride = wide * canvas.uniform(0.1, 0.9)
    trousers, shirt = pick(canvas, CLOTHES), pick(canvas, CLOTHES)
    _shadow(canvas, x, y, wide * 1.2, unit * 0.05)
    for side in (-1, 1):
        foot = x + side * stride
        leg = (
            (x - wide * 0.55 * (side < 0), y - 0.5 * tall),
            (x + wide * 0.55 * (side > 0), y - 0.5 * tall),
            (foot + wide * 0.3, y),
            (foot - wide * 0.3, y),
        )
        paint(canvas, leg, PERSON, trousers, haze=haze)
    trunk = (
        (x - wide * 0.8, y - 0.82 * tall),
        (x + wide * 0.8, y - 0.82 * tall),
        (x + wide * 0.65, y - 0.45 * tall),
        (x - wide * 0.65, y - 0.45 * tall),
    )
    paint(canvas, trunk, PERSON, shirt, grains=((2, 8),), haze=haze)
    swing = canvas.uniform(-0.5, 0.5) * wide
    for side in (-1, 1):
        shoulder = x + side * wide * 0.8
        arm = (
            (shoulder - wide * 0.2, y - 0.8 * tall),
            (shoulder + wide * 0.2, y - 0.8 * tall),
            (shoulder + side * wide * 0.3 + swing, y - 0.48 * tall),
        )
        paint(canvas, arm, PERSON, shirt, haze=haze)
    skin = pick(canvas, ((220, 180, 150), (150, 105, 80), (95, 65, 50)), 12)
    paint(canvas, ellipse(x, y - 0.91 * tall, 0.075 * tall, 0.09 * tall), PERSON, skin, haze=haze)


def _sign(canvas: Canvas, road: Road, depth: float) -> None:
    """A board on a post: disc, triangle, square or octagon, with a rim and a symbol."""
    unit = _unit(canvas, depth)
    near, far = (road.left, road.front_left) if canvas.chance(0.5) else (road.right, road.front_right)
    x, y, haze = road.column(canvas, near + 0.15 * (far - near), depth), canvas.ground(depth), _haze(depth)
    tall, half = unit * canvas.uniform(1.5, 2.1), unit * canvas.uniform(0.26, 0.36)
    post = max(1.0, unit * 0.04)
    paint(canvas, box(x - post, y - tall, x + post, y), SIGN, (130, 132, 135), haze=haze)
    shape = int(canvas.rng.integers(4))
    corners = {0: 16, 1: 3, 2: 4, 3: 8}[shape]
    turn = {1: -np.pi / 2, 2: np.pi / 4, 3: np.pi / 8}.get(shape, 0.0)
    face, rim = pick(canvas, BOARDS, 12), pick(canvas, BOARDS, 12)
    for size, colour in ((1.0, rim), (0.78, face)):
        angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + turn
        board = np.stack([x + size * half * np.cos(angle), y - tall + size * half * np.sin(angle)], 1)
        paint(canvas, board.tolist(), SIGN, colour, haze=haze)
    symbol = box(x - half * 0.35, y - tall - half * 0.12, x + half * 0.35, y - tall + half * 0.12)
    paint(canvas, symbol, SIGN, (30, 30, 30) if canvas.chance(0.5) else (240, 240, 240), haze=haze)


def _tree(canvas: Canvas, road: Road, depth: float) -> None:
    """A trunk and two or three crowns, at the house side of the pavement."""
    unit = _unit(canvas, depth)
    near, far = (road.left, road.front_left) if canvas.chance(0.5) else (road.right, road.front_right)
    x, y, haze = (
        road.column(canvas, near + canvas.uniform(0.5, 1.2) * (far - near), depth),
        canvas.ground(depth),
        _haze(depth),
    )
    tall, half = unit * canvas.uniform(1.6, 3.2), unit * canvas.uniform(0.5, 1.2)
    trunk = max(1.5, unit * 0.1)
    paint(
        canvas,
        box(x - trunk, y - tall, x + trunk, y),
        VEGETATION,
        pick(canvas, ((85, 70, 55), (70, 65, 60))),
        grains=((2, 8),),
        haze=haze,
    )
    for _ in range(int(canvas.rng.integers(2, 4))):
        shift = canvas.uniform(-0.5, 0.5) * half
        draw_crown(
            canvas,
            x + shift,
            y - tall + canvas.uniform(-0.4, 0.4) * half,
            half,
            half * canvas.uniform(0.6, 0.9),
            haze=haze,
        )


def _clutter(canvas: Canvas, road: Road, depth: float) -> None:
    """A box, bin or heap without a class: void."""
    unit = _unit(canvas, depth)
    x, y = _on_pavement(canvas, road, depth), canvas.ground(depth)
    half, tall = unit * canvas.uniform(0.12, 0.4), unit * canvas.uniform(0.2, 0.7)
    colour = pick(canvas, CARS + BRICKS, 20)
    if canvas.chance(0.5):
        paint(canvas, box(x - half, y - tall, x + half, y), VOID, colour, grains=((4, 10),), haze=_haze(depth))
    else:
        paint(
            canvas,
            ellipse(x, y - tall / 2, half, tall / 2),
            VOID,
            colour,
            grains=((4, 10),),
            haze=_haze(depth),
        )
