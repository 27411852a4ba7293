"""COCO-Stuff 10K, version 1.1, read from its .mat files.

The archive has no top folder; below ``root`` lie::

    images/<id>.jpg    annotations/<id>.mat    imageLists/{train,test,all}.txt

Field ``S`` holds ids 0 (unlabeled, ignored) to 182; 11 of the 91 things have no pixel in any image and are not among
the 171 classes. Version 1.0 numbered its classes otherwise and is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segkit.data.labels import load_table
from segkit.data.layout import Layout, check_split
from segkit.data.matlab import read_mat
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

SPLITS = ("train", "test", "all")
ARCHIVES = "cocostuff-10k-v1.1.zip"
NUM_NAMES = 182
"""Names in a file of version 1.1: ids 1 to 182, "unlabeled" is not among them. Version 1.0 has 172."""


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Open ``split``: train (9000 images), test (1000, labelled: it serves as validation) or all.

    Raises InputError for missing folders and files, and for files of version 1.0 (on reading a label).
    """
    layout = Layout("cocostuff10k", root, archives=ARCHIVES)
    check_split(split, SPLITS, dataset="cocostuff10k")
    top = layout.base("annotations", "cocostuff-10k-v1.1")
    images = layout.files(top / "images", ".jpg")
    labels = layout.files(top / "annotations", ".mat")
    list_file = top / "imageLists" / f"{split}.txt"
    keys = layout.entries(list_file, top / "images")
    keys = layout.listed(keys, images, wanted=f"{top / 'images'}/{{id}}.jpg", list_file=list_file)
    keys = layout.listed(keys, labels, wanted=f"{top / 'annotations'}/{{id}}.mat", list_file=list_file)
    samples = [Sample(key, images[key], (labels[key],)) for key in keys]
    return SampleSet(samples, table=load_table("cocostuff10k"), name="cocostuff10k", split=split, load_label=read_label)


def read_label(sample: Sample) -> np.ndarray:
    """Return the raw label (H, W) int64 of a sample's .mat file; raises InputError for one that is damaged or old."""
    path = sample.labels[0]
    content = read_mat(path, ["S", "names"])
    stored, names = content.get("S"), content.get("names", [None] * NUM_NAMES)
    if not isinstance(stored, np.ndarray) or stored.ndim != 2:
        raise InputError(f"{path} has no label map S (height, width); unpack {ARCHIVES} again")
    num_names = len(names) if isinstance(names, list) else 0
    if num_names != NUM_NAMES:
        raise InputError(
            f"{path} names {num_names} classes, but files of version 1.1 name {NUM_NAMES}; version 1.0 "
            f"numbers its classes otherwise and cannot be used: unpack {ARCHIVES} into a folder of its own"
        )
    with np.errstate(invalid="ignore"):  # NaN becomes another number, which the next line tells
        raw = stored.astype(np.int64)  # MATLAB stores doubles; what they hold are whole numbers
    if not np.array_equal(raw, stored):
        raise InputError(f"{path} has label values that are not whole numbers; unpack {ARCHIVES} again")
    return raw
