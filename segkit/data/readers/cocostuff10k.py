"""COCO-Stuff 10K, version 1.1, read from its .mat files.

The archive has no top folder; below ``root`` lie::

    images/<id>.jpg    annotations/<id>.mat    imageLists/{train,test,all}.txt

Field ``S`` holds ids 0 (unlabeled, ignored) to 182; 11 of the 91 things have no pixel in any image and are
not among the 171 classes. Version 1.0 numbered its classes otherwise and is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segkit.data.labels import load_table
from segkit.data.layout import (
    base_folder,
    check_split,
    check_unique,
    files_by_id,
    inside,
    missing_file,
    read_list,
    refuse,
    require_folder,
    require_root,
    table_file,
)
from segkit.data.matlab import read_mat
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

SPLITS = ("train", "test", "all")
ARCHIVES = "cocostuff-10k-v1.1.zip"
NUM_NAMES = 182
"""Names in a file of version 1.1: ids 1 to 182, "unlabeled" is not among them. Version 1.0 has 172."""


def raw_names() -> list[str]:
    """The names of raw ids 1 to 182."""
    names = table_file("cocostuff10k")["raw_names"]
    return [names[str(index)] for index in range(1, NUM_NAMES + 1)]


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Open ``split``: train (9000 images), test (1000, labelled: it serves as validation) or all.

    Raises InputError for missing folders and files, and for files of version 1.0 (on reading a label).
    """
    root = require_root(root, dataset="cocostuff10k")
    check_split(split, SPLITS, dataset="cocostuff10k")
    top = base_folder(
        root, marker="annotations", tops=("cocostuff-10k-v1.1",), dataset="cocostuff10k", archives=ARCHIVES
    )
    folder = require_folder(top / "images", dataset="cocostuff10k", root=root, archives=ARCHIVES)
    images = files_by_id(folder, suffix=".jpg")
    labels = files_by_id(top / "annotations", suffix=".mat")
    list_file = top / "imageLists" / f"{split}.txt"
    keys = read_list(list_file, dataset="cocostuff10k", archives=ARCHIVES)
    check_unique(keys, file=list_file)
    for key in keys:
        inside(folder, key, list_file=list_file)
    for found, parent, suffix in ((images, folder, ".jpg"), (labels, top / "annotations", ".mat")):
        missing = [key for key in keys if key not in found]
        if missing:
            refuse(
                missing_file(
                    parent / f"{missing[0]}{suffix}",
                    list_file=list_file,
                    dataset="cocostuff10k",
                    num_missing=len(missing),
                    archives=ARCHIVES,
                )
            )
    samples = [Sample(key, images[key], (labels[key],)) for key in keys if key in images and key in labels]
    return SampleSet(samples, table=load_table("cocostuff10k"), name="cocostuff10k", split=split, load_label=read_label)


def read_label(sample: Sample) -> np.ndarray:
    """Raw label (H, W) int64 of a sample's .mat file; InputError if it is damaged, or of version 1.0."""
    path = sample.labels[0]
    content = read_mat(path, ["S", "names"])
    if "S" not in content or content["S"].ndim != 2:
        raise InputError(f"{path} has no label map S (height, width); unpack {ARCHIVES} again")
    num_names = content["names"].size if "names" in content else NUM_NAMES
    if num_names != NUM_NAMES:
        raise InputError(
            f"{path} names {num_names} classes, but files of version 1.1 name {NUM_NAMES}; version 1.0 "
            f"numbers its classes otherwise and cannot be used: unpack {ARCHIVES} into a folder of its own"
        )
    stored = content["S"]
    raw = stored.astype(np.int64)  # MATLAB stores doubles; what they hold are whole numbers
    if not np.array_equal(raw, stored):
        raise InputError(f"{path} has label values that are not whole numbers; unpack {ARCHIVES} again")
    return raw
