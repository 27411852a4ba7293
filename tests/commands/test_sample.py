"""``segkit sample``: the command around the maker of synthetic data sets."""

from __future__ import annotations

import shlex
import signal

import numpy as np
import pytest
from PIL import Image

from segkit.config.compose import compose
from segkit.data import open_dataset
from segkit.run.splits import open_phases
from segkit.runtime import tidied_up_when_ended
from segkit.synthetic import sample_maker


def test_what_is_written_opens_with_the_command_that_is_printed(call, tmp_path):
    target = tmp_path / "a folder [x], 'ü' #1 \"=\""
    code, out, _ = call("dataset=camvid", "--n", 3, "--output", target, "--scale", 0.1)
    assert code == 0
    written, hint = out.splitlines()
    assert written == f"written: {target}"
    assert hint.startswith("try: segkit check dataset=camvid ")
    overrides = shlex.split(hint)[3:]
    phases = open_phases(compose(overrides))
    (splits,) = phases.values()
    assert len(splits.train) == 3
    assert splits.train[0].image.shape == (36, 48, 3)


def test_the_seed_decides_the_pixels(call, tmp_path):
    images = []
    for number, seed in enumerate((1, 1, 2)):
        target = tmp_path / str(number)
        options = ("--n", 2, "--seed", seed, "--output", target, "--scale", 0.1)
        assert call("dataset=folder", *options)[0] == 0
        first = open_dataset("folder", root=target, split="train").samples[0].image
        images.append(np.array(Image.open(first)))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["camvid"], "the first argument is 'camvid', but must be dataset=NAME"),
        (["data=camvid"], "the first argument is 'data=camvid', but must be dataset=NAME"),
        (["dataset=camvidd"], "there is no sample of data set 'camvidd'; samples can be made of ade20k, bdd100k"),
        (["dataset=camvid", "--n", "0"], "'0' is no whole number from 1 to 100000"),
        (["dataset=camvid", "--n", "1000000000"], "'1000000000' is no whole number from 1 to 100000"),
        (["dataset=camvid", "--scale", "2"], "the scale of a sample's images is 2.0, but must be from 0.01 to 1"),
        (["dataset=camvid", "--scale", "1e-308"], "the scale of a sample's images is 1e-308, but must be from 0.01"),
    ],
)
def test_mistakes_end_with_2_and_write_nothing(call, tmp_path, arguments, sentence):
    code, out, err = call(*arguments, "--output", tmp_path / "new")
    assert (code, out) == (2, "")
    assert sentence in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_sample_leaves_no_half(monkeypatch, call, tmp_path, number, expected):
    def half(output, **options):
        (output / "images").mkdir(parents=True)
        signal.raise_signal(number)

    before = {other: signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for other in before:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)
        monkeypatch.setitem(sample_maker.WRITERS, "camvid", half)
        with tidied_up_when_ended():
            code, *_ = call("dataset=camvid", "--output", tmp_path / "new")
        # while Python ends, a handler of its own would show a traceback
        assert {signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGHUP)} == {signal.SIG_DFL}
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    assert code == expected
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(call, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    code, _, err = call("dataset=camvid", "--output", tmp_path)
    assert code == 2
    assert f"{tmp_path} exists and is not an empty folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
