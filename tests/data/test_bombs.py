"""Small files that claim to be huge: one sentence, and no memory taken, wherever they are met."""

from __future__ import annotations

import io
import multiprocessing
import resource
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from band_files import tiff
from PIL import Image
from scipy.io import savemat

from segkit.check.audit import audit_split
from segkit.data import Sample, SampleSet, decode
from segkit.data.bands import image_size
from segkit.data.decode import MAX_PIXELS, pixel_limit, read_index_png, read_rgb, set_pixel_limit
from segkit.data.files import find_images
from segkit.data.labels import table_from_dict
from segkit.data.loader import train_batches
from segkit.data.matlab import read_mat
from segkit.data.statistics import count_labels
from segkit.data.transforms import TrainTransform
from segkit.data.workers import start_worker
from segkit.errors import InputError
from segkit.evaluation.inference import Inference
from segkit.evaluation.predict import Predictor, predict_files
from segkit.files import written_beside

SIDE = 60_000
TABLE = table_from_dict({"name": "toy", "classes": ["a"], "palette": [[0, 0, 0]], "raw_to_train": {"0": 0}})


@pytest.fixture(autouse=True)
def _limit():
    yield
    set_pixel_limit(MAX_PIXELS)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=SIDE, height=SIDE, *, bits=8, colours=2):
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def patched(format, place, packed, **options):
    """A real small file whose size in the header is overwritten."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stream, format, **options)
    content = bytearray(stream.getvalue())
    start = place(content) if callable(place) else place
    content[start : start + len(packed)] = packed
    return bytes(content)


def tiff_sizes():
    content = bytearray(patched("TIFF", 0, b"II"))
    for tag in (256, 257):
        place = content.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in content else None
        if place is None:
            place = content.index(struct.pack("<HHI", tag, 3, 1))
            content[place + 2 : place + 4] = struct.pack("<H", 4)
        content[place + 8 : place + 12] = struct.pack("<I", SIDE)
    return bytes(content)


def riff(kind, data):
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBP" + kind + struct.pack("<I", len(data)) + data


def webp():
    return riff(b"VP8X", bytes(4) + 2 * (16_382).to_bytes(3, "little") + bytes(20))


def webp_lossless():
    return riff(b"VP8L", b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(20))


BOMBS = {
    "rgb.png": png(),
    "grey.png": png(colours=0),
    "palette.png": png(colours=3),
    "rgba.png": png(colours=6),
    "deep.png": png(bits=16),
    "wide.png": png(2**31 - 1, 1),
    "x.jpg": patched("JPEG", lambda c: c.index(b"\xff\xc0") + 5, struct.pack(">HH", SIDE, SIDE)),
    "x.bmp": patched("BMP", 18, struct.pack("<ii", SIDE, SIDE)),
    "x.tif": tiff_sizes(),
    "tiles.tif": tiff(np.zeros((8, 8, 1), np.uint8), t322=SIDE, t323=SIDE),
    "x.gif": patched("GIF", 6, struct.pack("<HH", SIDE, SIDE)),
    "x.ppm": b"P6 60000 60000 255\n" + bytes(30),
    "x.webp": webp(),
    "lossless.webp": webp_lossless(),
}


@pytest.fixture(params=BOMBS)
def bomb(request, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(BOMBS[request.param])
    return path


def sentence(role, path):
    return (
        rf"{role} .*{path.name} has [\dx,]+ pixels, but at most 200,000,000 are allowed, .*; remove it, or set max_pix"
    )


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_bomb_is_one_sentence_and_takes_no_memory(bomb):
    assert bomb.stat().st_size < 1000
    before = peak()
    for read in (read_rgb, partial(read_rgb, shrink=8), image_size):
        with pytest.raises(InputError, match=sentence("image", bomb)):
            read(bomb)
    if bomb.suffix not in (".jpg", ".webp"):
        with pytest.raises(InputError, match=sentence("label", bomb)):
            read_index_png(bomb)
    assert peak() - before < 2**26


def test_the_smallest_png_of_all():
    assert len(png()) < 80


def dataset(folder, *, image=None, label=None):
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    mask = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(mask, "PNG")
    samples = []
    for name, pixels, classes in (("good", None, None), ("bad", image, label)):
        files = folder / f"{name}.png", folder / f"{name}_label.png"
        files[0].write_bytes(pixels or picture.getvalue())
        files[1].write_bytes(classes or mask.getvalue())
        samples.append(Sample(name, files[0], (files[1],)))
    return SampleSet(samples, table=TABLE, name="toy", split="train")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_counting_and_check_say_it_once(tmp_path, workers):
    data = dataset(tmp_path, image=png(), label=png(colours=0))
    options = {"batch_size": 2, "seed": 0, "phase": "p", "start_step": 0, "num_steps": 1, "workers": workers}
    with pytest.raises(InputError, match=sentence("label", Path("bad_label.png"))):
        list(train_batches(data, transform=TrainTransform(crop=(8, 8)), **options))
    with pytest.raises(InputError, match=sentence("label", Path("bad_label.png"))):
        count_labels(data, workers=workers)
    audit = audit_split(data, workers=workers)
    assert set(audit.errors["image"]) == set(audit.errors["label"]) == {1}
    assert "bad.png has 60000x60000 pixels" in audit.errors["image"][1]
    assert "bad_label.png has 60000x60000 pixels" in audit.errors["label"][1]


def test_prediction_reports_it_and_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    dataset(tmp_path / "in", image=png())
    num_written, failed = predict_files(
        {"prediction": Predictor(lambda images: images.float(), Inference())},
        find_images(tmp_path / "in"),
        tmp_path / "out",
        read_image=read_rgb,
        written_beside=written_beside,
        classes=["a", "b", "c"],
        palette=np.zeros((3, 3)),
    )
    assert num_written == 3
    assert [path.name for path, _ in failed] == ["bad.png"]
    assert "bad.png has 60000x60000 pixels" in failed[0][1]


def test_the_limit_can_be_raised_and_lowered(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(path)
    assert pixel_limit() == MAX_PIXELS
    set_pixel_limit(1199)
    for read in (read_rgb, read_index_png, image_size):
        with pytest.raises(InputError, match=r"a\.png has (40x30|1,200) pixels, but at most 1,199 are allowed"):
            read(path)
    set_pixel_limit(1200)
    assert read_rgb(path).shape == (30, 40, 3)
    set_pixel_limit(2**40)
    (tmp_path / "b.png").write_bytes(png(2**31 - 1, 1, colours=0))  # more than OpenCV takes, and cut off
    with pytest.raises(InputError, match=r"b\.png is damaged or no image file"):
        read_rgb(tmp_path / "b.png")


def worker_limit(_):
    return decode.pixel_limit()


def test_a_spawned_worker_gets_the_limit():
    set_pixel_limit(1234)
    with multiprocessing.get_context("spawn").Pool(1, partial(start_worker, limit=pixel_limit())) as pool:
        assert pool.map(worker_limit, [0]) == [1234]


def test_the_loader_hands_the_limit_to_its_workers(tmp_path):
    data = dataset(tmp_path)
    set_pixel_limit(63)
    options = {"batch_size": 2, "seed": 0, "phase": "p", "start_step": 0, "num_steps": 1, "workers": 1}
    with pytest.raises(InputError, match=r"has 8x8 pixels, but at most 63 are allowed"):
        list(train_batches(data, transform=TrainTransform(crop=(8, 8)), **options))
    with pytest.raises(InputError, match=r"has 8x8 pixels, but at most 63 are allowed"):
        count_labels(data, workers=2)


def test_a_matlab_file_that_would_become_huge_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"S": np.zeros((2000, 2000))}, do_compression=True)
    assert path.stat().st_size < 60_000
    assert read_mat(path, ["S"])["S"].shape == (2000, 2000)
    set_pixel_limit(1000_000)
    with pytest.raises(InputError, match=r"a\.mat becomes more than 8,000,000 bytes, those of 1,000,000 pixels"):
        read_mat(path, ["S"])
    (tmp_path / "b.mat").write_bytes(path.read_bytes()[:-100] + bytes(range(100)))
    set_pixel_limit(4_000_100)
    with pytest.raises(InputError, match=r"b\.mat is damaged or no MATLAB file"):
        read_mat(tmp_path / "b.mat", ["S"])
