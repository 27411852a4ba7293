"""What training starts from: a model with random weights, or with those of another run or of a stranger's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from segkit.config.schema import Config, Head
from segkit.errors import InputError
from segkit.files import digest_of
from segkit.models import Segmenter
from segkit.models.weights import read_state, strip_wrappers
from segkit.run.build import build_model
from segkit.run.saved import differing_classes, outline, read_counts, without_sources
from segkit.training import checkpoint
from segkit.training.optim import lr_factors_of

REPORT = "initial_weights.json"
"""File of a run folder: what became of each entry of the weights."""
SHOWN = 4
"""Names of a list that are printed; the file has all."""


def initial_model(
    config: Config, classes: Sequence[str], device: torch.device
) -> tuple[Segmenter, dict[str, list[str]]]:
    """The model that the first phase starts from, on ``device``, and names of entries by what became of them.

    These are ``loaded`` from ``init_from``, ``reset`` (the head, with ``head=reset``), ``left_out`` of the file, and
    ``frozen``; and ``lr x F`` for each factor of the learning rate. InputError if ``init_from`` is a run folder of
    other classes than ``classes``, by name and order, whose head is not reset, or if its weights do not fit.
    """
    model = build_model(config, len(classes)).to(device)
    report: dict[str, list[str]] = {}
    if config.init_from:
        report = _load(model, Path(config.init_from), config, classes)
    factors = lr_factors_of(
        model, freeze=config.freeze, lr_factors=config.lr_factors, encoder_lr_factor=config.encoder_lr_factor
    )
    for factor in sorted(set(factors.values()) - {1.0}):
        kind = f"lr x {factor}" if factor else "frozen"
        report[kind] = [name for name, own in factors.items() if own == factor]
    return model, report


def early_margins(config: Config) -> str | None:
    """What to say if the first phase has the paper's form of margin calibration, and no trained model to start from."""
    loss = config.phase_loss(next(iter(config.schedule)))
    if loss.get("form") != "paper" or config.init_from or config.model.get("weights"):
        return None
    return (
        "loss.form=paper wants a model that cross-entropy has trained, but is the loss of the first phase: add "
        "schedule=pretrain_finetune, or set loss=margin_calibration_reference"
    )


def _load(model: Segmenter, source: Path, config: Config, classes: Sequence[str]) -> dict[str, list[str]]:
    """Load the weights in ``source`` into ``model``; return the names that were loaded, reset and left out."""
    if source.is_dir() and not (source / "checkpoints").is_dir():
        raise InputError(
            f"init_from is {source}, no run folder, as it has no checkpoints: give one, or a file of weights"
        )
    if source.is_dir() and config.head is Head.keep:
        check_origin(source, classes)
    path = source / "checkpoints" / checkpoint.LAST if source.is_dir() else source
    if path.is_file():
        checkpoint.check_digest(path, digest_of(path))
    own = model.net.state_dict()
    state = strip_wrappers(read_state(path, key="init_from"), own)
    head = _head(config, len(classes)) if config.head is Head.reset else set()
    loaded = {name: value for name, value in state.items() if not head or (name in own and name not in head)}
    checkpoint.load_weights(model, {**loaded, **{name: own[name] for name in head}}, source=path)
    left_out = [name for name in state if name not in loaded]
    return {"loaded": list(loaded), "reset": [name for name in own if name in head], "left_out": left_out}


def _head(config: Config, num_classes: int) -> set[str]:
    """Names of the entries of the model whose shape is a matter of the number of classes."""
    config = without_sources(config)
    one, other = (
        outline(partial(build_model, config, number), config.model).net.state_dict()
        for number in (num_classes, num_classes + 1)
    )
    head = {name for name in one if one[name].shape != other[name].shape}
    if not head:
        raise InputError("head=reset finds no layer of the model whose size is the number of classes: set head=keep")
    return head


def check_origin(source: Path, classes: Sequence[str]) -> None:
    """Raise InputError if the run in ``source`` was trained on other classes than ``classes``."""
    trained = list(read_counts(source / "label_counts.json")["classes"])
    if difference := differing_classes(classes, trained):
        weights = source / "checkpoints" / checkpoint.LAST
        anyway = f", or give init_from={weights} to use its weights anyway" if len(classes) == len(trained) else ""
        raise InputError(
            f"the data set has other classes than the run of init_from={source} ({difference}): set head=reset to "
            f"train the last layer anew{anyway}"
        )


def report_lines(report: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines for the screen: how many entries of each kind, and the first names."""
    lines = []
    for kind, names in report.items():
        more = f", ... and {len(names) - SHOWN} more, see {REPORT}" if len(names) > SHOWN else ""
        listed = f" ({', '.join(names[:SHOWN])}{more})" if names else ""
        lines.append(f"weights {kind.replace('_', ' ')}: {len(names)}{listed}")
    return lines
