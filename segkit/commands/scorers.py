"""What ``segkit predict`` scores images with: the model of a run, or what segkit export has written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segkit.commands.decision import exported, model_and_decision
from segkit.commands.options import DECISIONS, PROGRAMS, inference
from segkit.config.dataset import DatasetConfig
from segkit.config.schema import plain
from segkit.data.bands import read_bands
from segkit.data.labels import load_table
from segkit.data.transforms import resize_image, target_size
from segkit.errors import InputError, first_line
from segkit.evaluation.inference import Inference
from segkit.evaluation.predict import Predictor
from segkit.memory import is_out_of_memory
from segkit.run.portable import check_facts, is_portable, open_portable
from segkit.run.saved import differing_classes, open_run
from segkit.training.precision import DTYPES

GRAPHS = {".onnx": "onnx", ".pt2": "torch_export"}
"""Formats of segkit export that are a graph, by the ending of the file"""


@dataclass(frozen=True)
class Loaded:
    """``score``: images (N, C, H, W) -> logits; ``dataset`` says what images, and at what size the run evaluates them.

    ``decide``: the decision on probabilities, as in :class:`segkit.evaluation.inference.Inference`.
    """

    score: Any
    device: torch.device
    dataset: DatasetConfig
    classes: tuple[str, ...]
    palette: np.ndarray
    decide: Callable[[Any], Any] | None

    def read(self, path: Path) -> np.ndarray:
        """Return the image (H, W, C) in the file ``path``, as the data set of the run reads it.

        Raises InputError also for one that cannot be resized as the run evaluates.
        """
        image = read_bands(path, self.dataset.kind)
        self._size(image, f"image {path}")
        return image

    def predictor(self, inference: Inference, precision: str) -> Predictor:
        """Return what predicts with ``inference``, at the size at which the run evaluates."""
        inference = replace(inference, decide=self.decide)
        return Predictor(self.score, inference, self._resized, self.device, DTYPES[precision])

    def _resized(self, image: np.ndarray) -> np.ndarray:
        return resize_image(image, self._size(image))

    def _size(self, image: np.ndarray, name: str = "an image") -> tuple[int, int]:
        return target_size((image.shape[0], image.shape[1]), plain(self.dataset.eval_resize), name=name)


def check_alike(arguments: argparse.Namespace, models: Sequence[Loaded] = ()) -> None:
    """Raise InputError unless the two of ``--side-by-side`` have the same classes, of the same kind of images.

    Without their ``models`` only two run folders are compared, by what lies beside their weights.
    """
    found = [(model.classes, model.dataset.kind) for model in models]
    for path in () if models else (arguments.run, arguments.side_by_side):
        if path.suffix in GRAPHS or is_portable(path):
            return
        saved = open_run(path, phase=arguments.phase)
        found.append((tuple(saved.label_counts()["classes"]), saved.config.phase_dataset(saved.phase_name).kind))
    (classes, kind), (others, other_kind) = found
    difference = differing_classes(others, classes)
    if difference or other_kind != kind:
        raise InputError(
            f"{arguments.side_by_side} predicts other classes than {arguments.run} "
            f"({difference or f'of images of {other_kind} instead of {kind}'}): name two runs of one data set"
        )


def load(path: Path, arguments: argparse.Namespace, device: torch.device) -> Loaded:
    """Return the model of the run folder or of the export ``path``, ready to score images on ``device``."""
    inference(arguments, [32, 32])  # what it refuses is refused before the model is read
    decide = None
    if path.suffix in GRAPHS:
        score, facts, dataset = _open_graph(path, arguments)
    elif is_portable(path):
        facts, dataset, model = open_portable(path)
        _check_options(path, facts, arguments)
        decision = exported(facts)
        score, decide = decision.around(model.to(device)), decision.decide
    else:
        saved = open_run(path, phase=arguments.phase)
        dataset = saved.config.phase_dataset(saved.phase_name)
        model, decision = model_and_decision(saved, arguments.decision, checkpoint=arguments.checkpoint)
        score, decide = decision.around(model.to(device)), decision.decide
        counts = saved.label_counts()
        palette = counts["palette"] if "palette" in counts else load_table(dataset.name).palette
        facts = {"classes": counts["classes"], "palette": palette}
    return Loaded(score, device, dataset, tuple(facts["classes"]), np.asarray(facts["palette"], np.uint8), decide)


def _open_graph(path: Path, arguments: argparse.Namespace) -> tuple[Any, dict[str, Any], DatasetConfig]:
    """Return score, facts and kind of images of the ONNX file or program of torch.export ``path``, for the CPU."""
    from segkit.models.exported import read_metadata, runner

    if path.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            raise InputError("an ONNX model needs onnxruntime: pip install 'segkit[export]'") from None
    if not path.is_file():
        raise InputError(f"there is no file {path}: write it with segkit export RUN --format {GRAPHS[path.suffix]}")
    for option, how, follows in (
        ("device", "on the CPU", arguments.device in ("auto", "cpu")),
        ("precision", "in fp32", arguments.precision == "fp32" or path.suffix != ".onnx"),
    ):
        if not follows:
            raise InputError(f"{path} computes {how}, which --{option} cannot change: leave --{option} out")
    facts = {"model": {}, "crop": [512, 512], "resize": {}, **read_metadata(path)}  # not in files of earlier versions
    dataset = check_facts(facts, path)
    _check_options(path, facts, arguments)
    if path.suffix == ".pt2" and PROGRAMS not in (arguments.trust or "").split(","):
        raise InputError(
            f"{path} is a program, and to load it is to run what its author put in: add --trust {PROGRAMS} if you "
            "know who wrote it, or take a model that is data, segkit export RUN --format hub or onnx"
        )
    compute, num_classes = runner(path), len(facts["classes"])

    def score(images: Any) -> Any:
        try:
            found = compute(images.float().cpu()).to(images.device)
            if found.dim() == 3:
                found = torch.nn.functional.one_hot(found.long(), num_classes).movedim(-1, 1)
        except Exception as error:  # the runtimes' errors share no base class
            if is_out_of_memory(error):
                raise
            any_size = " --format hub, which takes images of any size" if path.suffix == ".pt2" else ""
            raise InputError(
                f"{path} cannot compute images of {tuple(images.shape)} ({first_line(error)}): write it again with "
                f"segkit export{any_size}"
            ) from None
        if found.dim() != 4 or found.shape[1] != num_classes:
            raise InputError(
                f"{path} gives {tuple(found.shape)} for images of {tuple(images.shape)}, but must give (N, K, h, w) or "
                f"(N, h, w) for its {num_classes} classes: write it again with segkit export"
            )
        return found

    return score, facts, dataset


def _check_options(path: Path, facts: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Raise InputError for arguments that do not go with what was exported."""
    for option, default in (("phase", None), ("checkpoint", "last")):
        if getattr(arguments, option) != default:
            kind = f"one {option}, which --{option} cannot change"
            raise InputError(f"{path} is the export of {kind}: leave --{option} out")
    decision, output = facts.get("decision", "argmax"), facts.get("output")
    if decision not in DECISIONS:
        raise InputError(f"{path} has the decision {decision!r}, but there are {', '.join(DECISIONS)}: export it again")
    if arguments.decision not in ("argmax", decision):
        raise InputError(
            f"{path} was exported with --decision {decision}, which cannot be changed: leave --decision out, or write "
            f"the file again with segkit export RUN --decision {arguments.decision}"
        )
    gives = {"scores": f"scores of --decision {decision}", "classes": "classes"}.get(str(output))
    for option in ("tta", "slide", "probabilities") if gives else ():
        if getattr(arguments, option, None):
            raise InputError(
                f"{path} gives {gives} and no probabilities, which does not go with --{option}: "
                "predict with the run folder, or write the file again with segkit export RUN --decision argmax"
            )
