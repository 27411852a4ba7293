"""Mapillary Vistas, version 1.2, alone or nested in the archive of version 2.0.

Folders below ``root``, as the archives unpack them::

    config.json         {training,validation}/images/<key>.jpg    {training,validation}/labels/<key>.png
    config_v1.2.json    {training,validation}/images/<key>.jpg    {training,validation}/v1.2/labels/<key>.png
    testing/images/<key>.jpg

A label value is a position in the list ``labels`` of config.json, which is therefore checked entry by entry. Of its 66
entries 65 are evaluated; the last, Unlabeled, is ignored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from segkit.data.files import read_text
from segkit.data.labels import load_table, table_file
from segkit.data.layout import Layout, check_split
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
ARCHIVES = "mapillary-vistas-dataset_public_v1.2.zip"
TOPS = ("mapillary-vistas-dataset_public_v1.2", "mapillary-vistas-dataset_public_v2.0")


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Open ``split``: train, val, or test (without labels).

    Raises InputError for missing folders, an image without a label and a label without an image; for labelled splits
    also for a config.json that is missing, unreadable, of version 2.0 or with other labels.
    """
    layout = Layout("mapillary", root, archives=ARCHIVES)
    check_split(split, FOLDERS, dataset="mapillary")
    top = layout.base(FOLDERS[split] + "/images", *TOPS)
    folder = top / FOLDERS[split]
    if split == "test":
        samples = [Sample(key, image) for key, image in layout.files(folder / "images", ".jpg").items()]
    else:
        check_config(_config_file(top))
        samples = layout.pairs(folder / "images", _labels_folder(folder))
    return SampleSet(samples, table=load_table("mapillary"), name="mapillary", split=split)


def _labels_folder(folder: Path) -> Path:
    nested = folder / "v1.2" / "labels"
    if os.path.isdir(nested):
        return nested
    if os.path.isdir(folder / "v2.0" / "labels") and not os.path.isdir(folder / "labels"):
        raise InputError(
            f"{folder} has labels of version 2.0 only, which has other classes; unpack {ARCHIVES} (or the v1.2 part of "
            "the 2.0 archive) and set dataset.root to its folder"
        )
    return folder / "labels"


def _config_file(top: Path) -> Path:
    for name in ("config_v1.2.json", "config.json", "config_v2.0.json"):
        if os.path.isfile(top / name):
            return top / name
    raise InputError(
        f"mapillary is not complete: {top / 'config.json'} does not exist, without which label values have "
        f"no meaning; unpack {ARCHIVES} again and set dataset.root to its folder"
    )


def check_config(path: Path) -> None:
    """Raise InputError unless the file ``path`` lists the labels of version 1.2, in their order."""
    try:
        config = json.loads(read_text(path, role="file", missing=f"{path} does not exist; unpack {ARCHIVES} again"))
        if not isinstance(labels := config["labels"], list):
            raise TypeError(labels)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no JSON file with a list named labels; unpack {ARCHIVES} again") from None
    version = str(config.get("version", "")).lstrip("v")
    if version.startswith("2"):
        raise InputError(
            f"{path} is of version {version}, whose labels differ; this data set is version 1.2: unpack "
            f"{ARCHIVES}, or keep config_v1.2.json of the 2.0 archive beside it"
        )
    expected = table_file("mapillary")["config_labels"]
    if len(labels) != len(expected):
        raise InputError(
            f"{path} lists {len(labels)} labels, but version 1.2 has {len(expected)} (version 2.0 has 124); "
            f"unpack {ARCHIVES}"
        )
    for index, (found, wanted) in enumerate(zip(labels, expected, strict=True)):
        for field in wanted:
            value = found.get(field) if isinstance(found, dict) else None
            if value != wanted[field]:
                raise InputError(
                    f"{path} has {field}={value!r} for label {index}, but version 1.2 has {wanted[field]!r}; "
                    f"label values would get another meaning: unpack {ARCHIVES} again"
                )
