"""What is checked before a heavy library is imported: the configuration, and that the data are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segkit.config.dataset import of_phase
from segkit.config.schema import Config, DatasetConfig
from segkit.config.targets import GROUPS, instantiate
from segkit.data import SampleSet
from segkit.data.decode import set_pixel_limit
from segkit.data.layout import group_of, name_share
from segkit.errors import LITE0, InputError, not_fetched, unreachable

HOLDOUT = "holdout"
"""Name of the split that `dataset.holdout` makes of training images."""


@dataclass(frozen=True)
class Splits:
    """The two splits of a phase's data set."""

    train: SampleSet
    val: SampleSet


def open_split(dataset: DatasetConfig, split: str) -> SampleSet:
    """Open one split of ``dataset``; lists files, reads none.

    The training split comes without the images that ``dataset.holdout`` keeps out of it; those are the split
    :data:`HOLDOUT`, unless nothing is held out and the data set itself has a split of that name.
    """
    if dataset.holdout and split in (HOLDOUT, dataset.train_split):
        return _part(dataset, held_out=split == HOLDOUT)
    try:
        return _read(dataset, split)
    except InputError as error:
        if split != HOLDOUT:
            raise
        raise InputError(
            f"no training images were held out, dataset.holdout is 0: train with dataset.holdout=0.1 ({error})"
        ) from None


def is_held_out(name: str, share: float) -> bool:
    """True for a ``share`` of all names, by a hash of each alone: other images neither add to them nor take away."""
    return name_share(name) < share


def _part(dataset: DatasetConfig, *, held_out: bool) -> SampleSet:
    whole = _read(dataset, dataset.train_split)
    groups = dataset.reader.get("groups")
    chosen = [is_held_out(group_of(sample.name, groups), dataset.holdout) for sample in whole.samples]
    if all(chosen) or not any(chosen):
        raise InputError(
            f"dataset.holdout={dataset.holdout} keeps {'all' if all(chosen) else 'none'} of the {len(whole)} images of "
            f"{dataset.train_split} out of training, by a hash of their names: set another share, or dataset.holdout=0"
        )
    part = whole.subset([number for number, held in enumerate(chosen) if held == held_out])
    if held_out:
        part.split = HOLDOUT
    return part


def _read(dataset: DatasetConfig, split: str) -> SampleSet:
    facts = {"root": dataset.root, "split": split}
    opened: SampleSet = instantiate(dataset.reader, facts, key="dataset.reader")
    return opened.of_kind(dataset.kind)


def same_split(dataset: DatasetConfig) -> str | None:
    """What to say if training and validation have the same images; None if they do not."""
    if dataset.val_split != dataset.train_split:
        return None
    return (
        f"training and validation are both on split {dataset.val_split} of {dataset.name}, so that the scores say "
        "little about other images: set dataset.val_split to another one"
    )


def same_images(dataset: DatasetConfig, pair: Splits) -> str | None:
    """:func:`same_split`, or what to say if training and validation have some files in common."""
    shared = sorted({sample.image for sample in pair.train.samples} & {sample.image for sample in pair.val.samples})
    if not shared:
        return None
    return same_split(dataset) or (
        f"{len(shared)} of the {len(pair.val)} images of split {dataset.val_split} are in {dataset.train_split} as "
        f"well, {shared[0]} for one, so that the scores are too good: take them out of one of the two"
    )


def _check_weights(config: Config) -> None:
    """Raise InputError if a file of weights that ``config`` names is not there."""
    if config.init_from and not Path(config.init_from).exists():
        raise InputError(f"init_from is {config.init_from}, but there is no such file or folder: correct its name")
    if config.model["_target_"] not in GROUPS["model"].permitted:
        return  # of the user's own, who may mean something else by it
    for key in ("weights", "encoder_weights"):
        source = config.model.get(key)
        if source not in (None, "none", "imagenet") and not Path(source).is_file():
            raise InputError(
                f"model.{key} is {source!r}, but there is no such file: give the path of a file with weights"
            )


def check_hub(config: Config) -> None:
    """Raise InputError if the encoder's weights come from the hub, whose cache is empty, and which does not answer.

    Building the model would say so as well, but only once the heavy libraries are imported.
    """
    model = config.model
    encoder = model.get("encoder")
    if model["_target_"] not in GROUPS["model"].permitted or encoder in (None, LITE0):
        return
    if model.get("encoder_weights") != "imagenet" or model.get("weights"):  # which hold those of the encoder, too
        return
    from huggingface_hub import constants

    if any(Path(constants.HF_HUB_CACHE).glob("models--*")):
        return
    if reason := "the hub is set to offline" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT):
        raise not_fetched(encoder, constants.ENDPOINT, reason)


def open_phases(config: Config) -> dict[str, Splits]:
    """The splits of every phase.

    InputError if weights or data are missing, or if two phases have different classes.
    """
    _check_weights(config)
    set_pixel_limit(config.max_pixels)
    opened: dict[str, Splits] = {}
    known: list[tuple[DatasetConfig, Splits]] = []
    for name in config.schedule:
        dataset = config.phase_dataset(name)
        splits = next((splits for other, splits in known if other == dataset), None)
        if splits is None:
            try:
                splits = Splits(open_split(dataset, dataset.train_split), open_split(dataset, dataset.val_split))
            except InputError as error:
                own = config.schedule[name].dataset is not None
                raise InputError(of_phase(str(error), name) if own else str(error)) from error
            known.append((dataset, splits))
        opened[name] = splits
    for splits in opened.values():
        if splits.train.classes != splits.val.classes:  # of a reader of the user's own
            raise InputError(
                f"{splits.val.name} has other classes, or another order, in {splits.val.split} "
                f"({', '.join(splits.val.classes)}) than in {splits.train.split} ({', '.join(splits.train.classes)}): "
                "give both splits one label table"
            )
        if splits.train.num_classes < 2:
            raise InputError(
                f"{splits.train.table.name} has one class, {splits.train.classes[0]!r}, but a segmentation tells at "
                "least two apart: list the background as a class as well"
            )
    first, *others = opened.items()
    for name, splits in others:
        if splits.train.classes != first[1].train.classes:
            raise InputError(
                f"phase {name} trains on {splits.train.num_classes} classes and phase {first[0]} on "
                f"{first[1].train.num_classes}, or on classes of other names, but one model goes through all phases: "
                f"choose the same classes in schedule.{name}.dataset"
            )
    return opened
