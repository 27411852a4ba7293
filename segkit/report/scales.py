"""Axes: values to positions in percent, and round numbers for their ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Tick = tuple[float, str]
"""A position, and what is written there."""


@dataclass(frozen=True)
class Scale:
    """From values to percent of the way from ``low`` to ``high``, linear or logarithmic, with round ticks."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(100 * (value - low) / (high - low), 2)

    def values(self, count: int = 5) -> list[float]:
        """About ``count`` round values from low to high."""
        return _log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)

    def ticks(self, text: Callable[[float], str], count: int = 5) -> list[Tick]:
        """The positions and texts of :meth:`values`."""
        return [(self(value), text(value)) for value in self.values(count)]


POINT = 0.01
"""The least span of scores, one percentage point: on a shorter one, noise would look like a difference."""
LEAST_SHARE = 0.01
"""The least span of other values, as a share of the largest."""


def scale(values: Sequence[float], *, log: bool = False, zero: bool = False, least: float = 0.0) -> Scale:
    """The scale that ``values`` fill, with a small margin; ``zero`` puts 0 on it too.

    It is at least ``least`` and :data:`LEAST_SHARE` of the largest value long; a logarithmic one spans 1.56.
    """
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log:
        return Scale(low / 1.25, high * 1.25, log=True)
    least = max(least, LEAST_SHARE * max(abs(low), abs(high))) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    margin = 0.04 * (high - low)
    return Scale(low if zero and low == 0 else low - margin, high if zero and high == 0 else high + margin)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from ``low`` to ``high``."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = math.log10(high / low)
    factors = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return ticks or linear_ticks(low, high, 3)


def compact(value: float) -> str:
    """A tick's text: 0.05, 20, 30k, 1e-6."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"


def percent_tick(value: float) -> str:
    """A share as a tick in percent."""
    return f"{round(100 * value, 6):g}"
