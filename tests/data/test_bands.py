"""Images of other channels than three and of more than 8 bits: every kind goes all the way; what is refused."""

import json
import re
import struct
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segkit.check.check import check
from segkit.cli import verb_function
from segkit.commands.replay import stored_batch
from segkit.config.compose import compose
from segkit.config.dataset import ImageType
from segkit.data import SampleSet, open_dataset
from segkit.data.bands import image_size, read_bands
from segkit.data.decode import MAX_PIXELS, set_pixel_limit
from segkit.data.loader import train_batches
from segkit.data.transforms import TrainTransform, resize_image
from segkit.errors import InputError, Interrupted
from segkit.evaluation.overlay import visible
from segkit.models import Segmenter
from segkit.models.export import export
from segkit.models.exported import read_metadata
from segkit.models.smp_model import smp_model
from segkit.run import pipeline
from segkit.run.auto_batch import _noise
from segkit.run.build import build_augment, build_model, segmenter, train_transform
from segkit.run.splits import open_phases
from segkit.run.start import initial_model

SIZE = (40, 48)
DIVISOR = {"uint8": 255, "uint16": 65535, "float32": 1}
SMALL = [
    "dataset=folder", "model=coplenet", "model.feature_channels=[4,8,16,32,64]", "model.num_groups=2", "workers=0",
    "dataset.crop=[32,32]", "batch_size=2", "limit_steps=2", "loss=cross_entropy", "device=cpu", "precision=fp32",
    "evaluation.pictures=1",
]  # fmt: skip


def tiff(*pages, planar=False, order="<", **tags):
    """An uncompressed TIFF of the arrays (H, W, C), one a page, written from the specification."""
    out = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    for page in pages:
        height, width, num = page.shape
        stored = page.astype(page.dtype.newbyteorder(order))
        places, parts = [], [np.ascontiguousarray(stored[..., k]) for k in range(num)] if planar else [stored]
        for part in parts:
            places.append(len(out))
            out += part.tobytes() + bytes(part.nbytes % 2)
        kind = {"u": 1, "i": 2, "f": 3}[page.dtype.kind]
        entries = {
            256: (4, [width]), 257: (4, [height]), 258: (3, [page.dtype.itemsize * 8] * num), 259: (3, [1]),
            262: (3, [1]), 273: (4, places), 277: (3, [num]), 278: (4, [height]),
            279: (4, [part.nbytes for part in parts]), 284: (3, [2 if planar else 1]), 339: (3, [kind] * num),
            **({338: (3, [0] * (num - 1))} if num > 1 else {}),
            **{int(tag[1:]): (4, [value]) for tag, value in tags.items()},
        }  # fmt: skip
        values = {}
        for tag, (type_, numbers) in entries.items():
            packed = struct.pack(f"{order}{len(numbers)}{'H' if type_ == 3 else 'I'}", *numbers)
            values[tag] = packed.ljust(4, b"\0")
            if len(packed) > 4:
                values[tag] = struct.pack(f"{order}I", len(out))
                out += packed + bytes(len(packed) % 2)
        struct.pack_into(f"{order}I", out, link, len(out))
        out += struct.pack(f"{order}H", len(entries))
        for tag, (type_, numbers) in sorted(entries.items()):
            out += struct.pack(f"{order}HHI", tag, type_, len(numbers)) + values[tag]
        link = len(out)
        out += bytes(4)
    return bytes(out)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    elif path.suffix == ".tif":
        path.write_bytes(tiff(image, planar=image.shape[2] == 5))
    else:
        path.write_bytes(imagecodecs.png_encode(image[..., 0] if image.shape[2] == 1 else image))


def picture(name, channels, dtype):
    """An image whose channels have other means and deviations each."""
    rng = np.random.default_rng([ord(letter) for letter in name])
    values = rng.normal(0.2 + 0.1 * np.arange(channels), 0.02 * (1 + np.arange(channels)), (*SIZE, channels))
    return values.astype(dtype) * 500 if dtype == "float32" else (values.clip(0, 1) * DIVISOR[dtype]).astype(dtype)


KINDS = {
    "3 uint8 png": (3, "uint8", ".png"),
    "4 uint8 tif": (4, "uint8", ".tif"),
    "5 uint16 tif": (5, "uint16", ".tif"),
    "6 float32 npy": (6, "float32", ".npy"),
    "1 uint16 png": (1, "uint16", ".png"),
}
SPLITS = {"train": "abcd", "val": "ef"}


