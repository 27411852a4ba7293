"""How a file becomes pixels: the one decoder of training, evaluation, check and prediction.

Images become uint8 RGB by these rules:

- 8-bit grey, RGB, CMYK and palette colours are converted; 1, 2 and 4 bits of grey are stretched to 0..255.
- Of 16 bits a channel the upper byte is kept (a value is divided by 256 and rounded down). Integers of 32 bits are read
  as if they had 16, and refused if one does not fit. Floating-point pixels and negative values are refused.
- Transparent pixels lie over white, so that no hidden colour shows.
- Orientation tags (EXIF, TIFF, XMP) are ignored: labels match the pixels as they are stored.
- Of a file with several pages or frames the first is read.

Labels become uint8 *indices*: the grey value or the palette index as it is stored, never a colour and never scaled.

No decoder starts before the number of pixels in the header was compared with the limit (:func:`set_pixel_limit`).
"""

from __future__ import annotations

import io
import re
import struct
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.ExifTags import Base as Tag

from segkit.data.files import open_file, read_bytes
from segkit.data.labels import narrowed
from segkit.errors import InputError
from segkit.memory import is_out_of_memory

MAX_PIXELS = 200_000_000
"""The limit that holds until :func:`set_pixel_limit` is called."""

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may try; its other readers are little tested, or start other programs."""

PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_GREY = 0  # colour type of a PNG
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that give the size
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG markers without a length
_LOSSY = ("JPEG", "MPO", "JPEG2000")
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")
# What the libraries raise on damaged files: OSError (also UnidentifiedImageError), SyntaxError of Pillow's PNG reader,
# RuntimeError from imagecodecs, the others from Pillow's readers of chunks and tags.
DAMAGED = (
    OSError, SyntaxError, RuntimeError, ValueError, TypeError, KeyError, IndexError, struct.error, EOFError,
    tokenize.TokenError, OverflowError,  # of numpy
)  # fmt: skip
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_limit = MAX_PIXELS


def set_pixel_limit(limit: int) -> None:
    """Refuse images and labels of more than ``limit`` pixels, in this process and the workers that it starts."""
    global _limit
    _limit = limit
    Image.MAX_IMAGE_PIXELS = limit


def pixel_limit() -> int:
    """Return the limit in force."""
    return _limit


set_pixel_limit(MAX_PIXELS)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit above is the one that counts
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # imagecodecs reads pixels beside long texts, too


def read_rgb(path: Path, *, shrink: int = 1) -> np.ndarray:
    """Return the image (H, W, 3) uint8 RGB of a file, by the rules above.

    ``shrink`` (1, 2, 4 or 8) allows a JPEG to be decoded at that fraction of its size, rounded up to whole pixels,
    which the format does almost for free; other files, and JPEGs of four channels, come at full size all the
    same. Each format goes through the library that is fastest at it. Raises InputError for whatever cannot be read.
    """
    content = read_bytes(path, role="image")
    if content[:3] == _JPEG:
        height, width, channels = _jpeg_frame(content, path)
        check_pixels((height, width), path, role="image")
        # Of a JPEG that was cut off OpenCV would fill the missing rows with grey and say nothing. The end marker must
        # come after the last start of a scan; inside scans its bytes cannot occur.
        if content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
            raise damaged(path)
        if channels < 4:
            return _decode_jpeg(content, path, shrink=shrink)
    elif content[:8] == PNG:
        png_header(content, path, role="image")
        return _png_as_rgb(decoded(content, path))
    with pillow(io.BytesIO(content), path, role="image") as opened:
        return _rgb(opened, path)


def read_index_png(path: Path, *, first_channel: bool = False, deep: bool = False) -> np.ndarray:
    """Return the indices (H, W) uint8 of an 8-bit label file: grey values, or palette indices of a palette file.

    Files of 1, 2 or 4 bits give the stored sample values (0..1, 0..3, 0..15), unscaled. ``first_channel`` allows colour
    files and takes their first channel. ``deep`` allows grey files of 16 or 32 bits, whose array has wider integers if
    8 bits do not hold them. A lossless WebP, which knows no grey, is an index file if its channels are equal. Raises
    InputError for other colour files, lossy formats and damaged files.
    """
    content = read_bytes(path, role="label")
    if content[:8] == PNG:
        _, bits, colours = png_header(content, path, role="label")
        if colours == _GREY and bits <= 8:
            label = decoded(content, path)
            label = label if label.ndim == 2 else np.ascontiguousarray(label[..., 0])  # without transparent values
            return label if bits == 8 else label // (255 // (2**bits - 1))
    with pillow(io.BytesIO(content), path, role="label") as image:
        _check_lossless(image, content, path)
        _check_index_mode(image, path, colours_too=first_channel or image.format == "WEBP", deep=deep)
        _check_one_page(image, path)
        is_plain_tiff = image.format == "TIFF" and image.mode not in ("RGB", "RGBA")
        label = decoded(content, path) if is_plain_tiff else np.array(as_stored(image, path))
    if label.ndim == 3:
        if not first_channel and (label[..., :3] != label[..., :1]).any():
            raise _no_index(path, image.mode)
        label = np.ascontiguousarray(label[..., 0])
    return narrowed(label)


def read_colours(path: Path) -> np.ndarray:
    """Return the colours (H, W, 3) uint8 of a label file as they are stored; raises InputError if it has none."""
    content = read_bytes(path, role="label")
    with pillow(io.BytesIO(content), path, role="label") as image:
        _check_lossless(image, content, path)
        if image.mode not in ("RGB", "RGBA"):
            raise InputError(
                f"label {path} is an index mask (mode {image.mode}), but others of its folder are colour images: "
                "convert it, as the masks of a folder are of one kind"
            )
        return np.ascontiguousarray(np.array(as_stored(image, path))[..., :3])


def colour_mode(path: Path) -> str | None:
    """Return RGB or RGBA for an image of colours, WEBP for a file of that format, None for others and damaged ones."""
    try:
        with lazily_opened(path) as image:
            return "WEBP" if image.format == "WEBP" else image.mode if image.mode in ("RGB", "RGBA") else None
    except InputError:  # for the reader of its pixels to say
        return None


def orientation(path: Path) -> int:
    """Return the orientation tag of an image, which all readers ignore: 1 (upright, or no tag) to 8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of a damaged tag
            with lazily_opened(path) as image:  # with getexif of all formats: PNG's own decodes the image
                found = Image.Image.getexif(image).get(Tag.Orientation, 1)
    except Exception:  # whatever is wrong with the file is for the reader of its pixels to say
        return 1
    return found if found in range(1, 9) else 1


