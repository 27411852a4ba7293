"""The embedded data set: painted street scenes with 8 classes, without files, and with strong class imbalance.

Image ``i`` of a split is a pure function of (seed, split, i) and of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from segkit.data.labels import load_table
from segkit.data.layout import check_split
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError
from segkit.synthetic.scenes import Scene, paint_street

SPLITS = {"train": 400, "val": 100, "test": 100}
MOST = 1_000_000
VERSION = 2
"""Rises when the pictures change: label counts and phase caches of another version are then not used."""


def read(
    root: Path | str | None = None,
    *,
    split: str,
    size: Sequence[int] = (192, 256),
    num_images: int | None = None,
    seed: int = 0,
) -> SampleSet:
    """Open ``split``: scenes of ``size`` (height, width), ``num_images`` of them (None: 400 for train, else 100).

    ``root`` is not used. Raises InputError for a size outside 64..512, fewer than one image and a negative seed.
    """
    check_split(split, SPLITS, dataset="synthetic")
    if len(size) != 2 or not all(64 <= int(side) <= 512 for side in size):
        raise InputError(
            f"synthetic scenes of size {list(size)} cannot be drawn; "
            "set dataset.reader.size=[height, width], each 64 to 512"
        )
    if num_images is not None and not 1 <= num_images <= MOST:
        raise InputError(f"dataset.reader.num_images is {num_images}; set 1 to {MOST}, or null for the default")
    if seed < 0:
        raise InputError(f"dataset.reader.seed is {seed}, but must be 0 or more: set dataset.reader.seed=0")
    count = SPLITS[split] if num_images is None else num_images
    # The version is part of the loaders, so that it takes part in the fingerprint.
    scene: dict[str, Any] = {"seed": seed, "split": split, "size": tuple(map(int, size)), "version": VERSION}
    return SampleSet(
        [Sample(name=f"{split}_{i:04d}", image=Path(f"synthetic/{split}_{i:04d}.png")) for i in range(count)],
        table=load_table("synthetic"),
        name="synthetic",
        split=split,
        load_image=partial(load, part="image", **scene),
        load_label=partial(load, part="label", **scene),
        labelled=True,
    )


def load(sample: Sample, *, part: str, seed: int, split: str, size: tuple[int, int], version: int) -> np.ndarray:
    """The ``image`` (H, W, 3) or the ``label`` (H, W) of a scene, uint8."""
    assert version == VERSION
    paint = _kept_scenes if size[0] * size[1] <= 2**16 else _last_scenes
    return getattr(paint(seed, split, int(sample.name.rpartition("_")[2]), size), part).copy()


def _paint(seed: int, split: str, index: int, size: tuple[int, int]) -> Scene:
    return paint_street(np.random.default_rng([seed, list(SPLITS).index(split), index]), size=size)


# Small scenes are kept, at most 512 of 256 KiB in each process; of large ones the last two, as image and label of a
# sample are asked for one after the other.
_kept_scenes, _last_scenes = lru_cache(maxsize=512)(_paint), lru_cache(maxsize=2)(_paint)
