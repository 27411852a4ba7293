"""Overrides, and what the command says of a mistake in one."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from segkit import launch
from segkit.config.compose import check_overrides, compose, quoted, without_effect
from segkit.errors import InputError
from segkit.guard import explain, guarded
from segkit.runtime import resolve_device

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def train(*arguments: str) -> tuple[int, str, float]:
    """``python train.py ARGUMENTS``; see :func:`timed`."""
    return timed(str(TRAIN), *arguments)


def timed(*arguments: str) -> tuple[int, str, float]:
    """Exit code, output and seconds of processor time of Python, which a busy machine changes little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout + done.stderr, seconds


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("schedle=single", "error: there is no key schedle: did you mean schedule?"),
        ("loss.tua=3", "error: there is no key loss.tua: did you mean loss.tau?"),
        ("schedule.pretrain.epohcs=3", "did you mean schedule.pretrain.epochs?"),
        ("seed=abc", "error: seed=abc is not allowed: value 'abc' of type 'str' could not be converted to Integer"),
        ("dataset=cityscape", "error: dataset=cityscape is not an option: did you mean dataset=cityscapes?"),
        ("precision=fp8", "error: precision=fp8 is not allowed: invalid value 'fp8', expected one of"),
        ("dataset.eval_labels=both", "error: dataset.eval_labels=both is not allowed: invalid value 'both', expected"),
        ("dataset.crop=512", "error: dataset.crop=512 is not allowed: write a list in brackets, as KEY=[VALUE,VALUE]"),
        ("--config-dir=nowhere", "error: --config-dir names "),
        ("seed", "error: the override 'seed' cannot be read: write KEY=VALUE, for example seed=1"),
        ("--config-dir=", "error: --config-dir is empty"),
        ("--config-dir=configs --config-dir=docs", "error: --config-dir is given more than once, and only the last"),
        ("hydra.searchpath=[s3://x]", "error: Hydra cannot use the command line (ValueError: No config source regist"),
        ("hydra.job.env_copy=[NOWHERE]", "error: Hydra cannot use the command line (KeyError: 'NOWHERE'): correct its"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(monkeypatch, capsys, argument, message):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which launch sets
    with pytest.raises(SystemExit, match=r"^2$"):
        guarded(lambda: launch.run(argument.split()))
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err
    assert len((printed.out + printed.err).strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["sweep=search"], ["-m", "seed=1,b"], ["-m", "seed=1,-1"]])
