"""PASCAL VOC 2012, and its training set augmented by the Semantic Boundaries Dataset (SBD).

Folders below ``root``, as the archives unpack them::

    VOCdevkit/VOC2012/JPEGImages/<id>.jpg   SegmentationClass/<id>.png   ImageSets/Segmentation/<split>.txt
    benchmark_RELEASE/dataset/train.txt     val.txt   cls/<id>.mat   img/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClassAug/<id>.png                   (the community's conversion of SBD)

``trainaug`` = (VOC train U SBD train U SBD val) minus VOC val: SBD's own lists overlap VOC's validation
images. The VOC training images keep their official masks, whose objects have a border of 255; SBD's masks
have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from segkit.data.labels import load_table
from segkit.data.layout import (
    base_folder,
    check_option,
    check_split,
    check_unique,
    files_by_id,
    inside,
    missing_file,
    read_list,
    refuse,
    require_folder,
    require_root,
)
from segkit.data.matlab import read_mat
from segkit.data.samples import Sample, SampleSet, read_index_png
from segkit.errors import InputError

SPLITS = ("train", "val", "trainaug", "trainval", "test")
ARCHIVES = "VOCtrainval_11-May-2012.tar"
SBD_ARCHIVE = "benchmark.tgz (SBD)"
WHOLE = {"train": 1464, "val": 1449, "sbd_train": 8498, "sbd_val": 2857, "trainaug": 10582}
"""Entries of the official lists, and what follows from them."""


def read(
    root: Path | str | None,
    *,
    split: str,
    augmentation: str = "sbd",
    sbd_root: Path | str | None = None,
) -> SampleSet:
    """Open ``split`` (train, val, trainaug, trainval or test, which has no labels).

    ``augmentation`` says where ``trainaug`` has its other masks from: ``sbd``, the .mat files of
    benchmark_RELEASE below ``sbd_root`` (default: ``root``), or ``folder``, the PNGs of SegmentationClassAug.
    Raises InputError for missing folders, files and list entries, and where the official lists are whole but
    do not give the 10582 images of trainaug.
    """
    root = require_root(root, dataset="voc")
    check_split(split, SPLITS, dataset="voc")
    check_option("augmentation", augmentation, ("sbd", "folder"), dataset="voc")
    voc = base_folder(
        root, marker="JPEGImages", tops=("VOCdevkit/VOC2012", "VOC2012"), dataset="voc", archives=ARCHIVES
    )
    images = files_by_id(voc / "JPEGImages", suffix=".jpg")
    notes: list[str] = []
    if split == "trainaug":
        pairs, notes = _augmented(voc, root, images, augmentation, sbd_root)
    elif split == "test":
        list_file = _list_file(voc, "test")
        keys = _with_image(_ids(list_file, "VOC2012test.tar"), images, list_file, voc)
        pairs = [(key, images[key], None) for key in keys]
    else:
        pairs = _official(voc, split, images)
    samples = [Sample(key, image, (label,) if label else ()) for key, image, label in pairs]
    return SampleSet(samples, table=load_table("voc"), name="voc", split=split, load_label=read_label, notes=notes)


Pairs = list[tuple[str, Path, Path | None]]


def read_label(sample: Sample) -> np.ndarray:
    """Raw label (H, W): the indices of a palette PNG, or the segmentation in an SBD .mat file."""
    path = sample.labels[0]
    return read_sbd_mask(path) if path.suffix == ".mat" else read_index_png(path)


def read_sbd_mask(path: Path) -> np.ndarray:
    """The segmentation (H, W) of an SBD file ``cls/<id>.mat``, values 0..20; InputError if it is not one."""
    content = read_mat(path, ["GTcls"])
    try:
        mask = content["GTcls"][0]["Segmentation"][0]
    except (KeyError, IndexError, ValueError):
        raise InputError(
            f"{path} has no field GTcls.Segmentation, so it is no class mask of SBD; unpack {SBD_ARCHIVE} again"
        ) from None
    if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer):
        raise InputError(
            f"{path} has a segmentation of shape {mask.shape} and type {mask.dtype}, but a class mask of SBD "
            f"is (height, width) of integers; unpack {SBD_ARCHIVE} again"
        )
    return mask


def _list_file(voc: Path, split: str) -> Path:
    return voc / "ImageSets" / "Segmentation" / f"{split}.txt"


def _ids(list_file: Path, archives: str = ARCHIVES) -> list[str]:
    entries = read_list(list_file, dataset="voc", archives=archives)
    for entry in entries:
        inside(list_file.parent, entry, list_file=list_file)
    check_unique(entries, file=list_file)
    return entries


def _with_image(keys: list[str], images: dict[str, Path], list_file: Path, voc: Path) -> list[str]:
    """The keys whose image is there: all of them, or those without one are refused."""
    missing = [key for key in keys if key not in images]
    if missing:
        refuse(
            missing_file(
                voc / "JPEGImages" / f"{missing[0]}.jpg",
                list_file=list_file,
                dataset="voc",
                num_missing=len(missing),
                archives=ARCHIVES,
            )
        )
    return [key for key in keys if key in images]


def _official(voc: Path, split: str, images: dict[str, Path]) -> Pairs:
    """The pairs of train, val or trainval with their palette PNGs."""
    folder = require_folder(voc / "SegmentationClass", dataset="voc", root=voc, archives=ARCHIVES)
    masks = files_by_id(folder, suffix=".png")
    list_file = _list_file(voc, split)
    keys = _ids(list_file)
    missing = [key for key in keys if key not in masks]
    if missing:
        refuse(
            InputError(
                f"image {missing[0]} of list {list_file} has no label ({folder / missing[0]}.png is missing)"
                f"{_more(missing)}; unpack {ARCHIVES} again"
            )
        )
    return [(key, images[key], masks[key]) for key in _with_image(keys, images, list_file, voc) if key in masks]


def _more(missing: list[str]) -> str:
    return f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""


def _augmented(
    voc: Path, root: Path, images: dict[str, Path], augmentation: str, sbd_root: Path | str | None
) -> tuple[Pairs, list[str]]:
    """The pairs of trainaug, sorted by id, and a note that says how many masks come from where."""
    official = {key: (image, mask) for key, image, mask in _official(voc, "train", images)}
    val = _ids(_list_file(voc, "val"))
    lists: dict[str, int] = {}
    if augmentation == "folder":
        masks, source = _community_masks(voc), "SegmentationClassAug"
    else:
        masks, lists, images = _sbd_masks(_sbd_folder(root, voc, sbd_root), images)
        source = "SBD"
    overlap = set(official) & set(val)
    if overlap:
        raise InputError(
            f"{min(overlap)} is in train.txt and in val.txt of {voc / 'ImageSets' / 'Segmentation'}"
            f"{_more(sorted(overlap))}; unpack {ARCHIVES} again"
        )
    keys = sorted((set(official) | set(masks)) - set(val))
    _check_count(keys, {"train": len(official), "val": len(val), **lists}, num_masks=len(masks), source=source)
    pairs: Pairs = []
    for key in keys:
        if key in official:
            pairs.append((key, *official[key]))
        elif key in images:
            pairs.append((key, images[key], masks[key]))
        else:
            refuse(
                InputError(
                    f"label {masks[key]} has no image ({voc / 'JPEGImages' / key}.jpg is missing); "
                    f"unpack {ARCHIVES} again"
                )
            )
    note = f"trainaug: {len(official)} masks of VOC, {len(keys) - len(official)} of {source}"
    return pairs, [note]


def _check_count(keys: list[str], found: dict[str, int], *, num_masks: int, source: str) -> None:
    """Where all lists have their official length, the derived split must have its official length too."""
    if source == "SBD":
        whole = all(found[name] == WHOLE[name] for name in ("train", "val", "sbd_train", "sbd_val"))
    else:
        whole = found["train"] == WHOLE["train"] and num_masks >= WHOLE["trainaug"]
    if whole and len(keys) != WHOLE["trainaug"]:
        raise InputError(
            f"trainaug of voc has {len(keys)} images, but the official lists give {WHOLE['trainaug']}; the "
            f"lists or the masks of {source} are not the official ones: unpack {ARCHIVES} and {source} again"
        )


def _community_masks(voc: Path) -> dict[str, Path]:
    folder = require_folder(voc / "SegmentationClassAug", dataset="voc", root=voc, archives="SegmentationClassAug.zip")
    return files_by_id(folder, suffix=".png")


def _sbd_folder(root: Path, voc: Path, sbd_root: Path | str | None) -> Path:
    """The folder ``dataset`` of benchmark_RELEASE."""
    if sbd_root is not None:
        return base_folder(
            Path(sbd_root),
            marker="cls",
            tops=("benchmark_RELEASE/dataset", "dataset"),
            dataset="SBD",
            archives=SBD_ARCHIVE,
        )
    wanted = Path("benchmark_RELEASE", "dataset")
    for base in (root, voc.parent.parent, voc.parent):
        if (base / wanted / "cls").is_dir():
            return base / wanted
    hint = ""
    if (voc / "SegmentationClassAug").is_dir():
        hint = ", or set dataset.reader.augmentation=folder to use SegmentationClassAug, which is there"
    raise InputError(
        f"split trainaug of voc needs SBD, but {root / wanted / 'cls'} does not exist; unpack {SBD_ARCHIVE} "
        f"into {root} or name its folder in dataset.reader.sbd_root{hint}"
    )


def _sbd_masks(sbd: Path, images: dict[str, Path]) -> tuple[dict[str, Path], dict[str, int], dict[str, Path]]:
    """Masks of SBD's two lists, the lengths of these, and the images of VOC completed by those of SBD."""
    masks = files_by_id(sbd / "cls", suffix=".mat")
    extra = files_by_id(sbd / "img", suffix=".jpg") if (sbd / "img").is_dir() else {}
    chosen: dict[str, Path] = {}
    lengths = {}
    for name in ("train", "val"):
        list_file = sbd / f"{name}.txt"
        keys = _ids(list_file, SBD_ARCHIVE)
        lengths[f"sbd_{name}"] = len(keys)
        _check_masks(keys, masks, sbd, list_file)
        chosen.update((key, masks[key]) for key in keys if key in masks)
    return chosen, lengths, {**extra, **images}


def _check_masks(keys: Iterable[str], masks: dict[str, Path], sbd: Path, list_file: Path) -> None:
    missing = [key for key in keys if key not in masks]
    if missing:
        refuse(
            missing_file(
                sbd / "cls" / f"{missing[0]}.mat",
                list_file=list_file,
                dataset="SBD",
                num_missing=len(missing),
                archives=SBD_ARCHIVE,
            )
        )
