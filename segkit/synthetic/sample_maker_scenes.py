"""Drawn scenes for the sample-data maker: pictures that show their labels, and the files they are written to.

Every class has a colour and a stripe pattern of its own, the same in every scene, so that a model can learn
it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VOID = 255
"""Train id of pixels without a class, in every scene."""


@dataclass(frozen=True)
class Scene:
    """A drawing: ``image`` uint8 (H, W, 3), ``label`` uint8 (H, W) train ids, ``instances`` uint16 (H, W).

    ``instances`` numbers the objects from 1 on; 0 is the background that lies behind them.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    instances: NDArray[np.uint16]


def class_plan(num_classes: int, num_images: int, rng: np.random.Generator) -> list[list[int]]:
    """Which classes each of ``num_images`` scenes must show: all classes together, at least three a scene."""
    order = rng.permutation(num_classes)
    plan = [[int(k) for k in order[index::num_images]] for index in range(num_images)]
    least = min(3, num_classes)
    for classes in plan:
        while len(classes) < least:
            extra = int(rng.integers(num_classes))
            if extra not in classes:
                classes.append(extra)
    return plan


def draw_scene(
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    num_classes: int,
    classes: Sequence[int],
    void_border: int = 0,
    void_share: float = 0.0,
) -> Scene:
    """Draw a scene of ``size`` (height, width) in which each class of ``classes`` covers some pixels.

    The first class fills the background, every class then gets a blob in a cell of its own. ``void_border``
    pixels around each blob become void, as does the share ``void_share`` of the picture at its lower edge.
    """
    void_rows = max(1, round(size[0] * void_share)) if void_share else 0
    label, instances = _draw_labels(rng, size, classes, free_rows=void_rows)
    image = paint(rng, label, num_classes)
    if void_border:
        label[_borders(instances, void_border)] = VOID
    label[size[0] - void_rows :] = VOID
    return Scene(image=image, label=label, instances=instances)


def _draw_labels(
    rng: np.random.Generator, size: tuple[int, int], classes: Sequence[int], *, free_rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    height, width = size[0] - free_rows, size[1]
    label = np.full(size, classes[0], np.uint8)
    instances = np.zeros(size, np.uint16)
    columns = int(np.ceil(np.sqrt(len(classes) * width / height)))
    rows = int(np.ceil(len(classes) / columns))
    cells = rng.permutation(rows * columns)[: len(classes)]
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    for number, (k, cell) in enumerate(zip(classes, cells, strict=True), start=1):
        top, left = (cell // columns) * height / rows, (cell % columns) * width / columns
        half_height, half_width = height / rows / 2, width / columns / 2
        shrink = rng.uniform(0.7, 0.95, 2)
        dy = np.abs(y - (top + half_height - 0.5)) / (half_height * shrink[0])
        dx = np.abs(x - (left + half_width - 0.5)) / (half_width * shrink[1])
        blob = (dy**2 + dx**2 <= 1) if rng.random() < 0.6 else (np.maximum(dy, dx) <= 0.9)
        label[blob], instances[blob] = k, number
    return label, instances


def paint(rng: np.random.Generator, label: NDArray[np.uint8], num_classes: int) -> NDArray[np.uint8]:
    """Colour the classes of ``label`` (H, W), with each class's stripes, light from one side, and noise."""
    colours, waves = class_looks(num_classes)
    y, x = np.mgrid[0 : label.shape[0], 0 : label.shape[1]].astype(np.float32)
    wave = waves[label]
    stripes = np.sin(wave[..., 0] * x + wave[..., 1] * y)
    light = rng.uniform(0.85, 1.0) + rng.uniform(-0.1, 0.1) * x / max(1, label.shape[1])
    noise = rng.normal(0, 6, (*label.shape, 1)).astype(np.float32)
    image = colours[label] * light[..., None] + 18 * stripes[..., None] + noise
    return np.clip(image, 0, 255).astype(np.uint8)


def class_looks(num_classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (256, 3) in 0..255 and stripe frequencies (256, 2) in radians a pixel; the rest is grey."""
    colours = np.full((256, 3), 96, np.float32)
    waves = np.zeros((256, 2), np.float32)
    for k in range(num_classes):
        value, saturation = 0.95 - 0.3 * (k % 3 == 1), 0.9 - 0.45 * (k % 2)
        colours[k] = 255 * np.array(colorsys.hsv_to_rgb((k * 0.61803) % 1, saturation, value), np.float32)
        angle, frequency = k * 2.39996, 0.25 + 0.09 * (k % 7)
        waves[k] = frequency * np.cos(angle), frequency * np.sin(angle)
    return colours, waves


def _borders(instances: NDArray[np.uint16], width: int) -> NDArray[np.bool_]:
    """True within ``width`` pixels of a change of ``instances``."""
    edge = np.zeros(instances.shape, bool)
    edge[1:] |= instances[1:] != instances[:-1]
    edge[:, 1:] |= instances[:, 1:] != instances[:, :-1]
    for _ in range(width - 1):
        grown = edge.copy()
        grown[:-1] |= edge[1:]
        grown[:, :-1] |= edge[:, 1:]
        edge = grown
    return edge


def write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """Write ``image`` (H, W) or (H, W, 3) as a JPEG of high quality; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def write_png(path: Path, pixels: NDArray[np.uint8] | NDArray[np.uint16], *, palette: NDArray | None = None) -> None:
    """Write ``pixels`` as a PNG: (H, W) 8-bit grey, or 16-bit for uint16, or (H, W, 3 or 4) colour.

    With ``palette`` (up to 256 colours, uint8 (n, 3)) an 8-bit (H, W) array becomes a palette PNG (mode P).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette is not None:
        assert pixels.ndim == 2
        assert pixels.dtype == np.uint8
        picture = Image.frombytes("P", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
        picture.putpalette(np.asarray(palette, np.uint8).tobytes())
    picture.save(path)


def full_palette(palette: NDArray[np.uint8], *, last: Sequence[int] = (0, 0, 0)) -> NDArray[np.uint8]:
    """``palette`` (K, 3) filled up to 256 colours; entry 255 is ``last``."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[255] = last
    return colours


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a list file, one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def to_raw(label: NDArray[np.uint8], train_to_raw: dict[int, int], *, void: int) -> NDArray[np.uint8]:
    """Train ids to the raw values of a label file; ``void`` stands for pixels without a class."""
    lookup = np.full(256, void, np.uint8)
    for train, raw in train_to_raw.items():
        lookup[train] = raw
    return lookup[label]
