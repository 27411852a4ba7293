"""``--decision``: how scores become a class. ``segkit evaluate`` fits it and keeps it in the run folder.

argmax   the most probable class
bias     the same after a number per class is added to the logits, tuned for the mean IoU
miou     the rule that maximises the mean IoU of a data set, on calibrated probabilities
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segkit.config.schema import DatasetConfig
from segkit.data.loader import eval_batches
from segkit.data.samples import SampleSet
from segkit.errors import InputError
from segkit.evaluation.decision import BiasedModel, bias_from_json, collect_logits, tune_bias
from segkit.evaluation.miou_rule import MiouRule, ScaledModel, fit_miou_rule, rule_from_json
from segkit.files import read_json, without_nan, write_json
from segkit.progress import show, track
from segkit.run.build import eval_transform
from segkit.run.saved import SavedRun, check_classes
from segkit.run.splits import HOLDOUT, open_split

FILE = "decision.json"
MAX_IMAGES = 500
"""Images that a decision is fitted on at most; more hardly move it."""


@dataclass(frozen=True)
class Decision:
    """A rule by name, with its numbers and ``fitted_on``: data set, split, held-out share, number of images, images."""

    name: str = "argmax"
    bias: NDArray[np.float32] | None = None
    rule: MiouRule | None = None
    fitted_on: Mapping[str, Any] | None = None

    def around(self, model: nn.Module) -> nn.Module:
        """Return ``model`` with the part of the decision that is linear in the logits."""
        if self.bias is not None:
            wrapped: nn.Module = BiasedModel(model, self.bias)
        elif self.rule is not None:
            wrapped = ScaledModel(model, self.rule)
        else:
            return model
        return wrapped.to(next(model.parameters()).device).eval()

    @property
    def decide(self) -> Callable[[Tensor], Tensor] | None:
        """The part that is applied to probabilities at the size of the label (``Inference.decide``)."""
        return None if self.rule is None else self.rule.scores

    def protocol(self) -> dict[str, Any]:
        """Return what a protocol says of it: the name, and on what it was fitted, without the list of images."""
        if self.fitted_on is None:
            return {"decision": self.name}
        return {
            "decision": self.name,
            "decision_fitted_on": {key: value for key, value in self.fitted_on.items() if key != "images"},
        }


def check_unseen(fitted_on: Mapping[str, Any] | None, scored: SampleSet, dataset: DatasetConfig) -> None:
    """Raise InputError if an image of the split ``scored`` is one that a decision is fitted on."""
    if fitted_on is None or fitted_on["dataset"] != dataset.name:
        return
    images = fitted_on["images"]
    same = [
        sample.name
        for sample in scored.samples
        if sample.name in images and _same_file(str(images[sample.name]), _place(sample.image, dataset))
    ]
    if same:
        raise InputError(
            f"the decision is fitted on {fitted_on['num_images']} images of the split {fitted_on['split']}, and "
            f"{len(same)} of them are in the split {scored.split} (first: {same[0]}), whose score would be flattered: "
            "score another --split, or use --decision argmax"
        )


def model_and_decision(saved: SavedRun, name: str, *, checkpoint: str) -> tuple[Any, Decision]:
    """Return the trained model and the stored decision ``name``, which is refused before the model is read."""
    decision_of(saved, name, checkpoint=checkpoint)
    model = saved.model(checkpoint)
    return model, decision_of(saved, name, checkpoint=checkpoint, digest=model.digest)


def decision_of(saved: SavedRun, name: str, *, checkpoint: str, digest: str | None = None) -> Decision:
    """Return the stored decision ``name`` of the run; InputError if none was fitted for its classes and ``digest``.

    ``digest``: that of the model which decides (:class:`segkit.models.Segmenter`); None for any.
    """
    if name == "argmax":
        return Decision()
    path = saved.folder / FILE
    command = _command(saved, name, checkpoint)
    if not path.exists():
        raise InputError(
            f"{path} is not there, so --decision {name} has nothing to decide with: fit it with `{command}`"
        )
    content = read_json(path, cure=f"fit the decision again with `{command} --refit`")
    classes = list(saved.label_counts()["classes"])
    try:
        fitted_for, fitted_on, bias, miou = content["digest"], content["fitted_on"], content["bias"], content["miou"]
        known = content["classes"] == classes
        whole = {"dataset", "split", "holdout", "num_images", "images"} <= set(fitted_on)
        whole = whole and isinstance(fitted_on["images"], dict) and isinstance(content["classes"], list)
        values, rule, known_sum = bias["bias"], miou["rule"], content["sha256"]
    except (KeyError, TypeError):
        whole = False
    if not whole or known_sum != checksum(content):
        raise InputError(f"{path} is damaged, or of another version: fit the decision again with `{command} --refit`")
    if not known:
        raise InputError(
            f"{path} was fitted for {len(content['classes'])} classes that are not those of the run, or not in their "
            f"order: fit it again with `{command} --refit`"
        )
    if digest not in (None, fitted_for):
        raise InputError(
            f"{path} was fitted for another checkpoint than {saved.checkpoint(checkpoint)}: fit it again with "
            f"`{command} --refit`"
        )
    try:
        if name == "bias":
            return Decision(name, bias=bias_from_json(values, classes), fitted_on=fitted_on)
        return Decision(name, rule=rule_from_json(rule, classes), fitted_on=fitted_on)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def exported(facts: Mapping[str, Any]) -> Decision:
    """Return what is left to decide for the weights that segkit export wrote with ``facts``: a bias is in them."""
    if facts.get("decision") != "miou":
        return Decision()
    return Decision("miou", rule=rule_from_json(facts.get("rule"), facts["classes"]))


def to_fit_on(saved: SavedRun, dataset: DatasetConfig) -> tuple[SampleSet, dict[str, Any]]:
    """Return the images that a decision is fitted on, and what ``fitted_on`` says of them.

    Up to :data:`MAX_IMAGES`, evenly chosen from those held out of training (``dataset.holdout``), or from the training
    images where none were held out. InputError for classes that are not those of ``saved``, or if nothing can be kept.
    """
    if (path := saved.folder / FILE).is_dir():
        raise InputError(f"{path} is a folder, in the way of the decision, which is kept in a file: remove it")
    split = open_split(dataset, HOLDOUT if dataset.holdout else dataset.train_split)
    check_classes(saved, split.classes)
    num_images = min(MAX_IMAGES, len(split))
    split = split.subset([number * len(split) // num_images for number in range(num_images)])
    return split, {
        "dataset": dataset.name,
        "split": split.split,
        "holdout": dataset.holdout,
        "num_images": num_images,
        "images": {sample.name: _place(sample.image, dataset) for sample in split.samples},
    }


def fit(
    saved: SavedRun,
    model: Any,
    dataset: DatasetConfig,
    split: SampleSet,
    fitted_on: Mapping[str, Any],
    *,
    checkpoint: str,
    workers: int,
) -> None:
    """Fit bias and rule together on ``split``, with what :func:`to_fit_on` says of it, and write :data:`FILE`."""
    sample = collect_logits(
        model,
        eval_batches(split, transform=eval_transform(dataset), workers=workers),
        num_classes=split.num_classes,
        ignore_index=split.ignore_index,
        device=next(model.parameters()).device,
        progress=lambda items: track(items, description="fitting the decision", total=len(split), unit="images"),
    )
    bias, miou = tune_bias(sample), fit_miou_rule(sample)
    content = {
        "classes": list(split.classes),
        "checkpoint": checkpoint,
        "digest": model.digest,
        "fitted_on": {**fitted_on, "num_pixels": len(sample.target)},
        "bias": bias.to_json(split.classes),
        "miou": {
            "rule": miou.rule.to_json(split.classes),
            "mean_iou_before": miou.mean_iou_before,
            "mean_iou_after": miou.mean_iou_after,
        },
    }
    path = saved.folder / FILE
    write_json(path, content | {"sha256": checksum(content)})
    before, by_bias, by_rule = (
        100 * value for value in (bias.mean_iou_before, bias.mean_iou_after, miou.mean_iou_after)
    )
    show(
        f"fitted on {len(split)} images of the split {split.split}: mean IoU there {before:.2f} % by argmax, "
        f"{by_bias:.2f} % by bias, {by_rule:.2f} % by miou; kept in {path}"
    )


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of ``content`` without its entry sha256."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(without_nan(rest), sort_keys=True).encode()).hexdigest()


def add_bias(saved: SavedRun, model: Any, bias: NDArray[np.float32]) -> None:
    """Add ``bias`` (K,) to the last layer of ``model``, in place; InputError unless an image of noise confirms it."""
    biased = BiasedModel(model, bias)
    layers = [part for part in model.modules() if isinstance(part, nn.Conv2d) and part.out_channels == len(bias)]
    images = torch.rand(1, len(model.mean), 64, 64, generator=torch.Generator().manual_seed(0)) * model.divisor
    if not layers or layers[-1].bias is None:
        raise InputError(f"the model of {saved.path} has no last layer with a bias: export it with --decision argmax")
    with torch.no_grad():
        expected = biased(images)
        layers[-1].bias += torch.from_numpy(bias)
        if not torch.allclose(model(images), expected, atol=1e-3):
            raise InputError(
                f"the logits of {saved.path} change after its last layer: export it with --decision argmax"
            )


def _command(saved: SavedRun, name: str, checkpoint: str) -> str:
    phase = f" --phase {saved.phase}" if saved.phase else ""
    which = f" --checkpoint {checkpoint}" if checkpoint != "last" else ""
    return f"segkit evaluate {shlex.quote(str(saved.path))}{phase}{which} --decision {name}"


def _place(image: Path, dataset: DatasetConfig) -> str:
    """The path of an image below the folder of the data set, where it lies there."""
    root = Path(dataset.root).absolute() if dataset.root else None
    path = image.absolute() if root is not None else image
    return (path.relative_to(root) if root is not None and path.is_relative_to(root) else image).as_posix()


def _same_file(one: str, other: str) -> bool:
    """True if one path ends with the other: ``dataset.root`` may have been a level higher for one of them."""
    shorter, longer = sorted((PurePosixPath(one).parts, PurePosixPath(other).parts), key=len)
    return longer[len(longer) - len(shorter) :] == shorter
