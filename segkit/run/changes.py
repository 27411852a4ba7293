"""What may differ between two starts of one run: keys of the configuration, and files of the data."""

from __future__ import annotations

import fnmatch
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from segkit.config.schema import Config, is_free, plain
from segkit.config.targets import short_name
from segkit.data import SampleSet
from segkit.data.files import read_bytes
from segkit.data.statistics import file_state, meaning
from segkit.errors import InputError
from segkit.files import write_atomically
from segkit.progress import show
from segkit.run.splits import Splits

FILES = "files.json.gz"
"""File of a run folder: the state of every data file when the run was started first."""

MEANING = ""
"""Its name, which no sample has, of what values of labels mean."""

MOST_BYTES = 2**28
"""What that file, which may be a stranger's, may hold: the states of more than a million samples."""

EFFECTIVE = (
    "optimizer.*",
    *(f"schedule.*.{name}" for name in ("epochs", "steps", "lr", "lr_schedule", "warmup_steps", "poly_power")),
    *("schedule.*.loss", "schedule.*.loss.*"),
    "loss.*",
    "evaluation.*",
    *(f"dataset.{name}" for name in ("flip", "scale", "color_jitter", "jitter.*")),
    "augment.*",
    *("log_every", "clip_norm", "precision", "determinism", "compile", "channels_last", "grad_checkpointing"),
    *("accumulate", "encoder_lr_factor", "limit_steps"),
)
"""Keys that take effect where a run goes on with ``ignore_config_change=true``; the others cannot change within it."""

CONFIG_CURE = "copy it again, or delete it to go on with the configuration of this command; the checkpoints stay"
"""What mends the config.yaml of a run that goes on."""

FIXED = ("optimizer._target_", "optimizer.amsgrad", "optimizer.centered", "loss._target_")
"""Exceptions from :data:`EFFECTIVE`: their state would not fit."""


