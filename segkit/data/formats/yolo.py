"""YOLO segmentation: one text file an image; a line is a class number and x y x y ... as shares of width and height."""

from __future__ import annotations

import numpy as np

from segkit.data.files import read_text
from segkit.data.formats.polygons import Meaning, Shape, rasterise, ring_of, true_size
from segkit.data.samples import Sample
from segkit.errors import InputError


def load(sample: Sample, *, meaning: Meaning) -> np.ndarray:
    """Return the label (H, W) of class numbers; raises InputError for a line that is no polygon."""
    path = sample.labels[0]
    size = true_size(sample, (None, None))
    shapes = []
    text = read_text(path, role="label", missing=f"label {path} does not exist; copy or unpack it again")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        name, *words = line.split()
        try:
            key, shares = int(name), np.array(words, np.float64)
        except (ValueError, OverflowError):
            raise InputError(
                f"{where} is no polygon of YOLO, which is a class number and x y x y ...: correct or remove it"
            ) from None
        if shares.size == 4:
            raise InputError(f"{where} is a box, but polygons are wanted: export the polygons of the data set")
        sides = np.resize([size[1], size[0]], shares.size)
        shapes.append(Shape(meaning.value(key, where=where), [ring_of(shares * sides, size, where=where)]))
    return rasterise(shapes, size, unlabelled=meaning.unlabelled)
