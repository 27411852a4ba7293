"""The configuration behind a verb that takes overrides, as ``train.py`` does."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segkit.config.dataset import of_phase
from segkit.config.schema import Config, check_targets
from segkit.config.targets import described, fits, trust
from segkit.errors import InputError, did_you_mean, first_line

SEARCH = "hydra.searchpath="
"""How the override begins that names folders of options, as ``--config-dir`` does."""


def compose(overrides: Sequence[str], *, config_dirs: Sequence[Path | str] = ()) -> Config:
    """The configuration that ``python train.py OVERRIDES`` would run.

    ``config_dirs``: further folders with groups of options, as Hydra's ``--config-dir``.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    for text in overrides:
        if text.startswith("-") or ("=" not in text and text[:1] not in ("+", "~")):
            raise InputError(f"the override {text!r} cannot be read: write KEY=VALUE, for example seed=1")
    if missing := [folder for folder in config_dirs if not Path(folder).is_dir()]:
        raise InputError(
            f"{missing[0]} is no folder with groups of options: correct --config-dir, or config_dirs=[...]"
        )
    check_overrides(overrides)
    ConfigStore.instance().store(name="segkit_schema", node=Config, provider="segkit")
    places = [quoted(f"file://{Path(folder).resolve()}") for folder in config_dirs]
    own = [text for text in overrides if text.startswith(SEARCH)]  # beside which Hydra takes no second one
    places += [inner for text in own if (inner := text.removeprefix(SEARCH).strip("[]"))]
    search = [f"{SEARCH}[{','.join(places)}]"] if places else []
    others = [text for text in overrides if text not in own]
    before = GlobalHydra.instance().hydra  # of a program of the user's own, which goes on with it
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return to_config(hydra_compose("train", overrides=[*others, *search]))
    finally:
        GlobalHydra.instance().hydra = before


def config_dir() -> Path:
    """The folder of the shipped YAML files: ``configs/`` of a checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise InputError(f"no configs folder with train.yaml lies beside {package}: install segkit again")


def quoted(value: object) -> str:
    """``value`` as it stands in an override that is built from it: in quotes, whatever signs it has."""
    text = re.sub(r'(\\*)("|$)', r"\1\1\2", str(value))  # Hydra takes a backslash as it is, but before a quote
    return '"' + text.replace('"', '\\"') + '"'


def check_overrides(arguments: Sequence[str]) -> None:
    """Raise InputError for an override among ``arguments`` (of the command line) that Hydra cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    num_jobs = 1
    for text in arguments:
        if text.startswith("-") or ("=" not in text and text[:1] not in "+~"):
            continue
        key, _, value = text.partition("=")
        if (plain := value.strip("'\"")).startswith("~/"):
            place = shlex.quote(f"{key}={quoted(os.path.expanduser(plain))}")
            raise InputError(f"the override {text!r} has a ~ that no shell replaces there: write {place}")
        if key.strip("+~ ") in ("hydra.run.dir", "hydra.sweep.dir", "cache_dir") and "://" in plain:
            raise InputError(
                f"the override {text!r} is an address, but a folder of this machine is needed: set {key}=DIR"
            )
        override = _read_override(parser, text)
        if not key.strip("+~ "):
            raise InputError(f"the override {text!r} has no key: write KEY=VALUE, for example seed=1")
        if key.strip("+~ ") in ("hydra.run.dir", "hydra.sweep.dir") and override.value() in NO_PLACES:
            place = key.strip("+~ ")
            raise InputError(f"the override {text!r} is empty or no name, and could fill this folder: set {place}=DIR")
        _check_given(override, text, key)
        if override.is_sweep_override() and not sweeps:
            raise InputError(
                f"the override {text!r} gives several values: add -m for a sweep over them, or put one value with a "
                f"comma in quotes, {_in_quotes(text)}"
            )
        if override.is_discrete_sweep():
            num_jobs *= _num_values(override, text, any(item.startswith("--config-dir") for item in arguments))
    if num_jobs > MOST_JOBS:
        raise InputError(
            f"the sweep has {num_jobs} jobs or more, but at most {MOST_JOBS}: give fewer values, or search, "
            "-m sweep=search"
        )


def _in_quotes(text: str) -> str:
    """The override ``text`` with its value in quotes, for a shell."""
    key, _, value = text.partition("=")
    return shlex.quote(f"{key}={quoted(value)}")


