"""Exported graphs against the torch model, at sizes and batches other than the one that was traced."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from segkit.errors import InputError
from segkit.evaluation import whole_image
from segkit.models import COPLENet, Segmenter, deeplabv3plus, enable_grad_checkpointing
from segkit.models import export as export_module
from segkit.models.any_size import accept_any_size
from segkit.models.export import export
from segkit.models.exported import encoder_licence, read_metadata
from segkit.models.whole_image import WholeImage, fix_same_padding


def coplenet() -> nn.Module:
    return COPLENet(3, 4, feature_channels=(8, 16, 32, 64, 128), norm="batch")


def tiny() -> nn.Module:
    return deeplabv3plus("tu-regnetx_002", 4, encoder_weights="none", output_stride=16, decoder_channels=16)


def small() -> nn.Module:
    return deeplabv3plus("tu-test_resnet", 4, encoder_weights="none", output_stride=16, decoder_channels=16)


def lite() -> nn.Module:
    return deeplabv3plus("tu-tf_efficientnet_lite0", 4, output_stride=16, decoder_channels=32)


MODELS: dict[str, Callable[[], nn.Module]] = {"coplenet": coplenet, "tiny": tiny, "small": small, "lite": lite}
SIZES = [(1, 64, 96), (3, 65, 97), (1, 81, 50), (2, 128, 64)]


def segmenter(name: str) -> Segmenter:
    torch.manual_seed(0)
    model = Segmenter(MODELS[name]())
    with torch.no_grad():  # running statistics other than their initial values
        model.train()(torch.rand(2, 3, 64, 64) * 255)
    return model.eval()


def test_a_file_that_gives_nan_anywhere_does_not_agree() -> None:
    model = Segmenter(nn.Conv2d(3, 2, 1)).eval()
    images = [np.full((3, 5, 3), value, np.uint8) for value in (200, 100, 50)]

    def run(batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch)
        logits[:, :, 0, 0] += float("nan") if batch[0, 0, 0, 0] == 100 else 0
        return logits

    assert np.isnan(export_module.agreement(run, model, images).difference)


def test_a_program_that_does_not_take_an_image_says_its_size() -> None:
    model = Segmenter(nn.Conv2d(3, 2, 1)).eval()
    example = (torch.zeros(2, 3, 8, 9),)
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim("height", min=4), 3: torch.export.Dim.AUTO}
    run = torch.export.export(model, example, dynamic_shapes=[sizes]).module()
    assert export_module.agreement(run, model, [np.zeros((4, 5, 3), np.uint8)]).pixels == 1
    with pytest.raises(InputError, match=r"cannot compute an image of 3 x 5 pixels \(height x width; Guard.*>= 4\)"):
        export_module.agreement(run, model, [np.zeros((3, 5, 3), np.uint8)])


@pytest.mark.parametrize("name", ["tiny", "coplenet"])
def test_is_what_evaluation_computes(name: str) -> None:
    """The logits of the model, interpolated as evaluation does it, at any size."""
    model = segmenter(name)
    for size in ((64, 96), (72, 84), (67, 45), (33, 50)):
        images = torch.rand(2, 3, *size) * 255
        with torch.no_grad():
            expected = F.interpolate(model(images), size=size, mode="bilinear", align_corners=False)
            whole, classes = WholeImage(model)(images), whole_image(model, images, size)
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
        assert (whole.argmax(1) == classes).float().mean() > 0.9995


class Pooling(nn.Module):
    """Logits at stride 8: the mean colour of each cell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 8)


