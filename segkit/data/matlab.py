"""Read variables of a MATLAB file, or say in a sentence why not."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.data.decode import DAMAGED, pixel_limit
from segkit.data.files import check_readable
from segkit.errors import InputError, first_line

HEADER_BYTES = 128
COMPRESSED = 15
"""Type of an element that is deflated."""

PIXEL_BYTES = 8
"""Bytes of a label's pixel: MATLAB stores doubles."""

MOST_DEFLATED = 1032
"""Bytes that one byte of a deflated element can become at most."""


def read_mat(path: Path, variables: Sequence[str]) -> dict[str, Any]:
    """Return ``variables`` of the MATLAB 5 file ``path``, as scipy gives them; absent ones are left out.

    Raises InputError for a file that is missing, empty, damaged, of version 7.3 (HDF5), or that would become larger
    than the limit of pixels allows.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    check_readable(path, role="label")
    try:
        _check_inflated_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scipy warns of variables that it could not read
            return loadmat(path, variable_names=list(variables))
    except NotImplementedError:
        raise InputError(
            f"{path} is a MATLAB 7.3 file, but the official files are of version 5; unpack it again"
        ) from None
    except InputError:
        raise
    except (MatReadError, zlib.error, Warning, *DAMAGED) as error:
        reason = first_line(error)
        raise InputError(f"{path} is damaged or no MATLAB file ({reason}); copy or unpack it again") from error


def _check_inflated_size(path: Path) -> None:
    """Raise InputError if the deflated elements become too many bytes; they are inflated piece by piece to know."""
    most = PIXEL_BYTES * pixel_limit()
    if path.stat().st_size * MOST_DEFLATED <= most:
        return  # true of almost all files
    total = 0
    with path.open("rb") as file:
        order = ">" if file.read(HEADER_BYTES)[-2:] == b"MI" else "<"
        while len(tag := file.read(8)) == 8:
            kind, length = struct.unpack(f"{order}II", tag)
            if kind != COMPRESSED:
                file.seek(length, 1)
                continue
            inflater, piece = zlib.decompressobj(), file.read(length)
            while piece and not inflater.eof:
                total += len(inflater.decompress(piece, 2**20))
                piece = inflater.unconsumed_tail
                if total > most:
                    raise InputError(
                        f"label {path} becomes more than {most:,} bytes, those of {pixel_limit():,} pixels, lest a "
                        "damaged file fill the memory; remove it, or set max_pixels to more"
                    )
