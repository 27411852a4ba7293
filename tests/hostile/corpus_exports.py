"""Bundles of a failed step, and exported folders, of a stranger."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus_cases import (
    BROKEN,
    EVIL,
    HUB,
    NO_TENSOR,
    NOT_PERMITTED,
    OTHER,
    REPLAY,
    TARGETS,
    Case,
    Code,
    bomb,
    pipe_for,
    table,
    written,
)
from safetensors.torch import load_file, save_file


def in_bundle(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Exchange an entry of error.json or batch.pt (``name``) for what ``change`` makes of its content."""

    def harm(run: Path) -> None:
        path = run / "bundle" / name
        if name == "error.json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        else:
            torch.save(change(torch.load(path, weights_only=True)), path)

    return harm


def facts(**changes: Any) -> Callable[[Path], None]:
    """Exchange values in the configuration of the exported folder; those of its model with ``model__``."""

    def change(content: dict[str, Any]) -> None:
        for key, value in changes.items():
            node, _, name = key.rpartition("__")
            (content[node] if node else content)[name] = value

    return table("hub/config.json", change)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Exchange the weights of the exported folder."""

    def harm(run: Path) -> None:
        state = load_file(run / "hub" / "model.safetensors")
        changed = change(state)
        save_file(state if changed is None else changed, run / "hub" / "model.safetensors")

    return harm


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Exchange what the header of the exported weights declares; the values behind it stay."""

    def harm(run: Path) -> None:
        path = run / "hub" / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        declared = json.loads(content[8 : 8 + size])
        change(declared)
        text = json.dumps(declared).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return harm


def first(declared: dict[str, Any]) -> dict[str, Any]:
    return declared[next(name for name in declared if name != "__metadata__")]


def first_value(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda state: state.update({(name := next(iter(state))): value(state[name])}))


ERROR = r"error\.json"
NO_BATCH = r"batch\.pt holds no images"
UNREAD = r"batch\.pt cannot be read"
BUNDLES = [
    *(Case(f"bundle: {kind}", written("bundle/error.json", content), (REPLAY,), ERROR)
      for kind, content in BROKEN.items()),
    *(Case(f"bundle: {key} is {value!r}", in_bundle("error.json", lambda old, key=key, value=value: {
        **old, key: value}), (REPLAY,), ERROR)
      for key, values in {"phase": ("nowhere", 3, None), "step": (-1, "x", 1.5), "rank": ("x",), "names": ("x", [1]),
                          "error": ([1],)}.items()
      for value in values),
    Case("bundle: code for a batch", in_bundle("batch.pt", lambda old: {**old, "x": Code()}), (REPLAY,), UNREAD),
    Case("bundle: pickled code", written("bundle/batch.pt", pickle.dumps(Code())), (REPLAY,), UNREAD),
    Case("bundle: a bomb", written("bundle/batch.pt", bomb("archive/data.pkl")), (REPLAY,), "but says that it holds"),
    Case("bundle: a list for a batch", in_bundle("batch.pt", lambda old: [1]), (REPLAY,), NO_BATCH),
    Case("bundle: another key", in_bundle("batch.pt", lambda old: {**old, "x": 1}), (REPLAY,), NO_BATCH),
    Case("bundle: images of text", in_bundle("batch.pt", lambda old: {**old, "images": "x"}), (REPLAY,), NO_BATCH),
    Case("bundle: images of numbers", in_bundle("batch.pt", lambda old: {**old, "images": old["images"].float()}),
         (REPLAY,), NO_BATCH),
    Case("bundle: images without end", in_bundle("batch.pt", lambda old: {
        **old, "images": torch.zeros(1, dtype=torch.uint8).expand(2, 3, 2**20, 2**20)}), (REPLAY,), NO_BATCH),
    Case("bundle: no image", in_bundle("batch.pt", lambda old: {**old, "images": old["images"][:0],
                                                               "labels": old["labels"][:0]}), (REPLAY,), NO_BATCH),
    Case("bundle: labels of other images", in_bundle("batch.pt", lambda old: {**old, "labels": old["labels"][:1]}),
         (REPLAY,), NO_BATCH),
    Case("bundle: a class that is not there", in_bundle("batch.pt", lambda old: {
        **old, "labels": old["labels"] * 0 + 77}), (REPLAY,), "target holds label 77"),
]  # fmt: skip