def make(root, name):
    """Write images and masks of a kind; return its overrides."""
    channels, dtype, end = KINDS[name]
    for split, letters in SPLITS.items():
        for letter in letters:
            image = picture(letter, channels, dtype)
            write(root / "images" / split / (letter + end), image.transpose(2, 0, 1) if end == ".npy" else image)
            mask = np.random.default_rng(ord(letter)).integers(0, 2, SIZE, np.uint8)
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "labels" / split / f"{letter}.png")
    (root / "classes.yaml").write_text("names: [ground, tool]\n")
    return [f"dataset.root={root}", f"dataset.in_channels={channels}", f"dataset.dtype={dtype}",
            f"cache_dir={root}/cache", *["dataset.color_jitter=0"] * (name != "3 uint8 png")]  # fmt: skip


def statistics(name):
    """Mean and deviation of each channel of the training images, in float64."""
    channels, dtype, _ = KINDS[name]
    pixels = np.concatenate([picture(letter, channels, dtype).reshape(-1, channels) for letter in SPLITS["train"]])
    return pixels.mean(0, np.float64) / DIVISOR[dtype], pixels.std(0, dtype=np.float64) / DIVISOR[dtype]


def printed(name, root, capsys):
    """The overrides that segkit stats prints for a data set."""
    verb_function("stats")(["workers=0", "dataset=folder", *make(root, name)])
    return re.findall(r"^dataset\.(?:mean|std)=\[.*\]$", capsys.readouterr().out, re.M)


def kind_of(name):
    """A configuration of the kind, whose mean and deviation are 0.5 and 0.25."""
    channels, dtype, _ = KINDS[name]
    half = {} if name == "3 uint8 png" else {"mean": [0.5] * channels, "std": [0.25] * channels}
    config = compose([*SMALL, "dataset.color_jitter=0"])
    dataset = replace(config.dataset, in_channels=channels, dtype=ImageType(dtype), **half)
    return replace(config, dataset=dataset)


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
                             augment=True, ignore_index=255)  # fmt: skip
    image, label = padded(data[0].image, data[0].label, np.random.default_rng(0))
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
        "pages.tif": tiff(*pages), "last.npy": image, "first.npy": image.transpose(2, 0, 1),
        "fortran.npy": np.asfortranarray(image), "big.npy": image.astype(image.dtype.newbyteorder(">")),
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content) if path.suffix == ".tif" else np.save(path, content)
        found = read_bands(path, (5, dtype))
        np.testing.assert_array_equal(found, image)
        assert (found.dtype, image_size(path)) == (np.dtype(dtype), SIZE)
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
        mirrored, _ = TrainTransform(crop=SIZE, flip=1.0)(image, np.zeros(SIZE, np.uint8), rng)
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
    augment = build_augment(nodes, crop=SIZE, images=dataset, ignore_index=255)
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


def bad_file(root, name, image):
    write(root / "images" / "train" / name, image)


