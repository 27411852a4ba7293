"""Small synthetic data sets in the official layouts: tutorials and tests run offline on the real readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from segkit.errors import InputError
from segkit.synthetic.layouts import write_ade20k, write_camvid, write_cocostuff10k, write_folder, write_voc
from segkit.synthetic.sample_maker_streets import write_bdd100k, write_cityscapes, write_mapillary
from segkit.synthetic.sample_maker_surgery import write_robotic_instrument

WRITERS: dict[str, Callable[..., None]] = {
    "ade20k": write_ade20k,
    "bdd100k": write_bdd100k,
    "camvid": write_camvid,
    "cityscapes": write_cityscapes,
    "cityscapes_coarse": write_cityscapes,
    "cocostuff10k": write_cocostuff10k,
    "folder": write_folder,
    "mapillary": write_mapillary,
    "robotic_instrument": write_robotic_instrument,
    "voc": write_voc,
}
"""Data set name, as in configs/dataset/, to the function that writes its layout."""


def make_sample(name: str, output: Path | str, *, num_images: int = 8, seed: int = 0, scale: float = 0.25) -> Path:
    """Write a synthetic copy of data set ``name`` in its official layout into ``output``; return that.

    ``output`` is then what ``dataset.root`` takes. The training split has ``num_images`` images and every
    other split half as many, at least two; on top of these come the official trouble-makers (Robotic
    Instrument has at least one frame a sequence, that is eight). Every class occurs in the training and in
    the validation split. ``scale`` times the official size in pixels is the size of the images (Mapillary:
    half of that). The same ``seed`` writes the same pixels. Files that no reader here uses may be left out.

    Raises InputError for an unknown name, a count below one, a ``scale`` outside (0, 1], and an ``output``
    that exists and is not empty (nothing is ever overwritten).
    """
    output = Path(output)
    if name not in WRITERS:
        raise InputError(
            f"there is no sample of data set {name!r}; samples can be made of {', '.join(sorted(WRITERS))}"
        )
    if num_images < 1:
        raise InputError(f"a sample needs at least one image, got {num_images}; use --n 8")
    if not 0 < scale <= 1:
        raise InputError(f"the scale of a sample's images is {scale}, but must lie in (0, 1]; use 0.25")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output} exists and is not an empty folder; name a new folder with --output, nothing is overwritten"
        )
    WRITERS[name](output, num_images=num_images, rng=np.random.default_rng(seed), scale=scale)
    return output