def _read_override(parser: Any, text: str) -> Any:
    """What Hydra's ``parser`` makes of the override ``text``; InputError if it cannot read the key, or the value."""
    from hydra.errors import HydraException

    try:
        return parser.parse_override(text)
    except (HydraException, ValueError, AttributeError):
        if sys.flags.optimize:  # Hydra's parser works within its assertions
            raise InputError(
                f"the override {text!r} cannot be read without assertions: call python without -O, and unset "
                "PYTHONOPTIMIZE"
            ) from None
    try:
        parser.parse_override(f"{text.partition('=')[0]}=1")
    except (HydraException, ValueError, AttributeError):
        raise InputError(
            f"the key of the override {text!r} cannot be read: it is names with dots between them, as loss.tau=3, and "
            "a list is set as a whole, as dataset.crop=[512,512]"
        ) from None
    raise InputError(
        f"the override {text!r} cannot be read: it is KEY=VALUE, and a value with signs such as = ( [ {{ # ~ "
        f"or letters beyond ASCII stands in quotes, {_in_quotes(text)}"
    )


def _check_given(override: Any, text: str, key: str) -> None:
    """Raise InputError for a value that OmegaConf would make another of, or that changes nothing.

    Such are any number but 0 for true, and false for a folder of that name; and what is no option of a group.
    """
    if override.is_sweep_override() or override.is_delete():
        return
    given, place = override.value(), key.strip("+ ")
    hint = typing.get_type_hints(Config).get(place)
    if type(given) is int and given not in (0, 1) and hint is bool:
        raise InputError(f"the override {text!r} is neither true nor false: set {place}=true or {place}=false")
    if type(given) is bool and hint == str | None:
        raise InputError(f"the override {text!r} is no path: set {place}=PATH, or {place}=null")
    group = place.partition("@")[0]
    if not (config_dir() / group).is_dir():
        return
    if given == {} and not override.is_add():
        raise InputError(
            f"the override {text!r} changes nothing, as a mapping is added to what is there: choose an option, "
            f"{place}=NAME, or take out a key, ~{place}.NAME"
        )
    names = given if isinstance(given, list) else [given]
    if len(names) > 1 and group not in OVERLAYS:
        raise InputError(
            f"the override {text!r} gives several options, which would be mixed into one: choose one of them, or try "
            f"them in turn, -m {key}={','.join(map(str, names))}"
        )
    if not isinstance(given, dict) and not (names and all(isinstance(item, str) and item != "???" for item in names)):
        kind = "a list" if isinstance(given, list) else "no name"
        raise InputError(
            f"the override {text!r} gives {kind}, but {key} takes the name of one of its options: `python train.py "
            "--help` lists them"
        )


OVERLAYS = ("augment", "debug", "experiment", "sweep")
"""Groups of which several options may be used together."""
NO_PLACES = (None, "", "???", True, False)
"""Values that Hydra would take for a name of a folder, or for this one."""
MOST_JOBS = 1000
"""Jobs of a grid: every one is composed and checked before the first starts."""


def _num_values(override: Any, text: str, more_options: bool) -> int:
    """How many values a sweep ``override`` has, of a long range more than MOST_JOBS; InputError if it has none.

    ``more_options``: the command line names a folder of options, from which a pattern may choose as well.
    """
    from hydra.core.override_parser.types import Glob

    values = override.value()
    try:
        if isinstance(values, Glob):
            names = values.filter([path.stem for path in (config_dir() / override.key_or_group).glob("*.yaml")])
            number = len(names) + more_options
        else:
            items = values.range() if hasattr(values, "range") else getattr(values, "list", values)
            number = sum(1 for _ in itertools.islice(items, MOST_JOBS + 1))
    except ValueError:  # range(1,2,0)
        number = 0
    if not number:
        raise InputError(f"the override {text!r} has no values, so the sweep would have no job: give it at least one")
    return number


