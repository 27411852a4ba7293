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

from segkit.errors import InputError
from segkit.evaluation.inference import Inference
from segkit.evaluation.predict import Outputs, find_images, predict_files, read_any_image

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


def run(folder, output, **options):
    return predict_files(
        options.pop("scorers", Brightest()),
        find_images(folder, output=output),
        output,
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
    report = run(source, tmp_path / "out", outputs=Outputs(probabilities=True))
    assert (report.num_written, report.failed, report.exit_code) == (2, [], 0)
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
    report = run(tmp_path / "a.png", tmp_path / "out", scorers=scorers, outputs=Outputs(overlays=False))
    assert report.num_written == 1
    np.testing.assert_array_equal(np.asarray(opened(tmp_path / "out/labels/a.png")), picture().argmax(-1))
    assert opened(tmp_path / "out/side_by_side/a.png").size[0] > 180
    assert not (tmp_path / "out/overlays").exists()


def test_windows_flips_and_scales_are_taken(tmp_path):
    Image.fromarray(picture(70, 100)).save(tmp_path / "a.png")
    inference = Inference(window=(32, 64), flip=True, scales=(0.5, 1.0))
    run(tmp_path / "a.png", tmp_path / "out", inference=inference, outputs=Outputs(overlays=False))
    found = np.asarray(opened(tmp_path / "out/labels/a.png"))
    assert (found == picture(70, 100).argmax(-1)).mean() > 0.97


def odd_files(folder):
    """Odd but valid files, each with the RGB values it means."""
    rgb = picture(20, 30)
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30)
    means = {}

    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    means["grey.png"] = np.repeat(rgb[..., :1], 3, -1)
    Image.fromarray(grey * 109).save(folder / "grey16.png")
    means["grey16.png"] = np.repeat(np.round(grey * 109 / 257)[..., None], 3, -1)
    Image.fromarray(grey * 109).save(folder / "grey16.tiff")
    means["grey16.tiff"] = means["grey16.png"]
    rgba = np.dstack([rgb, np.full((20, 30), 255, np.uint8)])
    rgba[:, 15:, 3] = 0
    Image.fromarray(rgba).save(folder / "rgba.png")
    means["rgba.png"] = np.where(rgba[..., 3:] == 0, 255, rgb)
    Image.fromarray(rgba[..., [0, 3]].copy()).save(folder / "grey_alpha.png")
    means["grey_alpha.png"] = np.where(rgba[..., 3:] == 0, 255, rgb[..., :1].repeat(3, -1))
    Image.fromarray(rgb).quantize(8).save(folder / "palette.png")
    means["palette.png"] = rgb
    Image.fromarray(rgb[..., 0] > 100).save(folder / "bits.png")
    means["bits.png"] = np.repeat(255 * (rgb[..., :1] > 100), 3, -1)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rgb).save(folder / f"exif{orientation}.png", exif=exif)
        turned = [
            rgb,
            rgb[:, ::-1],
            rgb[::-1, ::-1],
            rgb[::-1],
            rgb.transpose(1, 0, 2),
            np.rot90(rgb, -1),
            rgb[::-1, ::-1].transpose(1, 0, 2),
            np.rot90(rgb, 1),
        ]
        means[f"exif{orientation}.png"] = turned[orientation - 1]
    Image.fromarray(rgb[:1, :1]).save(folder / "pixel.png")
    means["pixel.png"] = rgb[:1, :1]
    Image.fromarray(rgb[:1]).save(folder / "row.png")
    means["row.png"] = rgb[:1]
    Image.fromarray(rgb[:, :1].copy()).save(folder / "column.png")
    means["column.png"] = rgb[:, :1]
    return means


