"""Failure bundles: everything that a failed step needs to be repeated elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from segkit.runtime import write_json


class NonFiniteLoss(ValueError):
    """The loss of a step is NaN or infinite."""


def save_bundle(folder: Path, *, error: str, step: int, batch: Any, state: dict[str, Any], config: Any) -> Path:
    """Write ``folder/failure-STEP/``: the error and the samples (JSON), the configuration, the batch, the state.

    ``batch`` has ``images`` uint8 (N, 3, H, W), ``labels`` uint8 (N, H, W), ``names`` and ``indices``; ``state`` is
    what a checkpoint holds, from before the failed step.
    """
    bundle = folder / f"failure-{step:07d}"
    bundle.mkdir(parents=True, exist_ok=True)
    write_json(bundle / "error.json", {"error": error, "step": step, "names": list(batch.names)})
    write_json(bundle / "config.json", config)
    torch.save(
        {
            "images": batch.images,
            "labels": batch.labels,
            "names": list(batch.names),
            "indices": list(batch.indices),
            "step": step,
        },
        bundle / "batch.pt",
    )
    torch.save(state, bundle / "state.pt")
    return bundle
