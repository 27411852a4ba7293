"""What stands on a command line beside overrides: options, and files of options that are damaged."""

from __future__ import annotations

import os
import subprocess
import sys

import hydra
import pytest
from hydra.errors import HydraException

import segkit
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.guard import explain, guarded, sentences
from segkit.launch import check_command_line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=camvid"], "unrecognized arguments: --dataset=camvid: a setting is KEY=VALUE, without dashes"),
        (["--lr", "0.1"], "unrecognized arguments: --lr"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
        (["--cfg", "bogus"], "argument --cfg/-c: invalid choice: 'bogus'"),
        (["-m", "--cfg", "job"], "--multirun and --cfg exclude each other"),
        (
            ["-m", "seed=1,2", "hydra.run.dir=a"],
            "hydra.run.dir is the folder of one run, but -m makes several: set hydra.sw",
        ),
        (["hydra.sweep.dir=a"], "hydra.sweep.dir is of a sweep, but this is one run: add -m"),
        (["sweep.jobs=2"], "sweep.jobs is of a sweep, but this is one run: add -m"),
        (["--resolve"], "--resolve goes with --cfg"),
        (["--package", "loss", "seed=1"], "--package goes with --cfg"),
        (["--experimental-rerun", "a.pickle"], "--experimental-rerun would run whatever its file holds"),
        (["-sc", "foo"], "--shell-completion takes install=SHELL"),
        (["-sc", "install=nosh"], "--shell-completion takes install=SHELL"),
        (["-sc", "seed=1"], "--shell-completion takes install=SHELL, uninstall=SHELL or query=SHELL"),
        (["-sc", "query=bash"], "query=SHELL is what a shell asks, with its line in COMP_LINE"),
    ],
)
def test_a_wrong_option_is_a_sentence(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(InputError, match=f"^{message}"):
        check_command_line()


def test_an_override_that_hydra_reads_by_assertions_is_refused_where_python_leaves_them_out():
    for text, refused in (("a={b:1}", True), ("a=[1]", False)):
        command = f"from segkit.config.compose import check_overrides; check_overrides(['{text}'])"
        done = subprocess.run([sys.executable, "-O", "-c", command], capture_output=True, text=True)
        sentence = f"the override '{text}' cannot be read without assertions: call python without -O, and unset"
        assert (sentence in done.stderr) == refused == bool(done.returncode), done.stderr


def test_a_backend_that_matplotlib_does_not_know_stops_no_command(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Qt4Agg")
    assert guarded(lambda: os.environ.get("MPLBACKEND")) is None


def test_options_may_stand_between_overrides(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train.py", "seed=1", "--config-dir", "mine", "~augment", "--cfg", "job", "a=b=c"]
    )
    with pytest.raises(InputError, match="the override 'a=b=c' cannot be read"):
        check_command_line()
    monkeypatch.setattr(
        sys, "argv", ["train.py", "seed=1", "--config-dir", "mine", "~augment", "--cfg", "job", "loss=own"]
    )
    check_command_line()
    assert sys.argv == ["train.py", "seed=1", "~augment", "loss=own", "--config-dir", "mine", "--cfg", "job"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1", "expected ',' or ']', but got '<stream end>' in line 1"),
        (b"a: 1\na: 2\n", "found duplicate key a in line 2"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
        (b"defaults: 3\n", "defaults must be a list"),
        (b"5\n", "Invalid loaded object type: int"),
        (b"a: &x [*x]\n", "maximum recursion depth exceeded"),
        (b'!!python/object/apply:os.system ["true"]\n', "could not determine a constructor for the tag"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(tmp_path, content, reason):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "own.yaml").write_bytes(content)
    with pytest.raises(Exception) as caught:
        compose(["loss=own"], config_dirs=[tmp_path])
    sentence, code = explain(caught.value)
    assert (code, "\n" in sentence) == (2, False)
    assert sentence.startswith("the option loss/own cannot be read (")
    assert reason in sentence
    with pytest.raises(InputError, match=r"^the option loss/own cannot be read"):
        segkit.train(["loss=own"], config_dirs=[tmp_path])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("train:\n  epochs: abc\n", "schedule.train.epochs: Value 'abc' of type 'str' could not be converted to Float"),
        ("train:\n  epochs: 1\n  foo: 3\n", "schedule.train.foo: Key 'foo' not in 'PhaseConfig'"),
    ],
)
def test_an_option_with_a_wrong_key_or_value_is_named(tmp_path, content, reason):
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "own.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        segkit.train(["schedule=own"], config_dirs=[tmp_path])
    cure = "mend its YAML file, or the place behind @"
    assert str(caught.value) == f"the option schedule/own cannot be used ({reason}): {cure}"


@pytest.mark.parametrize("name", ["ü a,b", "[x] {y}", "it's #1", 'a="q"', "${x}"])
def test_a_folder_of_options_may_have_any_name(tmp_path, name):
    (tmp_path / name / "loss").mkdir(parents=True)
    (tmp_path / name / "loss" / "own.yaml").write_text("_target_: segkit.losses.FocalLoss\ngamma: 3.5\n")
    assert compose(["loss=own"], config_dirs=[tmp_path / name]).loss["gamma"] == 3.5
    another = f"hydra.searchpath=[file://{tmp_path}]"
    assert compose([another, "loss=own"], config_dirs=[tmp_path / name]).loss["gamma"] == 3.5


def test_a_program_of_the_users_own_keeps_its_hydra(tmp_path):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        compose(["seed=3"])
        assert hydra.compose("theirs") == {"a": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [("${nope}", ": "), ("${oc.env:SEGKIT_NOPE}", ": "), ("${x:1}", ": "), ("???", " has no value: set loss.gamma=")],
)
def test_a_value_that_cannot_be_resolved_is_named(tmp_path, value, reason):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "own.yaml").write_text(f"_target_: segkit.losses.FocalLoss\ngamma: {value}\n")
    with pytest.raises(InputError, match=rf"the configuration is not valid: loss\.gamma{reason}"):
        compose(["loss=own"], config_dirs=[tmp_path])


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["lr=1"], r"did you mean optimizer\.lr or schedule\.pretrain\.lr"),
        (["root=/data"], r"did you mean dataset\.root\?"),
        (["num_workers=1"], r"did you mean workers\?"),
        (["dataset.foo.bar=1"], "dataset has name, reader"),
        (["schedule=single", "schedule.finetune.lr=1"], r"schedule has train \("),
        (["gpus=2"], "a run has dataset, model"),
    ],
)
def test_a_key_that_there_is_not_is_looked_for_elsewhere(overrides, hint):
    with pytest.raises(InputError, match=rf"^there is no key {overrides[-1].split('=')[0]}: {hint}"), sentences():
        compose(overrides)


def test_a_folder_in_place_of_a_name_is_named():
    with pytest.raises(InputError, match=r"^dataset=/data/d is not an option: the options are ade20k"), sentences():
        compose(["dataset=/data/d"])


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
@pytest.mark.parametrize("error", [AttributeError("half made"), HydraException("half composed")])
def test_what_a_signal_leaves_half_made_is_no_error(capsys, signal, code, error):
    """OmegaConf and Hydra raise an error of their own when they are stopped in the middle of something."""

    def command():
        try:
            raise signal
        finally:
            raise error

    with pytest.raises(SystemExit, match=f"{code}"):
        guarded(command)
    assert capsys.readouterr().err == ""
