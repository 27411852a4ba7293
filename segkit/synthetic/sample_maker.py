"""Small synthetic data sets in the official layouts, which layouts.yaml describes: the real readers run offline."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from segkit.data.labels import VOID, load_table, table_file
from segkit.data.readers.robotic_instrument import PAPER_FRAMES
from segkit.errors import InputError
from segkit.evaluation.overlay import palette_image
from segkit.synthetic.canvas import Canvas, box, ellipse
from segkit.synthetic.scenes import Scene, paint_classes

Content = Image.Image | NDArray | list[str] | Mapping[str, Any]
"""What a file holds: a picture, the lines of a text, or the fields of a .mat or .json file."""


class Item(NamedTuple):
    """One image of data set ``data`` and what its files are made of: ``raw`` is the label as label files have it."""

    data: str
    split: str
    folder: str
    name: str
    image: NDArray[np.uint8]
    raw: NDArray[np.uint8]
    scene: Scene


@dataclass(frozen=True)
class Layout:
    """An entry of layouts.yaml, which says what the fields are."""

    splits: dict[str, str]
    name: str
    sizes: list[tuple[int, int]]
    files: list[tuple[str, str, str]]
    lists: dict[str, tuple[str, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    void: int = VOID
    void_border: int = 0
    void_share: float = 0.0
    raw_ids: dict[int, int] | None = None
    background: int | None = None
    grey: bool = False


@cache
def layouts() -> dict[str, Layout]:
    """Name of a data set to its layout."""
    text = Path(__file__).with_name("layouts.yaml").read_text(encoding="utf-8")
    return {data: Layout(**entry) for data, entry in yaml.safe_load(text).items()}


def write_layout(data: str, output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """Write every file of a sample of data set ``data``, with what is odd in the official one."""
    layout = layouts()[data]
    raw_ids = layout.raw_ids or load_table(data).train_to_raw
    to_raw = np.full(256, layout.void, np.uint8)
    to_raw[list(raw_ids)] = list(raw_ids.values())
    paint = partial(paint_classes, rng, num_classes=len(raw_ids))
    names: dict[str, list[str]] = {split: [] for split in layout.splits}
    for split, folders in layout.splits.items():
        for index, classes in enumerate(_class_plan(len(raw_ids), _count(split, num_images), rng)):
            if layout.background is not None:
                classes = [layout.background, *(k for k in classes if k != layout.background)]
            size = _scaled(layout.sizes[index % len(layout.sizes)], scale)
            void_border = 0 if split == "sbd" else layout.void_border
            scene = paint(size=size, classes=classes, void_border=void_border, void_share=layout.void_share)
            grey = layout.grey and (split, index) == ("train", 1)
            image = scene.image.mean(-1).astype(np.uint8) if grey else scene.image
            folder = folders.split()[index % len(folders.split())] if folders else ""
            number = 2 * index + 1 if split == "test" else index + 1
            name = layout.name.format(split=split, folder=folder, index=index, number=number, **_random(index, rng))
            names[split].append(name)
            _write_item(output, Item(data, split, folder, name, image, to_raw[scene.label], scene))
    for path, (splits, line) in layout.lists.items():
        listed = sorted(name for split in splits.split() for name in names[split])
        _write(output / path, [line.format(name=name) for name in listed])
    for path, content in _other_files(data, names).items():
        _write(output / path, content)
    if data == "bdd100k":  # one portrait image with a landscape mask, as official pairs of this name
        for split, (name, *_) in table_file("bdd100k")["mismatched_pairs"]["portrait"].items():
            sizes = _scaled((720, 1280), scale), _scaled((1280, 720), scale)
            wide, tall = (paint(size=size, classes=[0, 2, 10]) for size in sizes)
            _write_item(output, Item(data, split, "", name, tall.image, wide.label, wide))
    if data == "cityscapes":  # a coarse training image that is black, with one channel and a constant label
        black = np.zeros(_scaled(layout.sizes[0], scale), np.uint8)
        scene = Scene(black, black, black.astype(np.uint16))
        _write_item(output, Item(data, "train_extra", "troisdorf", "troisdorf_000000_000073", black, black, scene))


def _count(split: str, num_images: int) -> int:
    """Number of images: half as many, at least two, in every split but the training ones."""
    return num_images if split in ("train", "train_extra", "sbd") else max(2, num_images // 2)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """``size`` (height, width) times ``scale``, at least 32 pixels a side."""
    return max(32, round(size[0] * scale)), max(32, round(size[1] * scale))


def _class_plan(num_classes: int, num_images: int, rng: np.random.Generator) -> list[list[int]]:
    """Which classes each of ``num_images`` scenes must show: all classes together, at least three a scene."""
    order = rng.permutation(num_classes).tolist()
    plan = [order[index::num_images] for index in range(num_images)]
    return [part + [k for k in order if k not in part][: max(0, 3 - len(part))] for part in plan]


def _random(index: int, rng: np.random.Generator) -> dict[str, str]:
    """Twice eight hexadecimal digits, and a key in base64; the first two keys begin with "-" and "_"."""
    digits, key = rng.bytes(8).hex(), base64.urlsafe_b64encode(rng.bytes(16)).decode().rstrip("=")
    return {"digits": f"{digits[:8]}-{digits[8:]}", "key": ("-", "_", key[0])[min(index, 2)] + key[1:]}


def _write_item(output: Path, item: Item) -> None:
    for splits, path, content in layouts()[item.data].files:
        if item.split in splits.split():
            path = path.format(split=item.split, folder=item.folder, name=item.name)
            _write(output / path, CONTENTS[content](item, path))


def _write(path: Path, content: Content) -> None:
    """Write a file in the format that its suffix names; JPEGs in high quality."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = Image.fromarray(content) if isinstance(content, np.ndarray) else content
    if isinstance(content, Image.Image):
        content.save(path, quality=95)
    elif isinstance(content, list):
        path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    else:
        savemat(path, dict(content), do_compression=True)


