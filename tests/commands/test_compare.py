"""``segkit compare`` as a command."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("run_folders", Path(__file__).parents[1] / "report" / "conftest.py")
assert _SPEC is not None
_RUN_FOLDERS = importlib.util.module_from_spec(_SPEC)
sys.modules["run_folders"] = _RUN_FOLDERS
_SPEC.loader.exec_module(_RUN_FOLDERS)
make_run, make_run_at = _RUN_FOLDERS.make_run, _RUN_FOLDERS.make_run_at


@pytest.fixture
def call(call, monkeypatch, tmp_path):
    """The verb, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return call


def test_a_report_is_written(call, make_run, tmp_path):
    one, other = make_run("a", "loss=cross_entropy"), make_run("b", skill=0.85)
    code, out, err = call(one, other, "--samples", 100)
    assert (code, err) == (0, "")
    assert "written: report.html" in out
    assert "margin calibration (paper), τ=10, υ=1" in out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert str(other) in text


def test_tables_alone(call, make_run, tmp_path):
    code, out, _ = call(make_run("a"), "--markdown", "new/t.md", "--csv", "t.csv", "--latex", "t.tex")
    assert code == 0
    assert out.count("written: ") == 3
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "new" / "t.md").read_text(encoding="utf-8").startswith("| ")
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").startswith("group,run,phase,seed,pixel_accuracy,mean_iou")
    assert r"\toprule" in (tmp_path / "t.tex").read_text(encoding="utf-8")


def test_a_sweep_says_what_is_left_out(call, make_run, tmp_path):
    for tau in (1, 5):
        make_run(f"sweep/{tau}", f"loss.tau={tau}.0")
    (make_run("sweep/7", "loss.tau=7.0") / "results.json").unlink()
    code, out, _ = call(tmp_path / "sweep", "--output", "r.html", "--samples", 100)
    assert code == 0
    assert f"note: left out: {tmp_path}/sweep/7 has no results.json" in out
    assert "left out" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_mixed_protocols_are_refused_and_then_marked(call, make_run, tmp_path):
    runs = make_run("a"), make_run("b", protocol={"split": "test"})
    code, _, err = call(*runs)
    assert code == 2
    assert err.startswith("error: these runs were not evaluated alike: split is 'val' in ")
    assert err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
    code, out, _ = call(*runs, "--allow-mixed-protocols", "--samples", 100)
    assert code == 0
    assert "warning: not evaluated alike: split is 'val'" in out
    assert "Their scores are not comparable." in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "error: gone is not a folder: name run folders"),
        (["."], "error: . is neither a run"),
        (["gone", "--samples", "5"], "error: --samples is 5, but an interval needs at least 100"),
        (
            ["gone", "--samples", "1000000000"],
            "error: --samples is 1000000000, but an interval needs at least 100 and at",
        ),
        (["gone", "--predict", "--evaluation", "x"], "error: --predict shows what was scored after training"),
        (
            ["gone", "--predict", "--csv", "a.csv"],
            "error: --predict is for the report, which no option asks",
        ),
        (["gone", "--root", "data"], "error: --root is for --predict, which is not given: leave it out, or add --pre"),
        (["gone", "--device", "cpu"], "error: --device is for --predict, which is not given"),
        (["gone", "--pictures", "-1"], "error: segkit compare: argument --pictures: '-1' is no whole number from 0"),
    ],
)
def test_bad_input_is_one_sentence(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_places_that_cannot_be_written_are_refused_before_the_runs_are_read(call, tmp_path):
    for place, message in ((tmp_path, "which is a folder: give the name"), ("/dev/null/new/t.csv", "is no folder")):
        code, _, err = call("gone", "--csv", place)
        assert code == 2
        assert err.startswith("error: --csv is ")
        assert message in err
    (tmp_path / "report.html").mkdir()  # where the report goes without --output
    assert "which is a folder: give the name" in call("gone")[2]


def test_no_table_replaces_a_file_of_the_data(call, make_run, tmp_path):
    (tmp_path / "train.txt").write_text("kept")
    code, _, err = call(make_run("a", f"dataset.root={tmp_path}"), "--markdown", "train.txt")
    assert (code, (tmp_path / "train.txt").read_text()) == (2, "kept")
    assert "--markdown is train.txt, within the data in" in err


def test_a_report_that_cannot_be_made_leaves_no_table(call, make_run, tmp_path):
    run = make_run("a", num_pictures=1)
    next((run / "pictures").glob("*_label.png")).write_bytes(b"")
    code, _, err = call(run, "--markdown", "t.md", "--output", "r.html", "--samples", 100)
    assert code == 2
    assert "_label.png cannot be read" in err
    assert not (tmp_path / "t.md").exists()


def test_the_verb_is_known(make_run, tmp_path):
    run = make_run("a")
    done = subprocess.run(
        [sys.executable, "-m", "segkit.cli", "compare", str(run), "--csv", str(tmp_path / "t.csv")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "written: " in done.stdout
