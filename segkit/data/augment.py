"""All that segkit uses of Albumentations: a configuration's transforms of a crop, and the colour jitter.

Importing it takes as long as a third of torch, so it is imported where it is used.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

import cv2
import numpy as np

from segkit.config.dataset import RGB
from segkit.data.labels import VOID
from segkit.errors import InputError, first_line

# Albumentations looks for a newer version of itself on the network unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
from albumentations import BasicTransform, ColorJitter, DualTransform

COLOR_JITTER = ColorJitter(p=1.0)
"""Its ``apply`` is told the factors, the turn of the hue and their order."""


class Augment:
    """Transforms of Albumentations on a crop, one after the other; what they do is a pure function of a seed.

    ``transforms``: {name of the configuration: transform}. Geometric ones act on image and label, others on the image.
    Raises InputError, by a trial on a crop of (height, width), of ``kind`` (channels, type), for those that change its
    size or cannot run on it, and for those that would mix labels. Values beyond 8 bits are no colours for
    Albumentations, which would cut them off: there all but geometric transforms are refused.
    """

    def __init__(
        self, transforms: Mapping[str, BasicTransform], *, crop: tuple[int, int], kind: tuple[int, str] = RGB
    ) -> None:
        self.transforms = dict(transforms)
        for key, transform in self.transforms.items():
            if getattr(transform, "mask_interpolation", 0) not in (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT):
                raise InputError(f"{key} mixes the classes of neighbouring pixels: remove {key}.mask_interpolation")
        colours = [key for key, transform in self.transforms.items() if not isinstance(transform, DualTransform)]
        if colours and kind[1] != "uint8":
            verb, nulls = "s" * (len(colours) == 1), " ".join(f"{key}=null" for key in colours)
            raise InputError(
                f"{', '.join(colours)} change{verb} colours of 8 bits, but the images are of {kind[1]}: set {nulls}"
            )
        noise = np.random.default_rng(0).integers(0, 256, (*crop, kind[0]), np.uint8).astype(kind[1])
        for seed in range(6):
            self(noise, np.zeros(crop, np.uint8), seed, always=True)

    def check_fills(self, num_classes: int) -> None:
        """Raise InputError for a transform that fills labels with what is neither one of ``num_classes`` nor void."""
        for key, transform in self.transforms.items():
            for name in ("fill_mask", "mask_drop_value"):
                value = getattr(transform, name, None)
                values = value if isinstance(value, list | tuple) else [value]
                if not all(item in (None, VOID, *range(num_classes)) for item in values):
                    raise InputError(
                        f"{key}.{name} is {value}, but fills labels, so it is a class, 0 to {num_classes - 1}, or "
                        f"{VOID} for void: set {key}.{name}={VOID}"
                    )

    def __call__(
        self, image: np.ndarray, label: np.ndarray, seed: int, *, always: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return image (h, w, C) and label (h, w) uint8 after all transforms; ``always``: whatever their chance."""
        for key, transform in self.transforms.items():
            # each has generators of its own, so that adding or removing one leaves the others as they are
            transform.set_random_state(np.random.default_rng([seed, *key.encode()]), random.Random(f"{seed} {key}"))
            try:
                out = transform(image=image, mask=label, force_apply=always)
            except Exception as error:  # whatever a transform raises, it is the configuration's fault
                size = f"{image.shape[0]}x{image.shape[1]} with {image.shape[2]} channels of {image.dtype}"
                raise InputError(
                    f"{key} cannot run on a crop of {size} ({first_line(error)}): correct or remove it"
                ) from error
            if out["image"].shape != image.shape or out["mask"].shape != label.shape:
                raise InputError(
                    f"{key} changes a crop of {list(label.shape)} to {list(out['image'].shape[:2])}, but all of "
                    "a batch have one size: remove it, or set dataset.crop to a square if it turns the crop"
                )
            assert (out["image"].dtype, out["mask"].dtype) == (image.dtype, np.uint8), key
            image, label = out["image"], out["mask"]
        return np.ascontiguousarray(image), np.ascontiguousarray(label)