def test_a_command_that_is_refused_leaves_no_folder(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        guarded(lambda: launch.run(arguments))
    launch._sweeps.clear()
    assert not list(tmp_path.iterdir()), capsys.readouterr()


def test_an_overlay_without_its_first_line_is_told_to_have_it(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("seed: 5\n")
    with pytest.raises(Exception) as failed:
        compose(["experiment=mine"], config_dirs=[tmp_path])
    assert "Key 'experiment' not in 'Config'): begin its file with # @package _global_" in explain(failed.value)[0]


def test_a_mistake_of_the_command_is_one_sentence():
    code, output, _ = train("dataset.crop=[3,4]")
    assert code == 2
    assert output.startswith("error: dataset.crop is [3, 4]")
    assert len(output.strip().splitlines()) == 1


def test_missing_data_names_folder_archives_and_key(tmp_path):
    code, output, _ = train("dataset=cityscapes", f"dataset.root={tmp_path / 'nowhere'}", f"hydra.run.dir={tmp_path}/r")
    assert code == 2
    for part in ("nowhere", "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip", "dataset.root"):
        assert part in output
    assert len(output.strip().splitlines()) == 1


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    code, output, _ = train(f"hydra.run.dir={tmp_path}/file/run")
    assert code == 2
    assert "hydra.run.dir" in output
    assert "Traceback" not in output


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SEGKIT_DEBUG", "1")
    code, output, _ = train("dataset.crop=[3,4]")
    assert code == 1
    assert "Traceback" in output


@pytest.mark.parametrize("arguments", [["--help"], ["schedle=1"], ["--cfg", "job"]])
def test_start_up_is_fast(arguments):
    """Three times the processor time of a bare Hydra application at most: torch alone would take more.

    A core that is shared with another process counts up to twice as much time for the same work, now and then;
    so each is paired with a bare one beside it, and one pair of five has to hold.
    """
    bare = "import hydra; hydra.main(config_path=None, version_base='1.3')(lambda config: None)()"
    assert any(train(*arguments)[2] < 3 * timed("-c", bare, "--help")[2] for _ in range(5))


@pytest.mark.parametrize(
    "text", ["/a=b", "/a,b[0](1)", 'say "x"', "a\\b", 'a\\"', "/dätä", "C:\\dir\\", "", "it's", "#~{"]
)
def test_a_quoted_value_is_read_as_it_was(text):
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "dataset.root=/data/d=1",
            r"the override 'dataset.root=/data/d=1' cannot be read: .*'dataset.root=\"/data/d=1\"'",
        ),
        (
            "dataset.root=~/data",
            "the override 'dataset.root=~/data' has a ~ that no shell replaces there: write 'dataset\\.root=",
        ),
        ("dataset.root='~/ä'", rf"a ~ that no shell replaces there: write 'dataset.root=\"{Path.home()}/ä\"'"),
        ("cache_dir='s3://b/x'", "'s3://b/x'\" is an address, but a folder of this machine is needed: set cache_dir="),
        ("seed", "the override 'seed' cannot be read: write KEY=VALUE"),
        ("dataset.root=(1)", r"the override 'dataset.root=\(1\)' cannot be read"),
        ("dataset.root=/dätä", "the override 'dataset.root=/dätä' cannot be read"),
        ("dataset.root=/a#b", "the override 'dataset.root=/a#b' cannot be read"),
        ("dataset.crop[0]=8", r"the key of the override 'dataset.crop\[0\]=8' cannot be read: .* is set as a whole"),
        (
            "dataset.root=/a,b",
            "gives several values: add -m for a sweep over them, or put one value with a comma",
        ),
        (
            "hydra.run.dir=",
            "the override 'hydra.run.dir=' is empty or no name, and could fill this folder: set hydra.run.dir=DIR",
        ),
        ("~hydra.run.dir", "could fill this folder: set hydra.run.dir=DIR"),
        ("hydra.run.dir='???'", "could fill this folder: set hydra.run.dir=DIR"),
        ("cache_dir=false", "the override 'cache_dir=false' is no path: set cache_dir=PATH, or cache_dir=null"),
        ("dataset.crop=[[1,2],[3,4]]", r"dataset.crop is \[\[1, 2\], \[3, 4\]\], but must be a list of numbers"),
        ("dataset.resize.size=${seed}", "dataset.resize.size is 0, but must be a list of numbers"),
        (
            "dataset.resize.short_side=100000",
            "makes images of 100000x100000, more than max_pixels=200000000: set a sma",
        ),
        ("augment={}", "'augment={}' changes nothing, as a mapping is added to what is there: choose an option, augm"),
        ("loss=3", "the override 'loss=3' gives no name, but loss takes the name of one of its options"),
        ("compile=2", "the override 'compile=2' is neither true nor false: set compile=true or compile=false"),
        ("accumulate=2147483648", "accumulate is 2147483648, but must be at most 65536"),
        ("~loss", "the configuration is not valid: loss has no value: set loss=..."),
        ("seed='???'", "the configuration is not valid: seed has no value: set seed=..."),
        ("evaluation.pictures=2147483648", "evaluation.pictures is 2147483648, but must be at most 1000"),
        ("trust=[nowhere_at_all]", "trust has 'nowhere_at_all', but there is no such package here, nor in PYTHONPATH"),
        ("dataset.root=", "dataset.root is empty: set dataset.root=DIR"),
        ("dataset.val_split=", "dataset.val_split is empty: set dataset.val_split=NAME"),
        ("=3", "the override '=3' has no key"),
        (
            f"+lr_factors.encoder={10**400}",
            "lr_factors.encoder is 10+, but must be a part of the model and a posi",
        ),
        ("+early_stopping=5", r"there is no key early_stopping: a run has dataset, model"),
        ("++dataset.foo=1", r"there is no key dataset.foo: dataset has name, reader"),
        ("++evaluation.batchsize=1", "there is no key evaluation.batchsize: did you mean evaluation.batch_size"),
        ("schedule.train.lr=nan", "schedule.train.lr is nan, but must be at least 0"),
        ("ema_decay=nan", "ema_decay is nan"),
        ("max_pixels=0", "max_pixels is 0, but must be at least 1"),
    ],
)
def test_overrides_that_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        compose(["schedule=single", override])


