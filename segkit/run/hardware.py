"""What a run computes with: chosen where the configuration says ``auto``, and said before the first step."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from segkit import runtime
from segkit.config.schema import Config, Precision, TrackerKind, plain
from segkit.errors import InputError
from segkit.files import read_config_text
from segkit.run.changes import CONFIG_CURE
from segkit.training import distributed

KEYS = ("precision", "channels_last")
"""Keys that take ``auto``. A run's config.yaml holds what was chosen, so that it means the same on any machine."""


def choose(config: Config, *, begun: Path | None, device: torch.device) -> tuple[Config, dict[str, str]]:
    """``config`` with values for the ``auto`` of :data:`KEYS`, and for each of the two why it has its value.

    A run that goes on (``begun`` is its config.yaml) keeps what it was started with, on whatever machine. Strict
    determinism takes fp32 and contiguous memory, whatever the machine.
    """
    wanted = {key: plain(getattr(config, key)) for key in KEYS}
    kept = {} if begun is None else read_config_text(begun, cure=CONFIG_CURE)
    strict = config.determinism.value == "strict"
    precision, why = ("fp32", "determinism=strict") if strict else native_precision(device)
    half = precision if wanted["precision"] == "auto" else wanted["precision"]
    # channels last is the layout of oneDNN's fast kernels, and of the tensor cores of a GPU, which want half precision
    chosen: dict[str, Any] = {
        "precision": precision,
        "channels_last": not strict and (device.type == "cpu" or half != "fp32"),
    }
    layout_why = why if strict else f"for {half} on a {'CPU' if device.type == 'cpu' else 'GPU'}"
    reasons = {"precision": why, "channels_last": layout_why}
    for key in KEYS:
        if wanted[key] != "auto":
            chosen[key], reasons[key] = wanted[key], "as configured"
        elif kept.get(key) in ((True, False) if key == "channels_last" else [item.value for item in Precision][1:]):
            chosen[key], reasons[key] = kept[key], "as the run was started"
    if chosen["precision"] != "fp32" and device.type == "cpu" and chosen["precision"] != native_precision(device)[0]:
        reasons["precision"] += ", but this CPU only imitates it, several times slower than fp32"
    if chosen["precision"] == "fp16" and device.type == "mps":
        raise InputError("precision is fp16, but device=mps takes fp32 or bf16: set precision=fp32")
    chosen = distributed.agree(chosen)
    return dataclasses.replace(config, **{**chosen, "precision": Precision(chosen["precision"])}), reasons


def native_precision(device: torch.device) -> tuple[str, str]:
    """(precision, reason): bf16 where ``device`` computes with it, else fp16 on a GPU with tensor cores, else fp32."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        what = f"a GPU of capability {'.'.join(map(str, capability))}"
        return {8: "bf16", 7: "fp16"}.get(min(capability[0], 8), "fp32"), what
    if device.type == "mps":
        return "fp32", "a GPU of Apple's"
    features = torch.cpu.get_capabilities()
    found = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]
    return ("bf16", f"a CPU with {found[0]}") if found else ("fp32", "a CPU without instructions for bf16")


def typed(path: Path) -> str:
    """``path`` as one types it in the current folder."""
    with suppress(OSError, ValueError):  # the current folder is gone, or another one
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


def head(config: Config, reasons: dict[str, str], *, path: Path, phases: Sequence[Any]) -> str:
    """The first lines of a run: what it computes with, how much, and where it writes."""
    model, device = phases[0].model, phases[0].device
    cores, load = runtime.num_cores(), os.getloadavg()[0]
    fused = all(group.get("fused") for phase in phases for group in phase.optimizer.param_groups)
    name = runtime.processor() if device.type == "cpu" else runtime.device_name(device)
    layout = "channels last" if config.channels_last else "contiguous"
    threads, processes = torch.get_num_threads(), distributed.world_size()
    size = sum(parameter.numel() for parameter in model.parameters())
    table = [
        ("device", f"{device} ({name}), {cores} cores, {processes} process{'es' if processes > 1 else ''}"),
        ("threads", f"{threads} to compute, and {config.workers} worker{'s' * (config.workers != 1)} to load"),
        ("precision", f"{config.precision.value} ({reasons['precision']})"),
        ("memory", f"{layout} ({reasons['channels_last']})"),
        ("optimizer", f"{type(phases[0].optimizer).__name__}{', fused' if fused else ''}"),
        ("model", f"{size:,} parameters, {len(phases[-1].counts.classes)} classes"),
        *(
            (
                f"{phase.name}",
                f"{phase.plan.num_steps} steps of {config.batch_size}; evaluations: {phase.plan.num_evaluations}; "
                "images: {:,} to train on, {:,} to validate".format(*phase.batches.num_images),
            )
            for phase in phases
        ),
        ("folder", str(path)),
    ]
    if config.tracker is TrackerKind.tensorboard:
        table.append(("curves", f"tensorboard --logdir {typed(path)}"))
    if load > cores:
        table.append(
            ("advice", f"the load is {load:.1f} on {cores} cores: others compute here too, and both go slower for it")
        )
    return "\n".join(f"{key:{max(len(key) for key, _ in table)}}  {text}" for key, text in table)
