"""Prediction of image files: odd files, broken files, names, and what is written."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segkit.data.decode import read_rgb
from segkit.data.files import find_images
from segkit.errors import InputError
from segkit.evaluation.inference import Inference
from segkit.evaluation.predict import Predictor, predict_files
from segkit.files import written_beside

CLASSES = ["red", "green", "blue"]
PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


class Brightest(nn.Module):
    """The class of a pixel is its largest channel."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        return images.float() / 32


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def picture(height=40, width=60):
    """Upper half red, lower half green with a blue left edge."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, :, 0] = 200
    image[height // 2 :, :, 1] = 200
    image[height // 2 :, :10] = (0, 0, 250)
    return image


def run(folder, output, *, inference=None, **options):
    scorers = options.pop("scorers", {"prediction": Brightest()})
    return predict_files(
        {title: Predictor(score, inference or Inference()) for title, score in scorers.items()},
        find_images(folder, output=output),
        output,
        read_image=options.pop("read_image", read_rgb),
        written_beside=written_beside,
        classes=CLASSES,
        palette=PALETTE.tolist(),
        **options,
    )


def test_results_have_the_size_of_the_image_and_its_classes(tmp_path):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    Image.fromarray(picture()).save(source / "a.png")
    Image.fromarray(picture(33, 47)).save(source / "deep" / "b.bmp")
    (source / "notes.txt").write_text("no image")
    assert run(source, tmp_path / "out", probabilities=True) == (2, [])
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    kinds = (("labels", "png"), ("overlays", "png"), ("probabilities", "npz"))
    assert written == {f"{kind}/{name}.{end}" for kind, end in kinds for name in ("a", "deep/b")}
    label = opened(tmp_path / "out/labels/deep/b.png")
    assert label.mode == "P"
    np.testing.assert_array_equal(np.asarray(label), picture(33, 47).argmax(-1))
    np.testing.assert_array_equal(np.asarray(label.convert("RGB"))[0, 0], PALETTE[0])
    scores = np.load(tmp_path / "out/probabilities/a.npz")["probabilities"]
    assert scores.shape == (3, 40, 60)
    assert scores.dtype == np.float16
    expected = torch.from_numpy(picture()).permute(2, 0, 1).float().div(32).softmax(0).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    shown = np.asarray(opened(tmp_path / "out/overlays/a.png"))
    assert shown.shape[0] == 40
    assert shown.shape[1] > 60
    assert shown[5, 5].tolist() == [200, 0, 0]


def test_several_models_are_shown_side_by_side(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    scorers = {"CE": Brightest(), "other": lambda images: -images.float()}
    assert run(tmp_path / "a.png", tmp_path / "out", scorers=scorers) == (1, [])
    np.testing.assert_array_equal(np.asarray(opened(tmp_path / "out/labels/a.png")), picture().argmax(-1))
    assert opened(tmp_path / "out/side_by_side/a.png").size[0] > 180


def test_windows_flips_and_scales_are_taken(tmp_path):
    Image.fromarray(picture(70, 100)).save(tmp_path / "a.png")
    inference = Inference(window=(32, 64), flip=True, scales=(0.5, 1.0))
    run(tmp_path / "a.png", tmp_path / "out", inference=inference)
    found = np.asarray(opened(tmp_path / "out/labels/a.png"))
    assert (found == picture(70, 100).argmax(-1)).mean() > 0.97


def odd_files(folder):
    """Odd but valid files, each with its size (height, width) as it is stored."""
    rgb = picture(20, 30)
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    Image.fromarray(grey * 109).save(folder / "grey16.png")
    Image.fromarray(grey * 109).save(folder / "grey16.tiff")
    Image.fromarray(np.dstack([rgb, np.full((20, 30), 99, np.uint8)])).save(folder / "rgba.png")
    Image.fromarray(rgb).quantize(8).save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(folder / "exif.png", exif=exif)
    Image.fromarray(rgb[:1, :1]).save(folder / "pixel.png")
    Image.fromarray(rgb[:1]).save(folder / "row.png")
    Image.fromarray(rgb[:, :1].copy()).save(folder / "column.png")
    sizes = {"pixel.png": (1, 1), "row.png": (1, 30), "column.png": (20, 1)}
    return {path.name: sizes.get(path.name, (20, 30)) for path in folder.iterdir()}


@pytest.mark.parametrize("inference", [Inference(), Inference(window=(32, 64), flip=True, scales=(0.5, 1.0, 2.0))])
def test_odd_files_are_predicted_at_their_size(tmp_path, inference):
    source = tmp_path / "in"
    source.mkdir()
    odd = odd_files(source)
    assert run(source, tmp_path / "out", inference=inference) == (len(odd), [])
    for path in (tmp_path / "out/labels").iterdir():
        size = odd[path.name if path.name in odd else path.stem]  # grey16.png.png beside grey16.tiff.png
        assert opened(path).size == size[::-1], path.name


def test_broken_files_are_reported_and_the_others_predicted(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    odd = odd_files(source)
    good = (source / "exif.png").read_bytes()
    (source / "0_empty.png").write_bytes(b"")
    (source / "1_text.jpg").write_text("text")
    (source / "z_cut.png").write_bytes(good[:-60])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(source / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(source / "wide.tif")
    num_written, failed = run(source, tmp_path / "out", threads=3)
    assert num_written == len(odd)
    assert sorted(path.name for path, _ in failed) == [
        "0_empty.png",
        "1_text.jpg",
        "float.tif",
        "wide.tif",
        "z_cut.png",
    ]
    messages = {path.name: message for path, message in failed}
    assert re.search(r"1_text\.jpg is damaged or no image file \(.*\); copy or unpack it", messages["1_text.jpg"])
    assert "float.tif holds floating-point values; convert it" in messages["float.tif"]
    assert "wide.tif holds values beyond 16 bits; convert it" in messages["wide.tif"]
    assert len(list((tmp_path / "out/labels").iterdir())) == len(odd)


def test_a_folder_that_cannot_be_written_and_classes_without_names(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"cannot write to .*a\.png/out \(.*\); give another output folder"):
        run(tmp_path / "a.png", tmp_path / "a.png" / "out")

    for name in ("labels", "checkpoints"):  # of a data set, of a run
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(
            InputError, match=rf"{name} has {name} that are not of predictions, but .* of a run: give a"
        ):
            run(tmp_path / "a.png", tmp_path / name)

    def five_classes(images):
        return torch.cat([images.float(), 300 + images[:, :2].float()], 1)

    with pytest.raises(InputError, match="the model predicts class 4, but 3 classes are named"):
        run(tmp_path / "a.png", tmp_path / "out", scorers={"prediction": five_classes})


def test_a_file_is_there_whole_or_not_at_all_whatever_its_name(tmp_path, monkeypatch):
    """Also of names that two threads would shorten to one."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        Image.fromarray(picture()).save(tmp_path / "in" / f"{'n' * 60}{number}.png")
    assert run(tmp_path / "in", tmp_path / "out", threads=4, probabilities=True) == (6, [])
    for kind in ("labels", "overlays", "probabilities"):
        assert [path.stem[60:] for path in sorted((tmp_path / "out" / kind).iterdir())] == [*"012345"]

    def stops(file, **arrays):
        file.write(b"half of it")
        raise OSError

    monkeypatch.setattr(np, "savez_compressed", stops)
    with pytest.raises(OSError):
        run(tmp_path / "in", tmp_path / "new", probabilities=True)
    assert list((tmp_path / "new" / "labels").iterdir())
    assert not (tmp_path / "new" / "probabilities").exists()  # no half of a file, and no empty folder


