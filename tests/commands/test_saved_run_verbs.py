"""evaluate, predict, submit and export, on one small run over drawn Cityscapes files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segkit.commands import compare, decision, evaluate, export, predict, submit
from segkit.commands.scorers import Loaded
from segkit.config.compose import compose
from segkit.config.dataset import DatasetConfig, ResizeConfig
from segkit.config.schema import plain
from segkit.data.decode import MAX_PIXELS, set_pixel_limit
from segkit.errors import InputError
from segkit.report.runs import read_run
from segkit.run import saved as saved_run
from segkit.run.splits import open_phases
from segkit.synthetic.sample_maker import make_sample


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run folder."""
    from segkit.run import pipeline

    folder = tmp_path_factory.mktemp("verbs")
    make_sample("cityscapes", folder / "data", num_images=4)
    config = compose(
        [
            "dataset=cityscapes",
            f"dataset.root={folder / 'data'}",
            "model=deeplabv3plus_tiny",
            "model.encoder=tu-test_resnet",
            "debug=smoke",
            "schedule=single",
            "limit_steps=3",
            "batch_size=2",
            "dataset.crop=[64,64]",
            "device=cpu",
            f"cache_dir={folder / 'cache'}",
        ]
    )
    pipeline.run(config, folder / "run", open_phases(config))
    return folder / "run"


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a verb as the command line does; its output comes back."""

    def calling(verb, *arguments):
        argv = [*map(str, arguments)]
        verb.run(argv)
        return capsys.readouterr().out

    return calling


def results(path):
    return json.loads(path.read_text())


def test_evaluate_repeats_the_score_of_the_training(finished, call):
    out = call(evaluate, finished, "--max-images", "4", "--workers", "0", "--device", "cpu")
    (written,) = (finished / "evaluations").glob("val-last-first4-*.json")
    again, trained = results(written), results(finished / "results.json")
    for key in ("mean_iou", "classes", "protocol", "num_classes_averaged"):
        assert again[key] == trained[key], key
    assert "mean over" in out
    assert written.with_suffix(".npz").is_file()


def test_scores_of_other_data_have_a_name_of_their_own(finished, call, tmp_path):
    options = ["--max-images", "1", "--workers", "0", "--device", "cpu"]
    own = Path(saved_run.open_run(finished).config.dataset.root)
    shutil.copytree(own, tmp_path / "in fog")
    (tmp_path / "link").symlink_to(own)
    for root in ([], ["--root", tmp_path / "link"], ["--root", tmp_path / "in fog"]):
        call(evaluate, finished, *options, *root)
    other, same = sorted(path.name for path in (finished / "evaluations").glob("val-last-*first1-*.json"))[::-1]
    assert re.fullmatch(r"val-last-first1-\w{8}\.json", same)
    assert re.fullmatch(r"val-last-in_fog-first1-\w{8}\.json", other)
    own.rename(tmp_path / "moved")
    call(evaluate, finished, *options, "--root", tmp_path / "moved")
    (tmp_path / "moved").rename(own)
    assert len(list((finished / "evaluations").glob("val-last-*first1-*.json"))) == 2


def test_data_that_cannot_be_looked_at_are_gone(finished, tmp_path):
    saved = saved_run.open_run(finished)
    saved.config.dataset.root = "a" * 300  # as a folder of somebody else, Path.exists raises an OSError for it
    assert evaluate.other_root(saved, str(tmp_path)) is None


def test_compare_predicts_images_again(finished, call, tmp_path):
    """What training kept of the same images is the reference."""
    record = read_run(finished)
    stored = dict(record.pictures)
    assert stored
    arguments = compare.parser().parse_args([str(finished), "--device", "cpu"])
    again = compare.predicted(record, list(stored), arguments)
    assert set(again) == set(stored)
    for name, picture in stored.items():
        image, label, prediction = again[name].read()
        kept_image, kept_label, kept_prediction = picture.read()
        np.testing.assert_array_equal(label, kept_label)
        np.testing.assert_array_equal(prediction, kept_prediction)
        assert np.abs(image.astype(int) - kept_image).mean() < 8  # a JPEG
        assert again[name].palette == picture.palette
        assert again[name].image.parent.parent == finished.resolve() / record.phase / "evaluations"
    turned = dataclasses.replace(record.per_image, names=record.per_image.names[::-1])
    with pytest.raises(InputError, match=r"is not the one that .* has the score of: its data or its checkpoint"):
        compare.predicted(dataclasses.replace(record, per_image=turned), list(stored), arguments)
    call(compare, finished, "--predict", "--device", "cpu", "--pictures", 2, "--output", tmp_path / "r.html")
    assert "The extremes of all images" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_evaluate_with_everything(finished, call, tmp_path):
    options = ["--tta", "flip,ms", "--scales", "0.5,1.0", "--slide", "64x96", "--boundary", "--protocol", "cityscapes"]
    out = call(evaluate, finished, "--workers", "0", "--output", tmp_path / "all.json", *options)
    found = results(tmp_path / "all.json")
    assert found["protocol"]["scales"] == [0.5, 1.0]
    assert found["protocol"]["flip"] is True
    assert found["protocol"]["window"] == [64, 96]
    assert found["protocol"]["benchmark"] == "cityscapes"
    assert set(found["benchmark"]["categories"]) >= {"flat", "vehicle"}
    assert 0 <= found["boundary"]["mean_boundary_iou"] <= 1
    assert found["boundary"]["boundary_ratio"] == 0.02
    assert "boundary_iou" in found["classes"]["road"]
    assert "benchmark category_mean_iou" in out


@pytest.mark.nightly
def test_a_bias_is_kept_and_used_by_predict_and_export(finished, call, tmp_path):
    assert "fitted on 4 images of the split train" in call(evaluate, finished, "--decision", "bias", "--workers", "0")
    kept = results(finished / "decision.json")
    assert kept["bias"]["mean_iou_after"] >= kept["bias"]["mean_iou_before"]
    assert kept["fitted_on"]["split"] == "train"
    image = next((finished.parent / "data").rglob("leftImg8bit/val/**/*.png"))
    biased = [finished, "--decision", "bias", "--output", tmp_path / "biased.onnx"]
    with pytest.raises(InputError, match=r"not complete under .*nowhere"):
        call(export, *biased, "--root", tmp_path / "nowhere")
    data = finished.parent / "data"
    data.rename(tmp_path / "moved")
    try:
        exported = call(export, *biased)
    finally:
        (tmp_path / "moved").rename(data)
    assert re.search(r"not checked on real images, as there are none: .*data", exported)
    assert "% of the pixels" not in exported
    for run, name, options in ((finished, "run", ["--decision", "bias"]), (tmp_path / "biased.onnx", "onnx", [])):
        with pytest.raises(SystemExit):
            call(predict, run, "--input", image, "--output", tmp_path / name, *options)
    predicted = []
    for name in ("run", "onnx"):
        with Image.open(next((tmp_path / name / "labels").glob("*.png"))) as label:
            predicted.append(np.asarray(label))
    assert (predicted[0] == predicted[1]).mean() > 0.999


def test_predict_reports_what_it_cannot_read(finished, call, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (50, 70), np.uint8)).save(pictures / "gray.png")
    Image.fromarray(generator.integers(0, 256, (65, 33, 4), np.uint8)).save(pictures / "alpha.png")
    Image.fromarray(generator.integers(0, 256, (1, 40, 3), np.uint8)).save(pictures / "row.png")
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (pictures / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(SystemExit) as stopped:
        call(predict, finished, "--input", pictures, "--output", tmp_path / "out")
    assert stopped.value.code == 1
    skipped = capsys.readouterr().err
    assert "skipped: " in skipped
    assert "broken.jpg" in skipped
    assert "empty.png" in skipped
    assert "note: 1 images were left out, as their form is not read: " in skipped
    (tmp_path / "mine").mkdir()
    for output in ("few", "mine"):
        with pytest.raises(SystemExit):
            call(predict, finished, "--input", pictures / "row.png", "--output", tmp_path / output, "--max-pixels", 10)
    set_pixel_limit(MAX_PIXELS)
    assert not (tmp_path / "few").exists()  # no image, no folder
    assert not list((tmp_path / "mine").iterdir())  # which was there before
    assert (
        "but at most 10 are allowed, lest a damaged file fill the memory; remove it, or set --max-pixels to more"
        in (capsys.readouterr().err)
    )
    labels = {}
    for path in (tmp_path / "out" / "labels").glob("*.png"):
        with Image.open(path) as label:
            labels[path.stem] = (label.size, label.mode)
    assert labels == {"gray": ((70, 50), "P"), "alpha": ((33, 65), "P"), "row": ((40, 1), "P")}
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == 3


def test_an_image_that_cannot_be_resized_is_one_that_cannot_be_read(tmp_path):
    Image.fromarray(np.zeros((1, 3000, 3), np.uint8)).save(tmp_path / "row.png")
    resize = ResizeConfig(short_side=300)
    dataset = DatasetConfig(name="folder", reader={}, eval_resize=resize)
    model = Loaded(None, torch.device("cpu"), dataset, ("a", "b"), np.zeros((2, 3), np.uint8), None)
    with pytest.raises(InputError, match=r"row\.png of 1x3000 is resized to 300x900000, more than 200000000 pixels"):
        model.read(tmp_path / "row.png")


def test_the_files_of_a_submission_have_the_score_of_the_run(finished, call, tmp_path):
    out = call(submit, finished, "--split", "val", "--output", tmp_path / "val.zip", "--workers", "0")
    call(evaluate, finished, "--workers", "0", "--output", tmp_path / "val.json")
    score = results(tmp_path / "val.json")["mean_iou"]
    assert f"mean IoU of the files: {100 * score:.2f} %" in out


def test_submit_takes_a_precision_and_refuses_images_that_the_server_would(finished, call, tmp_path):
    files = {}
    for precision in ("fp32", "bf16"):
        path = tmp_path / f"{precision}.zip"
        out = call(submit, finished, "--split", "val", "--output", path, "--workers", "0", "--precision", precision)
        assert "mean IoU of the files" in out
        with zipfile.ZipFile(path) as archive:
            files[precision] = {name: archive.read(name) for name in archive.namelist()}
    assert files["fp32"].keys() == files["bf16"].keys()
    assert files["fp32"] != files["bf16"]
    with pytest.raises(InputError, match=r"_\d+ has the size .*; the test split of cityscapes wants 1024x2048"):
        call(submit, finished, "--output", tmp_path / "test.zip")
    assert not (tmp_path / "test.zip").exists()


@pytest.mark.nightly
def test_export_is_checked_on_images_of_the_data_set_and_predict_takes_it(finished, call, tmp_path):
    out = call(export, finished)
    assert f"written: {finished / 'model.onnx'}" in out
    found = re.search(
        r"checked on (\d) images of val: ([0-9.]+) % of the pixels get the class of the evaluation in fp32", out
    )
    assert int(found.group(1)) >= 2
    assert float(found.group(2)) >= 99.9
    images = finished.parent / "data" / "leftImg8bit" / "val"
    for run, name in ((finished, "torch"), (finished / "model.onnx", "onnx")):
        with pytest.raises(SystemExit) as stopped:
            call(predict, run, "--input", images, "--output", tmp_path / name)
        assert stopped.value.code == 0
    files = sorted(path.relative_to(tmp_path / "torch") for path in (tmp_path / "torch" / "labels").rglob("*.png"))
    assert len(files) == int(found.group(1))
    for file in files:
        with Image.open(tmp_path / "torch" / file) as one, Image.open(tmp_path / "onnx" / file) as other:
            assert one.getpalette() == other.getpalette()
            assert (np.asarray(one) == np.asarray(other)).mean() > 0.999
    with pytest.raises(InputError, match=r"there is no file .*none\.onnx: write it with segkit export RUN"):
        call(predict, tmp_path / "none.onnx", "--input", images, "--output", tmp_path / "out")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(InputError, match=r"text\.onnx is not a model that segkit exported: write one with"):
        call(predict, tmp_path / "text.onnx", "--input", images, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tta", "mirror"], "--tta is 'mirror', but takes flip, ms"),
        (["--scales", "1"], "--scales is given without --tta ms"),
        (["--tta", "ms", "--scales", "a"], "--scales is 'a', but takes numbers"),
        (["--slide", "64"], "--slide is '64', but takes HxW"),
        (
            ["--slide", "0x5"],
            r"window is \[0, 32\]; both sides must be multiples of 32, such as \[32, 32\]: set --slide",
        ),
        (["--slide", "--overlap", "nan"], r"overlap is nan; it must be at least 0 and less than 1: set --overlap"),
        (["--tta", ","], r"--tta is ',', but takes flip, ms, or both with a comma between"),
        (["--overlap", "0.9"], "--overlap or --blending is given without a window: add --slide"),
        (["--batch-size", "1000000000"], "'1000000000' is no whole number from 1 to 1024"),
        (["--output", "/no/such/folder/all.json"], "--output is .*, but /no/such/folder is no folder: make it"),
        (["--phase", "nowhere"], "has no phase 'nowhere': its phases are train"),
    ],
)
def test_bad_options(finished, call, options, message):
    with pytest.raises(InputError, match=message):
        call(evaluate, finished, *options)


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        (evaluate, ["--refit"], "--refit is given without a decision to fit"),
        (submit, ["--tta", "mirror"], "--tta is 'mirror', but takes flip, ms"),
        (submit, ["--device", "cuda:99"], "device is 'cuda:99'"),
        (submit, ["--split", "test"], "the test split of cityscapes wants 1024x2048"),
        (submit, ["--output", "all.txt"], r"all\.txt must end in \.zip"),
        (submit, ["--decision", "bias"], r"decision\.json is not there, so --decision bias has nothing"),
        (export, ["--decision", "miou"], r"decision\.json is not there, so --decision miou has nothing to decide with"),
        (export, ["--format", "hub", "--output", "file/hub"], "--output is file/hub, but .*/file is no folder: give"),
        (export, ["--format", "hub", "--output", "x.onnx"], "--output is x.onnx, but must not end as a file"),
        (predict, ["--decision", "bias"], r"decision\.json is not there, so --decision bias has nothing"),
        (predict, ["--slide", "64"], "--slide is '64', but takes HxW"),
        (predict, ["--output", "file"], "--output is file, but .*/file is no folder: give another one"),
        (predict, ["--output", "link/x"], "--output is link/x, but .*/link is no folder: give another one"),
        (compare, ["--predict", "--device", "cuda:99"], "device is 'cuda:99'"),
    ],
)
def test_options_are_refused_before_a_model_is_read(finished, call, tmp_path, monkeypatch, verb, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saved_run.SavedRun, "model", None)
    monkeypatch.setattr(decision, "FILE", "none/decision.json")
    Path("file").write_text("kept")
    Path("link").symlink_to("nowhere")
    own = {submit: ["--split", "val", "--output", "x.zip"], compare: ["--markdown", "x.md", "--output", "x.html"]}
    own[predict] = ["--input", finished.parent / "data", "--output", "out"]
    with pytest.raises(InputError, match=message):
        call(verb, finished, *own.get(verb, []), *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_run_folder_that_cannot_be_written_is_refused_before_the_work(finished, call, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    monkeypatch.setattr(saved_run.SavedRun, "model", None)
    kept = r"evaluations are kept in .*evaluations, which cannot be written: copy the run"
    with pytest.raises(InputError, match=kept):
        call(evaluate, finished)
    with pytest.raises(InputError, match=r"--output is .*run/model\.onnx, but the folder .*run cannot be written"):
        call(export, finished)
    with pytest.raises(InputError, match=r"--output is .*run/hub, but the folder .*run cannot be written"):
        call(export, finished, "--format", "hub")
    record = read_run(finished)
    with pytest.raises(InputError, match=kept):
        compare.predicted(record, list(record.pictures), compare.parser().parse_args([str(finished)]))


def test_folders_that_are_no_run(finished, tmp_path):
    with pytest.raises(InputError, match=r"is no run folder, it has no config\.yaml"):
        saved_run.open_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("segkit.models.deeplabv3plus", "os.system"))
    with pytest.raises(InputError, match=r"model._target_ is 'os.system', but must be one of"):
        saved_run.open_run(copy)
    (copy / "config.yaml").write_text(text + "surprise: 1\n")
    with pytest.raises(InputError, match="is not a configuration of this version"):
        saved_run.open_run(copy)
    (copy / "config.yaml").write_text(text)
    (copy / "label_counts.json").resolve().write_text("{")
    with pytest.raises(InputError, match="run the command that trained the run once more"):
        saved_run.open_run(copy).label_counts()


def test_a_run_before_its_last_phase_names_the_phase_that_can_be_taken(tmp_path):
    config = compose(["schedule=pretrain_finetune", "precision=fp32", "channels_last=false"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False))
    (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
    (tmp_path / "pretrain" / "checkpoints" / "last.pt").touch()
    with pytest.raises(InputError, match="has not come to its last phase, finetune: add --phase pretrain"):
        saved_run.open_run(tmp_path)
    assert saved_run.open_run(tmp_path, phase="pretrain").folder == tmp_path / "pretrain"


def test_nothing_that_a_saved_config_names_is_downloaded_or_read(finished):
    saved = saved_run.open_run(finished)
    model = {**saved.config.model, "encoder_weights": "/somewhere/else.pt", "weights": "/somewhere/else.pt"}
    saved.config.model = model
    without = saved_run.without_sources(saved.config).model
    assert without["encoder_weights"] == "none"
    assert without["weights"] is None


def test_an_evaluation_of_a_split_in_a_folder_has_a_file_name():
    arguments = evaluate.parser().parse_args(["RUN"])
    name = evaluate.evaluation_name(arguments, {"split": "val/north", "window": None})
    assert re.fullmatch(r"val_north-last-[0-9a-f]{8}", name)
