"""Where a step's time goes: a table of its parts, and a trace to look at."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from segkit import runtime
from segkit.errors import InputError
from segkit.training.step import split
from segkit.training.trainer import Trainer

WARMUP = 2
"""Steps before the timing starts: memory is allocated and kernels are chosen in them."""


def check_enough(num_profiled: int, *, phase: str, num_steps: int) -> None:
    """Raise InputError if ``phase`` has not so many steps beside those that warm up."""
    if num_steps < WARMUP + num_profiled:
        raise InputError(
            f"profile_steps is {num_profiled}, and {WARMUP} more warm up, but phase {phase} has only {num_steps} "
            "steps: set profile_steps lower or the schedule longer"
        )


def profile_steps(trainer: Trainer, batches: Iterable[Any], *, num_steps: int, folder: Path) -> str:
    """Run ``num_steps`` steps and return a table of the median seconds of each part; writes ``folder/trace.json``.

    Parts: waiting for data, moving it to the device, forward, loss, backward, optimizer. Every part ends with a
    synchronisation of the device, so their sum is a little more than an undisturbed step.
    """
    iterator = iter(batches)
    activities = [ProfilerActivity.CPU]
    if trainer.mixed.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    trainer.wrapped.train()
    for _ in range(WARMUP):
        _one_step(trainer, iterator)
    with profile(activities=activities) as recorded:
        steps = [_one_step(trainer, iterator) for _ in range(num_steps)]
    folder.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(folder / "trace.json"))
    table = _table(steps, recorded, key=f"self_{'cuda' if len(activities) > 1 else 'cpu'}_time_total")
    return f"{table}\ntrace: {folder / 'trace.json'} (open it at ui.perfetto.dev)"


def _one_step(trainer: Trainer, iterator: Any) -> dict[str, float]:
    """Do a step, and return the seconds of each of its parts, over all pieces of an accumulated batch."""
    device, mixed = trainer.mixed.device, trainer.mixed
    times: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = time.perf_counter()
        with record_function(name):
            yield
            runtime.synchronize(device)
        times[name] += time.perf_counter() - start

    with part("waiting for data"):
        batch = next(iterator)
    with part("moving data"):
        images, labels = batch.images.to(device), batch.labels.to(device).long()
        if trainer.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        pieces = split(batch._replace(images=images, labels=labels), trainer.settings.accumulate)
    trainer.optimizer.zero_grad(set_to_none=True)
    for image, target in pieces:
        with part("forward"), mixed.autocast():
            logits = trainer.wrapped(image)
        with part("loss"):
            value = trainer.loss(logits, target) / len(pieces)
        with part("backward"):
            trainer.scaler.scale(value).backward()
    with part("optimizer"):
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
    return times


def _table(steps: list[dict[str, float]], recorded: Any, *, key: str) -> str:
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    total = sum(medians.values())
    lines = [f"median of {len(steps)} steps: {total * 1000:.1f} ms", f"{'part':20}{'ms':>10}{'share':>9}"]
    lines += [f"{name:20}{value * 1000:10.1f}{value / total:9.1%}" for name, value in medians.items()]
    operators = recorded.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40)
    return "\n".join(lines) + "\n\n" + operators