def test_decoding_and_writing_happen_beside_the_model(tmp_path, monkeypatch):
    num_images = 12
    for i in range(num_images):
        Image.fromarray(picture()).save(tmp_path / f"{i}.png")
    main, seen = threading.get_ident(), {"read": set(), "write": set(), "model": set()}
    slow = 0.03

    def note(kind, function):
        def noted(*args, **kwargs):
            seen[kind].add(threading.get_ident())
            time.sleep(slow)
            return function(*args, **kwargs)

        return noted

    from segkit.evaluation import overlay

    monkeypatch.setattr(overlay, "palette_image", note("write", overlay.palette_image))
    start = time.perf_counter()
    ways = {"scorers": {"prediction": note("model", Brightest())}, "read_image": note("read", read_rgb)}
    run(tmp_path, tmp_path / "out", **ways)
    elapsed = time.perf_counter() - start
    assert seen["model"] == {main}
    assert main not in seen["read"] | seen["write"]
    assert elapsed < 0.7 * 3 * num_images * slow, "one stage after the other would take all of it"


def test_memory_holds_a_few_images_only(tmp_path):
    for i in range(20):
        Image.fromarray(picture()).save(tmp_path / f"{i:02d}.png")
    decoded, predicted, ahead = [], [], []

    def scorer(images):
        time.sleep(0.01)
        predicted.append(1)
        ahead.append(len(decoded) - len(predicted))
        return images.float()

    def read_image(path):
        decoded.append(path)
        return read_rgb(path)

    ways = {"scorers": {"prediction": scorer}, "read_image": read_image}
    run(tmp_path, tmp_path / "out", threads=2, **ways)
    assert len(predicted) == 20
    assert max(ahead) <= 5
