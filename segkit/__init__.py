"""segkit: semantic segmentation with distribution-aware margin calibration.

The door for Python; nothing heavy is imported before one of these is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    from segkit.run.splits import open_phases
    from segkit.runtime import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    config = compose(overrides, config_dirs=config_dirs)
    if folder is None:
        name = f"{short_name(config.model)}-{short_name(config.loss)}"
        folder = Path("outputs") / config.dataset.name / name / time.strftime("%Y-%m-%d_%H-%M-%S")
    splits = open_phases(config)

    from segkit.run import pipeline

    pipeline.run(config, Path(folder), splits)
    return {**read_json(Path(folder) / "results.json"), "folder": str(folder)}
