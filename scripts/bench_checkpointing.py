"""What gradient checkpointing saves in memory and costs in time.

    python scripts/bench_checkpointing.py [--model se-resnext coplenet] [--policy light mixed true]
        [--precision fp32 bf16] [--steps 5]

One training step (forward, cross-entropy at the stride of the logits, backward) of DeepLabV3+ on SE-ResNeXt-50 at
output stride 8 and of COPLE-Net with group norm, on a batch of 2 images. Shown: the peak memory beyond weights,
gradients and images, and the medians of wall and processor time of a step, without checkpointing and with each policy.

On a CPU, memory is the peak resident size of the process during one step, above the size before it, when weights and
gradients are there and the libraries are warm. Each case has a process of its own, in which malloc returns every
block above 64 KiB to the system at once, so that freed memory does not count; that slows allocation, hence time is
measured in another process, where steps without it and with each policy take turns. On a GPU, memory is what torch's
allocator counts at its peak. Processor time tells the cost on a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from segkit.memory import keep_freed
from segkit.models import COPLENet, deeplabv3plus, enable_grad_checkpointing
from segkit.models.grouped import fit_for_cpu

NUM_CLASSES = 19
BATCH = 2
WARM_SIZE = 96
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
MIB = 2**20


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "coplenet":
        model: nn.Module = COPLENet(3, NUM_CLASSES, norm="group")
    else:
        model = deeplabv3plus("se_resnext50_32x4d", NUM_CLASSES, output_stride=8, encoder_weights="none")
    fit_for_cpu(model)
    return model.to(memory_format=torch.channels_last)  # both as in every run on a CPU


def step(model: nn.Module, images: torch.Tensor, *, precision: str) -> None:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
    target = torch.zeros((BATCH, *logits.shape[-2:]), dtype=torch.int64, device=images.device)
    F.cross_entropy(logits.float(), target).backward()
    if images.is_cuda:
        torch.cuda.synchronize()


def make_images(size: int, device: str) -> torch.Tensor:
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images.to(device, memory_format=torch.channels_last)


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is the resident size, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def with_policy(model: nn.Module, policy: str) -> nn.Module:
    """The same model, its blocks recomputed as ``policy`` says (`false`, `light`, `mixed` or `true`)."""
    if policy != "false":
        enable_grad_checkpointing(model, policy == "true" or policy)
    return model


def measure_memory(name: str, *, precision: str, policy: str, size: int, device: str) -> int:
    """Bytes that one step needs at its peak beyond what is there before and after it."""
    model = with_policy(build(name).to(device).train(), policy)
    step(model, make_images(WARM_SIZE, device), precision=precision)  # gradients exist from here on
    images = make_images(size, device)
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, images, precision=precision)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = status("VmRSS")
    step(model, images, precision=precision)
    return status("VmHWM") - before


def measure_time(
    name: str, *, precision: str, policies: list[str], size: int, device: str, num_steps: int
) -> dict[str, list[float]]:
    """Medians over ``num_steps`` of each policy: seconds of wall time and of processor time."""
    plain = build(name).to(device).train()
    models = [with_policy(copy.deepcopy(plain), policy) for policy in policies]
    images = make_images(size, device)
    taken: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(num_steps + 1):
        for model, times in zip(models, taken, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            step(model, images, precision=precision)
            if number:  # the first is for warming up
                times.append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        "wall": [statistics.median(item[0] for item in items) for items in taken],
        "processor": [statistics.median(item[1] for item in items) for items in taken],
    }


def in_process(task: dict[str, object], *, environment: dict[str, str]) -> Any:
    """What this script prints when it does ``task`` in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_task(task: dict[str, object]) -> object:
    kind = task.pop("kind")
    return measure_memory(**task) if kind == "memory" else measure_time(**task)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["se-resnext", "coplenet"], choices=["se-resnext", "coplenet"])
    parser.add_argument("--policy", nargs="+", default=["light", "mixed", "true"], choices=["light", "mixed", "true"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind; 0 measures memory only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed()  # as every command of segkit does, unless the variables of RETURN_AT_ONCE are set
    if options.task:
        print(json.dumps(run_task(json.loads(options.task))))
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {options.device}, {threads} threads, {BATCH} images of side {options.size}")
    columns = ("extra MiB", "ratio", "s a step", "ratio", "cpu ratio")
    print(" " * 26 + "".join(f"{column:>11}" for column in columns))
    policies = ["false", *options.policy]
    for name in options.model:
        for precision in options.precision:
            task = {"name": name, "precision": precision, "size": options.size, "device": options.device}
            memory = [
                in_process(task | {"kind": "memory", "policy": policy}, environment=RETURN_AT_ONCE)
                for policy in policies
            ]
            taken: dict[str, Any] = {}
            if options.steps:
                timing = {"kind": "time", "policies": policies, "num_steps": options.steps}
                taken = in_process(task | timing, environment={})
            for row, policy in enumerate(policies):
                line = f"{name:12}{precision:6}{policy:8}{memory[row] / MIB:11.0f}{memory[row] / memory[0]:11.2f}"
                if taken:
                    wall, processor = taken["wall"], taken["processor"]
                    line += f"{wall[row]:11.2f}{wall[row] / wall[0]:11.2f}{processor[row] / processor[0]:11.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
