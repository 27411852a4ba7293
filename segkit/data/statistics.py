"""How many pixels of each class a split has: counted once from the label files, in parallel, and kept.

Margin-offsets, class weights and reports all rest on these counts, so they come from whole label files at full
resolution, never from crops, and are added up in int64.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segkit.data.files import check_readable, read_bytes
from segkit.data.formats.masks import load_index
from segkit.data.labels import narrowed
from segkit.data.samples import SampleSet
from segkit.data.workers import map_samples
from segkit.errors import InputError
from segkit.files import write_atomically
from segkit.progress import track


@dataclass(frozen=True, eq=False)
class LabelCounts:
    """Counts of one split over K classes, in the order of ``classes``.

    ``class_pixels`` int64 (K,): pixels of the class; ``class_images`` int64 (K,): images with at least one;
    ``ignored_pixels``: pixels labelled ``ignore_index``; ``fingerprint``: of the files that were counted.
    """

    class_pixels: np.ndarray
    class_images: np.ndarray
    ignored_pixels: int
    num_images: int
    classes: tuple[str, ...]
    fingerprint: str

    def __post_init__(self) -> None:
        for array in (self.class_pixels, self.class_images):
            assert array.shape == (len(self.classes),), array.shape
            assert array.dtype == np.int64, array.dtype

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with one row per class."""
        rows = {
            name: {"pixels": int(pixels), "images": int(images)}
            for name, pixels, images in zip(self.classes, self.class_pixels, self.class_images, strict=True)
        }
        return {
            "num_images": self.num_images,
            "ignored_pixels": self.ignored_pixels,
            "fingerprint": self.fingerprint,
            "classes": rows,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LabelCounts:
        """Read what :meth:`as_dict` returns; raises ValueError, KeyError or TypeError for something else."""
        rows = content["classes"]
        pixels, images = ([row[key] for row in rows.values()] for key in ("pixels", "images"))
        ignored, num_images = content["ignored_pixels"], content["num_images"]
        if not all(type(number) is int and 0 <= number < 2**63 for number in (*pixels, *images, ignored, num_images)):
            raise ValueError("a count is none")
        return cls(
            class_pixels=np.array(pixels, np.int64),
            class_images=np.array(images, np.int64),
            ignored_pixels=ignored,
            num_images=num_images,
            classes=tuple(rows),
            fingerprint=str(content["fingerprint"]),
        )


def fingerprint(dataset: SampleSet) -> str:
    """Return a hash (32 hex digits) of everything that the content of a split depends on, wherever it lies.

    Names, sizes and modification times of all its files, its order, and :func:`meaning`. Raises InputError for a file
    that is missing.
    """
    digest = hashlib.blake2b(meaning(dataset).encode(), digest_size=16)
    for sample in dataset.samples:
        digest.update(f"\n{sample.name}".encode())
        for path in (sample.image, *sample.labels) if sample.labels or not dataset.labelled else ():
            digest.update(file_state(path).encode())
    return digest.hexdigest()


def meaning(dataset: SampleSet) -> str:
    """Return, as JSON, what the files of a split mean: the label table, and the readers with their options."""
    table = dataset.table
    head = {
        "split": dataset.split,
        "classes": table.classes,
        "raw_to_train": sorted(table.raw_to_train.items()),
        "readers": [_describe(reader) for reader in (dataset.load_image, dataset.load_label)],
        "labelled": dataset.labelled,
    }
    return json.dumps(head, default=str)


def file_state(path: Path) -> str:
    """The last two parts of ``path``, its size and its time of modification; InputError if it is missing."""
    text = os.fspath(path)  # strings, not Paths: there may be tens of thousands of files
    try:
        state = os.stat(text)
        if not stat.S_ISREG(state.st_mode):
            raise FileNotFoundError
    except OSError:
        check_readable(path, role="file")  # says in a sentence what is wrong
        raise
    place = "/".join(text.split(os.sep)[-2:])
    return f"\t{place} {state.st_size} {state.st_mtime_ns}"


def _describe(reader: Callable[..., Any]) -> str:
    """Name and bound options of a reading function; not its address, which differs from run to run."""
    if isinstance(reader, functools.partial):
        options = sorted(reader.keywords.items())
        return f"{_describe(reader.func)} {reader.args!r} {options!r}"
    return f"{reader.__module__}.{reader.__qualname__}"


def count_labels(dataset: SampleSet, *, workers: int, cache_dir: Path | str | None = None) -> LabelCounts:
    """Count the labels of every sample, in ``workers`` processes (0 and 1: in this one).

    The result is kept as JSON under ``cache_dir``/label_counts and taken from there as long as the :func:`fingerprint`
    is the same. Raises InputError for an unlabelled split, for any label that the reader refuses or that is of another
    size than its image, and for a ``cache_dir`` that cannot be written.
    """
    return counts_and_classes(dataset, workers=workers, cache_dir=cache_dir)[0]


def counts_and_classes(
    dataset: SampleSet, *, workers: int, cache_dir: Path | str | None
) -> tuple[LabelCounts, np.ndarray]:
    """:func:`count_labels`, and which sample has a pixel of which class, bool (N, K), kept beside it."""
    found = _counted(dataset, workers=workers, cache_dir=cache_dir)
    if sentence := one_class(found[0].class_pixels, found[0].ignored_pixels, dataset):
        raise InputError(sentence)
    return found


def check_labels(dataset: SampleSet, *, workers: int, cache_dir: Path | str) -> None:
    """Raise InputError as :func:`count_labels` does for a label, so that no evaluation meets it after hours."""
    _counted(dataset, workers=workers, cache_dir=cache_dir)


def _counted(dataset: SampleSet, *, workers: int, cache_dir: Path | str | None) -> tuple[LabelCounts, np.ndarray]:
    mark = fingerprint(dataset)
    cached = None if cache_dir is None else Path(cache_dir) / "label_counts" / f"{mark}.npz"
    found = None if cached is None else _from_cache(cached, dataset, mark)
    if found is None:
        if cached is not None:
            make_writable(cached.parent)
        found = _count(dataset, mark, workers=workers)
        if cached is not None:
            _store(cached, *found)
    return found


def one_class(class_pixels: np.ndarray, ignored_pixels: int, dataset: SampleSet) -> str | None:
    """A sentence if a folder's labels hold one class of several, and void, as masks of 0 and 255 without ids do."""
    present = np.flatnonzero(class_pixels)
    if dataset.load_label is not load_index or len(dataset.classes) == 1 or len(present) > 1 or ignored_pixels == 0:
        return None
    table = dataset.table
    values = [value for value, train in table.raw_to_train.items() if train == table.ignore_index]
    ids = [table.train_to_raw[k] for k in range(len(dataset.classes))]
    held = f"no class but {[dataset.classes[k] for k in present]}, the other" if len(present) else "no class, all"
    return (
        f"the labels of split {dataset.split} have {held} "
        f"{ignored_pixels} pixels have a value that is ignored (of {values}): where that is a class, as in masks of 0 "
        f"and 255, write its value into {table.name}: `ids: {[*ids[:-1], values[-1]]}` and `ignore: []`"
    )


def _from_cache(path: Path, dataset: SampleSet, mark: str) -> tuple[LabelCounts, np.ndarray] | None:
    """What :func:`_store` has kept; None where it is missing, damaged or not ours, so that it is written anew."""
    try:
        with np.load(io.BytesIO(read_bytes(path, role="cache")), allow_pickle=False) as kept:  # by their checksums
            counts, has_class = LabelCounts.from_dict(json.loads(str(kept["counts"]))), kept["has_class"]
    except Exception:  # json and numpy raise what they like for a file that is none
        return None
    ours = counts.fingerprint == mark and counts.classes == dataset.classes and counts.num_images == len(dataset)
    alike = has_class.dtype == bool and has_class.shape == (len(dataset), dataset.num_classes)
    return (counts, has_class) if ours and alike else None


def _store(path: Path, counts: LabelCounts, has_class: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, counts=json.dumps(counts.as_dict()), has_class=has_class)
    write_atomically(path, content.getvalue())


def make_writable(folder: Path) -> None:
    """Make ``folder``, one in ``cache_dir``; InputError if nothing can be written there, before hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cache_dir is {folder.parent}, where nothing can be written ({error.strerror}): set cache_dir=DIR, a "
            "folder for finished phases and label counts"
        ) from None


def _count(dataset: SampleSet, mark: str, *, workers: int) -> tuple[LabelCounts, np.ndarray]:
    num = dataset.num_classes
    pixels, has_class = np.zeros(256, np.int64), np.zeros((len(dataset), num), bool)
    with closing(map_samples(label_histogram, dataset, range(len(dataset)), workers=workers)) as counted:
        description = f"Counting labels of {dataset.name} {dataset.split}"
        samples = track(counted, description=description, total=len(dataset), unit="images")
        for index, counts in enumerate(samples):
            pixels += counts
            has_class[index] = counts[:num] > 0
    found = LabelCounts(
        class_pixels=pixels[:num].copy(),
        class_images=has_class.sum(0),
        ignored_pixels=int(pixels[dataset.ignore_index]),
        num_images=len(dataset),
        classes=dataset.classes,
        fingerprint=mark,
    )
    return found, has_class


def label_histogram(dataset: SampleSet, index: int) -> np.ndarray:
    """Count the pixels of each train id 0..255 in one label: int64 (256,). InputError as :func:`count_labels`."""
    raw, train_of = dataset.raw_label(index), dataset.table.raw_to_train
    dataset.check_file(index, raw.shape)
    found = raw_histogram(raw)
    if not found.keys() <= train_of.keys():
        dataset.to_train(index, raw)  # which refuses unknown values
    counts = np.zeros(256, np.int64)
    for value, pixels in found.items():
        counts[train_of[value]] += pixels
    return counts


def image_statistics(dataset: SampleSet, *, divisor: float, workers: int) -> dict[str, list[float]]:
    """Return ``mean`` and ``std`` of each channel over all pixels of all images, of values divided by ``divisor``.

    Raises InputError as the readers do.
    """
    with closing(map_samples(_moments, dataset, range(len(dataset)), workers=workers)) as found:
        description = f"Averaging images of {dataset.name} {dataset.split}"
        rows = list(track(found, description=description, total=len(dataset), unit="images"))
    pixels, means, variances = (np.array(column) for column in zip(*rows, strict=True))
    share = (pixels / pixels.sum())[:, None]
    mean = (share * means).sum(0)
    deviation = np.sqrt((share * (variances + (means - mean) ** 2)).sum(0))
    return {"mean": (mean / divisor).tolist(), "std": (deviation / divisor).tolist()}


def _moments(dataset: SampleSet, index: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of pixels of an image, mean and variance of each channel, in float64."""
    image = dataset.image(index).astype(np.float64)
    return image.shape[0] * image.shape[1], image.mean((0, 1)), image.var((0, 1))


def raw_histogram(raw: np.ndarray) -> dict[int, int]:
    """Return {value: pixels} of an integer array of any type."""
    raw = narrowed(raw)
    if raw.dtype != np.uint8:
        values, counts = np.unique(raw, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))
    counts = byte_histogram(raw)
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


def byte_histogram(array: np.ndarray) -> np.ndarray:
    """Count each value 0..255 of a uint8 array: int64 (256,).

    Labels are mostly runs of one value, and counting a run pixel by pixel is slow, as each step waits for the one
    before. So runs of equal eight-pixel words are found first: those of one value count with their lengths (in float64,
    exact up to 2**53), and only the pixels of the others one by one.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    length = flat.size // 8 * 8
    words = flat[:length].view(np.uint64)
    last = np.append(np.flatnonzero(words[1:] != words[:-1]), words.size - 1)
    if words.size == 0 or 4 * last.size > words.size:
        return np.bincount(flat, minlength=256)
    lengths = last + 1
    lengths[1:] -= lengths[:-1].copy()
    runs = words.take(last)
    value = runs.astype(np.uint8)
    is_plain = runs == value * np.uint64(0x0101010101010101)
    plain, mixed = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)
    counts = 8 * np.bincount(value.take(plain), weights=lengths.take(plain), minlength=256)
    others = np.repeat(runs.take(mixed), lengths.take(mixed)).view(np.uint8)
    return counts.astype(np.int64) + np.bincount(others, minlength=256) + np.bincount(flat[length:], minlength=256)