@contextmanager
def lazily_opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file, of which the header is read; InputErrors as :func:`pillow`."""
    with open_file(path, role="image") as file, pillow(file, path, role="image") as image:
        yield image


@contextmanager
def pillow(file: BinaryIO, path: Path, *, role: str) -> Iterator[Image.Image]:
    """Open a file with Pillow, which reads the header only; what is wrong, also later on, becomes an InputError."""
    try:
        if size := _webp_size(file.read(30)):  # Pillow would take memory for a WebP on opening it
            check_pixels(size, path, role=role)
        with Image.open(file, formats=FORMATS) as image:
            check_pixels(stored_size(image), path, role=role)
            check_pixels(tile_size(getattr(image, "tag_v2", {})), path, role=role)
            yield image
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        forms = f"{', '.join(FORMATS)} of 8 or 16 bits a channel, BigTIFF with the lesser byte first"
        keys = ", or train with dataset.in_channels and dataset.dtype as it has them" if role == "image" else ""
        raise damaged(path, f"it is none of {forms}; convert another form to one of these{keys}") from error
    except _BOMBS as error:
        found = re.search(r"\d+", str(error))
        raise _too_large(path, f"{int(found[0]):,}" if found else "too many", role=role) from None
    except DAMAGED as error:
        raise damaged(path, error) from error


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of an opened file as stored."""
    tags: Any = getattr(image, "tag_v2", None)  # of a TIFF; Pillow gives the size of the turned image
    return (tags[Tag.ImageLength], tags[Tag.ImageWidth]) if tags else (image.height, image.width)


