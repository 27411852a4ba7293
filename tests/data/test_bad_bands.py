"""What is refused of images of other channels than three or of more than 8 bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from band_files import KINDS, SMALL, kind_of, make, picture, tiff, write

from segkit.config.compose import compose
from segkit.data import open_dataset
from segkit.data.bands import image_size, read_bands
from segkit.data.decode import MAX_PIXELS, set_pixel_limit
from segkit.data.statistics import count_labels
from segkit.errors import InputError
from segkit.run.build import build_model, train_transform
from segkit.run.start import initial_model


def bad_file(root, name, image):
    write(root / "images" / "train" / name, image)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 8
    path.write_bytes(content)


def header(path, text):
    path.write_bytes(b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n" + bytes(999))


BAD = {
    "other bands": (
        "5 uint16 tif",
        lambda root: bad_file(root, "b.tif", picture("b", 4, "uint16")),
        r"image .*b\.tif is an array of uint16 of the shape \[40, 48, 4\], but \(H, W, 5\) of uint16 is wanted: mend "
        r"the file, or train with dataset\.in_channels and dataset\.dtype ",
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
    "a bit of the header": (
        "6 float32 npy",
        lambda root: flip(root / "images/train/b.npy", 60),
        r"b\.npy is damaged or no image file \(.*EOF in multi-line statement",
    ),
    "a size below zero": (
        "6 float32 npy",
        lambda root: header(root / "images/train/b.npy", b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 9)}"),
        r"b\.npy is damaged or no image file \(memory mapped length must be positive",
    ),
    "endless signs": (
        "6 float32 npy",
        lambda root: header(root / "images/train/b.npy", b"-" * 9000 + b"1"),
        r"b\.npy is damaged or no image file",
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
    data = open_dataset("folder", root=tmp_path, split="train", in_channels=channels, dtype=dtype)
    with pytest.raises(InputError, match=message):
        data[1]
    if name != "not finite":  # which only its pixels say
        with pytest.raises(InputError, match=message):
            count_labels(data, workers=0)


def test_a_file_of_bands_that_is_read_as_rgb_names_the_keys(tmp_path):
    make(tmp_path, "5 uint16 tif")
    with pytest.raises(
        InputError, match=r"a\.tif is damaged .*, or train with dataset\.in_channels and dataset\.dtype as"
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
    return lambda: train_transform(config, "train", augment=True)


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
         r"augment\.x changes colours of 8 bits, but the images are of uint16: set augment\.x=null$"),
        (["dataset.in_channels=5"], r"images of 5 channels of uint8 are not what .*: run `segkit stats` with the"),
        (["dataset.dtype=float32"], r"images of 3 channels of float32 are not what .* the two lines dataset\.mean="),
        (["dataset.in_channels=0"], r"dataset\.in_channels is 0, but must be from 1 to 1000"),
        ([*FIVE, "dataset.std=[1,1,1]"], r"dataset\.mean is .* but 5 values each are wanted"),
        ([*FIVE, "dataset.mean=[0,-0.1,0,0,0]"], r"of values divided by 255, and positive deviations"),
        ([*FIVE, "dataset.std=[1,1,1,1,0]"], r"positive deviations \(1e-30 or more\): set both to what"),
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
