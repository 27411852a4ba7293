"""Images of any number of channels (bands), of 8 bits, 16 bits or floating point, as their files hold them.

- NPY: an array (H, W), (H, W, C) or (C, H, W); where both of the last fit, the last axis is that of the channels.
- TIFF: C samples a pixel, side by side or plane after plane; or C pages of one sample.
- PNG: its samples, alpha among them. Other files: what Pillow decodes, of 8 bits.

Only the byte order is converted. The header is compared with the pixel limit, and with the channels and the type that
are wanted, before anything is allocated.
"""

from __future__ import annotations

import io
import itertools
import operator
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import TiffImagePlugin
from PIL.ExifTags import Base as Tag

from segkit.config.dataset import RGB
from segkit.data import decode
from segkit.data.files import check_readable, open_file, read_bytes
from segkit.errors import InputError

TIFF = (b"II", b"MM")
_KINDS = {1: "uint", 2: "int", 3: "float"}


class _Page(NamedTuple):
    """What the header of a TIFF's page says.

    ``planar``: its samples lie plane after plane; ``end``: where the last of its strips or tiles ends in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    planar: bool = False
    end: int = 0


def read_bands(path: Path, kind: tuple[int, str]) -> np.ndarray:
    """Return the image (H, W, C) in a file, of ``kind``: channels, and uint8, uint16 or float32.

    Other files than NPY are converted to RGB for the kind (3, "uint8") (:mod:`segkit.data.decode`). Raises InputError
    for a file of another kind, with values that are not finite, or damaged.
    """
    if path.suffix.lower() == ".npy":
        image = _array(path, kind)
    elif kind == RGB:
        return decode.read_rgb(path)
    else:
        image = _decoded(path, kind)
        image = image[..., None] if image.ndim == 2 else image
    image = np.array(image, image.dtype.newbyteorder("="), order="C")
    check_bands(image, path, kind)
    return image


def _array(path: Path, kind: tuple[int, str]) -> np.ndarray:
    """The image (H, W, C) in an NPY file, of which nothing is read; (C, H, W) is turned where that alone fits."""
    image = _npy(path)
    if image.ndim == 3 and image.shape[2] != kind[0] == image.shape[0]:
        image = np.moveaxis(image, 0, -1)
    image = image[..., None] if image.ndim == 2 else image
    check_bands(_Page(image.shape, str(image.dtype.newbyteorder("="))), path, kind)
    return image


def check_bands(image: Any, path: Path | str, kind: tuple[int, str]) -> None:
    """Raise InputError unless ``image``, or what is known of it, is (H, W, C) of ``kind`` and finite."""
    if len(image.shape) != 3 or (image.shape[2], image.dtype) != kind:
        raise InputError(
            f"image {path} is an array of {image.dtype} of the shape {list(image.shape)}, but (H, W, {kind[0]}) of "
            f"{kind[1]} is wanted: mend the file, or train with dataset.in_channels and dataset.dtype (uint8, uint16, "
            "float32) as all files have them"
        )
    if kind[1] == "float32" and isinstance(image, np.ndarray) and not (finite := np.isfinite(image)).all():
        number = np.argmin(finite.all((0, 1)))
        raise InputError(
            f"image {path} has {np.count_nonzero(~finite)} values that are not finite (NaN, inf), in channel {number} "
            "first: replace them, and make the pixels void in its label, or remove the pair"
        )


def _decoded(path: Path, kind: tuple[int, str]) -> np.ndarray:
    """The samples of an image file, (H, W) or (H, W, C)."""
    content = read_bytes(path, role="image")
    if content[:8] == decode.PNG:
        decode.png_header(content, path, role="image")
        return decode.decoded(content, path)
    if content[:2] not in TIFF:
        with decode.pillow(io.BytesIO(content), path, role="image") as opened:
            return np.array(decode.as_stored(opened, path))
    pages, stacked = _pages_of(io.BytesIO(content), path, kind)
    decoded = [decode.decoded(content, path, page=page) for page in range(len(pages) if stacked else 1)]
    image = np.stack(decoded) if stacked else decoded[0]
    return np.moveaxis(image, 0, -1) if stacked or (pages[0].planar and image.ndim == 3) else image


def _pages_of(file: BinaryIO, path: Path, kind: tuple[int, str]) -> tuple[list[_Page], bool]:
    """The pages of a TIFF of ``kind``, and whether each is a channel; InputError if it is of another kind."""
    pages = _pages(file, path, most=kind[0] + 1)
    *size, num = pages[0].shape
    stacked = num == 1 < kind[0] == len(pages) and len({page[:3] for page in pages}) == 1
    check_bands(pages[0]._replace(shape=(*size, kind[0] if stacked else num)), path, kind)
    return pages, stacked


def _pages(file: BinaryIO, path: Path, *, most: int) -> list[_Page]:
    """What the headers of at most ``most`` pages of a TIFF say; the first is within the pixel limit."""
    found: list[_Page] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of a damaged tag
            head = file.read(8)
            head += file.read(8) if 43 in head[2:4] else b""  # BigTIFF
            # Pillow knows a BigTIFF by the third byte, which is right for one of the two orders of bytes only.
            known = b"II+\0" + head[4:] if head[2:4] == b"\0+" else head
            tags = TiffImagePlugin.ImageFileDirectory_v2(known, prefix=head[:2])
            while tags.next and len(found) < most:
                file.seek(tags.next)
                tags.load(file)
                bits, kinds = set(tags.get(Tag.BitsPerSample, (1,))), set(tags.get(Tag.SampleFormat, (1,)))
                kind = f"{_KINDS.get(min(kinds), 'unknown ')}{min(bits)}" if len(bits) == len(kinds) == 1 else "mixed"
                shape = int(tags[Tag.ImageLength]), int(tags[Tag.ImageWidth]), int(tags.get(Tag.SamplesPerPixel, 1))
                decode.check_pixels(decode.tile_size(tags), path, role="image")
                found.append(_Page(shape, kind, tags.get(Tag.PlanarConfiguration, 1) == 2, _end(tags)))
        height, width, _ = found[0].shape
    except decode.DAMAGED as error:
        raise decode.damaged(path, error) from error
    decode.check_pixels((height, width), path, role="image")
    return found


def _end(tags: Mapping[int, Any]) -> int:
    """Where the last strip or tile of a TIFF's page ends."""
    parts = ((Tag.StripOffsets, Tag.StripByteCounts), (Tag.TileOffsets, Tag.TileByteCounts))
    ends = (map(operator.add, tags.get(start, ()), tags.get(length, ())) for start, length in parts)
    return max(itertools.chain(*ends), default=0)


