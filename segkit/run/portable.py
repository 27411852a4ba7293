"""A trained model that travels without its run: what its files say of it, and a folder of weights.

    FOLDER/config.json         the model, its classes, how it was trained and scored
    FOLDER/model.safetensors   its weights, with the same facts as metadata: can be opened without the folder
    FOLDER/README.md           the same for people (segkit.report.card)

A stranger may have written the folder. It goes through what a saved run goes through (:mod:`segkit.run.saved`): the
list of allowed targets, sizes, no resolver, nothing that it names is read or downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from segkit.config.dataset import DatasetConfig, ImageType, ResizeConfig
from segkit.config.schema import plain
from segkit.config.targets import fits
from segkit.errors import InputError
from segkit.files import MOST_BYTES, check_place, read_json, write_atomically, written_beside
from segkit.run.saved import SavedRun, are_counts, filled, without_sources

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CURE = "copy it again, or write it again with segkit export"
NUM_SAMPLES = 1000
"""Resamples of the images for the interval of a score"""


def facts_of(saved: SavedRun, *, checkpoint: str, decision: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every exported file says of the model of ``saved``, as JSON values and without a path.

    ``decision``: what a protocol says of it. InputError for files of the run that are damaged.
    """
    from segkit.data.labels import load_table
    from segkit.models.exported import encoder_licence

    config, counts = saved.config, saved.label_counts()
    dataset = config.phase_dataset(saved.phase_name)
    encoder, source = config.model.get("encoder"), config.model.get("encoder_weights")
    if config.init_from or config.model.get("weights") or source not in (None, "none", "imagenet"):
        source = "a file"  # whose path stays here
    until = list(config.schedule)[: list(config.schedule).index(saved.phase_name) + 1]
    kept = ("batch_size", "limit_steps", "seed", "precision", "ema_decay", "clip_norm", "encoder_lr_factor", "freeze",
            "lr_factors")  # fmt: skip
    of_phases = ("epochs", "steps", "lr", "lr_schedule", "warmup_steps")
    return {
        "model": without_sources(config).model,
        "classes": list(counts["classes"]),
        "class_pixels": [row["pixels"] for row in counts["classes"].values()],
        "palette": counts.get("palette") or load_table(dataset.name).palette.tolist(),
        "dataset": dataset.name,
        "resize": plain(dataset.eval_resize),
        "crop": dataset.crop,
        **{key: plain(getattr(dataset, key)) for key in ("in_channels", "dtype", "mean", "std")},
        "channels_last": config.channels_last is True,
        **decision,
        "checkpoint": checkpoint,
        "encoder": encoder,
        "encoder_weights": source,
        "encoder_licence": encoder_licence(encoder) if encoder and source == "imagenet" else None,
        "training": {
            **{key: plain(getattr(config, key)) for key in kept},
            "optimizer": config.optimizer,
            "sampler": plain(dataset.sampler),
            "scale": dataset.scale,
            "flip": dataset.flip,
            "augment": list(config.augment),
            "phases": [
                {
                    **{key: plain(getattr(config.schedule[name], key)) for key in of_phases},
                    "name": name,
                    "loss": config.phase_loss(name),
                    "dataset": config.phase_dataset(name).name,
                    "split": config.phase_dataset(name).train_split,
                }
                for name in until
            ],
        },
        "scores": scores_of(saved, checkpoint=checkpoint, decision=decision),
    }


