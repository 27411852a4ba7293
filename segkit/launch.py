"""The command ``python train.py`` or ``segkit train``: compose the configuration, then run it, a sweep or a search."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from segkit.errors import InputError
from segkit.files import held, remove_if_empty
from segkit.guard import guard, guarded, local_in, sentences
from segkit.memory import keep_freed
from segkit.progress import need_no_reader, show
from segkit.runtime import die_with_parent, let_waiting_threads_sleep, tidied_up_when_ended
from segkit.sweeps.jobs import CHILD
from segkit.training import ranks

_sweeps: list[Any] = []
"""The sweep on this machine that the command line asked for, if it did."""


def task(node: Any) -> float | None:
    """Run one composed configuration; returns the final mean IoU, which sweeps compare.

    A job of a sweep on this machine is handed to a process of its own; one of a cluster's launcher or of a searching
    sweeper runs here, and they need its exception. Any other exception ends the process here, with one sentence:
    Hydra would print lines of its own about it.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    choices = hydra_config.runtime.choices
    many = hydra_config.mode == RunMode.MULTIRUN
    local = choices["hydra/launcher"] == "basic" and choices["hydra/sweeper"] == "basic"
    searches = bool(node.sweep.space) or node.sweep.trials is not None or node.sweep.hours is not None
    folder = Path(hydra_config.runtime.output_dir)
    with guard(passes=many and not (local or searches)), ExitStack() as last:
        if many:  # what Hydra writes before the first job, of a sweep that is refused
            sweep = Path(hydra_config.sweep.dir)
            last.push(lambda kind, *_: None if kind is None else remove_if_empty(sweep, lock="multirun.yaml"))
        last.callback(remove_if_empty, folder)  # that Hydra made: after an error, or until the job in it starts
        from segkit.config.compose import to_config, without_effect
        from segkit.run.saved import as_begun
        from segkit.run.splits import check_hub, open_phases

        config = to_config(node)
        overrides = list(hydra_config.overrides.task)
        if searches:
            _search(config, overrides, Path(hydra_config.sweep.dir) if many and local else None)
        elif many and local:
            _submit(config, overrides, hydra_config)
        else:
            for text in without_effect(config, overrides):
                show(text, error=True)
            opened = as_begun(config, folder)
            splits = open_phases(opened)  # before anything heavy is imported
            check_hub(opened)
            from segkit.run import pipeline

            return pipeline.run(config, folder, splits)
    return None


def _submit(config: Any, overrides: list[str], hydra_config: Any) -> None:
    """Hand a job to the sweep on this machine."""
    from segkit.sweeps.jobs import LocalSweep, of_sweep

    if not _sweeps:
        folder, share = Path(hydra_config.sweep.dir), {"jobs": config.sweep.jobs, "workers": config.workers}
        _sweeps.append(LocalSweep(folder, **share, options=passed_on()))
    _sweeps[0].add(overrides, Path(hydra_config.runtime.output_dir), config)
    try:
        check_job(config, Path(hydra_config.runtime.output_dir))
    except InputError as error:
        raise InputError(of_sweep(str(error))) from None


def check_job(config: Any, folder: Path | None = None) -> None:
    """Open the data of a job and build its losses and optimizers, so that no job starts if one is impossible.

    ``folder``: where it would run, if that is known.
    """
    from segkit.run.saved import as_begun
    from segkit.run.splits import check_hub, open_phases

    opened = config if folder is None else as_begun(config, folder)
    splits = open_phases(opened)
    check_hub(opened)

    from segkit.run import hardware, pipeline
    from segkit.run.folder import RunFolder
    from segkit.runtime import resolve_device

    device = resolve_device(config.device)
    if folder is not None:
        run = RunFolder(folder, config)
        run.check_places(splits)
        if run.has_begun() and not config.auto_batch:  # whose batches are not known yet
            run.config, _ = hardware.choose(config, begun=run.begun_config(), device=device)
            run.check(splits)
    pipeline.check_parts(config, splits)
    pipeline.check_machine(config, device)


def _search(config: Any, overrides: list[str], folder: Path | None) -> None:
    """Prepare a search (``sweep.space``) in ``folder``; it begins when Hydra has nothing left to do."""
    from segkit.sweeps.search import Search

    if folder is None:
        raise InputError(
            "a search is a sweep on this machine, in jobs of its own: add -m, and leave out hydra/launcher and "
            "hydra/sweeper"
        )
    if _sweeps:
        raise InputError("a search takes its values from sweep.space: give every key one value on the command line")
    _sweeps.append(Search(folder, config=config, overrides=overrides, options=passed_on()))


def passed_on() -> list[str]:
    """What the command line says of where configurations lie, which every job of a sweep must be told as well.

    InputError for another configuration than train.yaml, on which the jobs would not stand.
    """
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args()
    if given.config_name or given.config_path:
        raise InputError(
            "--config-name and --config-path are of one run, not of the jobs of a sweep: put what that configuration "
            "sets into an option below --config-dir, as experiment=NAME"
        )
    options = [f"--config-dir={given.config_dir}"] if given.config_dir else []
    return options + [text for text in given.overrides if text.startswith("hydra.searchpath=")]


