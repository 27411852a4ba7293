"""Labelme: one JSON file beside each image, with the shapes drawn on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from segkit.data.formats.polygons import Meaning, blank_label, fill, read_json_label, ring_of
from segkit.data.samples import Sample
from segkit.errors import InputError


def load(sample: Sample, *, meaning: Meaning) -> np.ndarray:
    """Return the label (H, W) of class numbers; raises InputError for a shape that is no polygon or rectangle."""
    path = sample.labels[0]
    content = read_json_label(path, keys=["shapes"], kind="Labelme")
    label = blank_label(sample, meaning, (content.get("imageHeight"), content.get("imageWidth")))
    for number, item in enumerate(content["shapes"]):
        where = f"shape {number} of {path}"
        value = meaning.value(str(item.get("label")), where=where)
        fill(label, ring_of(_points(item, where), label.shape, where=where), value)
    return label


def _points(item: dict[str, Any], where: str) -> Any:
    kind, points = item.get("shape_type", "polygon"), item.get("points")
    if kind == "polygon":
        return points
    if kind == "rectangle":
        try:
            (left, top), (right, bottom) = points  # type: ignore[misc]
        except (TypeError, ValueError):
            raise InputError(f"{where} is a rectangle without two corners: correct or remove it") from None
        return [[left, top], [right, top], [right, bottom], [left, bottom]]
    raise InputError(f"{where} is of type {kind!r}, but polygons and rectangles are read: draw it as a polygon")
