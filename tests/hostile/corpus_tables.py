"""Tables, counts and pictures of a stranger."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpus_cases import (
    BROKEN,
    COMPARE,
    DECISION,
    DEEP,
    MODEL,
    Case,
    Code,
    folder_for,
    pipe_for,
    table,
    written,
)


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


JSON_READERS = {
    "label_counts.json": (MODEL, COMPARE),
    "results.json": (COMPARE,),
    "provenance.json": (COMPARE,),
    "margins.json": (COMPARE,),
    "pictures/index.json": (COMPARE,),
    "decision.json": (DECISION,),
}

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
    Case("label counts: a sum beyond 64 bits", table("label_counts.json", lambda content: [
        row.update(pixels=2**62) for row in content["classes"].values()] and None),
         (MODEL, COMPARE), "number of pixels"),
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
