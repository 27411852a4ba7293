"""Things that a stranger may put into a run folder, made by functions of that folder.

Every entry names the file it is about, the readers that must refuse it, and what the sentence must say. ``MODEL`` opens
the run and loads its weights, ``COMPARE`` is ``segkit compare``, ``DECISION`` reads its fitted bias, ``REPLAY`` repeats
the step of a bundle that is made of the folder (of its config.yaml, label counts, last.pt, and what lies in bundle/).
``HUB`` predicts with the folder hub/ that segkit export has written of the run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

MODEL, COMPARE, DECISION, REPLAY, HUB = "model", "compare", "decision", "replay", "hub"
CONFIG = "config.yaml"


class Case(NamedTuple):
    """``harm(run)`` changes the run folder ``run``."""

    name: str
    harm: Callable[[Path], None]
    readers: tuple[str, ...]
    message: str


# -- configurations ----------------------------------------------------------------------------------------------------


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

# -- checkpoints -------------------------------------------------------------------------------------------------------


class Code:
    """Acts when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/segkit-hostile-file",)


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


def bomb(name: str, size: int = 2**28) -> bytes:
    """A deflated archive with ``size`` bytes under ``name``, a thousandth of that."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as file:
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return content.getvalue()


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
NO_TENSOR = "tensor under"
WHICH = "so it is not a checkpoint of segkit"
OTHER = "holds the weights of another model"
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
    Case("checkpoint: a sparse tensor", in_weights(lambda value: value.to_sparse()), (MODEL,),
         f"{NO_TENSOR}|{TORN}"),
    Case("checkpoint: a tensor without values", in_weights(lambda value: value.to("meta")), (MODEL,), NO_TENSOR),
    Case("checkpoint: another shape", in_weights(lambda value: value[:1]), (MODEL,), OTHER),
    Case("checkpoint: an endless shape", in_weights(lambda value: torch.zeros(1).expand(2**40)), (MODEL,), OTHER),
    Case("checkpoint: a flipped bit", lambda run: flip(run / "checkpoints/last.pt"), (MODEL,), "is damaged"),
    Case("checkpoint: a folder", folder_for("checkpoints/last.pt"), (MODEL,), r"last\.pt is not there"),
    Case("checkpoint: a pipe", pipe_for("checkpoints/last.pt"), (MODEL,), r"last\.pt is not there"),
]  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# -- tables ------------------------------------------------------------------------------------------------------------


def table(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Exchange the JSON file ``name`` for one that ``change`` has made of it."""

    def harm(run: Path) -> None:
        path = (run / name).resolve()
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return harm


def counts(**changes: Any) -> Callable[[Path], None]:
    """Exchange arrays of the matrices per image."""

    def harm(run: Path) -> None:
        path = (run / "per_image.npz").resolve()
        with np.load(path) as stored:
            fields = dict(stored)
        np.savez_compressed(path, **{**fields, **changes})

    return harm


def first_class(key: str, value: Any) -> Callable[[Any], None]:
    return lambda content: next(iter(content["classes"].values())).__setitem__(key, value)


def biases(value: Any) -> Callable[[Any], None]:
    return lambda content: content["bias"]["bias"].update(dict.fromkeys(content["bias"]["bias"], value))


DEEP = "[" * 100_000 + "]" * 100_000
JSON_READERS = {
    "label_counts.json": (MODEL, COMPARE),
    "results.json": (COMPARE,),
    "provenance.json": (COMPARE,),
    "margins.json": (COMPARE,),
    "pictures/index.json": (COMPARE,),
    "decision.json": (DECISION,),
}
BROKEN = {
    "torn": '{"a": ', "empty": "", "a list": "[]", "a number": "1", "null": "null", "no text": b"\xff\xfe",
    "nested deeply": DEEP, "a number of too many digits": '{"a": ' + "9" * 10_000 + "}", "an object without keys": "{}",
}  # fmt: skip