BAD = {
    "other bands": (
        "5 uint16 tif",
        lambda root: bad_file(root, "b.tif", picture("b", 4, "uint16")),
        r"image .*b\.tif is an array of uint16 of the shape \[40, 48, 4\], but \(H, W, 5\) of uint16 is wanted: set "
        r"dataset\.in_channels and dataset\.dtype .* or mend the file",
    ),
    "other type": (
        "6 float32 npy",
        lambda root: bad_file(root, "b.npy", picture("b", 6, "float32").astype(np.float64)),
        r"b\.npy is an array of float64 of the shape",
    ),
    "not finite": (
        "6 float32 npy",
        lambda root: bad_file(root, "b.npy", np.where(np.arange(6) == 4, np.nan, picture("b", 6, "float32"))
                              .astype(np.float32)),
        r"b\.npy has 1920 values that are not finite \(NaN, inf\), in channel 4 first: replace them",
    ),
    "objects": (
        "6 float32 npy",
        lambda root: np.save(root / "images/train/b.npy", np.array([{}], object), allow_pickle=True),
        r"b\.npy is damaged or no image file \(Array can't be memory-mapped: Python objects",
    ),
    "no array": (
        "6 float32 npy",
        lambda root: (root / "images/train/b.npy").write_bytes(b"no array at all"),
        r"b\.npy is damaged or no image file \(the magic string is not correct",
    ),
    "cut off": (
        "5 uint16 tif",
        lambda root: (root / "images/train/b.tif").write_bytes(tiff(picture("b", 5, "uint16"), t273=10**6)),
        r"b\.tif is damaged or no image file",
    ),
    "no page": (
        "5 uint16 tif",
        lambda root: (root / "images/train/b.tif").write_bytes(tiff(picture("b", 5, "uint16"))[:20]),
        r"b\.tif is damaged or no image file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_another_kind_is_named(tmp_path, name):
    kind, damage, message = BAD[name]
    make(tmp_path, kind)
    channels, dtype, _ = KINDS[kind]
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        open_dataset("folder", root=tmp_path, split="train", in_channels=channels, dtype=dtype)[1]


def test_a_file_of_bands_that_is_read_as_rgb_names_the_keys(tmp_path):
    make(tmp_path, "5 uint16 tif")
    with pytest.raises(
        InputError, match=r"a\.tif is damaged .*, or set dataset\.in_channels and dataset\.dtype to what"
    ):
        open_dataset("folder", root=tmp_path, split="train")[0]


def test_a_header_beyond_the_limit_allocates_nothing(tmp_path):
    """Also where the file is as long as it says: of a sparse one, nothing is on the disk."""
    side, head = 40_000, {"descr": "<u2", "fortran_order": False, "shape": (40_000, 40_000, 5)}
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        file.truncate(file.tell() + side * side * 10)
    (tmp_path / "a.tif").write_bytes(tiff(picture("a", 5, "uint16"), t256=side, t257=side))
    for end in ("npy", "tif"):
        for read in (image_size, lambda path: read_bands(path, (5, "uint16"))):
            with pytest.raises(InputError, match=rf"a\.{end} has 40000x40000 pixels, but at most 200,000,000 are allo"):
                read(tmp_path / f"a.{end}")
    set_pixel_limit(1919)
    try:
        write(tmp_path / "b.png", picture("b", 1, "uint16"))
        with pytest.raises(InputError, match=r"b\.png has 48x40 pixels, but at most 1,919"):
            read_bands(tmp_path / "b.png", (1, "uint16"))
    finally:
        set_pixel_limit(MAX_PIXELS)


def refused(overrides, **nodes):
    config = compose([*SMALL, "dataset.root=nowhere", *overrides])
    return lambda: train_transform(config, "train", augment=True, ignore_index=255)


FIVE = ["dataset.in_channels=5", "dataset.mean=[0,0,0,0,0]", "dataset.std=[1,1,1,1,1]"]
HUE = "+augment.x={_target_:albumentations.HueSaturationValue,p:1.0}"
BLUR = "+augment.x={_target_:albumentations.GaussNoise,p:1.0}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (FIVE, r"dataset\.color_jitter is 0\.5, but there are no colours to jitter in images of 5 channels of uint8: "
               r"set dataset\.color_jitter=0$"),
        ([*FIVE, "dataset.color_jitter=0", HUE], r"augment\.x cannot run on a crop of 32x32 with 5 channels of uint8"),
        ([*FIVE, "dataset.color_jitter=0", "dataset.dtype=uint16", BLUR],
         r"augment\.x changes colours of 8 bits, but the images are of uint16: remove it$"),
        (["dataset.in_channels=5"], r"images of 5 channels of uint8 are not what .*: run `segkit stats` with the"),
        (["dataset.dtype=float32"], r"images of 3 channels of float32 are not what .* the two lines dataset\.mean="),
        (["dataset.in_channels=0"], r"dataset\.in_channels is 0, but must be from 1 to 1000"),
        ([*FIVE, "dataset.std=[1,1,1]"], r"dataset\.mean is .* but 5 values each are wanted"),
        ([*FIVE, "dataset.std=[1,1,1,1,0]"], r"positive deviations: set both to what `segkit stats` prints"),
        ([*FIVE, "dataset.mean=[2,1,1,1,1]"], r"of values divided by 255"),
        (["dataset.mean=[0,0,0]"], r"dataset\.mean is \[0\.0, 0\.0, 0\.0\] and dataset\.std None, but 3 values each"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_first_step(overrides, message):
    with pytest.raises(InputError, match=message):
        refused(overrides)()


def test_models_and_weights_of_other_channels_are_refused(tmp_path, capsys):
    config, rgb = kind_of("5 uint16 tif"), kind_of("3 uint8 png")
    with pytest.raises(InputError, match=r"COPLENet takes images of 3 channels, but dataset\.in_channels is 5: leave"):
        build_model(replace(config, model=config.model | {"in_channels": 3}), 2)
    torch.save(build_model(rgb, 2).net.state_dict(), tmp_path / "rgb.pt")
    with pytest.raises(InputError, match=r"\(4, 3, 3, 3\) instead of \(4, 5, 3, 3\).*dataset\.in_channels"):
        initial_model(replace(config, init_from=str(tmp_path / "rgb.pt")), ["a", "b"], torch.device("cpu"))
    with pytest.raises(InputError, match=r"in_conv.*\(4, 3, 3, 3\) instead of \(4, 5, 3, 3\).*dataset\.in_channels"):
        build_model(replace(config, model=config.model | {"weights": str(tmp_path / "rgb.pt")}), 2)


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
