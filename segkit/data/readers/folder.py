"""A data set of one's own: images, their labels in the format that they have, and a file of classes.

Layout below ``root``::

    classes.yaml                     names: [...] and, if wished, ids, ignore, colours, unlabelled, crowd
    images/<split>/.../<name>.jpg    labels/<split>/.../<name>.png    (splits as sub-folders), or
    images/.../<name>.jpg            labels/.../<name>.png            <split>.txt (splits as list files), or neither and
                                                                      ``val_fraction`` or ``folds``
    data.yaml                        instead of classes.yaml: YOLO's, which names classes and folders of splits

``names`` are the classes in order. ``ids`` are their values in the label files (default 0, 1, 2, ...), ``ignore`` what
is no class there (values, colours, names; default [255]), ``colours`` their [red, green, blue]. In files of polygons
``unlabelled`` is the class of pixels that no polygon covers, and ``crowd`` that of COCO's crowds (default void). A list
file names one image a line, relative to images/, with or without its extension.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from segkit.data.decode import colour_mode
from segkit.data.files import IMAGE_SUFFIXES, is_folder, visible_entries, walk, without_suffix
from segkit.data.formats import coco, labelme, masks, yolo
from segkit.data.formats.classes import FolderClasses, read_classes
from segkit.data.formats.polygons import YOLO_FILE, Meaning
from segkit.data.labels import VOID, LabelTable
from segkit.data.layout import Layout, group_of, name_share, near_miss, refuse
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

FORMATS = {".json": "labelme", ".txt": "yolo", **dict.fromkeys((".png", ".tif", ".tiff", ".bmp", ".webp"), "masks")}
"""Format of a label whose name ends so."""

WANTED = "images/ (or name another folder in dataset.reader.images), labels/ and classes.yaml"

Files = Mapping[str, list[Path]]
"""{path below a folder without extension: files of that name}."""


def read(
    root: Path | str | None,
    *,
    split: str,
    classes: str = "classes.yaml",
    format: Literal["auto", "masks", "coco", "labelme", "yolo"] = "auto",
    images: str = "images",
    labels: str = "labels",
    label_suffix: str = "",
    val_fraction: float = 0.0,
    folds: int = 0,
    fold: int = 0,
    groups: str | None = None,
) -> SampleSet:
    """Open ``split``: what lies in images/<split> and labels/<split>, or what <split>.txt lists.

    ``classes`` is the file of classes, relative to ``root`` or absolute; ``images`` and ``labels`` are the two folders,
    which may be one. ``format`` of the labels: auto looks which files belong to images. ``label_suffix`` is what the
    name of a label has more than that of its image. A split named test without any label file is unlabelled; in every
    other split each image needs its label, and each label its image.

    ``val_fraction`` and ``folds`` cut train and val out of one set of images, in the order of a hash of each name: val
    is the first round(``val_fraction`` n) of n, or number ``fold`` of ``folds`` equal parts of that order. ``groups``,
    such as ``{group}_*``, says which part of a name is hashed, so that images of one group stay together, and n counts
    groups.
    """
    layout = Layout("folder", root, archives=WANTED)
    cut = _Cut(val_fraction, folds, fold, groups)
    path = layout.root / classes
    if classes == "classes.yaml" and not os.path.exists(path) and os.path.exists(layout.root / YOLO_FILE):
        path = layout.root / YOLO_FILE
    source: str | None = split
    if format in ("auto", "yolo") and (described := yolo.describe(path)):
        top, (table, places) = path.parent, described
        if (images, labels) != ("images", "labels"):
            raise InputError(
                f"dataset.reader has images={images} and labels={labels}, but {path} names the folders of each split: "
                "leave the two out, or write a classes.yaml"
            )
        wanted = "train" if cut.is_made(split) else split
        if wanted not in places or not os.path.isdir(top / places[wanted]):
            cut_out = ", or set dataset.reader.val_fraction=0.2 to cut val out of train" if wanted != "train" else ""
            raise InputError(
                f"{path} names no folder of split {wanted!r} that is below {top}, but {places}: write `{wanted}: "
                f"images/{wanted}` into it{cut_out}"
            )
        place = _Place(layout, top, places[wanted], yolo.labels_of(places[wanted]), label_suffix, "yolo")
        has_val, source = "val" in places, None
    else:
        if not os.path.isdir(layout.root / images) and os.path.isdir(layout.root / "train" / images):
            raise InputError(
                f"{layout.root} has a folder of each split, with {images} in it, but {images}/train and {images}/val "
                f"are wanted, and so for labels: move them, or set dataset.reader.images=train/{images} "
                f"dataset.reader.labels=train/{labels} dataset.reader.val_fraction=0.2 to use train alone"
            )
        top = layout.base(images)
        table = read_classes(path)
        place = _Place(layout, top, images, labels, label_suffix, format)
        has_val = place.has("val")
    if cut.is_made(split):
        if has_val:
            raise InputError(
                f"{top} has a split val already, but val_fraction or folds would cut another one: remove one, or set "
                "dataset.reader.val_fraction=0 and folds=0"
            )
        source = "train" if place.has("train") else None
    samples, found = place.samples(source, test=split == "test")
    if cut.is_made(split):
        samples = cut.part(samples, val=split == "val")
    labelled = [sample for sample in samples if sample.labels]
    if not labelled:
        return SampleSet(samples, table=table, name="folder", split=split)
    own, load = _reading(found, table, labelled[0], path)
    return SampleSet(samples, table=own, name="folder", split=split, load_label=load)


@dataclass(frozen=True)
class _Cut:
    """How train and val are cut out of one set of images; not at all by default."""

    val_fraction: float
    folds: int
    fold: int
    groups: str | None

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(
                f"dataset.reader.val_fraction is {self.val_fraction}, but is a share of the images from 0 to 1: set "
                "dataset.reader.val_fraction=0.2"
            )
        if (self.folds or self.fold) and (self.folds < 2 or not 0 <= self.fold < self.folds or self.val_fraction):
            raise InputError(
                f"dataset.reader has folds={self.folds}, fold={self.fold} and val_fraction={self.val_fraction}, but "
                "takes two folds or more, a fold from 0 on that is less, and no val_fraction then: set "
                "dataset.reader.folds=5 dataset.reader.fold=0"
            )

    def is_made(self, split: str) -> bool:
        return bool(self.val_fraction or self.folds) and split in ("train", "val")

    def part(self, samples: list[Sample], *, val: bool) -> list[Sample]:
        """The samples of one of the two splits."""
        group = {sample.name: group_of(sample.name, self.groups) for sample in samples}
        order = sorted(set(group.values()), key=lambda name: (name_share(name, salt="val"), name))
        start, stop = 0, round(self.val_fraction * len(order))
        if self.folds:
            start, stop = (len(order) * fold // self.folds for fold in (self.fold, self.fold + 1))
        chosen = set(order[start:stop])
        if not chosen or len(chosen) == len(order):
            how = f"folds={self.folds}" if self.folds else f"val_fraction={self.val_fraction}"
            raise InputError(
                f"dataset.reader.{how} puts {'all' if chosen else 'none'} of {len(samples)} images "
                f"({len(order)} groups) into val: set another one"
            )
        return [sample for sample in samples if (group[sample.name] in chosen) == val]


@dataclass(frozen=True)
class _Place:
    """Where images and labels lie, and in which ``format`` the labels are."""

    layout: Layout
    top: Path
    images: str
    labels: str
    suffix: str
    format: str

    def has(self, split: str) -> bool:
        """True if there is a folder, a list file or an annotation file of ``split``."""
        return os.path.isfile(self.top / f"{split}.txt") or self._has_folder(split) or self._coco(split) is not None

    def _has_folder(self, split: str) -> bool:
        return os.path.isdir(self.top / self.images / split)

    def _coco(self, split: str | None) -> Path | None:
        if self.format not in ("auto", "coco"):
            return None
        return coco.find(self.top, split=split, images=self.images, labels=self.labels)

    def samples(self, split: str | None, *, test: bool) -> tuple[list[Sample], str]:
        """The samples of ``split`` (None: of everything) and the format of their labels."""
        list_file = self.top / f"{split}.txt"
        listed = split is not None and os.path.isfile(list_file)
        sub = "" if listed or split is None else split
        if annotations := self._coco(split):
            if self.format == "auto" and os.path.isdir(self.top / self.images / sub):
                images = self._image_files(sub)
                self._kind(self._label_files(sub, images), images, annotations=annotations)
            return coco.samples(annotations, self.top, split=split, images=self.images), "coco"
        if self.format == "coco" and not test:
            raise InputError(
                f"{f'split {split!r} of ' if split else ''}{self.top} has no annotation file of COCO: put it at "
                f"{self.top / self.labels}{f'/{split}' if split else ''}.json, or set dataset.reader.labels"
            )
        if split is not None and not listed and not self._has_folder(split):
            cut = "set dataset.reader.val_fraction=0.2 to cut val out of all images, "
            raise InputError(
                f"split {split!r} of {self.top} does not exist: there is neither a folder "
                f"{self.top / self.images / split} nor a list file {list_file}{near_miss(list_file)}; add one of the "
                f"two, {cut if split in ('train', 'val') else ''}or set dataset.train_split and dataset.val_split to "
                f"{_splits(self.top, self.images)}"
            )
        images = self._image_files(sub)
        found = self._label_files(sub, images)
        kind = self._kind(found, images)
        labels = {key: [path for path in files if FORMATS[path.suffix.lower()] == kind] for key, files in found.items()}
        labels = {key: files for key, files in labels.items() if files}
        end = {"labelme": ".json", "yolo": ".txt"}.get(kind, ".png")
        wanted = f"{self.top / self.labels / sub}/{{id}}{self.suffix}{end}"
        if listed:
            return self._listed(list_file, images, labels, wanted, test=test), kind
        return self._in_folders(sub, images, labels, wanted, test=test), kind

    def _image_files(self, sub: str) -> Files:
        """The images of a folder; a file with the suffix of labels is none where both lie in one folder."""
        files = _files(self.top / self.images / sub, IMAGE_SUFFIXES)
        if not self._in_one_folder or not self.suffix:
            return files
        return {key: paths for key, paths in files.items() if not key.endswith(self.suffix)}

    def _label_files(self, sub: str, images: Files) -> Files:
        """The files of a folder that may be labels, under the names of their images."""
        allowed = frozenset(suffix for suffix, kind in FORMATS.items() if self.format in ("auto", kind))
        own = {path for paths in images.values() for path in paths}
        folder, found = self.top / self.labels / sub, dict[str, list[Path]]()
        for key, paths in (_files(folder, allowed) if os.path.isdir(folder) else {}).items():
            files = [path for path in paths if path not in own and path.name != "classes.txt"]  # a list of YOLO's tools
            if files and key.endswith(self.suffix):
                found[key.removesuffix(self.suffix)] = files
        return {key: files for key, files in found.items() if key in images} if self._in_one_folder else found

    @property
    def _in_one_folder(self) -> bool:
        return os.path.normpath(self.images) == os.path.normpath(self.labels)

    def _kind(self, found: Files, images: Files, *, annotations: Path | None = None) -> str:
        """The format of the labels: the given one, or that of the files that have images; masks if there are none."""
        if self.format != "auto":
            return self.format
        examples = {"coco": annotations} if annotations else {}
        for key, files in found.items():
            for path in files if key in images else ():
                examples.setdefault(FORMATS[path.suffix.lower()], path)
        if len(examples) > 1:
            raise InputError(
                f"labels of {self.top} are of several formats ({', '.join(f'{k}: {p}' for k, p in examples.items())}): "
                f"set dataset.reader.format={next(iter(examples))} or the other"
            )
        return next(iter(examples), "masks")

    def _in_folders(self, sub: str, images: Files, labels: Files, wanted: str, *, test: bool) -> list[Sample]:
        folder, labels_folder = self.top / self.images / sub, self.top / self.labels / sub
        single = {key: _only(files) for key, files in images.items()}
        if not labels and test:
            return [Sample(key, image) for key, image in single.items()]
        if not os.path.isdir(labels_folder):
            raise InputError(
                f"{folder} has images but no labels: folder {labels_folder} does not exist; put one label there for "
                f"every image, or name their folder, as dataset.reader.labels=masks, or ={self.images} for beside them"
            )
        paired = {key: _only(files) for key, files in labels.items()}
        return self.layout.pair(single, paired, image=f"{folder}/{{id}}.jpg", label=wanted)

    def _listed(self, list_file: Path, images: Files, labels: Files, wanted: str, *, test: bool) -> list[Sample]:
        entries = self.layout.entries(list_file, self.top / self.images)
        labelled = not test or any(without_suffix(entry) in labels for entry in entries)
        samples = []
        for entry in entries:
            key, path = without_suffix(entry), self.top / self.images / entry
            found = [file for file in images.get(key, []) if file == path] or images.get(key, [])
            label = Path(wanted.replace("{id}", key))
            if not found:
                refuse(
                    f"{list_file} names {entry!r}, but {path} does not exist{near_miss(path)}; correct the line or add "
                    "the image"
                )
            elif labelled and key not in labels:
                refuse(
                    f"image {found[0]} has no label ({label} is missing{near_miss(label, but=found[0])}); add it or "
                    f"remove the line from {list_file}"
                )
            else:
                samples.append(Sample(key, _only(found), (_only(labels[key]),) if labelled else ()))
        return samples


def _splits(top: Path, images: str) -> str:
    """The splits that are there, for a message."""
    folders = [entry.name for entry in visible_entries(top / images) if is_folder(entry)]
    lists = [entry.name.removesuffix(".txt") for entry in visible_entries(top) if entry.name.endswith(".txt")]
    return ", ".join(sorted({*folders, *lists} - {"classes"})) or "those that you make"


def _reading(kind: str, table: FolderClasses, first: Sample, path: Path) -> tuple[LabelTable, Callable[..., Any]]:
    """The label table and the function that loads a label of the format ``kind``; ``first`` shows what masks are."""
    numbers = {name: number for number, name in enumerate(table.classes)}
    plain = dataclasses.replace(
        table,
        raw_to_train={**{number: number for number in numbers.values()}, VOID: VOID},
        train_to_raw={number: number for number in numbers.values()},
    )
    if kind == "masks":
        mode = colour_mode(first.labels[0])
        if mode is None or (mode == "WEBP" and not table.has_colours):
            return table, masks.load_index
        if not table.has_colours:
            raise InputError(
                f"the labels are colour images ({first.labels[0]}, mode {mode}), but {path} does not say which colour "
                "is which class: add `colours: [[red, green, blue], ...]`, one for each of the names"
            )
        known = [(tuple(colour), number) for number, colour in enumerate(table.palette.tolist())]
        void = [(colour, VOID) for colour in table.void_colours]
        return plain, partial(masks.load_colours, colours=(*known, *void))
    if table.unlabelled is None:
        raise InputError(
            f"{path} does not say what the pixels are that no polygon covers: add `unlabelled: {table.classes[0]}`, "
            "the name of a class, or `unlabelled: void` if they are to be left out"
        )
    values: dict[Any, int] = {**numbers, **dict.fromkeys(table.void_names, VOID)}
    if kind == "yolo" and table.has_ids:
        values = dict(table.raw_to_train)
    elif kind == "yolo":
        values = dict(enumerate(number for number in numbers.values() if number != table.unlabelled))
        values |= {key: VOID for key, number in table.raw_to_train.items() if number == VOID and key not in values}
    meaning = Meaning(values, table.unlabelled, table.crowd, path.name)
    if kind == "coco":
        coco.check_categories(first.labels[0], meaning)
    load = {"coco": coco.load, "labelme": labelme.load, "yolo": yolo.load}[kind]
    return plain, partial(load, meaning=meaning)


def _files(folder: Path, suffixes: frozenset[str]) -> Files:
    """The files of a folder, sorted by their keys; two of one key are no error here, as another split may hold them."""
    found: dict[str, list[Path]] = {}
    for path in walk(folder, suffixes):
        found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return dict(sorted(found.items()))


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        raise InputError(f"{files[0]} and {files[1]} differ in their extension only; remove one of the two")
    return files[0]
