"""ADE20K SceneParse150 (ADEChallengeData2016).

Folders below ``root``, as the archives unpack them::

    ADEChallengeData2016/images/{training,validation}/<id>.jpg    annotations/{training,validation}/<id>.png
    release_test/testing/<id>.jpg    release_test/list.txt

Raw label 0 ("other objects") is ignored, raw label k is class k - 1.
"""

from __future__ import annotations

from pathlib import Path

from segkit.data.labels import load_table
from segkit.data.layout import Layout, check_split
from segkit.data.samples import Sample, SampleSet

FOLDERS = {"train": "training", "val": "validation"}
ARCHIVES = "ADEChallengeData2016.zip"
TEST_ARCHIVE = "release_test.zip"


def read(root: Path | str | None, *, split: str) -> SampleSet:
    """Open ``split``: train, val, or test (no labels; its file numbers have gaps, list.txt names the files).

    Raises InputError for missing folders, an image without a label and a label without an image.
    """
    layout = Layout("ade20k", root, archives=TEST_ARCHIVE if split == "test" else ARCHIVES)
    check_split(split, (*FOLDERS, "test"), dataset="ade20k")
    if split == "test":
        samples = _test_samples(layout)
    else:
        top = layout.base(f"images/{FOLDERS[split]}", "ADEChallengeData2016")
        images, labels = top / "images" / FOLDERS[split], top / "annotations" / FOLDERS[split]
        samples = layout.pairs(images, labels)
    return SampleSet(samples, table=load_table("ade20k"), name="ade20k", split=split)


def _test_samples(layout: Layout) -> list[Sample]:
    top = layout.base("testing", "release_test")
    folder, list_file = top / "testing", top / "list.txt"
    keys = [Path(name).name.removesuffix(".jpg") for name in layout.entries(list_file, folder)]
    images = layout.files(folder, ".jpg")
    keys = layout.listed(keys, images, wanted=f"{folder}/{{id}}.jpg", list_file=list_file)
    return [Sample(key, images[key]) for key in keys]
