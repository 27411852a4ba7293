"""PASCAL VOC 2012, and its training set augmented by the Semantic Boundaries Dataset (SBD).

Folders below ``root``, as the archives unpack them::

    VOCdevkit/VOC2012/JPEGImages/<id>.jpg   SegmentationClass/<id>.png   ImageSets/Segmentation/<split>.txt
    benchmark_RELEASE/dataset/train.txt     val.txt   cls/<id>.mat   img/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClassAug/<id>.png                   (the community's conversion of SBD)

``trainaug`` = (VOC train U SBD train U SBD val) minus VOC val: SBD's own lists overlap VOC's validation images. The VOC
training images keep their official masks, whose objects have a border of 255; SBD's masks have none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segkit.data.decode import read_index_png
from segkit.data.labels import load_table
from segkit.data.layout import Layout, and_more, check_option, check_split
from segkit.data.matlab import read_mat
from segkit.data.samples import Sample, SampleSet
from segkit.errors import InputError

SPLITS = ("train", "val", "trainaug", "trainval", "test")
ARCHIVES = "VOCtrainval_11-May-2012.tar"
SBD_ARCHIVE = "benchmark.tgz (SBD)"
LISTS = Path("ImageSets", "Segmentation")


def read(
    root: Path | str | None,
    *,
    split: str,
    augmentation: str = "sbd",
    sbd_root: Path | str | None = None,
) -> SampleSet:
    """Open ``split`` (train, val, trainaug, trainval or test, which has no labels).

    ``augmentation`` says where ``trainaug`` has its other masks from: ``sbd``, the .mat files of benchmark_RELEASE
    below ``sbd_root`` (default: ``root``), or ``folder``, the PNGs of SegmentationClassAug. Raises InputError for
    missing folders, files and list entries, and where the official lists are whole but do not give the 10582 images of
    trainaug.
    """
    layout = Layout("voc", root, archives="VOC2012test.tar" if split == "test" else ARCHIVES)
    check_split(split, SPLITS, dataset="voc")
    check_option("augmentation", augmentation, ("sbd", "folder"), dataset="voc")
    voc = layout.base("JPEGImages", "VOCdevkit/VOC2012", "VOC2012")
    images = layout.files(voc / "JPEGImages", ".jpg")
    notes: list[str] = []
    if split == "trainaug":
        samples, notes = _augmented(layout, voc, images, augmentation, sbd_root)
    else:
        samples = _official(layout, voc, split, images)
    return SampleSet(samples, table=load_table("voc"), name="voc", split=split, load_label=read_label, notes=notes)


def read_label(sample: Sample) -> np.ndarray:
    """Return the raw label (H, W): the indices of a palette PNG, or the segmentation in an SBD .mat file."""
    path = sample.labels[0]
    return read_sbd_mask(path) if path.suffix == ".mat" else read_index_png(path)


def read_sbd_mask(path: Path) -> np.ndarray:
    """Return the segmentation (H, W) of an SBD file ``cls/<id>.mat``, values 0..20; raises InputError for others."""
    found = read_mat(path, ["GTcls"]).get("GTcls")
    mask = found.get("Segmentation") if isinstance(found, dict) else None
    if not isinstance(mask, np.ndarray):
        raise InputError(
            f"{path} has no field GTcls.Segmentation, so it is no class mask of SBD; unpack {SBD_ARCHIVE} again"
        )
    if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer):
        raise InputError(
            f"{path} has a segmentation of shape {mask.shape} and type {mask.dtype}, but a class mask of SBD "
            f"is (height, width) of integers; unpack {SBD_ARCHIVE} again"
        )
    return mask


def _official(layout: Layout, voc: Path, split: str, images: dict[str, Path]) -> list[Sample]:
    """The pairs of an official split with their palette PNGs; of test, whose masks are not public, the images."""
    folder, list_file = voc / "SegmentationClass", voc / LISTS / f"{split}.txt"
    masks = {} if split == "test" else layout.files(folder, ".png")
    keys = layout.entries(list_file, voc / LISTS)
    if split != "test":
        keys = layout.listed(keys, masks, wanted=f"{folder}/{{id}}.png", list_file=list_file)
    keys = layout.listed(keys, images, wanted=f"{voc}/JPEGImages/{{id}}.jpg", list_file=list_file)
    return [Sample(key, images[key], (masks[key],) if masks else ()) for key in keys]


def _augmented(
    layout: Layout, voc: Path, images: dict[str, Path], augmentation: str, sbd_root: Path | str | None
) -> tuple[list[Sample], list[str]]:
    """The pairs of trainaug, sorted by id, and a note that says how many masks come from where."""
    official = {sample.name: sample for sample in _official(layout, voc, "train", images)}
    val = layout.entries(voc / LISTS / "val.txt", voc / LISTS)
    lists: dict[str, int] = {}
    if augmentation == "folder":
        community = Layout("voc", voc, archives="SegmentationClassAug.zip")
        masks, source = community.files(voc / "SegmentationClassAug", ".png"), "SegmentationClassAug"
    else:
        masks, lists, images = _sbd_masks(_sbd_folder(layout, voc, sbd_root), images)
        source = "SBD"
    overlap = sorted(set(official) & set(val))
    if overlap:
        raise InputError(
            f"{overlap[0]} is in train.txt and in val.txt of {voc / LISTS}{and_more(overlap)}; unpack {ARCHIVES} again"
        )
    keys = sorted((set(official) | set(masks)) - set(val))
    _check_count(keys, {"train": len(official), "val": len(val), **lists}, num_masks=len(masks), source=source)
    extra = {key: masks[key] for key in keys if key not in official}
    found = {key: images[key] for key in extra if key in images}
    pairs = layout.pair(found, extra, image=f"{voc}/JPEGImages/{{id}}.jpg", label="")
    samples = sorted([*official.values(), *pairs], key=lambda sample: sample.name)
    note = f"trainaug: {len(official)} masks of VOC, {len(keys) - len(official)} of {source}"
    return samples, [note]


def _check_count(keys: list[str], found: dict[str, int], *, num_masks: int, source: str) -> None:
    """Where all lists have their official length, the derived split must have its official length too."""
    published = load_table("voc").splits
    if source == "SBD":
        whole = all(found[name] == published[name] for name in ("train", "val", "sbd_train", "sbd_val"))
    else:
        whole = found["train"] == published["train"] and num_masks >= published["trainaug"]
    if whole and len(keys) != published["trainaug"]:
        raise InputError(
            f"trainaug of voc has {len(keys)} images, but the official lists give {published['trainaug']}; the "
            f"lists or the masks of {source} are not the official ones: unpack {ARCHIVES} and {source} again"
        )


def _sbd_folder(layout: Layout, voc: Path, sbd_root: Path | str | None) -> Path:
    """The folder ``dataset`` of benchmark_RELEASE."""
    if sbd_root is not None:
        return Layout("SBD", sbd_root, archives=SBD_ARCHIVE).base("cls", "benchmark_RELEASE/dataset", "dataset")
    wanted = Path("benchmark_RELEASE", "dataset")
    for base in (layout.root, voc.parent.parent, voc.parent):
        if (base / wanted / "cls").is_dir():
            return base / wanted
    hint = ""
    if (voc / "SegmentationClassAug").is_dir():
        hint = ", or set dataset.reader.augmentation=folder to use SegmentationClassAug, which is there"
    raise InputError(
        f"split trainaug of voc needs SBD, but {layout.root / wanted / 'cls'} does not exist; unpack {SBD_ARCHIVE} "
        f"into {layout.root} or name its folder in dataset.reader.sbd_root{hint}"
    )


def _sbd_masks(folder: Path, images: dict[str, Path]) -> tuple[dict[str, Path], dict[str, int], dict[str, Path]]:
    """Masks of SBD's two lists, the lengths of these, and the images of VOC completed by those of SBD."""
    sbd = Layout("SBD", folder, archives=SBD_ARCHIVE)
    masks = sbd.files(folder / "cls", ".mat")
    extra = sbd.files(folder / "img", ".jpg") if (folder / "img").is_dir() else {}
    chosen: dict[str, Path] = {}
    lengths = {}
    for name in ("train", "val"):
        list_file = folder / f"{name}.txt"
        keys = sbd.entries(list_file, folder)
        lengths[f"sbd_{name}"] = len(keys)
        keys = sbd.listed(keys, masks, wanted=f"{folder}/cls/{{id}}.mat", list_file=list_file)
        chosen.update((key, masks[key]) for key in keys)
    return chosen, lengths, {**extra, **images}
