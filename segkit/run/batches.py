"""The batches of a phase: of its training steps, and of its evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segkit.config.schema import Config
from segkit.data.loader import Batch, crop_of, draws_of, eval_batches, train_batches
from segkit.data.sampling import Sampler
from segkit.run.build import eval_transform, train_transform
from segkit.run.plan import PhasePlan
from segkit.run.splits import Splits
from segkit.training import distributed


@dataclass(frozen=True, kw_only=True)
class PhaseBatches:
    """Batches of the phase that ``plan`` describes, as pure functions of the step, for this rank.

    With ``overfit_batches`` in ``config`` its first batches are repeated, and evaluated on.
    """

    config: Config
    plan: PhasePlan
    splits: Splits
    pin_memory: bool
    sampler: Sampler | None = None

    @cached_property
    def fixed(self) -> list[Batch] | None:
        """The batches of ``overfit_batches``; None in a usual run."""
        number = self.config.overfit_batches
        return None if number is None else list(self._load(0, number, augment=False))

    def _load(self, start: int, stop: int, *, augment: bool) -> Iterable[Batch]:
        split = self.splits.train
        return train_batches(
            split,
            transform=train_transform(self.config, self.plan.name, augment=augment),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            phase=self.plan.name,
            start_step=start,
            num_steps=stop,
            workers=self.config.workers,
            pin_memory=self.pin_memory,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            sampler=self.sampler,
        )

    def training(self, start: int) -> Iterable[Batch]:
        """The batches from step ``start`` to the end of the phase."""
        fixed, num_steps = self.fixed, self.plan.num_steps
        if fixed is None:
            return self._load(start, num_steps, augment=True)
        return (fixed[step % len(fixed)] for step in range(start, num_steps))

    def first_crops(self, num: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """At most ``num`` crops of the first epoch, as they are trained on: image (h, w, C) and label (h, w)."""
        split, phase, seed = self.splits.train, self.plan.name, self.config.seed
        augment = self.config.overfit_batches is None
        transform = train_transform(self.config, phase, augment=augment)
        draws = draws_of(0, split, self.sampler, batch_size=max(1, num), seed=seed, phase=phase)[:num]
        return [crop_of(split, transform, draw) for draw in draws]

    def names(self, step: int) -> list[str]:
        """The samples of ``step``, in the order of the batch over all ranks."""
        if self.fixed is not None:
            return list(self.fixed[step % len(self.fixed)].names)
        split, config = self.splits.train, self.config
        draws = draws_of(
            step, split, self.sampler, batch_size=config.batch_size, seed=config.seed, phase=self.plan.name
        )
        return [split.samples[draw.sample].name for draw in draws]

    def evaluation(self) -> Iterable[Any]:
        """The images of an evaluation, each with its number in the split."""
        if self.fixed is not None:
            return _numbered(self.fixed)
        config, limit = self.config, self.config.evaluation.max_images
        return eval_batches(
            self.splits.val if limit is None else self.splits.val[:limit],
            transform=eval_transform(config.phase_dataset(self.plan.name)),
            batch_size=config.evaluation.batch_size,
            workers=config.workers,
            pin_memory=self.pin_memory,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    @property
    def num_images(self) -> tuple[int, int]:
        """The number of images that are trained on, and of those of an evaluation."""
        if self.fixed is not None:
            return (sum(len(batch.names) for batch in self.fixed) * distributed.world_size(),) * 2
        num_val = len(self.splits.val)
        return len(self.splits.train), min(num_val, self.config.evaluation.max_images or num_val)

    def spread(self, wanted: int) -> set[int]:
        """Numbers of up to ``wanted`` images of an evaluation, from all over the split: neighbours are often alike."""
        count = self.num_images[1]
        return {number * count // wanted for number in range(wanted)}


def _numbered(batches: list[Batch]) -> Iterator[Batch]:
    """The batches with the images numbered from 0 over all ranks, as an evaluation wants them."""
    numbers = itertools.count(distributed.rank(), distributed.world_size())
    for batch in batches:
        yield batch._replace(indices=list(itertools.islice(numbers, len(batch.names))))
