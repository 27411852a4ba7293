"""Configurations and checkpoints of a stranger."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus_cases import (
    COMPARE,
    CONFIG,
    EVIL,
    MODEL,
    NO_TENSOR,
    NOT_PERMITTED,
    OTHER,
    TARGETS,
    Case,
    Code,
    appended,
    bomb,
    flip,
    folder_for,
    pipe_for,
    setting,
    written,
)


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Exchange the last checkpoint for one that ``change`` has made of it; nothing is left to compare it with."""

    def harm(run: Path) -> None:
        state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, run / "checkpoints" / "last.pt")
        (run / "checkpoints" / "checksums.json").unlink()

    return harm


def raw(content: bytes) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        (run / "checkpoints" / "last.pt").write_bytes(content)
        (run / "checkpoints" / "checksums.json").unlink()

    return harm


def in_weights(value: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    """Exchange the first entry of the weights."""

    def change(state: dict[str, Any]) -> None:
        name = next(iter(state["model"]))
        state["model"][name] = value(state["model"][name])

    return checkpoint(change)


def script(run: Path) -> None:
    path = run / "checkpoints" / "last.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    (run / "checkpoints" / "checksums.json").unlink()


def deflated(run: Path) -> None:
    """The run's own checkpoint with a thousand times its content."""
    path = run / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "extra": torch.zeros(2**26)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    (run / "checkpoints" / "checksums.json").unlink()


TORN = "cannot be read as a checkpoint"
WHICH = "so it is not a checkpoint of segkit"
CHECKPOINTS = [
    Case("checkpoint: pickled code", raw(pickle.dumps({"model": Code()})), (MODEL,), TORN),
    Case("checkpoint: code in an archive", checkpoint(lambda state: {"model": state["model"], "x": Code()}), (MODEL,),
         TORN),
    Case("checkpoint: a script", script, (MODEL,), TORN),
    Case("checkpoint: empty", raw(b""), (MODEL,), TORN),
    Case("checkpoint: text", raw(b"weights"), (MODEL,), TORN),
    Case("checkpoint: an archive of other things", raw(bomb("x", 2**20)), (MODEL,), TORN),
    Case("checkpoint: a bomb", raw(bomb("archive/data.pkl")), (MODEL,), "but says that it holds 268435456"),
    Case("checkpoint: deflated weights", deflated, (MODEL,), "but says that it holds"),
    Case("checkpoint: truncated", lambda run: raw((run / "checkpoints/last.pt").read_bytes()[:-1000])(run), (MODEL,),
         TORN),
    Case("checkpoint: a list", checkpoint(lambda state: [1, 2]), (MODEL,), WHICH),
    Case("checkpoint: a tensor", checkpoint(lambda state: torch.zeros(3)), (MODEL,), WHICH),
    Case("checkpoint: weights of text", checkpoint(lambda state: {**state, "model": "text"}), (MODEL,), WHICH),
    Case("checkpoint: an average of text", checkpoint(lambda state: {**state, "ema": "text"}), (MODEL,), "is damaged"),
    Case("checkpoint: no weights", checkpoint(lambda state: {**state, "model": {}}), (MODEL,), OTHER),
    Case("checkpoint: numbers as names", checkpoint(lambda state: {**state, "model": {1: torch.zeros(1)}}), (MODEL,),
         OTHER),
    Case("checkpoint: an entry of text", in_weights(lambda value: "text"), (MODEL,), NO_TENSOR),
    Case("checkpoint: an entry of None", in_weights(lambda value: None), (MODEL,), NO_TENSOR),
    Case("checkpoint: an entry of lists", in_weights(lambda value: value.tolist()), (MODEL,), NO_TENSOR),
    Case("checkpoint: complex numbers", in_weights(lambda value: value.to(torch.complex64)), (MODEL,), NO_TENSOR),
    Case("checkpoint: whole numbers", in_weights(lambda value: value.to(torch.int64)), (MODEL,), NO_TENSOR),
    Case("checkpoint: floats of 8 bits", in_weights(lambda value: value.to(torch.float8_e5m2)), (MODEL,), NO_TENSOR),
    Case("checkpoint: a list of tensors in one", in_weights(lambda value: torch.nested.nested_tensor([value[0]])),
         (MODEL,), NO_TENSOR),
    Case("checkpoint: a sparse tensor", in_weights(lambda value: value.to_sparse()), (MODEL,),
         f"{NO_TENSOR}|{TORN}"),
    Case("checkpoint: a tensor without values", in_weights(lambda value: value.to("meta")), (MODEL,), NO_TENSOR),
    Case("checkpoint: another shape", in_weights(lambda value: value[:1]), (MODEL,), OTHER),
    Case("checkpoint: an endless shape", in_weights(lambda value: torch.zeros(1).expand(2**40)), (MODEL,), OTHER),
    Case("checkpoint: a flipped bit", lambda run: flip(run / "checkpoints/last.pt"), (MODEL,), "is damaged"),
    Case("checkpoint: a folder", folder_for("checkpoints/last.pt"), (MODEL,), r"last\.pt is not there"),
    Case("checkpoint: a pipe", pipe_for("checkpoints/last.pt"), (MODEL,), r"last\.pt is not there"),
]  # fmt: skip

CONFIGS = [
    *(Case(f"config: {name} as the model", setting(model=node), (MODEL,), NOT_PERMITTED)
      for name, node in TARGETS.items()),
    *(Case(f"config: a command as {key}", setting(**{key: EVIL}), (MODEL,), NOT_PERMITTED)
      for key in ("loss", "optimizer", "dataset__reader", "schedule__train__loss")),
    Case("config: a target within the model", setting(model__norm=EVIL), (MODEL,), "holds a _target_"),
    Case("config: a target in a list", setting(model__feature_channels=[EVIL]), (MODEL,), "holds a _target_"),
    Case("config: a target in lists of lists", setting(optimizer__betas=[[[EVIL]]]), (MODEL,), "holds a _target_"),
    Case(
        "config: a target behind a permitted one",
        setting(loss={"_target_": "segkit.losses.SumLoss", "terms": {"a": {"weight": 1.0, "loss": EVIL}}}),
        (MODEL,), NOT_PERMITTED,
    ),
    Case(
        "config: trust in a saved file",
        setting(trust=["antigravity"], model={"_target_": "antigravity.webbrowser"}), (MODEL,), NOT_PERMITTED,
    ),
    Case("config: the environment", setting(device="${oc.env:SECRET}"), (MODEL, COMPARE), r"has '\$\{' in line"),
    Case("config: the environment in a key", setting(model={"${oc.env:SECRET}": 1}), (MODEL, COMPARE), r"has '\$\{'"),
    Case("config: a resolver of code", setting(cache_dir="${eval:1}"), (MODEL, COMPARE), r"has '\$\{'"),
    Case("config: a tag of Python", appended("x: !!python/object/apply:os.system ['true']\n"), (MODEL, COMPARE),
         "references or tags of YAML"),
    Case("config: an anchor that repeats itself", appended("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n"),
         (MODEL, COMPARE), "references or tags of YAML"),
    Case("config: an anchor in itself", appended("a: &a [*a]\n"), (MODEL, COMPARE), "references or tags of YAML"),
    Case("config: huge", appended("#" * 2**20), (MODEL, COMPARE), "bytes, but at most"),
    Case("config: nested deeply", appended(f"x: {'[' * 5000}{']' * 5000}\n"), (MODEL, COMPARE),
         "nested more than 50 deep in line"),
    Case("config: a list of 100,000", setting(freeze=["x"] * 10**5), (MODEL, COMPARE),
         "holds more than 10000 keys and values by line"),
    Case("config: no YAML", written(CONFIG, "a: [1"), (MODEL, COMPARE), "cannot be read"),
    Case("config: no text", written(CONFIG, b"\xff\xfe\x00"), (MODEL, COMPARE), "cannot be read"),
    Case("config: empty", written(CONFIG, ""), (MODEL, COMPARE), "holds no configuration"),
    Case("config: a list", written(CONFIG, "- 1\n"), (MODEL, COMPARE), "holds no configuration"),
    Case("config: a number", written(CONFIG, "3"), (MODEL, COMPARE), "holds no configuration"),
    Case("config: numbers as keys", written(CONFIG, "1: 2\n"), (MODEL, COMPARE), "holds no configuration"),
    Case("config: an unknown key", setting(surprise=1), (MODEL,), "surprise"),
    *(Case(f"config: {key} is {value!r}", setting(**{key: value}), (MODEL,), "config.yaml")
      for key in ("dataset", "model", "loss", "optimizer", "schedule", "evaluation", "sweep", "dataset__reader",
                  "dataset__resize", "schedule__train")
      for value in (3, "text", [1])),
    *(Case(f"config: {key} is null", setting(**{key: None}), (MODEL,), "config.yaml")
      for key in ("dataset", "model", "loss", "optimizer", "schedule", "seed")),
    Case("config: a seed of text", setting(seed="abc"), (MODEL, COMPARE), "seed"),
    Case("config: an infinite crop", setting(dataset__crop=[float("inf"), 1]), (MODEL,), "config.yaml"),
    Case("config: an address as the encoder",
         setting(model={"_target_": "segkit.models.smp_model", "arch": "Unet", "encoder": "tu-hf-hub:evil/model"}),
         (MODEL,), "must be a name, not an address"),
    Case("config: a network larger than the memory",
         setting(model__feature_channels=[2**14 * n for n in (1, 2, 4, 8, 16)]), (MODEL,),
         "holds the weights of another model"),
    Case("config: channels below zero", setting(model__feature_channels=[-4, 8, 16, 32, 64]), (MODEL,), "channel"),
    Case("config: a folder", folder_for(CONFIG), (MODEL, COMPARE), r"config\.yaml"),
    Case("config: a pipe", pipe_for(CONFIG), (MODEL, COMPARE), r"config\.yaml"),
]  # fmt: skip
