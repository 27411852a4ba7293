"""Reading single files: exact indices, exact RGB, and one sentence for every kind of bad file."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segkit.data.bands import image_size
from segkit.data.decode import read_colours, read_index_png, read_rgb
from segkit.errors import InputError

RNG = np.random.default_rng(0)
MASK = RNG.integers(0, 256, (21, 34), dtype=np.uint8)
PHOTO = np.clip(RNG.normal(120, 30, (40, 56, 3)), 0, 255).astype(np.uint8)
COLOURS = RNG.integers(0, 256, 768).tolist()


def saved(path, array, *, palette=None, mode=None, **options):
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    if mode is not None:
        image = image.convert(mode)
    image.save(path, **options)
    return path


def test_grey_and_palette_labels_give_their_indices(tmp_path):
    grey = saved(tmp_path / "grey.png", MASK)
    palette = saved(tmp_path / "palette.png", MASK, palette=COLOURS)
    clear = saved(tmp_path / "clear.png", MASK, palette=COLOURS, transparency=0)
    for path in (grey, palette, clear):
        label = read_index_png(path)
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, MASK)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_labels_of_few_bits_give_their_indices(tmp_path, bits):
    mask = MASK % 2**bits
    path = saved(tmp_path / "few.png", mask, palette=COLOURS[: 3 * 2**bits], bits=bits)
    np.testing.assert_array_equal(read_index_png(path), mask)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_labels_of_few_bits_give_the_stored_samples(tmp_path, bits):
    mask = MASK[:, :32] % 2**bits
    path = tmp_path / "few.png"
    path.write_bytes(grey_png(mask, bits))
    np.testing.assert_array_equal(read_index_png(path), mask)


def grey_png(mask, bits):
    """A grey PNG of 1, 2 or 4 bits, written by hand: Pillow writes only some of them."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    per_byte = 8 // bits
    packed = np.zeros((mask.shape[0], mask.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= mask[:, place::per_byte] << (8 - bits * (place + 1))
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_mask_is_refused(tmp_path, mode):
    path = saved(tmp_path / "colour.png", MASK, mode=mode)
    with pytest.raises(InputError, match=rf"colour\.png is a colour image \(mode {mode}\), but an index mask"):
        read_index_png(path)


def test_16_bit_mask_is_refused(tmp_path):
    path = saved(tmp_path / "deep.png", MASK.astype(np.uint16) * 256)
    with pytest.raises(InputError, match=r"deep\.png has 16 or more bits per pixel"):
        read_index_png(path)


def test_lossy_mask_is_refused(tmp_path):
    path = saved(tmp_path / "mask.jpg", MASK)
    with pytest.raises(InputError, match=r"mask\.jpg is a JPEG file, which does not keep class indices"):
        read_index_png(path)


@pytest.mark.parametrize("read", [read_index_png, read_rgb])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_png(tmp_path, read, share):
    whole = saved(tmp_path / "whole.png", RNG.integers(0, 9, (64, 64), dtype=np.uint8)).read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"cut\.png is damaged or no image file .*; copy or unpack it again"):
        read(cut)


@pytest.mark.parametrize("shrink", [1, 2])
def test_truncated_jpeg(tmp_path, shrink):
    whole = saved(tmp_path / "whole.jpg", PHOTO).read_bytes()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(InputError, match=r"cut\.jpg is damaged"):
        read_rgb(cut, shrink=shrink)


@pytest.mark.parametrize(("read", "role"), [(read_index_png, "label"), (read_rgb, "image"), (image_size, "image")])
def test_empty_missing_folder_and_foreign_files(tmp_path, read, role):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("this is no picture " * 5)
    with pytest.raises(InputError, match=rf"{role} .*empty\.png is empty \(0 bytes\)"):
        read(tmp_path / "empty.png")
    with pytest.raises(InputError, match=rf"{role} .*gone\.png does not exist.*dataset\.root"):
        read(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"folder\.png is a folder"):
        read(tmp_path / "folder.png")
    with pytest.raises(InputError, match=r"text\.png is damaged or no image file"):
        read(tmp_path / "text.png")


@pytest.mark.parametrize("read", [read_index_png, read_rgb])
def test_unreadable_file(tmp_path, read, monkeypatch):
    path = saved(tmp_path / "locked.png", MASK)
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser may read it all the same
        opened = type(path).open

        def refuse(self, *arguments, **options):
            if self == path:
                raise PermissionError(13, "Permission denied")
            return opened(self, *arguments, **options)

        monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(InputError, match=r"locked\.png may not be read by this user; run `chmod"):
        read(path)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_rgb_is_exact_for_lossless_formats(tmp_path, name):
    np.testing.assert_array_equal(read_rgb(saved(tmp_path / name, PHOTO)), PHOTO)


def test_rgb_of_other_modes_equals_pillow(tmp_path):
    paths = [
        saved(tmp_path / "grey.png", PHOTO[..., 0]),
        saved(tmp_path / "grey.jpg", PHOTO[..., 0]),
        saved(tmp_path / "palette.png", MASK, palette=COLOURS),
        saved(tmp_path / "photo.jpg", PHOTO, quality=90),
    ]
    for path in paths:
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        image = read_rgb(path)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected, err_msg=path.name)


