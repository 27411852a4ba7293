"""Finished phases, kept under the hash of everything that determines them.

A sweep over the margins, or a comparison of losses, shares its cross-entropy phase: the first job trains it, the
others take it from here; parallel jobs wait at a file lock rather than train it twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from filelock import FileLock

from segkit.config.schema import FREE_KEYS, Config, plain
from segkit.data.statistics import make_writable
from segkit.files import digest_of

CODE = (
    "data",
    "evaluation",
    "losses",
    "models",
    "synthetic",
    "training",
    "config/targets.py",
    "run/build.py",
    "run/batches.py",
    "run/phase.py",
    "run/plan.py",
    "run/start.py",
    "run/validation.py",
    "bilinear.py",
    "margins.py",
    "runtime.py",
)
"""Folders and files of segkit that the weights and scores of a phase depend on."""
MARK = "phase_key"
"""File in the folder of a phase: the key under which its training began."""
POLL = 1.0
"""Seconds between two looks at a lock that another run holds."""


def code_version() -> str:
    """A hash of the source files that a trained weight depends on."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in CODE:
        for path in sorted((package / name).rglob("*.py")) or [package / name]:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def phase_key(config: Config, name: str, *, fingerprints: dict[str, dict[str, str]], machine: dict[str, Any]) -> str:
    """The hash of phase ``name``: its own configuration and its ancestors', data, initial weights, code and machine.

    ``fingerprints`` maps each phase to those of its splits; ``machine`` holds what else changes the bits (versions,
    device, number of ranks and threads). Keys that change nothing in this phase are left out: those of later phases,
    where the data lie, a data set's recipe (its values stand in the keys that take them), the number of workers.
    """
    names = list(config.schedule)
    chain = []
    for phase in names[: names.index(name) + 1]:
        dataset = plain(config.phase_dataset(phase))
        del dataset["root"], dataset["recipe"]
        settings = plain(config.schedule[phase])
        del settings["dataset"], settings["loss"]
        loss = plain(config.phase_loss(phase))
        chain.append([phase, settings, loss, dataset, fingerprints[phase]])
    elsewhere = {"schedule", "loss", "dataset", "auto_batch", *FREE_KEYS}
    rest = {key: value for key, value in plain(config).items() if key not in elsewhere}
    text = json.dumps([chain, rest, _initial_weights(config), code_version(), machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _initial_weights(config: Config) -> list[str]:
    """Hashes of the files that the model starts from: the same path may hold other weights tomorrow."""
    named = [config.init_from, config.model.get("weights"), config.model.get("encoder_weights")]
    paths = [Path(value) for value in named if isinstance(value, str)]
    paths = [path / "checkpoints" / "last.pt" if path.is_dir() else path for path in paths]
    return [digest_of(path) for path in paths if path.is_file()]


class PhaseCache:
    """The cache below ``folder`` (``cache_dir``)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "phases"

    def check(self) -> None:
        """Raise InputError if nothing can be written here."""
        make_writable(self.folder)

    def lock(self, key: str) -> FileLock:
        """The lock of ``key``, not held yet. The operating system takes it back from a process that dies."""
        return FileLock(str(self.folder / f"{key}.lock"))

    def acquire(self, lock: FileLock, *, seconds: float = POLL) -> bool:
        """Try for ``seconds`` to hold ``lock``; True if it is held now."""
        try:
            lock.acquire(timeout=seconds)
        except TimeoutError:
            return False
        return True

    def fetch(self, key: str, target: Path) -> bool:
        """Copy the phase stored under ``key`` to ``target``; False if there is none, or a file of it is damaged."""
        stored = self.folder / key
        if not (stored / "manifest.json").exists():
            return False
        damaged = _damaged(stored)
        if damaged is not None:
            warnings.warn(f"{stored} is damaged ({damaged}): the phase is trained again", stacklevel=2)
            shutil.rmtree(stored)
            return False
        temporary = target.with_name(target.name + ".incoming")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(stored / "files", temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        return True

    def mark(self, key: str, folder: Path) -> None:
        """Note in ``folder`` that the training of the phase begins under ``key``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(key, encoding="utf-8")

    def store(self, key: str, source: Path) -> None:
        """Keep a copy of the finished phase in ``source`` under ``key``, if it is not there yet.

        A phase that began under another key (another configuration, other code) is not kept, nor are its failure
        bundles. A full disk is told and does no harm. The caller holds the lock.
        """
        mark = source / MARK
        if (self.folder / key / "manifest.json").is_file():
            return
        if not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace") != key:
            return
        temporary = self.folder / f"{key}.incoming"
        try:
            self._copy(source, temporary)
            shutil.rmtree(self.folder / key, ignore_errors=True)
            temporary.rename(self.folder / key)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            warnings.warn(f"the phase could not be kept in {self.folder} ({error})", stacklevel=2)

    def _copy(self, source: Path, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary / "files", ignore=shutil.ignore_patterns("failure-*"))
        names = sorted(path for path in (temporary / "files").rglob("*") if path.is_file())
        manifest = {path.relative_to(temporary / "files").as_posix(): digest_of(path) for path in names}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def offer(self, key: str, source: Path) -> None:
        """:meth:`store`, unless another process holds the lock."""
        lock = self.lock(key)
        if self.acquire(lock, seconds=0):
            try:
                self.store(key, source)
            finally:
                lock.release()


def _damaged(stored: Path) -> str | None:
    """The first file of a stored phase that is missing or not what the manifest says; None if all are whole."""
    try:
        manifest = json.loads((stored / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "manifest.json"
    if not isinstance(manifest, dict) or not manifest:
        return "manifest.json"
    for name, digest in manifest.items():
        path = stored / "files" / name
        if not path.is_file() or digest_of(path) != digest:
            return name
    return None
