"""The command ``python train.py`` or ``segkit train``: compose the configuration, run it, say what went wrong."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segkit import ranks
from segkit.errors import InputError

EXIT_INPUT = 2
"""Exit code for a mistake in the input."""
EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM or SIGINT: the state is saved, the same command goes on."""


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
    from segkit.config import to_config
    from segkit.sweep import LocalSweep

    guarded(lambda: to_config(node))  # a mistake in all jobs ends the sweep before it starts
    if not _sweeps:
        _sweeps.append(LocalSweep(Path(hydra_config.sweep.dir), jobs=node.sweep.jobs))
    _sweeps[0].submit(list(hydra_config.overrides.task), folder)
    return None


def _search(node: Any, overrides: list[str], folder: Path | None) -> None:
    """Prepare a search (``sweep.space``) in ``folder``; it begins when Hydra has nothing left to do."""
    from segkit.config import to_config
    from segkit.search import Search

    if folder is None:
        raise InputError(
            "a search is a sweep on this machine, in jobs of its own: add -m, and leave out hydra/launcher and "
            "hydra/sweeper"
        )
    if _sweeps:
        raise InputError("a search takes its values from sweep.space: give every key one value on the command line")
    _sweeps.append(Search(folder, config=to_config(node), overrides=overrides))


def _run(node: Any, folder: Path) -> float:
    from segkit.config import to_config
    from segkit.preflight import open_phases

    config = to_config(node)
    phases = open_phases(config)

    from segkit import pipeline

    return pipeline.run(config, folder, phases)


def _hydra_main() -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from segkit.config import Config, config_dir

    OmegaConf.register_new_resolver("start_time", ranks.start_time, replace=True)
    ConfigStore.instance().store(name="schema", node=Config, provider="segkit")
    hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(_task)()
    if _sweeps:
        sys.exit(_sweeps[0].finish())


def main() -> None:
    """Entry point; ends the process with 0, :data:`EXIT_INPUT` or :data:`EXIT_INTERRUPTED`, or 1 for a defect."""
    # Hydra then raises its errors instead of printing them, and all messages come from one place.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    guarded(_hydra_main)


def guarded(command: Callable[[], Any]) -> Any:
    """Call ``command``; turn the exceptions that a user can mend into one sentence and an exit code."""
    warnings.formatwarning = lambda message, category, *rest: f"warning: {message}\n"
    ranks.quiet_others()
    try:
        return command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence, code = explain(error)
        if sentence is None or os.environ.get("SEGKIT_DEBUG") == "1":
            raise
        if ranks.speaks(sentence):
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(code)


def explain(error: BaseException) -> tuple[str | None, int]:
    """One sentence for ``error`` and the exit code; None for a defect of segkit, which deserves its traceback."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "Interrupted" in kinds:
        return (
            f"{error}; the state is saved: run the same command with the same hydra.run.dir to go on",
            EXIT_INTERRUPTED,
        )
    if isinstance(error, InputError) or "NonFiniteLoss" in kinds:
        return str(error), EXIT_INPUT
    if "OutOfMemory" in kinds:
        return str(error), 1
    if ranks.is_lost_peer(error):
        return "another process of this run has ended; its own message says why", 1
    if "OutOfMemoryError" in kinds:
        return f"out of memory ({str(error).splitlines()[0]}): {MEMORY_ADVICE}", 1
    if "HydraException" in kinds or "OmegaConfBaseException" in kinds:
        return _explain_hydra(error), EXIT_INPUT
    if isinstance(error, OSError):
        return _explain_os_error(error), EXIT_INPUT
    return None, 1


MEMORY_ADVICE = (
    "set grad_checkpointing=true, or accumulate=2 (or twice what it is: half as many images at once), or a smaller "
    "dataset.crop"
)


def _explain_os_error(error: OSError) -> str:
    if error.filename is not None and isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return (
            f"{error.filename} cannot be used ({error.strerror}): give a folder that can be written, hydra.run.dir=DIR"
        )
    return str(error)


def _explain_hydra(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages as one sentence that names the key and what is allowed."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = error.__cause__ or error.__context__
    option = re.search(r"Could not find '([^']+)'", text)
    if option:
        return _explain_option(option.group(1), text)
    key = re.match(r"Could not override '([^']+)'", text)
    if key:
        parent = getattr(cause, "parent_node", None)
        return _explain_key(key.group(1), parent)
    if text.startswith("Error merging override") and cause is not None:
        reason = str(cause).splitlines()[0]
        return f"{lines[0].removeprefix('Error merging override ')} is not allowed: {reason[:1].lower() + reason[1:]}"
    return "; ".join(lines[:2]) + " (`python train.py --cfg job` shows the configuration)"


def _explain_key(key: str, parent: Any) -> str:
    known = [str(name) for name in parent] if parent is not None else []
    prefix, _, last = key.rpartition(".")
    if key.startswith("sweep.space."):
        return (
            f"there is no key {key} yet: write '+{key}={{low:1,high:10}}', after '~{key}' if it replaces another range"
        )
    close = difflib.get_close_matches(last, known, n=1)
    full = f"{prefix}.{close[0]}" if close and prefix else "".join(close)
    hint = f": did you mean {full}?" if close else f": {prefix or 'a run'} has {', '.join(known)}" if known else ""
    return f"there is no key {key}{hint} (`python train.py --cfg job` shows all keys)"


def _explain_option(name: str, text: str) -> str:
    group, _, option = name.rpartition("/")
    options = [line.strip() for line in text.splitlines() if line.startswith("\t")]
    options = [item for item in options if not item.startswith("provider=")]
    close = difflib.get_close_matches(option, options, n=1)
    hint = f"did you mean {group}={close[0]}? " if close else ""
    return f"{group}={option} is not an option: {hint}the options are {', '.join(options)}"


if __name__ == "__main__":
    main()
