"""Small synthetic data sets in the official layouts: tutorials and tests run offline on the real readers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from segkit.errors import InputError
from segkit.synthetic.layouts import layouts, write_layout, write_robotic_instrument

WRITERS: dict[str, Callable[..., None]] = {
    **{name: partial(write_layout, name) for name in layouts()},
    "cityscapes_coarse": partial(write_layout, "cityscapes"),
    "robotic_instrument": write_robotic_instrument,
}
"""Data set name, as in configs/dataset/, to the function that writes its layout."""


def make_sample(name: str, output: Path | str, *, num_images: int = 8, seed: int = 0, scale: float = 0.25) -> Path:
    """Write a synthetic copy of data set ``name`` in its official layout into ``output``; return ``output``.

    ``output`` is then what ``dataset.root`` takes. The training split has ``num_images`` images and every other split
    half as many, at least two; on top of these come the broken images of the official data. Robotic Instrument has at
    least one frame a sequence, that is eight. Every class occurs in the training and in the validation split. ``scale``
    times the official size in pixels is the size of the images (Mapillary: half of that). The same ``seed`` writes the
    same pixels. Files that no reader here uses may be left out.

    Raises InputError for an unknown name, a count below one, a ``scale`` outside (0, 1], and an ``output`` that exists
    and is not empty (nothing is ever overwritten).
    """
    output = Path(output)
    if name not in WRITERS:
        raise InputError(
            f"there is no sample of data set {name!r}; samples can be made of {', '.join(sorted(WRITERS))}"
        )
    if num_images < 1:
        raise InputError(f"a sample needs at least one image, got {num_images}; use --n 8")
    if seed < 0:
        raise InputError(f"the seed of a sample is {seed}, but must be 0 or more; use --seed 0")
    if not 0 < scale <= 1:
        raise InputError(f"the scale of a sample's images is {scale}, but must lie in (0, 1]; use 0.25")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output} exists and is not an empty folder; name a new folder with --output, nothing is overwritten"
        )
    WRITERS[name](output, num_images=num_images, rng=np.random.default_rng(seed), scale=scale)
    return output
