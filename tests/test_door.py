"""The door for Python: the same numbers as the command, twice in one process, mistakes as exceptions."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import segkit
from segkit import cli, runtime
from segkit.commands import evaluate, predict
from segkit.config import targets
from segkit.data import decode
from segkit.errors import InputError, Interrupted, OutOfMemory
from segkit.run import build
from segkit.synthetic.sample_maker import make_sample
from segkit.training import trainer

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SMALL = [
    "schedule=single",
    "loss=cross_entropy",
    "model=deeplabv3plus_tiny",
    "dataset.reader.num_images=6",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[64,64]",
    "batch_size=2",
    "limit_steps=2",
    "evaluation.max_images=2",
    "evaluation.pictures=0",
    "workers=0",
    "device=cpu",
    "determinism=strict",
    "model.encoder=tu-test_resnet",
    "model.decoder_channels=16",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, trained off the main thread, where no signal can be handled."""
    folder = tmp_path_factory.mktemp("door")
    with ThreadPoolExecutor(1) as pool:
        small = [*SMALL, f"cache_dir={folder}/cache", "dataset.eval_resize.size=[48,48]"]
        assert pool.submit(segkit.train, small, folder=folder / "run").result()["mean_iou"] >= 0
    return folder / "run"


def test_evaluating_gives_the_numbers_of_the_verb_off_the_main_thread_and_twice(trained, tmp_path, capsys):
    options = {"tta": "flip,ms", "scales": [0.5, 1], "slide": True, "max_images": 2, "workers": 0, "device": "cpu"}
    with ThreadPoolExecutor(1) as pool:
        results = [pool.submit(segkit.evaluate, trained, **options).result() for _ in range(2)]
    assert capsys.readouterr().out == ""
    words = "--tta flip,ms --scales 0.5,1 --slide --max-images 2 --workers 0 --device cpu"
    evaluate.run([str(trained), *words.split(), "--output", str(tmp_path / "all.json")])
    assert results[0] == results[1] == json.loads((tmp_path / "all.json").read_text())
    assert results[0]["protocol"]["scales"] == [0.5, 1.0]
    assert results[0]["protocol"]["window"] == [64, 64]


