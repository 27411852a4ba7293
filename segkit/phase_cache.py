"""Finished phases, kept under the hash of everything that determines them.

A sweep over the margins, or a comparison of losses, shares its cross-entropy phase: the first job trains it, the
others take it from here; parallel jobs wait at a file lock rather than train it twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from segkit.config import Config, plain
from segkit.run_folder import FREE_KEYS

CODE_FOLDERS = ("data", "evaluation", "losses", "models", "training")


def default_cache_dir() -> Path:
    """``$SEGKIT_CACHE``, or ``~/.cache/segkit``."""
    base = os.environ.get("SEGKIT_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "segkit"


def code_version() -> str:
    """A hash of the source files that a trained weight depends on."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def phase_key(config: Config, name: str, *, fingerprints: dict[str, str], machine: dict[str, Any]) -> str:
    """The hash of phase ``name``: its own configuration and its ancestors', data, code and machine.

    ``fingerprints`` maps each phase to that of its data; ``machine`` holds what else changes the bits (versions,
    device, number of ranks and threads).
    """
    names = list(config.schedule)
    chain = []
    for phase in names[: names.index(name) + 1]:
        dataset = plain(config.phase_dataset(phase))
        dataset.pop("root")  # the fingerprint tells the data apart, wherever they lie
        chain.append(
            {
                "name": phase,
                "phase": {key: value for key, value in plain(config.schedule[phase]).items() if key != "dataset"},
                "loss": plain(config.phase_loss(phase)),
                "dataset": dataset,
                "data": fingerprints[phase],
            }
        )
    own = {"schedule", "loss", "dataset", *FREE_KEYS}
    rest = {key: value for key, value in plain(config).items() if key not in own}
    text = json.dumps([chain, rest, code_version(), machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class PhaseCache:
    """The cache below ``folder`` (``cache_dir``)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "phases"

    @contextmanager
    def locked(self, key: str, *, on_wait: Any = None) -> Iterator[None]:
        """Hold the lock of ``key``; ``on_wait()`` is called first if another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.folder / f"{key}.lock"))
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            if on_wait is not None:
                on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def fetch(self, key: str, target: Path) -> bool:
        """Copy the phase stored under ``key`` to ``target``; False if there is none, or a file of it is damaged."""
        stored = self.folder / key
        if not (stored / "manifest.json").is_file():
            return False
        manifest = json.loads((stored / "manifest.json").read_text(encoding="utf-8"))
        files = stored / "files"
        for name, digest in manifest.items():
            path = files / name
            if not path.is_file() or _digest(path) != digest:
                shutil.rmtree(stored)
                return False
        temporary = target.with_name(target.name + ".incoming")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(files, temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        return True

    def store(self, key: str, source: Path) -> None:
        """Keep a copy of the finished phase in ``source`` under ``key``."""
        stored = self.folder / key
        temporary = self.folder / f"{key}.incoming"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary / "files")
        names = sorted(path for path in (temporary / "files").rglob("*") if path.is_file())
        manifest = {path.relative_to(temporary / "files").as_posix(): _digest(path) for path in names}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(stored, ignore_errors=True)
        temporary.rename(stored)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
