"""ONNX files of others: what they compute is checked before a pixel of it is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.commands import predict, scorers
from segkit.errors import InputError
from segkit.models.exported import INPUT, METADATA_KEY

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FACTS = {"classes": ["red", "green", "blue"], "palette": [[200, 0, 0], [0, 200, 0], [0, 0, 200]]}


def graph(path, *operations, output=onnx.TensorProto.FLOAT):
    """Write a graph whose last of the ``operations``, (name, inputs, attributes) each, makes its output."""
    names = [INPUT, *map(str, range(len(operations)))]
    nodes = [
        onnx.helper.make_node(kind, [names[i], *others], [names[i + 1]], **attributes)
        for i, (kind, others, attributes) in enumerate(operations)
    ]
    given = onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, [None, 3, None, None])
    found = onnx.helper.make_tensor_value_info(names[-1], output, None)
    numbers = {"one": [1], "two": [2], "sizes": [1, 3, 7, 7]}
    constants = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "graph", [given], [found], constants), opset_imports=opset, ir_version=9
    )
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(FACTS)})
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([("Identity", [], {})], None),
        ([("ArgMax", [], {"axis": 1, "keepdims": 0})], None),
        ([("Reshape", ["sizes"], {})], r"cannot compute images of \(1, 3, 8, 9\) \(.*cannot be reshaped"),
        ([("Split", [], {"axis": 1, "num_outputs": 1}), ("Gather", ["one"], {"axis": 1})], r"gives \(1, 1, 8, 9\) for"),
        ([("Concat", [INPUT], {"axis": 1})], r"gives \(1, 6, 8, 9\) for images of .*, but must .* for its 3 classes"),
        ([("Flatten", [], {})], r"gives \(1, 216\) for images of"),
        ([("ReduceMax", ["one"], {"keepdims": 0})], "cannot compute images of .*Class values must be smaller"),
    ],
    ids=["logits", "classes", "fails", "fewer", "more", "flat", "no class"],
)
def test_what_a_graph_computes_is_checked(tmp_path, capfd, operations, message):
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    kind = onnx.TensorProto.INT64 if operations[-1][0] == "ArgMax" else onnx.TensorProto.FLOAT
    graph(tmp_path / "graph.onnx", *operations, output=kind)
    arguments = [f"{tmp_path}/graph.onnx", "--input", f"{tmp_path}/image.png", "--output", f"{tmp_path}/out"]
    if message is None:
        with pytest.raises(SystemExit, match=r"^0$"):
            predict.run(arguments)
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "labels" / "image.png")), image.argmax(2))
        return
    with pytest.raises(InputError, match=rf"graph\.onnx {message}.*: write it again with segkit export$"):
        predict.run(arguments)
    assert "onnxruntime" not in capfd.readouterr().err


@pytest.mark.parametrize(("option", "how"), [("--precision=bf16", "in fp32"), ("--device=cuda", "on the CPU")])
def test_what_a_graph_does_not_follow_is_refused(tmp_path, option, how):
    graph(tmp_path / "graph.onnx", ("Identity", [], {}))
    arguments = predict.parser(files=False).parse_args([f"{tmp_path}/graph.onnx", option])
    name = option.partition("=")[0]
    with pytest.raises(InputError, match=f"computes {how}, which {name} cannot change: leave {name} out"):
        scorers.load(arguments.run, arguments, torch.device("cpu"))
