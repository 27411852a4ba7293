"""segkit: semantic segmentation with distribution-aware margin calibration.

The door for Python; nothing heavy is imported before one of these is called.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

__version__ = "0.2.0.dev0"

_training = threading.Lock()


def train(
    overrides: Sequence[str] = (), *, folder: Path | str | None = None, config_dirs: Sequence[Path | str] = ()
) -> dict[str, Any]:
    """Train as ``python train.py OVERRIDES`` does, with the same numbers; returns the content of results.json.

    ``folder`` is the run folder (default: ``outputs/DATASET/MODEL-LOSS/TIME``, by the names of the functions that make
    the model and the loss); the same one again goes on where the run stopped. ``config_dirs`` are further folders with
    groups of options. The dictionary has ``folder`` in addition, and nothing else with ``profile_steps``, which gives
    no scores. Raises :class:`segkit.errors.InputError` where the command would end with a sentence, and
    :class:`segkit.errors.Interrupted` after Ctrl-C, with the state saved.
    """
    import os
    import time
    from contextlib import ExitStack

    from segkit.config.compose import compose, without_effect
    from segkit.config.targets import short_name
    from segkit.errors import InputError
    from segkit.files import read_json
    from segkit.guard import call
    from segkit.progress import show
    from segkit.run.saved import as_begun
    from segkit.run.splits import open_phases
    from segkit.runtime import CUBLAS, kept_variables
    from segkit.training.sinks import MLFLOW_RETRIES

    with call(), ExitStack() as stack:
        overrides = _listed("overrides", overrides, "seed=1", (str,))
        config_dirs = _listed("config_dirs", config_dirs, "mine/configs", (str, Path))
        if not (folder is None or (isinstance(folder, str | Path) and str(folder))):
            raise InputError(f"folder is {folder!r}, but must be the path of a run folder: set folder='outputs/mine'")
        for text in overrides:
            if text.lstrip("+~").startswith(("sweep.", "sweep=", "hydra.run", "hydra.sweep", "hydra/", "hydra.mode")):
                raise InputError(
                    f"{text!r} is for the command line: folder=... names the run folder, and here is no sweep"
                )
        if not _training.acquire(blocking=False):
            raise InputError(
                "segkit.train runs in another thread of this process, with which it would share torch's random "
                "numbers: wait until that has ended, or start a process for each run"
            )
        stack.callback(_training.release)
        stack.enter_context(kept_variables(CUBLAS, MLFLOW_RETRIES[0]))
        config = compose(overrides, config_dirs=config_dirs)
        for text in without_effect(config, overrides):
            show(text, error=True)
        if folder is None:
            name = f"{short_name(config.model)}-{short_name(config.loss)}"
            folder = Path("outputs") / config.dataset.name / name / time.strftime("%Y-%m-%d_%H-%M-%S")
        path = Path(os.path.expanduser(folder))
        splits = open_phases(as_begun(config, path))

        from segkit.run import pipeline

        pipeline.run(config, path, splits)
        results = {} if config.profile_steps else read_json(path / "results.json")
        return {**results, "folder": str(path)}


def _listed(name: str, values: Any, example: str, kinds: tuple[type, ...]) -> list[Any]:
    """Return ``values`` as a list; InputError for one text, a dictionary, and items of other types."""
    from segkit.errors import InputError

    found = None if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) else list(values)
    if found is None or not all(isinstance(item, kinds) for item in found):
        raise InputError(f"{name} is {values!r}, but must be a list of texts: set {name}=[{example!r}]")
    return found


def evaluate(run: Path | str, **options: Any) -> dict[str, Any]:
    """Score a trained run as ``segkit evaluate RUN`` does; returns what it writes below RUN/evaluations.

    ``options`` are those of the verb, with underscores: ``split="test", tta="flip,ms", slide=True, max_images=100``.
    Raises :class:`segkit.errors.InputError` where the verb would end with a sentence.
    """
    from segkit.commands import evaluate as verb
    from segkit.commands.options import words
    from segkit.guard import call

    with call(verb="evaluate"):
        return verb.score(verb.parser().parse_args(words(run, options)))[0]


def predict(images: Iterable[Path | str | ndarray], run: Path | str, **options: Any) -> list[ndarray]:
    """Label images as ``segkit predict RUN`` does; returns one array (H, W) of class numbers an image, in order.

    ``images``: paths, or arrays (H, W, C) of what the model was trained on, uint8 RGB by default, or what numpy makes
    such arrays of (an RGB image of Pillow); one alone is a list of one. ``run``: a run folder, or what ``segkit
    export`` wrote. ``options`` are those of the verb, with underscores: ``tta="flip",
    slide="512x512", device="cpu"``. Raises :class:`segkit.errors.InputError` also for an image that cannot be read.
    """
    from segkit.commands import predict as verb
    from segkit.commands.options import words
    from segkit.guard import call

    if isinstance(images, str | bytes | Path) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) < 4:
        images = [images]  # type: ignore[list-item]
    with call(verb="predict"):
        return verb.labels(images, verb.parser(files=False).parse_args(words(run, options)))
