"""COCO: one JSON file for a whole split, with polygons and run-length encoded masks."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segkit.data.files import without_suffix
from segkit.data.formats.polygons import Meaning, Size, blank_label, fill, read_json_label, ring_of
from segkit.data.layout import inside, near_miss, refuse
from segkit.data.samples import Sample
from segkit.errors import InputError

PLACES = ("{labels}/{split}.json", "annotations/instances_{split}.json", "annotations/{split}.json", "{split}.json",
          "{images}/{split}/_annotations.coco.json", "{split}/_annotations.coco.json")  # fmt: skip
"""Where the file of a split may lie below the root."""

WHOLE = ("{labels}.json", "annotations.json", "{images}/_annotations.coco.json", "_annotations.coco.json",
         "annotations/instances_default.json")  # fmt: skip
"""Where a file of all images may lie below the root."""

ID = int | float | str
"""Types of an id; 1.0, as tables of other programs have it, is 1."""


@dataclass(frozen=True)
class Content:
    """``images``: entry of each name; ``annotations``: those of each image id; ``names``: of each category id."""

    images: dict[str, dict[str, Any]]
    annotations: dict[Any, list[tuple[int, dict[str, Any]]]]
    names: dict[Any, str]


def find(top: Path, *, split: str | None, images: str, labels: str) -> Path | None:
    """Return the annotation file of ``split`` (None: of all images) below ``top``; None if there is none."""
    places = WHOLE if split is None else PLACES
    paths = (top / place.format(split=split, images=images, labels=labels) for place in places)
    return next((path for path in paths if os.path.isfile(path)), None)


def samples(path: Path, top: Path, *, split: str | None, images: str) -> list[Sample]:
    """Return the samples of an annotation file, in its order; an image that is not there is refused."""
    folders = [top / images / (split or ""), top / images, top / images / "default", path.parent, top]  # CVAT's
    found = []
    for name, entry in _content(str(path), os.stat(path).st_mtime_ns).images.items():
        inside(top, entry["file_name"], list_file=path)
        candidates = [folder / entry["file_name"] for folder in folders]
        image = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
        if image is None:
            refuse(
                f"{path} names image {entry['file_name']!r}, but {candidates[0]} does not exist"
                f"{near_miss(candidates[0])}; add the image, or mend dataset.reader.images"
            )
        else:
            found.append(Sample(name, image, (path,)))
    return found


def check_categories(path: Path, meaning: Meaning) -> None:
    """Raise InputError, once for a whole file, if annotations are of categories that the file of classes lacks."""
    content = _content(str(path), os.stat(path).st_mtime_ns)
    used = (item for items in content.annotations.values() for _, item in items if not item.get("iscrowd"))
    unknown = {content.names[item["category_id"]] for item in used} - set(meaning.values)
    if unknown:
        raise InputError(
            f"label {path} has annotations of {', '.join(sorted(map(repr, unknown)))}, which {meaning.file} does not "
            f"know; allowed are {', '.join(meaning.values)}: correct them, or add them to names, or to ignore"
        )


def load(sample: Sample, *, meaning: Meaning) -> np.ndarray:
    """Return the label (H, W) of class numbers."""
    path = sample.labels[0]
    content = _content(str(path), os.stat(path).st_mtime_ns)
    entry = content.images[sample.name]
    label = blank_label(sample, meaning, (entry.get("height"), entry.get("width")))
    for number, item in content.annotations.get(entry["id"], []):
        where = f"annotation {number} of {path} (image {entry['file_name']!r})"
        is_crowd = item.get("iscrowd")
        value = meaning.crowd if is_crowd else meaning.value(content.names[item["category_id"]], where=where)
        region = item.get("segmentation")
        if isinstance(region, dict):
            label[_mask(region, label.shape, where)] = value
        elif isinstance(region, list) and region:
            for part in region if isinstance(region[0], list) else [region]:
                fill(label, ring_of(part, label.shape, where=where), value)
        else:
            raise InputError(f"{where} has no segmentation, a box alone perhaps: draw its polygon, or remove it")
    return label


@functools.lru_cache(maxsize=4)  # parsed once a process; the time of modification is there to notice a new file
def _content(path: str, modified: int) -> Content:
    file = Path(path)
    content = read_json_label(file, keys=["images", "annotations", "categories"], kind="COCO")
    entries = {}
    for entry in content["images"]:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or not isinstance(entry.get("id"), ID):
            raise InputError(f"label {file} has an image without id or file_name: export it again")
        if without_suffix(name) in entries:
            raise InputError(f"label {file} has the image {name!r} twice, or but for its extension: remove one")
        entries[without_suffix(name)] = entry
    named = [(item["id"], str(item.get("name"))) for item in content["categories"] if isinstance(item.get("id"), ID)]
    names = dict(named)
    for kind, found in ("image", [entry["id"] for entry in entries.values()]), ("category", [i for i, _ in set(named)]):
        if twice := [number for number, times in Counter(found).items() if times > 1]:
            raise InputError(
                f"label {file} gives the {kind} id {twice[0]!r} twice, as files do that were merged: number them anew, "
                "so that each annotation has one meaning"
            )
    ids = {entry["id"] for entry in entries.values()}
    annotations = defaultdict(list)
    for number, item in enumerate(content["annotations"]):
        for key, known, kind in ("image_id", ids, "images"), ("category_id", names, "categories"):
            found_id = item.get(key)
            if (kind == "images" or not item.get("iscrowd")) and not (isinstance(found_id, ID) and found_id in known):
                raise InputError(
                    f"annotation {number} of {file} is of {key} {found_id!r}, which is none of its {kind}: correct or "
                    "remove it, or add what it names to the list"
                )
        if item.get("iscrowd") not in (None, 0, 1):
            raise InputError(
                f"annotation {number} of {file} has iscrowd {item['iscrowd']!r}, but takes 0 or 1: correct it"
            )
        annotations[item["image_id"]].append((number, item))
    return Content(entries, annotations, names)


def _mask(region: dict[str, Any], size: Size, where: str) -> np.ndarray:
    """Return the mask bool (H, W) of a run-length encoding: runs of 0 and 1 in turn, column by column."""
    if region.get("size") != list(size):
        raise InputError(
            f"{where} is a mask of size {region.get('size')}, but its image has [height, width] {list(size)}: "
            "annotate the image as it is"
        )
    counts: Any = region.get("counts")
    try:
        runs: list[int] = _runs(counts) if isinstance(counts, str) else counts
        if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
            raise ValueError  # before anything of the size that they claim is made
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return values.reshape(size[::-1]).T
    except (ValueError, TypeError, IndexError):
        raise InputError(f"{where} has counts that are no mask of {list(size)}: export it again") from None


def _runs(text: str) -> list[int]:
    """The run lengths of COCO's text form: five bits a character from the lowest on, the sixth says that more follow.

    From the fourth number on it is the difference to the number two places before, in two's complement.
    """
    runs: list[int] = []
    number = shift = 0
    for bits in (ord(sign) - 48 for sign in text):
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(text)
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) if bits & 16 else 0
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError(text)
    return runs
