"""ADE20K SceneParse150 (ADEChallengeData2016).

Folders below ``root``, as the archives unpack them::

    ADEChallengeData2016/images/{training,validation}/<id>.jpg    annotations/{training,validation}/<id>.png
    release_test/testing/<id>.jpg    release_test/list.txt

Raw label 0 ("other objects") is ignored, raw label k is class k - 1.
"""

from __future__ import annotations

from pathlib import Path

from segkit.data.labels import load_table
from segkit.data.layout import (
    base_folder,
    check_split,
    check_unique,
    files_by_id,
    inside,
    missing_file,
    pair,
    read_list,
    require_folder,
    require_root,
)
from segkit.data.samples import Sample, SampleSet

FOLDERS = {"train": "training", "val": "validation"}
ARCHIVES = "ADEChallengeData2016.zip"
TEST_ARCHIVE = "release_test.zip"


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Open ``split``: train, val, or test (no labels; its file numbers have gaps, list.txt names the files).

    Raises InputError for missing folders, an image without a label and a label without an image.
    """
    root = require_root(root, dataset="ade20k")
    check_split(split, (*FOLDERS, "test"), dataset="ade20k")
    if split == "test":
        samples = _test_samples(root)
    else:
        top = base_folder(
            root,
            marker="images/training",
            tops=("ADEChallengeData2016",),
            dataset="ade20k",
            archives=ARCHIVES,
        )
        folders = []
        for kind in ("images", "annotations"):
            folder = top / kind / FOLDERS[split]
            folders.append(require_folder(folder, dataset="ade20k", root=root, archives=ARCHIVES))
        images, labels = folders
        pairs = pair(
            files_by_id(images, suffix=".jpg"),
            files_by_id(labels, suffix=".png"),
            dataset="ade20k",
            expected_image=f"{images}/{{id}}.jpg",
            expected_label=f"{labels}/{{id}}.png",
        )
        samples = [Sample(key, image, (label,)) for key, image, label in pairs]
    return SampleSet(samples, table=load_table("ade20k"), name="ade20k", split=split)


def _test_samples(root: Path) -> list[Sample]:
    top = base_folder(root, marker="testing", tops=("release_test",), dataset="ade20k", archives=TEST_ARCHIVE)
    list_file = top / "list.txt"
    names = read_list(list_file, dataset="ade20k", archives=TEST_ARCHIVE)
    check_unique(names, file=list_file)
    images = files_by_id(top / "testing", suffix=".jpg")
    samples = []
    for name in names:
        inside(top / "testing", name, list_file=list_file)
        key = Path(name).name.removesuffix(".jpg")
        if key not in images:
            raise missing_file(
                top / "testing" / f"{key}.jpg",
                list_file=list_file,
                dataset="ade20k",
                num_missing=1,
                archives=TEST_ARCHIVE,
            )
        samples.append(Sample(key, images[key]))
    return samples
