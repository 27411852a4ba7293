"""BDD100K semantic segmentation, in the layout of the 10K release and in that of 2018.

Folders below ``root``, as the archives unpack them::

    bdd100k/images/10k/{train,val,test}/<id>.jpg    bdd100k/labels/sem_seg/masks/{train,val}/<id>.png
    bdd100k/seg/images/{train,val,test}/<id>.jpg    bdd100k/seg/labels/{train,val}/<id>_train_id.png

The second line is the layout of 2018.

Masks hold train ids. In six pairs of the 10K release a portrait image lies beside a landscape mask, and no rotation
aligns them; the release of 2018 has six other pairs in their place.
"""

from __future__ import annotations

import os
from pathlib import Path

from segkit.data.labels import load_table, table_file
from segkit.data.layout import Layout, check_split
from segkit.data.samples import Sample, SampleSet

SPLITS = ("train", "val", "test")
ARCHIVES = "bdd100k_images_10k.zip and bdd100k_sem_seg_labels_trainval.zip"
OLD_ARCHIVE = "bdd100k_seg.zip"


def read(root: Path | str | None, *, split: str, skip_mismatched: bool = True) -> SampleSet:
    """Open ``split``: train, val, or test (without labels).

    ``skip_mismatched`` leaves out the six portrait pairs and the six that the release of 2018 has in their place, so
    that both releases give the same 6996 and 998 pairs; ``notes`` says what was skipped.
    Raises InputError for missing folders, an image without a label and a label without an image.
    """
    layout = Layout("bdd100k", root, archives=ARCHIVES)
    check_split(split, SPLITS, dataset="bdd100k")
    images_folder, labels_folder, suffix = _folders(layout, split)
    notes: list[str] = []
    if split == "test":
        samples = [Sample(key, image) for key, image in layout.files(images_folder, ".jpg").items()]
    else:
        samples = layout.pairs(images_folder, labels_folder, suffix=suffix)
        if skip_mismatched:
            samples, notes = _skip(samples, split)
    return SampleSet(samples, table=load_table("bdd100k"), name="bdd100k", split=split, notes=notes)


def _folders(layout: Layout, split: str) -> tuple[Path, Path, str]:
    """Folders of images and labels, and the end of a label's name; the archives wanted are those of the release."""
    for top in (layout.root, layout.root / "bdd100k"):
        if os.path.isdir(top / "seg" / "images") and not os.path.isdir(top / "images" / "10k"):
            layout.archives = OLD_ARCHIVE
            return top / "seg" / "images" / split, top / "seg" / "labels" / split, "_train_id.png"
    top = layout.base("images/10k", "bdd100k")
    return top / "images" / "10k" / split, top / "labels" / "sem_seg" / "masks" / split, ".png"


def _skip(samples: list[Sample], split: str) -> tuple[list[Sample], list[str]]:
    notes = []
    for release, why in (
        ("portrait", "with a portrait image beside a landscape mask"),
        ("old", "that only the release of 2018 has, in place of the mismatched ones"),
    ):
        listed = set(table_file("bdd100k")["mismatched_pairs"][release][split])
        skipped = [sample.name for sample in samples if sample.name in listed]
        samples = [sample for sample in samples if sample.name not in listed]
        if skipped:
            count = f"{len(skipped)} pair" + "s" * (len(skipped) > 1)
            notes.append(f"skipped {count} of {split} {why}: {', '.join(skipped)}")
    return samples, notes
