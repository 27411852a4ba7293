"""The learning rate as a function of the step alone, so that a run resumes at any step without a state."""

from __future__ import annotations

import math

ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1 / 25 / 1e4
"""Share of the steps in which the one-cycle policy rises, and its first and last factor (as torch's OneCycleLR)."""


def lr_factor(step: int, *, num_steps: int, schedule: str = "poly", warmup_steps: int = 0, power: float = 0.9) -> float:
    """Share of the peak learning rate at ``step`` (from 0) of ``num_steps``.

    After a linear warm-up p = (step - warmup_steps) / (num_steps - warmup_steps) is the progress, and the share is

    ``poly``       (1 - p) ** power
    ``cosine``     (1 + cos(pi p)) / 2
    ``constant``   1
    ``step``       0.1 to the number of thresholds 2/3 and 8/9 that p has reached
    ``one_cycle``  without a warm-up of its own: half a cosine up, another one down (Smith and Topin, 2018)
    """
    if schedule == "one_cycle":
        return _one_cycle(step, num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    remaining = max(num_steps - warmup_steps, 1)
    left = max(0.0, 1 - (step - warmup_steps) / remaining)
    if schedule == "poly":
        return left**power
    if schedule == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    if schedule == "step":
        return 0.1 ** sum(9 * (step - warmup_steps) >= ninths * remaining for ninths in (6, 8))
    assert schedule == "constant", schedule
    return 1.0


def _one_cycle(step: int, num_steps: int) -> float:
    peak = ONE_CYCLE_RISE * num_steps - 1
    if step <= peak:
        return _half_cosine(ONE_CYCLE_START, 1.0, step / peak)
    return _half_cosine(1.0, ONE_CYCLE_END, min(1.0, (step - peak) / (num_steps - 1 - peak)))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
