"""The embedded data set: drawn street scenes with 8 classes, no files, heavy class imbalance.

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

SPLITS = {"train": 400, "val": 100, "test": 100}
VERSION = 1
"""Rises when the drawings change: label counts and phase caches of another version are then not used."""


def read(
    root: Path | str | None = None,
    *,
    split: str,
    size: Sequence[int] = (192, 256),
    num_images: int | None = None,
    seed: int = 0,
) -> SampleSet:
    """Scenes of ``size`` (height, width); ``num_images`` of of any split (default: 400 for train, else 100).

    ``root`` is not used.  Raises InputError for a size outside 64..512 or fewer than one image.
    """
    check_split(split, SPLITS, dataset="synthetic")
    if len(size) != 2 or not all(64 <= int(side) <= 512 for side in size):
        raise InputError(
            f"synthetic scenes of size {list(size)} cannot be drawn; set dataset.reader.size=[height, "
            "width], each 64 to 512"
        )
    if num_images is not None and num_images < 1:
        raise InputError(f"dataset.reader.num_images is {num_images}; set at least 1, or null for the default")
    count = SPLITS[split] if num_images is None else num_images
    height, width = int(size[0]), int(size[1])
    options: dict[str, Any] = {"seed": int(seed), "split": split, "height": height, "width": width}
    options["version"] = VERSION  # part of the readers, so that it takes part in the fingerprint
    return SampleSet(
        [Sample(name=f"{split}_{i:04d}", image=Path(f"synthetic/{split}_{i:04d}.png")) for i in range(count)],
        table=load_table("synthetic"),
        name="synthetic",
        split=split,
        load_image=partial(load_image, **options),
        load_label=partial(load_label, **options),
        labelled=True,
    )


def load_image(sample: Sample, *, seed: int, split: str, height: int, width: int, version: int) -> np.ndarray:
    """The drawn image (H, W, 3) uint8."""
    assert version == VERSION
    return _scene(seed, split, int(sample.name.rpartition("_")[2]), height, width)[0].copy()


def load_label(sample: Sample, *, seed: int, split: str, height: int, width: int, version: int) -> np.ndarray:
    """The label (H, W) uint8 of the drawn image."""
    assert version == VERSION
    return _scene(seed, split, int(sample.name.rpartition("_")[2]), height, width)[1].copy()


def _scene(seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawing takes some 15 ms, so that small scenes are kept: at most 512 of 256 KiB in each process."""
    keep = _kept_scene if height * width <= 2**16 else _last_scenes
    return keep(seed, split, index, height, width)


def _draw(seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    from segkit.synthetic.scenes import draw_scene

    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    return draw_scene(rng, height=height, width=width)


_kept_scene = lru_cache(maxsize=512)(_draw)
_last_scenes = lru_cache(maxsize=2)(_draw)  # image and label of a sample are asked for one after the other
