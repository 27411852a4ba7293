"""Images of any number of channels (bands), of 8 bits, 16 bits or floating point, as their files hold them.

- NPY: an array (H, W), (H, W, C) or (C, H, W); where both of the last fit, the last axis is that of the channels.
- TIFF: C samples a pixel, side by side or plane after plane; or C pages of one sample.
- PNG: its samples, alpha among them. Other files: what Pillow decodes, of 8 bits.

Nothing is converted but the byte order. The header is compared with the pixel limit, and with the channels and the type
that are wanted, before anything is allocated.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import TiffImagePlugin

from segkit.config.dataset import RGB
from segkit.data import decode
from segkit.data.files import check_readable, read_bytes
from segkit.errors import InputError

TIFF = (b"II", b"MM")
_KINDS = {1: "uint", 2: "int", 3: "float"}
_WIDTH, _HEIGHT, _BITS, _SAMPLES, _PLANAR, _FORMAT = 256, 257, 258, 277, 284, 339  # tags of TIFF


class _Page(NamedTuple):
    """What the header of a TIFF's page says; ``planar``: its samples lie plane after plane."""

    shape: tuple[int, ...]
    dtype: str
    planar: bool = False


def read_bands(path: Path | str, kind: tuple[int, str]) -> np.ndarray:
    """Return the image (H, W, C) in a file, of ``kind``: channels, and uint8, uint16 or float32.

    Other files than NPY are converted to RGB for the kind (3, "uint8") (:mod:`segkit.data.decode`). Raises InputError
    for a file of another kind, with values that are not finite, or damaged.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        image = _npy(path)
        if image.ndim == 3 and image.shape[2] != kind[0] == image.shape[0]:
            image = np.moveaxis(image, 0, -1)
    elif kind == RGB:
        return decode.read_rgb(path)
    else:
        image = _decoded(path, kind)
    image = image[..., None] if image.ndim == 2 else image
    dtype = str(image.dtype.newbyteorder("="))
    check_bands(_Page(image.shape, dtype), path, kind)
    image = np.array(image, dtype, order="C")
    check_bands(image, path, kind)
    return image


def check_bands(image: Any, path: Path, kind: tuple[int, str]) -> None:
    """Raise InputError unless ``image``, or what is known of it, is (H, W, C) of ``kind`` and finite."""
    channels, dtype = kind
    if len(image.shape) != 3 or image.shape[2] != channels or image.dtype != dtype:
        raise InputError(
            f"image {path} is an array of {image.dtype} of the shape {list(image.shape)}, but (H, W, {channels}) of "
            f"{dtype} is wanted: set dataset.in_channels and dataset.dtype (uint8, uint16, float32) to what all files "
            "hold, or mend the file"
        )
    if dtype == "float32" and isinstance(image, np.ndarray) and not (finite := np.isfinite(image)).all():
        number = int(np.flatnonzero(~finite.all((0, 1)))[0])
        raise InputError(
            f"image {path} has {np.count_nonzero(~finite)} values that are not finite (NaN, inf), in channel {number} "
            "first: replace them, and make the pixels void in its label, or remove the pair"
        )


def _decoded(path: Path, kind: tuple[int, str]) -> np.ndarray:
    """The samples of an image file, (H, W) or (H, W, C)."""
    import imagecodecs

    content = read_bytes(path, role="image")
    if content[:8] == decode.PNG:
        decode.png_header(content, path, role="image")
        return decode.decode_png(content, path)
    if content[:2] not in TIFF:
        with decode.pillow(io.BytesIO(content), path, role="image") as opened:
            return np.array(decode.as_stored(opened, path))
    pages = _pages(io.BytesIO(content), path, most=kind[0] + 1)
    (height, width, num), _, planar = pages[0]
    decode.check_pixels((height, width), path, role="image")
    stacked = num == 1 < kind[0] == len(pages) and len(set(pages)) == 1
    check_bands(pages[0]._replace(shape=(height, width, kind[0] if stacked else num)), path, kind)
    try:
        decoded = [imagecodecs.tiff_decode(content, index=page) for page in range(len(pages) if stacked else 1)]
    except (imagecodecs.TiffError, *decode.DAMAGED) as error:
        raise decode.damaged(path, error) from error
    image = np.stack(decoded) if stacked else decoded[0]
    return np.moveaxis(image, 0, -1) if stacked or (planar and image.ndim == 3) else image


def _pages(file: BinaryIO, path: Path, *, most: int) -> list[_Page]:
    """What the headers of at most ``most`` pages of a TIFF say."""
    found: list[_Page] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of a damaged tag
            head = file.read(8)
            head += file.read(8) if 43 in head[2:4] else b""  # BigTIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            while tags.next and len(found) < most:
                file.seek(tags.next)
                tags.load(file)
                bits, kinds = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (1,)))
                kind = f"{_KINDS.get(min(kinds), 'unknown ')}{min(bits)}" if len(bits) == len(kinds) == 1 else "mixed"
                shape = int(tags[_HEIGHT]), int(tags[_WIDTH]), int(tags.get(_SAMPLES, 1))
                found.append(_Page(shape, kind, tags.get(_PLANAR, 1) == 2))
    except decode.DAMAGED as error:
        raise decode.damaged(path, error) from error
    if not found:
        raise decode.damaged(path, "it has no page")
    return found


def _npy(path: Path) -> np.ndarray:
    """The array in a file, of which nothing is read before it is looked at."""
    check_readable(path, role="image")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.ndim not in (2, 3) or array.size == 0:
            raise ValueError(f"an array of the shape {list(array.shape)} is no image")
    except decode.DAMAGED as error:  # an array of Python objects, which could be code, among them
        raise decode.damaged(path, error) from error
    decode.check_pixels(_size(array.shape), path, role="image")
    return array


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of an array, the smaller one of whose first and last axis (of three) is that of the channels."""
    height, width = shape[1:] if len(shape) == 3 and shape[0] < shape[2] else shape[:2]
    return height, width


def image_size(path: Path | str) -> tuple[int, int]:
    """Return (height, width) as stored, from the header alone; raises InputError for a file that is damaged.

    Of an array with three axes, the smaller one of the first and the last is taken for that of the channels.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return _size(_npy(path).shape)
    check_readable(path, role="image")
    with path.open("rb") as file:
        if file.read(2) not in TIFF:
            with decode.lazily_opened(path) as image:
                return decode.stored_size(image)
        file.seek(0)
        height, width, _ = _pages(file, path, most=1)[0].shape  # Pillow does not open all of them
    decode.check_pixels((height, width), path, role="image")
    return height, width