def hydra_command() -> Callable[[], None]:
    """Return the function that lets Hydra read sys.argv and call :func:`task`."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from segkit.config.compose import config_dir
    from segkit.config.schema import Config

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    OmegaConf.register_new_resolver("start_time", ranks.start_time, replace=True)
    ConfigStore.instance().store(name="segkit_schema", node=Config, provider="segkit")
    command = hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(task)
    return _leaving_no_sweep()(command)


@contextmanager
def _leaving_no_sweep() -> Iterator[None]:
    """Of a sweep with a job that Hydra cannot compose remains nothing."""
    try:
        yield
    except Exception as error:
        if folder := local_in(error, "sweep", "sweep_dir"):
            remove_if_empty(Path(folder), lock="multirun.yaml")
        raise


def check_command_line() -> None:
    """Raise InputError for an option or override that Hydra cannot read, in words of our own.

    Options among overrides, which Hydra does not take, are put before them.
    """
    from hydra._internal.utils import get_args_parser

    from segkit.config.compose import check_overrides

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}: a setting is KEY=VALUE, without dashes; `python train.py --help` lists options")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args()
    overrides = given.overrides
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(given, name)]
    if len(modes) > 1:
        refuse(f"--{modes[0]} and --{modes[1]} exclude each other")
    for name in ("resolve", "package"):
        if getattr(given, name) and not (given.cfg or given.help):
            refuse(f"--{name} goes with --cfg")
    if given.config_dir == "":  # of a variable that is not set
        refuse("--config-dir is empty")
    if sum(text.startswith(("--config-dir", "-cd")) for text in sys.argv[1:]) > 1:
        raise InputError(
            "--config-dir is given more than once, and only the last would count: give one, and the other folder as "
            "hydra.searchpath=[file:///DIR]"
        )
    if given.experimental_rerun:
        raise InputError("--experimental-rerun would run whatever its file holds: give the run's command again")
    asked = {f"{what}={shell}" for what in ("install", "uninstall", "query") for shell in ("bash", "fish", "zsh")}
    if given.shell_completion and asked.isdisjoint(overrides):
        refuse("--shell-completion takes install=SHELL, uninstall=SHELL or query=SHELL")
    if any(text.startswith("query=") for text in overrides) and "COMP_LINE" not in os.environ:
        refuse("query=SHELL is what a shell asks, with its line in COMP_LINE")
    keys = [text.lstrip("+~").partition("=")[0] for text in overrides]
    if given.multirun and "hydra.run.dir" in keys:
        raise InputError("hydra.run.dir is the folder of one run, but -m makes several: set hydra.sweep.dir=DIR")
    of_sweep = [key for key in keys if key.startswith(("hydra.sweep.", "sweep."))]
    if of_sweep and not (given.multirun or CHILD in os.environ):
        raise InputError(f"{of_sweep[0]} is of a sweep, but this is one run: add -m, or leave it out")
    sys.argv[1:] = [*overrides, *(text for text in sys.argv[1:] if text not in overrides)]
    check_overrides(sys.argv[1:])


def finish_sweep() -> None:
    """Run the jobs of a sweep, if there is one; ends the process with the sweep's exit code."""
    for sweep in _sweeps:
        for overrides in sweep.extremes():
            _check_extreme(overrides)
        with held(sweep.folder, doing="runs a sweep in", key="hydra.sweep.dir"):
            code = sweep.finish()
        sys.exit(code)


def _check_extreme(overrides: list[str]) -> None:
    """Raise InputError if a search may come to ``overrides``, of which the last is a value of its own, in vain."""
    from segkit.config.compose import compose

    options = passed_on()
    dirs = [text.removeprefix("--config-dir=") for text in options if text.startswith("--")]
    places = [text for text in options if not text.startswith("--")]
    try:
        with sentences():
            check_job(compose([*places, *overrides], config_dirs=dirs))
    except InputError as error:
        raise InputError(f"the search may come to {overrides[-1]}: {error}; narrow sweep.space") from None


def run(argv: Sequence[str]) -> None:
    """The verb ``train``."""
    sys.argv = ["segkit train", *argv]
    check_command_line()
    hydra_command()()
    finish_sweep()


def main() -> None:
    """Entry point of ``train.py``; ends the process with 0, an exception's ``exit_code``, or 1 for a defect."""
    let_waiting_threads_sleep()
    keep_freed()
    need_no_reader()
    with tidied_up_when_ended():
        if ranks.has_agent() or CHILD in os.environ:
            die_with_parent(signal.SIGTERM)  # of torchrun, or of the sweep: its state is saved, and a restart goes on
        guarded(check_command_line)
        guarded(hydra_command())
        guarded(finish_sweep)


if __name__ == "__main__":
    main()
