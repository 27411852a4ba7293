"""A data set of one's own: a folder of images, a folder of index masks, and a file of classes.

Layout below ``root``::

    classes.yaml                     names: [...] and, if wished, ids: [...], ignore: [...], colours: [...]
    images/<split>/.../<name>.jpg    labels/<split>/.../<name>.png    (splits as sub-folders), or
    images/.../<name>.jpg            labels/.../<name>.png            <split>.txt (splits as list files)

``names`` are the classes in order. ``ids`` are their values in the label files (default 0, 1, 2, ...), ``ignore`` the
values that are no class (default [255]), ``colours`` their [red, green, blue]. A list file names one image a line,
relative to images/, with or without its extension. Labels are 8-bit PNG, grey or palette.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from segkit.data.files import IMAGE_SUFFIXES, read_text, visible_entries, walk
from segkit.data.labels import LabelTable
from segkit.data.layout import Layout, near_miss, refuse
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

LABEL_SUFFIXES = frozenset({".png"})
CLASS_KEYS = ("names", "ids", "ignore", "colours")
WANTED = "images/, labels/ and classes.yaml"
TEXT, NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"

Files = Mapping[str, list[Path]]
"""{path below a folder without extension: files of that name}."""


def read(root: Path | str | None, *, split: str, classes: str = "classes.yaml") -> SampleSet:
    """Open ``split``: what lies in images/<split> and labels/<split>, or what <split>.txt lists.

    ``classes`` is the file of classes, relative to ``root`` or absolute. A split named test without any label file is
    unlabelled; in every other split each image needs its label, and each label its image.
    """
    layout = Layout("folder", root, archives=WANTED)
    top = layout.base("images")
    table = read_classes(top / classes)
    list_file = top / f"{split}.txt"
    if os.path.isfile(list_file):
        samples = _listed(layout, top, list_file, may_be_unlabelled=split == "test")
    elif os.path.isdir(top / "images" / split):
        samples = _in_folders(layout, top, split)
    else:
        raise InputError(
            f"split {split!r} of {top} does not exist: there is neither a folder {top / 'images' / split} nor a list "
            f"file {list_file}{near_miss(list_file)}; add one of the two, or set dataset.train_split and "
            f"dataset.val_split to {_splits(top)}"
        )
    return SampleSet(samples, table=table, name="folder", split=split)


def _splits(top: Path) -> str:
    """The splits that are there, for a message."""
    folders = [entry.name for entry in visible_entries(top / "images") if entry.is_dir()]
    lists = [entry.name.removesuffix(".txt") for entry in visible_entries(top) if entry.name.endswith(".txt")]
    return ", ".join(sorted({*folders, *lists})) or "splits that you make"


def _in_folders(layout: Layout, top: Path, split: str) -> list[Sample]:
    folder, labels_folder = top / "images" / split, top / "labels" / split
    images = {key: _only(files) for key, files in _files(folder, IMAGE_SUFFIXES).items()}
    exists = os.path.isdir(labels_folder)
    labels = {key: _only(files) for key, files in _files(labels_folder, LABEL_SUFFIXES).items()} if exists else {}
    if not labels and split == "test":
        return [Sample(key, image) for key, image in images.items()]
    if not exists:
        raise InputError(
            f"split {split!r} of {top} has images but no labels: folder {labels_folder} does not exist; put one 8-bit "
            "PNG of class ids there for every image"
        )
    return layout.pair(images, labels, image=f"{folder}/{{id}}.jpg", label=f"{labels_folder}/{{id}}.png")


def _listed(layout: Layout, top: Path, list_file: Path, *, may_be_unlabelled: bool) -> list[Sample]:
    entries = layout.entries(list_file, top / "images")
    images = _files(top / "images", IMAGE_SUFFIXES)
    labels = _files(top / "labels", LABEL_SUFFIXES) if os.path.isdir(top / "labels") else {}
    labelled = not may_be_unlabelled or any(_key(entry) in labels for entry in entries)
    samples = []
    for entry in entries:
        key, path = _key(entry), top / "images" / entry
        found = [file for file in images.get(key, []) if file == path] or images.get(key, [])
        label = top / "labels" / f"{key}.png"
        if not found:
            refuse(
                f"{list_file} names {entry!r}, but {path} does not exist{near_miss(path)}; correct the line or add the "
                "image"
            )
        elif labelled and key not in labels:
            refuse(
                f"image {found[0]} has no label ({label} is missing{near_miss(label)}); add it or remove the line from "
                f"{list_file}"
            )
        else:
            samples.append(Sample(key, _only(found), (_only(labels[key]),) if labelled else ()))
    return samples


def _key(relative: str) -> str:
    """The path below images/ without an image's extension, with forward slashes."""
    path = Path(relative)
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()


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


