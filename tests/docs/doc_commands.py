"""Runs a command of the documentation, or checks it where a run would add nothing. Fails on what it does not know."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

from doc_pages import REPOSITORY, words_of
from doc_workspace import Workspace

from segkit import cli
from segkit.config.schema import Config
from segkit.errors import Interrupted

VARIABLES = ("SEGKIT_DEBUG", "SEGKIT_CACHE", "SEGKIT_RANK_TIMEOUT_MINUTES")


class Runner:
    """``run(command)`` runs one command in ``workspace``; ``dataset`` is that of RUN, None for the default.

    ``trains``: training commands are carried out, a step of each phase; otherwise up to the moment before training.
    """

    def __init__(self, workspace: Workspace, *, dataset: str | None = None, trains: bool = False) -> None:
        self.space, self.dataset, self.trains = workspace, dataset, trains
        self.programs: dict[str, Callable[[list[str]], None]] = {
            "python": self.python,
            "python3": self.python,
            "segkit": self.segkit,
            "torchrun": self.torchrun,
            "srun": self.words,
            "make": self.make,
            "pip": self.pip,
            "source": self.source,
            "tensorboard": self.tensorboard,
            "unzip": self.unpack,
            "tar": self.unpack,
            "docker": self.docker,
            "mkdir": lambda words: self.shell(["mkdir", *words]),
            "ls": lambda words: self.shell(["ls", *words]),
        }

    def run(self, command: str) -> None:
        """Run ``command``, a line of a shell."""
        if command.startswith("#SBATCH"):
            assert re.fullmatch(r"#SBATCH --signal=TERM@\d+ --requeue", command), f"not understood: {command}"
        elif command.startswith("if "):
            assert f"[ $? -eq {Interrupted.exit_code} ]" in command, f"not understood: {command}"
            subprocess.run(["bash", "-n", "-c", command], check=True)
        elif not command.startswith("#"):
            self.words(words_of(self.space.substitute(command, dataset=self.dataset)))

    def words(self, words: list[str]) -> None:
        """Run a command that is cut into words, unless the same ran before."""
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            name = words.pop(0).partition("=")[0]
            assert name in VARIABLES, f"environment variable {name}: not understood"
        key = (str(self.trains), *words)
        if key in self.space.done:
            return
        assert words[0] in self.programs, f"not understood: {' '.join(words)}"
        self.programs[words[0]](words[1:])
        self.space.done[key] = words[0]

    # -- training ------------------------------------------------------------------------------------------------

    def python(self, words: list[str]) -> None:
        if words[0] == "train.py":
            self.train(words[1:])
        elif words[0].startswith("scripts/"):
            source = (REPOSITORY / words[0]).read_text(encoding="utf-8")
            for word in words[1:]:
                assert not word.startswith("-") or f'add_argument("{word}"' in source, f"{words[0]} has no {word}"
        else:
            modules = (["-m", "venv", ".venv"], ["-m", "http.server", "--directory", "site"])
            assert words in modules, f"not understood: python {' '.join(words)}"

    def torchrun(self, words: list[str]) -> None:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words)
        assert parsed.training_script == "train.py"
        self.train(parsed.training_script_args)

    def train(self, words: list[str]) -> None:
        """``python train.py WORDS``: composed, checked, data opened; carried out only if ``trains``."""
        if words in (["--help"], ["--cfg", "job"]):
            return  # tests/test_overrides.py runs both
        words = without_config_dir(words)
        if words[:1] in (["-m"], ["--multirun"]):
            self.sweep(corners(words[1:]), value_of("hydra.sweep.dir", words))
            return
        folder = value_of("hydra.run.dir", words)
        overrides = without_hydra(words)
        check_model(self.space.preflight(overrides))
        if self.trains:
            place = self.space.root / (folder or f"outputs/{len(self.space.done)}")
            self.space.train(overrides, place)
            assert (place / "results.json").is_file()

    def sweep(self, jobs: list[list[str]], folder: str | None) -> None:
        """The first and the last job; carried out, in the folder of the sweep, where that is named."""
        for number, words in enumerate(jobs):
            overrides = without_hydra(words)
            check_model(self.space.preflight(overrides))
            if self.trains and folder and jobs[0] != jobs[1]:
                self.space.train(overrides, self.space.root / folder / str(number))

    # -- verbs ---------------------------------------------------------------------------------------------------

    def segkit(self, words: list[str]) -> None:
        if words[0] in ("--help", "--version"):
            assert self.space.call_segkit(words)
            return
        verb, *rest = words
        assert verb in cli.VERBS, f"segkit has no verb {verb}"
        if verb == "train":
            self.train(rest)
        else:
            self.space.call(verb, self.completed(verb, rest))

    def completed(self, verb: str, words: list[str]) -> list[str]:
        """The arguments with those that make the verb fast, and that its data are samples."""
        words = without_config_dir(words)
        if verb == "check":
            overrides, options = options_last(words)
            return [*self.space.small(overrides), *options, *([] if self.trains else ["--skip-step"])]
        if verb in ("stats", "browse"):
            synthetic = "dataset=synthetic" in words or not any(word.startswith("dataset=") for word in words)
            small = ["dataset.reader.num_images=4"] if synthetic else []
            return [*words, *small, "workers=0", f"cache_dir={self.space.root / 'cache'}"]
        if verb == "sample":
            return [*replaced(words, "--n", "4"), "--scale", "0.1"]
        if verb == "submit" and "--split" not in words:
            words = [*words, "--split", "val"]  # a sample of a test split is not whole, which is refused
        extra = {
            "evaluate": ["--workers", "0", "--device", "cpu"],
            "submit": ["--workers", "0", "--device", "cpu"],
            "predict": ["--device", "cpu"],
            "replay": ["--device", "cpu"],
            "compare": ["--samples", "100"],
        }
        return [*words, *extra.get(verb, [])]

    # -- everything else -----------------------------------------------------------------------------------------

    def make(self, words: list[str]) -> None:
        target, *assignments = words
        text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{re.escape(target)}:.*##", text, re.MULTILINE), f"the Makefile has no target {target}"
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            assert name == "ARGS", f"not understood: make {' '.join(words)}"
            if target == "train":
                self.space.preflight(["experiment=synthetic_cpu", *value.split()])

    def pip(self, words: list[str]) -> None:
        assert words[0] == "install"
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for word in words[1:]:
            found = re.fullmatch(r"(\.|segkit)(?:\[([\w,-]+)\])?", word)
            assert found or word == "-e", f"not understood: pip {' '.join(words)}"
            for extra in (found[2] or "").split(",") if found else []:
                assert not extra or extra in project["optional-dependencies"], f"there is no extra {extra}"

    def docker(self, words: list[str]) -> None:
        """The image is built, or its entry point called with a verb; tests/test_containers.py reads the Dockerfile."""
        if words[0] == "build":
            assert words == ["build", "--tag", "segkit", "."]
            assert (REPOSITORY / "Dockerfile").is_file()
            return
        assert words[0] == "run"
        place = words.index("segkit")
        assert " ".join(words[1:place]) in ("--rm --gpus all --volume /data:/data", "--rm"), f"not understood: {words}"
        self.segkit(words[place + 1 :])

    def source(self, words: list[str]) -> None:
        assert words == [".venv/bin/activate"]
        assert "\nVENV := .venv\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")

    def tensorboard(self, words: list[str]) -> None:
        """The folder holds what TensorBoard reads, and it reads it."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert words[0] == "--logdir"
        assert len(words) == 2
        if words[1] == "outputs":
            self.run("python train.py dataset=camvid dataset.root=/data/CamVid hydra.run.dir=outputs/for_tensorboard")
        files = sorted((self.space.root / words[1]).rglob("events.out.tfevents.*"))
        assert files, f"no events below {words[1]}"
        events = EventAccumulator(str(files[-1]))
        events.Reload()
        assert "curves/mean_iou" in events.Tags()["scalars"]

    def unpack(self, words: list[str]) -> None:
        """The archive is one that the configurations of the data sets or their readers name."""
        (archive,) = [Path(word).name for word in words if word.endswith((".zip", ".tar", ".tgz", ".tar.gz"))]
        folders = (REPOSITORY / "configs" / "dataset", REPOSITORY / "segkit" / "data")
        named = [path for folder in folders for path in folder.glob("*.*") if archive in path.read_text()]
        assert named, f"no data set knows an archive {archive}"
        flags = {word for word in words if word.startswith("-")}
        assert flags <= {"-q", "-o", "-d", "-xf", "-xzf", "-C"}, f"not understood: {words}"

    def shell(self, words: list[str]) -> None:
        subprocess.run(words, check=True, cwd=self.space.root, capture_output=True)