def test_16_bit_image_keeps_the_upper_byte(tmp_path):
    import cv2

    deep = RNG.integers(0, 2**16, (9, 11, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_rgb(tmp_path / "deep.png"), deep >> 8)


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = saved(tmp_path / "turned.jpg", PHOTO, exif=exif)
    assert read_rgb(path).shape == PHOTO.shape
    assert image_size(path) == PHOTO.shape[:2]


@pytest.mark.parametrize("shrink", [2, 4])
def test_shrunk_jpeg_is_near_the_area_average(tmp_path, shrink):
    import cv2

    smooth = cv2.GaussianBlur(RNG.normal(120, 400, (75, 101, 3)).astype(np.float32), (0, 0), 5)
    path = saved(tmp_path / "smooth.jpg", np.clip(smooth, 0, 255).astype(np.uint8), quality=98, subsampling=0)
    full, small = read_rgb(path).astype(float), read_rgb(path, shrink=shrink).astype(float)
    assert small.shape == (-(-75 // shrink), -(-101 // shrink), 3)
    rows, columns = 75 // shrink, 101 // shrink
    blocks = full[: rows * shrink, : columns * shrink].reshape(rows, shrink, columns, shrink, 3).mean((1, 3))
    assert np.abs(blocks - small[:rows, :columns]).mean() < 1.0


def test_shrink_leaves_other_formats_whole(tmp_path):
    np.testing.assert_array_equal(read_rgb(saved(tmp_path / "a.png", PHOTO), shrink=4), PHOTO)


def test_failing_disk(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", MASK)
    stat = type(path).stat

    def fail(self, **options):
        if self == path:
            raise OSError(5, "Input/output error")
        return stat(self, **options)

    monkeypatch.setattr(type(path), "stat", fail)
    with pytest.raises(InputError, match=r"label .*a\.png cannot be read: Input/output error; check the disk"):
        read_index_png(path)


def png_chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"gAMA", struct.pack(">I", 30_000)),
        png_chunk(b"sRGB", b"\x00"),
        png_chunk(b"tRNS", b"\x00\x07\x00\x08\x00\x09"),  # one colour is transparent
        png_chunk(b"sBIT", b"\x05\x06\x05"),
        png_chunk(b"zTXt", b"Raw profile\0\0" + zlib.compress(bytes(2**21))),
    ],
    ids=["gamma", "srgb", "transparent", "significant bits", "long text"],
)
def test_chunks_beside_the_samples_change_no_sample(tmp_path, chunk):
    path = saved(tmp_path / "a.png", PHOTO)
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])  # after IHDR
    np.testing.assert_array_equal(read_rgb(path), PHOTO)
    np.testing.assert_array_equal(read_colours(path), PHOTO)
    assert image_size(path) == PHOTO.shape[:2]


def test_transparent_grey_value_in_a_label_changes_no_index(tmp_path):
    path = saved(tmp_path / "a.png", MASK)
    content = path.read_bytes()
    path.write_bytes(content[:33] + png_chunk(b"tRNS", b"\x00\x03") + content[33:])
    np.testing.assert_array_equal(read_index_png(path), MASK)


def test_interlaced_png_is_read_like_any_other(tmp_path):
    """Adam7: seven passes, each a small image of its own, with a filter byte before each row."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\x00" + row.tobytes() for top, left, dy, dx in passes for row in MASK[top::dy, left::dx] if row.size
    )
    height, width = MASK.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    path = tmp_path / "interlaced.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read_index_png(path), MASK)


@pytest.mark.parametrize("read", [read_rgb, read_index_png])
def test_no_damaged_byte_goes_unseen(tmp_path, read):
    """PNG has checksums: whatever byte of the samples is wrong, the answer is the sentence, not other pixels."""
    original = PHOTO if read is read_rgb else MASK
    path = saved(tmp_path / "a.png", original)
    content = path.read_bytes()
    start, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for place in np.linspace(start, end - 1, 25).astype(int).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"a\.png is damaged or no image file"):
            read(path)
