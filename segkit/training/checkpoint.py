"""Checkpoints that survive a crash at any moment.

A checkpoint is written to a temporary name, flushed to the disk and renamed; the one before is kept as
``previous.pt``. ``checksums.json`` lists the SHA-256 of all, and is renewed before the renames: whatever moment the
process dies at, ``last.pt`` or ``previous.pt`` is whole and its checksum is listed. Whatever is loaded from a folder
with ``checksums.json`` is compared with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.errors import InputError
from segkit.files import write_atomically

LAST, PREVIOUS, BEST, CHECKSUMS = "last.pt", "previous.pt", "best.pt", "checksums.json"
INCOMING, INCOMING_BEST, BEFORE_BEST = "incoming.pt", "incoming_best.pt", "best.pt before"


class _HashingFile:
    """A binary file that computes the SHA-256 of what is written to it in one pass.

    torch's writer reports a full disk as a wrong position in its archive; ``error`` keeps what really happened.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, state: dict[str, Any]) -> str:
    """Write ``state`` to ``path`` atomically; return its SHA-256 (hexadecimal)."""
    temporary = path.with_name(path.name + ".tmp")
    hashing = None
    try:
        with open(temporary, "wb") as file:
            hashing = _HashingFile(file)
            torch.save(state, hashing)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = (hashing and hashing.error) or error
        raise OSError(
            f"the checkpoint {path} could not be written ({reason}): free some space or choose another "
            "hydra.run.dir, then run the same command again to go on from the last one"
        ) from error
    _sync_folder(path.parent)
    return hashing.hash.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """SHA-256 of the file ``path``, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in content.items() if value} if isinstance(content, dict) else {}


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Make ``state`` the ``last.pt`` of ``folder`` and keep the one before as ``previous.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / INCOMING
    digest = write(incoming, state)
    known = _checksums(folder)
    write_atomically(folder / CHECKSUMS, json.dumps({**known, LAST: digest, PREVIOUS: known.get(LAST, "")}))
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    incoming.replace(folder / LAST)
    _sync_folder(folder)


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Make ``state`` the ``best.pt`` of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / INCOMING_BEST
    digest = write(incoming, state)
    known = _checksums(folder)
    write_atomically(folder / CHECKSUMS, json.dumps({**known, BEST: digest, BEFORE_BEST: known.get(BEST, "")}))
    incoming.replace(folder / BEST)
    _sync_folder(folder)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, on the CPU. Only tensors and plain values are accepted (``weights_only``).

    InputError if there is none, if its SHA-256 is not one that its folder's checksums.json lists (a folder without
    that file has nothing to compare with), or if its content is no checkpoint of segkit.
    """
    try:
        if (path.parent / CHECKSUMS).exists() and digest_of(path) not in _checksums(path.parent).values():
            raise InputError(
                f"{path} is damaged, its content does not match {CHECKSUMS} beside it: copy it again, or name another "
                "checkpoint of the run (--checkpoint best; the command that trained it goes on from previous.pt once "
                "this file is deleted)"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}: name a run folder that has one") from None
    except InputError:
        raise
    except Exception as error:  # torch's own text advises to load whatever the file holds, which nobody should
        raise InputError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is torn, or not one of segkit; name "
            "another file"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise InputError(f"{path} has no entry 'model', so it is not a checkpoint of segkit: name another file")
    return state


def find_last(folder: Path) -> Path | None:
    """The newest whole checkpoint of ``folder``, or None if it never had one.

    A torn ``last.pt`` is passed over for ``previous.pt``, with a warning. InputError if both are torn. A write that was
    cut short is tidied up: with several processes, only one may call this.
    """
    known = set(_checksums(folder).values())
    incoming = folder / INCOMING
    if incoming.exists() and not (folder / LAST).exists() and digest_of(incoming) in known:
        incoming.replace(folder / LAST)  # the process died between the two renames of save_last
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in candidates:
        if digest_of(path) in known:
            if path.name == PREVIOUS and (folder / LAST).exists():
                warnings.warn(f"{folder / LAST} is torn: going on from {path}, one interval earlier", stacklevel=2)
            return path
    if not candidates:
        return None
    raise InputError(
        f"no checkpoint in {folder} is whole ({', '.join(path.name for path in candidates)} do not match "
        f"{CHECKSUMS}): delete the folder to start again"
    )


def load_last(folder: Path) -> dict[str, Any] | None:
    """The content of :func:`find_last`."""
    path = find_last(folder)
    return None if path is None else load(path)


def network(model: nn.Module) -> nn.Module:
    """The network whose weights a checkpoint holds: ``model.net`` where ``model`` only normalises its input."""
    return getattr(model, "net", model)


def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that evaluation uses: the moving average where there is one."""
    return state.get("ema") or state["model"]


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], *, source: Path) -> None:
    """Load ``state`` into the network of ``model``; InputError that says what differs if it is another model's."""
    model = network(model)
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or extra or shapes:
        first = (shapes or [f"{name} is missing" for name in missing] or [f"{name} is unknown" for name in extra])[0]
        raise InputError(
            f"{source} holds the weights of another model ({len(missing)} entries missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape; first: {first}): choose the model it was trained with, model=..."
        )
    model.load_state_dict(state)
