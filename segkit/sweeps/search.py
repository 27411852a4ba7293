"""A search for the best values of some keys: ``python train.py -m sweep=search``.

optuna proposes the values of a trial (a tree-structured Parzen estimator), and a job of
:class:`segkit.sweeps.jobs.LocalSweep` trains with them. Its score at the last checkpoint goes back to optuna, and so
do those of the evaluations before, at which a poor trial is stopped. The study lies in the sweep's folder: the same
command with the same ``hydra.sweep.dir`` goes on with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from segkit.config.compose import quoted
from segkit.config.schema import Config, plain
from segkit.config.targets import fits
from segkit.errors import InputError, did_you_mean, first_line
from segkit.progress import show
from segkit.runtime import derive_seed
from segkit.sweeps.jobs import Job, LocalSweep

STUDY = "study.journal"
FIRST = b'{"op_code":0,'
"""How the first line of a study begins."""
SPEC = ("low", "high", "log", "choices")
NO_WORDS = ("true", "false", "null", "nan", "inf")
"""What Hydra reads as something else than a word."""
FORMS = "{low: 1, high: 10}, {low: 1, high: 10, log: true} or {choices: [1, 2]}"


def import_optuna() -> Any:
    """The module optuna; InputError where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise InputError("a search needs optuna: pip install 'segkit[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def leaves(space: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The nested ``sweep.space`` by dotted keys of the configuration."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in space.items():
        key = f"{prefix}{name}"
        if not isinstance(value, dict):
            raise InputError(f"sweep.space.{key} is {value!r}, but must be one of {FORMS}: set sweep.space.{key}=...")
        found |= {key: value} if set(value) & set(SPEC) else leaves(value, f"{key}.")
    return found


def current_value(config: dict[str, Any], key: str) -> Any:
    """The value of dotted ``key`` in the configuration of a run; InputError if it has no such key."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            hint = did_you_mean(name, value if isinstance(value, dict) else ())
            raise InputError(f"sweep.space.{key} names no key of this configuration: {hint}`--cfg job` shows all keys")
        value = value[name]
    if isinstance(value, dict):
        raise InputError(f"sweep.space.{key} names a group of keys, but must name one: {', '.join(value)}")
    return value


def distribution(key: str, spec: dict[str, Any], current: Any) -> Any:
    """The optuna distribution of one key; whole numbers if ``current``, low and high are whole."""
    optuna = import_optuna()
    unknown = [name for name in spec if name not in SPEC]
    if unknown:
        raise InputError(
            f"sweep.space.{key} has {unknown[0]!r}, but is one of {FORMS}: remove sweep.space.{key}.{unknown[0]}"
        )
    if "choices" in spec:
        choices = spec["choices"]
        if (
            len(spec) > 1
            or not isinstance(choices, list)
            or not choices
            or any(isinstance(c, list | dict) for c in choices)
        ):
            raise InputError(
                f"sweep.space.{key} is {spec}, but choices are a list of plain values and stand alone: write "
                f"'~sweep.space.{key}' '+sweep.space.{key}={{choices:[1,2]}}'"
            )
        return optuna.distributions.CategoricalDistribution(choices)
    low: Any = spec.get("low")
    high: Any = spec.get("high")
    log = spec.get("log", False)
    if not all(fits(value, float) and math.isfinite(value) for value in (low, high)) or not low < high:
        raise InputError(
            f"sweep.space.{key} has low={low} and high={high}, but needs numbers with low < high: set "
            f"sweep.space.{key}.low=..."
        )
    if not isinstance(log, bool):
        raise InputError(f"sweep.space.{key}.log is {log!r}, but must be true or false: set sweep.space.{key}.log=true")
    if log and low <= 0:
        raise InputError(
            f"sweep.space.{key} has low={low}, but log: true needs a positive one: set sweep.space.{key}.low=..."
        )
    if all(isinstance(value, int) for value in (current, low, high)):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


def is_of_sweep(override: str) -> bool:
    """True for an override of the group or the keys ``sweep``, which the jobs of a search must not have."""
    return override.lstrip("+~").split("=")[0].split("@")[0].split(".")[0] == "sweep"


class Search(LocalSweep):
    """The trials of one search; a job's number is that of its trial."""

    def __init__(self, folder: Path, *, config: Config, overrides: Sequence[str], options: Sequence[str] = ()) -> None:
        super().__init__(folder, jobs=config.sweep.jobs, workers=config.workers, options=options)
        self.budget, self.seed, self.split = config.sweep, config.seed, config.dataset.val_split
        self.overrides = [item for item in overrides if not is_of_sweep(item)]
        self.last_phase = list(config.schedule)[-1]
        specs = leaves(config.sweep.space)
        if not specs:
            raise InputError(
                "sweep.space is empty, but a search needs a key to vary: +sweep.space.loss.tau={low:1,high:100}"
            )
        if self.budget.trials is None and self.budget.hours is None:
            raise InputError("sweep.trials and sweep.hours are null, but a search needs an end: set sweep.trials=20")
        self.space = {key: distribution(key, spec, current_value(plain(config), key)) for key, spec in specs.items()}
        self._asked = {"overrides": self.overrides, "space": specs}
        self.study = self._open(self._asked)
        self._trials: dict[int, Any] = {}
        self._steps: dict[int, set[int]] = {}
        self._stopped: set[int] = set()
        self._looked = 0.0
        self._end = None if self.budget.hours is None else time.monotonic() + 3600 * self.budget.hours

    def _open(self, mine: dict[str, Any]) -> Any:
        """The study in the folder, which must be of the command ``mine``, or a new one."""
        optuna = import_optuna()
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / STUDY).exists() and not (self.folder / STUDY).is_file():  # to open a pipe would wait for ever
            raise InputError(f"{self.folder / STUDY} is no file: remove it, or set another hydra.sweep.dir")
        lock = optuna.storages.journal.JournalFileSymlinkLock(str(self.folder / STUDY))
        backend = optuna.storages.journal.JournalFileBackend(str(self.folder / STUDY), lock_obj=lock)
        cut_torn_line(self.folder / STUDY, lock)
        pruner: Any = optuna.pruners.NopPruner()
        if self.budget.prune_after is not None:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=self.budget.prune_after)
        try:
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name="search",
                direction="maximize",
                pruner=pruner,
                load_if_exists=True,
            )
            theirs = dict(study.user_attrs.get("command", mine))
            self._done = {trial.number: job_of(trial) for trial in study.get_trials() if trial.state.is_finished()}
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise InputError(
                f"{self.folder / STUDY} cannot be read as a search ({first_line(error)}): copy it again, or set "
                "another hydra.sweep.dir"
            ) from None
        if theirs != mine:
            different = next(name for name in mine if mine[name] != theirs.get(name))
            raise InputError(
                f"{self.folder} holds a search with other {different} ({theirs[different]} there, {mine[different]} "
                "now): give the same ones, or another hydra.sweep.dir"
            )
        return study

    def extremes(self) -> Iterator[list[str]]:
        """The configuration with the least and the greatest value of each key, and with each of its choices."""
        for key, found in self.space.items():
            for value in found.choices if hasattr(found, "choices") else (found.low, found.high):
                yield [*self.overrides, written((key, value))]

    def _run(self) -> None:
        """Start all trials that are still to be run."""
        self.share(self.budget.trials)
        self.study.set_user_attr("command", self._asked)  # not before: a search that is refused leaves its folder free
        optuna = import_optuna()
        unfinished = []
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state.is_finished():
                self.jobs.append(self._done[frozen.number])
            else:  # its process ended, or that of the search; its run goes on in its folder
                self.jobs.append(self._job(frozen.number, frozen.params))
                # the constructor is the one way back to a trial that was asked for by another process
                unfinished.append(optuna.trial.Trial(self.study, frozen._trial_id))
        self._note()
        for trial in unfinished:
            self._wait_for_slot()
            self._launch(trial)
        while True:
            self._wait_for_slot()
            if self._is_spent():
                break
            self._launch(self._ask())

    def finish(self) -> int:
        """Run all trials that are still to be run, show them and the best; returns the exit code."""
        code = super().finish()
        if not self._stopping:
            self._show_best()
        return code

    def _is_spent(self) -> bool:
        if self._end is not None and time.monotonic() >= self._end:
            return True
        return self.budget.trials is not None and len(self.jobs) >= self.budget.trials

    def _ask(self) -> Any:
        """The next trial: a function of the seed, its number and the trials before, in however many starts."""
        seed = derive_seed(self.seed, "search", len(self.jobs)) % 2**32
        sampler = import_optuna().samplers.TPESampler(seed=seed, constant_liar=self.limit > 1)
        self.study.sampler = sampler
        return self.study.ask()

    def _launch(self, trial: Any) -> None:
        values = {key: suggest(trial, key, found) for key, found in self.space.items()}
        self._trials[trial.number] = trial
        self._steps[trial.number] = set(self.study.trials[trial.number].intermediate_values)
        job = self._job(trial.number, values)
        self.jobs[job.number : job.number + 1] = [job]  # a new one, or that of an earlier start
        self._start(job)

    def _job(self, number: int, values: dict[str, Any]) -> Job:
        return Job(number, [*self.overrides, *map(written, values.items())], str(self.folder / str(number)))

    # -- while jobs run ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Tell optuna of new evaluations, and stop a job that it would not finish."""
        if time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        for number, (process, _, _) in self._running.items():
            if self._report(number) and number not in self._stopped and self._trials[number].should_prune():
                self._stopped.add(number)
                process.terminate()  # it saves its state

    def _report(self, number: int) -> bool:
        """Report the evaluations of the last phase that are new; True if there were any."""
        new = [item for item in self._evaluations(number) if item[0] not in self._steps[number]]
        for step, score in new:
            self._trials[number].report(score, step)
            self._steps[number].add(step)
        return bool(new)

    def _evaluations(self, number: int) -> list[tuple[int, float]]:
        path = self.folder / str(number) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        records = [json.loads(line) for line in lines if '"split": "val"' in line and line.endswith("\n")]
        return [
            (record["step"], record["mean_iou"])
            for record in records
            if record["phase"] == self.last_phase and record["mean_iou"] is not None
        ]

    def _judge(self, job: Job, code: int, said: str) -> None:
        """Note how a job ended, and tell optuna; an interrupted one stays open there."""
        super()._judge(job, code, said)
        states = import_optuna().trial.TrialState
        self._report(job.number)
        trial = self._trials.pop(job.number)
        if job.state == "finished" and job.mean_iou is None:
            job.state, job.error = "failed", "no class could be scored"
        if job.state != "finished" and job.number in self._stopped:
            job.state, job.error, job.mean_iou = "pruned", None, self._evaluations(job.number)[-1][1]
        if job.state == "interrupted":
            return
        trial.set_user_attr("job", asdict(job))
        if job.state == "finished":
            self.study.tell(trial, job.mean_iou)
        else:
            self.study.tell(trial, state=states.PRUNED if job.state == "pruned" else states.FAIL)

    def _label(self, job: Job) -> str:
        return ", ".join(job.overrides[len(self.overrides) :])

    def _show_best(self) -> None:
        finished = [job for job in self.jobs if job.state == "finished"]
        if not finished:
            return
        best = max(finished, key=lambda job: (job.mean_iou, -job.number))
        show(f"best of {len(finished)} finished trials, by the mean IoU on split {self.split}: {best.mean_iou:.4f}")
        show(f"  python train.py {shlex.join([*self.options, *best.overrides])}")
        show(f"that score was chosen on split {self.split} and is too good: report it on images that no trial saw")


