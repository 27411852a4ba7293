"""``segkit plot losses``: the curves against their formulas, and the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from segkit.commands import plot
from segkit.guard import guarded


@pytest.mark.parametrize("rho", [0.0, 0.5, 3.0])
def test_the_log_loss_is_that_of_the_paper(rho):
    lam = np.array([-6.0, -0.5, 0.0, 1e-3, 2.0, 9.0])
    expected = [math.log2(1 + 2 ** (rho - value)) for value in lam]
    np.testing.assert_allclose(plot.calibrated_log_loss(lam, rho), expected, rtol=1e-9)


def test_the_margin_loss_is_that_of_the_paper():
    lam = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(plot.margin_loss(lam, 2.0), [1, 1, 0.75, 0.5, 0, 0])
    np.testing.assert_allclose(plot.margin_loss(lam, 0.0), [1, 1, 0, 0, 0, 0])


def test_the_log_loss_of_base_two_bounds_the_margin_loss():
    lam = np.linspace(-4, 4, 33)
    for rho in (0.5, 1.0, 2.0):
        assert (plot.calibrated_log_loss(lam, rho) >= plot.margin_loss(lam, rho)).all()


def call(monkeypatch, *arguments):
    argv = [*map(str, arguments)]
    guarded(lambda: plot.run(argv))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_is_written(monkeypatch, tmp_path, capsys, ending):
    file = tmp_path / "new" / f"losses.{ending}"
    call(monkeypatch, "losses", "--output", file)
    capsys.readouterr()
    call(monkeypatch, "losses", "--output", file)  # a verb's own picture is drawn anew
    assert capsys.readouterr().out == f"written: {file}\n"
    if ending == "png":
        assert np.asarray(Image.open(file)).std() > 5
    elif ending == "svg":
        assert "<svg" in file.read_text(encoding="utf-8")
    else:
        assert file.read_bytes().startswith(b"%PDF")


def test_one_curve_per_margin():
    figure = plot.draw([0.0, 1.0, 2.5], 3.0)
    assert [len(panel.get_legend().get_texts()) for panel in figure.axes] == [3, 3]
    x, y = figure.axes[0].lines[-1].get_data()  # of the vertical line at 0 drawn last
    assert (list(x), list(y)) == ([0, 0], [0, 1])
    lam, values = figure.axes[1].lines[2].get_data()
    assert values[np.searchsorted(lam, 2.5)] == pytest.approx(1.0, abs=1e-2)  # log2(1 + 2^0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.gif"], "--output is x.gif, but its ending must be one of .png, .svg, .pdf"),
        (["--output", "x.png", "--rho", "-1"], "--rho is -1, but a margin is a number of logits from 0 to 1000"),
        (["--output", "x.png", "--rho", "1e300"], "--rho is 1e+300, but a margin is a number"),
        (["--output", "x.png", "--rho", "nan"], "--rho is nan, but a margin is a number"),
        (
            ["--output", "x.png", "--range", "1e300"],
            "--range is 1e+300, but must be a positive number of logits, at",
        ),
        (["--output", "x.png", "--range", "0"], "--range is 0, but must be a positive number of logits"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "losses", *arguments)
    assert capsys.readouterr().err.startswith(f"error: {message}")
