"""What ``segkit predict`` scores images with: the model of a run, or what segkit export has written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segkit.commands.options import DECISIONS, PROGRAMS
from segkit.config.dataset import RGB
from segkit.config.schema import plain
from segkit.errors import InputError

GRAPHS = {".onnx": "onnx", ".pt2": "torch_export"}
"""Formats of segkit export that are a graph, by the ending of the file"""


@dataclass(frozen=True)
class Loaded:
    """``score``: images (N, C, H, W) -> logits; ``window``: (height, width) of a bare ``--slide``.

    ``decide``: the decision on probabilities, as in :class:`segkit.evaluation.inference.Inference`. ``resize``: that of
    the run's evaluation. ``kind``: channels and type of its images.
    """

    score: Any
    window: list[int]
    classes: tuple[str, ...]
    palette: np.ndarray
    decide: Callable[[Any], Any] | None = None
    resize: Mapping[str, Any] = field(default_factory=dict)
    kind: tuple[int, str] = RGB

    def read(self, path: Path) -> np.ndarray:
        """Return the image (H, W, C) in the file ``path``, as the data set of the run reads it."""
        from segkit.data.bands import read_bands

        return read_bands(path, self.kind)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return ``image`` (H, W, C) at the size at which the run evaluates."""
        from segkit.data.transforms import resize_image, target_size

        return resize_image(image, target_size(image.shape[:2], self.resize))


def load(path: Path, arguments: argparse.Namespace, device: Any) -> Loaded:
    """Return the model of the run folder or of the export ``path``, ready to score images on ``device``."""
    from segkit.commands.decision import decision_of, exported
    from segkit.data.labels import load_table
    from segkit.run.portable import is_portable, open_portable
    from segkit.run.saved import open_run

    if path.suffix in GRAPHS:
        return _load_graph(path, arguments)
    if is_portable(path):
        facts, model = open_portable(path)
        _check_options(path, facts, arguments)
        decision = exported(facts)
        score = decision.around(model.to(device))
        return _loaded(score, facts, decide=decision.decide)
    saved = open_run(path, phase=arguments.phase)
    dataset = saved.config.phase_dataset(saved.phase_name)
    model = saved.model(arguments.checkpoint).to(device)
    decision = decision_of(saved, arguments.decision, checkpoint=arguments.checkpoint, digest=model.digest)
    counts = saved.label_counts()
    palette = counts["palette"] if "palette" in counts else load_table(dataset.name).palette
    facts = {"classes": counts["classes"], "palette": palette}
    facts |= {"crop": dataset.crop, "resize": plain(dataset.eval_resize)}
    facts |= dict(zip(("in_channels", "dtype"), dataset.kind, strict=True))
    return _loaded(decision.around(model), facts, decide=decision.decide)


def _load_graph(path: Path, arguments: argparse.Namespace) -> Loaded:
    """Return the ONNX file or program of torch.export ``path``, which computes on the CPU."""
    import torch

    from segkit.models.exported import read_metadata, runner
    from segkit.run.portable import check_facts

    if path.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            raise InputError("an ONNX model needs onnxruntime: pip install 'segkit[export]'") from None
    if not path.is_file():
        raise InputError(f"there is no file {path}: write it with segkit export RUN --format {GRAPHS[path.suffix]}")
    facts = {"model": {}, "crop": [512, 512], "resize": {}, **read_metadata(path)}  # not in files of earlier versions
    check_facts(facts, path)
    _check_options(path, facts, arguments)
    if path.suffix == ".pt2" and PROGRAMS not in (arguments.trust or "").split(","):
        raise InputError(
            f"{path} is a program, and to load it is to run what its author put in: add --trust {PROGRAMS} if you "
            "know who wrote it, or take a model that is data, segkit export RUN --format hub or onnx"
        )
    compute, num_classes = runner(path), len(facts["classes"])

    def score(images: Any) -> Any:
        found = compute(images.float().cpu()).to(images.device)
        return found if found.dim() == 4 else torch.nn.functional.one_hot(found.long(), num_classes).movedim(-1, 1)

    return _loaded(score, facts)


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


def _loaded(score: Any, facts: Mapping[str, Any], decide: Callable[[Any], Any] | None = None) -> Loaded:
    palette = np.asarray(facts["palette"], np.uint8)
    kind, classes = (facts.get("in_channels", RGB[0]), facts.get("dtype", RGB[1])), tuple(facts["classes"])
    return Loaded(score, facts["crop"], classes, palette, decide=decide, resize=facts["resize"], kind=kind)