TABLES = [
    *(Case(f"{name}: {kind}", written(name, content), readers, name.replace(".", r"\.") + "")
      for name, readers in JSON_READERS.items() for kind, content in BROKEN.items()
      if (name, kind) != ("provenance.json", "an object without keys")),
    *(Case(f"{name}: a pipe", pipe_for(name), (reader,), name.replace(".", r"\."))
      for name, reader in (("label_counts.json", MODEL), ("results.json", COMPARE), ("decision.json", DECISION))),
    Case("results.json: a folder", folder_for("results.json"), (COMPARE,), r"results\.json"),
    Case("checksums.json: a list", written("checkpoints/checksums.json", "[]"), (MODEL,), "is damaged"),
    Case("checksums.json: lists within", written("checkpoints/checksums.json", '{"last.pt": ["x"]}'), (MODEL,),
         r"checksums\.json is damaged"),
    Case("checksums.json: torn", written("checkpoints/checksums.json", '{"last'), (MODEL,), "is damaged"),
    Case("checksums.json: empty", written("checkpoints/checksums.json", ""), (MODEL,), r"checksums\.json is damaged"),
    Case("checksums.json: a folder", folder_for("checkpoints/checksums.json"), (MODEL,), r"checksums\.json is damaged"),
    Case("label counts: text for a number", table("label_counts.json", first_class("pixels", "many")),
         (MODEL, COMPARE), "number of pixels"),
    Case("label counts: below zero", table("label_counts.json", first_class("pixels", -1)), (MODEL, COMPARE),
         "number of pixels"),
    Case("label counts: beyond 64 bits", table("label_counts.json", first_class("pixels", 10**30)), (MODEL, COMPARE),
         "number of pixels"),
    Case("label counts: no classes", table("label_counts.json", lambda content: {**content, "classes": {}}),
         (MODEL, COMPARE), "number of pixels"),
    Case("label counts: a million classes", table("label_counts.json", lambda content: {
        **content, "classes": {str(n): {"pixels": 1, "images": 1} for n in range(10**5)}}), (MODEL,), "up to 255"),
    Case("label counts: a colour of text", table("label_counts.json", lambda content: {
        **content, "palette": [["red"] * 3] * len(content["classes"])}), (MODEL,), "palette"),
    Case("label counts: a colour out of range", table("label_counts.json", lambda content: {
        **content, "palette": [[256, 0, 0]] * len(content["classes"])}), (MODEL,), "palette"),
    Case("label counts: too few colours", table("label_counts.json", lambda content: {**content, "palette": []}),
         (MODEL,), "palette"),
    *(Case(f"results: {key} is {value!r}", table("results.json", lambda content, key=key, value=value: {
        **content, key: value}), (COMPARE,), r"results\.json")
      for key in ("mean_iou", "pixel_accuracy", "classes", "num_images", "num_classes_averaged", "protocol", "best",
                  "absent_classes")
      for value in ("text", [3], 7.5, -1)),
    Case("results: a score of a class is text", table("results.json", first_class("iou", "x")), (COMPARE,),
         "no number from 0 to 1"),
    Case("results: a score above 1", table("results.json", first_class("iou", 1e9)), (COMPARE,),
         "no number from 0 to 1"),
    Case("results: true for a score", table("results.json", first_class("iou", True)), (COMPARE,),
         "no number from 0 to 1"),
    Case("metrics: a torn line", lambda run: cut(run / "metrics.jsonl"), (COMPARE,), "is no record of a phase"),
    Case("metrics: no text", written("metrics.jsonl", b"\xff\xfe"), (COMPARE,), r"metrics\.jsonl cannot be read"),
    Case("metrics: numbers", written("metrics.jsonl", "1\n2\n"), (COMPARE,), "is no record of a phase"),
    Case("metrics: a step of text", written("metrics.jsonl", '{"phase": "train", "step": "x"}\n'), (COMPARE,),
         "is no record of a phase"),
    Case("metrics: a phase of lists", written("metrics.jsonl", '{"phase": ["x"], "step": 1}\n'), (COMPARE,),
         "is no record of a phase"),
    Case("metrics: nested deeply", written("metrics.jsonl", DEEP + "\n"), (COMPARE,), "is no record of a phase"),
    Case("per image: a class number out of range", counts(target=np.array([99], np.int16)), (COMPARE,),
         "not a per-image count file"),
    Case("per image: a prediction out of range", counts(prediction=np.full(4, 10_000, np.int16)), (COMPARE,),
         "not a per-image count file"),
    Case("per image: an image below zero", counts(image=np.array([-1])), (COMPARE,), "not a per-image count file"),
    Case("per image: fractions", counts(count=np.array([0.5])), (COMPARE,), "not a per-image count file"),
    Case("per image: objects", lambda run: objects(run), (COMPARE,), "not a per-image count file"),
    Case("per image: 2**40 classes", counts(num_classes=np.int64(2**40)), (COMPARE,), "not a per-image count file"),
    Case("per image: names of numbers", counts(names=np.arange(3)), (COMPARE,), "not a per-image count file"),
    Case("per image: a bomb", counts(extra=np.zeros(2**28, np.uint8)), (COMPARE,), "but says that it holds"),
    Case("per image: an endless array", lambda run: endless(run), (COMPARE,), "not a per-image count file"),
    Case("per image: text", written("per_image.npz", "x"), (COMPARE,), "not a per-image count file"),
    Case("per image: empty", written("per_image.npz", ""), (COMPARE,), "not a per-image count file"),
    Case("decision: text", table("decision.json", biases("x")),
         (DECISION,), "stored bias"),
    Case("decision: lists", table("decision.json", biases([1])),
         (DECISION,), "stored bias"),
    Case("decision: not finite", table(
        "decision.json", biases(1e999)), (DECISION,), "stored bias"),
    Case("decision: other classes", table("decision.json", lambda c: {**c, "bias": {"bias": {"x": 1.0}}}), (DECISION,),
         "stored bias"),
    Case("pictures: a file that claims to be huge", lambda run: huge_picture(run), (COMPARE,), "pixels|cannot be read"),
    Case("pictures: a name that leads out", table("pictures/index.json", lambda c: [
        entry.update(image="../../../../../../etc/passwd") for entry in c["pictures"]] and None), (COMPARE,),
         "cannot be read"),
]  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def objects(run: Path) -> None:
    path = (run / "per_image.npz").resolve()
    with np.load(path) as stored:
        fields = dict(stored)
    np.savez(path, allow_pickle=True, **{**fields, "names": np.array([Code()], object)})