def differing_keys(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two nested mappings, with the value of each."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        found: dict[str, tuple[Any, Any]] = {}
        for name in names:
            found |= differing_keys(one.get(name), other.get(name), f"{prefix}.{name}" if prefix else str(name))
        return found
    return {} if one == other else {prefix: (one, other)}


def check_changes(path: Path, before: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that changed since the run in ``path`` was started with ``before``; InputError if they may not."""
    found = differing_keys(before, plain(config))
    found = {key: values for key, values in found.items() if not is_free(key)}
    if not found:
        return {}
    if not config.ignore_config_change:
        raise InputError(
            f"{path} holds a run of another configuration; these keys differ: {_listed(found)}. Give the same values, "
            "or another hydra.run.dir, or ignore_config_change=true to go on with the new values where that is possible"
        )
    fixed = {key: values for key, values in found.items() if not takes_effect(key)}
    if short_name(config.optimizer) == "RMSprop" and not found.get("optimizer.momentum", (1,))[0]:
        fixed["optimizer.momentum"] = found["optimizer.momentum"]  # of which it has kept no average
    if fixed:
        raise InputError(
            f"{path} holds a run of another configuration, and these keys cannot change within a run: "
            f"{_listed(fixed)}. Give the same values, or another hydra.run.dir"
        )
    return found


def takes_effect(key: str) -> bool:
    """True for a key whose new value counts from the step at which a run goes on."""
    return key not in FIXED and any(fnmatch.fnmatchcase(key, pattern) for pattern in EFFECTIVE)


def _listed(found: dict[str, tuple[Any, Any]]) -> str:
    shown = ", ".join(f"{key} ({before!r} there, {now!r} now)" for key, (before, now) in list(found.items())[:5])
    return shown + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def write_files(path: Path, splits: dict[str, Splits]) -> None:
    """Record the state of all data files in ``path``/files.json.gz."""
    content = json.dumps(_states(splits)).encode()
    write_atomically(path / FILES, gzip.compress(content, mtime=0))


def check_files(path: Path, splits: dict[str, Splits], *, may_change: bool) -> None:
    """Raise InputError if samples were added, removed or changed since :func:`write_files`, or mean something else.

    Where they ``may_change``, what the values of labels mean may not. Files that all have the same sizes and all have
    other times were copied, as before every start on a cluster: that is only said.
    """
    before = _recorded(path)
    if before is None:
        return
    now = _states(splits)
    for key, states in now.items():
        old = {MEANING: states[MEANING]} | before.get(key, {})
        if old[MEANING] != states[MEANING]:
            raise InputError(
                f"classes or values of labels of {key} have another meaning than when the run in {path} was started: "
                "restore the file of classes and the options of the reader, or choose another hydra.run.dir"
            )
        if may_change:
            continue
        changed = [name for name in states.keys() & old.keys() if states[name] != old[name]]
        added, removed = states.keys() - old.keys(), old.keys() - states.keys()
        copied = (_is_copied(state, old[name]) for name, state in states.items() if name != MEANING)
        if states.keys() == old.keys() and all(copied):
            show(f"note: the files of {key} were copied since the run was started (the same sizes, all at other times)")
        elif changed or added or removed:
            first = min([*changed, *added, *removed])
            raise InputError(
                f"the data of {key} are not those that the run in {path} was started with: {len(changed)} samples "
                f"changed, {len(added)} came and {len(removed)} went, for example {first}; restore the files, choose "
                "another hydra.run.dir, or go on all the same with ignore_config_change=true"
            )


def trained_on(path: Path, split: SampleSet) -> list[str]:
    """Return the names of the samples of ``split`` that the run in ``path`` was started to train on, by their files."""
    trained = {
        (name, state)
        for key, states in (_recorded(path) or {}).items()
        for name, state in states.items()
        if key.endswith(", train") and state and name != MEANING
    }
    return [name for name, state in _split_states(split).items() if (name, state) in trained]


def _recorded(path: Path) -> dict[str, dict[str, str]] | None:
    """What :func:`write_files` wrote into ``path``; None if there is no such file, as in a run of an older version."""
    place = path / FILES
    if not place.exists():
        return None
    try:
        with gzip.open(io.BytesIO(read_bytes(place, role="list of files"))) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it holds more than {MOST_BYTES} bytes")
        before: Any = json.loads(content)
        splits_of = before.values() if isinstance(before, dict) else [None]
        if not all(
            isinstance(states, dict) and all(isinstance(s, str) for s in states.values()) for states in splits_of
        ):
            raise ValueError("it holds no states of files")
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise InputError(f"{place} cannot be read ({error}): delete it to go on without the comparison") from None
    return before


def _is_copied(state: str, old: str) -> bool:
    """True for files of the same places and sizes, of which none has kept its time."""
    now, before = ([part.rpartition(" ")[::2] for part in text.split("\t")[1:]] for text in (state, old))
    return (
        bool(now)
        and [part[0] for part in now] == [part[0] for part in before]
        and all(part[1] != other[1] for part, other in zip(now, before, strict=True))
    )


def _states(splits: dict[str, Splits]) -> dict[str, dict[str, str]]:
    """phase/split -> name of a sample -> sizes and times of its files; a split that two phases share is read once."""
    known: dict[int, dict[str, str]] = {}
    found = {}
    for phase, pair in splits.items():
        for name, split in (("train", pair.train), ("val", pair.val)):
            if id(split) not in known:
                known[id(split)] = _split_states(split)
            found[f"phase {phase}, {name}"] = known[id(split)]
    return found


def _split_states(split: SampleSet) -> dict[str, str]:
    has_files = bool(split.samples and split.samples[0].labels) or not split.labelled  # painted samples have none
    return {MEANING: meaning(split)} | {
        sample.name: "".join(map(file_state, (sample.image, *sample.labels))) if has_files else ""
        for sample in split.samples
    }
