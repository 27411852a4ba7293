"""Images of other channels than three and of more than 8 bits: every kind goes all the way."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from band_files import DIVISOR, KINDS, SIZE, SMALL, kind_of, make, picture, statistics, tiff, write
from crops import drawn_crop
from PIL import Image
from torch import nn

from segkit.check.check import check
from segkit.cli import verb_function
from segkit.commands.replay import stored_batch
from segkit.config.compose import compose
from segkit.data import SampleSet, open_dataset
from segkit.data.bands import image_size, read_bands
from segkit.data.labels import load_table
from segkit.data.loader import train_batches
from segkit.data.samples import Sample
from segkit.data.transforms import TrainTransform, resize_image
from segkit.errors import InputError, Interrupted
from segkit.evaluation.overlay import visible
from segkit.models import Segmenter
from segkit.models.export import export
from segkit.models.exported import read_metadata
from segkit.models.smp_model import smp_model
from segkit.run import pipeline
from segkit.run.auto_batch import _noise
from segkit.run.build import build_augment, segmenter, train_transform
from segkit.run.splits import open_phases


def printed(name, root, capsys):
    """The overrides that segkit stats prints for a data set."""
    verb_function("stats")(["workers=0", "dataset=folder", *make(root, name)])
    return re.findall(r"^dataset\.(?:mean|std)=\[.*\]$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_images_goes_all_the_way(tmp_path, name, capsys):
    """Statistics, check, training, resuming, evaluation, prediction and export see the values that were written."""
    root, run, out = tmp_path / "own", tmp_path / "run", tmp_path / "out"
    lines = printed(name, root, capsys)
    channels, dtype, _ = KINDS[name]
    assert len(lines) == (0 if name == "3 uint8 png" else 2)
    for line, expected in zip(lines, statistics(name), strict=False):
        np.testing.assert_allclose(json.loads(line.partition("=")[2]), expected, rtol=5e-6)
    config = compose([*SMALL, *make(root, name), *lines])
    splits = open_phases(config)
    for item in splits["train"].train:
        np.testing.assert_array_equal(item.image, picture(item.name, channels, dtype))
    report = check(config, rehearses=False)
    assert [finding.text for finding in report.findings if finding.level == "error"] == []
    with pytest.raises(Interrupted):
        pipeline.run(config, run, splits, stop=lambda: True)
    pipeline.run(config, run, splits, stop=lambda: False)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["split"] == "val"] == [2]
    with Image.open(run / "pictures" / "0000_image.jpg") as shown:
        assert shown.mode == "RGB"
    verb_function("evaluate")([str(run), "--workers", "0", "--device", "cpu", "--tta", "flip"])
    models = [run]
    if name == "6 float32 npy":
        models.append(tmp_path / "hub")
        verb_function("export")([str(run), "--format", "hub", "--output", str(models[1])])
        assert "100.000 % of the pixels" in capsys.readouterr().out
    for model in models:
        arguments = ["--input", f"{root}/images/val", "--output", str(out / model.name), "--device", "cpu"]
        with pytest.raises(SystemExit, match=r"^0$"):
            verb_function("predict")([str(model), *arguments])
    labels = [np.array(Image.open(out / model.name / "labels" / "e.png")) for model in models]
    assert all((label == labels[0]).mean() > 0.999 for label in labels)


def test_an_exported_graph_takes_what_the_files_hold(tmp_path, capsys):
    """Its channels and its divisor are in the file; an image of other channels is named and skipped."""
    torch.manual_seed(0)
    model = Segmenter(nn.Conv2d(5, 2, 3, padding=1), mean=(0.4,) * 5, std=(0.1,) * 5, divisor=65535.0).eval()
    facts = {"classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]], "in_channels": 5, "dtype": "uint16"}
    image, path = picture("e", 5, "uint16"), tmp_path / "model.pt2"
    found = export(model, path, format="torch_export", metadata=facts, images=[image])
    assert found.pixels == 1.0
    assert read_metadata(path)["input_range"] == [0, 65535]
    for letter, channels in (("e", 5), ("f", 4)):
        write(tmp_path / "in" / f"{letter}.tif", picture(letter, channels, "uint16"))
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--trust", "torch_export"]
    with pytest.raises(SystemExit, match=r"^1$"):
        verb_function("predict")([str(path), *arguments, "--device", "cpu"])
    assert "f.tif is an array of uint16 of the shape [40, 48, 4], but (H, W, 5)" in capsys.readouterr().err.replace(
        "\n", " "
    )
    weight, bias = (value.detach().double() for value in (model.net.weight, model.net.bias))
    normal = (torch.from_numpy(image.astype(np.float64)) / 65535 - 0.4) / 0.1
    logits = torch.nn.functional.conv2d(normal.permute(2, 0, 1)[None], weight, bias, padding=1)[0]
    label = np.array(Image.open(tmp_path / "out" / "labels" / "e.png"))
    clear = (logits[0] - logits[1]).abs().numpy() > 1e-3
    np.testing.assert_array_equal(label[clear], logits.argmax(0).numpy()[clear])


@pytest.mark.parametrize("name", KINDS)
def test_what_the_network_sees_is_what_numpy_computes(tmp_path, name):
    channels, dtype, _ = KINDS[name]
    make(tmp_path, name)
    data = open_dataset("folder", root=tmp_path, split="train", in_channels=channels, dtype=dtype)
    mean, std = statistics(name)
    config = kind_of(name)
    dataset = replace(config.dataset, mean=mean.tolist(), std=std.tolist())
    model = segmenter(config.model, 2, dataset)
    options = {"batch_size": 2, "seed": 0, "phase": "p", "start_step": 0, "num_steps": 1}
    (batch,) = train_batches(data, transform=TrainTransform(crop=SIZE), **options)
    assert (str(batch.images.dtype), batch.images.shape[1]) == (f"torch.{dtype}", channels)
    for image, letter in zip(model.normalise(batch.images), batch.names, strict=True):
        expected = (picture(letter, channels, dtype).astype(np.float64) / DIVISOR[dtype] - mean) / std
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-5)
    padded = train_transform(replace(config, dataset=replace(dataset, crop=[64, 64], scale=[0.5, 0.5])), "train",
                             augment=True)  # fmt: skip
    image, label = drawn_crop(padded, data[0].image, data[0].label, np.random.default_rng(0))
    (outside,) = np.unique(image[label == 255], axis=0)
    colour = np.array([124, 116, 104]) / 255 if name == "3 uint8 png" and dataset.mean is None else mean
    np.testing.assert_allclose(outside / DIVISOR[dtype], colour, rtol=1e-6, atol=0.51 / DIVISOR[dtype])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_weights_of_rgb_are_extended_as_timm_and_smp_do(tmp_path, channels):
    from segmentation_models_pytorch.encoders import get_encoder
    from segmentation_models_pytorch.encoders._utils import patch_first_conv

    source = get_encoder("resnet18", weights=None)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    rgb = source.conv1.weight.detach().clone()
    net = smp_model("Unet", "resnet18", 2, in_channels=channels, encoder_weights=str(tmp_path / "weights.pt"))
    found = net.encoder.conv1.weight.detach()
    if channels == 1:
        expected = rgb[:, :1] + rgb[:, 1:2] + rgb[:, 2:]
    else:
        expected = torch.stack([rgb[:, c % 3] * 3 / channels for c in range(channels)], 1)
    torch.testing.assert_close(found, expected)
    patch_first_conv(source, channels)
    torch.testing.assert_close(found, source.conv1.weight.detach())
    torch.testing.assert_close(net.encoder.layer1[0].conv1.weight, source.layer1[0].conv1.weight, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_bands_may_be_first_last_or_pages(tmp_path, dtype):
    image = picture("x", 5, dtype)
    pages = [image[..., k : k + 1] for k in range(5)]
    files = {
        "last.tif": tiff(image), "first.tif": tiff(image, planar=True), "big.tif": tiff(image, planar=True, order=">"),
        "bigtiff.tif": tiff(image, big=True), "bigbig.tif": tiff(image, big=True, order=">"),
        "pages.tif": tiff(*pages), "last.npy": image, "first.npy": image.transpose(2, 0, 1),
        "fortran.npy": np.asfortranarray(image), "big.npy": image.astype(image.dtype.newbyteorder(">")),
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content) if path.suffix == ".tif" else np.save(path, content)
        found = read_bands(path, (5, dtype))
        np.testing.assert_array_equal(found, image)
        assert (found.dtype, image_size(path)) == (np.dtype(dtype), SIZE)
    data = SampleSet([Sample("tile", tmp_path / "tile.npy")], table=load_table("camvid"), name="mine", split="train")
    for axes in ((40, 48, 99), (99, 40, 48)):  # more bands than rows
        np.save(tmp_path / "tile.npy", np.ones(axes, dtype))
        data.of_kind((99, dtype)).check_file(0, SIZE)
    with pytest.raises(InputError, match=r"pages\.tif is an array of \w+ of the shape \[40, 48, 1\], but \(H, W, 4\)"):
        read_bands(tmp_path / "pages.tif", (4, dtype))


def test_resizing_and_flipping_are_those_of_each_band():
    rng = np.random.default_rng(0)
    for channels, dtype in ((1, "uint16"), (5, "uint8"), (6, "float32"), (130, "float32")):
        image = (rng.random((40, 48, channels)) * 200).astype(dtype)
        for size in ((13, 17), (60, 50), SIZE):
            found = resize_image(image, size)
            assert (found.shape, found.dtype) == ((*size, channels), image.dtype)
            for k in range(channels):
                alone = resize_image(np.repeat(image[..., k : k + 1], 3, 2), size)[..., 0]
                np.testing.assert_allclose(found[..., k], alone, atol=1e-3 if dtype == "float32" else 1)
        mirrored, _ = drawn_crop(TrainTransform(crop=SIZE, flip=1.0), image, np.zeros(SIZE, np.uint8), rng)
        np.testing.assert_array_equal(mirrored, image[:, ::-1])


@pytest.mark.parametrize("name", ["4 uint8 tif", "5 uint16 tif", "6 float32 npy", "1 uint16 png"])
def test_geometric_transforms_move_all_bands_alike(name):
    """Whatever the values are: none is cut off at 1 or 255."""
    channels, dtype, _ = KINDS[name]
    nodes = {
        "turn": {"_target_": "albumentations.Affine", "rotate": [20.0, 20.0], "p": 1.0},
        "flip": {"_target_": "albumentations.VerticalFlip", "p": 1.0},
        "tilt": {"_target_": "albumentations.Perspective", "scale": [0.05, 0.05], "p": 1.0},
        "bend": {"_target_": "albumentations.ElasticTransform", "alpha": 30.0, "sigma": 8.0, "p": 1.0},
    }
    dataset = kind_of(name).dataset
    augment = build_augment(nodes, crop=SIZE, images=dataset)
    image, label = picture("g", channels, dtype), np.zeros(SIZE, np.uint8)
    moved, void = augment(image, label, 3)
    assert (moved.shape, moved.dtype) == (image.shape, image.dtype)
    inside = void != 255
    assert inside.mean() > 0.5
    for k in range(channels):
        same = np.repeat(image[..., k : k + 1], channels, 2)
        alone, _ = augment(same, label, 3)
        np.testing.assert_allclose(moved[inside][:, k], alone[inside][:, 0], rtol=1e-4, atol=2)
        assert abs(float(moved[inside][:, k].mean()) / float(image[..., k].mean()) - 1) < 0.1


def test_pictures_show_the_first_three_bands():
    image = picture("v", 5, "uint16")
    shown = visible(image)
    assert (shown.shape, shown.dtype) == ((*SIZE, 3), np.uint8)
    for k in range(3):
        order = np.argsort(image[..., k], axis=None)
        assert (np.diff(shown[..., k].ravel()[order].astype(int)) >= 0).all()
        assert (shown[..., k].min(), shown[..., k].max()) == (0, 255)
    grey = visible(picture("v", 2, "float32"))
    assert (grey == grey[..., :1]).all()
    rgb = picture("v", 3, "uint8")
    np.testing.assert_array_equal(visible(rgb), rgb)
    assert visible(np.zeros((4, 5, 1), np.float32)).max() == 0


def five(sample):
    return picture("a", 5, "uint16")


def test_readers_pictures_and_probes_know_the_kind(tmp_path):
    """A load_image of one's own is held to the kind; browse shows it; auto_batch and replay make and take it."""
    lines = make(tmp_path, "5 uint16 tif")
    data = open_dataset("folder", root=tmp_path, split="train")
    own = SampleSet(data.samples, table=data.table, name="own", split="train", load_image=five)
    assert own.of_kind((5, "uint16"))[:2].image(1).shape == (*SIZE, 5)
    with pytest.raises(
        InputError, match=r"a\.tif is an array of uint16 of the shape \[40, 48, 5\], but \(H, W, 3\) of"
    ):
        own.image(0)
    config = kind_of("5 uint16 tif")
    noise = _noise(2, [8, 16], 2, config.images)
    assert (noise.images.shape, noise.images.dtype) == ((2, 5, 8, 16), torch.uint16)
    torch.save(noise._asdict(), tmp_path / "batch.pt")
    assert torch.equal(stored_batch(tmp_path, config.images).images, noise.images)
    with pytest.raises(InputError, match=r"batch\.pt holds no images \(N, 3, H, W\) of uint8 and labels"):
        stored_batch(tmp_path, kind_of("3 uint8 png").images)
    half = [f"dataset.mean={[0.5] * 5}", f"dataset.std={[0.2] * 5}"]
    page = tmp_path / "page.html"
    verb_function("browse")([*SMALL, *lines, *half, "--output", str(page), "--n", "2"])
    assert page.read_text().count("data:image/jpeg") == 2 * 4
