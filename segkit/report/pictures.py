"""Labels as colours, and grids of image, label and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

GAP, TEXT, ROW = 4, 0.4, 16
"""Pixels between panels, size of the legend's letters, and height of one line of it."""


def colours(palette: Any) -> NDArray[np.uint8]:
    """A look-up table (256, 3) from class number to RGB; white where no class is."""
    table = np.full((256, 3), 255, np.uint8)
    palette = np.asarray(palette, np.uint8)
    table[: len(palette)] = palette
    return table


def legend(palette: Any, classes: Sequence[str], width: int) -> NDArray[np.uint8]:
    """A strip of ``width`` pixels that names every class beside its colour."""
    widest = max(cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, TEXT, 1)[0][0] for name in classes)
    column = widest + 26
    per_row = max(1, width // column)
    strip = np.full((ROW * -(-len(classes) // per_row) + 4, width, 3), 255, np.uint8)
    for number, (name, colour) in enumerate(zip(classes, colours(palette), strict=False)):
        x, y = number % per_row * column + 4, number // per_row * ROW + 4
        cv2.rectangle(strip, (x, y), (x + 12, y + 10), [int(value) for value in colour], -1)
        cv2.putText(strip, name, (x + 17, y + 10), cv2.FONT_HERSHEY_SIMPLEX, TEXT, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def picture_grid(
    pictures: Sequence[Any], palette: Any, classes: Sequence[str], *, panel_width: int = 320
) -> NDArray[np.uint8]:
    """Rows of image, label and prediction, uint8 (H, W, 3), with a legend below.

    A picture has ``image`` (H, W, 3), ``label`` and ``prediction`` (H, W). Where the label is void (255) the
    prediction is shown in half its strength, because it does not count there.
    """
    table = colours(palette)
    rows = []
    for picture in pictures:
        void = picture.label == 255
        prediction = table[picture.prediction]
        prediction[void] = prediction[void] // 2 + 127
        panels = [picture.image, table[picture.label], prediction]
        height = max(1, round(picture.label.shape[0] * panel_width / picture.label.shape[1]))
        row = np.full((height + GAP, 3 * panel_width + 2 * GAP, 3), 255, np.uint8)
        for number, panel in enumerate(panels):
            x = number * (panel_width + GAP)
            method = cv2.INTER_AREA if number == 0 else cv2.INTER_NEAREST
            row[:height, x : x + panel_width] = cv2.resize(panel, (panel_width, height), interpolation=method)
        rows.append(row)
    rows.append(legend(palette, classes, rows[0].shape[1]))
    return np.concatenate(rows)
