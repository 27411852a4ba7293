"""A data set of one's own: a folder of images, a folder of index masks, and a file of classes.

Layout below ``root``::

    classes.yaml                     names: [...] and, if wished, ids: [...], ignore: [...], colours: [...]
    images/<split>/.../<name>.jpg    labels/<split>/.../<name>.png    (splits as sub-folders), or
    images/.../<name>.jpg            labels/.../<name>.png            <split>.txt (splits as list files)

``names`` are the classes in order. ``ids`` are their values in the label files (default 0, 1, 2, ...),
``ignore`` the values that are no class (default [255]), ``colours`` their [red, green, blue]. A list file
names one image a line, relative to images/, with or without its extension. Labels are 8-bit PNG, grey or
palette.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segkit.data.labels import LabelTable
from segkit.data.layout import base_folder, check_unique, inside, pair, read_list, refuse, require_root
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
CLASS_KEYS = ("names", "ids", "ignore", "colours")
WANTED = "images/, labels/ and classes.yaml"


def read(root: Path | str | None, *, split: str, classes: str = "classes.yaml") -> SampleSet:
    """Open ``split``: what lies in images/<split> and labels/<split>, or what <split>.txt lists.

    ``classes`` is the file of classes, relative to ``root`` or absolute. A split without any label file is
    unlabelled if it is named test; in every other split each image needs its label, and each label its image.
    """
    root = require_root(root, dataset="folder")
    top = base_folder(root, marker="images", dataset="folder", archives=WANTED)
    table = read_classes(top / classes)
    list_file = top / f"{split}.txt"
    if os.path.isfile(list_file):
        samples = _listed(top, list_file, labelled=split != "test" or os.path.isdir(top / "labels"))
    elif os.path.isdir(top / "images" / split):
        samples = _in_folders(top, split)
    else:
        raise InputError(
            f"split {split!r} of {top} does not exist: there is neither a folder {top / 'images' / split} "
            f"nor a list file {list_file}; add one of the two, or set dataset.train_split and "
            f"dataset.val_split to {_splits(top)}"
        )
    return SampleSet(samples, table=table, name="folder", split=split)


def _splits(top: Path) -> str:
    """The splits that are there, for a message."""
    folders = [entry.name for entry in os.scandir(top / "images") if entry.is_dir()]
    lists = [entry.name.removesuffix(".txt") for entry in os.scandir(top) if entry.name.endswith(".txt")]
    return ", ".join(sorted({*folders, *lists})) or "splits that you make"


def _in_folders(top: Path, split: str) -> list[Sample]:
    folder, labels_folder = top / "images" / split, top / "labels" / split
    images = _files(folder, IMAGE_SUFFIXES)
    if not os.path.isdir(labels_folder):
        if split == "test":
            return [Sample(key, image) for key, image in images.items()]
        raise InputError(
            f"split {split!r} of {top} has images but no labels: folder {labels_folder} does not exist; put "
            "one 8-bit PNG of class ids there for every image"
        )
    pairs = pair(
        images,
        _files(labels_folder, (".png",)),
        dataset="folder",
        expected_image=f"{folder}/{{id}}.jpg",
        expected_label=f"{labels_folder}/{{id}}.png",
    )
    return [Sample(key, image, (label,)) for key, image, label in pairs]


def _listed(top: Path, list_file: Path, *, labelled: bool) -> list[Sample]:
    images = _files(top / "images", IMAGE_SUFFIXES)
    labels = _files(top / "labels", (".png",)) if labelled else {}
    entries = read_list(list_file, dataset="folder", archives=WANTED)
    check_unique(entries, file=list_file)
    samples = []
    for entry in entries:
        inside(top / "images", entry, list_file=list_file)
        key = _key(entry)
        if key not in images:
            refuse(
                InputError(
                    f"{list_file} names {entry!r}, but {top / 'images' / entry} does not exist; correct the line "
                    "or add the image"
                )
            )
        elif labelled and key not in labels:
            refuse(
                InputError(
                    f"image {images[key]} has no label ({top / 'labels' / key}.png is missing); add it or remove "
                    f"the line from {list_file}"
                )
            )
        else:
            samples.append(Sample(key, images[key], (labels[key],) if labelled else ()))
    return samples


def _key(relative: str) -> str:
    """The path below images/ without an image's extension, with forward slashes."""
    path = Path(relative)
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """{path below ``folder`` without extension: path} of all files with one of ``suffixes``, sorted."""
    if not os.path.isdir(folder):
        raise InputError(f"folder {folder} does not exist; a data set of one's own has {WANTED} (dataset.root)")
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in suffixes or name.startswith("."):
                continue
            key = (Path(parent).relative_to(folder) / stem).as_posix()
            path = Path(parent) / name
            if key in found:
                raise InputError(f"{found[key]} and {path} differ in their extension only; remove one of the two")
            found[key] = path
    return dict(sorted(found.items()))