def test_odd_files_are_read_as_what_they_mean(tmp_path):
    for name, expected in odd_files(tmp_path).items():
        found = read_any_image(tmp_path / name)
        assert found.dtype == np.uint8, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_cmyk_jpegs_are_read(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(read_any_image(tmp_path / "x.jpg").astype(int) - picture()).mean() < 10


@pytest.mark.parametrize("inference", [Inference(), Inference(window=(32, 64), flip=True, scales=(0.5, 1.0, 2.0))])
def test_odd_files_are_predicted_at_their_size(tmp_path, inference):
    source = tmp_path / "in"
    source.mkdir()
    odd = odd_files(source)
    report = run(source, tmp_path / "out", inference=inference)
    assert (report.num_written, report.exit_code) == (len(odd), 0)
    for path in (tmp_path / "out/labels").iterdir():
        means = odd.get(path.name, odd.get(f"{path.stem}.tiff"))
        means = odd[path.stem] if means is None else means  # grey16.png.png beside grey16.tiff.png
        assert opened(path).size == means.shape[1::-1], path.name


def test_broken_files_are_reported_and_the_others_predicted(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    odd = odd_files(source)
    good = (source / "exif1.png").read_bytes()
    (source / "0_empty.png").write_bytes(b"")
    (source / "1_text.jpg").write_text("text")
    (source / "z_cut.png").write_bytes(good[:-60])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(source / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(source / "wide.tif")
    report = run(source, tmp_path / "out", outputs=Outputs(overlays=False), threads=3)
    assert report.exit_code == 1
    assert report.num_written == len(odd)
    assert sorted(path.name for path, _ in report.failed) == [
        "0_empty.png",
        "1_text.jpg",
        "float.tif",
        "wide.tif",
        "z_cut.png",
    ]
    messages = {path.name: message for path, message in report.failed}
    assert re.search(r"1_text\.jpg cannot be read as an image \(.*\); replace or remove it", messages["1_text.jpg"])
    assert "float.tif holds floating-point values; convert it" in messages["float.tif"]
    assert "wide.tif holds values beyond 16 bits; convert it" in messages["wide.tif"]
    assert len(list((tmp_path / "out/labels").iterdir())) == len(odd)


def test_files_are_found_by_folder_pattern_and_name(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "x/y/c.PNG", "x/d.txt", "x/out/labels/a.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")
    source = tmp_path / "x"
    found = find_images(source, output=source / "out")
    assert {name: path.relative_to(source).as_posix() for name, path in found.items()} == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "y/c": "y/c.PNG",
    }
    assert list(find_images(source / "*.jpg")) == ["a"]
    assert list(find_images(str(source / "**/c.*"))) == ["c"]
    assert list(find_images(source / "d.txt")) == ["d"]  # named by the user: tried
    with pytest.raises(InputError, match=r"no image matches .*\*\.gif; give a file, a pattern in quotes, or a folder"):
        find_images(source / "*.gif")
    with pytest.raises(InputError, match=r"no image matches .*out"):
        find_images(source / "out", output=source / "out")


def test_a_folder_that_cannot_be_written_and_classes_without_names(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"cannot write to .*a\.png/out \(.*\); give another output folder"):
        run(tmp_path / "a.png", tmp_path / "a.png" / "out")

    def five_classes(images):
        return torch.cat([images.float(), 300 + images[:, :2].float()], 1)

    with pytest.raises(InputError, match="the model predicts class 4, but 3 classes are named"):
        run(tmp_path / "a.png", tmp_path / "out", scorers=five_classes)


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

    from segkit.evaluation import overlay, predict

    monkeypatch.setattr(predict, "read_any_image", note("read", predict.read_any_image))
    monkeypatch.setattr(overlay, "palette_image", note("write", overlay.palette_image))
    start = time.perf_counter()
    run(tmp_path, tmp_path / "out", scorers=note("model", Brightest()), outputs=Outputs(overlays=False))
    elapsed = time.perf_counter() - start
    assert seen["model"] == {main}
    assert main not in seen["read"] | seen["write"]
    assert elapsed < 0.7 * 3 * num_images * slow, "one stage after the other would take all of it"


def test_memory_holds_a_few_images_only(tmp_path, monkeypatch):
    for i in range(20):
        Image.fromarray(picture()).save(tmp_path / f"{i:02d}.png")
    from segkit.evaluation import predict

    decoded, predicted, ahead = [], [], []
    original = predict.read_any_image
    monkeypatch.setattr(predict, "read_any_image", lambda path: decoded.append(path) or original(path))

    def scorer(images):
        time.sleep(0.01)
        predicted.append(1)
        ahead.append(len(decoded) - len(predicted))
        return images.float()

    run(tmp_path, tmp_path / "out", scorers=scorer, outputs=Outputs(overlays=False), threads=2)
    assert len(predicted) == 20
    assert max(ahead) <= 5
