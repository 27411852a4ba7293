"""What the corpus is made of: a case, and functions that change the files of a run folder."""

from __future__ import annotations

import functools
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from segkit.commands.decision import checksum

MODEL, COMPARE, DECISION, REPLAY, HUB = "model", "compare", "decision", "replay", "hub"
CONFIG = "config.yaml"


class Case(NamedTuple):
    """``harm(run)`` changes the run folder ``run``."""

    name: str
    harm: Callable[[Path], None]
    readers: tuple[str, ...]
    message: str


class Code:
    """Acts when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/segkit-hostile-file",)


def setting(**changes: Any) -> Callable[[Path], None]:
    """Set dotted keys (with ``__`` for a point) in the saved configuration."""

    def harm(run: Path) -> None:
        content = yaml.safe_load((run / CONFIG).read_text())
        for key, value in changes.items():
            node, *path = content, *key.split("__")
            for name in path[:-1]:
                node = node[name]
            node[path[-1]] = value
        (run / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))

    return harm


def appended(text: str) -> Callable[[Path], None]:
    return lambda run: (run / CONFIG).write_text((run / CONFIG).read_text() + text)


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        path = (run / name).resolve()
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def folder_for(name: str) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        path = (run / name).resolve()
        path.unlink()
        path.mkdir()

    return harm


def pipe_for(name: str) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        path = (run / name).resolve()
        path.unlink()
        os.mkfifo(path)

    return harm


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@functools.cache
def bomb(name: str, size: int = 2**28) -> bytes:
    """A deflated archive with ``size`` bytes under ``name``, less than a hundredth of that."""
    content = io.BytesIO()
    archive = zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open(name, "w") as file:
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return content.getvalue()


def table(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Exchange the JSON file ``name`` for one that ``change`` has made of it."""

    def harm(run: Path) -> None:
        path = (run / name).resolve()
        content = json.loads(path.read_text())
        changed = change(content)
        changed = content if changed is None else changed
        if name == "decision.json":
            changed["sha256"] = checksum(changed)
        path.write_text(json.dumps(changed))

    return harm


URL = {"url": "http://example.org/x", "filename": "/tmp/segkit-hostile-file"}
TARGETS: dict[str, dict[str, Any]] = {
    "a download": {"_target_": "segmentation_models_pytorch.datasets.oxford_pet.urlretrieve", **URL},
    "an import": {"_target_": "segkit.evaluation.import_module", "name": "this"},
    "a written file": {"_target_": "segkit.files.write_atomically", "path": "/tmp/segkit-hostile-file", "content": "x"},
    "a training": {"_target_": "segkit.train.main"},
    "a verb": {"_target_": "segkit.commands.compare.write", "name": "/tmp/segkit-hostile-file", "text": "x"},
    "a command": {"_target_": "os.system", "command": "touch /tmp/segkit-hostile-file"},
    "an evaluation of text": {"_target_": "builtins.eval", "source": "1"},
    "builtins of a module": {"_target_": "segkit.losses.__builtins__"},
    "a dunder path": {"_target_": "segkit.models.COPLENet.__init__.__globals__"},
    "a class of a class": {"_target_": "segkit.models.COPLENet.__class__"},
    "a module behind a module": {"_target_": "torch.optim.adam.torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
    "an unpickler": {"_target_": "torch.load", "f": "/tmp/x"},
    "a network from a hub": {"_target_": "segmentation_models_pytorch.from_pretrained"},
    "an architecture with its weights": {"_target_": "segmentation_models_pytorch.Unet", "encoder_name": "resnet34"},
    "a loss as a model": {"_target_": "segkit.losses.DiceLoss"},
    "no text as a target": {"_target_": ["os", "system"]},
    "blanks in a target": {"_target_": " segkit.models.COPLENet"},
}
EVIL = {"_target_": "os.system", "command": "touch /tmp/segkit-hostile-file"}
NOT_PERMITTED = r"_target_ is .*, but must be one of"
OTHER = "holds the weights of another model"
NO_TENSOR = "tensor under"

DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = {
    "torn": '{"a": ', "empty": "", "a list": "[]", "a number": "1", "null": "null", "no text": b"\xff\xfe",
    "nested deeply": DEEP, "a number of too many digits": '{"a": ' + "9" * 10_000 + "}", "an object without keys": "{}",
}  # fmt: skip