def without_config_dir(words: list[str]) -> list[str]:
    """``words`` without the folder of options whose files a page has shown: the workspace has them (add_yaml)."""
    if "--config-dir" not in words:
        return words
    place = words.index("--config-dir")
    assert words[place + 1] == "mine/configs", words
    return words[:place] + words[place + 2 :]


def without_hydra(words: list[str]) -> list[str]:
    """The overrides of segkit's own keys; those of Hydra's folders are checked for their names here.

    ``hydra/launcher`` and ``hydra.launcher`` are what tests/test_cluster.py is about.
    """
    known = ("hydra.run.dir=", "hydra.sweep.dir=", "hydra/launcher=submitit_", "hydra.launcher.")
    own = []
    for word in words:
        assert re.match(r"\+?[\w./@]+=|~[\w.]+$", word), f"{word} is no KEY=VALUE"
        if word.startswith("hydra"):
            assert word.startswith(known), f"not understood: {word}"
        else:
            own.append(word)
    return own


def corners(words: list[str]) -> list[list[str]]:
    """The first and the last job of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    first, last = [], []
    for word in words:
        key, values = word, [""]
        if "=" in word:
            key, value = word.split("=", 1)
            parsed = OverridesParser.create().parse_override(word)
            values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [value]
            key += "="
        first.append(key + values[0])
        last.append(key + values[-1])
    return [first, last]


def value_of(key: str, words: list[str]) -> str | None:
    """The value of the override of ``key``, None without one."""
    return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), None)


def check_model(config: Config) -> None:
    """A named encoder is one that segmentation_models_pytorch or timm has."""
    import segmentation_models_pytorch as smp
    import timm

    name = config.model.get("encoder")
    if name and name.startswith("tu-"):
        assert timm.is_model(name.removeprefix("tu-")), f"timm has no {name}"
    elif name:
        assert name in smp.encoders.get_encoder_names(), f"there is no encoder {name}"


def options_last(words: list[str]) -> tuple[list[str], list[str]]:
    """Overrides, and the options with their values."""
    overrides = [word for word in words if re.match(r"\+?[a-z][\w./@]*=", word)]
    return overrides, [word for word in words if word not in overrides]


def replaced(words: list[str], option: str, value: str) -> list[str]:
    """``words`` with another value of ``option``, where it is given."""
    if option not in words:
        return words
    place = words.index(option) + 1
    return [*words[:place], value, *words[place + 1 :]]
