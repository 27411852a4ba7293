"""Masks as images: the value of a pixel, or its colour, says which class it is."""

from __future__ import annotations

import functools

import numpy as np

from segkit.data.decode import read_colours, read_index_png
from segkit.data.labels import UNKNOWN
from segkit.data.samples import Sample
from segkit.errors import InputError

Colours = tuple[tuple[tuple[int, int, int], int], ...]
"""((red, green, blue), class number) of each colour; a tuple, so that it can be the key of a cache."""


def load_index(sample: Sample) -> np.ndarray:
    """Return the raw values (H, W) of an index mask of 8, 16 or 32 bits."""
    return read_index_png(sample.labels[0], deep=True)


def load_colours(sample: Sample, *, colours: Colours) -> np.ndarray:
    """Return the class numbers uint8 (H, W) of a mask of colours; InputError names unknown colours."""
    path = sample.labels[0]
    image = read_colours(path)
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    codes = (red << 16) + (green << 8) + blue
    label = _lookup(colours)[codes]
    unknown = codes[label == UNKNOWN]
    if unknown.size:
        found, counts = np.unique(unknown, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:3]
        listed = ", ".join(f"{list(int(found[i]).to_bytes(3))} ({counts[i]} pixels)" for i in most)
        more = f" and {len(found) - 3} other colours" if len(found) > 3 else ""
        raise InputError(
            f"label {path} has colours that classes.yaml does not know: {listed}{more}; add them to colours, or to "
            "ignore to make them void (smoothed edges: export the masks without them)"
        )
    return label


@functools.lru_cache(maxsize=2)
def _lookup(colours: Colours) -> np.ndarray:
    """The class number uint8 of each colour code 0..2**24 - 1."""
    table = np.full(2**24, UNKNOWN, np.uint8)
    for (red, green, blue), value in colours:
        table[(red << 16) + (green << 8) + blue] = value
    return table
