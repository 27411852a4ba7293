"""What is checked before a heavy library is imported: the configuration, and that the data are there."""

from __future__ import annotations

from dataclasses import dataclass

from segkit.config.schema import Config, DatasetConfig
from segkit.config.targets import instantiate
from segkit.data import SampleSet
from segkit.data.decode import set_pixel_limit
from segkit.errors import InputError


@dataclass(frozen=True)
class Splits:
    """The two splits of a phase's data set."""

    train: SampleSet
    val: SampleSet


def open_split(dataset: DatasetConfig, split: str) -> SampleSet:
    """Open one split of ``dataset``; lists files, reads none."""
    facts = {"root": dataset.root, "split": split}
    return instantiate(dataset.reader, facts, key="dataset.reader")


def open_phases(config: Config) -> dict[str, Splits]:
    """The splits of every phase. InputError if data are missing, or if two phases have different classes."""
    set_pixel_limit(config.max_pixels)
    opened: dict[str, Splits] = {}
    known: list[tuple[DatasetConfig, Splits]] = []
    for name in config.schedule:
        dataset = config.phase_dataset(name)
        splits = next((splits for other, splits in known if other == dataset), None)
        if splits is None:
            splits = Splits(open_split(dataset, dataset.train_split), open_split(dataset, dataset.val_split))
            known.append((dataset, splits))
        opened[name] = splits
    first, *others = opened.items()
    for name, splits in others:
        if splits.train.classes != first[1].train.classes:
            raise InputError(
                f"phase {name} trains on {splits.train.num_classes} classes and phase {first[0]} on "
                f"{first[1].train.num_classes}, or on classes of other names, but one model goes through all phases: "
                f"choose the same classes in schedule.{name}.dataset"
            )
    return opened