def read_classes(path: Path) -> LabelTable:
    """The label table that a file of classes describes; InputError for all that does not fit together."""
    content = _load_yaml(path)
    names = content.get("names")
    if not isinstance(names, list) or not names:
        raise InputError(f"{path} has no list of names; write for example `names: [background, tool]`")
    num = len(names)
    ids = _integers(content.get("ids"), path, key="ids", default=list(range(num)))
    ignore = _integers(content.get("ignore"), path, key="ignore", default=[255])
    if len(ids) != num:
        raise InputError(f"{path} has {num} names but {len(ids)} ids; give one id for each name")
    colours = content.get("colours")
    if colours is not None and (not isinstance(colours, list) or len(colours) != num):
        length = len(colours) if isinstance(colours, list) else "no list of"
        raise InputError(f"{path} has {num} names but {length} colours; give [red, green, blue] for each name")
    twice = sorted({value for value in [*ids, *ignore] if [*ids, *ignore].count(value) > 1})
    if twice:
        raise InputError(f"{path} uses value {twice[0]} twice among ids and ignore; each value has one meaning")
    raw_to_train = {**dict(zip(ids, range(num), strict=True)), **dict.fromkeys(ignore, 255)}
    return LabelTable(
        name=str(path),
        classes=tuple(str(name) for name in names),
        palette=default_palette(num) if colours is None else _colours(colours, path),
        raw_to_train=raw_to_train,
        train_to_raw=dict(enumerate(ids)),
        source=(str(path),),
    )


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; write one with `names: [background, tool]`, the classes of the label "
            "files in order, or name another file in dataset.reader.classes"
        ) from None
    except PermissionError:
        raise InputError(f"{path} may not be read by this user; run `chmod u+r {path}`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML ({str(error).splitlines()[0]}); correct it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping; write for example `names: [background, tool]`")
    unknown = sorted(str(key) for key in content if key not in CLASS_KEYS)
    if unknown:
        raise InputError(f"{path} has an unknown key {unknown[0]!r}; allowed are {', '.join(CLASS_KEYS)}")
    return content


def _integers(value: Any, path: Path, *, key: str, default: list[int]) -> list[int]:
    if value is None:
        return default
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= 255 for item in value):
        raise InputError(f"{path} has {key}: {value}, but a list of whole numbers from 0 to 255 is wanted")
    return value


def _colours(colours: list[Any], path: Path) -> np.ndarray:
    for colour in colours:
        if (
            not isinstance(colour, list)
            or len(colour) != 3
            or not all(type(item) is int and 0 <= item <= 255 for item in colour)
        ):
            raise InputError(f"{path} has the colour {colour}, but [red, green, blue] of 0 to 255 is wanted")
    return np.array(colours, np.uint8)


def default_palette(num_classes: int) -> np.ndarray:
    """Colours uint8 (num_classes, 3) that differ: bit i goes to channel i mod 3, high bits first."""
    colours = np.zeros((num_classes, 3), np.uint8)
    for k in range(num_classes):
        for bit in range(8):
            colours[k, bit % 3] |= ((k >> bit) & 1) << (7 - bit // 3)
    return colours