def test_odd_sizes_are_aligned_with_evaluation() -> None:
    """Colours that rise evenly come back evenly, by the graph and by the interpolation of evaluation alike."""
    net = accept_any_size(Pooling(), multiple=16)
    model = Segmenter(net, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    rows, columns = torch.meshgrid(torch.arange(93.0), torch.arange(75.0), indexing="ij")
    images = torch.stack([rows, columns, rows + columns])[None]
    evaluated = F.interpolate(model(images), size=(93, 75), mode="bilinear", align_corners=False)
    inner = (..., slice(16, -16), slice(16, -16))
    torch.testing.assert_close(evaluated[inner], images[inner], rtol=0, atol=1e-3)
    torch.testing.assert_close(WholeImage(model)(images)[inner], images[inner], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["small", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("tiny", "coplenet", "lite"))]
)
def test_onnx(tmp_path: Path, name: str) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = segmenter(name)
    path = tmp_path / "model.onnx"
    export(model, path, metadata={"classes": ["road", "sky"], "ignore_index": 255})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [item.name for item in (*session.get_inputs(), *session.get_outputs())] == ["images", "logits"]
    for num, height, width in SIZES:
        images = torch.randint(0, 256, (num, 3, height, width)).float()
        with torch.no_grad():
            expected = F.interpolate(model(images), size=(height, width), mode="bilinear", align_corners=False)
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert logits.shape == (num, 4, height, width)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.999
    metadata = read_metadata(path)
    assert metadata["classes"] == ["road", "sky"]
    assert metadata["ignore_index"] == 255
    assert metadata["mean"] == list(model.mean)
    assert metadata["input_range"] == [0, 255]
    assert metadata["normalised_inside"] is True
    largest = max(onnx.load(path).graph.initializer, key=lambda item: len(item.raw_data)).raw_data
    content = path.read_bytes()
    place = content.index(largest) + len(largest) // 2 + 3  # the sign of a weight
    path.write_bytes(content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :])
    with pytest.warns(UserWarning, match=r"the weights in .*model\.onnx are not those that segkit exported: copy it"):
        assert read_metadata(path) == metadata


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["tiny", "coplenet"])
def test_torch_export(tmp_path: Path, name: str) -> None:
    model = segmenter(name)
    path = tmp_path / "model.pt2"
    export(model, path, format="torch_export", metadata={"classes": ["road"]})
    program = torch.export.load(path).module()
    for num, height, width in SIZES:
        images = torch.rand(num, 3, height, width) * 255
        with torch.no_grad():
            expected = F.interpolate(model(images), size=(height, width), mode="bilinear", align_corners=False)
            torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)
    assert read_metadata(path)["classes"] == ["road"]
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="is not a model that segkit exported"):
        read_metadata(path)


