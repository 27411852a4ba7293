"""Images of other channels than three and of more than 8 bits, in files that are written from the specification."""

import struct
from dataclasses import replace

import imagecodecs
import numpy as np
from PIL import Image

from segkit.config.compose import compose
from segkit.config.dataset import ImageType

SIZE = (40, 48)
DIVISOR = {"uint8": 255, "uint16": 65535, "float32": 1}
SMALL = [
    "dataset=folder", "model=coplenet", "model.feature_channels=[4,8,16,32,64]", "model.num_groups=2", "workers=0",
    "dataset.crop=[32,32]", "batch_size=2", "limit_steps=2", "loss=cross_entropy", "device=cpu", "precision=fp32",
    "evaluation.pictures=1",
]  # fmt: skip


def tiff(*pages, planar=False, order="<", big=False, **tags):
    """An uncompressed TIFF (or BigTIFF) of the arrays (H, W, C), one a page, written from the specification."""
    mark, place, width = b"II" if order == "<" else b"MM", *(("Q", 8) if big else ("I", 4))
    out = bytearray(
        struct.pack(f"{order}2sHHHQ", mark, 43, 8, 0, 0) if big else struct.pack(f"{order}2sHI", mark, 42, 0)
    )
    link = width
    for page in pages:
        height, columns, num = page.shape
        stored = page.astype(page.dtype.newbyteorder(order))
        places, parts = [], [np.ascontiguousarray(stored[..., k]) for k in range(num)] if planar else [stored]
        for part in parts:
            places.append(len(out))
            out += part.tobytes() + bytes(part.nbytes % 2)
        kind = {"u": 1, "i": 2, "f": 3}[page.dtype.kind]
        entries = {
            256: (4, [columns]), 257: (4, [height]), 258: (3, [page.dtype.itemsize * 8] * num), 259: (3, [1]),
            262: (3, [1]), 273: (4, places), 277: (3, [num]), 278: (4, [height]),
            279: (4, [part.nbytes for part in parts]), 284: (3, [2 if planar else 1]), 339: (3, [kind] * num),
            **({338: (3, [0] * (num - 1))} if num > 1 else {}),
            **{int(tag[1:]): (4, [value]) for tag, value in tags.items()},
        }  # fmt: skip
        values = {}
        for tag, (type_, numbers) in entries.items():
            packed = struct.pack(f"{order}{len(numbers)}{'H' if type_ == 3 else 'I'}", *numbers)
            values[tag] = packed.ljust(width, b"\0")
            if len(packed) > width:
                values[tag] = struct.pack(f"{order}{place}", len(out))
                out += packed + bytes(len(packed) % 2)
        struct.pack_into(f"{order}{place}", out, link, len(out))
        out += struct.pack(f"{order}{'Q' if big else 'H'}", len(entries))
        for tag, (type_, numbers) in sorted(entries.items()):
            out += struct.pack(f"{order}HH{place}", tag, type_, len(numbers)) + values[tag]
        link = len(out)
        out += bytes(width)
    return bytes(out)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    elif path.suffix == ".tif":
        path.write_bytes(tiff(image, planar=image.shape[2] == 5))
    else:
        path.write_bytes(imagecodecs.png_encode(image[..., 0] if image.shape[2] == 1 else image))


def picture(name, channels, dtype):
    """An image whose channels have other means and deviations each."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    values = rng.normal(0.2 + 0.1 * np.arange(channels), 0.02 * (1 + np.arange(channels)), (*SIZE, channels))
    return values.astype(dtype) * 500 if dtype == "float32" else (values.clip(0, 1) * DIVISOR[dtype]).astype(dtype)


KINDS = {
    "3 uint8 png": (3, "uint8", ".png"),
    "4 uint8 tif": (4, "uint8", ".tif"),
    "5 uint16 tif": (5, "uint16", ".tif"),
    "6 float32 npy": (6, "float32", ".npy"),
    "1 uint16 png": (1, "uint16", ".png"),
}
SPLITS = {"train": "abcd", "val": "ef"}


def make(root, name):
    """Write images and masks of a kind; return its overrides."""
    channels, dtype, end = KINDS[name]
    for split, letters in SPLITS.items():
        for letter in letters:
            image = picture(letter, channels, dtype)
            write(root / "images" / split / (letter + end), image.transpose(2, 0, 1) if end == ".npy" else image)
            mask = np.random.default_rng(ord(letter)).integers(0, 2, SIZE, np.uint8)
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "labels" / split / f"{letter}.png")
    (root / "classes.yaml").write_text("names: [ground, tool]\n")
    return [f"dataset.root={root}", f"dataset.in_channels={channels}", f"dataset.dtype={dtype}",
            f"cache_dir={root}/cache", *["dataset.color_jitter=0"] * (name != "3 uint8 png")]  # fmt: skip


def statistics(name):
    """Mean and deviation of each channel of the training images, in float64."""
    channels, dtype, _ = KINDS[name]
    pixels = np.concatenate([picture(letter, channels, dtype).reshape(-1, channels) for letter in SPLITS["train"]])
    return pixels.mean(0, np.float64) / DIVISOR[dtype], pixels.std(0, dtype=np.float64) / DIVISOR[dtype]


def kind_of(name):
    """A configuration of the kind, whose mean and deviation are 0.5 and 0.25."""
    channels, dtype, _ = KINDS[name]
    half = {} if name == "3 uint8 png" else {"mean": [0.5] * channels, "std": [0.25] * channels}
    config = compose([*SMALL, "dataset.color_jitter=0"])
    dataset = replace(config.dataset, in_channels=channels, dtype=ImageType(dtype), **half)
    return replace(config, dataset=dataset)
