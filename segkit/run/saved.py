"""A finished run, opened again. Its files are untrusted input.

The configuration goes through the same closed schema and the same list of allowed targets as a new one; weights are
read with ``weights_only``; nothing that the configuration names is downloaded or read but the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkit.config.compose import reason_of, to_config
from segkit.config.schema import Config, Head
from segkit.config.targets import is_trusted
from segkit.errors import InputError
from segkit.files import FOREIGN, read_config_text, read_json
from segkit.runtime import drawing, without_memory

CHECKPOINTS = ("last", "best")


@dataclass(frozen=True)
class SavedRun:
    """A run folder and its configuration; ``phase`` is None for the last one, which lies at the top."""

    path: Path
    config: Config
    phase: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of the phase."""
        return self.path if self.phase is None else self.path / self.phase

    @property
    def phase_name(self) -> str:
        """The name of the phase, also of the last one."""
        return self.phase or list(self.config.schedule)[-1]

    def checkpoint(self, which: str = "last") -> Path:
        """The checkpoint ``last`` or ``best``."""
        if which not in CHECKPOINTS:
            raise InputError(f"--checkpoint is {which!r}, but must be one of {', '.join(CHECKPOINTS)}")
        path = self.folder / "checkpoints" / f"{which}.pt"
        if not path.is_file():
            other = next(name for name in CHECKPOINTS if name != which)
            instead = f"give --checkpoint {other}" if path.with_name(f"{other}.pt").is_file() else "train on"
            raise InputError(f"{path} is not there: the run has not got so far; {instead}, or name another run")
        return path

    def label_counts(self) -> dict[str, Any]:
        """The label counts that the phase was trained with; InputError if the file does not hold such."""
        return read_counts(self.folder / "label_counts.json")

    def model(self, which: str = "last") -> Any:
        """The trained model (:class:`segkit.models.Segmenter`), on the CPU, in evaluation mode, with its ``digest``."""
        from segkit.training import checkpoint

        path = self.checkpoint(which)
        state = checkpoint.load(path)
        weights = checkpoint.weights(state)
        model = model_with(weights, self.config, len(self.label_counts()["classes"]), source=path).eval()
        model.digest = state["digest"]
        return model


def model_with(weights: Any, config: Config, num_classes: int, *, source: Path) -> Any:
    """The model of ``config`` with ``weights`` (of ``source``); InputError if they are another model's."""
    from segkit.run import build

    config = without_sources(config)
    return filled(lambda: build.build_model(config, num_classes), config.model, weights, source=source)


def outline(make: Callable[[], Any], node: dict[str, Any]) -> Any:
    """The model of ``node`` that ``make`` builds; without values, unless it is the user's own, which may read them."""
    with nullcontext() if is_trusted(str(node.get("_target_"))) else without_memory():
        return make()


def filled(make: Callable[[], Any], node: dict[str, Any], weights: Any, *, source: Path) -> Any:
    """The model of ``node`` that ``make`` builds, with ``weights`` (of ``source``).

    InputError if they are another model's, before memory is allocated, of which a configuration may ask for too much.
    """
    from segkit.training import checkpoint

    checkpoint.check_weights(outline(make, node), weights, source=source)
    with drawing:
        model = make()
    checkpoint.load_weights(model, weights, source=source)
    return model


COUNTS_CURE = "copy the file again, or run the command that trained the run once more, which writes it anew"


def read_counts(path: Path, *, cure: str = COUNTS_CURE) -> dict[str, Any]:
    """The label counts in ``path``; InputError, which ends with ``cure``, if the file does not hold such."""
    content = read_json(path, cure=cure)
    if not are_counts(content):
        raise InputError(
            f"{path} has not a number of pixels and images for each of up to 255 classes, and a palette of as many "
            f"colours: {cure}"
        )
    return content


