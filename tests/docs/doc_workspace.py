"""A folder in which the commands of the documentation run: drawn data, tiny finished runs, in one process."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from doc_pages import REPOSITORY
from PIL import Image

from segkit import cli
from segkit.config import compose as compose_module
from segkit.config.schema import Config, check_targets, plain
from segkit.errors import InputError
from segkit.guard import guarded
from segkit.run.splits import open_phases
from segkit.synthetic.sample_maker import WRITERS, make_sample

SMALL_MODEL = ("model=coplenet", "model.feature_channels=[4,8,16,32,64]", "model.num_groups=2")
SMALL = (
    "dataset.crop=[48,64]",
    "batch_size=2",
    "accumulate=1",
    "evaluation.every_epochs=null",
    "evaluation.max_images=2",
    "evaluation.pictures=1",
    "precision=fp32",
    "workers=0",
    "device=cpu",
)
FOLDERS = {
    "CamVid": "camvid",
    "mine": "folder",
    "ADEChallengeData2016": "ade20k",
    "pairs": None,
    "videos": None,
    "fields": None,
}
"""Names below /data that are not those of a data set; None: not drawn by ``segkit sample``."""
DEFAULT = "cityscapes"
"""Data set of RUN on a page that is about none."""


class Workspace:
    """``root`` holds data/, outputs/, runs/ and whatever the commands write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.configs = root / "configs"
        self.done: dict[tuple[str, ...], str] = {}
        self.composed: dict[tuple[str, ...], Config] = {}
        for name in ("tmp", "photos", "weights"):
            (root / name).mkdir()
        (root / "weights" / "se_resnext50.pth").touch()
        shutil.copytree(REPOSITORY / "configs", self.configs)
        generator = np.random.default_rng(0)
        for name in ("one.png", "two.png"):
            Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(root / "photos" / name)

    # -- what the placeholders stand for -------------------------------------------------------------------------

    def data(self, folder: str) -> Path:
        """What /data/``folder`` stands for: a sample of the data set."""
        target = self.root / "data" / folder
        name = FOLDERS.get(folder, folder)
        if target.exists():
            return target
        if folder == "pairs":
            write_pairs(target)
        elif folder == "videos":
            write_videos(target)
        elif folder == "fields":
            write_fields(target)
        elif folder == "ADEChallengeData2016":
            target.symlink_to(self.data("ade20k") / folder)
        else:
            assert name in WRITERS, f"/data/{folder} is no data set: name the folder after one, or see FOLDERS"
            make_sample(name, target, num_images=4, scale=0.1)
        return target

    def run(self, dataset: str, *, which: str = "") -> Path:
        """A finished run on ``dataset``; ``which``: "" and "_B" with margins, "_A" with cross-entropy."""
        folder = self.root / "runs" / f"{dataset}{which}"
        if not folder.exists():
            loss = ["loss=cross_entropy"] if which == "_A" else []
            self.train([*self.source(dataset), *loss, "schedule=single"], folder)
        return folder

    def bundle(self) -> Path:
        """The failure bundle of a run that diverged."""
        from segkit.errors import NonFiniteLoss

        folder = self.root / "runs" / "diverged"
        if not folder.exists():
            with contextlib.suppress(NonFiniteLoss):
                wild = ["optimizer=sgd", "optimizer.lr=1e30", "loss=cross_entropy_dice", "schedule=single"]
                self.train(wild, folder, steps=6)
        (bundle,) = (folder / "train").glob("failure-*")
        return bundle

    def source(self, dataset: str) -> list[str]:
        """The overrides that name ``dataset`` and its folder; the embedded one is made small."""
        if dataset == "synthetic":
            return ["dataset=synthetic", "dataset.reader.num_images=4"]
        folder = {"camvid": "CamVid", "folder": "mine"}.get(dataset, dataset)
        return [f"dataset={dataset}", f"dataset.root={self.data(folder)}"]

    def substitute(self, text: str, *, dataset: str | None) -> str:
        """``text`` with the paths of this folder in place of /data, /tmp, /scratch, RUN and ``...``."""
        dataset = dataset or DEFAULT
        text = re.sub(r"(?<![\w/])/(data|tmp|scratch)/(\w+)", self._place, text)
        text = text.replace("RUN/pretrain/", "RUN/train/")  # the run of the tests has one phase
        text = re.sub(r"\bRUN/train/failure-\d+", lambda _: str(self.bundle()), text)
        text = re.sub(r"(?<![\w./])RUN(_[AB])?\b", lambda found: str(self.run(dataset, which=found[1] or "")), text)
        text = text.replace("dataset=...", f"dataset={dataset}")
        text = text.replace("dataset.holdout=0.1", "dataset.holdout=0.5")  # a tenth of the four images is none
        if "dataset.root=..." in text:
            chosen = re.findall(r"\b(?:dataset|experiment)=\w+", text)
            text = text.replace("dataset.root=...", self.source(self.compose(chosen).dataset.name)[1])
        return text

    def _place(self, found: re.Match[str]) -> str:
        kind, name = found.groups()
        return str(self.data(name) if kind == "data" else self.root / kind / name)

    # -- training ------------------------------------------------------------------------------------------------

    def compose(self, overrides: list[str]) -> Config:
        """The configuration, with the option files that a page adds; what was composed before is copied."""
        key = tuple(overrides)
        before = compose_module.config_dir
        compose_module.config_dir = lambda: self.configs
        try:
            if key not in self.composed or any(item.startswith("trust") for item in key):  # which acts on the process
                self.composed[key] = compose_module.compose(overrides)
            return copy.deepcopy(self.composed[key])
        finally:
            compose_module.config_dir = before

    @contextlib.contextmanager
    def small_runs(self) -> Iterator[None]:
        """Within the context ``segkit.train`` makes a tiny run of any overrides."""
        before = compose_module.compose

        def small(overrides: Any, **rest: Any) -> Config:
            compose_module.compose = before
            try:
                return self.compose(self.small(list(overrides)))
            finally:
                compose_module.compose = small

        compose_module.compose = small
        try:
            yield
        finally:
            compose_module.compose = before

    def small(self, overrides: list[str], *, steps: int = 1) -> list[str]:
        """``overrides`` with those that make a run tiny; a model that they name stays."""
        own = any(item.startswith("model=") for item in overrides)
        dataset = self.compose([item for item in overrides if item.startswith(("dataset", "experiment="))]).dataset
        resizes = [key for key in ("resize", "eval_resize") if any(plain(getattr(dataset, key)).values())]
        return [
            *overrides,
            *([] if own else SMALL_MODEL),
            *(["dataset.reader.num_images=4"] if dataset.name == "synthetic" else []),
            *(f"dataset.{key}={{short_side:null,size:[48,64]}}" for key in resizes),
            *SMALL,
            f"limit_steps={steps}",
            f"cache_dir={self.root / 'cache'}",
        ]

    def train(self, overrides: list[str], folder: Path, *, steps: int = 1) -> None:
        """A few steps of every phase, in ``folder``."""
        from segkit.run import pipeline

        config = self.compose(self.small(overrides, steps=steps))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pipeline.run(config, folder, open_phases(config))

    def preflight(self, overrides: list[str]) -> Config:
        """What happens before training: composition, the arguments of every target, the files of every phase."""
        config = self.compose(overrides)
        check_targets(config)
        if config.dataset.name != "synthetic" and not any(item.startswith("dataset.root=") for item in overrides):
            raise InputError("the command names no dataset.root: write dataset.root=/data/NAME")
        open_phases(config)
        return config

    # -- verbs ---------------------------------------------------------------------------------------------------

    def call(self, verb: str, arguments: list[str]) -> str:
        """Call ``segkit VERB ARGUMENTS`` in this process; what it printed. Fails on an exit code but 0."""
        return self._call(lambda: guarded(lambda: cli.verb_function(verb)(arguments)), [f"segkit {verb}", *arguments])

    def call_segkit(self, arguments: list[str]) -> str:
        """Call ``segkit ARGUMENTS``."""
        return self._call(cli.main, ["segkit", *arguments])

    def _call(self, function: Callable[[], Any], argv: list[str]) -> str:
        before, out, err = sys.argv, io.StringIO(), io.StringIO()
        directory, configs = compose_module.config_dir, self.configs
        sys.argv, compose_module.config_dir = argv, lambda: configs
        code: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                function()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv, compose_module.config_dir = before, directory
        assert code == 0, f"{' '.join(argv)} ended with {code}:\n{out.getvalue()}{err.getvalue()}"
        return out.getvalue()

    # -- what a page adds ----------------------------------------------------------------------------------------

    def add_module(self, title: str, source: str) -> None:
        """Make the code of a block importable under the path that is its title."""
        name = title.removesuffix(".py").replace("/", ".")
        package = name.partition(".")[0]
        assert package == "mine", f"{title}: a module of one's own lies in mine/"
        sys.modules.setdefault(package, types.ModuleType(package))
        module = types.ModuleType(name)
        exec(compile(source, title, "exec"), module.__dict__)
        sys.modules[name] = module

    def add_yaml(self, title: str | None, source: str) -> None:
        """A file of options is put where Hydra finds it; a file of classes is read as one."""
        from segkit.data.formats.classes import read_classes

        assert isinstance(yaml.safe_load(source), dict)
        if title and title.startswith("mine/configs/"):  # as `--config-dir mine/configs`
            (self.root / title.removeprefix("mine/")).write_text(source, encoding="utf-8")
            self.composed.clear()
        elif title and title.endswith("classes.yaml"):
            file = self.root / "tmp" / "classes.yaml"
            file.write_text(source, encoding="utf-8")
            read_classes(file)


