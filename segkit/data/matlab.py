"""Read variables of a MATLAB file, or say in a sentence why not."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.data.decode import check_readable
from segkit.errors import InputError


def read_mat(path: Path, variables: Sequence[str]) -> dict[str, Any]:
    """``variables`` of the MATLAB 5 file ``path``, as scipy gives them; absent ones are left out.

    Raises InputError for a file that is missing, empty, damaged, or of version 7.3 (HDF5).
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    check_readable(path, role="label")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scipy warns of variables that it could not read
            return loadmat(path, variable_names=list(variables))
    except NotImplementedError:
        raise InputError(
            f"{path} is a MATLAB 7.3 file, but the official files are of version 5; unpack it again"
        ) from None
    except (
        MatReadError,
        ValueError,
        OSError,
        TypeError,
        KeyError,
        IndexError,
        struct.error,
        zlib.error,
        EOFError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged or no MATLAB file ({reason}); copy or unpack it again") from error
    except Warning as error:
        raise InputError(f"{path} is damaged ({error}); copy or unpack it again") from error
