"""How fast data come: the loader beside a plain pipeline and beside bare decoding, and label counting.

    python scripts/bench_data.py [--images 24] [--rounds 5] [--workers 2]

Makes its own files in a temporary folder (2048x1024 PNGs with photograph-like noise, large JPEGs, label PNGs),
times every way on the same files in turns, and prints the median of each ratio over the rounds.  Times are
seconds of CPU (of this process and its workers), so that figures are per core and other programs disturb little;
OpenCV and torch have one thread.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics as stats
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
import cv2
import numpy as np
import torch
from PIL import Image

from segkit.data import Sample, SampleSet, load_table
from segkit.data.decode import pixel_limit, read_index_png, read_rgb
from segkit.data.loader import train_batches
from segkit.data.statistics import count_labels
from segkit.data.transforms import TrainTransform
from segkit.data.workers import one_thread, start_worker
from segkit.memory import keep_freed
from segkit.synthetic.scenes import paint_street

CROP = 800
BATCH = 8


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise on all scales: PNGs of it are as large, and decode as slowly, as those of street photographs."""
    image = np.full((height, width, 3), 120, np.float32)
    for cell in (4, 16, 64, 256):
        grid = rng.normal(size=(max(2, height // cell), max(2, width // cell), 3)).astype(np.float32)
        image += 0.6 * min(cell, 40) * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(size=image.shape).astype(np.float32) * 1.5
    return np.clip(image, 0, 255).astype(np.uint8)


def street_label(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Raw Cityscapes ids of a drawn street, with smooth outlines."""
    table = load_table("cityscapes")
    as_cityscapes = np.full(256, 0, np.uint8)
    for drawn, name in enumerate(load_table("synthetic").classes):
        name = {"sign": "traffic sign"}.get(name, name)
        as_cityscapes[drawn] = table.train_to_raw[table.classes.index(name)]
    halves = [paint_street(rng, size=(512, 512)).label for _ in range(2)]
    label = as_cityscapes[np.concatenate(halves, axis=1)]
    return cv2.medianBlur(cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST), 5)


def make_files(folder: Path, number: int, size: tuple[int, int], suffix: str) -> SampleSet:
    folder.mkdir()
    samples = []
    for i in range(number):
        rng = np.random.default_rng(i)
        image, label = folder / f"{i:03d}{suffix}", folder / f"{i:03d}_label.png"
        Image.fromarray(photograph(rng, *size)).save(image, quality=92)  # the quality of JPEGs only
        Image.fromarray(street_label(rng, *size)).save(label)
        samples.append(Sample(name=f"{i:03d}", image=image, labels=(label,)))
    return SampleSet(samples, table=load_table("cityscapes"), name="bench", split="train")


def decode_only(data: SampleSet) -> None:
    for sample in data.samples:
        read_rgb(sample.image)
        read_index_png(sample.labels[0])


def plain_pipeline(data: SampleSet) -> Callable[[], None]:
    """What one writes by hand: read, scale the whole pair, pad, crop, flip, colour jitter, stack.

    OpenCV reads the image and Pillow the label, as OpenCV does not keep palette indices.
    """
    lookup = data.table.to_train(np.arange(34, dtype=np.uint8)[None], file="")[0]
    lookup = np.pad(lookup, (0, 256 - 34), constant_values=255)
    transform = albumentations.Compose(
        [
            albumentations.RandomScale((-0.5, 1.0), p=1.0),
            albumentations.PadIfNeeded(CROP, CROP, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=255),
            albumentations.RandomCrop(CROP, CROP),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.ColorJitter((0.75, 1.25), (0.75, 1.25), (0.75, 1.25), (-0.05, 0.05), p=0.5),
        ],
        seed=0,
    )

    def run() -> None:
        images, labels = [], []
        for sample in data.samples:
            read = cv2.imread(str(sample.image))
            assert read is not None, sample.image
            image = cv2.cvtColor(read, cv2.COLOR_BGR2RGB)
            label = lookup[np.asarray(Image.open(sample.labels[0]))]
            pair = transform(image=image, mask=label)
            images.append(torch.from_numpy(pair["image"].transpose(2, 0, 1).copy()))
            labels.append(torch.from_numpy(pair["mask"]))
            if len(images) == BATCH:
                torch.stack(images), torch.stack(labels)
                images, labels = [], []

    return run


def loader(data: SampleSet, transform: TrainTransform) -> Callable[[], None]:
    def run() -> None:
        steps = len(data) // BATCH
        for _ in train_batches(
            data, transform=transform, batch_size=BATCH, seed=0, phase="bench", start_step=0, num_steps=steps
        ):
            pass

    return run


class WholeDecoding(SampleSet):
    """The same set without decoding JPEGs at reduced size."""

    def shrinkable(self, index: int) -> bool:
        return False


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every way in every round; the ways take turns, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = cpu_seconds()
            way()
            if turn:
                seconds[name].append(cpu_seconds() - start)
    return seconds


def cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def report(title: str, seconds: dict[str, list[float]], number: int, ratios: list[tuple[str, str, float]]) -> bool:
    print(f"\n{title}")
    for name, values in seconds.items():
        each = stats.median(values) / number
        print(f"  {name:<34} {each * 1e3:8.2f} ms an image   {1 / each:8.1f} images/s")
    good = True
    for name, other, least in ratios:
        ratio = stats.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))
        good &= ratio >= least
        print(f"  {name} is {ratio:.2f} times as fast as {other} (wanted: {least})")
    return good


def decode_label(path: Path) -> int:
    return read_index_png(path).size


def decode_labels(paths: list[Path], workers: int) -> None:
    start = partial(start_worker, limit=pixel_limit())
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=start) as pool:
        for _ in pool.map(decode_label, paths, chunksize=16):
            pass


def bench_labels(data: SampleSet, workers: int, rounds: int, copies: int = 20) -> bool:
    samples = [
        Sample(name=f"{sample.name}-{copy}", image=sample.image, labels=sample.labels)
        for copy in range(copies)
        for sample in data.samples
    ]
    many = SampleSet(samples, table=data.table, name="bench", split="train")
    paths = [sample.labels[0] for sample in samples]
    ways: dict[str, Callable[[], object]] = {
        "decode the labels": lambda: decode_labels(paths, workers),
        "count_labels": lambda: count_labels(many, workers=workers),
    }
    title = f"label counts: {len(many)} labels of 2048x1024, {workers} processes"
    good = report(title, timed(ways, rounds), len(many), [("count_labels", "decode the labels", 0.9)])
    with tempfile.TemporaryDirectory() as cache:
        count_labels(many, workers=workers, cache_dir=cache)
        start = time.perf_counter()
        count_labels(many, workers=workers, cache_dir=cache)
        seconds = time.perf_counter() - start
    print(f"  from the cache: {seconds:.3f} s (wanted: below 1)")
    return good and seconds < 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="files of each kind, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes that count labels")
    options = parser.parse_args()
    if options.images < BATCH or options.images % BATCH:
        parser.error(f"--images must be a multiple of {BATCH}")
    one_thread()
    keep_freed()  # for all ways alike: as in the workers
    with tempfile.TemporaryDirectory() as folder:
        data = make_files(Path(folder) / "png", options.images, (1024, 2048), ".png")
        sizes = [
            stats.mean(path.stat().st_size for path in paths)
            for paths in zip(*((s.image, *s.labels) for s in data.samples), strict=True)
        ]
        print(f"{options.images} pairs of 2048x1024 PNG: image {sizes[0] / 1e6:.2f} MB, label {sizes[1] / 1e3:.0f} kB")
        full = TrainTransform(crop=(CROP, CROP), scale=(0.5, 2.0), flip=0.5, color_jitter=0.5)
        bare = TrainTransform(crop=(CROP, CROP), scale=(0.5, 2.0), flip=0.5)
        ways: dict[str, Callable[[], object]] = {
            "decode only": lambda: decode_only(data),
            "plain pipeline": plain_pipeline(data),
            "segkit": loader(data, full),
            "segkit without colour jitter": loader(data, bare),
        }
        wanted = [("segkit", "plain pipeline", 1.3), ("segkit", "decode only", 0.8)]
        good = report("loader, per core: crop 800, scale 0.5-2", timed(ways, options.rounds), len(data), wanted)

        jpegs = make_files(Path(folder) / "jpg", BATCH, (2448, 3264), ".jpg")
        whole = WholeDecoding(jpegs.samples, table=jpegs.table, name="bench", split="train")
        small = TrainTransform(crop=(720, 720), resize={"size": [720, 1280]}, scale=(0.5, 2.0), flip=0.5)
        ways = {
            "decode only": lambda: decode_only(jpegs),
            "whole decoding": loader(whole, small),
            "reduced decoding": loader(jpegs, small),
        }
        wanted = [("reduced decoding", "whole decoding", 1.0)]
        title = "loader, per core: JPEGs of 3264x2448 resized to 1280x720, crop 720"
        good &= report(title, timed(ways, options.rounds), len(jpegs), wanted)
        good &= bench_labels(data, options.workers, options.rounds)
    print("\nall ratios reached" if good else "\nNOT all ratios reached")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
