"""Cityscapes, fine and coarse: 19 evaluated classes of the raw ids 0..33; the split is the folder tree."""

from __future__ import annotations

from pathlib import Path

from segkit.data.files import is_folder, visible_entries
from segkit.data.labels import load_table
from segkit.data.layout import Layout, check_option, check_split
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

SPLITS = ("train", "val", "test", "train_extra")
LABELS = ("fine", "coarse", "coarse_train")
IMAGE_ARCHIVE = {"train_extra": "leftImg8bit_trainextra.zip"}
BROKEN = "troisdorf_000000_000073"
"""Of train_extra: its image is black with one channel and its coarse label constant."""


def read(root: Path | str | None, *, split: str, labels: str = "fine") -> SampleSet:
    """Return the images of ``leftImg8bit/<split>/<city>`` with their ``labelIds``; raw ids are mapped while reading.

    ``labels``: "fine" (gtFine), "coarse" (gtCoarse), or "coarse_train" (gtCoarse for train and train_extra, gtFine for
    val, so that a run trained on coarse labels is still measured on fine ones). Split test is unlabelled: the label
    files that come with it are dummies. The one broken pair of train_extra is left out and noted.
    Raises InputError for a missing folder, an image without label and the reverse.
    """
    check_split(split, SPLITS, dataset="cityscapes")
    kind = _kind_of(labels, split)
    image_archive = IMAGE_ARCHIVE.get(split, "leftImg8bit_trainvaltest.zip")
    label_archive = "gtFine_trainvaltest.zip" if kind == "gtFine" else "gtCoarse.zip"
    layout = Layout("cityscapes", root, archives=f"{image_archive} and {label_archive}")
    layout.base(f"leftImg8bit/{split}")
    images = _by_city(layout, f"leftImg8bit/{split}", "_leftImg8bit.png")
    notes = []
    if split == "test":
        samples = [Sample(name=key, image=path) for key, path in images.items()]
    else:
        masks = _by_city(layout, f"{kind}/{split}", f"_{kind}_labelIds.png")
        dropped = [images.pop(BROKEN, None), masks.pop(BROKEN, None)]
        if any(dropped):
            notes.append(f"left out {BROKEN} of {split}: its image is black and its label constant")
        samples = layout.pair(
            images,
            masks,
            image=f"{layout.root}/leftImg8bit/{split}/{{city}}/{{id}}_leftImg8bit.png",
            label=f"{layout.root}/{kind}/{split}/{{city}}/{{id}}_{kind}_labelIds.png",
        )
    return SampleSet(samples, table=load_table("cityscapes"), name="cityscapes", split=split, notes=notes)


def _kind_of(labels: str, split: str) -> str:
    check_option("labels", labels, LABELS, dataset="cityscapes")
    if split == "train_extra" and labels == "fine":
        raise InputError(
            "split train_extra of cityscapes has coarse labels only; set dataset.reader.labels=coarse_train "
            "(dataset=cityscapes_coarse does)"
        )
    coarse = labels == "coarse" or (labels == "coarse_train" and split in ("train", "train_extra"))
    return "gtCoarse" if coarse and split != "test" else "gtFine"


def _by_city(layout: Layout, relative: str, suffix: str) -> dict[str, Path]:
    """{<city>_<seq>_<frame>: path} of one split, cities and frames in the order of their names."""
    folder = layout.folder(layout.root / relative)
    found: dict[str, Path] = {}
    for city in visible_entries(folder):
        for key, path in layout.files(Path(city.path), suffix).items() if is_folder(city) else ():
            if key in found:
                raise InputError(f"{key!r} occurs twice in cityscapes ({found[key]} and {path}); remove one of them")
            found[key] = path
    if not found:
        raise InputError(
            f"folder {folder} of cityscapes has no file <city>/*{suffix}, so the split is empty; unpack "
            f"{layout.archives} into one folder and set dataset.root to it"
        )
    return found