def write_fields(folder: Path) -> None:
    """A few images of five channels of 16 bits as arrays, with masks."""
    generator = np.random.default_rng(0)
    for name in ("images/train/a", "images/train/b", "images/val/c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", generator.integers(0, 9000, (48, 64, 5), np.uint16))
        mask = folder / f"{name.replace('images', 'labels')}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 2, (48, 64), np.uint8)).save(mask)
    (folder / "classes.yaml").write_text("names: [soil, crop]\n", encoding="utf-8")


def write_videos(folder: Path) -> None:
    """Two frames of each of six videos, without splits."""
    generator = np.random.default_rng(0)
    for part, shape in (("images", (48, 64, 3)), ("labels", (48, 64))):
        (folder / part).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 2, shape, np.uint8)
            Image.fromarray(pixels).save(folder / part / f"video_{number // 2}_{number % 2}.png")
    (folder / "classes.yaml").write_text("names: [background, tool]\n", encoding="utf-8")


def write_pairs(folder: Path) -> None:
    """The data of the reader that own.md writes: <split>/<name>_rgb.png beside <name>_label.png."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for number in range(2):
            place = folder / split / f"{number}"
            Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(f"{place}_rgb.png")
            Image.fromarray(generator.integers(0, 4, (48, 64), np.uint8)).save(f"{place}_label.png")
