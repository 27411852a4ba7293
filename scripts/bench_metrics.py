"""Time of one confusion-matrix update on a label map, beside torchmetrics and a plain torch loop.

    python scripts/bench_metrics.py [--size 1024 2048] [--classes 19 150] [--threads 2] [--repeats 15]
    python scripts/bench_metrics.py --loop 8 --size 512 1024 --classes 19 --repeats 5

``--loop N``: a whole evaluation instead, of N images in memory with DeepLabV3+ on EfficientNet-Lite0,
beside the shortest loop over the same model and tensors: forward pass, interpolation to the label's size, argmax,
bincount. torchmetrics is optional (`pip install torchmetrics`); without it its rows are left out. All ways count the
same maps and must give the same matrix. Figures are medians of wall time on the machine that runs the script.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import cv2
import torch
from torch import Tensor
from torch.nn import functional as F

from segkit.data.loader import Batch
from segkit.evaluation import ConfusionMatrix, evaluate
from segkit.memory import keep_freed
from segkit.models import Segmenter, deeplabv3plus


def label_maps(size: tuple[int, int], num_classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(prediction, target) as noise and as large areas with shifted borders; one row in ten is void."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, num_classes, size, generator=generator) for _ in range(2)]
    blocks = torch.randint(0, num_classes, (size[0] // 64 + 1, size[1] // 64 + 1), generator=generator)
    areas = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[: size[0], : size[1]].contiguous()
    maps = {"noise": (noise[0], noise[1]), "areas": (areas.roll(7, 1), areas.clone())}
    for _, target in maps.values():
        target[: size[0] // 10] = 255
    return maps


def plain_torch(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """The usual few lines: mask, combine, bincount."""
    valid = target != 255
    index = target[valid].long() * num_classes + pred[valid].long()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def ways(num_classes: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each way to count, by name: (pred, target) -> (K, K)."""

    def segkit(pred: Tensor, target: Tensor) -> Tensor:
        matrix = ConfusionMatrix(num_classes)
        matrix.update(pred, target)
        return matrix.counts

    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "segkit": segkit,
        "plain torch": lambda pred, target: plain_torch(pred, target, num_classes),
    }
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError:
        return found

    def with_torchmetrics(validate: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def count(pred: Tensor, target: Tensor) -> Tensor:
            metric = MulticlassConfusionMatrix(num_classes, ignore_index=255, validate_args=validate)
            metric.update(pred, target)
            return metric.confmat

        return count

    found["torchmetrics"] = with_torchmetrics(True)
    found["torchmetrics, unchecked"] = with_torchmetrics(False)
    return found


def medians_ms(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall time of each call in milliseconds; they take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first is for warming up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) * 1e3 for name, taken in times.items()}


def loops(num_images: int, size: tuple[int, int], num_classes: int) -> dict[str, Callable[[], Tensor]]:
    """A whole evaluation by segkit, and by the shortest loop, both (K, K)."""
    torch.manual_seed(0)
    net = deeplabv3plus("tu-tf_efficientnet_lite0", num_classes, output_stride=16, encoder_weights="none")
    model = Segmenter(net).eval().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (num_images, 1, 3, *size), dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (num_images, 1, *size), dtype=torch.uint8)
    batches = [Batch(images[i], labels[i], [str(i)], [i]) for i in range(num_images)]

    @torch.inference_mode()
    def bare() -> Tensor:
        total = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for image, label in zip(images, labels, strict=True):
            scores = F.interpolate(model(image), size, mode="bilinear", align_corners=False)
            total += plain_torch(scores.argmax(1), label, num_classes)
        return total

    return {"segkit": lambda: torch.from_numpy(evaluate(model, batches, num_classes=num_classes).counts), "bare": bare}


def compare_loops(num_images: int, size: tuple[int, int], num_classes: int, repeats: int) -> None:
    """Print images a second of both loops."""
    calls = loops(num_images, size, num_classes)
    differing = int((calls["segkit"]() - calls["bare"]()).abs().sum()) // 2
    taken = medians_ms(calls, repeats)
    for name, ms in taken.items():
        speed, ratio = num_images / ms * 1e3, taken["bare"] / ms
        print(f"K={num_classes:<4} evaluation, {name:8} {speed:8.2f} images/s  {ratio:6.2f} of bare")
    print(f"       {differing} of {num_images * size[0] * size[1]} pixels counted in another cell")


def main() -> None:
    """Print one table row per number of classes, kind of map, label type and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), help="height and width")
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--loop", type=int, metavar="N", help="compare whole evaluations of N images")
    args = parser.parse_args()
    keep_freed()  # as every command of segkit does
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    warnings.simplefilter("ignore")
    print(f"{args.size[0]}x{args.size[1]} pixels, {args.threads} threads, median of {args.repeats}")
    for num_classes in args.classes:
        if args.loop:
            compare_loops(args.loop, tuple(args.size), num_classes, args.repeats)
            continue
        counters = ways(num_classes)
        for kind, (pred, target) in label_maps(tuple(args.size), num_classes).items():
            for dtype in (torch.uint8, torch.int64):
                pair = pred.to(dtype), target.to(dtype)
                expected = plain_torch(*pair, num_classes)
                for name, count in counters.items():
                    assert torch.equal(count(*pair), expected), name
                calls = {name: functools.partial(count, *pair) for name, count in counters.items()}
                taken = medians_ms(calls, args.repeats)
                for name, ms in taken.items():
                    label = str(dtype).removeprefix("torch.")
                    ratio = ms / taken["segkit"]
                    print(f"K={num_classes:<4} {kind:6} {label:6} {name:24} {ms:8.2f} ms  {ratio:6.1f}x")


if __name__ == "__main__":
    main()
