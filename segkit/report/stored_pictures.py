"""A few evaluated images kept in the run folder, so that reports can show them without data or model.

    RUN/pictures/index.json     {"classes": [...], "palette": [[r, g, b], ...], "pictures": [{"name", "image", "label",
                                 "prediction"}, ...]}, the last three being file names beside it
    RUN/pictures/0000_image.jpg 0000_label.png 0000_prediction.png     the PNGs hold class numbers (255: void) and
                                 the palette, so that any viewer shows them in colour

Images are stored with at most :data:`LONGEST` pixels on their longer side: they are for looking at, not for scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.errors import InputError
from segkit.files import read_json

LONGEST = 1024
VOID = 255


@dataclass(frozen=True)
class StoredPicture:
    """Files of one evaluated image."""

    name: str
    image: Path
    label: Path
    prediction: Path
    palette: tuple[tuple[int, int, int], ...]

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H, W, 3), label (H, W) and prediction (H, W), uint8; InputError if a file cannot be read."""
        arrays = []
        for path in (self.image, self.label, self.prediction):
            try:
                with Image.open(path) as file:
                    if max(file.size) > LONGEST:  # of a stranger: a few bytes may stand for gigabytes
                        raise ValueError(f"it has {file.size[0]}x{file.size[1]} pixels, more than were stored")
                    arrays.append(np.asarray(file.convert("RGB") if path == self.image else file))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise InputError(f"{path} cannot be read ({error}): delete the folder {path.parent}") from None
        image, label, prediction = arrays
        if not image.shape[:2] == label.shape == prediction.shape:
            raise InputError(
                f"{self.image}, its label and its prediction have sizes {image.shape[:2]}, {label.shape} and "
                f"{prediction.shape}, but must have one: delete the folder {self.image.parent}"
            )
        return image, label, prediction


def write_pictures(folder: Path, pictures: Sequence[Any], *, palette: Any, classes: Sequence[str]) -> None:
    """Write ``pictures`` (with ``name``, ``image`` (H, W, 3), ``label`` and ``prediction`` (H, W)) to ``folder``.

    ``palette`` is (K, 3) uint8. The index is written last, under a temporary name first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    entries = []
    for number, picture in enumerate(pictures):
        size = _fitted(picture.label.shape)
        files = {part: f"{number:04d}_{part}.{'jpg' if part == 'image' else 'png'}" for part in PARTS}
        resized = Image.fromarray(picture.image).resize(size, Image.Resampling.BOX)
        resized.save(folder / files["image"], quality=88)
        for part in ("label", "prediction"):
            indices = Image.fromarray(np.asarray(getattr(picture, part)).astype(np.uint8))
            indices = indices.resize(size, Image.Resampling.NEAREST)
            indices.putpalette(table.ravel().tolist())
            indices.save(folder / files[part], optimize=True)
        entries.append({"name": picture.name, **files})
    index = {"classes": list(classes), "palette": np.asarray(palette).tolist(), "pictures": entries}
    temporary = folder / "index.json.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "index.json")


PARTS = ("image", "label", "prediction")


def _fitted(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) of at most :data:`LONGEST`, aspect kept."""
    height, width = shape
    factor = min(1.0, LONGEST / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def read_pictures(folder: Path) -> dict[str, StoredPicture]:
    """The pictures in ``folder`` by the name of their image; empty if there are none."""
    path = folder / "index.json"
    if not path.is_file():
        return {}
    try:
        index = read_json(path, cure=f"delete the folder {folder}")
        palette = tuple((int(r), int(g), int(b)) for r, g, b in index["palette"])
        # Only the last part of a name counts: a run folder is untrusted, and nothing outside it is read.
        stored = {}
        for entry in index["pictures"]:
            image, label, prediction = (folder / Path(entry[part]).name for part in PARTS)
            stored[str(entry["name"])] = StoredPicture(str(entry["name"]), image, label, prediction, palette)
        return stored
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no index of pictures ({error!r}): delete the folder {folder}") from None
