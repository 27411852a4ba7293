"""One file, one meaning: training, check and prediction see the same pixels, those that the documented rules give."""

from __future__ import annotations

import struct

import band_files
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segkit.check.audit import _digest, look_at
from segkit.commands import predict, scorers
from segkit.config.dataset import DatasetConfig
from segkit.data import Sample, SampleSet
from segkit.data.bands import image_size
from segkit.data.decode import orientation, read_index_png, read_rgb
from segkit.data.labels import table_from_dict
from segkit.data.loader import eval_batches, train_batches
from segkit.data.transforms import EvalTransform, TrainTransform
from segkit.errors import InputError

RNG = np.random.default_rng(3)
SIZE = (12, 20)
RGB = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = RNG.integers(0, 256, SIZE, dtype=np.uint8)
ALPHA[:, :5], ALPHA[:, 5:9] = 0, 255
INDEX = RNG.integers(0, 16, SIZE, dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 2**16, (*SIZE, 4), dtype=np.uint16)
TABLE = table_from_dict({"name": "toy", "classes": ["a"], "palette": [[0, 0, 0]], "raw_to_train": {"0": 0}})


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def over_white(colours, alpha):
    share = alpha[..., None].astype(float) / 255
    return np.floor(colours * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def pillow(pixels, mode=None, *, palette=None, **options):
    def write(path):
        image = Image.fromarray(pixels)
        if palette is not None:
            image.putpalette(palette.tobytes())
        (image if mode is None else image.convert(mode)).save(path, **options)

    return write


def opencv(pixels):
    channels = {2: [0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}
    return lambda path: cv2.imwrite(str(path), pixels[..., channels[pixels.shape[2]]] if pixels.ndim == 3 else pixels)


def turned(number):
    exif = Image.Exif()
    exif[274] = number
    return exif


def tiff(pixels, *, photometric, sample_format=1):
    """A TIFF of one strip a plane (H, W) or (planes, H, W), written by hand.

    Pillow writes neither 16 bits whose 0 is white, nor signed ones, nor separate planes.
    """

    def write(path):
        planes, height, width = (1,) * (3 - pixels.ndim) + pixels.shape
        size = pixels.nbytes // planes
        starts, places = [8 + size * plane for plane in range(planes)], {}
        tags = [(256, [width]), (257, [height]), (258, [8 * pixels.itemsize] * planes), (259, [1])]
        tags += [(262, [photometric]), (273, starts), (277, [planes]), (278, [height]), (279, [size] * planes)]
        tags += [(284, [2 if planes > 1 else 1]), (339, [sample_format] * planes)]
        beyond = b""
        for tag, values in tags:
            places[tag] = values[0] if len(values) == 1 else 8 + pixels.nbytes + len(beyond)
            beyond += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
        entries = b"".join(struct.pack("<HHII", tag, 4, len(values), places[tag]) for tag, values in tags)
        head = b"II*\0" + struct.pack("<I", 8 + pixels.nbytes + len(beyond))
        directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
        path.write_bytes(head + pixels.tobytes() + beyond + directory)

    return write


CASES = {
    "grey.png": (pillow(GREY), three(GREY)),
    "grey.bmp": (pillow(GREY), three(GREY)),
    "grey.tif": (pillow(GREY), three(GREY)),
    "grey.pgm": (pillow(GREY), three(GREY)),
    "grey_white_is_zero.tif": (tiff(GREY, photometric=0), three(255 - GREY)),
    "grey_alpha.png": (pillow(np.dstack([GREY, ALPHA])), over_white(three(GREY), ALPHA)),
    "grey_alpha.tif": (pillow(np.dstack([GREY, ALPHA])), over_white(three(GREY), ALPHA)),
    "grey_transparent.png": (
        pillow(GREY, transparency=int(GREY[3, 4])),
        three(np.where(GREY[3, 4] == GREY, 255, GREY)),
    ),
    "bits.png": (pillow(GREY > 99), three(255 * (GREY > 99).astype(np.uint8))),
    "bits.tif": (pillow(GREY > 99), three(255 * (GREY > 99).astype(np.uint8))),
    "palette.png": (pillow(INDEX, palette=COLOURS), COLOURS[INDEX]),
    "palette4.png": (pillow(INDEX, palette=COLOURS[:16], bits=4), COLOURS[INDEX]),
    "palette.bmp": (pillow(INDEX, palette=COLOURS), COLOURS[INDEX]),
    "palette.tif": (pillow(INDEX, palette=COLOURS), COLOURS[INDEX]),
    "palette.gif": (pillow(INDEX, palette=COLOURS), COLOURS[INDEX]),
    "palette_transparent.png": (
        pillow(INDEX, palette=COLOURS, transparency=5),
        np.where((INDEX == 5)[..., None], 255, COLOURS[INDEX]),
    ),
    "palette_transparent.gif": (
        pillow(INDEX, palette=COLOURS, transparency=5),
        np.where((INDEX == 5)[..., None], 255, COLOURS[INDEX]),
    ),
    "rgb.png": (pillow(RGB), RGB),
    "rgb.bmp": (pillow(RGB), RGB),
    "rgb.tif": (pillow(RGB), RGB),
    "rgb_planes.tif": (tiff(np.ascontiguousarray(np.moveaxis(RGB, 2, 0)), photometric=2), RGB),
    "rgb_packed.tiff": (pillow(RGB, compression="tiff_lzw"), RGB),
    "rgb.ppm": (pillow(RGB), RGB),
    "rgb.webp": (pillow(RGB, lossless=True), RGB),
    "rgb_transparent.png": (
        pillow(RGB, transparency=tuple(RGB[2, 2].tolist())),
        np.where((RGB[2, 2] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "rgba.png": (pillow(np.dstack([RGB, ALPHA])), over_white(RGB, ALPHA)),
    "rgba.tif": (pillow(np.dstack([RGB, ALPHA])), over_white(RGB, ALPHA)),
    "rgba.webp": (pillow(np.dstack([RGB, ALPHA]), lossless=True, exact=True), over_white(RGB, ALPHA)),
    "rgba_opaque.png": (pillow(np.dstack([RGB, np.full(SIZE, 255, np.uint8)])), RGB),
    "grey16.png": (pillow(DEEP[..., 0]), three((DEEP[..., 0] >> 8).astype(np.uint8))),
    "grey16.tif": (pillow(DEEP[..., 0]), three((DEEP[..., 0] >> 8).astype(np.uint8))),
    "grey16.pgm": (opencv(DEEP[..., 0]), three((DEEP[..., 0] >> 8).astype(np.uint8))),
    "grey16_packed.tif": (
        pillow(DEEP[..., 0], compression="tiff_lzw"),
        three((DEEP[..., 0] >> 8).astype(np.uint8)),
    ),
    "grey16_white_is_zero.tif": (
        tiff(DEEP[..., 0], photometric=0),
        three(255 - (DEEP[..., 0] >> 8).astype(np.uint8)),
    ),
    "grey32.tif": (pillow(DEEP[..., 0].astype(np.int32)), three((DEEP[..., 0] >> 8).astype(np.uint8))),
    "rgb16.png": (opencv(DEEP[..., :3]), (DEEP[..., :3] >> 8).astype(np.uint8)),
    "rgb16.tif": (opencv(DEEP[..., :3]), (DEEP[..., :3] >> 8).astype(np.uint8)),
    "rgba16.png": (opencv(DEEP), over_white(DEEP[..., :3] >> 8, DEEP[..., 3] >> 8)),
    "turned.png": (pillow(RGB, exif=turned(6)), RGB),
    "turned.webp": (pillow(RGB, lossless=True, exif=turned(6)), RGB),
    **{f"turned{number}.tif": (pillow(RGB, tiffinfo={274: number}), RGB) for number in range(2, 9)},
    "turned_packed.tif": (pillow(RGB, tiffinfo={274: 6}, compression="tiff_lzw"), RGB),
    "turned16.tif": (pillow(DEEP[..., 0], tiffinfo={274: 8}), three((DEEP[..., 0] >> 8).astype(np.uint8))),
    # Lossy, or with colours that have no one conversion: only sameness and nearness are asked for.
    "photo.jpg": (pillow(RGB, quality=95), None),
    "grey.jpg": (pillow(GREY, quality=95), None),
    "cmyk.jpg": (pillow(RGB, "CMYK", quality=95), None),
    "cmyk.tif": (pillow(RGB, "CMYK"), None),
    "turned.jpg": (pillow(RGB, quality=95, exif=turned(6)), None),
}


@pytest.fixture
def pair(tmp_path, request):
    """A data set of one pair, its image as the case wants it, and the pixels that it should have."""
    write, expected = CASES[request.param]
    (tmp_path / "in").mkdir()
    image, label = tmp_path / "in" / request.param, tmp_path / "label.png"
    write(image)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(label)
    return SampleSet([Sample("x", image, (label,))], table=TABLE, name="toy", split="train"), expected


def trained_on(data):
    transform = TrainTransform(crop=SIZE)
    (batch,) = train_batches(data, transform=transform, batch_size=1, seed=0, phase="p", start_step=0, num_steps=1)
    return batch.images[0].permute(1, 2, 0).numpy()


def predicted_on(data, folder, monkeypatch):
    seen = []

    def scorer(images):
        seen.append(images)
        return images.float()

    model = scorers.Loaded(
        score=scorer, device=torch.device("cpu"), dataset=DatasetConfig(name="toy", reader={}, crop=[*SIZE]),
        classes=("a", "b", "c"), palette=np.zeros((3, 3), np.uint8), decide=None,
    )  # fmt: skip
    monkeypatch.setattr(scorers, "load", lambda *_: model)
    arguments = ["RUN", "--input", f"{data.samples[0].image}", "--output", f"{folder}", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        predict.run(arguments)
    assert ended.value.code == 0
    return torch.cat(seen)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_all_ways_see_the_same_pixels(pair, tmp_path, monkeypatch):
    data, expected = pair
    path = data.samples[0].image
    if expected is None:
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.abs(read_rgb(path).astype(int) - expected).max() <= 1
        expected = read_rgb(path)
    assert image_size(path) == SIZE
    np.testing.assert_array_equal(trained_on(data), expected)
    (batch,) = eval_batches(data, transform=EvalTransform())
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected)
    look = look_at(data, 0)
    assert (look.errors, look.image_size) == ({}, SIZE)
    assert look.digest == _digest(expected)
    np.testing.assert_array_equal(predicted_on(data, tmp_path / "out", monkeypatch), expected)


@pytest.mark.parametrize("pair", ["turned.jpg", "photo.jpg"], indirect=True)
def test_prediction_says_that_orientation_tags_are_ignored(pair, tmp_path, monkeypatch, capsys):
    predicted_on(pair[0], tmp_path / "out", monkeypatch)
    said = "note: 1 of the images have an orientation tag, which is ignored as in training" in capsys.readouterr().err
    assert said == (pair[0].samples[0].image.name == "turned.jpg")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (pillow(GREY.astype(np.float32)), r"x\.tif holds floating-point values; convert it to 8 or 16 bits"),
        (pillow(np.full(SIZE, 70_000, np.int32)), r"x\.tif holds values beyond 16 bits; convert it to 8 or 16 bits"),
        (tiff(np.full(SIZE, -1, np.int16), photometric=1, sample_format=2), r"x\.tif holds values beyond 16 bits"),
        (
            tiff(np.full(SIZE, -1, np.int8), photometric=1, sample_format=2),
            r"x\.tif holds negative values .*convert it",
        ),
        (
            tiff(np.zeros((3, *SIZE), np.uint16), photometric=2),
            r"x\.tif is a TIFF of separate planes of 16 bits: convert",
        ),
        (
            tiff(np.zeros(SIZE, np.float64), photometric=1, sample_format=3),
            r"of 8 or 16 bits a channel, BigTIFF .*; convert another",
        ),
        (
            lambda path: path.write_bytes(band_files.tiff(GREY[..., None], t273=0)),
            r"x\.tif is damaged .*\(some of its strips or tiles are missing\)",
        ),
        (
            lambda path: path.write_bytes(band_files.tiff(GREY[..., None], big=True, order=">")),
            r"TIFF, .*, BigTIFF with the lesser byte first; convert another form",
        ),
    ],
    ids=["float", "32 bits", "negative", "negative 8 bits", "16 bits in planes", "64 bits", "sparse", "BigTIFF"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_what_has_no_meaning_as_8_bits_is_refused(tmp_path, write, message):
    write(tmp_path / "x.tif")
    with pytest.raises(InputError, match=message):
        read_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize("number", range(2, 9))
def test_labels_of_turned_tiffs_are_read_as_stored(tmp_path, number):
    pillow(INDEX, tiffinfo={274: number})(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.tif"), INDEX)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_label_whose_0_is_white_has_the_stored_values(tmp_path, kind):
    tiff(INDEX.astype(kind), photometric=0)(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.tif", deep=True), INDEX)


@pytest.mark.parametrize(("name", "options"), [
    ("x.tif", {"compression": "jpeg"}), ("x.jp2", {"irreversible": True}), ("x.jpg", {}), ("x.webp", {}),
])  # fmt: skip
def test_lossy_labels_are_refused_whatever_holds_them(tmp_path, name, options):
    pillow(GREY, **options)(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"label .*x\.png is a .*does not keep class indices exactly"):
        read_index_png(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
def test_orientation_tags_are_found(tmp_path, name):
    options = {"tiffinfo": {274: 8}} if name.endswith("tif") else {"exif": turned(8)}
    pillow(RGB, **options)(tmp_path / name)
    pillow(RGB)(tmp_path / f"plain_{name}")
    (tmp_path / f"broken_{name}").write_bytes((tmp_path / name).read_bytes()[:40])
    found = [orientation(tmp_path / f"{kind}{name}") for kind in ("", "plain_", "broken_", "missing_")]
    assert found == [8, 1, 1, 1]


def test_the_first_page_is_read(tmp_path):
    pages = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_rgb(tmp_path / "x.tif"), RGB)


@pytest.mark.parametrize("second", [INDEX, INDEX[::2, ::2]], ids=["a class", "an overview"])
def test_a_label_has_one_page(tmp_path, second):
    pages = [Image.fromarray(np.ascontiguousarray(page)) for page in (INDEX, second)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    if second is INDEX:
        with pytest.raises(InputError, match=r"x\.tif has several pages, perhaps one a class, but one index mask"):
            read_index_png(tmp_path / "x.tif", deep=True)
    else:
        np.testing.assert_array_equal(read_index_png(tmp_path / "x.tif", deep=True), INDEX)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_first_channel_of_a_colour_mask_is_taken_where_it_is_asked_for(tmp_path, channels):
    pillow(np.dstack([RGB, ALPHA])[..., :channels].copy())(tmp_path / "x.png")
    np.testing.assert_array_equal(read_index_png(tmp_path / "x.png", first_channel=True), RGB[..., 0])