@pytest.mark.data
@pytest.mark.nightly
def test_real_images_of_any_size_get_the_classes_of_the_model(tmp_path: Path, shared_data: Path) -> None:
    """CamVid images of several sizes, against the model and against what evaluation makes of it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = []
    for number, path in enumerate(sorted((shared_data / "CamVid" / "val").glob("*.png"))[::20]):
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB").resize((480 - 31 * number, 360 + 17 * number))))
    sizes = {image.shape[:2] for image in images}
    assert len(sizes) >= 5
    torch.manual_seed(0)
    model = Segmenter(tiny())
    stack = torch.stack([torch.tensor(image[:224, :224]) for image in images]).permute(0, 3, 1, 2)
    with torch.no_grad():
        model.train()(stack)  # running statistics of these images
    path = tmp_path / "model.onnx"
    found = export(model.eval(), path, images=images)
    assert found.num_images == len(images)
    assert found.pixels >= 0.999
    assert found.difference < 1e-4
    run = export_module.runner(path)
    for image in images:
        batch = torch.tensor(image).permute(2, 0, 1)[None]
        with torch.inference_mode():
            logits, own = run(batch.float()), model(batch)
            evaluated = F.interpolate(own, size=image.shape[:2], mode="bilinear", align_corners=False)
        assert len(evaluated.argmax(1).unique()) > 1
        assert (logits.argmax(1) == evaluated.argmax(1)).float().mean() > 0.9999, image.shape


def test_files_that_disagree_on_real_images_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Segmenter(nn.Conv2d(3, 2, 1))
    path = tmp_path / "model.pt2"
    path.write_text("an earlier export")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    monkeypatch.setattr(export_module, "runner", lambda _: lambda images: -WholeImage(model)(images))
    with pytest.raises(InputError, match=r"exported Conv2d gives 0\.00 % of the pixels of 1 images .* it was not kept"):
        export(model, path, format="torch_export", images=[image])
    assert path.read_text() == "an earlier export"
    assert list(tmp_path.iterdir()) == [path]


def test_the_classes_of_the_evaluation_decide(tmp_path: Path) -> None:
    """``predict`` is the reference: a file that agrees with the model but not with the evaluation is not kept."""
    model = Segmenter(nn.Conv2d(3, 2, 1))
    image = np.random.default_rng(0).integers(0, 256, (21, 31, 3), np.uint8)
    path = tmp_path / "model.pt2"
    options = {"format": "torch_export", "images": [image]}
    assert export(model, path, **options).pixels == 1.0
    with pytest.raises(InputError, match=r"0\.00 % of the pixels of 1 images the class that evaluation gives"):
        export(model, path, **options, predict=lambda images: 1 - model(images).argmax(1))


def test_a_head_is_part_of_the_graph(tmp_path: Path) -> None:
    model = Segmenter(nn.Conv2d(3, 3, 1))
    path = tmp_path / "model.pt2"
    weights = torch.tensor([3.0, -1.0, 0.5]).view(1, 3, 1, 1)
    export(model, path, format="torch_export", head=lambda logits: logits.softmax(1) * weights)
    images = torch.rand(1, 3, 30, 41) * 255
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(images), model(images).softmax(1) * weights)
    assert read_metadata(path)["output"] == "scores"


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.nightly), "torch_export"])
def test_the_numbers_of_the_classes(tmp_path: Path, format: str) -> None:
    """With ``classes`` the graph ends in the argmax of logits or scores, at sizes that no stride divides."""
    torch.manual_seed(0)
    model = Segmenter(accept_any_size(nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 5, 1)), multiple=16))
    images = torch.rand(2, 3, 67, 45) * 255
    with torch.no_grad():
        logits = F.interpolate(model(images), size=(67, 45), mode="bilinear", align_corners=False)
    weights = 1 / logits.softmax(1).mean((0, 2, 3)).view(1, 5, 1, 1)  # so that every class is the largest somewhere
    path = tmp_path / "model"
    if format == "onnx":
        ort = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        path = path.with_suffix(".onnx")
        export(model, path, head=lambda logits: logits.softmax(1) * weights, classes=True)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["classes"], {"images": images.numpy()})[0])
        expected = (logits.softmax(1) * weights).argmax(1)
    else:
        path = path.with_suffix(".pt2")
        export(model, path, format=format, classes=True)
        found = torch.export.load(path).module()(images)
        expected = logits.argmax(1)
    assert len(expected.unique()) > 1
    assert (found.dtype, found.shape) == (torch.uint8, (2, 67, 45))
    assert (found == expected).float().mean() > 0.999
    assert read_metadata(path)["output"] == "classes"


def test_more_classes_than_a_byte_holds_are_whole_numbers() -> None:
    many = WholeImage(Segmenter(nn.Conv2d(3, 257, 1)), classes=True)
    assert many(torch.rand(1, 3, 9, 8)).dtype == torch.int64


def test_the_licence_of_published_weights_is_what_timm_states() -> None:
    assert encoder_licence("tu-tf_efficientnet_lite0") == "apache-2.0"
    assert encoder_licence("tu-vit_small_patch16_dinov3") == "dinov3-license"
    assert encoder_licence("resnet34") is encoder_licence("tu-nothing") is None


@pytest.mark.nightly
def test_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = segmenter("tiny").train()
    enable_grad_checkpointing(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, tmp_path / "model.pt2", format="torch_export")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_static_padding_is_that_of_timm() -> None:
    """Kernels, strides and dilations of dynamically padded layers, on sides that the stride divides."""
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame

    layers: list[nn.Module] = [AvgPool2dSame(kernel, stride) for kernel, stride in ((2, 2), (2, 1), (3, 2))]
    for kernel, stride, dilation in ((3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 2, 1), (7, 4, 1)):
        layers.append(Conv2dSame(3, 2, kernel, stride=stride, dilation=dilation))
        layers.append(MaxPool2dSame(kernel, stride, dilation=dilation))
    for layer in layers:
        images = -torch.rand(1, 3, 16, 24)
        expected = layer(images)
        fix_same_padding(layer)
        assert not type(layer).__name__.endswith("Same")
        torch.testing.assert_close(layer(images), expected, rtol=0, atol=0)


class Ceiling(nn.Module):
    """An operation on sizes that torch traces, and cannot write."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, [0, math.ceil(x.shape[3] / 2) - x.shape[3] // 2 + 3])[..., :-3]


