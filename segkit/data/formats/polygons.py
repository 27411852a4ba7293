"""From polygons to a label: the one rasteriser of COCO, Labelme and YOLO files.

Positions are (x, y) in pixels from the upper left corner of the image; the centre of the pixel in row r and column c
lies at (c + 0.5, r + 0.5). A pixel belongs to a polygon if its centre lies inside by the even-odd rule; an edge that
runs exactly through a centre gives it to the polygon below and to the right, so that neighbours share no pixel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segkit.data.bands import image_size
from segkit.data.decode import orientation
from segkit.data.files import read_text
from segkit.data.labels import VOID
from segkit.data.samples import Sample
from segkit.errors import InputError, first_line

FARTHEST = 2.0**24
"""Pixels from the corner beyond which a number is no position."""

YOLO_FILE = "data.yaml"
"""The file of classes of YOLO, which has no list of what is no class."""

MOST_CROSSINGS = 2**22
"""Crossings of edges with rows that are computed at a time: a polygon of a stranger may have any number."""

Size = tuple[int, ...]


@dataclass(frozen=True)
class Meaning:
    """What a file of polygons says, in class numbers: of the names or numbers in it, of crowds, and of the rest.

    ``file``: name of the file of classes, for a sentence; it takes no part in fingerprints of the data.
    """

    values: dict[Any, int]
    unlabelled: int
    crowd: int = VOID
    file: str = field(default="classes.yaml", repr=False)

    def value(self, key: Any, *, where: str) -> int:
        """Return the class number of a name or number; raises InputError with ``where`` it stands if unknown."""
        if key not in self.values:
            known = ", ".join(map(str, list(self.values)[:20]))
            ignore = "" if self.file == YOLO_FILE else ", or to ignore to make it void"
            raise InputError(
                f"{where} is of class {key!r}, which {self.file} does not know; allowed are {known}: correct it, or "
                f"add it to names{ignore}"
            )
        return self.values[key]


def fill(label: np.ndarray, ring: np.ndarray, value: int) -> None:
    """Set the pixels of ``label`` (H, W) whose centres lie in the polygon ``ring`` (n, 2) to ``value``.

    Each edge is cut with the lines through the centres of rows; the inside lies between an odd and an even cut.
    """
    height, width = label.shape
    (x, y), (next_x, next_y) = ring.T, np.roll(ring, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y, next_y) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y, next_y) - 0.5), 0, height).astype(np.int64)
    crossings = last - first
    if not crossings.any():
        return
    top, bottom = first.min(), last.max()
    left, right = (int(np.clip(np.ceil(edge - 0.5), 0, width)) for edge in (x.min(), x.max()))
    cuts = np.zeros((bottom - top, right + 1 - left), np.int32)
    for part in np.array_split(np.arange(len(ring)), 1 + crossings.sum() // MOST_CROSSINGS):
        edge = np.repeat(part, crossings[part])
        before = np.cumsum(crossings[part]) - crossings[part]
        row = first[edge] + np.arange(edge.size) - np.repeat(before, crossings[part])
        along = (row + 0.5 - y[edge]) / (next_y - y)[edge]
        column = np.clip(np.ceil(x[edge] + along * (next_x - x)[edge] - 0.5), left, right).astype(np.int64)
        np.add.at(cuts, (row - top, column - left), 1)
    inside = np.cumsum(cuts, axis=1)[:, :-1] % 2 == 1
    label[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = value


def ring_of(numbers: Any, size: Size, *, where: str) -> np.ndarray:
    """Return the polygon (n, 2) of a list [x, y, x, y, ...] or [[x, y], ...]; ``where`` names it in a sentence."""
    try:
        given = np.asarray(numbers)
    except ValueError:  # lists of several lengths
        given = np.array("")
    is_list = given.dtype.kind in "iuf" and given.shape[1:] in ((), (2,))
    flat = given.ravel().astype(np.float64) if is_list else np.array([np.nan])
    if not np.isfinite(flat).all() or (np.abs(flat) > FARTHEST).any() or flat.size % 2:
        raise InputError(f"{where} is no list of positions x, y in pixels: correct or remove it")
    ring = flat.reshape(-1, 2)
    if len(ring) < 3:
        raise InputError(f"{where} has {len(ring)} points, but a polygon has three or more: correct or remove it")
    if (ring.max(0) <= 0).any() or (ring.min(0) >= size[::-1]).any():
        raise InputError(
            f"{where} lies outside of the image, which has {size[1]}x{size[0]} pixels: correct or remove it"
        )
    if ring.max() <= 1 < max(size):
        raise InputError(f"{where} lies within the first pixel of its image: give positions in pixels, or remove it")
    return ring


def blank_label(sample: Sample, meaning: Meaning, declared: Sequence[Any] = (None, None)) -> np.ndarray:
    """Return a label uint8 (H, W) of the size of the sample's image, without a polygon as yet.

    Raises InputError if the sample's label is of an image of another size: ``declared``, (height, width), of which None
    says nothing; and for an image with an orientation tag, which most programs draw turned, unless ``declared`` says
    that this one did not.
    """
    size, tag = image_size(sample.image), orientation(sample.image)
    if tag != 1 and not (tag > 4 and tuple(declared) == size != size[::-1]):
        raise InputError(
            f"image {sample.image} has an orientation tag, so the polygons of {sample.labels[0]} may be those of the "
            "turned image: turn its pixels and remove the tag, or remove the tag alone if they fit the pixels as stored"
        )
    if any(said is not None and said != side for said, side in zip(declared, size, strict=True)):
        raise InputError(
            f"label {sample.labels[0]} is of an image of {declared[1]!r}x{declared[0]!r} pixels, but {sample.image} "
            f"has {size[1]}x{size[0]}: annotate the image as it is, or put the annotated one there"
        )
    return np.full(size, meaning.unlabelled, np.uint8)


def read_json_label(path: Path, *, keys: Sequence[str], kind: str) -> dict[str, Any]:
    """Return the mapping in a JSON file, which has a list under each of ``keys``; InputError if it is no such file."""
    text = read_text(path, role="label", missing=f"label {path} does not exist; copy or unpack it again")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"label {path} is no valid JSON ({first_line(error)}); export or unpack it again") from None
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing or not all(isinstance(item, dict) for key in keys for item in content[key]):
        lacks = f"its list {missing[0]!r} is missing" if missing else "its lists do not hold mappings"
        raise InputError(f"label {path} is no annotation file of {kind} ({lacks}): put the right file there")
    return content
