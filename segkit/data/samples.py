"""A data set is a list of image/label pairs, a label table, and two functions that read a pair."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import yaml

from segkit import memory
from segkit.config.compose import config_dir
from segkit.config.dataset import RGB
from segkit.config.targets import instantiate
from segkit.data import bands, decode
from segkit.data.labels import LabelTable
from segkit.errors import InputError, did_you_mean, raised


@dataclass(frozen=True)
class Sample:
    """One image and the file or files of its label (several are merged by the set's ``load_label``).

    ``labels`` is empty in an unlabelled split. ``name`` is unique in its split and carries no extension.
    """

    name: str
    image: Path
    labels: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Item:
    """A read pair: ``image`` (H, W, C), uint8 RGB by default, ``label`` uint8 (H, W) train ids, 255 ignored."""

    image: np.ndarray
    label: np.ndarray
    name: str


def first_label(sample: Sample) -> np.ndarray:
    """Return the raw label (H, W) of a sample with one index PNG."""
    return decode.read_index_png(sample.labels[0])


def image_of(sample: Sample, *, kind: tuple[int, str] = RGB) -> np.ndarray:
    """Return the image (H, W, C) in a sample's image file, of the channels and the type ``kind``."""
    return bands.read_bands(sample.image, kind)


def _function(load: Callable[..., Any]) -> Any:
    """What is called in the end by ``load``, which may have bound options."""
    return load.func if isinstance(load, functools.partial) else load


@dataclass(eq=False, repr=False)
class SampleSet(Sequence[Item]):
    """The samples of one split, read on access; cheap to build, picklable, without state.

    ``load_label(sample)`` gives the raw label as an integer array (H, W), ``load_image(sample)`` the image as uint8
    (H, W, 3), or what :meth:`of_kind` says; both must be picklable (module-level functions or ``functools.partial`` of
    them). ``notes`` are sentences for the user (what was skipped and why). ``labelled`` is worked out from the samples
    unless given; an unlabelled set gives images, and items with a label of ``ignore_index`` only.

    Raises InputError for an empty split, names that occur twice, and splits where only some have labels.
    """

    samples: Sequence[Sample]
    _: KW_ONLY
    table: LabelTable
    name: str
    split: str
    load_label: Callable[[Sample], np.ndarray] = first_label
    load_image: Callable[[Sample], np.ndarray] = image_of
    notes: Sequence[str] = ()
    labelled: bool | None = None
    kind: tuple[int, str] = RGB

    def __post_init__(self) -> None:
        if not isinstance(self.table, LabelTable):
            raise InputError(
                f"the table of {self.name} is a {type(self.table).__name__}, but must be a LabelTable: "
                "segkit.data.labels.table_from_dict makes one"
            )
        self.samples, self.notes = tuple(self.samples), tuple(self.notes)
        if not self.samples:
            raise InputError(
                f"split {self.split!r} of {self.name} has no samples; check dataset.root and the split's folder or "
                "list file"
            )
        self._check_names()
        if self.labelled is None:
            self.labelled = self._all_labelled()

    def _check_names(self) -> None:
        seen: dict[str, Sample] = {}
        for sample in self.samples:
            good = isinstance(sample, Sample) and (type(sample.name), type(sample.labels)) == (str, tuple)
            if not good or not all(isinstance(path, Path) for path in (sample.image, *sample.labels)):
                raise InputError(
                    f"{sample!r} of split {self.split!r} of {self.name} must be a Sample of a name (str), the Path of "
                    "an image and a tuple of Paths of labels: mend the reader"
                )
            if sample.name in seen:
                raise InputError(
                    f"{sample.name!r} occurs twice in split {self.split!r} of {self.name} "
                    f"({seen[sample.name].image} and {sample.image}); remove one from the list file or folder"
                )
            seen[sample.name] = sample

    def _all_labelled(self) -> bool:
        labelled = [bool(sample.labels) for sample in self.samples]
        if any(labelled) and not all(labelled):
            sample = self.samples[labelled.index(False)]
            raise InputError(
                f"image {sample.image} has no label, while other images of split {self.split!r} have one; "
                "add its label or remove the image"
            )
        return all(labelled)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.table.classes

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @property
    def palette(self) -> np.ndarray:
        return self.table.palette

    @property
    def ignore_index(self) -> int:
        return self.table.ignore_index

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> SampleSet: ...
    def __getitem__(self, index: int | slice) -> Item | SampleSet:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        image = self.image(index)
        label = self.label(index) if self.labelled else np.full(image.shape[:2], self.ignore_index, np.uint8)
        self.check_sizes(index, image.shape[:2], label.shape)
        return Item(image=image, label=label, name=self.samples[index].name)

    def of_kind(self, kind: tuple[int, str]) -> SampleSet:
        """Return the set with images of so many channels of a type (uint8, uint16, float32), as its files have."""
        load = self.load_image
        if load is image_of and kind != RGB:  # whose fingerprint stays
            load = functools.partial(image_of, kind=kind)
        return dataclasses.replace(self, kind=kind, load_image=load)

    def shrinkable(self, index: int) -> bool:
        """Return True if :meth:`image` heeds ``shrink`` here: a plain JPEG file."""
        suffix = self.samples[index].image.suffix.lower()
        return self.load_image is image_of and suffix in (".jpg", ".jpeg")

    def image(self, index: int, *, shrink: int = 1) -> np.ndarray:
        """Return the image (H, W, C) alone; where :meth:`shrinkable`, at 1/``shrink`` of its size.

        Raises InputError for one of other channels or another type than the set's.
        """
        sample = self.samples[index]
        shrunk = shrink > 1 and self.shrinkable(index)
        image = decode.read_rgb(sample.image, shrink=shrink) if shrunk else self._read(self.load_image, sample)
        bands.check_bands(image, sample.image, self.kind)
        return image

    def label(self, index: int) -> np.ndarray:
        """Return the label (H, W) uint8 train ids alone; raises InputError in an unlabelled split."""
        return self.to_train(index, self.raw_label(index))

    def raw_label(self, index: int) -> np.ndarray:
        """Return the label (H, W) as the reader gives it, before the label table.

        Raises InputError in an unlabelled split.
        """
        sample = self.samples[index]
        self.check_labelled()
        raw = self._read(self.load_label, sample)
        if raw.ndim != 2 or not raw.size or not np.issubdtype(raw.dtype, np.integer):
            raise InputError(
                f"load_label gives {raw.dtype} of the shape {raw.shape} for {sample.name} of {self.name}, but must "
                "give integers (H, W): mend the reader"
            )
        return raw

    def _read(self, load: Callable[[Sample], np.ndarray], sample: Sample) -> np.ndarray:
        """Call ``load``; InputError if it gives no array, or fails and is of the user's own."""
        what = "load_image" if load is self.load_image else "load_label"
        try:
            value: Any = load(sample)
        except Exception as error:
            ours = getattr(_function(load), "__module__", "").startswith("segkit.")
            if ours or isinstance(error, InputError) or memory.is_out_of_memory(error):
                raise
            raise InputError(
                f"{what} fails for {sample.name} of {self.name} ({raised(error)}): mend the reader"
            ) from error
        if not isinstance(value, np.ndarray):
            kind = type(value).__name__
            raise InputError(f"{what} gives a {kind} for {sample.name} of {self.name}, no array: mend the reader")
        return value

    def check_labelled(self) -> None:
        """Raise InputError for an unlabelled split."""
        if not self.labelled:
            raise InputError(
                f"split {self.split!r} of {self.name} has no labels; use a labelled split "
                "(dataset.train_split, dataset.val_split) or `segkit predict`"
            )

    def to_train(self, index: int, raw: np.ndarray) -> np.ndarray:
        """Return train ids (H, W) uint8 of the raw label of sample ``index``; an InputError names its file."""
        sample = self.samples[index]
        return self.table.to_train(raw, file=sample.labels[0] if sample.labels else sample.name)

    def check_sizes(
        self, index: int, image_size: tuple[int, ...], label_size: tuple[int, ...], *, shrink: int = 1
    ) -> None:
        """Raise InputError unless both sizes (height, width) are equal, or the image is 1/``shrink`` of the label."""
        if tuple(image_size) == tuple(-(-side // shrink) for side in label_size):
            return
        sample = self.samples[index]
        image_h, image_w = image_size if shrink == 1 else bands.image_size(sample.image)
        label_h, label_w = label_size
        if (image_h, image_w) == (label_h, label_w):  # a file that is always decoded at its own size
            return
        label_file = sample.labels[0] if sample.labels else sample.name
        turned = (label_w, label_h) == (image_h, image_w) and decode.orientation(sample.image) > 4
        cure = "turn the pixels of the image and remove its orientation tag" if turned else "mend the pair"
        raise InputError(
            f"image {sample.image} is {image_w}x{image_h} but its label {label_file} is {label_w}x{label_h}; "
            f"both must have the same size: {cure} or remove it from the split"
        )

    def check_file(self, index: int, label_size: tuple[int, ...]) -> None:
        """:meth:`check_sizes` by the header of the image's file, unless a reader of one's own reads it.

        Raises InputError for a file of another kind as well, as far as headers tell it, and for one that was cut off:
        one that may have been is decoded.
        """
        if _function(self.load_image) is not image_of:
            return
        size, is_whole = bands.read_header(self.samples[index].image, self.kind)
        self.check_sizes(index, size, label_size)
        if not is_whole:
            self.image(index)

    def subset(self, indices: Sequence[int]) -> SampleSet:
        """Return the same set with these samples only."""
        return dataclasses.replace(self, samples=[self.samples[i] for i in indices])


def open_dataset(name: str, *, root: Path | str | None = None, split: str, **options: Any) -> SampleSet:
    """Open ``split`` of data set ``name`` (as in configs/dataset/) under ``root``.

    ``root`` defaults to the folder that the data set's config names. ``options`` replace reader options of that config;
    ``in_channels`` (3) and ``dtype`` ("uint8") are those of its images.
    Raises InputError for unknown names, splits and options, and for all that a reader refuses.
    """
    config = _dataset_config(name)
    kind = options.pop("in_channels", RGB[0]), options.pop("dtype", RGB[1])
    reader = dict(config["reader"])
    unknown = sorted(set(options) - set(reader) | set(options) & {"_target_"})
    if unknown:
        allowed = ", ".join(sorted(set(reader) - {"_target_"})) or "none"
        raise InputError(f"data set {name} has no option {unknown[0]!r}; its options are: {allowed}")
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    facts = {"root": root if root is not None else config.get("root"), "split": split}
    opened: SampleSet = instantiate({**reader, **options}, facts, key="dataset.reader")
    return opened.of_kind(kind)


def _dataset_config(name: str) -> dict[str, Any]:
    folder = config_dir() / "dataset"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        hint = did_you_mean(name, known)
        raise InputError(f"there is no data set {name!r}: {hint}configs/dataset has {', '.join(known)}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))
