"""Run folders in the form that the pipeline writes, made without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from segkit.config.compose import compose
from segkit.config.schema import plain
from segkit.data.statistics import LabelCounts
from segkit.evaluation import metrics
from segkit.evaluation.per_image import PerImageCounts, sparse
from segkit.losses import MarginCalibrationLoss
from segkit.report.pictures import write_pictures
from segkit.run.folder import RunFolder
from segkit.run.phase import write_margins

CLASSES = ("road", "sidewalk", "building", "vegetation", "sky", "car", "person", "sign")
PALETTE = ((128, 64, 128), (244, 35, 232), (70, 70, 70), (107, 142, 35), (70, 130, 180), (0, 0, 142), (220, 20, 60),
           (220, 220, 0))  # fmt: skip
SHARES = np.array([0.31, 0.07, 0.24, 0.14, 0.18, 0.05, 0.008, 0.002])
PROTOCOL = {"ignore_index": 255, "absent_class": "excluded", "dataset": "synthetic", "split": "val", "max_images": None,
            "resize": None, "labels": "original", "inference": "whole image", "precision": "fp32"}  # fmt: skip


@lru_cache
def composed(overrides: tuple[str, ...]) -> Any:
    return compose(list(overrides))


def configured(overrides: Sequence[str], *, seed: int) -> Any:
    """The composed configuration; overrides of single keys are set afterwards, because composing takes long."""
    pairs = [override.split("=") for override in overrides]
    config = deepcopy(composed(tuple("=".join(pair) for pair in pairs if pair[0] in ("loss", "schedule"))))
    for key, text in (pair for pair in pairs if pair[0] not in ("loss", "schedule")):
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node[name] if isinstance(node, dict) else getattr(node, name)
        if isinstance(node, dict):
            assert last in node
            node[last] = yaml.safe_load(text)
        else:
            setattr(node, last, yaml.safe_load(text))
    config.seed = seed
    return config


@dataclass(frozen=True)
class Shown:
    name: str
    image: Any
    label: Any
    prediction: Any


def counts_of(skill: float, *, seed: int, classes: Sequence[str], num_images: int) -> PerImageCounts:
    """Counts of a model that gets about ``skill`` of the pixels right; the labels do not depend on skill or seed."""
    labels, errors = np.random.default_rng(7), np.random.default_rng([seed, round(skill * 1e6)])
    shares = np.resize(SHARES, len(classes))
    matrices = []
    for _ in range(num_images):
        target = labels.multinomial(20_000, shares / shares.sum())
        matrix = np.zeros((len(classes), len(classes)), np.int64)
        for k, pixels in enumerate(target):
            right = errors.binomial(pixels, np.clip(errors.normal(skill - 0.03 * k, 0.04), 0, 1))
            wrong = np.full(len(classes), 1.0)
            wrong[k] = 0
            matrix[k] = errors.multinomial(pixels - right, wrong / wrong.sum())
            matrix[k, k] = right
        matrices.append(sparse(matrix))
    return PerImageCounts.from_sparse(matrices, [f"val_{i:04d}" for i in range(num_images)], num_classes=len(classes))


def write_metrics(run: Path, phases: Sequence[str], results: dict[str, Any], *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    everything = []
    for number, phase in enumerate(phases):
        lines = []
        for step in range(10, 201, 10):
            progress = (step + 200 * number) / (200 * len(phases))
            loss = (2.0 + number) * (1.05 - progress) + 0.05 * rng.random()
            lines.append({"phase": phase, "step": step, "split": "train", "loss": loss, "lr": 1e-3, "grad_norm": 1.0})
            if step % 50 == 0:
                score = results["mean_iou"] * (1 - 0.6 * (1 - progress) ** 2)
                lines.append({"phase": phase, "step": step, "split": "val", "mean_iou": score,
                              "pixel_accuracy": score, "num_classes_averaged": 8, "classes": {}})  # fmt: skip
        (run / phase / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        everything += lines
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in everything))


def shown_pictures(skill: float, num: int, num_classes: int) -> list[Shown]:
    made = []
    for i in range(num):
        rng = np.random.default_rng(i)
        label = np.kron(rng.integers(0, num_classes, (6, 8)), np.ones((16, 16), int)).astype(np.uint8)
        label[:4] = 255
        image = np.stack([label * 25, label * 10 + 40, 255 - label * 20], -1).astype(np.uint8)
        wrong = np.random.default_rng([i, round(skill * 1e6)]).random(label.shape) > skill
        prediction = np.where(wrong, (label + 1) % num_classes, label % num_classes)
        made.append(Shown(f"val_{i:04d}", image, label, prediction))
    return made


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run_at() -> MakeRun:
    """Write a finished run folder to ``path`` and return it."""

    def make(
        path: Path, *overrides: str, skill: float = 0.8, seed: int = 0, classes: Sequence[str] = CLASSES,
        num_images: int = 30, protocol: dict[str, Any] | None = None, margins: bool = False, num_pictures: int = 0,
    ) -> Path:  # fmt: skip
        config = configured(overrides, seed=seed)
        path.mkdir(parents=True)
        folder = RunFolder(path, config)
        path.mkdir(parents=True, exist_ok=True)
        folder.start({"command": ["train.py", *overrides], "started": "2026-01-01T12:00:00+0000", "seed": seed,
                      "git_commit": "0123abc", "git_dirty": False, "python": "3.12.1", "versions": {"torch": "2.9.0"},
                      "device": "cpu", "threads": 2, "chosen": {},
                      "data": {"train": "f00d"}, "world_size": 1}, {}, {})  # fmt: skip
        phases = list(config.schedule)
        for number, phase in enumerate(phases):
            (path / phase / "checkpoints").mkdir(parents=True)
            own_skill = skill - 0.05 * (len(phases) - 1 - number)
            per_image = counts_of(own_skill, seed=seed, classes=classes, num_images=num_images)
            results = metrics.summary(per_image.total(), classes)
            node = config.phase_loss(phase)
            results |= {"num_images": num_images, "protocol": {**PROTOCOL, **(protocol or {})}, "phase": phase,
                        "step": 200, "best": {"mean_iou": results["mean_iou"], "step": 200},
                        "training": {"loss": node, "model": plain(config.model), "seed": seed}}  # fmt: skip
            (path / phase / "per_image.npz").write_bytes(per_image.to_bytes())
            pixels = (np.resize(SHARES, len(classes)) * 10**7).astype(np.int64)
            counts = LabelCounts(pixels, np.full(len(classes), 400), 5, 400, tuple(classes), "f00d")
            (path / phase / "label_counts.json").write_text(json.dumps(counts.as_dict()))
            if margins:
                rho = torch.arange(1, len(classes) + 1) * node.get("tau", 10.0) * 1e-3
                write_margins(path / phase, MarginCalibrationLoss(rho_0k=rho, rho_k0=rho * 1e-6), node, classes)
            if num_pictures:
                pictures = shown_pictures(own_skill, num_pictures, len(classes))
                write_pictures(path / phase / "pictures", pictures, palette=PALETTE, classes=classes)
            (path / phase / "results.json").write_text(json.dumps(results))
        write_metrics(path, phases, results, seed=seed)
        folder.link_last_phase()
        for name in ("margins.json", "pictures"):
            if (path / phases[-1] / name).exists() and not (path / name).exists():
                (path / name).symlink_to(Path(phases[-1]) / name)
        return path

    return make


@pytest.fixture
def make_run(tmp_path: Path, make_run_at: MakeRun) -> MakeRun:
    """As ``make_run_at``, by name below ``tmp_path``."""
    return lambda name, *overrides, **options: make_run_at(tmp_path / name, *overrides, **options)
