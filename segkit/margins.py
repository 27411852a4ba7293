"""Margin-offsets from label counts: pure functions of the number of pixels of each class.

Source: Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in Images", IJCV 130(1),
2022, Algorithm 1, with N the valid pixels of the training label maps, N_k those of class k and P_k = N_k / N:

    d_k    = sqrt(N - N_k) / N_k
    rho_0k = tau d_k                    margin that a pixel of another class must keep against class k
    mu_k   = P_k sqrt(N_k) / (upsilon (N - N_k) - P_k sqrt(N - N_k))
    rho_k0 = mu_k rho_0k                margin that a pixel of class k must reach
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from segkit.errors import InputError, check_choice, check_number

DEFAULT_TAU = 10.0


class Margins(NamedTuple):
    """Margins in logits, float64, shape (K,) each: see the head of this file."""

    rho_k0: np.ndarray
    rho_0k: np.ndarray


def compute_margins(
    class_pixels: Any,
    *,
    tau: float = DEFAULT_TAU,
    upsilon: float = 1.0,
    scale: str = "tau",
    mean_margin: float | None = None,
    absent: str = "max",
    rho_max: float | str | None = None,
    class_names: Sequence[str] | None = None,
) -> Margins:
    """Margin-offsets of ``class_pixels`` (K,) integer counts, as Algorithm 1 gives them.

    ``scale="tau"``: rho_0k = tau d_k (the paper; falls as 1/sqrt(N)). ``scale="mean"``: rho_0k = r d_k /
    mean(d), the same proportions with a mean of r = ``mean_margin`` logits over the classes that occur; r = 0 is the
    control without margins, r < 0 the one in the opposite direction. A class that does not occur follows ``absent``:
    "max" (the largest rho_0k of the others, with a warning), "zero", or "error"; its rho_k0 is 0. rho_0k is capped at
    ``rho_max`` (None: 10 times the median over the classes that occur), with a warning that names the class;
    "none" or infinity: no cap, as in Algorithm 1. A class that covers every pixel has no margins.

    Raises InputError for counts that are no counts, K = 1, an ``upsilon`` too small for some mu_k > 0.
    """
    counts = checked_counts(class_pixels)
    names = _names(class_names, len(counts))
    check_choice(scale, "scale", ("tau", "mean"))
    check_choice(absent, "absent", ("max", "zero", "error"))
    upsilon = check_number(upsilon, "upsilon", low=0.0, open_low=True)
    total = int(counts.sum())
    present = counts > 0
    missing = [name for name, here in zip(names, present, strict=True) if not here]
    if missing and absent == "error":
        raise InputError(
            f"no training pixel is of class {', '.join(missing)}; mend the label table or the split, "
            "or choose loss.absent=max or loss.absent=zero"
        )
    d = np.where(present, np.sqrt(np.float64(total - counts)) / np.maximum(counts, 1), 0.0)
    mu = margin_ratios(counts, upsilon=upsilon, class_names=names)
    factor = _factor(d[present], scale, tau, mean_margin)
    rho_0k, mirror = d * abs(factor), -1.0 if factor < 0 else 1.0  # caps and the policy for absent classes know sizes
    rho_0k = _cap(rho_0k, present & (counts < total), _largest(rho_max), names)
    if missing and absent == "max":
        rho_0k = np.where(present, rho_0k, rho_0k[present].max())
        warnings.warn(
            f"no training pixel is of class {', '.join(missing)}: the largest margin of the other classes is used "
            "(loss.absent=max)",
            stacklevel=2,
        )
    return Margins(rho_k0=mirror * mu * rho_0k, rho_0k=mirror * rho_0k)


def checked_counts(class_pixels: Any) -> np.ndarray:
    """``class_pixels`` as int64 (K,); InputError unless K is at least 2, none is negative and some are positive."""
    counts = np.asarray(class_pixels)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer):
        raise InputError(
            f"class_pixels must be integer pixel counts of shape (K,), got {counts.dtype} of shape {counts.shape}"
        )
    if len(counts) < 2:
        raise InputError(
            f"class_pixels has K = {len(counts)} class but a loss needs at least 2: name the rest as "
            "another, as background; a one-logit binary model is lifted to (0, z) with segkit.losses.lift_binary"
        )
    if (counts < 0).any() or not (counts > 0).any():
        raise InputError(
            f"class_pixels must not be negative and must count at least one pixel, got {counts.tolist()}; "
            "count the labels again with `segkit stats`"
        )
    return counts.astype(np.int64)


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        return [f"class {k}" for k in range(num_classes)]
    if len(class_names) != num_classes:
        raise InputError(f"got {len(class_names)} class names for {num_classes} counts in class_pixels")
    return [str(name) for name in class_names]


def margin_ratios(class_pixels: Any, *, upsilon: float = 1.0, class_names: Sequence[str] | None = None) -> np.ndarray:
    """mu_k = rho_k0 / rho_0k (K,) float64 of counts (K,), 0 for a class without pixels or with all of them.

    Raises InputError, with the least legal ``upsilon``, where some mu_k would not be positive.
    """
    counts = checked_counts(class_pixels)
    names = _names(class_names, len(counts))
    total = int(counts.sum())
    inner = (counts > 0) & (counts < total)
    share = counts / np.float64(total)
    others = np.float64(total - counts)
    least = np.where(inner, share / np.sqrt(np.maximum(others, 1.0)), 0.0)  # mu_k > 0 needs upsilon > this
    if upsilon <= least.max():
        worst = int(least.argmax())
        raise InputError(
            f"upsilon = {upsilon:g} is too small for {names[worst]}: these label counts need "
            f"upsilon greater than {least[worst]:.6g}; set loss.upsilon"
        )
    below = np.where(inner, upsilon * others - share * np.sqrt(others), 1.0)
    return np.where(inner, share * np.sqrt(np.float64(counts)) / below, 0.0)


def _factor(d: np.ndarray, scale: str, tau: float, mean_margin: float | None) -> float:
    """rho_0k / d_k of the chosen scale; ``d`` holds the classes that occur."""
    tau = check_number(tau, "tau", low=0.0)
    if scale == "tau":
        if mean_margin is not None:
            raise InputError(
                f"mean_margin = {mean_margin!r} has no effect with scale = tau; set loss.scale=mean or "
                "loss.mean_margin=null"
            )
        return tau
    if mean_margin is None:
        raise InputError("scale = mean needs the mean margin in logits; set loss.mean_margin, for example to 1.0")
    if tau != DEFAULT_TAU:
        raise InputError(f"tau = {tau:g} has no effect with scale = mean; set loss.mean_margin, or loss.scale=tau")
    mean = d.mean()
    return check_number(mean_margin, "mean_margin", low=-1e30) / mean if mean > 0 else 0.0


def _largest(rho_max: float | str | None) -> float | None:
    """``rho_max`` as a number, infinity for "none"; None stays."""
    if rho_max is None or rho_max == "none" or rho_max == np.inf:
        return None if rho_max is None else float("inf")
    if isinstance(rho_max, str):
        raise InputError(
            f"rho_max is {rho_max!r}, but must be a number of logits, none (no cap), or null (ten medians): set "
            "loss.rho_max"
        )
    return check_number(rho_max, "rho_max", low=0.0)


def _cap(rho: np.ndarray, inner: np.ndarray, rho_max: float | None, names: list[str]) -> np.ndarray:
    """``rho`` (K,) capped at ``rho_max``, or at 10 medians over the classes in ``inner``."""
    if rho_max is None:
        rho_max = 10.0 * float(np.median(rho[inner])) if inner.any() else 0.0
    capped = np.minimum(rho, rho_max)
    changed = [names[k] for k in np.flatnonzero(capped < rho)]
    if changed:
        warnings.warn(
            f"very few training pixels are of class {', '.join(changed)}: margin capped at {rho_max:.4g} logits "
            "(loss.rho_max)",
            stacklevel=3,
        )
    return capped