def test_a_disk_without_room_for_a_program_ends_no_process(tmp_path: Path) -> None:
    program, limit = torch.export.export(nn.Identity(), (torch.zeros(1),)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_module._save(program, tmp_path / "model.pt2", "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_program_that_torch_cannot_write_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch cannot write the program of the model \(.+\): give --format onnx, or"):
        export(Segmenter(Ceiling()), tmp_path / "model.pt2", format="torch_export")
    assert not list(tmp_path.iterdir())


class OneSize(nn.Module):
    """Its weights belong to the positions of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, 38, 74))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


def test_network_of_one_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"OneSize can be exported for images of one size only.*choose another model"):
        export(Segmenter(OneSize()), tmp_path / "model.pt2", format="torch_export")
    assert not (tmp_path / "model.pt2").exists()


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())


def test_network_that_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Untraceable cannot be exported \(.+\): choose another model"):
        export(Segmenter(Untraceable()), tmp_path / "model.pt2", format="torch_export")


@pytest.mark.nightly
def test_graph_that_is_wrong_at_other_sizes(tmp_path: Path) -> None:
    """Pooling to a fixed number of cells, as PSPNet does, is translated to windows of the traced size."""
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(3, 2, 1))
    with pytest.raises(InputError, match=r"differs from the model by .* of its largest logit .* it was not kept"):
        export(Segmenter(net), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_graph_of_other_weights_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    model = Segmenter(nn.Conv2d(3, 2, 1))
    path = tmp_path / "model.onnx"
    export(model, path)
    assert export_module.largest_difference(path, model) < 1e-5
    with torch.no_grad():
        model.net.bias += 0.1
    assert export_module.largest_difference(path, model) > 1e-2
    monkeypatch.setattr(export_module, "largest_difference", lambda *_, **__: 0.25)
    with pytest.raises(InputError, match=r"Conv2d differs from the model by 0\.25 of its largest .* it was not kept"):
        export(model, tmp_path / "other.onnx")
    assert list(tmp_path.iterdir()) == [path]


class Unknown(nn.Module):
    """Has no counterpart in ONNX."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_network_that_onnx_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match=r"cannot be translated to ONNX \(.+\): give --format torch_export") as caught:
        export(Segmenter(Unknown()), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    model = Segmenter(nn.Conv2d(3, 2, 1))
    with pytest.raises(InputError, match="the format is 'tflite', but can be onnx or torch_export"):
        export(model, tmp_path / "model.tflite", format="tflite")
    with pytest.raises(InputError, match=r"cannot be written, since there is no folder .*missing: create it first"):
        export(model, tmp_path / "missing" / "model.onnx")


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before the graph is traced, which takes a while."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("segkit.models.export._trace", None)
    with pytest.raises(InputError, match=r"ONNX needs the package onnx, .* pip install 'segkit\[export\]'"):
        export(Segmenter(nn.Conv2d(3, 2, 1)), tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_metadata_of_a_foreign_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"there is no exported model .*{name}"):
        read_metadata(tmp_path / name)
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(InputError, match=f"{name} is not a model that segkit exported"):
        read_metadata(tmp_path / name)
