"""Batches for training and evaluation, read and augmented by worker processes.

Which samples make up step ``s`` of a phase, in which order, and how each is augmented, is a pure function of (seed,
phase, epoch, index). Workers therefore hold no random state, any number of them gives bitwise the same batches, and
starting at step s costs nothing but computing one permutation. No global generator is read or moved.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from segkit.data.decode import pixel_limit
from segkit.data.samples import SampleSet
from segkit.data.sampling import Sampler, epoch_draws, generator
from segkit.data.transforms import EvalTransform, TrainTransform
from segkit.data.workers import START, forking, signals_later, start_worker
from segkit.errors import InputError
from segkit.runtime import drawing

PREFETCH = 2
"""Batches that each worker prepares ahead."""


class Batch(NamedTuple):
    """``images`` (N, C, H, W) of the set's kind, ``labels`` uint8 (N, H, W), the samples' names and their indices."""

    images: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    indices: list[int]


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return the number of full batches in one pass; at least 1: a set smaller than a batch makes one smaller batch."""
    return max(1, num_samples // batch_size)


class Draw(NamedTuple):
    """A sample of a step: its number, the class that its crop must hold (-1: any), and what seeds its augmentation."""

    sample: int
    held: int
    key: tuple[Any, ...]


def draws_of(
    step: int, dataset: SampleSet, sampler: Sampler | None, *, batch_size: int, seed: int, phase: str
) -> list[Draw]:
    """Return what makes the batch of ``step``, over all ranks: all samples where there are fewer than ``batch_size``.

    A sampler may draw a sample twice in an epoch, so its crops are seeded by their place as well.
    """
    epoch, number = divmod(step, steps_per_epoch(len(dataset), batch_size))
    drawn = epoch_draws(sampler, len(dataset), seed=seed, phase=phase, epoch=epoch)
    found = []
    for place in range(number * batch_size, min((number + 1) * batch_size, len(dataset))):
        index = int(drawn.indices[place])
        key = ("augment", seed, phase, epoch, index) + (() if sampler is None else (place,))
        found.append(Draw(index, int(drawn.classes[place]), key))
    return found


def crop_of(dataset: SampleSet, transform: TrainTransform, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Return the training crop of a draw: image (h, w, C), label uint8 (h, w).

    The label is read first: its size decides the window, and the window how finely the image is decoded.
    """
    index = draw.sample
    raw = dataset.raw_label(index)
    hold = None
    if draw.held >= 0:
        pixels = np.flatnonzero(dataset.to_train(index, raw) == draw.held)
        if pixels.size:  # else the label has changed since it was counted
            hold = divmod(int(pixels[generator("hold", *draw.key).integers(pixels.size)]), raw.shape[1])
    name = f"image {dataset.samples[index].image}"
    window = transform.draw((raw.shape[0], raw.shape[1]), generator(*draw.key), hold=hold, name=name)
    shrink = window.shrink if dataset.shrinkable(index) else 1
    image = dataset.image(index, shrink=shrink)
    dataset.check_sizes(index, image.shape[:2], raw.shape, shrink=shrink)
    shrink = 1 if image.shape[:2] == raw.shape else shrink
    label_cut = dataset.to_train(index, window.cut(raw))
    return transform.finish(window.cut(image, shrink), label_cut, window)


class _Items(Dataset[Batch | InputError]):
    """What :meth:`batch` makes of a number; an InputError is handed over as a value (see :func:`_run`)."""

    def __getitem__(self, index: int) -> Batch | InputError:
        try:
            return self.batch(index)
        except InputError as error:
            return error

    def batch(self, index: int) -> Batch:
        """Return batch ``index``; raises InputError."""
        raise NotImplementedError


@dataclass(eq=False)
class _TrainSteps(_Items):
    """Item ``s`` is the batch of step ``s``."""

    dataset: SampleSet
    transform: TrainTransform
    batch_size: int
    seed: int
    phase: str
    rank: int
    world_size: int
    sampler: Sampler | None

    def batch(self, index: int) -> Batch:
        where: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "phase": self.phase}
        draws = draws_of(index, self.dataset, self.sampler, **where)[self.rank :: self.world_size]  # this rank's
        indices = [draw.sample for draw in draws]
        height, width = self.transform.crop
        channels, dtype = self.dataset.kind
        images = torch.empty((len(indices), channels, height, width), dtype=getattr(torch, dtype))
        labels = torch.empty((len(indices), height, width), dtype=torch.uint8)
        for row, draw in enumerate(draws):
            image, label = crop_of(self.dataset, self.transform, draw)
            _planes(image, images[row])
            labels[row] = torch.from_numpy(label)
        return Batch(images, labels, [self.dataset.samples[i].name for i in indices], indices)


@dataclass(eq=False)
class _EvalItems(_Items):
    """Item ``i`` is sample ``i`` as a batch of one."""

    dataset: SampleSet
    transform: EvalTransform

    def batch(self, index: int) -> Batch:
        item = self.dataset[index]
        name = f"image {self.dataset.samples[index].image}"
        image, label = self.transform(item.image, item.label, name=name)
        channels, dtype = self.dataset.kind
        images = torch.empty((1, channels, *image.shape[:2]), dtype=getattr(torch, dtype))
        _planes(image, images[0])
        return Batch(images, torch.from_numpy(np.ascontiguousarray(label))[None], [item.name], [index])


def _planes(image: np.ndarray, target: torch.Tensor) -> None:
    """Write an image (H, W, C) into a contiguous tensor (C, H, W)."""
    planes = target.numpy()
    if len(planes) == 3:
        cv2.split(image, [planes[0], planes[1], planes[2]])
    else:  # of which OpenCV has no fast or no way
        planes[:] = image.transpose(2, 0, 1)


@dataclass(eq=False)
class Batches(Iterable[Batch]):
    """An iterable of batches; every ``iter()`` begins anew, and its workers end with that iterator."""

    start: Callable[[], Iterator[Batch]]
    num_batches: int | None

    def __iter__(self) -> Iterator[Batch]:
        return self.start()

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("the number of these batches depends on the sizes of the images")
        return self.num_batches


def train_batches(
    dataset: SampleSet,
    *,
    transform: TrainTransform,
    batch_size: int,
    seed: int,
    phase: str,
    start_step: int,
    num_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    sampler: Sampler | None = None,
) -> Batches:
    """Return the batches of steps ``start_step`` .. ``num_steps`` - 1 of a phase.

    Step s is batch s % n of epoch s // n, n = ``steps_per_epoch``; samples that fill no batch are left out of that
    epoch.  ``batch_size`` counts all processes; ``rank`` takes rows ``rank::world_size`` of the global batch.
    ``sampler``: what an epoch draws, all samples once by default.
    Raises InputError (while iterating, the reader's own) for bad samples, and at once for an unlabelled split or a
    batch that cannot be shared out equally.
    """
    assert start_step >= 0, start_step
    assert 0 <= rank < world_size, (rank, world_size)
    if not dataset.labelled:
        raise InputError(
            f"split {dataset.split!r} of {dataset.name} has no labels, so it cannot be trained on; set "
            "dataset.train_split to a labelled split"
        )
    rows = min(batch_size, len(dataset))
    if rows % world_size:
        there, cure = "", f"set batch_size to a multiple of {world_size}"
        if rows < batch_size:
            most = rows - rows % world_size
            there, cure = ", all that there are,", f"set batch_size to {most}" if most else f"start at most {rows}"
        raise InputError(
            f"a batch of {rows} images{there} cannot be shared out equally to {world_size} processes; {cure}"
        )
    steps = _TrainSteps(dataset, transform, batch_size, seed, phase, rank, world_size, sampler)
    todo = range(start_step, max(start_step, num_steps))
    start = functools.partial(_run, steps, todo, workers=workers, pin_memory=pin_memory)
    return Batches(start, len(todo))


def eval_batches(
    dataset: SampleSet,
    *,
    transform: EvalTransform,
    batch_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Return the samples ``rank::world_size`` in order, each once; consecutive ones of equal size share a batch."""
    assert 0 <= rank < world_size, (rank, world_size)
    items = _EvalItems(dataset, transform)
    todo = range(rank, len(dataset), world_size)

    def start() -> Iterator[Batch]:
        single = _run(items, todo, workers=workers, pin_memory=pin_memory and batch_size == 1)
        return single if batch_size == 1 else _grouped(single, batch_size, pin_memory=pin_memory)

    return Batches(start, len(todo) if batch_size == 1 else None)


def _grouped(single: Iterator[Batch], batch_size: int, *, pin_memory: bool) -> Iterator[Batch]:
    for _, alike in itertools.groupby(single, lambda batch: (batch.images.shape, batch.labels.shape)):
        while held := list(itertools.islice(alike, batch_size)):
            images, labels = torch.cat([b.images for b in held]), torch.cat([b.labels for b in held])
            if pin_memory and torch.cuda.is_available():
                images, labels = images.pin_memory(), labels.pin_memory()
            yield Batch(images, labels, [n for b in held for n in b.names], [i for b in held for i in b.indices])


def _run(items: _Items, todo: Sequence[int], *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yield ``items[i] for i in todo`` in this order, computed by ``workers`` processes (0: by this one)."""
    workers = min(workers, len(todo))
    with warnings.catch_warnings():
        # How many workers pay depends on the files and the disk; the user's number stands.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            items,
            batch_size=None,
            sampler=todo,
            num_workers=workers,
            pin_memory=pin_memory and torch.cuda.is_available(),
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=START if workers else None,
            worker_init_fn=functools.partial(start_worker, limit=pixel_limit()),
            generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global generator
        )
        with forking(), drawing:
            iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a loading process died ({str(error).splitlines()[0]}); there may be too little memory, or too little in "
            "/dev/shm: set workers=0 or fewer, or give the container more shared memory"
        ) from error
    finally:
        with signals_later():  # an exception within __del__ is lost as well
            del iterator  # ends the workers, also where the loop was left early