def without_effect(config: Config, overrides: Sequence[str]) -> Iterator[str]:
    """Sentences about keys that ``overrides`` set in ``config`` without effect, as another key switches them off."""
    phases = config.schedule.items()
    data = [config.dataset, *(phase.dataset for _, phase in phases if phase.dataset)]
    cuts = [item.holdout or item.reader.get("val_fraction") or item.reader.get("folds") for item in data]
    rows = [
        ("dataset.jitter", any(item.color_jitter for item in data), "dataset.color_jitter is 0"),
        ("dataset.rare_crop", any(item.sampler.value == "rare_crop" for item in data), "dataset.sampler is another"),
        ("dataset.reader.groups", any(cuts), "dataset.holdout and dataset.reader.val_fraction and folds are 0"),
        (
            "optimizer.lr",
            any(p.lr in (None, config.optimizer.get("lr")) for _, p in phases),
            "all phases have schedule.PHASE.lr",
        ),
        *((f"schedule.{n}.poly_power", p.lr_schedule.value == "poly", "its lr_schedule is another") for n, p in phases),
    ]
    for key in (text.lstrip("+").partition("=")[0] for text in overrides):
        for name, has_effect, reason in rows:
            if not has_effect and f"{key}.".startswith(f"{name}."):
                yield f"warning: {key} has no effect, as {reason}: set that, or leave {key} out"


def to_config(node: Any) -> Config:
    """Turn the composed DictConfig ``node`` into a :class:`Config`; InputError for anything that is not allowed."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_keys(node, Config, "")
    try:
        config = OmegaConf.to_object(node)
    except InputError as error:  # of a data set, which does not know where it stands
        for name, phase in node.schedule.items():
            try:
                None if phase.dataset is None else OmegaConf.to_object(phase.dataset)
            except InputError as own:
                raise InputError(of_phase(str(own), name)) from None
        raise error from None
    except OmegaConfBaseException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"the configuration is not valid: {reason_of(error)}") from None
    assert isinstance(config, Config)
    _check_values(config, "")
    trust(config.trust)  # of a command line: a saved configuration comes here without it
    check_targets(config)
    return config


def reason_of(error: Exception) -> str:
    """What is wrong in one line, with the key that OmegaConf names apart from it."""
    from omegaconf.errors import MissingMandatoryValue

    key = getattr(error, "full_key", None)
    if key and isinstance(error, MissingMandatoryValue):  # ??? or ~KEY
        return f"{key} has no value: set {key}=..."
    reason = re.sub(r"'\{.{100,}\}'", "'{...}'", first_line(error))  # a mapping that ${...} brought
    return f"{key}: {reason}" if key else reason


def _check_keys(node: Any, kind: Any, prefix: str) -> None:
    """Raise InputError for a key of ``node`` that the dataclass ``kind`` does not have: `+` puts it there."""
    from omegaconf import OmegaConf

    hints = typing.get_type_hints(kind)
    if not OmegaConf.is_dict(node):  # `${...}` may bring anything
        raise InputError(f"{prefix[:-1]} is {node!r}, but has keys of its own: set {prefix}{next(iter(hints))}=...")
    for name in node:
        key = f"{prefix}{name}"
        if name not in hints:
            hint = did_you_mean(str(name), hints, before=prefix) or f"{prefix[:-1] or 'a run'} has {', '.join(hints)} "
            raise InputError(f"there is no key {key}: {hint}(`python train.py --cfg job` shows all keys)")
        inner = _dataclass_in(hints[name])
        child = None if inner is None or OmegaConf.is_missing(node, name) else node[name]
        if child is None:
            continue
        if typing.get_origin(hints[name]) is dict:
            for entry in child:
                _check_keys(child[entry], inner, f"{key}.{entry}.")
        else:
            _check_keys(child, inner, f"{key}.")


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that ``hint`` is, or has among its arguments; None if there is none."""
    return next((item for item in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(item)), None)


def _check_values(value: Any, key: str) -> None:
    """Raise InputError for a number of the schema that is not finite, and for a wrong type, which `${...}` may bring.

    What targets are given is checked with them.
    """
    if dataclasses.is_dataclass(value):
        for name, hint in typing.get_type_hints(type(value)).items():
            item, place = getattr(value, name), f"{key}.{name}".lstrip(".")
            if not fits(item, hint) and not isinstance(item, float):
                raise InputError(f"{place} is {item!r}, but must be {described(hint)}: set {place}=...")
            _check_values(item, place)
    elif isinstance(value, dict):
        for name, item in value.items():
            if dataclasses.is_dataclass(item):
                _check_values(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            _check_values(item, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} is {value}, but must be a finite number: set {key}=...")
