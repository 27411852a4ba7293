"""Mapillary Vistas, version 1.2, alone or nested in the archive of version 2.0.

Folders below ``root``, as the archives unpack them::

    config.json         {training,validation}/images/<key>.jpg    {training,validation}/labels/<key>.png
    config_v1.2.json    {training,validation}/images/<key>.jpg    {training,validation}/v1.2/labels/<key>.png
    testing/images/<key>.jpg

A label value is a position in the list ``labels`` of config.json, which is therefore checked entry by entry.
Of its 66 entries 65 are evaluated; the last, Unlabeled, is ignored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from segkit.data.labels import load_table
from segkit.data.layout import base_folder, check_split, files_by_id, pair, require_folder, require_root, table_file
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
ARCHIVES = "mapillary-vistas-dataset_public_v1.2.zip"
TOPS = ("mapillary-vistas-dataset_public_v1.2", "mapillary-vistas-dataset_public_v2.0")
FIELDS = ("name", "readable", "color", "instances", "evaluate")


def config_labels() -> list[dict[str, Any]]:
    """The 66 entries of ``labels`` in version 1.2's config.json, with :data:`FIELDS`."""
    return [{field: entry[field] for field in FIELDS} for entry in table_file("mapillary")["config_labels"]]


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Open ``split``: train, val, or test (without labels).

    Raises InputError for a config.json that is missing, unreadable, of version 2.0 or with other labels; for
    missing folders, an image without a label and a label without an image.
    """
    root = require_root(root, dataset="mapillary")
    check_split(split, FOLDERS, dataset="mapillary")
    marker = FOLDERS[split] + "/images"
    top = base_folder(root, marker=marker, tops=TOPS, dataset="mapillary", archives=ARCHIVES)
    check_config(_config_file(top))
    folder = top / FOLDERS[split]
    images = files_by_id(folder / "images", suffix=".jpg")
    if split == "test":
        samples = [Sample(key, image) for key, image in images.items()]
    else:
        labels_folder = _labels_folder(folder, root)
        pairs = pair(
            images,
            files_by_id(labels_folder, suffix=".png"),
            dataset="mapillary",
            expected_image=f"{folder / 'images'}/{{id}}.jpg",
            expected_label=f"{labels_folder}/{{id}}.png",
        )
        samples = [Sample(key, image, (label,)) for key, image, label in pairs]
    return SampleSet(samples, table=load_table("mapillary"), name="mapillary", split=split)


def _labels_folder(folder: Path, root: Path) -> Path:
    nested = folder / "v1.2" / "labels"
    if os.path.isdir(nested):
        return nested
    if os.path.isdir(folder / "v2.0" / "labels") and not os.path.isdir(folder / "labels"):
        raise InputError(
            f"{folder} has labels of version 2.0 only, which has other classes; unpack {ARCHIVES} (or the "
            f"v1.2 part of the 2.0 archive) and set dataset.root to its folder"
        )
    return require_folder(folder / "labels", dataset="mapillary", root=root, archives=ARCHIVES)


def _config_file(top: Path) -> Path:
    for name in ("config_v1.2.json", "config.json", "config_v2.0.json"):
        if os.path.isfile(top / name):
            return top / name
    raise InputError(
        f"mapillary is not complete: {top / 'config.json'} does not exist, without which label values have "
        f"no meaning; unpack {ARCHIVES} again and set dataset.root to its folder"
    )


def check_config(path: Path) -> None:
    """Raise InputError unless the config file ``path`` lists the labels of version 1.2, in their order."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        labels = config["labels"]
        assert isinstance(labels, list)
    except PermissionError:
        raise InputError(f"{path} may not be read by this user; run `chmod u+r {path}`") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise InputError(f"{path} is no JSON file with a list named labels; unpack {ARCHIVES} again") from None
    version = str(config.get("version", "")).lstrip("v")
    if version.startswith("2"):
        raise InputError(
            f"{path} is of version {version}, whose labels differ; this data set is version 1.2: unpack "
            f"{ARCHIVES}, or keep config_v1.2.json of the 2.0 archive beside it"
        )
    expected = config_labels()
    if len(labels) != len(expected):
        raise InputError(
            f"{path} lists {len(labels)} labels, but version 1.2 has {len(expected)} (version 2.0 has 124); "
            f"unpack {ARCHIVES}"
        )
    for index, (found, wanted) in enumerate(zip(labels, expected, strict=True)):
        for field in FIELDS:
            value = found.get(field) if isinstance(found, dict) else None
            if value != wanted[field]:
                raise InputError(
                    f"{path} has {field}={value!r} for label {index}, but version 1.2 has {wanted[field]!r}; "
                    f"label values would get another meaning: unpack {ARCHIVES} again"
                )
