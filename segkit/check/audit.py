"""Look at every file of a split, in parallel processes, and collect all problems instead of raising the first.

The questions: does every image decode to its end, and every label; do both have one size; which raw values do the
labels hold, and does the label table know them; has an image only one colour, or a label no class at all; is the same
image there twice. :mod:`segkit.check.findings` turns the answers into sentences.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segkit.data.bands import image_size
from segkit.data.decode import orientation
from segkit.data.samples import SampleSet
from segkit.data.statistics import raw_histogram
from segkit.data.workers import map_samples
from segkit.errors import InputError
from segkit.memory import is_out_of_memory
from segkit.progress import track

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Look:
    """What was seen of one sample.

    ``raw_pixels``: pixels of each raw label value; ``digest``: hash of the image's decoded pixels; ``brightest``: its
    largest value; ``turned``: it has an orientation tag, which is ignored; ``errors``: the readers' sentences about
    "image", "label" and "size".
    """

    index: int
    image_size: Size | None = None
    raw_pixels: dict[int, int] = field(default_factory=dict)
    digest: str | None = None
    one_colour: bool = False
    brightest: float = 0
    turned: bool = False
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class SplitAudit:
    """What was seen of one split.

    ``indices``: the samples looked at; ``published``: the number of images that the split should have, None if that is
    not known; ``sizes``: images of each (height, width); ``raw_pixels``: pixels of each raw
    label value; ``class_pixels`` and ``class_images``: int64 (K,); ``ignored_pixels``: those whose raw value the table
    maps to ``ignore_index``; ``unknown``: for each raw value that the table does not know, its pixels in each sample;
    ``digests``: the samples that share an image content; ``errors``: a sentence for each sample, about "image", "label"
    and "size".
    """

    dataset: SampleSet
    indices: list[int]
    published: int | None = None
    sizes: Counter[Size] = field(default_factory=Counter)
    raw_pixels: Counter[int] = field(default_factory=Counter)
    class_pixels: np.ndarray = field(init=False)
    class_images: np.ndarray = field(init=False)
    ignored_pixels: int = 0
    brightest: float = 0
    digests: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    errors: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    unknown: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    one_colour: list[int] = field(default_factory=list)
    no_class: list[int] = field(default_factory=list)
    turned: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.class_pixels, self.class_images = np.zeros((2, self.dataset.num_classes), np.int64)

    @property
    def is_complete(self) -> bool:
        """True if every sample was looked at."""
        return len(self.indices) == len(self.dataset)

    @property
    def broken(self) -> set[int]:
        """Samples that cannot be trained on."""
        return set[int]().union(*self.errors.values(), *self.unknown.values())

    def usable(self) -> list[int]:
        """The samples looked at that can be trained on, in the order of the split."""
        broken = self.broken
        return [index for index in self.indices if index not in broken]

    def add(self, look: Look) -> None:
        """Add what was seen of one sample."""
        for about, sentence in look.errors.items():
            self.errors[about][look.index] = sentence
        if look.image_size is not None:
            self.sizes[look.image_size] += 1
        if look.digest is not None:
            self.digests[look.digest].append(look.index)
        self.brightest = max(self.brightest, look.brightest)
        if look.one_colour:
            self.one_colour.append(look.index)
        if look.turned:
            self.turned.append(look.index)
        if look.raw_pixels:
            self._add_label(look)

    def _add_label(self, look: Look) -> None:
        table, present = self.dataset.table, set()
        for value, count in look.raw_pixels.items():
            self.raw_pixels[value] += count
            train = table.raw_to_train.get(value)
            if train is None:
                self.unknown[value][look.index] = count
            elif train == table.ignore_index:
                self.ignored_pixels += count
            else:
                self.class_pixels[train] += count
                present.add(train)
        self.class_images[list(present)] += 1
        if not present:
            self.no_class.append(look.index)


def audit_split(dataset: SampleSet, *, sample: int | None = None, seed: int = 0, workers: int = 0) -> SplitAudit:
    """Look at all samples of ``dataset``, or at ``sample`` random ones drawn with ``seed``.

    Problems of files are collected, never raised. ``workers`` processes do the work (0 and 1: this process).
    Raises InputError if a worker dies.
    """
    indices = list(range(len(dataset)))
    if sample is not None and sample < len(dataset):
        chosen = np.random.default_rng([seed, len(dataset)]).choice(len(dataset), size=sample, replace=False)
        indices = sorted(chosen.tolist())
    audit = SplitAudit(dataset, indices)
    with closing(map_samples(look_at, dataset, indices, workers=workers)) as looks:
        description = f"Checking {dataset.name} {dataset.split}"
        for look in track(looks, description=description, total=len(indices), unit="images"):
            audit.add(look)
    return audit


def look_at(dataset: SampleSet, index: int) -> Look:
    """Read image and label of one sample; an error becomes part of the result, but for one of too little memory."""
    sample = dataset.samples[index]
    seen: dict[str, Any] = {}
    errors: dict[str, str] = {}
    try:
        image = dataset.image(index)
    except Exception as error:
        errors["image"] = _sentence(error, sample.image)
        with suppress(InputError, OSError):
            seen["image_size"] = image_size(sample.image, dataset.kind[0])
    else:
        seen |= {"image_size": image.shape[:2], "digest": _digest(image), "one_colour": _is_one_colour(image)}
        seen["brightest"] = float(image.max())
        seen["turned"] = orientation(sample.image) != 1
    if dataset.labelled:
        try:
            raw = dataset.raw_label(index)
        except Exception as error:
            errors["label"] = _sentence(error, sample.labels[0] if sample.labels else sample.name)
        else:
            seen["raw_pixels"] = raw_histogram(raw)
            try:
                dataset.check_sizes(index, seen.get("image_size", raw.shape), raw.shape)
            except InputError as error:
                errors["size"] = str(error)
    return Look(index, errors=errors, **seen)


def _sentence(error: Exception, file: Path | str) -> str:
    """Return the reader's own sentence, or one that names the file for an error that the reader did not foresee.

    An error of too little memory, which says nothing about the file, is raised again.
    """
    if is_out_of_memory(error):
        raise error
    if isinstance(error, InputError):
        return str(error)
    reason = str(error).splitlines()[0] if str(error) else "no message"
    return f"{file} cannot be read ({type(error).__name__}: {reason}); unpack it again"


def _is_one_colour(image: np.ndarray) -> bool:
    # A few rows first: they decide almost every image.
    return all(bool((part == image[0, 0]).all()) for part in (image[:: max(1, len(image) // 8)], image))


def _digest(image: np.ndarray) -> str:
    """Return a hash of shape and pixels: a copy in another file or another lossless format has the same."""
    shape = image.shape[0].to_bytes(8, "little") + image.shape[1].to_bytes(8, "little")
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, salt=shape).hexdigest()
