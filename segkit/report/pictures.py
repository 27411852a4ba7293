"""Evaluated images: grids of image, label and prediction, and the few that a run folder keeps.

A report shows the stored ones without data or model:

    RUN/pictures/index.json     {"classes": [...], "palette": [[r, g, b], ...], "pictures": [{"name", "image", "label",
                                 "prediction"}, ...]}, the last three being file names beside it
    RUN/pictures/0000_image.jpg 0000_label.png 0000_prediction.png     the PNGs hold class numbers (255: void) and
                                 the palette, so that any viewer shows them in colour

They have at most :data:`LONGEST` pixels on their longer side: they are for looking at, not for scores.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segkit.errors import InputError
from segkit.files import read_json, write_json
from segkit.progress import for_terminal

VOID = 255
LONGEST = 1024
PARTS = ("image", "label", "prediction")
GAP, TEXT, ROW = 4, 0.4, 16
"""Pixels between panels, size of the legend's letters, and height of one of its lines."""


def colours(palette: Any) -> NDArray[np.uint8]:
    """Return a look-up table (256, 3) from class number to RGB; numbers without a class are white."""
    table = np.full((256, 3), 255, np.uint8)
    palette = np.asarray(palette, np.uint8)
    table[: len(palette)] = palette
    return table


def legend(palette: Any, classes: Sequence[str], width: int) -> NDArray[np.uint8]:
    """Return a strip of ``width`` pixels that names every class beside its colour; long names take several lines."""

    def pixels(text: str) -> int:
        return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, TEXT, 1)[0][0]

    names = [textwrap.wrap(for_terminal(name), max(1, (width - 26) // pixels("W"))) for name in classes]
    column = max(pixels(line) for name in names for line in name) + 26
    per_row = max(1, width // column)
    strips = []
    for first in range(0, len(names), per_row):
        row = names[first : first + per_row]
        strip = np.full((ROW * max(map(len, row)) + 4, width, 3), 255, np.uint8)
        for number, (lines, colour) in enumerate(zip(row, colours(palette)[first:], strict=False)):
            x = number * column + 4
            cv2.rectangle(strip, (x, 4), (x + 12, 14), [int(value) for value in colour], -1)
            for at, line in enumerate(lines):
                place = (x + 17, ROW * at + 14)
                cv2.putText(strip, line, place, cv2.FONT_HERSHEY_SIMPLEX, TEXT, (0, 0, 0), 1, cv2.LINE_AA)
        strips.append(strip)
    return np.concatenate(strips)


def picture_grid(
    pictures: Sequence[Any], palette: Any, classes: Sequence[str], *, panel_width: int = 320
) -> NDArray[np.uint8]:
    """Return rows of image, label and prediction, uint8 (H, W, 3), with a legend below.

    A picture has ``image`` (H, W, 3), ``label`` and ``prediction`` (H, W). Where the label is void (255) the
    prediction has half its strength, because it does not count there.
    """
    table = colours(palette)
    rows = []
    for picture in pictures:
        void = picture.label == VOID
        prediction = table[picture.prediction]
        prediction[void] = prediction[void] // 2 + 127
        panels = [picture.image, table[picture.label], prediction]
        height = max(1, round(picture.label.shape[0] * panel_width / picture.label.shape[1]))
        row = np.full((height + GAP, 3 * panel_width + 2 * GAP, 3), 255, np.uint8)
        for number, panel in enumerate(panels):
            x = number * (panel_width + GAP)
            method = cv2.INTER_AREA if number == 0 else cv2.INTER_NEAREST
            row[:height, x : x + panel_width] = cv2.resize(panel, (panel_width, height), interpolation=method)
        rows.append(row)
    rows.append(legend(palette, classes, rows[0].shape[1]))
    return np.concatenate(rows)


# -- pictures in a run folder ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredPicture:
    """Files of one evaluated image."""

    name: str
    image: Path
    label: Path
    prediction: Path
    palette: tuple[tuple[int, int, int], ...]

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Return image (H, W, 3), label (H, W) and prediction (H, W), uint8; InputError if a file cannot be read."""
        arrays = []
        for path in (self.image, self.label, self.prediction):
            try:
                if not path.is_file():  # to open a pipe would wait for ever
                    raise ValueError("it is no file")
                with Image.open(path, formats=("JPEG",) if path == self.image else ("PNG",)) as file:
                    if max(file.size) > LONGEST:  # of a stranger: a few bytes may stand for gigabytes
                        raise ValueError(f"it has {file.size[0]}x{file.size[1]} pixels, more than were stored")
                    arrays.append(np.asarray(file.convert("RGB") if path == self.image else file))
                    if arrays[-1].dtype != np.uint8:
                        raise ValueError(f"its pixels are {arrays[-1].dtype}, not of 8 bits")
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

    ``palette`` is (K, 3) uint8. The index is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = colours(palette)
    entries = []
    for number, picture in enumerate(pictures):
        height, width = picture.label.shape
        factor = min(1.0, LONGEST / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
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
    write_json(folder / "index.json", index)


def read_pictures(folder: Path) -> dict[str, StoredPicture]:
    """Return the pictures in ``folder`` by the name of their image; empty if there are none."""
    path = folder / "index.json"
    if not path.is_file():
        return {}
    try:
        index = read_json(path, cure=f"delete the folder {folder}")
        palette = tuple((int(r), int(g), int(b)) for r, g, b in index["palette"])
        if not 1 <= len(palette) <= VOID or not all(0 <= value <= 255 for colour in palette for value in colour):
            raise ValueError("a palette has 1 to 255 colours of 0 to 255")
        # Only the last part of a name counts: a run folder is untrusted, and nothing outside it is read.
        stored = {}
        for entry in index["pictures"]:
            image, label, prediction = (folder / Path(entry[part]).name for part in PARTS)
            stored[str(entry["name"])] = StoredPicture(str(entry["name"]), image, label, prediction, palette)
        return stored
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is no index of pictures ({error!r}): delete the folder {folder}") from None


# -- pictures in a page --------------------------------------------------------------------------------------------

PANEL = 440
"""Width of a picture in pixels: sharp on a phone, where two stand side by side."""
STRENGTH = 0.6
"""Share of the class colour in an overlay."""


def overlay(image: NDArray[np.uint8], indices: NDArray[np.uint8], palette: Any) -> NDArray[np.uint8]:
    """Return class colours over a paled image (H, W, 3); where there is no class, the image alone."""
    known = (indices < len(palette)) & (indices != VOID)
    mixed = np.where(known[..., None], (1 - STRENGTH) * image + STRENGTH * colours(palette)[indices], image)
    return np.rint(mixed).astype(np.uint8)


def panel(pixels: NDArray[np.uint8]) -> str:
    """Return the address (data URI) of ``pixels`` (H, W, 3) as JPEG of at most :data:`PANEL` pixels width."""
    picture = Image.fromarray(pixels)
    if picture.width > PANEL:
        height = max(1, round(picture.height * PANEL / picture.width))
        picture = picture.resize((PANEL, height), Image.Resampling.BOX)
    return data_uri(picture, "JPEG", quality=82)


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """Return an address that holds ``picture`` itself, written as ``kind`` (JPEG, PNG)."""
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
