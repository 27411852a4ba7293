"""An exported ONNX model as a scorer of ``segkit predict``."""

from __future__ import annotations

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
        from segkit.commands.predict import Resized

        scorer = Resized(scorer, resize)
    return scorer, [512, 512], tuple(facts["classes"]), np.asarray(facts["palette"], np.uint8)
