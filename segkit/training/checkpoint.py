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
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from segkit.errors import InputError, check_archive, is_plain
from segkit.files import digest_of, remove_if_possible, write_atomically

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
        remove_if_possible(temporary)
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


def _checksums(folder: Path) -> dict[str, str]:
    """What checksums.json lists; empty if it is missing or damaged."""
    path = folder / CHECKSUMS
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str) and value}


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Make ``state`` the ``last.pt`` of ``folder`` and keep the one before as ``previous.pt``."""
    _write_listed(folder, INCOMING, state, name=LAST, before=PREVIOUS)
    _take_incoming(folder)


def _write_listed(folder: Path, incoming: str, state: dict[str, Any], *, name: str, before: str) -> None:
    """Write ``state`` to ``incoming``; list it as the next ``name``, and what has that name still as ``before``."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = write(folder / incoming, state)
    known = _checksums(folder)
    write_atomically(folder / CHECKSUMS, json.dumps({**known, name: digest, before: known.get(name, "")}))


def _take_incoming(folder: Path) -> None:
    """Rename ``last.pt`` to ``previous.pt`` and ``incoming.pt``, whose checksum is listed, to ``last.pt``."""
    if (folder / LAST).exists():
        try:  # a second name of the file: whoever reads last.pt meanwhile finds it at every moment
            (folder / PREVIOUS).unlink(missing_ok=True)
            os.link((folder / LAST).resolve(), folder / PREVIOUS)
        except OSError:  # a file system without such links
            (folder / LAST).replace(folder / PREVIOUS)
    (folder / INCOMING).replace(folder / LAST)
    _sync_folder(folder)


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Make ``state`` the ``best.pt`` of ``folder``."""
    _write_listed(folder, INCOMING_BEST, state, name=BEST, before=BEFORE_BEST)
    (folder / INCOMING_BEST).replace(folder / BEST)
    _sync_folder(folder)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, on the CPU, and its SHA-256 as ``digest``; tensors and plain values only.

    It is read as it is at one moment, though training may replace it.
    InputError if there is none, if its SHA-256 is not one that its folder's checksums.json lists (in a folder without
    that file the checksums within the archive, CRC-32, decide), if it would fill the memory, or if its content is no
    checkpoint of segkit.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: name a run folder that has one")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        check_digest(path, digest)
        file.seek(0)
        state = read_archive(path, file)
    if not isinstance(state, dict) or not isinstance(state.get("model"), Mapping):
        raise InputError(f"{path} has no entry 'model' with weights, so it is not a checkpoint of segkit: {_ANOTHER}")
    if not isinstance(state.get("ema"), Mapping | None):
        raise InputError(f"{path} has an entry 'ema' that holds no weights, so it is damaged: {_ANOTHER}")
    return {**state, "digest": digest}


def read_archive(path: Path, file: IO[bytes] | None = None) -> Any:
    """What torch.save wrote into ``path``, on the CPU; tensors and plain values only. InputError for anything else.

    Where no checksums.json is beside it, flipped bits are found by the checksums within the archive (CRC-32).
    ``file``: the open file, where it must be this one.
    """
    try:
        check_archive(path, cure=f"it is not one of segkit; {_ANOTHER}", stored=True)
        state = torch.load(file or path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch's own text advises to load whatever the file holds, which nobody should
        raise InputError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is torn, or not one of segkit; "
            f"{_ANOTHER}"
        ) from None
    if not (path.parent / CHECKSUMS).exists() and not _is_whole(path):
        raise InputError(f"{path} is damaged, its content does not match the checksums within it: copy it again")
    return state


_ANOTHER = "copy it again, or name another file"


def check_digest(path: Path, digest: str) -> None:
    """Raise InputError if checksums.json is beside ``path`` and does not list ``digest``, that of its content.

    Where training has replaced the file since it was read, its digest is still listed, as that of the one before.
    """
    listing = path.parent / CHECKSUMS
    if not listing.exists():
        return
    known = _checksums(path.parent).values()
    if not known:
        raise InputError(
            f"{listing} is damaged, it lists no file, so that {path.name} cannot be compared with it: copy it again, "
            "or delete it to load the checkpoint all the same (training goes on from last.pt without it)"
        )
    if digest not in known:
        raise InputError(
            f"{path} is damaged, its content does not match {CHECKSUMS} beside it: copy it again, or name another "
            "checkpoint of the run (--checkpoint best; the command that trained it goes on from previous.pt once "
            "this file is deleted)"
        )


def find_last(folder: Path) -> Path | None:
    """The newest whole checkpoint of ``folder``, or None if it never had one.

    A torn ``last.pt`` is passed over for ``previous.pt``, with a warning. InputError if both are torn. Where
    checksums.json is lost, the checksums within the archives (CRC-32) decide, with a warning, and it is written anew.
    A write that was cut short is tidied up: with several processes, only one may call this.
    """
    known = set(_checksums(folder).values())
    incoming = folder / INCOMING
    if incoming.exists() and digest_of(incoming) in known:
        _take_incoming(folder)  # the process died in save_last
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    if candidates and not known:
        known = _write_checksums_anew(folder)
    for path in candidates:
        if digest_of(path) in known:
            if path.name == PREVIOUS and (folder / LAST).exists():
                warnings.warn(f"{folder / LAST} is torn: going on from {path}, one interval earlier", stacklevel=2)
            return path
    if not candidates:
        return None
    names = ", ".join(path.name for path in candidates)
    best = folder / BEST
    if best.is_file() and (digest_of(best) in known or (not known and _is_whole(best))):
        raise InputError(
            f"no checkpoint in {folder} to go on from is whole ({names} do not match {CHECKSUMS}), but best.pt is: "
            f"start from its weights in another hydra.run.dir with init_from={best}"
        )
    raise InputError(
        f"no checkpoint in {folder} is whole ({names} do not match {CHECKSUMS}): copy them again from where they are "
        f"whole, or delete {folder} to start this phase again"
    )


def _write_checksums_anew(folder: Path) -> set[str]:
    """List the checkpoints of ``folder`` that are whole by the checksums within them; returns their SHA-256."""
    whole = {path.name: digest_of(path) for name in (LAST, PREVIOUS, BEST) if _is_whole(path := folder / name)}
    if whole:
        warnings.warn(
            f"{folder / CHECKSUMS} is lost or damaged: it is written anew for {', '.join(whole)}, which are whole by "
            "the checksums within them",
            stacklevel=3,
        )
        write_atomically(folder / CHECKSUMS, json.dumps(whole))
    return set(whole.values())


def _is_whole(path: Path) -> bool:
    """True for an archive of torch.save whose content has the checksums (CRC-32) that it states."""
    try:
        check_archive(path, cure="", stored=True)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return False


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


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Load ``state`` into the network of ``model``; warns of values that are not finite.

    InputError that says what differs if it is another model's, or if an entry is no tensor of the same kind.
    """
    model = network(model)
    check_weights(model, state, source=source)
    if broken := not_finite(state):
        warnings.warn(
            f"{source} has values that are not finite in {len(broken)} of {len(state)} entries, first {broken[0]}: "
            "what it predicts means nothing",
            stacklevel=2,
        )
    model.load_state_dict(state)


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of plain entries with values that are not finite."""
    floats = {name: value for name, value in state.items() if is_plain(value) and value.is_floating_point()}
    return [name for name, value in floats.items() if not value.isfinite().all()]


def check_weights(model: nn.Module, state: Mapping[str, Any], *, source: Path) -> None:
    """Raise InputError unless ``state`` has the entries of ``model`` (which may be on the device meta), and no others.

    Shapes must be equal; a number with a fraction must not stand for a whole number or the other way round.
    """
    own = network(model).state_dict()
    odd = [name for name, value in state.items() if name in own and not _is_like(value, own[name])]
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and name not in odd and state[name].shape != own[name].shape
    ]
    if odd:
        raise InputError(
            f"{source} holds no {str(own[odd[0]].dtype).removeprefix('torch.')} tensor under {odd[0]}, so it is "
            f"damaged or not one of segkit: {_ANOTHER}"
        )
    if missing or extra or shapes:
        first = (shapes or [f"{name} is missing" for name in missing] or [f"{name} is unknown" for name in extra])[0]
        raise InputError(
            f"{source} holds the weights of another model ({len(missing)} entries missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape; first: {first}): choose the model it was trained with, model=..., and "
            "the dataset.in_channels of its images"
        )


def _is_like(value: Any, own: torch.Tensor) -> bool:
    """True for a plain tensor, with or without a fraction as ``own``."""
    return is_plain(value) and value.is_floating_point() == own.is_floating_point()
