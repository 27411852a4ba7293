"""A small data set and the arguments of a run on it, and the command line of a verb."""

from __future__ import annotations

import warnings

import pytest

from segkit.cli import verb_function
from segkit.guard import guarded
from segkit.synthetic.sample_maker import make_sample

TINY = [
    "model=coplenet",
    "model.feature_channels=[4,8,16,32,64]",
    "model.num_groups=2",
    "dataset.crop=[32,32]",
    "dataset.eval_resize={short_side:null,size:[32,48]}",
    "batch_size=2",
    "evaluation.pictures=1",
    "workers=0",
    "device=cpu",
]


@pytest.fixture
def root(tmp_path):
    return make_sample("camvid", tmp_path / "CamVid", num_images=4, scale=0.1)


@pytest.fixture
def arguments(root, tmp_path):
    return ["dataset=camvid", f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}", *TINY]


@pytest.fixture
def call(request, capsys):
    """The verb that the module of the test is named after: arguments to (exit code, stdout, stderr)."""
    verb = verb_function(request.module.__name__.rpartition("test_")[2])

    def called(*arguments):
        code = 0
        with warnings.catch_warnings():
            for message in ("very few training pixels", "no training pixel"):  # in five small images
                warnings.filterwarnings("ignore", message=message)
            try:
                guarded(lambda: verb([*map(str, arguments)]))
            except SystemExit as end:
                code = end.code or 0
        return code, *capsys.readouterr()

    return called
