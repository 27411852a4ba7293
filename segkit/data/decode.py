"""Read one image or one label file, exactly, or say in a sentence why not.

Labels are read as *indices*: never colour-converted, never scaled.  Images are always RGB, never rotated by
EXIF tags (labels carry none, so a rotated image would no longer lie under its label).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segkit.errors import InputError

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = b"\x00", b"\x02"  # colour types of a PNG
_JPEG = b"\xff\xd8\xff"
_LOSSY = ("JPEG", "WEBP")
# What Pillow raises on damaged files: OSError (also UnidentifiedImageError), SyntaxError from the PNG reader,
# ValueError and struct.error from the chunk readers.
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error, EOFError)


def read_index_png(path: Path | str) -> np.ndarray:
    """The indices (H, W) uint8 of an 8-bit label file: grey value, or palette index of a palette file.

    Files of 1, 2 or 4 bits give the stored sample values (0..1, 0..3, 0..15), unscaled.
    Raises InputError for colour files, 16-bit files, lossy formats and damaged files.
    """
    path = Path(path)
    check_readable(path, role="label")
    content = path.read_bytes()
    if _is_png_of(_GREY, content):
        label = _decode_png(content, path)
        if label.ndim == 2:  # else the file has transparent grey values, which Pillow leaves out below
            return label
    return _read_index_with_pillow(path)


def _is_png_of(colour_type: bytes, content: bytes) -> bool:
    """True for a PNG of 8 bits and that colour type (bytes 24 and 25, in its IHDR): it is decoded as it is.

    Palette indices would become colours, and 1, 2 and 4 bits be stretched to 0..255.
    """
    return content[:8] == _PNG and content[12:16] == b"IHDR" and content[24:26] == b"\x08" + colour_type


def _decode_png(content: bytes, path: Path) -> np.ndarray:
    """The samples of a PNG; imagecodecs takes 0.7 of the time of OpenCV and Pillow, thanks to its zlib."""
    import imagecodecs

    try:
        return imagecodecs.png_decode(content)
    except (imagecodecs.PngError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_index_with_pillow(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            _check_index_mode(image, path)
            bits = _grey_bits(image)
            label = np.array(image)
    except InputError:
        raise
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    if label.dtype == np.bool_:
        return label.astype(np.uint8)
    return label // {2: 85, 4: 17}[bits] if bits in (2, 4) else label


def _check_index_mode(image: Image.Image, path: Path) -> None:
    if image.format in _LOSSY:
        raise InputError(
            f"label {path} is a {image.format} file, which does not keep class indices exactly; "
            "write labels as 8-bit PNG (grey or palette)"
        )
    if image.mode in ("P", "L", "1"):
        return
    if image.mode.startswith("I") or image.mode == "F":
        raise InputError(
            f"label {path} has 16 or more bits per pixel (mode {image.mode}), but an 8-bit index mask is "
            "wanted; it may be an instance file: point to the class masks or write 8-bit PNGs"
        )
    raise InputError(
        f"label {path} is a colour image (mode {image.mode}), but an index mask is wanted: one channel, "
        "its value is the class; convert colours to class indices first"
    )


def _grey_bits(image: Image.Image) -> int | None:
    """Bits per pixel of a grey PNG that Pillow would scale to 0..255; None for the others."""
    tile: Any = getattr(image, "tile", None)  # Pillow's decoding plan: the file's own sample format is in it
    if image.mode != "L" or not tile:
        return None
    args = tile[0][3]
    rawmode = args if isinstance(args, str) else args[0] if args else ""
    return {"L;2": 2, "L;4": 4}.get(rawmode)


def read_rgb(path: Path | str, *, shrink: int = 1) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB of a file of any mode; 16-bit channels keep their upper byte.

    ``shrink`` (1, 2, 4 or 8) allows a JPEG to be decoded at that fraction of its size, ceil(H / shrink) x
    ceil(W / shrink), which the format does almost for free; other formats come at full size all the same.

    Each format goes through the library that is fastest at it.
    """
    path = Path(path)
    check_readable(path, role="image")
    content = path.read_bytes()
    if content[:3] == _JPEG:
        _check_jpeg_end(content, path)
        return _decode_rgb(content, path, shrink=shrink)
    if _is_png_of(_RGB, content):
        image = _decode_png(content, path)
        if image.shape[2:] == (3,):  # else the file has a transparent colour
            return image
    if content[:8] == _PNG:
        return _decode_rgb(content, path)
    try:
        with Image.open(path) as opened:
            return np.array(opened.convert("RGB"))
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def _decode_rgb(content: bytes, path: Path, *, shrink: int = 1) -> np.ndarray:
    import cv2

    reduced = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    flags = reduced[shrink] if shrink > 1 else cv2.IMREAD_COLOR_RGB
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise _damaged(path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if shrink > 1 else image


def _check_jpeg_end(content: bytes, path: Path) -> None:
    """Raise for a JPEG that was cut off: OpenCV would fill the missing rows with grey and say nothing.

    The end marker must come after the last start of a scan; inside scans its bytes cannot occur.
    """
    if content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
        raise _damaged(path)


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) from the header alone; raises InputError where the file is none or is damaged."""
    path = Path(path)
    check_readable(path, role="image")
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def check_readable(path: Path, *, role: str) -> None:
    """Raise the InputError for a missing, unreadable or empty file; ``role`` names it ("image", "label")."""
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise InputError(f"{role} {path} does not exist; unpack the archive again or mend dataset.root") from None
    except PermissionError:
        raise _forbidden(path) from None
    except IsADirectoryError:
        raise InputError(f"{role} {path} is a folder, but a file is wanted; mend dataset.root") from None
    except OSError as error:
        raise InputError(f"{role} {path} cannot be read: {error.strerror}; check the disk") from error
    if size == 0:
        raise InputError(f"{role} {path} is empty (0 bytes); copy or unpack it again")


def _forbidden(path: Path) -> InputError:
    return InputError(f"{path} may not be read by this user; run `chmod -R u+rX {path.parent}`")


def _damaged(path: Path, error: BaseException | None = None) -> InputError:
    if isinstance(error, PermissionError):
        return _forbidden(path)
    text = str(error or "").strip()
    reason = text.splitlines()[-1] if text else "decoding stopped before its end"
    return InputError(f"{path} is damaged or no image file ({reason}); copy or unpack it again")