def tile_size(tags: Mapping[int, Any]) -> tuple[int, int]:
    """Return (height, width) of the tiles of a TIFF, for each of which a decoder takes memory; 0 for other files."""
    return tags.get(Tag.TileLength, 0), tags.get(Tag.TileWidth, 0)


def as_stored(image: Image.Image, path: Path) -> Image.Image:
    """Decode an image without what Pillow does to TIFFs only: it turns them by their orientation.

    Raises InputError for TIFFs that Pillow reads wrongly: 16 bits in separate planes, and negative values of 8 bits.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = set(tags.get(Tag.BitsPerSample, (8,)))
    if tags.get(Tag.PlanarConfiguration) == 2 and image.mode != "L" and bits != {8}:  # Pillow would mix bytes
        raise InputError(f"{path} is a TIFF of separate planes of {max(bits)} bits: convert it to interleaved channels")
    if tags:
        image.getexif()[Tag.Orientation] = 1
        if any(part.codec_name == "raw" and part.offset == 0 for part in getattr(image, "tile", ())):
            raise damaged(path, "some of its strips or tiles are missing")
    image.load()
    if bits == {8} and 2 in tags.get(Tag.SampleFormat, ()) and np.asarray(image).max(initial=0) > 127:
        raise InputError(f"{path} holds negative values (8 bits with a sign): convert it to 8 bits without a sign")
    turned = image.size != image.im.size  # by what Pillow says of the file: a copy has the size of its pixels
    return image.copy() if turned else image


def _rgb(opened: Image.Image, path: Path) -> np.ndarray:
    image = as_stored(opened, path)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputError(f"{path} holds values beyond 16 bits; convert it to 8 or 16 bits a channel")
        grey = (values >> 8).astype(np.uint8)
        if getattr(opened, "tag_v2", {}).get(Tag.PhotometricInterpretation) == 0:  # Pillow heeds it for 8 bits only
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise InputError(f"{path} holds floating-point values; convert it to 8 or 16 bits, or train with dataset.dtype")
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _png_as_rgb(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) of the samples of a PNG: grey (H, W), grey and alpha (H, W, 2), RGB or RGBA."""
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 2:
        image = np.dstack(2 * [image if image.ndim == 2 else image[..., 0]] + [image])
    return image if image.shape[2] == 3 else _over_white(image)


