"""``auto_batch=true``: the largest batch that fits, from the memory of two batch sizes."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from segkit import memory
from segkit.config.schema import Config, DatasetConfig
from segkit.config.targets import trust
from segkit.data.loader import Batch
from segkit.errors import InputError, OutOfMemory
from segkit.files import read_config_text
from segkit.models.grad_checkpoint import POLICIES
from segkit.run.build import build_loss, build_model, build_optimizer, even_counts
from segkit.run.changes import CONFIG_CURE
from segkit.run.own import try_loss, try_model
from segkit.run.saved import without_sources
from segkit.run.splits import Splits
from segkit.training import distributed
from segkit.training.precision import Mixed
from segkit.training.step import split, train_step

PROBES = (2, 4)
"""Images a step at which memory is measured; one alone has no statistics to normalise by."""
SHARE = 0.85
"""Of the free memory, that a step may take: the rest is for loading, evaluation and fragmentation."""


def choose_batch(
    config: Config, *, begun: Path | None, phases: dict[str, Splits], device: torch.device
) -> tuple[Config, dict[str, Any] | None]:
    """With ``auto_batch``, ``config`` with the largest ``batch_size`` that fits, and the measurements behind it.

    A line on the screen says so. A run that goes on (``begun`` is its config.yaml) keeps its batch size, and None is
    returned for the rest. The learning rate and the number of epochs stay as they are. OutOfMemory if not even
    the probes fit; InputError, before anything is measured, for a model or loss that fails.
    """
    if not config.auto_batch:
        return config, None
    if begun is not None:
        kept = read_config_text(begun, cure=CONFIG_CURE)
        if kept.get("auto_batch"):
            if type(size := kept.get("batch_size")) is not int:
                raise InputError(f"{begun} has batch_size {size!r}, but must have the number that was chosen: write it")
            distributed.print_main(f"auto_batch: batch_size={size}, as before")
            return dataclasses.replace(config, batch_size=size), None
    model = build_model(without_sources(config), next(iter(phases.values())).train.num_classes).to(device)
    for name, splits in phases.items():
        try_model(model, config, name, splits.val, device)
        loss = build_loss(config, name, even_counts(splits.train.classes)).to(device)
        try_loss(loss, config, name, splits.train, device)
    del model
    parts = config.accumulate * distributed.world_size()
    most = min(len(splits.train) for splits in phases.values()) // parts
    report: dict[str, Any] = {"phases": {}, "asked": config.batch_size, "policy": None}
    for name, splits in phases.items():
        budget = _budget(device)
        peaks = measure_alone(config, name, splits.train.classes, device)
        fits = images_that_fit(peaks, budget)
        report["phases"][name] = {"peaks": peaks, "budget": budget, "images_at_once": fits}
        most = min(most, fits)
    most = max(1, min(distributed.gather_objects(most)))
    report["batch_size"] = most * parts
    if most < images_at_once(config) <= min(len(splits.train) for splits in phases.values()):
        report["policy"] = cheapest_policy(config, phases, device)
    distributed.print_main(sentence(report))
    return dataclasses.replace(config, batch_size=most * parts), report


def images_at_once(config: Config) -> int:
    """The images of one process in one forward pass."""
    return max(1, config.batch_size // (config.accumulate * distributed.world_size()))


def _budget(device: torch.device) -> int:
    """The bytes that a process may hold during a step."""
    return memory.held(device) + int(SHARE * memory.available(device))


def cheapest_policy(config: Config, phases: dict[str, Splits], device: torch.device) -> str | None:
    """The grad_checkpointing that costs least time and with which steps of ``config.batch_size`` fit in every phase.

    Measured, from the policies that need less memory than ``config.grad_checkpointing``. None if none of them fits, or
    if the model has no blocks to compute again.
    """
    policies: list[bool | str] = [False, *POLICIES]
    for policy in policies[policies.index(config.grad_checkpointing) + 1 :]:
        tried = dataclasses.replace(config, grad_checkpointing=policy)
        try:
            fits = all(
                images_that_fit(measure_alone(tried, name, splits.train.classes, device), _budget(device))
                >= images_at_once(config)
                for name, splits in phases.items()
            )
        except OutOfMemory:
            continue
        except InputError:
            return None
        if fits:
            return str(policy).lower()
    return None


def sentence(report: dict[str, Any]) -> str:
    """What was measured and chosen, for the screen."""
    measured = [
        f"{name}: {', '.join(f'{peak / memory.GIB:.2f} GiB for {n} images' for n, peak in phase['peaks'].items())} of "
        f"{phase['budget'] / memory.GIB:.2f} GiB"
        for name, phase in report["phases"].items()
    ]
    cure = f"; {report['asked']} fit with grad_checkpointing={report['policy']}" if report["policy"] else ""
    return (
        f"auto_batch: batch_size={report['batch_size']} instead of {report['asked']} ({'; '.join(measured)}){cure}; "
        "the learning rate stays as it is"
    )


def images_that_fit(peaks: dict[int, int], budget: int) -> int:
    """The most images n with a + b n <= ``budget`` bytes, for the line through the two ``peaks`` (n -> bytes)."""
    (few, low), (many, high) = sorted(peaks.items())
    slope = max((high - low) / (many - few), 1.0)
    return max(int((budget - low) / slope + few), 0)


def measure_alone(config: Config, name: str, classes: tuple[str, ...], device: torch.device) -> dict[int, int]:
    """:func:`measure`; on a CPU in a process of its own, as a process keeps memory that it needed before."""
    if device.type != "cpu":
        return measure(config, name, classes, device)
    spawn, ends_at_once = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=signal.signal, initargs=ends_at_once) as pool:
        # the process imports the main module, which is a script, and may call segkit.train as soon as it is imported
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            found = pool.submit(_measure_bounded, config, name, classes, device)
        finally:
            sys.modules["__main__"] = main
        try:
            return found.result()
        except BrokenProcessPool as error:  # the system has killed it
            raise _does_not_fit(config, name, device, MemoryError("the system ended the process that tried")) from error


def _measure_bounded(config: Config, *arguments: Any) -> dict[int, int]:
    trust(config.trust)
    memory.keep_freed()  # as the training does
    with memory.bounded():
        return measure(config, *arguments)


def _does_not_fit(config: Config, name: str, device: torch.device, error: BaseException) -> OutOfMemory:
    crop = config.phase_dataset(name).crop
    levers = f"precision=bf16, or a smaller dataset.crop than {crop}"
    if config.grad_checkpointing is not True:
        levers = f"grad_checkpointing={memory.next_policy(config.grad_checkpointing)}, or {levers}"
    where = f"while auto_batch tried {PROBES[0]} to {PROBES[-1]} images at once"
    return memory.out_of_memory(error, device=device, where=where, levers=levers)


def measure(config: Config, name: str, classes: tuple[str, ...], device: torch.device) -> dict[int, int]:
    """Peak bytes of a training step of phase ``name`` for each number of images of :data:`PROBES`.

    Model and optimizer are built for this alone; the images are noise of the size of the crop.
    """
    model = build_model(config, len(classes)).to(device)
    average = copy.deepcopy(model) if config.ema_decay is not None else None
    loss = build_loss(config, name, even_counts(classes)).to(device)
    optimizer = build_optimizer(config, model, name)
    mixed = Mixed(config.precision.value, device)
    scaler = mixed.scaler()
    crop = config.phase_dataset(name).crop
    peaks = {}
    try:
        for images in (PROBES[0], *PROBES):  # the first step makes the optimizer's state
            batch = _noise(images, crop, len(classes), config.images)
            with memory.measuring(device) as measured:
                train_step(model, loss, optimizer, split(batch, 1), mixed=mixed, scaler=scaler).read()
            peaks[images] = measured.bytes
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        raise _does_not_fit(config, name, device, error) from error
    finally:
        del model, average, optimizer, loss
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return peaks


def _noise(images: int, crop: list[int], num_classes: int, kind: DatasetConfig) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, kind.in_channels, *crop), generator=generator, dtype=torch.uint8)
    pixels = pixels.to(getattr(torch, kind.dtype.value))
    labels = torch.randint(0, num_classes, (images, *crop), generator=generator, dtype=torch.uint8)
    return Batch(pixels, labels, [""] * images, list(range(images)))