def _npy(path: Path) -> np.ndarray:
    """The array in a file, of which nothing is read before it is looked at."""
    check_readable(path, role="image")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.ndim not in (2, 3) or array.size == 0:
            raise ValueError(f"an array of the shape {list(array.shape)} is no image")
    except (*decode.DAMAGED, MemoryError) as error:  # of a header: objects, which could be code, or endless signs
        raise decode.damaged(path, error) from error
    decode.check_pixels(_size(array, None), path, role="image")
    return array


def _size(array: np.ndarray, channels: int | None) -> tuple[int, int]:
    first, last = array.shape[0], array.shape[-1]
    is_first = last != channels if channels in (first, last) else first < last
    height, width = array.shape[1:] if array.ndim == 3 and is_first else array.shape[:2]
    return height, width


def image_size(path: Path, channels: int | None = None) -> tuple[int, int]:
    """Return (height, width) as stored, from the header alone; raises InputError for a file that is damaged.

    Of an array with three axes, neither the first nor the last of which has ``channels``, the smaller one of the two is
    taken for that of the channels.
    """
    return _size(_npy(path), channels) if path.suffix.lower() == ".npy" else read_header(path, RGB)[0]


def read_header(path: Path, kind: tuple[int, str]) -> tuple[tuple[int, int], bool]:
    """Return (height, width), and False for a file that may have been cut off: its end is not what it should be.

    Only decoding tells that for certain, which takes a thousand times as long. Raises InputError for an NPY or TIFF
    file of another ``kind``, where that is not RGB, to which other TIFFs are converted.
    """
    if path.suffix.lower() == ".npy":
        return _array(path, kind).shape[:2], True
    with open_file(path, role="image") as file:
        head, length = file.read(33), file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 64))
        tail = file.read()
        file.seek(0)
        if head[:2] in TIFF:  # of which Pillow does not open all
            pages = _pages(file, path, most=1) if kind == RGB else _pages_of(file, path, kind)[0]
            height, width, _ = pages[0].shape
            return (height, width), max(page.end for page in pages) <= length
        if head[:8] == decode.PNG and zlib.crc32(head[12:29]).to_bytes(4, "big") == head[29:]:
            size, *_ = decode.png_header(head, path, role="image")
        else:
            with decode.pillow(file, path, role="image") as image:
                size = decode.stored_size(image)
    if head[:2] == b"BM":
        return size, 0 < int.from_bytes(head[2:6], "little") <= length
    end = b"IEND" if head[:8] == decode.PNG else b"\xff\xd9"  # JPEG and JPEG 2000 end alike
    return size, head[:4] == b"RIFF" or end in tail  # Pillow has looked at a WebP to its end