@pytest.mark.parametrize("options", [{}, {"slide": "32x32", "tta": "flip"}])
def test_predicting_gives_the_labels_of_the_verb(trained, tmp_path, options):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (side, 40, 3), np.uint8) for side in (33, 50)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    flags = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit):
        predict.run([str(trained), "--input", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
    expected = [np.asarray(Image.open(tmp_path / "out" / "labels" / f"{number}.png")) for number in (0, 1)]
    assert len(np.unique(np.concatenate([item.ravel() for item in expected]))) > 1
    found = segkit.predict([images[0], tmp_path / "1.png"], trained, **options)
    for one, other, image in zip(found, expected, images, strict=True):
        assert one.shape == image.shape[:2]
        np.testing.assert_array_equal(one, other)


@contextmanager
def default(name, value):
    """A default of torch (its type, its device) while the context is open."""
    before = getattr(torch, f"get_default_{name}")()
    getattr(torch, f"set_default_{name}")(value)
    yield
    assert str(getattr(torch, f"get_default_{name}")()) == str(value)
    getattr(torch, f"set_default_{name}")(before if name == "dtype" else None)


@pytest.mark.parametrize(
    "setting",
    [
        partial(default, "dtype", torch.float64),
        partial(default, "device", "meta"),
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", torch.bfloat16),
    ],
    ids=["float64", "device", "no gradients", "inference", "autocast"],
)
def test_what_a_notebook_has_set_in_torch_changes_no_number(trained, tmp_path, setting):
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    labels = segkit.predict(image, trained)[0]
    with setting():
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        small = [*SMALL, f"cache_dir={tmp_path}/cache", "dataset.eval_resize.size=[48,48]"]
        results = segkit.train(small, folder=tmp_path / "run")
        np.testing.assert_array_equal(segkit.predict(image, trained)[0], labels)
        assert mode == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    assert results["classes"] == json.loads((trained / "results.json").read_text())["classes"]


def test_one_training_at_a_time_runs_in_a_process(tmp_path):
    with segkit._training, pytest.raises(InputError, match=r"runs in another thread .*: wait until that has ended"):
        segkit.train(SMALL, folder=tmp_path / "run")
    assert not segkit._training.locked()


def test_no_thread_draws_random_numbers_amid_a_step_or_a_fork_of_another(tmp_path, monkeypatch):
    """Either would change the numbers of the step, or leave the process that loads images waiting for ever."""
    found = set()

    def is_held():
        free = runtime.drawing.acquire(blocking=False)
        if free:
            runtime.drawing.release()
        return not free

    def watched(name, call):
        def run(*values, **options):
            with ThreadPoolExecutor(1) as pool:
                found.update([name] * pool.submit(is_held).result())
            return call(*values, **options)

        return run

    places = ("segkit.training.trainer.train_step", "segkit.run.build.segmenter", "segkit.data.loader.iter")
    for place, call in zip(places, (trainer.train_step, build.segmenter, iter), strict=True):
        monkeypatch.setattr(place, watched(place, call), raising=False)
    segkit.train([*SMALL, f"cache_dir={tmp_path}/cache", "seed=1"], folder=tmp_path / "run")
    assert found == set(places)


def test_a_profile_has_no_scores_to_return(tmp_path):
    overrides = [*SMALL, f"cache_dir={tmp_path}/cache", "debug=profile", "profile_steps=1", "limit_steps=3"]
    assert segkit.train(overrides, folder=tmp_path / "run") == {"folder": str(tmp_path / "run")}
    assert (tmp_path / "run" / "trace.json").is_file()


@pytest.mark.parametrize(("command", "module"), [(cli.__file__, "segkit.guard"), (TRAIN, "segkit.launch")])
def test_ctrl_c_while_a_command_is_imported_shows_no_traceback(monkeypatch, command, module):
    class Interrupted(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, module, Interrupted(module))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(command))
    assert stopped.value.code == 130


def test_what_python_gets_wrong_is_an_exception(trained, tmp_path):
    (tmp_path / "text.png").write_text("text")
    for call, message in (
        (lambda: segkit.evaluate(tmp_path), "is no run folder"),
        (lambda: segkit.evaluate(trained, splt="val"), "segkit evaluate: unrecognized arguments: --splt=val"),
        (lambda: segkit.evaluate(trained, batch_size="two"), "argument --batch-size: 'two' is no whole number from 1"),
        (lambda: segkit.evaluate(trained, device="tpu"), "tpu"),
        (lambda: segkit.predict(tmp_path / "text.png", trained), "text.png"),
        (lambda: segkit.predict([np.zeros((4, 4))], trained), "a ndarray of float64 of the shape"),
        (lambda: segkit.predict([], trained, output=tmp_path), "unrecognized arguments: --output"),
        (
            lambda: segkit.predict(None, trained),
            r"an image is a NoneType of object of the shape \(\), but must be a path",
        ),
        (lambda: segkit.predict([np.zeros((4, 4, 3), np.uint8), "no.png"], trained), "there is no image file no.png"),
        (lambda: segkit.evaluate(trained, help=True), "help is no option from Python"),
        (lambda: segkit.evaluate(None), "None is no run folder"),
        (lambda: segkit.evaluate(trained, max_images=True), "--max-images: expected one argument"),
        (lambda: segkit.evaluate(trained, slide=64), "--slide is '64', but takes HxW"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ("seed=1", {}, r"overrides is 'seed=1', but must be a list of texts: set overrides=\['seed=1'\]"),
        ({"seed": 1}, {}, r"overrides is \{'seed': 1\}, but must be a list"),
        (None, {}, "overrides is None, but must be a list"),
        ([("seed", 1)], {}, "but must be a list of texts"),
        (["--config-dir=mine"], {}, "the override '--config-dir=mine' cannot be read: write KEY=VALUE"),
        (["seed"], {}, "the override 'seed' cannot be read: write KEY=VALUE"),
        (["sweep.jobs=2"], {}, "'sweep.jobs=2' is for the command line"),
        (["hydra.run.dir=there"], {}, "'hydra.run.dir=there' is for the command line: folder=... names the run folder"),
        ([], {"folder": ""}, "folder is '', but must be the path of a run folder"),
        ([], {"folder": 3}, "folder is 3, but must be the path"),
        ([], {"config_dirs": "mine"}, r"config_dirs is 'mine', but must be a list"),
        ([], {"config_dirs": ["mine"]}, "mine is no folder with groups of options: correct"),
    ],
)
def test_what_train_cannot_take_is_an_exception(tmp_path, monkeypatch, overrides, options, message):
    """None of these trains something else instead, or somewhere else."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        segkit.train(overrides, **{"folder": "run", **options})
    assert not list(tmp_path.iterdir())


def test_what_numpy_makes_an_image_of_is_predicted(trained, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    expected = segkit.predict([image], trained, slide="32x32")[0]
    np.testing.assert_array_equal(segkit.predict(image, trained, slide=(32, 32))[0], expected)
    for same in (Image.fromarray(image), torch.from_numpy(image)):
        np.testing.assert_array_equal(predict._image_of(same, (3, "uint8")), image)
    for wrong, message in (
        (3, "an image is a int of int64"),
        (b"GIF89a", "an image is a bytes of"),
        ([1, [2]], "an image is a list, which is no array"),
        (image.tolist(), "a list of int64 of the shape"),
        (Image.new("L", (8, 8)), r"of the shape \(8, 8\)"),
        (Image.new("HSV", (8, 8)), r"has the mode HSV, whose bands are other colours: give \.convert\('RGB'\)"),
        (np.ma.masked_less(image, 9), r"an array with masked pixels, which have no value: give \.filled\(0\) of it"),
        (torch.zeros(3, 8, 8), r"a Tensor of float32 of the shape \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3, requires_grad=True), "a Tensor, which is no array"),
        (str(tmp_path), "there is no image file .*: it is a folder: give a list of the files in it"),
    ):
        with pytest.raises(InputError, match=message):
            predict._image_of(wrong, (3, "uint8"))
    with pytest.raises(InputError, match=r"image of ndarray has 1 values that are not finite"):
        predict._image_of(np.where(np.arange(30).reshape(2, 3, 5) == 7, np.inf, 0).astype(np.float32), (5, "float32"))


def test_a_call_leaves_the_settings_of_the_process_as_they_were(trained, tmp_path, monkeypatch):
    """Also one that fails; what one call allows is not allowed to the next."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "door_trusted.py").touch()
    Image.new("RGB", (8, 8)).save("image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000_000)
    monkeypatch.delenv(runtime.CUBLAS, raising=False)
    device_of = runtime.resolve_device

    def drawing(name):
        random.random()
        np.random.rand()  # noqa: NPY002
        return device_of(name)

    monkeypatch.setattr(runtime, "resolve_device", drawing)

    def settings():
        own = decode.pixel_limit(), Image.MAX_IMAGE_PIXELS, os.environ.get(runtime.CUBLAS)
        drawn = random.getstate(), str(np.random.get_state())  # noqa: NPY002
        return *own, *drawn, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark

    before = settings()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="at most 10 are allowed"):
        segkit.predict("image.png", trained, max_pixels=10, trust="door_trusted")
    assert segkit.predict("image.png", trained)[0].shape == (8, 8)
    generator = (text for text in [*SMALL, f"cache_dir={trained.parent}/cache", "max_pixels=5000"])
    segkit.train(generator, folder=tmp_path / "run")
    assert before == settings()
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert "door_trusted" not in targets._trusted
    assert str(tmp_path) not in sys.path
    with pytest.raises(InputError, match=r"run/inner, within the run .*run: name a folder outside of it"):
        segkit.train(SMALL, folder="run/inner")
    images = "hydra.run.dir is {}, where its pictures would be taken for images of the data, as .*images/train/.*jpg is"
    make_sample("folder", tmp_path / "data", num_images=2, scale=0.1)
    for name in ("data/images", "data/images/train", "data/images/train/run"):
        with pytest.raises(InputError, match=images.format(name)):
            segkit.train([*SMALL[:3], "dataset=folder", "dataset.root=data", *SMALL[6:]], folder=name)


def test_other_exceptions_that_can_be_mended_become_sentences(trained, monkeypatch):
    for error, kind, message in (
        (OSError(28, "No space left on device", "file"), InputError, "no space is left for file"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory, "smaller --batch-size"),
        (Interrupted("stopped"), Interrupted, "^stopped$"),
        (KeyError("a defect"), KeyError, "a defect"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(evaluate, "score", fail)
        with pytest.raises(kind, match=message):
            segkit.evaluate(trained)


@pytest.mark.slow
def test_the_same_numbers_as_the_command_twice_in_one_process(tmp_path):
    small = [*SMALL, f"cache_dir={tmp_path}/cache"]
    results = [segkit.train(small, folder=tmp_path / name) for name in ("first", "second")]
    command = [sys.executable, str(TRAIN), *small, f"hydra.run.dir={tmp_path}/command"]
    subprocess.run(command, check=True, capture_output=True)
    expected = json.loads((tmp_path / "command" / "results.json").read_text())
    for result, name in zip(results, ("first", "second"), strict=True):
        assert result == {**expected, "folder": str(tmp_path / name)}
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == (tmp_path / "command/metrics.jsonl").read_bytes()


def test_the_function_stays_one_whatever_is_imported():
    """A module of the name would take its place as soon as something imports it."""
    from segkit import cli

    for verb in cli.VERBS:
        cli.verb_function(verb)
    assert callable(segkit.train)


def test_a_mistake_is_an_exception(tmp_path):
    for override, message in (
        ("seed=-1", "seed is -1"),
        ("schedle=single", "there is no key schedle: did you mean schedule"),
        ("schedule.pretrain.batch_size=3", "there is no key schedule.pretrain.batch_size: did you mean batch_size or"),
        ("optimizer={momentum:0.9}", "there is no key optimizer.momentum: optimizer has _target_, lr"),
        ("loss=cros_entropy", "loss=cros_entropy is not an option: did you mean loss=cross_entropy"),
        ("schedule.pretrain.lr_schedule=cosin", r"lr_schedule=cosin is not allowed: .*'cosin'.*one_cycle"),
    ):
        with pytest.raises(InputError, match=message):
            segkit.train([override], folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_code_of_ones_own_is_trusted_on_the_command_line_only(tmp_path, monkeypatch):
    """A loss and a model from a folder that is not segkit's; a saved run cannot bring its own trust.

    The model is exported as a graph that gives classes.
    """
    from segkit.commands import evaluate, export
    from segkit.models.exported import read_metadata
    from segkit.run.saved import open_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_losses.py").write_text(
        "from segkit.losses import CrossEntropyLoss\n\n\nclass Own(CrossEntropyLoss):\n"
        "    def __init__(self, *, ignore_index: int = 255, strength: float = 1.0):\n"
        "        super().__init__(ignore_index=ignore_index)\n"
    )
    (tmp_path / "own_nets.py").write_text(
        "import torch\n\n\ndef net(num_classes):\n"
        "    assert float(torch.ones(1)) == 1  # a value is read\n"
        "    return torch.nn.Conv2d(3, num_classes, 1)\n"
    )
    for group in ("loss", "model"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("_target_: own_nets.net\n")
    (tmp_path / "mine" / "loss" / "own.yaml").write_text("_target_: own_losses.Own\nstrength: 1.0\n")
    own = [item for item in SMALL if not item.startswith(("loss=", "model"))]
    own += ["loss=own", "model=own", f"cache_dir={tmp_path}/cache"]
    with pytest.raises(InputError, match=r"_target_ is 'own_\w+\.\w+', but must be one of"):
        segkit.train(own, folder="run", config_dirs=["mine"])
    segkit.train([*own, "trust=[own_losses,own_nets]"], folder="run", config_dirs=["mine"])
    assert "own_losses" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr("segkit.config.targets._trusted", set())
    for call in (open_run, segkit.evaluate):
        with pytest.raises(InputError, match=r"_target_ is 'own_\w+\.\w+', but must be one of"):
            call("run")
    assert segkit.evaluate("run", trust=["own_losses", "own_nets"], workers=0)["num_classes_averaged"] > 0
    images = [np.random.default_rng(0).integers(0, 256, (height, 35, 3), np.uint8) for height in (1, 52)]
    export.run(["run", "--trust", "own_losses,own_nets", "--format", "torch_export", "--classes"])
    assert read_metadata("run/model.pt2")["output"] == "classes"
    classes = segkit.predict(images, "run/model.pt2", trust="torch_export")
    for found, wanted in zip(classes, segkit.predict(images, "run", trust="own_losses,own_nets"), strict=True):
        np.testing.assert_array_equal(found, wanted)
    monkeypatch.setattr("segkit.models.exported.runner", lambda path: lambda images: images[:, :, 32:].argmax())
    with pytest.raises(InputError, match=r"compute images of \(1, 3, 1, 35\) .* segkit export --format hub, which"):
        segkit.predict(images, "run/model.pt2", trust="torch_export")
    with pytest.raises(InputError, match=r"trust has 'own/losses', but takes names of packages"):
        evaluate.parser().parse_args(["run", "--trust", "own/losses"])
