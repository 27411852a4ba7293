"""What ``segkit predict`` scores images with: the model of a run, or an exported ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import InputError


class OnnxScorer:
    """Images uint8 (N, 3, H, W) -> logits (N, K, H, W), computed by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, images: Any) -> Any:
        import torch

        (logits,) = self.session.run(None, {"images": images.float().cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)


def load_onnx(path: Path) -> tuple[Any, list[int], tuple[str, ...], Any]:
    """The scorer behind ``path``, a window for ``--slide``, the classes and their colours, from the file's metadata."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise InputError("an ONNX model needs onnxruntime: pip install 'segkit[export]'") from None
    from segkit.models.export import read_metadata

    if not path.is_file():
        raise InputError(f"there is no file {path}: write it with segkit export RUN --format onnx")
    facts = read_metadata(path)
    for key in ("classes", "palette"):
        if not facts.get(key):
            raise InputError(f"{path} has no {key} in its metadata: write it with segkit export RUN --format onnx")
    scorer: Any = OnnxScorer(path)
    resize = facts.get("resize") or {}
    if any(resize.values()):
        scorer = Resized(scorer, resize)
    return scorer, [512, 512], tuple(facts["classes"]), np.asarray(facts["palette"], np.uint8)


def load(path: Path, arguments: argparse.Namespace, device: Any) -> tuple[Any, list[int], tuple[str, ...], Any]:
    """The model behind ``path``, the crop it was trained on, its classes and their colours."""
    if path.suffix == ".onnx":
        return load_onnx(path)
    from segkit.config.schema import plain
    from segkit.data.labels import load_table
    from segkit.run.saved import open_run

    saved = open_run(path)
    dataset = saved.config.phase_dataset(saved.phase_name)
    model = saved.model(arguments.checkpoint).to(device)
    if arguments.calibrated:
        from segkit.commands.calibration import with_bias

        model = with_bias(saved, model)
    resize = plain(dataset.eval_resize)
    if any(resize.values()):
        if arguments.slide:
            raise InputError(f"{path} was trained on resized images, which does not go with --slide: leave --slide out")
        model = Resized(model, resize)
    counts = saved.label_counts()
    palette = counts["palette"] if "palette" in counts else load_table(dataset.name).palette
    return model, dataset.crop, tuple(counts["classes"]), np.asarray(palette, np.uint8)


class Resized:
    """A scorer that resizes its images first, as the evaluation of the run did."""

    def __init__(self, model: Any, resize: dict[str, Any]) -> None:
        self.model, self.resize = model, resize

    def __call__(self, images: Any) -> Any:
        import numpy as np
        import torch

        from segkit.data.transforms import resize_image, target_size

        size = target_size(tuple(images.shape[-2:]), self.resize)
        resized = [resize_image(image.permute(1, 2, 0).cpu().numpy(), size) for image in images.to(torch.uint8)]
        stacked = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()
        return self.model(stacked.to(images.device))