def are_counts(content: dict[str, Any]) -> bool:
    """True for the content of a label_counts.json; ``palette`` may be missing."""
    classes, palette = content.get("classes"), content.get("palette")
    if not isinstance(classes, dict) or not 1 <= len(classes) <= 255:
        return False
    if any(name != name.encode(errors="ignore").decode() for name in classes):  # half a letter, which nothing can draw
        return False
    rows = [row for row in classes.values() if isinstance(row, dict)]
    counts: list[Any] = [row.get(key) for row in rows for key in ("pixels", "images")]
    colours = [] if palette is None else palette
    return (
        len(rows) == len(classes)
        and all(type(value) is int and value >= 0 for value in counts)
        and sum(counts) < 2**63
        and isinstance(colours, list)
        and (palette is None or len(colours) == len(classes))
        and all(isinstance(colour, list) and len(colour) == 3 for colour in colours)
        and all(type(value) is int and 0 <= value <= 255 for colour in colours for value in colour)
    )


def open_run(path: Path | str, *, phase: str | None = None) -> SavedRun:
    """Open the run folder ``path``; InputError if it is none, or if its configuration is not allowed."""
    path = Path(path)
    saved = path / "config.yaml"
    if not saved.is_file():
        raise InputError(
            f"{path} is no run folder, it has no config.yaml: name a folder such as outputs/DATA/MODEL/TIME"
        )
    config = read_config(saved)
    if phase is not None and phase not in config.schedule:
        raise InputError(f"{path} has no phase {phase!r}: its phases are {', '.join(config.schedule)}")
    *earlier, last = config.schedule
    begun = [name for name in earlier if (path / name / "checkpoints" / "last.pt").is_file()]
    if phase is None and begun and not (path / "checkpoints").exists():
        raise InputError(
            f"{path} has not come to its last phase, {last}: add --phase {begun[-1]} to take the one before, or run "
            "the same command again to go on"
        )
    return SavedRun(path, config, phase)


def check_classes(saved: SavedRun, classes: Sequence[str]) -> None:
    """Raise InputError unless ``classes`` are those that the run was trained on, by name and in their order."""
    if difference := differing_classes(classes, list(saved.label_counts()["classes"])):
        raise InputError(
            f"the data set has other classes than the run {saved.path} was trained on ({difference}), so scores and "
            "colours would stand under wrong names: restore the label table, or train again"
        )


def differing_classes(one: Sequence[str], other: Sequence[str]) -> str:
    """Return in what two lists of classes differ, empty if in nothing."""
    if len(one) != len(other):
        return f"{len(one)} classes instead of {len(other)}"
    for number, (name, expected) in enumerate(zip(one, other, strict=True)):
        if name != expected:
            return f"class {number} is {name!r} instead of {expected!r}"
    return ""


def read_config(saved: Path, *, cure: str = FOREIGN) -> Config:
    """The configuration in ``saved`` (YAML or JSON), through the schema; InputError for anything it does not allow.

    ``cure`` ends the sentence about a file that cannot be read.
    What it says under ``trust`` does not count: only a command line can trust code.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content = read_config_text(saved, cure=cure)
    content.pop("trust", None)
    try:
        config = to_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(content)))
        if config.precision.value == "auto":
            raise InputError("precision is auto, but a run's must say what was chosen: write fp32, bf16 or fp16")
    except InputError as error:
        raise InputError(f"{saved}: {error}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(f"{saved} is not a configuration of this version ({reason_of(error)}): train again") from None
    return config


def without_sources(config: Config) -> Config:
    """``config`` with a model that is built without reading or downloading weights."""
    model = dict(config.model)
    if "encoder_weights" in model:
        model["encoder_weights"] = "none"
    if "weights" in model:
        model["weights"] = None
    return dataclasses.replace(config, model=model, grad_checkpointing=False)


def as_begun(config: Config, folder: Path) -> Config:
    """``config`` itself; without its initial weights where the run in ``folder`` goes on with weights of its own."""
    checkpoints = folder / next(iter(config.schedule)) / "checkpoints"
    if not any((checkpoints / name).is_file() for name in ("last.pt", "previous.pt")):
        return config
    return dataclasses.replace(config, model=without_sources(config).model, init_from=None, head=Head.keep)
