"""``segkit stats`` against plain counts, the formula of the margins, and a changed file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segkit.commands import stats as command
from segkit.synthetic.sample_maker import make_sample

NAMES = ["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"]


@pytest.fixture
def root(tmp_path):
    return make_sample("camvid", tmp_path / "CamVid", num_images=5, scale=0.1)


@pytest.fixture
def arguments(root, tmp_path):
    return ["dataset=camvid", f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}", "workers=0"]


@pytest.fixture
def plain(root):
    """Pixels of each raw value 0..11, (12,), and images with each of them, counted one label at a time."""
    labels = [np.array(Image.open(path)) for path in sorted((root / "trainannot").iterdir())]
    pixels = np.array([sum(int((label == k).sum()) for label in labels) for k in range(12)])
    images = [sum(bool((label == k).any()) for label in labels) for k in range(12)]
    return pixels, images


def test_rows_in_every_form(call, arguments, plain, tmp_path):
    pixels, images = plain
    files = [tmp_path / name for name in ("stats.csv", "stats.json", "stats.png")]
    options = ["--csv", files[0], "--json", files[1], "--plot", files[2]]
    code, out, err = call(*arguments, "loss.tau=5", "loss.rho_max=1e9", *options)
    assert code == 0
    content = json.loads(files[1].read_text())
    rows = content["classes"]
    valid = pixels[:11].sum()
    assert [row["class"] for row in rows] == NAMES
    assert [row["pixels"] for row in rows] == pixels[:11].tolist()
    assert [row["images"] for row in rows] == images[:11]
    np.testing.assert_allclose([row["share"] for row in rows], pixels[:11] / valid, rtol=1e-12)
    # Algorithm 1 of the paper in float64, written out again
    rho_0k = 5 * np.sqrt(valid - pixels[:11]) / pixels[:11]
    share = pixels[:11] / valid
    mu = share * np.sqrt(pixels[:11]) / ((valid - pixels[:11]) - share * np.sqrt(valid - pixels[:11]))
    np.testing.assert_allclose([row["rho_0k"] for row in rows], rho_0k, rtol=1e-6)
    np.testing.assert_allclose([row["rho_k0"] for row in rows], mu * rho_0k, rtol=1e-6)
    assert content["ignored_pixels"] == pixels[11]
    assert content["ignored_share"] == pytest.approx(pixels[11] / pixels.sum())
    assert content["num_images"] == 5
    assert content["margins"]["tau"] == 5
    with files[0].open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["rho_0k"]) for row in table] == [row["rho_0k"] for row in rows]
    assert [int(row["pixels"]) for row in table] == pixels[:11].tolist()
    with Image.open(files[2]) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert "margins in logits: tau=5, upsilon=1.0" in out
    for name, row in zip(NAMES, rows, strict=True):
        assert any(name in line and f"{row['pixels']:,}" in line for line in out.splitlines())
    assert err.count("written: ") == 3


def test_another_split(call, arguments, tmp_path):
    code, out, _ = call("--split", "val", *arguments, "--json", tmp_path / "stats.json")
    assert code == 0
    assert "camvid val, 2 images" in out
    assert json.loads((tmp_path / "stats.json").read_text())["split"] == "val"


def test_another_loss_shows_the_default_margins(call, arguments):
    code, out, _ = call(*arguments, "loss=cross_entropy")
    assert code == 0
    assert "margins in logits: tau=10.0, upsilon=1.0, scale=tau, absent=max" in out


def test_the_second_call_reads_no_label_and_a_changed_file_is_counted_again(
    monkeypatch, call, arguments, root, tmp_path
):
    from segkit.data import statistics

    read = []
    original = statistics.label_histogram
    monkeypatch.setattr(
        statistics, "label_histogram", lambda dataset, index: read.append(index) or original(dataset, index)
    )
    report = tmp_path / "stats.json"
    call(*arguments, "--json", report)
    first, read[:] = json.loads(report.read_text()), []
    call(*arguments, "--json", report)
    assert read == []
    assert json.loads(report.read_text()) == first
    Image.fromarray(np.full((36, 48), 3, np.uint8)).save(root / "trainannot" / "train_00000.png")
    call(*arguments, "--json", report)
    assert read == [0, 1, 2, 3, 4]
    assert json.loads(report.read_text())["classes"][3]["pixels"] > first["classes"][3]["pixels"]


def test_the_answer_from_the_cache_needs_no_torch(call, arguments):
    call(*arguments)
    code = (
        "import sys; from segkit.commands import stats; stats.run(sys.argv[1:]); "
        "print(sorted({'torch', 'matplotlib', 'albumentations', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Bicyclist" in done.stdout


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--plot", "/tmp/plot.bmp"], "--plot is /tmp/plot.bmp, but its ending must be one of .png, .svg, .pdf"),
        (["--csv", "/no/such/folder/a.csv"], "/no/such/folder is no folder: make it"),
        (["--split", "trian"], "camvid has no split 'trian'; allowed are train, val, test"),
        (["--csv", "a.svg", "--plot", "a.svg"], "--csv and --plot name the same file a.svg"),
        (["+loss.typo=2"], "loss.typo is not an argument of segkit.losses.margin_calibration"),
        (["loss.upsilon=-1"], "upsilon must be a finite number greater than 0, got -1; set loss.upsilon"),
    ],
)
def test_mistakes_end_with_2(call, arguments, extra, sentence):
    code, out, err = call(*arguments, *extra)
    assert (code, out) == (2, "")
    assert sentence in err


def rows_with(shares):
    return [
        {"class": f"class {k}", "pixels": int(1000 * share), "share": share, "rho_0k": 0.1 * k}
        for k, share in enumerate(shares)
    ]


def test_an_absent_class_has_no_bar(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    widths = []
    original = Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, width, **rest: widths.append(list(width)) or original(self, y, width, **rest)
    )
    command.plot(tmp_path / "a.svg", rows_with([0.9, 0.0, 0.1]), {"dataset": "d", "split": "train", "num_images": 3})
    assert np.isnan(widths[0][0])  # the smallest share comes first
    assert widths[0][1:] == [10.0, 90.0]
    assert (tmp_path / "a.svg").read_text().count("absent") >= 1


def test_names_show_as_they_are_written(tmp_path):
    """No markup of rich, no control character, no formula of a spreadsheet, no formula of matplotlib."""
    names = ("car [rare]", "tool [/x]", "red\x1b[31m", "=1+1", "$x$", "5 $")
    row = {"pixels": 10, "share": 1 / 6, "images": 2, "rho_0k": 0.5, "rho_k0": 0.1}
    rows = [{"class": name, **row} for name in names]
    summary = {"dataset": "d [/x]\n", "split": "val", "num_images": 2, "ignored_pixels": 0, "ignored_share": 0.0,
               "margins": {}}  # fmt: skip
    text = command.table(rows, summary)
    assert all(name in text for name in ("car [rare]", "tool [/x]", r"red\x1b[31m", "=1+1", r"d [/x]\n val"))
    assert "\x1b" not in text
    command.write_csv(tmp_path / "c.csv", rows)
    with open(tmp_path / "c.csv", newline="", encoding="utf-8") as file:
        assert [line["class"] for line in csv.DictReader(file)] == [
            *names[:2], r"red\x1b[31m", "'=1+1", *names[4:]
        ]  # fmt: skip
    command.plot(tmp_path / "p.png", rows, summary)
    assert (tmp_path / "p.png").stat().st_size > 1000
