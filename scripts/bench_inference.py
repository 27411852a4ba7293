"""Peak memory and time of sliding windows with flips and six scales, beside one whole-image pass at scale 1.

    python scripts/bench_inference.py [--model light se-resnext] [--classes 19 150] [--overlap 0.5] [--threads 2]

``se-resnext``: DeepLabV3+ on SE-ResNeXt-50 at output stride 8 with random weights; ``light``: three 1x1 convolutions
with the feature maps of a ResNet's first stages and logits at stride 4, so that next to nothing but the handling of the
scores is measured. Every figure comes from a fresh process. On a CPU, memory is the peak resident size above the size
before the pass, when the model, its image and the libraries are there; malloc returns every block above 64 KiB to the
system at once, so that freed memory does not count. On a GPU it is what torch's allocator counts at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from bench_checkpointing import MIB, RETURN_AT_ONCE, status
from torch import Tensor, nn

from segkit.evaluation import Inference
from segkit.evaluation.inference import ADE20K_SCALES
from segkit.memory import keep_freed
from segkit.models import Segmenter, deeplabv3plus
from segkit.models.grouped import fit_for_cpu


class Light(nn.Module):
    """Feature maps as in a ResNet: 64 channels at stride 2, 256 at stride 4, where the logits are as well."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 256, 1)
        self.last = nn.Conv2d(256, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(F.avg_pool2d(images.float(), 2)).relu()
        return self.last(self.second(F.avg_pool2d(hidden, 2)).relu())


def build(name: str, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "light":
        return Light(num_classes)
    model = deeplabv3plus("se_resnext50_32x4d", num_classes, output_stride=8, encoder_weights="none")
    fit_for_cpu(model)  # as every run does
    return Segmenter(model)


@torch.inference_mode()
def measure(
    *, model: str, num_classes: int, size: list[int], threads: int, device: str, inference: dict[str, Any]
) -> tuple[int, float]:
    """(bytes, seconds) of one prediction."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    network = build(model, num_classes).to(device).eval()
    predict = Inference(**inference)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8).to(device)
    Inference()(network, images[..., :96, :96], (96, 96))  # the libraries are warm from here on
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
        before = status("VmRSS")
    start = time.perf_counter()
    predict(network, images, (size[0], size[1]))
    if images.is_cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start
    return status("VmHWM") - before, time.perf_counter() - start


def in_process(**task: Any) -> tuple[int, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, env=os.environ | RETURN_AT_ONCE, stdout=subprocess.PIPE, text=True, check=True)
    memory, seconds = json.loads(done.stdout.splitlines()[-1])
    return memory, seconds


def main() -> None:
    """Print one table row per model and number of classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["light", "se-resnext"], choices=["light", "se-resnext"])
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], help="height and width of the image")
    parser.add_argument("--window", type=int, nargs=2, default=[800, 800], help="multiples of 32")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed()  # as every command of segkit does
    if args.task:
        print(json.dumps(measure(**json.loads(args.task))))
        return
    everything = {"window": args.window, "overlap": args.overlap, "flip": True, "scales": ADE20K_SCALES}
    print(
        f"{args.size[0]}x{args.size[1]} pixels on {args.device}, {args.threads} threads; windows of {args.window[0]}x"
        f"{args.window[1]} with an overlap of {args.overlap}, flips, scales {ADE20K_SCALES}"
    )
    for model in args.model:
        for num_classes in args.classes:
            facts = {"model": model, "num_classes": num_classes, "size": args.size, "threads": args.threads}
            whole, whole_s = in_process(**facts, device=args.device, inference={})
            full, full_s = in_process(**facts, device=args.device, inference=everything)
            print(
                f"{model:10} K={num_classes:<4} whole {whole / MIB:6.0f} MiB {whole_s:7.1f} s   "
                f"everything {full / MIB:6.0f} MiB {full_s:7.1f} s   memory {full / whole:5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
