"""What ``segkit predict`` scores images with: the model of a run, or an exported ONNX file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segkit.config.schema import plain
from segkit.errors import InputError

ONNX_WINDOW = [512, 512]
"""Window of a bare ``--slide`` for an ONNX file, which does not say what crop it was trained on."""


@dataclass(frozen=True)
class Loaded:
    """``score``: images uint8 (N, 3, H, W) -> logits; ``window``: (height, width) of a bare ``--slide``.

    ``decide``: the decision on probabilities, as in :class:`segkit.evaluation.inference.Inference`. ``resize``: that of
    the run's evaluation.
    """

    score: Any
    window: list[int]
    classes: tuple[str, ...]
    palette: np.ndarray
    decide: Callable[[Any], Any] | None = None
    resize: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return ``image`` (H, W, 3) at the size at which the run evaluates."""
        from segkit.data.transforms import resize_image, target_size

        return resize_image(image, target_size(image.shape[:2], self.resize))


def load(path: Path, arguments: argparse.Namespace, device: Any) -> Loaded:
    """Return the model of the run folder or ONNX file ``path``, ready to score images on ``device``."""
    if path.suffix == ".onnx":
        if arguments.phase:
            raise InputError(f"{path} is the export of one phase, which --phase cannot change: leave --phase out")
        return _load_onnx(path, arguments)
    from segkit.commands.decision import decision_of
    from segkit.data.labels import load_table
    from segkit.run.saved import open_run

    saved = open_run(path, phase=arguments.phase)
    dataset = saved.config.phase_dataset(saved.phase_name)
    model = saved.model(arguments.checkpoint).to(device)
    decision = decision_of(saved, arguments.decision, checkpoint=arguments.checkpoint)
    model = decision.around(model)
    counts = saved.label_counts()
    palette = counts["palette"] if "palette" in counts else load_table(dataset.name).palette
    resize = plain(dataset.eval_resize)
    return _loaded(model, dataset.crop, counts["classes"], palette, resize=resize, decide=decision.decide)


def _load_onnx(path: Path, arguments: argparse.Namespace) -> Loaded:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise InputError("an ONNX model needs onnxruntime: pip install 'segkit[export]'") from None
    from segkit.models.export import read_metadata, runner

    if not path.is_file():
        raise InputError(f"there is no file {path}: write it with segkit export RUN --format onnx")
    facts = read_metadata(path)
    for key in ("classes", "palette"):
        if not facts.get(key):
            raise InputError(f"{path} has no {key} in its metadata: write it with segkit export RUN --format onnx")
    _check_decision(path, facts.get("decision", "argmax"), arguments)
    compute = runner(path)
    return _loaded(
        lambda images: compute(images.float().cpu()).to(images.device),
        ONNX_WINDOW,
        facts["classes"],
        facts["palette"],
        resize=facts.get("resize") or {},
    )


def _check_decision(path: Path, decision: str, arguments: argparse.Namespace) -> None:
    """Raise InputError for arguments that do not go with the decision that was exported within the file."""
    if arguments.decision not in ("argmax", decision):
        raise InputError(
            f"{path} was exported with --decision {decision}, which cannot be changed: leave --decision out, or write "
            f"the file again with segkit export RUN --decision {arguments.decision}"
        )
    if decision != "miou":
        return
    for option in ("tta", "slide", "probabilities"):
        if getattr(arguments, option, None):
            raise InputError(
                f"{path} gives scores of --decision miou and no probabilities, which does not go with --{option}: "
                "predict with the run folder, or write the file again with segkit export RUN --decision argmax"
            )


def _loaded(score: Any, window: list[int], classes: Any, palette: Any, **rest: Any) -> Loaded:
    return Loaded(score, window, tuple(classes), np.asarray(palette, np.uint8), **rest)