def read_classes(path: Path) -> LabelTable:
    """Return the label table that a file of classes describes; raises InputError for all that does not fit together."""
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
    if content.get("ignore") is None and 255 in ids:
        raise InputError(
            f"{path} gives class {names[ids.index(255)]!r} the id 255, which is void unless the file says otherwise: "
            f"where 255 is a class, as in masks of 0 and 255, write these two lines: `ids: {ids}` and `ignore: []`"
        )
    twice = sorted({value for value in [*ids, *ignore] if [*ids, *ignore].count(value) > 1})
    if twice:
        raise InputError(f"{path} uses value {twice[0]} twice among ids and ignore; each value has one meaning")
    raw_to_train = {**dict(zip(ids, range(num), strict=True)), **dict.fromkeys(ignore, 255)}
    return LabelTable(
        name=str(path),
        classes=tuple(names),
        palette=default_palette(num) if colours is None else _colours(colours, path),
        raw_to_train=raw_to_train,
        train_to_raw=dict(enumerate(ids)),
        source=(str(path),),
    )


def _load_yaml(path: Path) -> dict[str, Any]:
    text = read_text(
        path,
        role="file of classes",
        missing=f"{path} does not exist; write one with `names: [background, tool]`, the classes of the label files in "
        "order, or name another file in dataset.reader.classes",
    )
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no valid YAML ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping; write for example `names: [background, tool]`")
    unknown = sorted(str(key) for key in content if key not in CLASS_KEYS)
    if unknown:
        raise InputError(f"{path} has an unknown key {unknown[0]!r}; allowed are {', '.join(CLASS_KEYS)}")
    _check_spelling(node, path)
    return content


def _check_spelling(node: Any, path: Path) -> None:
    """Raise InputError for a key that is there twice, and for a class name that YAML does not read as text.

    ``node`` is the file as it is spelled: {key: value} as a list of pairs, in which `no` is not yet False.
    """
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise InputError(f"{path} has the key {key.value!r} twice, of which YAML drops one; remove one")
        seen.add(key.value)
        for name in value.value if key.value == "names" and isinstance(value, yaml.SequenceNode) else ():
            if not isinstance(name, yaml.ScalarNode):
                raise InputError(f"{path} has a list or mapping among its names; write one text for each class")
            if name.tag == NULL or not name.value.strip():
                raise InputError(f"{path} has an empty name ({name.value!r}); give each class a name, in quotes")
            if name.tag != TEXT:
                kind = name.tag.rpartition(":")[2]
                raise InputError(
                    f"{path} has the class name {name.value}, which YAML reads as {kind} and not as text; put it in "
                    f'quotes: "{name.value}"'
                )


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
    """Return colours uint8 (num_classes, 3) that differ: bit i goes to channel i mod 3, high bits first."""
    colours = np.zeros((num_classes, 3), np.uint8)
    for k in range(num_classes):
        for bit in range(8):
            colours[k, bit % 3] |= ((k >> bit) & 1) << (7 - bit // 3)
    return colours
