"""segkit: semantic segmentation with distribution-aware margin calibration.

The door for Python; nothing heavy is imported before one of these is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

__version__ = "0.2.0.dev0"


def train(
    overrides: Sequence[str] = (), *, folder: Path | str | None = None, config_dirs: Sequence[Path | str] = ()
) -> dict[str, Any]:
    """Train as ``python train.py OVERRIDES`` does, with the same numbers; returns the content of results.json.

    ``folder`` is the run folder (default: ``outputs/DATASET/MODEL-LOSS/TIME``, as on the command line); the same one
    again goes on where the run stopped. ``config_dirs`` are further folders with groups of options. The dictionary has
    ``folder`` in addition. Raises :class:`segkit.errors.InputError` where the command would end with a sentence, and
    :class:`segkit.errors.Interrupted` after Ctrl-C, with the state saved.
    """
    import time

    from segkit.config.compose import compose
    from segkit.config.targets import short_name
    from segkit.files import read_json
    from segkit.guard import sentences
    from segkit.run.splits import open_phases
    from segkit.runtime import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    with sentences():
        config = compose(overrides, config_dirs=config_dirs)
    if folder is None:
        name = f"{short_name(config.model)}-{short_name(config.loss)}"
        folder = Path("outputs") / config.dataset.name / name / time.strftime("%Y-%m-%d_%H-%M-%S")
    splits = open_phases(config)

    from segkit.run import pipeline

    pipeline.run(config, Path(folder), splits)
    return {**read_json(Path(folder) / "results.json"), "folder": str(folder)}


def evaluate(run: Path | str, **options: Any) -> dict[str, Any]:
    """Score a trained run as ``segkit evaluate RUN`` does; returns what it writes below RUN/evaluations.

    ``options`` are those of the verb, with underscores: ``split="test", tta="flip,ms", slide=True, max_images=100``.
    Raises :class:`segkit.errors.InputError` where the verb would end with a sentence.
    """
    from segkit.commands import evaluate as verb
    from segkit.commands.options import words

    return verb.score(verb.parser().parse_args(words(run, options)))[0]


def predict(images: Iterable[Path | str | ndarray], run: Path | str, **options: Any) -> list[ndarray]:
    """Label images as ``segkit predict RUN`` does; returns one array (H, W) of class numbers an image, in order.

    ``images``: paths, or arrays (H, W, C) of what the model was trained on, uint8 RGB by default. ``run``: a run
    folder, or what ``segkit export`` wrote. ``options`` are those of the verb, with underscores: ``tta="flip",
    slide="512x512", device="cpu"``. Raises :class:`segkit.errors.InputError` also for an image that cannot be read.
    """
    from segkit.commands import predict as verb
    from segkit.commands.options import words

    if isinstance(images, str | Path):
        images = [images]
    return verb.labels(images, verb.parser(files=False).parse_args(words(run, options)))
