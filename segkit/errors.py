"""The exceptions that a user can do something about, each with the exit code of the command that it ends.

The message is one sentence that says what was got, what is allowed, and which key or command mends it. The command
line prints it without a traceback; set ``SEGKIT_DEBUG=1`` to see one.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import traceback
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path

LITE0 = "tu-tf_efficientnet_lite0"
"""The one encoder whose ImageNet weights are installed with segkit."""
MOST_DEFLATED = 200
"""Times that the content of an archive may be larger than the archive; what a run writes deflates less."""
MOST_NUMBER = 1e30
"""What a number may be at most: well within 32 bits."""
PROBE_SECONDS = 5.0
"""Time that a server has to answer before it counts as out of reach."""
SMALL = 2**20
"""Bytes that any archive may hold: only a larger one can do harm."""


class InputError(ValueError):
    """A mistake in the input: configuration, data, a checkpoint, a folder."""

    exit_code = 2


class NonFiniteLoss(ValueError):
    """The loss of a step, or its gradient, is NaN or infinite."""

    exit_code = 2


class NonFiniteLogits(InputError):
    """What a model returns for an image is NaN or infinite."""


class OutOfMemory(RuntimeError):
    """A step did not fit into memory; the message says how much was taken and what would help."""

    exit_code = 1


class Interrupted(Exception):
    """Training was asked to stop (SIGTERM, SIGINT); its state is saved, and the same command continues it."""

    exit_code = 75


def is_of_a_file(error: BaseException) -> bool:
    """True for an error of the operating system, which says of itself what is wrong with which file."""
    return isinstance(error, OSError) and error.errno is not None


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error`` without its full stop; its class name if it has no message.

    YAML's errors have it elsewhere, with the number of a line.
    """
    if mark := getattr(error, "problem_mark", None):
        return f"{error.problem} in line {mark.line + 1}"  # type: ignore[attr-defined]
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and re.match(r"\d+ validation error", lines[0]):  # of pydantic: of what, and why
        return " ".join(lines[1:3])
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def did_you_mean(name: str, options: Iterable[str], *, before: str = "") -> str:
    """Return ``did you mean OPTION? ``, the closest to ``name``, with ``before`` in front of it; empty without one."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f"did you mean {before}{close[0]}? " if close else ""


def raised(error: BaseException) -> str:
    """Return what ``error`` is, and the last line of the user's own code that it came through, for a sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = ("<", *(os.path.join(Path(module).parent, "") for module in (__file__, traceback.__file__)))
    own = [frame for frame in frames if not frame.filename.startswith(ours) and "site-packages" not in frame.filename]
    place = f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ") + place


def is_positive(value: float) -> bool:
    """True for a positive number that float32 holds, and whose reciprocal it holds as well."""
    return 1 / MOST_NUMBER <= value <= MOST_NUMBER


def check_number(value: object, name: str, *, low: float, high: float = MOST_NUMBER, open_low: bool = False) -> float:
    """Return ``value`` as a finite float in [low, high] (``open_low``: (low, high]); InputError names ``name``."""
    good = isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf  # type: ignore[operator]
    if not good or value < low or value > high or (open_low and value == low):  # type: ignore[operator]
        least = "greater than" if open_low else "at least"
        most = "" if high == MOST_NUMBER else f" and at most {high:g}"
        raise InputError(f"{name} must be a finite number {least} {low:g}{most}, got {value!r}; set loss.{name}")
    return float(value)  # type: ignore[arg-type]


def check_choice(value: object, name: str, choices: tuple[object, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        allowed = ", ".join("null" if c is None else str(c) for c in choices)
        raise InputError(f"{name} must be one of {allowed}, got {value!r}; set loss.{name}")


def check_normalisation(mean: Sequence[float], std: Sequence[float], *, num_channels: int, most: float = 1.0) -> None:
    """Raise InputError unless every channel has one mean, of at most ``most``, and one positive deviation."""
    finite = all(-math.inf < value <= most for value in mean) and all(map(is_positive, std))
    if len(mean) != num_channels or len(std) != num_channels or not finite:
        raise InputError(
            f"model.mean is {list(mean)} and model.std {list(std)}, but the model wants {num_channels} values each, "
            "for colours from 0 to 1, and positive deviations (1e-30 or more): set model.mean=null model.std=null"
        )


def check_archive(path: Path, *, cure: str, stored: bool = False) -> None:
    """Raise InputError for a zip archive whose content would fill the memory.

    It goes by the sizes that the archive states, before anything in it is read; zipfile reads no more than these.
    ``stored``: the archive is to be as torch.save writes it, which does not deflate (numpy does).
    """
    import zipfile

    with zipfile.ZipFile(path) as archive:
        content = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if content > max(SMALL, size * (1 if stored else MOST_DEFLATED)):
        raise InputError(f"{path} has {size} bytes, but says that it holds {content}: {cure}")


def is_plain(value: object) -> bool:
    """Return True for a dense tensor of real numbers; not for floats of 8 bits, with which torch computes little."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and not (value.is_nested or value.is_meta or value.is_quantized or value.is_complex())
        and value.layout == torch.strided
        and (value.dtype.itemsize > 1 or not value.is_floating_point())
    )


def unreachable(url: str) -> str | None:
    """Return why ``url`` cannot be reached (through the proxy of the environment); None if it answers at all."""
    import urllib.request
    from http.client import HTTPException

    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": f"segkit/{os.name}"})
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, HTTPException) as error:
        return str(getattr(error, "reason", error))
    return None


def not_fetched(encoder: str, place: str, reason: str | None) -> InputError:
    """Return the error that ImageNet weights of ``encoder`` are neither in the cache nor to be had from ``place``."""
    from huggingface_hub import constants

    return InputError(
        f"the ImageNet weights of the encoder {encoder} are not in the cache {constants.HF_HUB_CACHE} and their "
        f"download from {place} failed ({reason}): connect once, choose model=deeplabv3plus_lite, whose weights are "
        "installed with segkit, or set model.encoder_weights=none for random weights or model.encoder_weights=PATH "
        "for a file"
    )
