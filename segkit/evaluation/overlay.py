"""Predictions as pictures: palette PNGs, colours laid over the image, a legend, two predictions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.progress import for_terminal

Bytes = NDArray[np.uint8]
Labels = NDArray[np.integer]

_MARGIN = 6
_BLACK = (0, 0, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX  # of OpenCV 5, which has letters of all scripts; Pillow's own has English ones
_SCALE = 1 / 25
"""Of the font, for letters of one pixel."""


def visible(image: NDArray[Any]) -> Bytes:
    """Return uint8 (H, W, 3) to look at of an image (H, W, C): its first three channels, or the first alone as grey.

    Values of 8 bits stay; others are stretched, in each channel from the 2nd percentile to the 98th.
    """
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    low, high = np.percentile(shown, [2, 98], axis=(0, 1))
    return np.rint(255 * ((shown - low) / np.maximum(high - low, 1e-12)).clip(0, 1)).astype(np.uint8)


def palette_image(labels: Labels, palette: Bytes) -> Image.Image:
    """Return ``labels`` (H, W) as a palette image: the index of a pixel is its class, in the class's colour."""
    image = Image.fromarray(labels.astype(np.uint8))
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    image.putpalette(colours.tobytes())
    return image


def overlay(image: Bytes, labels: Labels, palette: Bytes) -> Bytes:
    """Mix ``image`` (H, W, 3) and the colours of the classes, with white lines between these; uint8 (H, W, 3)."""
    assert image.shape[:2] == labels.shape, (image.shape, labels.shape)
    mixed = image.astype(np.uint16) + palette[labels]
    picture = (mixed >> 1).astype(np.uint8)
    line = np.zeros(labels.shape, bool)
    line[1:] |= labels[1:] != labels[:-1]
    line[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    picture[line] = 255
    return picture


def legend(labels: Labels, classes: Sequence[str], palette: Bytes, *, height: int) -> Bytes:
    """Draw a column that names the classes of ``labels`` by falling area, with their share; uint8 (height, width, 3).

    Classes for which there is no space are counted in the last line.
    """
    pixels = np.bincount(labels.reshape(-1), minlength=len(classes))
    order = [int(k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]
    size = int(np.clip(height / 30, 10, 28))
    num_lines = max(1, (height - _MARGIN) // (size + _MARGIN))
    named = order if len(order) <= num_lines else order[: num_lines - 1]
    lines = [(k, f"{for_terminal(classes[k])}  {100 * pixels[k] / labels.size:.1f} %") for k in named]
    more = len(order) - len(named)
    texts = [text for _, text in lines] + ([f"and {more} more"] if more else [])
    width = max(cv2.getTextSize(text, _FONT, size * _SCALE, 1)[0][0] for text in texts) + size + 3 * _MARGIN
    column = np.full((height, width, 3), 255, np.uint8)
    for row, text in enumerate(texts):
        top = _MARGIN + row * (size + _MARGIN)
        if row < len(lines):
            corners, colour = ((_MARGIN, top), (_MARGIN + size, top + size)), palette[lines[row][0]].tolist()
            cv2.rectangle(column, *corners, colour, cv2.FILLED)
            cv2.rectangle(column, *corners, _BLACK)
        _write(column, text, (size + 2 * _MARGIN, top), size)
    return column


def _write(picture: Bytes, text: str, place: tuple[int, int], size: int) -> None:
    """Write ``text`` in black letters of ``size`` pixels, whose upper left corner lies at ``place`` (x, y).

    A lone surrogate, as in the name of a folder that is no UTF-8, would end the process within OpenCV.
    """
    cv2.putText(picture, text, (place[0], place[1] + size), _FONT, size * _SCALE, _BLACK, 1, cv2.LINE_AA)


def overlay_with_legend(image: Bytes, labels: Labels, classes: Sequence[str], palette: Bytes) -> Bytes:
    """Draw `overlay` with the `legend` at its right."""
    picture = overlay(image, labels, palette)
    return np.concatenate([picture, legend(labels, classes, palette, height=len(picture))], axis=1)


def side_by_side(
    image: Bytes, predictions: Sequence[tuple[str, Labels]], classes: Sequence[str], palette: Bytes
) -> Bytes:
    """Draw the image, the overlay of each ``(title, labels)``, and one legend of all classes that occur."""
    size = int(np.clip(len(image) / 25, 12, 32))
    panels = [_titled(image, "image", size)]
    panels += [_titled(overlay(image, labels, palette), title, size) for title, labels in predictions]
    gap = np.full((len(panels[0]), _MARGIN, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (panel, gap)]
    every = np.concatenate([labels.reshape(1, -1) for _, labels in predictions], axis=1)
    return np.concatenate([*parts, legend(every, classes, palette, height=len(panels[0]))], axis=1)


def _titled(image: Bytes, title: str, size: int) -> Bytes:
    strip = np.full((size + 2 * _MARGIN, image.shape[1], 3), 255, np.uint8)
    _write(strip, for_terminal(title), (_MARGIN, _MARGIN), size)
    return np.concatenate([strip, image])