def _palette(item: Item, pixels: NDArray[np.uint8]) -> Content:
    """A palette PNG (mode P) of ``pixels`` (H, W) in the colours of the data set."""
    palette = load_table(item.data).palette
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[VOID] = (224, 224, 192) if item.data == "voc" else (0, 0, 0)
    return palette_image(pixels, colours)


def _objects(item: Item) -> NDArray[np.uint8]:
    return np.where(item.scene.label == VOID, 0, item.scene.instances).astype(np.uint8)


UNLABELED, EGO_VEHICLE, STATIC = 0, 1, 4
"""Raw ids of Cityscapes without a class."""


def _cityscapes(item: Item, path: str) -> Content:
    """A label file: fine labels, of test images only the ego vehicle; coarse ones lack wide outlines."""
    raw, kernel = item.raw.copy(), np.ones((max(3, len(item.raw) // 40),) * 2, np.uint8)
    raw[: max(1, len(raw) // 100)] = STATIC if raw.any() else UNLABELED
    if path.startswith("gtCoarse"):
        raw[cv2.dilate(item.scene.instances, kernel) != cv2.erode(item.scene.instances, kernel)] = UNLABELED
    elif item.split == "test":
        raw[raw != EGO_VEHICLE] = UNLABELED
    if path.endswith("labelIds.png"):
        return raw
    if path.endswith("instanceIds.png"):  # things (raw ids from 24 on) have id * 1000 + number, everything else its id
        return np.where(raw >= 24, raw * np.uint16(1000) + item.scene.instances, raw).astype(np.uint16)
    if path.endswith("polygons.json"):
        return {"imgHeight": raw.shape[0], "imgWidth": raw.shape[1], "objects": []}
    table, colours = load_table("cityscapes"), np.full((256, 4), (0, 0, 0, 255), np.uint8)
    colours[list(table.train_to_raw.values()), :3] = table.palette
    return colours[raw]


def _cocostuff10k(item: Item, path: str) -> Content:
    """The fields that tell version 1.1 from version 1.0: it has names of the raw ids from 1 on."""
    _, *names = table_file(item.data)["raw_names"].values()
    return {"S": item.raw.astype(float), "names": np.array([names], object).T}


CONTENTS: dict[str, Callable[[Item, str], Content]] = {
    "image": lambda item, path: item.image,
    "raw": lambda item, path: item.raw,
    "palette": lambda item, path: _palette(item, item.raw),
    "objects": lambda item, path: _palette(item, np.where(item.raw == VOID, VOID, _objects(item)).astype(np.uint8)),
    # Empty for VOC's own images, so that it is seen if it is taken for VOC's mask.
    "sbd": lambda item, path: {"GTcls": {"Segmentation": item.raw * (item.split == "sbd")}},
    "cocostuff10k": _cocostuff10k,
    "mapillary": lambda item, path: item.raw * np.uint16(256) + _objects(item),
    "cityscapes": _cityscapes,
}
"""What a file of an image holds, by its name in layouts.yaml."""


def _other_files(data: str, names: Mapping[str, list[str]]) -> dict[str, Content]:
    """Path to content of the files about all images, but for the lists."""
    if data == "voc":  # SBD's lists hold one image of VOC's validation and one of its training list
        half, top = (len(names["sbd"]) + 1) // 2, "benchmark_RELEASE/dataset"
        train, val = [*names["sbd"][:half], names["val"][0]], [*names["sbd"][half:], names["train"][0]]
        return {f"{top}/train.txt": sorted(train), f"{top}/val.txt": sorted(val)}
    if data == "mapillary":
        return {"config.json": {"labels": table_file(data)["config_labels"], "version": "1.2", "mapping": "public"}}
    return {path: text.splitlines() for path, text in layouts()[data].texts.items()}


PARTS = {
    10: ((70, 75, 90), 0, 0.65, 1),  # shaft
    20: ((150, 155, 160), 0.65, 0.82, 0.9),  # wrist
    30: ((205, 200, 140), 0.82, 1.05, 0.7),  # claspers
}
"""Codes of the parts of an instrument in the official masks to their colour, begin, end, and half their width."""


def write_robotic_instrument(output: Path, *, num_images: int, rng: np.random.Generator, scale: float) -> None:
    """Eight sequences with frames in each range of the paper's split; one mask folder per instrument.

    The irregular folder names, the drop-in probe (Other_labels) of the first two sequences, overlapping instruments,
    the dark border of the frames and the masks with three equal channels in sequence 7 are as in the official data.
    At least one training frame a sequence is written, so there are never fewer than eight.
    """
    folders = table_file("robotic_instrument_parts")["mask_folders"]
    for number, (sequence, instruments) in enumerate(sorted(folders.items())):
        for split, frames in PAPER_FRAMES.items():
            share, left_over = divmod(_count(split, num_images), len(folders))
            for frame in frames[: max(1, share + (number < left_over))]:
                image, masks = _surgery(rng, _scaled((1080, 1920), scale), instruments)
                _write(output / sequence / "left_frames" / f"frame{frame:03d}.png", image)
                for instrument, mask in zip(instruments, masks, strict=True):
                    pixels = mask[..., None].repeat(3, 2) if sequence == "instrument_dataset_7" else mask
                    _write(output / sequence / "ground_truth" / instrument / f"frame{frame:03d}.png", pixels)


def _surgery(rng: np.random.Generator, size: tuple[int, int], instruments: list[str]) -> tuple[NDArray, list[NDArray]]:
    """A frame, and a mask for every instrument: they come from both sides and overlap where they meet."""
    canvas, masks, (height, width) = Canvas(rng, size, 0), [], size
    outside = np.ones(size, bool)  # the content of official frames is x 328..1591, y 37..1046 of 1920x1080
    outside[height * 37 // 1080 : height * 1047 // 1080, width * 328 // 1920 : width * 1592 // 1920] = False
    canvas.paint(box(0, 0, width, height), None, "tissue")
    meeting = rng.uniform((0.4, 0.4), (0.6, 0.55)) * (width, height)
    for index, instrument in enumerate(instruments):
        canvas.label[:] = 0
        if instrument.startswith("Other"):  # a drop-in probe
            x, y = rng.uniform((0.3, 0.72), (0.7, 0.82)) * (width, height)
            canvas.paint(ellipse(x, y, 0.09 * height, 0.09 * height), 40, "metal", colour=(60, 120, 200))
        else:
            start = np.array([(0.18, 0.82)[index % 2] * width, rng.uniform(0.1, 0.9) * height])
            rod = meeting + rng.uniform(-0.06, 0.06, 2) * height - start
            across = 0.06 * height * np.array([-rod[1], rod[0]]) / np.hypot(*rod)
            for code, (colour, begin, end, half) in PARTS.items():
                low, high, side = start + begin * rod, start + end * rod, half * across
                canvas.paint([low - side, low + side, high + side, high - side], code, "metal", colour=colour)
        masks.append(np.where(outside, 0, canvas.label).astype(np.uint8))
    image = canvas.photograph(variety=0.2)
    image[outside] = 15
    return image, masks


WRITERS: dict[str, Callable[..., None]] = {
    **{name: partial(write_layout, name) for name in layouts()},
    "cityscapes_coarse": partial(write_layout, "cityscapes"),
    "robotic_instrument": write_robotic_instrument,
}
"""Data set name, as in configs/dataset/, to the function that writes its layout."""


def make_sample(name: str, output: Path | str, *, num_images: int = 8, seed: int = 0, scale: float = 0.25) -> Path:
    """Write a synthetic copy of data set ``name`` in its official layout into ``output``; return ``output``.

    ``output`` is then what ``dataset.root`` takes. The training split has ``num_images`` images and every other split
    half as many, at least two; on top of these come the broken images of the official data. Robotic Instrument has at
    least one frame a sequence, that is eight. Every class occurs in the training and in the validation split. ``scale``
    times the official size in pixels is the size of the images (Mapillary: half of that), at least 32 a side. The same
    ``seed`` writes the same pixels. Files that no reader here uses may be left out.

    Raises InputError for an unknown name, a count below one, a ``scale`` outside [0.01, 1], and an ``output`` that
    exists and is not empty (nothing is ever overwritten).
    """
    output = Path(output)
    if name not in WRITERS:
        raise InputError(
            f"there is no sample of data set {name!r}; samples can be made of {', '.join(sorted(WRITERS))}"
        )
    if num_images < 1:
        raise InputError(f"a sample needs at least one image, got {num_images}; use --n 8")
    if seed < 0:
        raise InputError(f"the seed of a sample is {seed}, but must be 0 or more; use --seed 0")
    if not 0.01 <= scale <= 1:
        raise InputError(f"the scale of a sample's images is {scale}, but must be from 0.01 to 1; use --scale 0.25")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output} exists and is not an empty folder; name a new folder with --output, nothing is overwritten"
        )
    try:
        WRITERS[name](output, num_images=num_images, rng=np.random.default_rng(seed), scale=scale)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a sample would open as a smaller one
        raise
    return output
