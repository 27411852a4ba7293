"""Small synthetic copies of Cityscapes (fine and coarse), BDD100K and Mapillary Vistas."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segkit.data.labels import LabelTable, load_table
from segkit.data.readers.bdd100k import mismatched_pairs
from segkit.data.readers.mapillary import config_labels
from segkit.synthetic.layouts import other_splits, scaled
from segkit.synthetic.sample_maker_scenes import (
    VOID,
    Scene,
    class_plan,
    draw_scene,
    full_palette,
    to_raw,
    write_jpeg,
    write_png,
)

CITIES = {
    "train": ("aachen", "bochum", "zurich"),
    "val": ("frankfurt", "lindau"),
    "test": ("berlin",),
    "train_extra": ("augsburg", "troisdorf"),
}
BROKEN = "troisdorf_000000_000073"
"""The coarse training image of Cityscapes that is black, has one channel and a constant label."""

EGO_VEHICLE, STATIC, UNLABELED = 1, 4, 0
"""Raw ids of Cityscapes without a class."""


def write_cityscapes(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """leftImg8bit, gtFine and gtCoarse for train, val, test (dummy labels), train_extra (a broken image)."""
    table = load_table("cityscapes")
    for split, cities in CITIES.items():
        count = num_images if split in ("train", "train_extra") else other_splits(num_images)
        for index, classes in enumerate(class_plan(19, count, rng)):
            city = cities[index % len(cities)]
            scene = draw_scene(rng, size=scaled((1024, 2048), scale), num_classes=19, classes=classes, void_share=0.06)
            name = f"{city}_{index:06d}_000019"
            write_png(output / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", scene.image)
            raw = to_raw(scene.label, table.train_to_raw, void=EGO_VEHICLE)
            raw[: max(1, raw.shape[0] // 100)] = STATIC
            if split != "train_extra":
                fine = raw if split != "test" else np.where(raw == EGO_VEHICLE, EGO_VEHICLE, 0).astype(np.uint8)
                _write_cityscapes_labels(output / "gtFine" / split / city, f"{name}_gtFine", fine, scene, table)
            if split != "test":
                coarse = np.where(_outlines(scene), UNLABELED, raw).astype(np.uint8)
                folder = output / "gtCoarse" / split / city
                _write_cityscapes_labels(folder, f"{name}_gtCoarse", coarse, scene, table)
    _write_broken(output, scaled((1024, 2048), scale), table)


def _outlines(scene: Scene) -> NDArray[np.bool_]:
    """Wide stripes along the outlines of objects, which coarse polygons leave out."""
    from scipy.ndimage import maximum_filter, minimum_filter

    width = max(3, scene.label.shape[0] // 40)
    return maximum_filter(scene.instances, width) != minimum_filter(scene.instances, width)


def _write_cityscapes_labels(folder: Path, stem: str, raw: NDArray[np.uint8], scene: Scene, table: LabelTable) -> None:
    write_png(folder / f"{stem}_labelIds.png", raw)
    # Things (raw ids from 24 on) carry id * 1000 + number, everything else its id.
    instances = np.where(raw >= 24, raw.astype(np.uint16) * 1000 + scene.instances, raw).astype(np.uint16)
    write_png(folder / f"{stem}_instanceIds.png", instances)
    colours = np.zeros((256, 4), np.uint8)
    colours[:, 3] = 255
    for train, value in table.train_to_raw.items():
        colours[value, :3] = table.palette[train]
    write_png(folder / f"{stem}_color.png", colours[raw])
    polygons = {"imgHeight": raw.shape[0], "imgWidth": raw.shape[1], "objects": []}
    (folder / f"{stem}_polygons.json").write_text(json.dumps(polygons), encoding="utf-8")


def _write_broken(output: Path, size: tuple[int, int], table: LabelTable) -> None:
    black = np.zeros(size, np.uint8)
    write_png(output / "leftImg8bit" / "train_extra" / "troisdorf" / f"{BROKEN}_leftImg8bit.png", black)
    scene = Scene(image=np.zeros((*size, 3), np.uint8), label=black, instances=black.astype(np.uint16))
    folder = output / "gtCoarse" / "train_extra" / "troisdorf"
    _write_cityscapes_labels(folder, f"{BROKEN}_gtCoarse", black, scene, table)


def write_bdd100k(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """bdd100k/images/10k and labels/sem_seg (masks, colormaps), and one portrait image a labelled split.

    The portrait images bear the names of two of the six official pairs whose mask does not fit.
    """
    table = load_table("bdd100k")
    top = output / "bdd100k"
    palette = full_palette(table.palette)
    for split in ("train", "val", "test"):
        count = num_images if split == "train" else other_splits(num_images)
        for classes in class_plan(19, count, rng):
            name = f"{rng.integers(2**32):08x}-{rng.integers(2**32):08x}"
            scene = draw_scene(rng, size=scaled((720, 1280), scale), num_classes=19, classes=classes, void_share=0.16)
            write_jpeg(top / "images" / "10k" / split / f"{name}.jpg", scene.image)
            if split != "test":
                _write_bdd_labels(top, split, name, scene.label, palette)
        if split != "test":
            name = mismatched_pairs("portrait")[split][0]
            scene = draw_scene(rng, size=scaled((720, 1280), scale), num_classes=19, classes=[0, 2, 10])
            portrait = draw_scene(rng, size=scaled((1280, 720), scale), num_classes=19, classes=[0, 2, 10])
            write_jpeg(top / "images" / "10k" / split / f"{name}.jpg", portrait.image)
            _write_bdd_labels(top, split, name, scene.label, palette)


def _write_bdd_labels(top: Path, split: str, name: str, label: NDArray[np.uint8], palette: NDArray[np.uint8]) -> None:
    folder = top / "labels" / "sem_seg"
    write_png(folder / "masks" / split / f"{name}.png", label)
    write_png(folder / "colormaps" / split / f"{name}.png", label, palette=palette)


def write_mapillary(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """The layout of version 1.2: config.json, JPEGs of several sizes, palette PNGs and 16-bit instances.

    Some keys begin with "-" or "_", as official ones do.
    """
    table = load_table("mapillary")
    labels = config_labels()
    output.mkdir(parents=True, exist_ok=True)
    config = {"labels": labels, "version": "1.2", "mapping": "public"}
    (output / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    palette = full_palette(np.array([entry["color"] for entry in labels], np.uint8))
    sizes = ((2448, 3264), (2760, 3680), (1836, 3264))
    for split, folder in (("train", "training"), ("val", "validation"), ("test", "testing")):
        count = num_images if split == "train" else other_splits(num_images)
        for index, classes in enumerate(class_plan(65, count, rng)):
            key = base64.urlsafe_b64encode(rng.bytes(16)).decode().rstrip("=")
            key = ("-", "_", key[0])[min(index, 2)] + key[1:]
            scene = draw_scene(
                rng,
                size=scaled(sizes[index % 3], scale / 2),
                num_classes=65,
                classes=classes,
                void_share=0.04,
            )
            write_jpeg(output / folder / "images" / f"{key}.jpg", scene.image)
            if split == "test":
                continue
            raw = to_raw(scene.label, table.train_to_raw, void=65)
            write_png(output / folder / "labels" / f"{key}.png", raw, palette=palette)
            instances = raw.astype(np.uint16) * 256 + np.where(scene.label == VOID, 0, scene.instances)
            write_png(output / folder / "instances" / f"{key}.png", instances.astype(np.uint16))
