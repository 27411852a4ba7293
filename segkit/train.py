"""The command ``python train.py`` or ``segkit train``: compose the configuration, run it, say what went wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from segkit.errors import InputError
from segkit.guard import guarded
from segkit.training import ranks

_sweeps: list[Any] = []
"""The sweep on this machine that the command line asked for, if it did."""


def _task(node: Any) -> float | None:
    """Run one composed configuration; returns the final mean IoU, which sweeps compare.

    A single run ends the process here, with one sentence, if something is wrong; Hydra would print lines of its own
    about an exception that comes through it. A job of a sweep on this machine is handed to a process of its own; one
    of a cluster's launcher or of a searching sweeper runs here, and they need its exception.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    choices = hydra_config.runtime.choices
    local = choices["hydra/launcher"] == "basic" and choices["hydra/sweeper"] == "basic"
    searches = bool(node.sweep.space) or node.sweep.trials is not None or node.sweep.hours is not None
    if hydra_config.mode != RunMode.MULTIRUN:
        return guarded(lambda: _search(node, [], None) if searches else _run(node, folder))
    if searches:
        given = list(hydra_config.overrides.task)
        return guarded(lambda: _search(node, given, Path(hydra_config.sweep.dir) if local else None))
    if not local:
        return _run(node, folder)
    from segkit.config.compose import to_config
    from segkit.sweeps.jobs import LocalSweep

    guarded(lambda: to_config(node))  # a mistake in all jobs ends the sweep before it starts
    if not _sweeps:
        _sweeps.append(LocalSweep(Path(hydra_config.sweep.dir), jobs=node.sweep.jobs))
    _sweeps[0].submit(list(hydra_config.overrides.task), folder)
    return None


def _search(node: Any, overrides: list[str], folder: Path | None) -> None:
    """Prepare a search (``sweep.space``) in ``folder``; it begins when Hydra has nothing left to do."""
    from segkit.config.compose import to_config
    from segkit.sweeps.search import Search

    if folder is None:
        raise InputError(
            "a search is a sweep on this machine, in jobs of its own: add -m, and leave out hydra/launcher and "
            "hydra/sweeper"
        )
    if _sweeps:
        raise InputError("a search takes its values from sweep.space: give every key one value on the command line")
    _sweeps.append(Search(folder, config=to_config(node), overrides=overrides))


def _run(node: Any, folder: Path) -> float:
    from segkit.config.compose import to_config
    from segkit.run.splits import open_phases

    config = to_config(node)
    phases = open_phases(config)

    from segkit.run import pipeline

    return pipeline.run(config, folder, phases)


def _hydra_main() -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from segkit.config.compose import config_dir
    from segkit.config.schema import Config

    OmegaConf.register_new_resolver("start_time", ranks.start_time, replace=True)
    ConfigStore.instance().store(name="schema", node=Config, provider="segkit")
    hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(_task)()
    if _sweeps:
        sys.exit(_sweeps[0].finish())


def main() -> None:
    """Entry point; ends the process with 0, an exception's ``exit_code``, or 1 for a defect."""
    # Hydra then raises its errors instead of printing them, and all messages come from one place.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    guarded(_hydra_main)


if __name__ == "__main__":
    main()
