"""Read one image or one label file, exactly, or say in a sentence why not.

Labels are read as *indices*: never colour-converted, never scaled.  Images are always RGB, never rotated by
EXIF tags (labels carry none, so a rotated image would no longer lie under its label).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from segkit.errors import InputError

if TYPE_CHECKING:
    import torch

_PNG = b"\x89PNG\r\n\x1a\n"
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
    content = np.fromfile(path, np.uint8)
    if _is_plain_index_png(content[:33].tobytes()):
        label = _decode_png(content, path)
        if label.shape[0] == 1:  # a second channel would be transparency, which Pillow leaves out below
            return label[0].numpy()
    return _read_index_with_pillow(path)


def _is_plain_index_png(head: bytes) -> bool:
    """True for a PNG of 8 bits, grey (colour type 0) or palette (3): bytes 24 and 25 of the file, in its IHDR."""
    return len(head) == 33 and head[:8] == _PNG and head[12:16] == b"IHDR" and head[24] == 8 and head[25] in (0, 3)


def _decode_png(content: np.ndarray, path: Path) -> torch.Tensor:
    """Channels (C, H, W) as stored; torchvision keeps palette indices, and is strict about truncated files."""
    import torch
    from torchvision.io import decode_png

    try:
        return decode_png(torch.from_numpy(content))
    except RuntimeError as error:
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

    PNG and JPEG go through torchvision (faster than OpenCV and Pillow, and strict about truncated files,
    where OpenCV returns half an image); other formats go through Pillow.
    """
    path = Path(path)
    check_readable(path, role="image")
    with path.open("rb") as file:
        head = file.read(8)
    if head[:3] == _JPEG and shrink > 1:
        return _read_shrunk_jpeg(path, shrink)
    if head == _PNG or head[:3] == _JPEG:
        return _read_with_torchvision(path)
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def _read_with_torchvision(path: Path) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_image, read_file

    try:
        tensor = decode_image(read_file(str(path)), ImageReadMode.RGB)
    except RuntimeError as error:
        raise _damaged(path, error) from error
    if tensor.dtype == torch.uint16:
        tensor = (tensor.to(torch.int32) >> 8).to(torch.uint8)
    # The decoder writes rows of RGB pixels and hands them out as a channels-last view, no copy here.
    return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())


def _read_shrunk_jpeg(path: Path, shrink: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            size = -(-image.width // shrink), -(-image.height // shrink)
            image.draft("RGB", size)
            shrunk = np.array(image.convert("RGB"))
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    assert shrunk.shape[1::-1] == size, f"{path}: JPEG decoded at {shrunk.shape[1::-1]}, not {size}"
    return shrunk


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


def _damaged(path: Path, error: BaseException) -> InputError:
    if isinstance(error, PermissionError):
        return _forbidden(path)
    reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if isinstance(error, RuntimeError):  # the text of a C++ assertion: no use to a reader
        reason = "decoding stopped before its end"
    return InputError(f"{path} is damaged or no image file ({reason}); copy or unpack it again")
