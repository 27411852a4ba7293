"""Arguments that several verbs share, and what follows from them."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from segkit.config.targets import trust
from segkit.errors import InputError
from segkit.progress import show

if TYPE_CHECKING:
    from segkit.config.schema import Config, DatasetConfig
    from segkit.data.samples import SampleSet
    from segkit.evaluation import Inference
    from segkit.run.saved import SavedRun

PROGRAMS = "torch_export"
"""What ``--trust`` says, beside packages, for a program of torch.export"""


class _Trust(argparse.Action):
    """``--trust``: permits the code of a package as soon as it is read, so that no verb has to think of it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        trust([name for name in values.split(",") if name != PROGRAMS])
        setattr(namespace, self.dest, values)


class _Limit(argparse.Action):
    """``--max-pixels``: refuses larger images as soon as it is read, so that no verb has to think of it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        from segkit.data.decode import set_pixel_limit

        set_pixel_limit(values)
        setattr(namespace, self.dest, values)


def count(least: int, *, most: int = 2**31) -> Callable[[str], int]:
    """Return a ``type`` of argparse: a whole number from ``least`` to ``most``."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return number


DECISIONS = ("argmax", "bias", "miou")

SHARED: dict[str, dict[str, Any]] = {
    "overrides": {"nargs": "*", "metavar": "KEY=VALUE", "help": "as for train.py: dataset=..., loss.tau=..."},
    "--config-dir": {
        "action": "append",
        "default": [],
        "metavar": "DIR",
        "help": "a folder of options of your own, as for train.py (default: none)",
    },
    "run": {"type": Path, "metavar": "RUN", "help": "a run folder"},
    "--phase": {"help": "a phase of the run (default: the last)"},
    "--trust": {
        "action": _Trust,
        "metavar": "PACKAGE,...",
        "help": "packages of your own that the run's model, loss or reader comes from (default: none)",
    },
    "--checkpoint": {"default": "last", "choices": ["last", "best"], "help": "which checkpoint to load"},
    "--root": {"metavar": "DIR", "help": "folder of the data set (default: where it was in training)"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda, cuda:N or mps"},
    "--precision": {"choices": ["fp32", "bf16", "fp16"], "help": "of the forward pass (default: that of the run)"},
    "--batch-size": {
        "type": count(1, most=1024),
        "default": 1,
        "metavar": "N",
        "help": "images of equal size in one forward pass",
    },
    "--workers": {"type": count(0, most=1000), "default": 2, "metavar": "N", "help": "processes that load images"},
    "--max-pixels": {
        "action": _Limit,
        "type": count(1, most=10**12),
        "metavar": "N",
        "help": "refuse images of more pixels (default: 200 million)",
    },
    "--decision": {
        "default": "argmax",
        "choices": DECISIONS,
        "help": "how scores become a class: the largest, after a bias per class, or the rule for the mean IoU; "
        "segkit evaluate fits the last two",
    },
    "--tta": {"default": "", "metavar": "flip,ms", "help": "views to average: flip, ms (scales), both (default: none)"},
    "--scales": {"metavar": "S,S,...", "help": "scales of --tta ms (default: 0.5 to 1.75 in quarters)"},
    "--slide": {
        "nargs": "?",
        "const": "crop",
        "metavar": "HxW",
        "help": "slide a window over the image; without a size it is the training crop (default: the whole image)",
    },
    "--overlap": {"type": float, "default": 0.5, "metavar": "SHARE", "help": "share that neighbouring windows overlap"},
    "--blending": {
        "default": "gaussian",
        "choices": ["gaussian", "uniform"],
        "help": "weights of a window where windows overlap",
    },
}
"""Arguments by name; verbs choose from them with :func:`add_shared`."""

INFERENCE = ("--tta", "--scales", "--slide", "--overlap", "--blending")
"""The arguments that say how images become predictions; :func:`inference` reads them."""


class _WithDefaults(argparse.HelpFormatter):
    """Help that shows the default of every option that has one and does not describe it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        plain = type(action.default) in (int, float, str) and action.default not in ("", argparse.SUPPRESS)
        has_default = action.option_strings and plain
        return f"{text} (default: %(default)s)" if has_default and "(default" not in text else text


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors, for the command line and for Python."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; `{self.prog} --help` explains the arguments")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse ``--``, which argparse takes for no value at all, as the value of an option."""
        if action.option_strings and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "'--' is no value: give one, or leave the argument out")
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Refuse an empty value, which a variable of the shell that is not set leaves; expand ``~`` in paths."""
        if not arg_string.strip() and arg_string != action.default:
            raise argparse.ArgumentError(action, "the value is empty: give one, or leave the argument out")
        if action.type is Path and "://" in arg_string:
            raise argparse.ArgumentError(action, f"{arg_string!r} is an address, but must be a path on this machine")
        is_home = arg_string == "~" or arg_string.startswith("~/")
        return super()._get_value(action, os.path.expanduser(arg_string) if is_home else arg_string)


def verb_parser(verb: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """Return a parser without arguments for ``segkit VERB``; ``example`` are arguments that make sense together."""
    return _Parser(
        prog=f"segkit {verb}",
        description=description,
        epilog=f"example: segkit {verb} {example}",
        formatter_class=_WithDefaults,
    )


def words(run: Path | str, options: Mapping[str, Any]) -> list[str]:
    """Return the command line for keyword arguments: ``slide=True, scales=[0.5, 1]`` is ``--slide --scales=0.5,1``."""
    found = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if flag == "--help":
            raise InputError("help is no option from Python: see help(segkit.evaluate) or help(segkit.predict)")
        if not isinstance(value, str) and hasattr(value, "__iter__"):
            value = ("x" if name == "slide" else ",").join(map(str, value))
        if value is not None and value is not False:
            found.append(flag if value is True else f"{flag}={value}")
    return [*found, "--", os.path.expanduser(str(run))]


def add_shared(parser: argparse.ArgumentParser, *names: str, **changes: dict[str, Any]) -> None:
    """Add the arguments ``names`` of :data:`SHARED`, with ``changes`` such as ``run={"help": "..."}``."""
    for name in names:
        changed = changes.get(name.lstrip("-").replace("-", "_"), {})
        parser.add_argument(name, **{**SHARED[name], **changed})


RUN_FILES = frozenset({
    "config.yaml", "provenance.json", "files.json.gz", "metrics.jsonl", "timing.jsonl", "results.json", "margins.json",
    "label_counts.json", "per_image.npz", "checksums.json", "decision.json", "index.json", "last.pt", "best.pt",
    "previous.pt",
})  # fmt: skip
"""Names of files that a run needs, and that no output of a verb replaces."""


PICTURES = (".png", ".svg", ".pdf")
"""Endings of the pictures that verbs draw."""
PAGES = (".html", ".md", ".csv", ".tex", ".svg", ".pdf")
"""Endings of what verbs write and no data set holds."""
DRAWN = b"Matplotlib"
"""What is in every picture that a verb has drawn: the name of the library."""


def check_writable(
    arguments: argparse.Namespace, *options: str, makes_folders: bool = False, draws: Collection[str] = ()
) -> None:
    """Raise InputError if an option names a file that cannot be written, where the verb ``makes_folders`` or not.

    So is an image that is there, which may be an input, unless the option is one of those that the verb ``draws`` and a
    verb has drawn it before. What is drawn is one of :data:`PICTURES`.
    """
    from segkit.data.files import IMAGE_SUFFIXES

    named: dict[Path, str] = {}
    for option in options:
        if (path := getattr(arguments, option)) is None:
            continue
        if (other := named.setdefault(path.resolve(), option)) != option:
            raise InputError(f"--{other} and --{option} name the same file {path}: give each a file of its own")
        if option in draws and path.suffix.lower() not in PICTURES:
            raise InputError(f"--{option} is {path}, but its ending must be one of {', '.join(PICTURES)}")
        folder = path.absolute().parent
        while makes_folders and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise InputError(f"--{option} is {path}, but {folder} is no folder: make it, or give another one")
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise InputError(f"--{option} is {str(path)!r}, which is {kind}: give the name of a file")
        is_drawn = option in draws and path.exists() and DRAWN in path.read_bytes()
        if path.exists() and not is_drawn and (path.suffix.lower() in IMAGE_SUFFIXES or option in draws):
            raise InputError(f"--{option} is {str(path)!r}, an image, which stays as it is: name another file")
        run = next((above for above in list(path.resolve().parents)[:3] if (above / "config.yaml").is_file()), None)
        if path.exists() and run is not None and path.name in RUN_FILES and path.resolve().parent.name != "evaluations":
            raise InputError(f"--{option} is {path}, a file of the run {run}, which stays as it is: name another file")
        if not os.access(folder, os.W_OK):
            raise InputError(f"--{option} is {path}, but the folder {folder} cannot be written: give another one")


def check_spares(arguments: argparse.Namespace, roots: Iterable[str | None], *options: str) -> None:
    """Raise InputError if an option names a file of the data below ``roots``, or an image that would be one of them.

    One of :data:`PAGES` may be written anew.
    """
    from segkit.data.files import IMAGE_SUFFIXES

    named = {option: path for option in options if (path := getattr(arguments, option)) is not None}
    for (option, path), root in itertools.product(named.items(), {root for root in roots if root}):
        kind, inside = path.suffix.lower(), path.resolve().is_relative_to(Path(root).resolve())
        if inside and (kind in IMAGE_SUFFIXES or (path.exists() and kind not in PAGES)):
            raise InputError(
                f"--{option} is {path}, within the data in {root}, which stay as they are: name a file elsewhere"
            )


def configuration(arguments: argparse.Namespace, *outputs: str) -> Config:
    """Return the configuration that the overrides describe; InputError if an option of ``outputs`` is in its data."""
    from segkit.config.compose import compose, without_effect
    from segkit.data.decode import set_pixel_limit

    config = compose(arguments.overrides, config_dirs=arguments.config_dir)
    for text in without_effect(config, arguments.overrides):
        show(text, error=True)
    check_spares(arguments, (config.phase_dataset(name).root for name in config.schedule), *outputs)
    set_pixel_limit(config.max_pixels)
    return config


def dataset_of(saved: SavedRun, arguments: argparse.Namespace) -> DatasetConfig:
    """Return the data set that the phase was trained on, at ``--root`` if that is given."""
    dataset = saved.config.phase_dataset(saved.phase_name)
    return dataset if arguments.root is None else dataclasses.replace(dataset, root=arguments.root)


def open_scored(
    run: Path, arguments: argparse.Namespace, *, phase: str | None, split: str | None
) -> tuple[SavedRun, DatasetConfig, SampleSet]:
    """Open ``run`` and ``split`` of its data set (default: dataset.val_split), whose classes must be the same."""
    from segkit.run.saved import check_classes, open_run
    from segkit.run.splits import open_split

    saved = open_run(run, phase=phase)
    dataset = dataset_of(saved, arguments)
    opened = open_split(dataset, split or dataset.val_split)
    check_classes(saved, opened.classes)
    return saved, dataset, opened


def inference(arguments: argparse.Namespace, crop: list[int]) -> Inference:
    """Return what the arguments :data:`INFERENCE` say; ``crop`` (height, width) is the window of a bare --slide."""
    from segkit.evaluation.inference import ADE20K_SCALES, Inference

    modes = {mode for mode in arguments.tta.split(",") if mode}
    if modes - {"flip", "ms"} or (arguments.tta and not modes):
        raise InputError(f"--tta is {arguments.tta!r}, but takes flip, ms, or both with a comma between")
    scales: tuple[float, ...] = (1.0,)
    if "ms" in modes:
        scales = _numbers(arguments.scales) if arguments.scales else ADE20K_SCALES
    elif arguments.scales:
        raise InputError("--scales is given without --tta ms: add --tta ms")
    window: tuple[int, int] | None = None
    if arguments.slide:
        asked = crop if arguments.slide == "crop" else _window(arguments.slide)
        window = (-(-asked[0] // 32) * 32, -(-asked[1] // 32) * 32)
        if window != tuple(asked):
            arguments.slide = f"{window[0]}x{window[1]}"  # so that it is said once
            show(f"windows of {asked[0]}x{asked[1]} are {arguments.slide} here: sides are multiples of 32")
    elif (arguments.overlap, arguments.blending) != (0.5, "gaussian"):
        raise InputError("--overlap or --blending is given without a window: add --slide")
    options = {"window": window, "overlap": arguments.overlap, "blending": arguments.blending, "scales": scales}
    try:
        return Inference(flip="flip" in modes, **options)
    except InputError as error:
        name = str(error).partition(" ")[0]
        raise InputError(f"{error}: set --{'slide' if name == 'window' else name}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--scales is {text!r}, but takes numbers with commas between, as 0.5,1.0,1.5") from None


def _window(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--slide is {text!r}, but takes HxW, as 800x800") from None
    return height, width