def _over_white(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) of RGBA uint8 (H, W, 4): (colour * alpha + 255 * (255 - alpha)) / 255, rounded."""
    alpha = image[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(image[..., :3])
    return ((image[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def decoded(content: bytes, path: Path, *, page: int = 0) -> np.ndarray:
    """Return the samples (H, W) or (H, W, C) of a PNG or of a page of a TIFF by imagecodecs.

    Those of a TIFF are as stored. Those of a PNG have 8 or 16 bits, of grey scaled to them; palettes become colours,
    transparency alpha. That takes 0.7 of the time of OpenCV and Pillow, thanks to its zlib. Raises InputError for a
    file that is damaged.
    """
    import imagecodecs

    try:
        return imagecodecs.png_decode(content) if content[:8] == PNG else imagecodecs.tiff_decode(content, index=page)
    except DAMAGED as error:
        raise damaged(path, error) from error


def _decode_jpeg(content: bytes, path: Path, *, shrink: int) -> np.ndarray:
    import cv2

    flags = getattr(cv2, f"IMREAD_REDUCED_COLOR_{shrink}") if shrink > 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:  # OpenCV's own limits: 2**20 pixels a side, 2**30 in all
        if is_out_of_memory(error):
            raise
        raise damaged(path, error) from error
    if image is None:
        raise damaged(path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if shrink > 1 else image


def png_header(content: bytes, path: Path, *, role: str) -> tuple[tuple[int, int], int, int]:
    """Return (height, width), bits a channel and colour type of a PNG, after its size was checked."""
    if content[12:16] != b"IHDR" or len(content) < 26:
        raise damaged(path, "its header is cut off")
    width, height, bits, colours = struct.unpack(">IIBB", content[16:26])
    check_pixels((height, width), path, role=role)
    return (height, width), bits, colours


def _jpeg_frame(content: bytes, path: Path) -> tuple[int, int, int]:
    """Height, width and number of channels of a JPEG, from the header of its frame."""
    place = 2
    while place + 10 <= len(content):
        marker = content[place + 1]
        if content[place] != 0xFF or marker == 0xFF:  # bytes between two markers, or before one
            place = max(place + 1, content.find(b"\xff", place))
        elif marker in _FRAMES:
            height, width, channels = struct.unpack(">HHB", content[place + 5 : place + 10])
            return height, width, channels
        else:
            place += 2 if marker in _BARE else 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    raise damaged(path, "its header is cut off")


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Height and width in the first 30 bytes of a WebP; None for other files."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return None
    if content[12:16] == b"VP8X":
        width, height = (int.from_bytes(content[place : place + 3], "little") + 1 for place in (24, 27))
    elif content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(content[place : place + 2], "little") & 0x3FFF for place in (26, 28))
    return height, width


def _check_lossless(image: Image.Image, content: bytes, path: Path) -> None:
    packed = image.info.get("compression") if image.format == "TIFF" else None
    is_lossy_webp = image.format == "WEBP" and not _is_lossless_webp(content)
    if image.format in _LOSSY or packed in _LOSSY_IN_TIFF or is_lossy_webp:
        raise InputError(
            f"label {path} is a {f'TIFF with {packed} inside' if packed else image.format} file, which does not keep "
            "class indices exactly; write labels as 8-bit PNG (grey or palette)"
        )


def _is_lossless_webp(content: bytes) -> bool:
    """True if the first chunk of pixels of a WebP is one of its lossless kind."""
    place = 12
    while place + 8 <= len(content):
        kind, length = struct.unpack("<4sI", content[place : place + 8])
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        place += 8 + length + length % 2
    return False


def _check_index_mode(image: Image.Image, path: Path, *, colours_too: bool, deep: bool) -> None:
    is_deep = image.mode.startswith("I")
    if image.mode in ("P", "L", "1") or (colours_too and image.mode in ("RGB", "RGBA")) or (deep and is_deep):
        return
    if is_deep or image.mode == "F":
        raise InputError(
            f"label {path} has 16 or more bits per pixel (mode {image.mode}), but an 8-bit index mask is wanted; it "
            "may be an instance file: point to the class masks or write 8-bit PNGs"
        )
    raise _no_index(path, image.mode)


def _check_one_page(image: Image.Image, path: Path) -> None:
    """Raise InputError for pages of one size, as masks of single classes are; overviews of the first are smaller."""
    if getattr(image, "n_frames", 1) > 1:
        size = stored_size(image)
        image.seek(1)
        if stored_size(image) == size:
            raise InputError(
                f"label {path} has several pages, perhaps one a class, but one index mask is wanted: write one page "
                "whose values are the classes"
            )
        image.seek(0)


def _no_index(path: Path, mode: str) -> InputError:
    return InputError(
        f"label {path} is a colour image (mode {mode}), but an index mask is wanted: one channel, its value is the "
        "class; convert colours to class indices first"
    )


def check_pixels(size: tuple[int, int], path: Path, *, role: str) -> None:
    """Raise InputError for a file of more pixels than the limit."""
    if size[0] * size[1] > _limit:
        raise _too_large(path, f"{size[1]}x{size[0]}", role=role)


def _too_large(path: Path, pixels: str, *, role: str) -> InputError:
    return InputError(
        f"{role} {path} has {pixels} pixels, but at most {_limit:,} are allowed, lest a damaged file fill the memory; "
        "remove it, or set max_pixels to more"
    )


def damaged(path: Path, error: BaseException | str | None = None) -> InputError:
    """Return the sentence for a file that cannot be decoded."""
    text = str(error or "").strip()
    reason = text.splitlines()[-1] if text else "decoding stopped before its end"
    return InputError(f"{path} is damaged or no image file ({reason}); copy or unpack it again")
