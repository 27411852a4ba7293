"""The report of the study: its stored results give the committed tables, and its figures are plain arithmetic."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from segkit.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "docs" / "study"
sys.path.insert(0, str(REPOSITORY / "scripts"))
study_report = pytest.importorskip("study_report")
study = pytest.importorskip("study")


@pytest.mark.parametrize("name", [".", "confirmation", "learning_rates", "tuned"])
def test_the_committed_tables_are_those_of_the_stored_results(tmp_path, name):
    folder = STUDY / name
    shutil.copytree(folder / "results", tmp_path / "results")
    study_report.report(tmp_path, yaml.safe_load((folder / "study.yaml").read_text()))
    tables = sorted(folder.glob("*.txt"))
    assert tables
    for table in tables:
        assert (tmp_path / table.name).read_text() == table.read_text()
    for figure in folder.glob("*.svg"):
        assert (tmp_path / figure.name).read_text().startswith("<?xml")
    assert sum(path.stat().st_size for path in (folder / "results").iterdir()) < 700_000


def test_learning_rates_by_hand(tmp_path):
    """The rate of an arm is in its overrides; the best of each decision is bold."""
    for arm, rate, pole in (
        ("cross_entropy_low", "1e-4", 5),
        ("cross_entropy", "1e-3", 10),
        ("cross_entropy_high", "1e-2", 8),
    ):
        write(tmp_path, arm, 0, ([[80, pole], [90, 5]], [[100 - pole, pole], [95, 5]]))
        path = tmp_path / "results" / f"arms-{arm}-0.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"overrides": ["a=1", f"schedule.finetune.lr={rate}"]})
        )
    arms = {"cross_entropy": [], "cross_entropy_low": [], "cross_entropy_high": []}
    study_report.report(tmp_path, {"arms": {"each": arms}, "curves": {"each": {}}, "seeds": [0]})
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[2:5]] == ["argmax, 1e-4", "argmax, 1e-3", "argmax, 1e-2"]
    scores = [50 * (170 / (195 - pole) + (pole + 5) / 30) for pole in (5, 10, 8)]
    cells = [f"**{score:.2f}**" if score == max(scores) else f"{score:.2f}" for score in scores]
    assert [cell.strip() for cell in lines[4].split("|")[2:8]] == cells * 2


def write(folder, arm, seed, counts):
    """A result of two blocks and two classes; ``counts`` is tp and predicted of each block."""
    decisions = {name: dict(zip(("tp", "predicted"), counts, strict=True)) for name in study_report.DECISIONS}
    content = {"classes": ["road", "pole"], "target": [[80, 20], [90, 10]], "counts": decisions}
    (folder / "results").mkdir(exist_ok=True)
    path = folder / "results" / f"arms-{arm}-{seed}.json"
    path.write_text(json.dumps(content | {"seconds": 1, "versions": {"a": 1}}))


def test_figures_by_hand(tmp_path):
    """Cross-entropy has recall below precision for the pole; margins of one logit take four more pixels from it."""
    for seed, (pole, fewer) in enumerate([(10, 4), (12, 3)]):
        base = ([[80, pole], [90, 5]], [[100 - pole, pole], [95, 5]])
        margin = ([[80, pole - fewer], [90, 5]], [[100 - pole + fewer, pole - fewer], [95, 5]])
        write(tmp_path, "cross_entropy", seed, base)
        write(tmp_path, "mc_no_margin", seed, base)
        write(tmp_path, "mc_mean1", seed, margin)
    arms = {"cross_entropy": [], "mc_no_margin": [], "mc_mean1": []}
    study_report.report(tmp_path, {"arms": {"each": arms}, "curves": {"each": {}}, "seeds": [0, 1, 2]})

    def mean_iou(pole):  # road: 170 pixels, all found; pole: 30, none claimed wrongly
        return 50 * (170 / (170 + 30 - pole - 5) + (pole + 5) / 30)

    with_margin, without = ([mean_iou(pole) for pole in poles] for poles in ((6, 9), (10, 12)))
    lines = (tmp_path / "table.txt").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| mc_mean1 | argmax"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2:5] == [f"{np.mean(with_margin):.2f}", f"{np.std(with_margin, ddof=1):.2f}", "2"]
    assert cells[5].startswith(f"{np.mean(with_margin) - np.mean(without):+.2f} [-")
    lines = (tmp_path / "signs.txt").read_text().splitlines()[2:]
    road, pole, hits = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert road[1].startswith("+")  # predicted too often, and yet it loses with the pole
    assert road[2].endswith("miss")
    assert pole[1].startswith("-")
    assert pole[2].endswith("hit")
    assert hits[2] == "1 of 2 [0.09, 0.91]"


def test_interval_of_a_share():
    """Agresti and Coull (1998) and every calculator: 8 of 10."""
    assert study_report.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert study_report.wilson(0, 6)[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{arms: [", r"study.yaml cannot be read as a study \(expected the node content"),
        ("12", "study.yaml cannot be read as a study"),
        ("{seeds: [0]}", r"study.yaml cannot be read as a study \('arms'\)"),
        (("seeds: [0, 1, 2]", "seeds: [a]"), "a number among seeds, block and fit that is no whole one"),
        (("cross_entropy: [loss=cross_entropy]", "cross_entropy: loss"), "that is no list of overrides"),
    ],
)
def test_a_damaged_study_is_named(tmp_path, content, message):
    whole = (STUDY / "study.yaml").read_text()
    text = content if isinstance(content, str) else whole.replace(*content)
    assert text != whole
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        study.read_study(path)


def test_jobs_of_the_study(tmp_path):
    study.read_study(STUDY / "confirmation" / "study.yaml")
    content = study.read_study(STUDY / "study.yaml")
    options = Namespace(part="arms", seeds=[1], root="data", study=tmp_path, work=tmp_path)
    jobs = study.jobs_of(options, content)
    assert [path.name for _, path in jobs] == [f"arms-{arm}-1.json" for arm in content["arms"]["each"]]
    (tmp_path / "results").mkdir()
    jobs[0][1].write_text("{}")
    assert study.jobs_of(options, content) == jobs[1:]
    with pytest.raises(InputError, match=r"--seeds has 7, but the seeds of arms are \[0, 1, 2\]"):
        study.jobs_of(Namespace(**{**vars(options), "seeds": [7]}), content)
    with pytest.raises(InputError, match="there is no --root: give the folder CamVid, or --table"):
        study.jobs_of(Namespace(**{**vars(options), "root": None}), content)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"counts": {}, "target": 1}', '{"target": [[1]], "counts": 3}'])
def test_a_damaged_result_is_named(tmp_path, text):
    content = {"arms": {"each": {"cross_entropy": []}}, "curves": {"each": {}}, "seeds": [0]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "arms-cross_entropy-0.json").write_text(text)
    with pytest.raises(InputError, match=r"arms-cross_entropy-0.json .*: delete it, and the command of the study"):
        study_report.load_all(tmp_path, content)


def test_logits_are_recorded_once_and_given_again():
    batches = [Namespace(images=torch.full((1, 3, 2, 2), value)) for value in (1.0, 2.0)]
    recorded = study.Recorded(torch.nn.Conv2d(3, 4, 1), batches)
    first, second, again = (recorded(torch.empty(0)) for _ in range(3))
    assert first is again
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
