"""Read the variables of a MATLAB 5 file, or say in a sentence why not.

scipy.io.loadmat reads them too, but one wrong byte in a file ends its process with a segmentation fault.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from segkit.data.decode import DAMAGED, pixel_limit
from segkit.data.files import open_file
from segkit.errors import InputError, first_line

HEADER_BYTES = 128
MATRIX, COMPRESSED = 14, 15
"""Types of the elements that hold others."""

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""numpy's name of each type of numbers."""

CELL, STRUCT, NUMERIC, IS_COMPLEX = 1, 2, range(6, 16), 0x800
"""Classes of matrices, and the flag of one with an imaginary part."""

HEAD_BYTES = 256
"""Bytes of a matrix within which its name stands."""

PIXEL_BYTES = 8
"""Bytes of a label's pixel: MATLAB stores doubles."""


def read_mat(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Return the variables of the MATLAB 5 file ``path`` that are among ``names``.

    An array of numbers as it is stored; {field: value} of the first element of a struct; a list with an entry for each
    cell; None for any other class. Raises InputError for a file that is missing, empty, damaged, of version 7.3 (HDF5),
    or that would become larger than the limit of pixels allows.
    """
    try:
        found: dict[str, Any] = {}
        with open_file(path, role="label") as file:
            for name, value in _variables(file, path, names):
                found |= {name: value} if name in names else {}
                if len(found) == len(names):
                    break
        return found
    except (MemoryError, zlib.error, *DAMAGED) as error:
        if isinstance(error, InputError):
            raise
        reason = first_line(error)
        raise InputError(f"{path} is damaged or no MATLAB file ({reason}); copy or unpack it again") from error


def _variables(file: BinaryIO, path: Path, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the variables in an opened file; deflated ones only if they may be among ``names``."""
    header = file.read(HEADER_BYTES)
    order = ">" if header.endswith(b"MI") else "<"
    if (version := struct.unpack(f"{order}H", header[124:126])[0]) == 0x200:
        raise InputError(f"{path} is a MATLAB 7.3 file, but the official files are of version 5; unpack it again")
    if version != 0x100 or len(header) < HEADER_BYTES:
        raise ValueError("its header is none")
    rest = PIXEL_BYTES * pixel_limit()
    while tag := file.read(8):
        kind, length = struct.unpack(f"{order}II", tag)
        content = file.read(most := min(length, rest + 1))
        if len(content) < most:
            raise ValueError("it is cut off")
        if kind == COMPRESSED:
            inflater = zlib.decompressobj()
            head = inflater.decompress(content, HEAD_BYTES)
            if not any(name.encode() in head for name in names):
                continue
            content = head + inflater.decompress(inflater.unconsumed_tail, rest + 1)
        rest -= len(content)
        if rest < 0:
            raise InputError(
                f"label {path} becomes more than {PIXEL_BYTES * pixel_limit():,} bytes, those of {pixel_limit():,} "
                "pixels, lest a damaged file fill the memory; remove it, or set max_pixels to more"
            )
        for matrix in _elements(content, order) if kind == COMPRESSED else [(kind, memoryview(content))]:
            yield _matrix(matrix, order)


def _elements(content: bytes | memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield type and content of one element after the other; raises ValueError or struct.error if one is cut off."""
    place = 0
    while place < len(content):
        kind, length = struct.unpack_from(f"{order}II", content, place)
        start = place + 8
        if kind >> 16:  # a small element, of at most four bytes in the tag itself
            kind, length, start = kind & 0xFFFF, kind >> 16, place + 4
        if start + length > len(content):
            raise ValueError("it is cut off")
        yield kind, memoryview(content)[start : start + length]
        place += 8 + (length + -length % 8) * (start == place + 8)


def _matrix(element: tuple[int, memoryview], order: str) -> tuple[str, Any]:
    """Return name and value of a matrix; raises ValueError or KeyError for an element that is none."""
    if element[0] != MATRIX:
        raise ValueError(f"an element of type {element[0]} is where a matrix should be")
    if not element[1]:
        return "", None
    elements = _elements(element[1], order)
    (_, flags), (_, dims), (_, name) = itertools.islice(elements, 3)
    what = int(np.frombuffer(flags, f"{order}u4")[0])
    value: Any = None
    if what & 0xFF in NUMERIC and not what & IS_COMPLEX:
        kind, content = next(elements)
        stored = np.frombuffer(content, f"{order}{NUMBERS[kind]}").astype(NUMBERS[kind])
        value = stored.reshape(np.frombuffer(dims, f"{order}u4").tolist(), order="F")
    elif what & 0xFF == CELL:
        value = list(elements)
    elif what & 0xFF == STRUCT:
        length, names = (bytes(content) for _, content in itertools.islice(elements, 2))
        (step,) = struct.unpack(f"{order}i", length)
        fields = [names[start : start + step].split(b"\0")[0].decode() for start in range(0, len(names), step)]
        value = {field: _matrix(item, order)[1] for field, item in zip(fields, elements, strict=False)}
    return bytes(name).decode(), value
