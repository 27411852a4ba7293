"""Which samples an epoch draws, and which class their crops hold: pure functions of (seed, phase, epoch).

``uniform``: a permutation, each sample once. ``class_balanced``: each class of the split as often as any other, and a
sample that has it; ``rare_crop``: a permutation in which a share of the samples gives way to others that have one of
the rarer half of the classes, with the crop around a pixel of it. Within a class its samples come in turn, in an order
that is drawn anew whenever all have come.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from segkit.errors import InputError


class Draws(NamedTuple):
    """What an epoch trains on, in order: ``indices`` int64 (n,) of samples, ``classes`` (n,) that their crops hold.

    A class of -1: the crop lies anywhere.
    """

    indices: np.ndarray
    classes: np.ndarray


def generator(*key: Any) -> np.random.Generator:
    """Return a generator seeded by the text of ``key``."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def epoch_order(num_samples: int, *, seed: int, phase: str, epoch: int) -> np.ndarray:
    """Return the order of the samples in one epoch: a permutation (num_samples,) int64, pure in its arguments."""
    return generator("order", seed, phase, epoch).permutation(num_samples)


@dataclass(frozen=True, eq=False)
class Sampler:
    """How the samples of an epoch are drawn; ``has_class`` (N, K) bool: which sample has a pixel of which class.

    ``rare``: the classes of ``rare_crop``, which takes the place of a sample with probability ``chance``.
    """

    kind: str
    has_class: np.ndarray
    rare: tuple[int, ...] = ()
    chance: float = 0.0

    def draws(self, *, seed: int, phase: str, epoch: int) -> Draws:
        """Return what one epoch draws: as many samples as there are, pure in its arguments."""
        num, rng = len(self.has_class), generator(self.kind, seed, phase, epoch)
        if self.kind == "class_balanced":
            present = np.flatnonzero(self.has_class.any(0))
            indices, classes, held = np.empty(num, np.int64), in_turn(present, num, rng), np.full(num, -1)
        else:
            indices, classes = epoch_order(num, seed=seed, phase=phase, epoch=epoch), np.full(num, -1)
            chosen = rng.random(num) < self.chance
            classes[chosen] = in_turn(np.array(self.rare), int(chosen.sum()), rng)
            held = classes
        for k in np.unique(classes[classes >= 0]).tolist():
            places = np.flatnonzero(classes == k)
            indices[places] = in_turn(np.flatnonzero(self.has_class[:, k]), len(places), rng)
        return Draws(indices, held)


def make_sampler(kind: str, has_class: np.ndarray, class_pixels: np.ndarray, *, chance: float) -> Sampler:
    """Return the sampler ``kind`` over samples with classes ``has_class`` (N, K); ``class_pixels`` (K,) are counts.

    InputError where a split has one class, so that none is rarer than another.
    """
    present = np.flatnonzero(class_pixels)
    ordered = present[np.argsort(class_pixels[present], kind="stable")]
    if len(present) < 2:
        raise InputError(
            f"dataset.sampler is {kind}, but the labels have {len(present)} of the classes, so that none is rarer than "
            "another: set dataset.sampler=uniform"
        )
    return Sampler(kind, has_class, tuple(ordered[: len(present) // 2].tolist()), chance)


def in_turn(items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``count`` of ``items`` (n,): all in a random order, then all in another one, and so on."""
    rounds = [rng.permutation(items) for _ in range(-(-count // len(items)))]
    return np.concatenate([*rounds, items[:0]])[:count]


@functools.lru_cache(maxsize=4)
def epoch_draws(sampler: Sampler | None, num_samples: int, *, seed: int, phase: str, epoch: int) -> Draws:
    """Return the draws of an epoch of ``num_samples``; without a ``sampler`` :func:`epoch_order`."""
    if sampler is not None:
        return sampler.draws(seed=seed, phase=phase, epoch=epoch)
    return Draws(epoch_order(num_samples, seed=seed, phase=phase, epoch=epoch), np.full(num_samples, -1))