def endless(run: Path) -> None:
    """An array whose header claims 2**50 bytes."""
    path = (run / "per_image.npz").resolve()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2**47,)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("image", "target", "prediction", "count", "names", "num_classes"):
            archive.writestr(f"{name}.npy", header.getvalue())


def huge_picture(run: Path) -> None:
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    for path in (run / "pictures").glob("*_image.jpg"):
        path.write_bytes(content)


def in_bundle(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Exchange an entry of error.json or batch.pt (``name``) for what ``change`` makes of its content."""

    def harm(run: Path) -> None:
        path = run / "bundle" / name
        if name == "error.json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        else:
            torch.save(change(torch.load(path, weights_only=True)), path)

    return harm


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
    Case("hub: a network larger than the memory",
         facts(model__feature_channels=[2**14 * n for n in (1, 2, 4, 8, 16)]), (HUB,), OTHER),
    Case("hub: channels below zero", facts(model__feature_channels=[-4, 8, 16, 32, 64]), (HUB,), "channel"),
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
    Case("hub: keys are missing", tensors(lambda state: dict(list(state.items())[1:])), (HUB,), OTHER),
    Case("hub: keys of another model", tensors(lambda state: {f"\x1b[2J{name}": state[name] for name in state}), (HUB,),
         OTHER),
]  # fmt: skip


def also_replayed(case: Case) -> Case:
    """``case`` with the reader ``REPLAY``, where a bundle holds the file that it is about."""
    elsewhere = MODEL not in case.readers or case.name.startswith("checksums") or case.name in SUMS_ONLY
    return case if elsewhere else case._replace(readers=(*case.readers, REPLAY))


SUMS_ONLY = tuple(f"checkpoint: {kind}" for kind in ("a flipped bit", "a folder", "a pipe", "an average of text"))
"""What the digests of a run find, or what a bundle does not need."""

CORPUS = [*map(also_replayed, CONFIGS[::3]), *(case for n, case in enumerate(CONFIGS) if n % 3)]
CORPUS += [*map(also_replayed, (*CHECKPOINTS, *TABLES)), *BUNDLES, *HUBS]
