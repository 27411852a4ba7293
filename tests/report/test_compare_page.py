"""The report against the files it is made from: the page is parsed again, as a reader's browser would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from segkit.report.comparison import compare
from segkit.report.page import page

VOID = {"meta", "link", "img", "br"}


@dataclass
class Cell:
    text: str = ""
    attributes: dict[str, str] = field(default_factory=dict)


class Reader(HTMLParser):
    """Tables by class as rows of cells, every attribute that names an address, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Cell]]] = {}
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.current: list[list[Cell]] | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = {key: value or "" for key, value in attrs}
        self.addresses += [value for key, value in attributes.items() if key in ("src", "href", "xlink:href", "action")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.current = self.tables.setdefault(attributes.get("class", ""), [])
        elif tag == "tr" and self.current is not None:
            self.current.append([])
        elif tag in ("td", "th") and self.current is not None:
            self.current[-1].append(Cell(attributes=attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.current = None

    def handle_data(self, data):
        if self.current and self.current[-1] and {"td", "th"} & set(self.open):
            self.current[-1][-1].text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run_at):
    """Cross-entropy and margin calibration with two seeds each, and Dice with one."""
    root = tmp_path_factory.mktemp("runs")
    recipe = "schedule=pretrain_finetune"
    made = [make_run_at(root / f"ce{s}", "loss=cross_entropy", recipe, seed=s, num_pictures=3) for s in (0, 1)]
    made += [make_run_at(root / f"mc{s}", recipe, seed=s, skill=0.86, margins=True, num_pictures=3) for s in (0, 1)]
    return [*made, make_run_at(root / "dice", "loss=dice", recipe, skill=0.7, num_pictures=3)]


@pytest.fixture(scope="module")
def text(runs):
    return page(compare(runs, num_samples=200), pictures=2)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def expected(run: Path, key: str) -> float:
    scores = results(run)
    return scores["classes"][key.removeprefix("iou/")]["iou"] if key.startswith("iou/") else scores[key]


def test_scores_equal_results_json(runs, text):
    head, *rows = Reader(text).tables["scores"]
    assert len(rows) == 3
    assert [cell.text for cell in head[1:]] == ["runs", "pixel acc.", "mIoU", *results(runs[0])["classes"]]
    for row, members in zip(rows, (runs[:2], runs[2:4], runs[4:]), strict=True):
        assert row[1].text == str(len(members))
        for cell in row[2:]:
            values = [expected(run, cell.attributes["data-key"]) for run in members]
            mean = sum(values) / len(values)
            assert float(cell.attributes["data-value"]) == pytest.approx(mean, rel=1e-15)
            shown = f"{100 * mean:.2f}"
            if len(values) == 2:  # the sample standard deviation of two numbers
                shown += f"±{100 * abs(values[0] - values[1]) / 2**0.5:.2f}"
            assert cell.text == shown


def test_every_run_is_listed_with_its_own_numbers(runs, text):
    _, *rows = Reader(text).tables["runs"]
    assert len(rows) == len(runs)
    by_path = {row[0].text: row for row in rows}
    for run in runs:
        cells = {cell.attributes["data-key"]: cell for cell in by_path[str(run)] if "data-key" in cell.attributes}
        for key in ("mean_iou", "pixel_accuracy"):
            assert float(cells[key].attributes["data-value"]) == results(run)[key]
            assert cells[key].text == f"{100 * results(run)[key]:.2f}"


def test_the_best_is_bold_where_the_tests_support_it(text):
    _, *rows = Reader(text).tables["scores"]
    for column in (2, 3):  # pixel accuracy and mean IoU differ by points
        assert [row[column].attributes["class"] for row in rows] == ["num", "num best", "num"]
    for column in range(4, len(rows[0])):
        values = [float(row[column].attributes["data-value"]) for row in rows]
        for row, value in zip(rows, values, strict=True):
            assert row[column].attributes["class"] in ("num", "num best") if value == max(values) else "num"


def test_the_page_asks_nobody_for_anything(text):
    reader = Reader(text)
    anchors = [address[1:] for address in reader.addresses if address.startswith("#")]
    assert set(anchors) <= set(reader.ids)
    assert len(anchors) >= 9
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(|//cdn|fetch\(|XMLHttp", text)


def test_sections_and_pictures_are_there(text):
    reader = Reader(text)
    wanted = {"scores", "certainty", "training", "classes", "labels", "confusion", "pictures", "configuration"}
    assert wanted <= set(reader.ids)
    images = [address for address in reader.addresses if address.startswith("data:image/jpeg")]
    assert len(images) == 2 * (2 + 3)  # two images: image, label, three rows
    assert "ρ₀ₖ" in text
    assert text.count("<polyline") >= 6  # two charts of three curves


def test_configuration_shows_what_differs_and_only_that(text):
    head, *rows = Reader(text).tables["facts"][:40]
    named = {row[0].text: [cell.text for cell in row[1:]] for row in rows if len(row) == len(head)}
    assert named["loss._target_"][:2] == ["segkit.losses.cross_entropy", "segkit.losses.margin_calibration"]
    assert named["loss.tau"][1:2] == ["10.0"]
    assert "model._target_" not in named


def test_the_same_runs_give_the_same_bytes(runs, text):
    assert page(compare(runs, num_samples=200), pictures=2) == text


def test_names_from_files_cannot_write_html(make_run):
    evil = "<script>alert(1)</script>\u202e\x9b"
    run = make_run("evil", classes=("road", evil), protocol={"dataset": evil})
    made = page(compare([run], num_samples=200))
    assert evil not in made
    assert made.count("<script>") == 1
    assert not set("\u202e\x9b") & set(made)
    Reader(made)


def test_one_run_and_runs_without_extras_make_a_page(make_run):
    run = make_run("bare", num_images=1)
    for name in ("metrics.jsonl", "provenance.json", "label_counts.json", "per_image.npz"):
        (run / name).unlink()
    comparison = compare([run])
    assert len(comparison.notes) == 4
    reader = Reader(page(comparison))
    assert {"scores", "configuration"} <= set(reader.ids)
    assert not {"training", "certainty", "confusion", "labels", "origin"} & set(reader.ids)


def test_many_classes_fold_into_a_picture(make_run):
    run = make_run("many", classes=[f"class {k}" for k in range(60)], num_images=3)
    assert "data:image/png" in page(compare([run], num_samples=200))


# Windows of a browser have a least width, frames have not: the report tells the page around it how wide it is.
_INNER = """<script>
const root = document.documentElement;
const cut = [...document.querySelectorAll(".name, .column, th, figcaption, .key li")].filter(
  (item) => item.scrollWidth > item.clientWidth + 1 || item.scrollHeight > item.clientHeight + 1);
parent.postMessage([innerWidth, Math.max(0, root.scrollWidth - innerWidth), cut.length].join(" "), "*");
</script>"""
_OUTER = """<!doctype html><iframe src="report.html" style="border:0;width:%dpx;height:900px"></iframe><script>
addEventListener("message", (event) => { document.documentElement.dataset.probe = event.data; });
</script>"""


@pytest.fixture(scope="module")
def long_names(tmp_path_factory, make_run_at):
    """The page of a run whose classes have names of forty letters, some without a space."""
    names = [
        f"class {k}, described in forty letters and m"[:40] if k % 2 else f"class_{k}_" + 32 * "m" for k in range(8)
    ]
    run = make_run_at(tmp_path_factory.mktemp("long") / "a", classes=names, margins=True, num_pictures=2)
    return page(compare([run], num_samples=200))


@pytest.mark.parametrize(("name", "width"), [("text", 1400), ("long_names", 390), ("long_names", 1300)])
def test_a_browser_shows_it_without_complaint(name, width, tmp_path, request):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    (tmp_path / "report.html").write_text(request.getfixturevalue(name) + _INNER, encoding="utf-8")
    (tmp_path / "outer.html").write_text(_OUTER % width, encoding="utf-8")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1600,900",
         "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/outer.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert f'data-probe="{width} 0 0"' in done.stdout  # the page itself does not scroll sideways, and nothing is cut


def test_report_needs_no_torch():
    code = "import sys, segkit.report.page, segkit.report.comparison; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