def cut_torn_line(path: Path, lock: Any) -> None:
    """Cut off the last line of a study if a kill or a full disk left a part of it: optuna would write on behind it."""
    lock.acquire()
    try:
        content = path.read_bytes() if path.is_file() else b""
        begun = b"\n" in content or FIRST.startswith(content[: len(FIRST)])  # else another program's
        if content and begun and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def job_of(trial: Any) -> Job:
    """The job of a trial that has ended; LookupError or TypeError if another program wrote the study."""
    job = Job(**trial.user_attrs["job"])
    known = all(fits(getattr(job, name), kind) for name, kind in get_type_hints(Job).items())
    if not known or job.number != trial.number:
        raise TypeError(f"trial {trial.number} is no job of a search")
    return job


def suggest(trial: Any, key: str, found: Any) -> Any:
    """The value of ``key`` in ``trial``: the one that it has, or a new one; four digits of a float."""
    distributions = import_optuna().distributions
    if isinstance(found, distributions.CategoricalDistribution):
        return trial.suggest_categorical(key, found.choices)
    if isinstance(found, distributions.IntDistribution):
        return trial.suggest_int(key, found.low, found.high, log=found.log)
    short = float(f"{trial.suggest_float(key, found.low, found.high, log=found.log):.4g}")
    return min(max(short, found.low), found.high)


def written(item: tuple[str, Any]) -> str:
    """``key=value`` as Hydra reads it."""
    key, value = item
    if isinstance(value, str):
        plain_word = re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII) and value.lower() not in NO_WORDS
        return f"{key}={value}" if plain_word else f"{key}={quoted(value)}"
    return f"{key}={json.dumps(value)}"
