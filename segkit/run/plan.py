"""How many steps a phase has, and when it evaluates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from segkit.config.schema import MOST_STEPS, Config
from segkit.data.loader import steps_per_epoch
from segkit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """Steps of one phase. ``evaluate_every`` is in steps; None: at the end of the phase only."""

    name: str
    num_steps: int
    evaluate_every: int | None

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the phase: at each interval, and always at its end."""
        return 1 if self.evaluate_every is None else math.ceil(self.num_steps / self.evaluate_every)


def plan_phase(config: Config, name: str, num_samples: int) -> PhasePlan:
    """The plan of phase ``name`` on a training split of ``num_samples``."""
    phase, evaluation = config.schedule[name], config.evaluation
    per_epoch = steps_per_epoch(num_samples, config.batch_size)
    steps = phase.steps if phase.steps is not None else math.ceil((phase.epochs or 0) * per_epoch)
    if steps > MOST_STEPS:
        raise InputError(f"schedule.{name}.epochs={phase.epochs} makes more than {MOST_STEPS} steps: set a smaller one")
    if phase.warmup_steps > steps:
        raise InputError(
            f"schedule.{name}.warmup_steps is {phase.warmup_steps}, but the phase has {steps} steps: set "
            f"schedule.{name}.warmup_steps={steps // 10}, or train for longer"
        )
    num_steps = min(steps, config.limit_steps or steps)
    if config.overfit_batches is not None and config.overfit_batches > num_steps:
        raise InputError(
            f"overfit_batches is {config.overfit_batches}, but phase {name} has {num_steps} steps: set overfit_batches "
            "lower, or train for longer"
        )
    every = evaluation.every_steps
    if evaluation.every_epochs is not None:
        every = max(1, round(evaluation.every_epochs * per_epoch))
    return PhasePlan(name=name, num_steps=num_steps, evaluate_every=every)
