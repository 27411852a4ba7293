"""The run folder: what it holds, and whether a run may go on in it.

    RUN/config.yaml provenance.json files.json.gz metrics.jsonl           of the whole run
    RUN/<phase>/    checkpoints/ metrics.jsonl timing.jsonl events.* label_counts.json per_image.npz results.json
    RUN/checkpoints label_counts.json per_image.npz results.json     relative links to the last phase's
    RUN/running.json                                                 while a process trains in it

A phase is finished when its results.json is there: that file is written last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from segkit.config.schema import Config, plain
from segkit.errors import InputError
from segkit.files import held, read_config_text, read_json, write_atomically, write_json
from segkit.report.runs import check_results
from segkit.run.changes import CONFIG_CURE, check_changes, check_files, write_files
from segkit.run.splits import Splits
from segkit.training import checkpoint, distributed

LINKED = (
    "checkpoints",
    "label_counts.json",
    "margins.json",
    "per_image.npz",
    "pictures",
    "pictures.png",
    "results.json",
)


class RunFolder:
    """The files of one run, which its main process writes."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config

    @property
    def metrics(self) -> Path:
        """metrics.jsonl of all phases."""
        return self.path / "metrics.jsonl"

    def phase(self, name: str) -> Path:
        """The folder of one phase."""
        return self.path / name

    def is_finished(self, name: str) -> bool:
        """True once phase ``name`` has its results."""
        return (self.phase(name) / "results.json").is_file()

    def goes_on(self, name: str) -> bool:
        """True for a phase that needs no weights to start from: it has its own."""
        own = (self.phase(name) / "checkpoints" / file for file in (checkpoint.LAST, checkpoint.PREVIOUS))
        return self.is_finished(name) or any(path.is_file() for path in own)

    def has_begun(self) -> bool:
        """True once a phase, of whatever schedule, has a checkpoint or results: before that nothing would be lost."""
        return any(any(self.path.glob(pattern)) for pattern in ("*/results.json", "*/checkpoints/*.pt"))

    def begun_config(self) -> Path | None:
        """The config.yaml of a run that goes on; None for one that begins."""
        saved = self.path / "config.yaml"
        return saved if self.has_begun() and saved.is_file() else None

    def results(self, name: str) -> dict[str, Any]:
        """The results of a finished phase."""
        path = self.phase(name) / "results.json"
        cure = "delete it, and the same command evaluates the last checkpoint of the phase again"
        results = check_results(read_json(path, cure=cure), path, cure=cure)
        if type(results.get("step")) is not int:
            raise InputError(f"{path} is not what a phase writes at its end: {cure}")
        return results

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder; InputError, with host and process, if one trains in it.

        The operating system takes the lock back from a process that died. A folder that is left empty is removed.
        """
        with contextlib.ExitStack() as stack:
            distributed.on_main(lambda: stack.enter_context(held(self.path, doing="trains in", key="hydra.run.dir")))
            yield

    def check(self, splits: dict[str, Splits]) -> dict[str, tuple[Any, Any]]:
        """The keys that changed since the run began; InputError if they may not, or if the data changed."""
        saved = self.begun_config()
        if saved is None:
            return {}
        if not self.config.resume:
            raise InputError(f"{self.path} holds a run already: set resume=true to go on, or another hydra.run.dir")
        changes = check_changes(self.path, read_config_text(saved, cure=CONFIG_CURE), self.config)
        check_files(self.path, splits, may_change=self.config.ignore_config_change)
        return changes

    def check_places(self, splits: dict[str, Splits]) -> None:
        """Raise InputError if something is in the way of a file that is written after hours only, or the run in that
        of the images of ``splits``."""
        files = ("config.yaml", "provenance.json")  # other programs write one of these, too
        path = self.path.resolve()
        above = path.parents
        outer = next((item for item in above if all((item / name).is_file() for name in files)), None)
        if outer and not self.has_begun():
            raise InputError(f"hydra.run.dir is {self.path}, within the run {outer}: name a folder outside of it")
        parts = [part for pair in splits.values() for part in (pair.train, pair.val)]
        images = {sample.image.parent: sample.image for part in parts for sample in part.samples}
        places = {path, *above, *(path / name for name in self.config.schedule)}
        around = [image for folder, image in images.items() if folder.resolve() in places]
        if (image := next(filter(os.path.isfile, around), None)) and not self.has_begun():
            raise InputError(
                f"hydra.run.dir is {self.path}, where its pictures would be taken for images of the data, as {image} "
                "is: name another folder"
            )
        names = ("results.json", "per_image.npz", "label_counts.json", "margins.json", "metrics.jsonl")
        folders = [self.path, *map(self.phase, self.config.schedule)]
        wanted = [self.path / name for name in files]
        for place in (*wanted, *(folder / name for folder in folders for name in names)):
            if place.exists() and not place.is_file():
                raise InputError(
                    f"{place} is no file, and so in the way of one that the run writes: move it, or choose another "
                    "hydra.run.dir"
                )
        links = [self.path / name for name in LINKED]
        self._check_links()
        if found := [link.name for link in links if link.exists() and not link.is_symlink()]:
            raise InputError(
                f"{', '.join(found)} in {self.path} must be links to the last phase, and are none, as in a copy that "
                "follows links: move them elsewhere to go on, or choose another hydra.run.dir"
            )

    def _check_links(self) -> None:
        """Raise InputError if no link can be made, as the last phase needs."""
        probe = self.path / ".link"
        try:
            probe.unlink(missing_ok=True)
            os.symlink("checkpoints", probe)
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"no links can be made in {self.path} ({error.strerror}), but what the last phase writes is shown "
                "there by links: set hydra.run.dir to another file system"
            ) from None

    def check_space(self, model: nn.Module, *, has_average: bool) -> None:
        """Raise InputError if the disk has no room for the checkpoints of one phase of ``model``.

        A checkpoint holds the weights, up to two moments of each for the optimizer, and the moving average. Three of
        them are kept at a time; a run that goes on has two of them already.
        """
        if all(self.is_finished(name) for name in self.config.schedule):
            return
        weights = sum(value.nbytes for value in model.state_dict().values())
        needed = weights * (4 if has_average else 3) * (1 if self.has_begun() else 3)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InputError(
                f"{self.path} is on a disk with {free / 2**20:.0f} MiB left, but the checkpoints of a phase need up to "
                f"{needed / 2**20:.0f}: free some space, or set hydra.run.dir to a larger disk"
            )

    def start(self, provenance: dict[str, Any], splits: dict[str, Splits], changes: dict[str, tuple[Any, Any]]) -> None:
        """Record the configuration, and how the run was started; a later start is added to the first one."""
        from omegaconf import OmegaConf

        self.path.mkdir(parents=True, exist_ok=True)
        recorded = self.path / "provenance.json"
        begun = recorded.is_file() and self.has_begun()
        cure = "delete it to go on; the checkpoints stay, and only the record of earlier starts is lost"
        first = read_json(recorded, cure=cure) if begun else {**provenance, "starts": []}
        if not isinstance(first.get("starts", []), list):
            raise InputError(f"{recorded} has no list of starts: {cure}")
        start = {key: provenance[key] for key in ("started", "command", "git_commit", "versions", "device", "chosen")}
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(self.config))))
        if not begun or changes:
            write_files(self.path, splits)
        write_json(recorded, {**first, "starts": [*first.get("starts", []), {**start, "changes": changes}]})

    def check_whole(self) -> None:
        """Raise InputError if what :meth:`start` wrote is gone, so that no verb could open the run."""
        gone = [name for name in ("config.yaml", "provenance.json") if not (self.path / name).is_file()]
        if gone:
            raise InputError(
                f"{self.path} lost its {' and '.join(gone)} while it was trained in: run the same command again, which "
                "writes them from what is there"
            )

    def earlier_metrics(self, name: str) -> bytes:
        """metrics.jsonl of the phases before ``name``, one after the other."""
        before = list(self.config.schedule)[: list(self.config.schedule).index(name)]
        files = [self.phase(phase) / "metrics.jsonl" for phase in before]
        return b"".join(path.read_bytes() for path in files if path.is_file())

    def join_metrics(self, name: str) -> None:
        """Make metrics.jsonl of the run that of the phases up to the finished ``name``, unless it holds more than that.

        It does where later phases have begun, or where the file of the phase was cut off since.
        """
        if distributed.is_main():
            joined = self.earlier_metrics(name) + (self.phase(name) / "metrics.jsonl").read_bytes()
            if not (self.metrics.is_file() and self.metrics.read_bytes().startswith(joined)):
                write_atomically(self.metrics, joined)

    def extend(self, lengths: dict[str, int]) -> None:
        """Open every finished phase again that has more steps in ``lengths`` than it has trained.

        InputError if one has fewer, or if a phase after it has started from its weights: then none is opened.
        """
        longer, names = [], list(lengths)
        for at, (name, num_steps) in enumerate(lengths.items()):
            if not self.is_finished(name):
                continue
            trained = self.results(name)["step"]
            begun = [other for other in names[at + 1 :] if (self.phase(other) / "checkpoints").is_dir()]
            if num_steps > trained and begun:
                raise InputError(
                    f"phase {name} of {self.path} has trained its {trained} steps, and phase {begun[0]} has started "
                    f"from its weights: give schedule.{name} the length it had, or set another hydra.run.dir"
                )
            if num_steps < trained:
                raise InputError(
                    f"phase {name} of {self.path} has trained {trained} steps already, more than the {num_steps} it "
                    f"has now: give schedule.{name} at least that length, or set another hydra.run.dir"
                )
            if num_steps > trained:
                longer.append(name)
        for name in longer:
            (self.phase(name) / "results.json").unlink()

    def link_last_phase(self) -> None:
        """Make what the last phase has so far appear at the top."""
        if not distributed.is_main():
            return
        last = list(self.config.schedule)[-1]
        (self.path / last / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in LINKED:
            link, target = self.path / name, Path(last) / name
            if link.is_symlink() and link.readlink() != target:  # of a start with other phases that came to nothing
                link.unlink()
            if link.is_symlink() or not (self.path / target).exists():
                continue
            if link.exists():
                raise InputError(f"{link} is in the way of a link to {target}: choose another hydra.run.dir")
            os.symlink(target, link)
