"""The run folder: what it holds, and whether a run may go on in it.

    RUN/config.yaml provenance.json metrics.jsonl           of the whole run
    RUN/<phase>/    checkpoints/ metrics.jsonl timing.jsonl tensorboard/ label_counts.json per_image.npz results.json
    RUN/checkpoints label_counts.json per_image.npz results.json     relative links to the last phase's

A phase is finished when its results.json is there: that file is written last.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from segkit.config.schema import FREE_KEYS, Config, plain
from segkit.errors import InputError
from segkit.files import read_config_text, read_json, write_atomically, write_json

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
    """The files of one run; ``writes`` is False for the ranks that only compute."""

    def __init__(self, path: Path, config: Config, *, writes: bool = True) -> None:
        self.path, self.config, self.writes = path, config, writes

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

    def results(self, name: str) -> dict[str, Any]:
        """The results of a finished phase."""
        return read_json(self.phase(name) / "results.json")

    def check(self) -> None:
        """Raise InputError if the folder holds a run of another configuration."""
        saved = self.path / "config.yaml"
        if saved.is_file():
            self._compare(saved, plain(self.config))

    def start(self, provenance: dict[str, Any]) -> None:
        """Create the folder, and record the configuration and how the run was started."""
        from omegaconf import OmegaConf

        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(self.config))))
        recorded = self.path / "provenance.json"
        starts = read_json(recorded).get("starts", []) if recorded.is_file() else []
        write_json(recorded, {**provenance, "starts": [*starts, provenance["started"]]})

    def _compare(self, saved: Path, mine: dict[str, Any]) -> None:
        if not self.config.resume:
            raise InputError(f"{self.path} holds a run already: set resume=true to go on, or another hydra.run.dir")
        theirs = read_config_text(saved)
        different = [key for key in differing_keys(theirs, mine) if key.split(".")[0] not in FREE_KEYS]
        if different and not self.config.ignore_config_change:
            shown = ", ".join(
                f"{key} ({_value(theirs, key)!r} there, {_value(mine, key)!r} now)" for key in different[:5]
            )
            more = f" and {len(different) - 5} more" if len(different) > 5 else ""
            raise InputError(
                f"{self.path} holds a run of another configuration; these keys differ: {shown}{more}. Give the same "
                "values, or another hydra.run.dir, or ignore_config_change=true to go on all the same"
            )

    def earlier_metrics(self, name: str) -> bytes:
        """metrics.jsonl of the phases before ``name``, one after the other."""
        before = list(self.config.schedule)[: list(self.config.schedule).index(name)]
        files = [self.phase(phase) / "metrics.jsonl" for phase in before]
        return b"".join(path.read_bytes() for path in files if path.is_file())

    def join_metrics(self, name: str) -> None:
        """Make metrics.jsonl of the run that of the phases up to the finished ``name``."""
        if self.writes:
            own = self.phase(name) / "metrics.jsonl"
            write_atomically(self.metrics, self.earlier_metrics(name) + own.read_bytes())

    def link_last_phase(self) -> None:
        """Make what the last phase has so far appear at the top."""
        if not self.writes:
            return
        last = list(self.config.schedule)[-1]
        (self.path / last / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in LINKED:
            link, target = self.path / name, Path(last) / name
            if link.is_symlink() or not (self.path / target).exists():
                continue
            if link.exists():
                raise InputError(f"{link} is in the way of a link to {target}: choose another hydra.run.dir")
            os.symlink(target, link)


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return [
            key
            for name in names
            for key in differing_keys(one.get(name), other.get(name), f"{prefix}.{name}" if prefix else str(name))
        ]
    return [] if one == other else [prefix]


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