UNREADABLE = r"model\.safetensors cannot be read as safetensors"
FACTS = r"hub/config\.json"
NO_CLASSES = r"hub/config\.json has not a name and a colour for each"
HUBS = [
    *(Case(f"hub: {name} as the model", facts(model=node), (HUB,), NOT_PERMITTED) for name, node in TARGETS.items()),
    *(Case(f"hub: config.json is {kind}", written("hub/config.json", content), (HUB,), FACTS)
      for kind, content in BROKEN.items()),
    Case("hub: a target within the model", facts(model__norm=EVIL), (HUB,), "holds a _target_"),
    Case("hub: the environment", facts(model__norm="${oc.env:SECRET}"), (HUB,), r"has '\$\{' in it"),
    Case("hub: the environment in a key", facts(model={"${oc.env:SECRET}": 1}), (HUB,), r"has '\$\{' in it"),
    Case("hub: config.json is huge", facts(x="#" * 2**20), (HUB,), "bytes, but at most"),
    Case("hub: config.json is a pipe", pipe_for("hub/config.json"), (HUB,), FACTS),
    *(Case(f"hub: {key} leads elsewhere", facts(**{f"model__{key}": "../../../../etc/passwd"}), (HUB,),
           "reads weights from elsewhere") for key in ("weights", "encoder_weights")),
    Case("hub: classes that lead elsewhere", facts(classes="../../../../etc/passwd"), (HUB,), NO_CLASSES),
    Case("hub: a class of lists", facts(classes=[["road"]]), (HUB,), NO_CLASSES),
    Case("hub: two classes of one name", facts(classes=["\x1b[2J"] * 2), (HUB,), NO_CLASSES),
    Case("hub: a million classes", facts(classes=[str(n) for n in range(10**5)]), (HUB,), NO_CLASSES),
    Case("hub: a colour of text", facts(palette=[["red"] * 3] * 8), (HUB,), NO_CLASSES),
    Case("hub: other classes than weights", facts(classes=["<script>", "\x1b[2J"], palette=[[0, 0, 0]] * 2), (HUB,),
         OTHER),
    *(Case(f"hub: resize is {value!r}", facts(resize=value), (HUB,), "crop or resize that is none")
      for value in ("x", [1], {"size": "x"}, {"short_side": 10**9}, {"path": "/etc/passwd"}, {"short_side": 1e999})),
    Case("hub: a crop of text", facts(crop=["x", "y"]), (HUB,), "crop or resize that is none"),
    Case("hub: an endless crop", facts(crop=[2**40, 2**40]), (HUB,), "must be .height, width. of at least 8"),
    Case("hub: a decision of text", facts(decision="miou", rule="x"), (HUB,), "stored decision"),
    *(Case(f"hub: the decision {value!r}", facts(decision=value), (HUB,), "has the decision .* export it again")
      for value in ("best", 5, ["bias"])),
    Case("hub: a network larger than the memory",
         facts(model__feature_channels=[2**14 * n for n in (1, 2, 4, 8, 16)]), (HUB,), OTHER),
    Case("hub: channels below zero", facts(model__feature_channels=[-4, 8, 16, 32, 64]), (HUB,), "channel"),
    Case("hub: no config.json", lambda run: (run / "hub" / "config.json").unlink(), (HUB,), "has no config.json: give"),
    Case("hub: no weights", lambda run: (run / "hub" / "model.safetensors").unlink(), (HUB,), "there is no file"),
    Case("hub: a pipe for the weights", pipe_for("hub/model.safetensors"), (HUB,), "there is no file"),
    Case("hub: pickled code as weights", written("hub/model.safetensors", pickle.dumps(Code())), (HUB,), UNREADABLE),
    Case("hub: a header of 2**60 bytes", written("hub/model.safetensors", (2**60).to_bytes(8, "little")), (HUB,),
         UNREADABLE),
    Case("hub: a huge tensor is declared", header(lambda all: first(all).update(
        shape=[2**40], data_offsets=[0, 2**42])), (HUB,), UNREADABLE),
    Case("hub: a shape beyond its values", header(lambda all: first(all).update(shape=[2**40])), (HUB,), UNREADABLE),
    Case("hub: a type that there is not", header(lambda all: first(all).update(dtype="PICKLE")), (HUB,), UNREADABLE),
    Case("hub: weights that are not finite", first_value(lambda value: value * float("nan")), (HUB,), "not finite"),
    Case("hub: another shape", first_value(lambda value: value[:1].clone()), (HUB,), OTHER),
    Case("hub: whole numbers", first_value(lambda value: value.to(torch.int64)), (HUB,), NO_TENSOR),
    Case("hub: floats of 8 bits", first_value(lambda value: value.to(torch.float8_e5m2)), (HUB,), NO_TENSOR),
    Case("hub: keys are missing", tensors(lambda state: dict(list(state.items())[1:])), (HUB,), OTHER),
    Case("hub: keys of another model", tensors(lambda state: {f"\x1b[2J{name}": state[name] for name in state}), (HUB,),
         OTHER),
]  # fmt: skip
