"""YOLO segmentation: one text file an image; a line is a class number and x y x y ... as shares of width and height.

A ``data.yaml`` may say what the numbers are, and where the images of each split lie.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from segkit.data.files import read_text
from segkit.data.formats.classes import FolderClasses, classes_of, load_yaml
from segkit.data.formats.polygons import Meaning, blank_label, fill, ring_of
from segkit.data.layout import inside
from segkit.data.samples import Sample
from segkit.errors import InputError

KEYS, SPLITS, REST = {"train", "val", "nc", "path"}, ("train", "val", "test"), "background"


def describe(path: Path) -> tuple[FolderClasses, dict[str, str]] | None:
    """Return the classes in YOLO's file ``path``, and the folder of the images of each split, relative to its own.

    Pixels without a polygon are of the class background, which comes first unless the file names it. None for a file
    that is no such one or is missing. Raises InputError for one that is damaged, or names a folder outside of its own.
    """
    content = load_yaml(path) if os.path.isfile(path) else {}
    if not KEYS & content.keys():
        return None
    names, top = content.get("names"), path.parent
    if isinstance(names, dict) and names.keys() == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{path} has no names of classes that are numbered 0, 1, 2, ...: write `names: [tool, hand]`, or "
            "`0: tool` line by line"
        )
    if content.get("nc", len(names)) != len(names):
        raise InputError(f"{path} has nc: {content['nc']!r}, but {len(names)} names: correct one of the two")
    whole = {"ids": list(range(len(names)))} if REST in names else {"names": [REST, *names]}
    folders = {}
    for split, place in ((split, content[split]) for split in SPLITS if content.get(split) is not None):
        if not isinstance(place, str) or place.endswith(".txt"):
            raise InputError(
                f"{path} has {split}: {place!r}, but one folder of images is wanted: write `images/{split}`"
            )
        place = place.removeprefix("../")  # from a folder that its exporters think of beside the splits
        inside(top, place, list_file=path)
        below = Path(str(content.get("path", "")), place)
        found = not below.is_absolute() and ".." not in below.parts and os.path.isdir(top / below)
        folders[split] = (below if found else Path(place)).as_posix()
    return classes_of({"names": names, "unlabelled": REST, "ignore": [], **whole}, path), folders


def labels_of(images: str) -> str:
    """Return the folder of the labels of a folder of images: labels in place of the last images in its path."""
    head, found, tail = f"/{images}/".rpartition("/images/")
    return f"{head}/labels/{tail}".strip("/") if found else images


def load(sample: Sample, *, meaning: Meaning) -> np.ndarray:
    """Return the label (H, W) of class numbers; raises InputError for a line that is no polygon."""
    path = sample.labels[0]
    label = blank_label(sample, meaning)
    text = read_text(path, role="label", missing=f"label {path} does not exist; copy or unpack it again")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        name, *words = line.split()
        try:
            key, shares = int(name), np.array(words, np.float64)
            if shares.size % 2:  # a confidence at the end, perhaps
                raise ValueError
        except (ValueError, OverflowError):
            raise InputError(
                f"{where} is no polygon of YOLO, which is a class number and x y x y ...: correct or remove it"
            ) from None
        if shares.size == 4:
            raise InputError(f"{where} is a box, but polygons are wanted: export the polygons of the data set")
        if (farthest := np.abs(shares).max(initial=0)) > 2:
            raise InputError(
                f"{where} has the position {farthest:g}, but positions are shares of width and height, from 0 to 1: "
                "export it again"
            )
        sides = np.resize(label.shape[::-1], shares.size)
        value = meaning.value(key, where=where)
        fill(label, ring_of(shares * sides, label.shape, where=where), value)
    return label
