"""Names that would be commands elsewhere: they show as they are written, in every table that segkit makes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from segkit.check.report import as_text
from segkit.cli import call
from segkit.errors import InputError
from segkit.guard import guarded
from segkit.progress import MOST_LETTERS, need_no_reader, show, track
from segkit.report.comparison import compare
from segkit.report.page import page
from segkit.report.tables import class_table, csv_text, latex, markdown, screen_table
from segkit.report.text import for_csv, for_latex, for_markdown, for_matplotlib, for_terminal
from segkit.training.tracking import Tracker

NAMES = ("car [rare]", "tool [/x]", "[bold]loud[/bold]", ":smile:", r"back\slash", "50 % of $x$ & {y_1} #~^")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("car [rare] τ=10", "car [rare] τ=10"),
        ("a\x1b[31mred\x1b[0m", r"a\x1b[31mred\x1b[0m"),
        ("a\nb\tc\rd\0", r"a\nb\tc\rd\x00"),
        ("\x9b31m", r"\x9b31m"),
        ("left \u202egnp.exe", r"left \u202egnp.exe"),
        ("line\u2028break", r"line\u2028break"),
        ("lone \udcff surrogate", r"lone \udcff surrogate"),
        ("Straße 道路 🚗", "Straße 道路 🚗"),
    ],
)
def test_a_terminal_sees_what_has_a_form_and_escapes_for_the_rest(text, seen):
    assert for_terminal(text) == seen


@pytest.mark.parametrize("name", NAMES)
def test_a_table_on_the_screen_shows_names_as_they_are_written(name):
    text = screen_table([name, "b"], [[name, "1"]], title=name, left=[name], foot=[[name, "2"]], width=90)
    assert text.count(name) == 4
    assert "\x1b" not in text


def test_a_name_cannot_write_to_the_terminal():
    text = screen_table(["class"], [["a\x1b]0;title\x07"], ["b\nc"]], title="t\x1b[2J", width=90)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"b\nc" in text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (r"50%_a&b\c{}", r"50\%\_a\&b\textbackslash{}c\{\}"),
        ("car [rare] *", "car {[}rare{]} {*}"),
        ("a\n\\input{x}", r"a\textbackslash{}n\textbackslash{}input\{x\}"),
        ("$x^2$ ~ #1 <|>", r"\$x\textasciicircum{}2\$ \textasciitilde{} \#1 \textless{}\textbar{}\textgreater{}"),
        ("τ=10, υ=1", r"$\tau$=10, $\upsilon$=1"),
    ],
)
def test_latex_letters(text, written):
    assert for_latex(text) == written


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a|b", r"a\|b"),
        ("a\n| b", r"a\\n\| b"),
        ("[x](http://y)", r"\[x\](http://y)"),
        ("<b>*_`~", r"&lt;b&gt;\*\_\`\~"),
        ("&amp;", "&amp;amp;"),
    ],
)
def test_markdown_letters(text, written):
    assert for_markdown(text) == written


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_a_spreadsheet_runs_no_name(text):
    assert for_csv(text) == "'" + for_terminal(text)


def test_an_ordinary_name_stays_as_it_is_in_csv():
    assert for_csv("car [rare], 1=1") == "car [rare], 1=1"
    assert for_csv("a\x1b[31m\nb") == r"a\x1b[31m\nb"


@pytest.mark.parametrize("name", [*NAMES, "$", r"\$", "$$x", "a\nb"])
def test_matplotlib_draws_names_and_no_formulas(name):
    from matplotlib.cbook import is_math_text
    from matplotlib.figure import Figure

    if "\\" not in name:
        assert not is_math_text(for_matplotlib(name))
    figure = Figure()
    figure.text(0, 0, for_matplotlib(name))
    figure.draw_without_rendering()


# -- all tables ----------------------------------------------------------------------------------------------------

EVIL = ("car [rare]", "tool [/x]", "=cmd()|x", "a\n| b | c |", "&\\input{x}\n%", "<img src=x>", "\x1b[2Jz", "\udcff")


@pytest.fixture(scope="module")
def table(tmp_path_factory, make_run_at):
    root = tmp_path_factory.mktemp("runs")
    first = make_run_at(root / "a", "loss=cross_entropy", classes=EVIL, protocol={"dataset": "=d\n[/x]"})
    second = make_run_at(root / "b [bold]", classes=EVIL, protocol={"dataset": "=d\n[/x]"})
    return compare([first, second])


def test_markdown_has_one_line_per_row(table):
    lines = markdown(table.table).splitlines()
    assert len(lines) == 2 + 2 + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]} == {len(EVIL) + 3 + 2}
    assert r"car \[rare\]" in lines[0]


def test_latex_has_one_line_per_row(table):
    lines = latex(table.table).splitlines()
    assert len(lines) == 2 + 1 + 1 + 1 + 2 + 2
    body = [line for line in lines if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(EVIL) + 3}
    commands = set(re.findall(r"\\[a-z]+", "\n".join(lines[1:])))
    assert commands <= {
        r"\begin", r"\end", r"\toprule", r"\midrule", r"\bottomrule", r"\textbf",
        r"\textbackslash", r"\textbar", r"\textless", r"\textgreater", r"\tau", r"\upsilon",
    }  # fmt: skip


def test_csv_reads_back(table):
    head, *rows = csv.reader(io.StringIO(csv_text(table.table)))
    assert head[6:9] == ["mean_iou_low", "mean_iou_high", "mean_iou_std"]
    assert head[9:] == [f"{kind}/{for_terminal(name)}" for kind in ("iou", "precision", "recall") for name in EVIL]
    assert [row[1] for row in rows] == [str(run.path) for run in table.runs]


def test_a_long_name_is_whole_on_a_narrow_terminal():
    name = "traffic_sign_" * 10
    text = screen_table(["class", "IoU"], [[name, "61.20"]], left=["class"], width=80)
    assert "".join(line.split()[0] for line in text.splitlines()[2:] if "─" not in line) == name
    assert "61.20" in text


def test_class_table_shows_names(table):
    results = json.loads(json.dumps(table.runs[0].results)) | {"absent_classes": ["gone\x1b[2J"]}
    text = class_table(results)
    assert all(name in text for name in ("car [rare]", "tool [/x]", r"a\n| b | c |", r"\x1b[2Jz", r"gone\x1b[2J"))
    assert "\x1b" not in text


def test_class_table_warns_where_no_pixel_was_scored(table):
    results = json.loads(json.dumps(table.runs[0].results))
    assert "warning" not in class_table(results)
    for scores in results["classes"].values():
        scores["target_pixels"] = 0
    assert "images have no valid pixel, all have a value that is ignored" in class_table(results)


def test_the_page_shows_names(table):
    text = page(table)
    assert "<img src=x>" not in text
    assert "&lt;img src=x&gt;" in text
    assert "car [rare]" in text


HOSTILE = "tool [/x] [red]\x1b]0;gone\x07\nerror: no"
SEEN = r"tool [/x] [red]\x1b]0;gone\x07\nerror: no"


def terminal(monkeypatch):
    """Make standard error what rich takes for a terminal, and return it; no fixture: pytest sets its own after them."""
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", out)
    for name, value in {"COLUMNS": "200", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    return out


def test_the_work_goes_on_when_nobody_reads_its_output_and_one_stream_is_closed(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115 (it cannot be closed in order)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    need_no_reader()
    show("one line")
    print("x" * 100_000)
    sys.stdout.flush()
    assert list(track([1, 2], description="lines")) == [1, 2]
    sys.stderr.write("lost")
    sys.stderr.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_under_the_output_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    full = [open("/dev/full", "w") for _ in range(2)]  # noqa: SIM115 (they cannot be closed in order)
    monkeypatch.setattr(sys, "stdout", full[0])
    need_no_reader()
    with pytest.raises(SystemExit, match=r"^2$"):
        guarded(lambda: print("a table"))
    sys.stdout.flush()  # as Python does at the end
    assert capsys.readouterr().err.startswith("error: no space is left for the standard output (No space left on")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", full[1])
    need_no_reader()
    with pytest.raises(SystemExit, match=r"^2$"):
        guarded(lambda: call("verb", []))
    for stream in full:
        with contextlib.suppress(OSError):
            stream.close()


def test_a_cell_of_a_table_is_not_endless():
    lines = screen_table(["n"], [["n" * 100_000]], title="t" * 100_000, width=100).splitlines()
    assert len(lines) < 60
    assert sum(line.count("t") for line in lines) == MOST_LETTERS


def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch):
    seen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(seen, encoding="ascii"))
    need_no_reader()
    show("grün, τ=10")
    assert seen.getvalue() == rb"gr\xfcn, \u03c4=10" + b"\n"


def test_a_bar_shows_names_as_they_are_written(monkeypatch):
    seen = terminal(monkeypatch)
    assert list(track([1, 2], description=HOSTILE)) == [1, 2]
    assert SEEN in seen.getvalue()
    assert "\x1b]0;" not in seen.getvalue()


def test_the_bar_of_training_shows_names_as_they_are_written(monkeypatch, tmp_path):
    seen = terminal(monkeypatch)
    tracker = Tracker(tmp_path, phase="tool [/x]", num_steps=2)
    tracker.show(1, {"loss": "[/red] 1"})
    tracker.message(HOSTILE)
    tracker.close()
    shown = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", seen.getvalue())
    assert "tool [/x]" in shown
    assert "[/red] 1" in shown
    assert SEEN in shown


def test_the_guard_shows_paths_as_they_are_written(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def command():
        raise InputError(f"{HOSTILE} is missing")

    with pytest.raises(SystemExit):
        guarded(command)
    assert capsys.readouterr().err == f"error: {SEEN} is missing\n"
    assert warnings.formatwarning(HOSTILE, UserWarning, "file", 1) == f"warning: {SEEN}\n"


def test_the_guard_leaves_out_the_middle_of_an_endless_sentence(capsys):
    def command():
        raise InputError(f"the list names {'x' * 100_000}: correct the line")

    with pytest.raises(SystemExit):
        guarded(command)
    said = capsys.readouterr().err
    assert said.startswith("error: the list names xxx")
    assert said.endswith("xxx: correct the line\n")
    assert len(said) < 2100


def test_findings_of_check_are_one_line_each():
    content = {"splits": [], "rehearsal": None, "findings": [{"level": "error", "text": HOSTILE, "files": []}]}
    assert as_text(content).splitlines()[0] == f"error: {SEEN}"