def scores_of(saved: SavedRun, *, checkpoint: str, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the scores of this checkpoint with this decision: that of the training first, then the evaluations.

    Shares from 0 to 1; ``interval``: of the mean IoU when images are drawn anew, 95 %, None without counts per image.
    """
    from segkit.evaluation.bootstrap import bootstrap_mean_iou
    from segkit.report.runs import read_run

    names = [None] * (saved.folder / "results.json").is_file()
    found: list[dict[str, Any]] = []
    for name in (*names, *sorted(path.stem for path in (saved.folder / "evaluations").glob("*.json"))):
        record = read_run(saved.folder, evaluation=name)
        results, protocol = record.results, record.protocol
        said = {key: protocol.get(key) for key in ("decision", "decision_fitted_on") if key in protocol}
        again = any(protocol == one["protocol"] for one in found)
        other = results.get("checkpoint", "last") != checkpoint or said != dict(decision)
        if again or other or record.is_outdated():  # the last reads the whole checkpoint
            continue
        drawn = None
        if record.per_image is not None and results["num_images"] > 1 and results["mean_iou"] is not None:
            drawn = bootstrap_mean_iou(record.per_image, num_samples=NUM_SAMPLES)
        found.append(
            {
                **{key: results[key] for key in ("mean_iou", "pixel_accuracy", "num_images", "num_classes_averaged")},
                "interval": drawn and [drawn.low, drawn.high],
                "iou": {key: row["iou"] for key, row in results["classes"].items()},
                "protocol": protocol,
            }
        )
    return found


def write_file(path: Path, model: Any, facts: Mapping[str, Any]) -> None:
    """Write the weights of ``model`` with ``facts`` as metadata; the file gets its name when it is whole."""
    from segkit.models.exported import write_weights

    with written_beside(path) as temporary:
        write_weights(model.net.state_dict(), temporary, json.dumps(facts))


def check_folder(folder: Path) -> None:
    """Raise InputError if a folder cannot be written as ``folder``: only an earlier export is replaced."""
    present = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if (folder.exists() and not folder.is_dir()) or present - {CONFIG, WEIGHTS, CARD, *_unfinished(present)}:
        raise InputError(f"--output is {folder}, which holds something else than an export: give another folder")
    check_place(folder)


def _unfinished(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that an export left behind which was killed."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, (CONFIG, WEIGHTS, CARD)))})\.\d+\.tmp")
    return [name for name in names if pattern.fullmatch(name)]


def write_folder(folder: Path, model: Any, facts: Mapping[str, Any]) -> None:
    """Write weights, card and facts into ``folder``; config.json comes last, and makes it whole."""
    from segkit.report.card import card

    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, *_unfinished(item.name for item in folder.iterdir())):
        (folder / name).unlink(missing_ok=True)
    write_file(folder / WEIGHTS, model, facts)
    write_atomically(folder / CARD, card(facts))
    write_atomically(folder / CONFIG, json.dumps(facts, indent=2) + "\n")


def is_portable(path: Path) -> bool:
    """True for a safetensors file, and for a folder that has a config.json or weights and is no run."""
    has = [(path / name).exists() for name in (CONFIG, WEIGHTS)]
    return path.suffix == ".safetensors" or (any(has) and not (path / "config.yaml").exists())


def open_portable(path: Path) -> tuple[dict[str, Any], DatasetConfig, Any]:
    """Return facts, kind of images and model (on the CPU, in evaluation mode) of what segkit export wrote as ``path``.

    InputError for anything in it that is not allowed, and for weights that are not those of the model, or not finite.
    """
    import torch

    from segkit.models.exported import read_metadata, read_weights
    from segkit.run.build import segmenter
    from segkit.training.checkpoint import not_finite

    is_file = path.suffix == ".safetensors"
    source, weights = (path, path) if is_file else (path / CONFIG, path / WEIGHTS)
    if not (is_file or source.exists()):
        raise InputError(f"{path} has no {CONFIG}: give {weights}, which has all of it, or {CURE}")
    facts = read_metadata(path) if is_file else read_json(source, most=MOST_BYTES, cure=CURE)
    images = check_facts(facts, source)
    state = read_weights(weights)
    if broken := not_finite(state):
        raise InputError(f"{weights} has values that are not finite under {broken[0]}, so it predicts nothing: {CURE}")
    try:
        make = partial(segmenter, facts["model"], len(facts["classes"]), images)
        model = filled(make, facts["model"], state, source=weights).eval()
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if facts.get("channels_last") is True:  # as the run computes
        model = model.to(memory_format=torch.channels_last)
    return facts, images, model


def check_facts(facts: Mapping[str, Any], source: Path) -> DatasetConfig:
    """Return what ``facts`` (of ``source``) say of images; InputError unless they have what predictions need.

    Files of earlier versions say nothing of channels and type: 3 and uint8.
    """
    names: Any = facts.get("classes")
    palette, model, crop, resize = (facts.get(key) for key in ("palette", "model", "crop", "resize"))
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names) and palette is not None
    rows = {name: {"pixels": 0, "images": 0} for name in names} if whole else {}
    if not whole or len(rows) != len(names) or not are_counts({"classes": rows, "palette": palette}):
        raise InputError(f"{source} has not a name and a colour for each of up to 255 classes: {CURE}")
    if "${" in json.dumps(facts):
        raise InputError(f"{source} has '${{' in it, but plain values are needed: {CURE}")
    sources = [model.get(key) for key in ("weights", "encoder_weights")] if isinstance(model, dict) else ["?"]
    if any(value not in (None, "none") for value in sources):
        raise InputError(f"{source} has no model of plain values, or one that reads weights from elsewhere: {CURE}")
    shapes = {"short_side": int | None, "size": list[int] | None}
    known = isinstance(resize, dict) and all(key in shapes and fits(resize[key], shapes[key]) for key in resize)
    sides = [resize.get("short_side") or 1, *(resize.get("size") or [])] if known and isinstance(resize, dict) else []
    if not fits(crop, list[int]) or not sides or max(sides) >= 2**16:
        raise InputError(f"{source} has a crop or resize that is none: {CURE}")
    numbers: Any = list[float] | None
    kinds = {"in_channels": int, "dtype": Literal[*ImageType.__members__], "mean": numbers, "std": numbers}
    kind = {key: facts[key] for key in kinds if key in facts}
    if not all(fits(value, kinds[key]) for key, value in kind.items()):
        raise InputError(f"{source} has {', '.join(kinds)} of images that are none: {CURE}")
    kind |= {"dtype": ImageType(kind.get("dtype", "uint8"))}
    try:
        sizes: Any = {"crop": crop, "eval_resize": ResizeConfig(**resize)}  # type: ignore[arg-type]
        return DatasetConfig(name="", reader={}, **sizes, **kind)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
