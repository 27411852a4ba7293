"""The bias per class of ``segkit evaluate --calibrate``: tuned on training images, kept in the run folder."""

from __future__ import annotations

from typing import Any

from segkit.config.schema import DatasetConfig, plain
from segkit.errors import InputError
from segkit.files import read_json, write_json
from segkit.run.saved import SavedRun

FILE = "calibration.json"
MAX_IMAGES = 500
"""Training images that the bias is tuned on at most; more hardly move it."""


def tune(saved: SavedRun, model: Any, dataset: DatasetConfig, *, device: Any, workers: int) -> None:
    """Tune the bias on up to :data:`MAX_IMAGES` evenly chosen images of the training split, and write :data:`FILE`."""
    from segkit.data.loader import eval_batches
    from segkit.data.transforms import EvalTransform
    from segkit.evaluation.decision import collect_logits, tune_bias
    from segkit.progress import track
    from segkit.run.splits import open_split

    split = open_split(dataset, dataset.train_split)
    step = max(1, len(split) // MAX_IMAGES)
    split = split[: step * MAX_IMAGES : step]
    transform = EvalTransform(resize=plain(dataset.eval_resize), labels=dataset.eval_labels.value)
    sample = collect_logits(
        model,
        eval_batches(split, transform=transform, workers=workers),
        num_classes=split.num_classes,
        ignore_index=split.ignore_index,
        device=device,
        progress=lambda items: track(items, description="calibrating", total=len(split), unit="images"),
    )
    calibration = tune_bias(sample)
    path = saved.folder / FILE
    write_json(path, {**calibration.to_json(split.classes), "split": split.split})
    print(
        f"calibrated on {calibration.num_images} training images: mean IoU there "
        f"{100 * calibration.mean_iou_before:.2f} -> {100 * calibration.mean_iou_after:.2f} %; kept in {path}"
    )


def with_bias(saved: SavedRun, model: Any) -> Any:
    """Return ``model`` with the run's bias; InputError if none was tuned."""
    from segkit.evaluation.decision import BiasedModel, bias_from_json

    path = saved.folder / FILE
    if not path.is_file():
        raise InputError(f"{path} is not there: tune the bias first, segkit evaluate {saved.path} --calibrate")
    bias = bias_from_json(read_json(path), saved.label_counts()["classes"])
    return BiasedModel(model, bias).to(next(model.parameters()).device).eval()


def add_bias(saved: SavedRun, model: Any) -> None:
    """Add the run's bias to the last layer of ``model``, in place; InputError unless an image of noise confirms it."""
    import torch
    from torch import nn

    biased = with_bias(saved, model)
    bias = biased.bias.flatten()
    layers = [part for part in model.modules() if isinstance(part, nn.Conv2d) and part.out_channels == len(bias)]
    images = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if not layers or layers[-1].bias is None:
        raise InputError(f"the model of {saved.path} has no last layer with a bias: export it without --calibrated")
    with torch.no_grad():
        expected = biased(images)
        layers[-1].bias += bias
        if not torch.allclose(model(images), expected, atol=1e-3):
            raise InputError(f"the logits of {saved.path} change after its last layer: export without --calibrated")