@pytest.mark.parametrize(
    "override",
    [
        "schedule.finetune.loss={a:1}",
        "++schedule.finetune.dataset={a:1}",
        "schedule.finetune.loss.a=1",
        "dataset.crop.x=4",
    ],
)
def test_an_override_within_null_or_a_list_is_named(override):
    """OmegaConf fails at these with exceptions that are none of its own."""
    with pytest.raises(Exception) as failed:
        compose(["schedule=pretrain_finetune", override])
    sentence, code = explain(failed.value)
    assert code == 2
    assert f"the override {override!r} cannot be applied: something in its key is null, a list or one" in sentence
    assert "+loss@schedule.PHASE.loss=NAME, whose keys can then be set" in sentence


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+seed=1", "there is a key seed already: write seed=VALUE, without +"),
        ("+loss=dice", "loss is chosen already: write loss=dice without +, or in a list of defaults 'override /loss: "),
        ("++loss=dice", "an option of a group is chosen without ++: write loss=dice"),
        ("loss@schedule.train.loss=dice", "for schedule.train.loss yet: write +loss@schedule.train.loss=dice"),
        (
            "+loss@x=dice",
            "the option loss/dice cannot be used (x: Key 'x' not in 'Config'): mend its YAML file, or the ",
        ),
        (
            "+schedule.more={epochs:1}",
            "set the keys of a phase that is there (train), and put a further phase into an option of schedule",
        ),
        ("~dataset.crop", "~dataset.crop is not allowed: every run has this key: set it to another value"),
        ("experiment=[nowhere]", "experiment=nowhere is not an option: `python train.py --help` lists the options"),
        ("loss=[dice,focal]", "mixed into one: choose one of them, or try them in turn, -m loss=dice,focal"),
        ("+loss@schedule.train.loss=[dice,focal]", "several options, which would be mixed into one"),
        ("loss=${.}", "extraneous input '}'"),
    ],
)
def test_what_hydra_refuses_names_a_cure(override, message):
    with pytest.raises(Exception) as failed:
        compose(["schedule=single", override])
    sentence, code = explain(failed.value)
    assert code == 2
    assert message in sentence


@pytest.mark.parametrize("name", ["meta", "cuda:99999999999999999999", "cpu:-1", "gpu"])
def test_a_device_that_there_cannot_be(name):
    with pytest.raises(InputError, match=rf"device is '{name}', but must be auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


@pytest.mark.parametrize("text", ["loss=[[1]]", "sweep=[null]"])
def test_a_list_is_no_name_of_an_option(text):
    with pytest.raises(InputError, match=r"gives a list, but (loss|sweep) takes the name of one of its options"):
        check_overrides([text])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["dataset.jitter.hue=0.1", "dataset.color_jitter=0"], "dataset.color_jitter is 0: set that, or leave dat"),
        (["dataset.jitter.hue=0.1", "augment=none"], "dataset.color_jitter is 0"),
        (["dataset.jitter.hue=0.1"], ""),
        (["dataset.rare_crop=0.3"], "dataset.sampler is another"),
        (["dataset.rare_crop=0.3", "dataset.sampler=rare_crop"], ""),
        (["dataset.reader.groups='{group}_*'"], "dataset.holdout and dataset.reader.val_fraction and folds are 0"),
        (["dataset.reader.groups='{group}_*'", "dataset.holdout=0.1"], ""),
        (["optimizer.lr=0.1", "debug=overfit"], "all phases have schedule.PHASE.lr: set that"),
        (["optimizer.lr=0.1"], ""),
        (["schedule.train.poly_power=2", "schedule.train.lr_schedule=cosine"], "its lr_schedule is another"),
        (["augment=none", "debug=overfit"], ""),
    ],
)
def test_a_key_that_another_switches_off_is_told(overrides, reason):
    told = " ".join(without_effect(compose(["dataset=folder", "schedule=single", *overrides]), overrides))
    assert reason in told
    assert bool(reason) == bool(told)
