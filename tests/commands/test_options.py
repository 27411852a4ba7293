"""The arguments of every verb: documented, with their defaults, and written once."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest

import segkit
from segkit import cli
from segkit.commands import evaluate, options
from segkit.errors import InputError
from segkit.guard import explain, sentences

VERBS = tuple(verb for verb in cli.VERBS if verb != "train")  # whose arguments are Hydra's


def actions(verb):
    parser = import_module(f"segkit.commands.{verb}").parser()
    return parser, [action for action in parser._actions if action.dest != "help"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_says_what_it_is_and_shows_its_default(verb):
    parser, arguments = actions(verb)
    text = " ".join(parser.format_help().split())
    assert parser.prog == f"segkit {verb}"
    assert f"example: segkit {verb} " in text
    for action in arguments:
        assert action.help, action.dest
        if action.option_strings and type(action.default) in (int, float, str) and action.default != "":
            assert f"(default: {action.default})" in text, action.dest
        assert not isinstance(action.default, list) or not action.option_strings or "(default: " in action.help
        if action.option_strings and action.nargs != 0 and action.default is None and not action.required:
            described = "(default: " in action.help
            writes_a_file = action.metavar == "FILE"
            depends_on_another = action.dest in ("side_by_side",)
            assert described or writes_a_file or depends_on_another, action.dest


def test_verbs_that_share_an_argument_describe_it_alike():
    seen = {}
    for verb in VERBS:
        for action in actions(verb)[1]:
            for name in set(action.option_strings) & options.SHARED.keys():
                seen.setdefault(name, set()).add((action.metavar, action.type, str(action.choices)))
    assert seen.keys() == {name for name in options.SHARED if name.startswith("--")}
    assert all(len(kinds) == 1 for kinds in seen.values()), seen


@pytest.mark.parametrize("verb", VERBS)
def test_who_takes_the_folder_or_the_split_of_the_data_by_an_option_is_told_of_that_option(verb):
    has_option = any("--root" in action.option_strings for action in actions(verb)[1])
    sentence, _ = explain(InputError("camvid is not complete; set dataset.root to its folder"), verb=verb)
    assert sentence == f"camvid is not complete; set {'--root' if has_option else 'dataset.root'} to its folder"
    has_option = any("--split" in action.option_strings for action in actions(verb)[1])
    sentence, _ = explain(InputError("no such split: set dataset.train_split and dataset.val_split to a, b"), verb=verb)
    assert sentence.endswith(": set --split to one of a, b") == has_option


@pytest.mark.parametrize("verb", VERBS)
def test_advice_names_options_that_the_verb_has(verb):
    has = {name for action in actions(verb)[1] for name in action.option_strings}
    keys = {"--device": "device=auto", "--max-pixels": "max_pixels to more", "--trust": "trust=[mypackage]"}
    for option, key in keys.items():
        sentence, _ = explain(InputError(f"wrong; set {key}"), verb=verb)
        own = key.replace(key[: len(option) - 2], option, 1).replace("[mypackage]", "mypackage")
        assert sentence == f"wrong; set {own if option in has else key}"


@pytest.mark.parametrize("arguments", [["", "--output=x"], ["run", "--output="], ["run", "--output", " "]])
def test_an_empty_value_is_refused(arguments):
    with pytest.raises(InputError, match=r"argument (RUN|--output): the value is empty: give one, or leave the arg"):
        evaluate.parser().parse_args(arguments)
    assert evaluate.parser().parse_args(["run", "--tta="]).tta == ""  # which is its default
    for option in ("output", "slide", "device"):
        with pytest.raises(InputError, match=f"argument --{option}: '--' is no value: give one, or leave the arg"):
            evaluate.parser().parse_args(["run", f"--{option}=--"])


def test_a_home_is_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = evaluate.parser().parse_args(["~/run", "--output=~/x.json", "--root", "~"])
    assert (arguments.run, arguments.output, arguments.root) == (tmp_path / "run", tmp_path / "x.json", str(tmp_path))


def test_links_that_lead_nowhere_and_one_file_for_two_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RuntimeError) as caught:
        options.check_writable(argparse.Namespace(csv=tmp_path / "loop"), "csv")
    assert re.fullmatch("'.*/loop' is a link that leads back to itself: give another place", explain(caught.value)[0])
    with pytest.raises(InputError, match=r"--json and --csv name the same file .*x: give each a file of its own"):
        options.check_writable(argparse.Namespace(csv=tmp_path / "y/../x", json=tmp_path / "x"), "json", "csv")


def test_a_working_directory_that_is_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path("x").absolute()
    sentence = "the folder that this shell is in is not there any more: go to one that is, `cd DIR`"
    assert explain(caught.value) == (sentence, 2)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libGL.so.1: cannot open shared object file: No such file or directory"),
        OSError("libtorch_global_deps.so: cannot enable executable stack"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_named(error):
    sentence = f"a library cannot be loaded ({error}): allow more memory where `ulimit -v` limits it, or install what"
    assert explain(error) == (f"{sentence} is missing", 2)
    assert explain(ImportError("cannot import name 'x' from 'y.so' (y.so)")) == (None, 1)


def test_a_path_with_a_nul_byte_is_named():
    with pytest.raises(InputError, match=r"^a path has a NUL byte in it, which no name of a file has"), sentences():
        segkit.evaluate(".", output="a\0b.json")


def test_that_no_memory_is_left_is_said_without_taking_more(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra.errors", None)
    assert explain(MemoryError())[0].startswith("out of memory (MemoryError)")


def test_every_verb_has_help(capsys):
    for verb in VERBS:
        assert verb in cli.VERBS
        with pytest.raises(SystemExit) as stopped:
            cli.verb_function(verb)(["--help"])
        assert stopped.value.code == 0
        assert f"usage: segkit {verb}" in capsys.readouterr().out


def test_a_default_that_the_help_describes_is_not_repeated():
    parser = options.verb_parser("verb", "text", example="x")
    parser.add_argument("--a", default=3, help="words")
    parser.add_argument("--b", default=4, help="words (default: four)")
    parser.add_argument("--c", action="store_true", help="words")
    lines = [line.strip() for line in parser.format_help().splitlines()]
    assert "--a A       words (default: 3)" in lines
    assert "--b B       words (default: four)" in lines
    assert "--c         words" in lines


def test_files_need_a_folder(tmp_path):
    options.check_writable(argparse.Namespace(json=tmp_path / "a.json", csv=None), "json", "csv")
    with pytest.raises(InputError, match=r"--csv is .*x\.csv, but .*none is no folder: make it, or give another one"):
        options.check_writable(argparse.Namespace(csv=Path(tmp_path / "none" / "x.csv")), "csv")
    (tmp_path / "photo.JPG").touch()
    with pytest.raises(InputError, match=r"--json is .*photo\.JPG', an image, which stays as it is: name another file"):
        options.check_writable(argparse.Namespace(json=tmp_path / "photo.JPG"), "json")
    (tmp_path / "plot.PNG").touch()
    with pytest.raises(InputError, match=r"--plot is .*plot\.PNG', an image, which stays as it is"):
        options.check_writable(argparse.Namespace(plot=tmp_path / "plot.PNG"), "plot", draws=("plot",))
    (tmp_path / "plot.PNG").write_bytes(b"\x89PNG Software Matplotlib version")
    options.check_writable(argparse.Namespace(plot=tmp_path / "plot.PNG"), "plot", draws=("plot",))
    for place, kind in ((tmp_path, "a folder"), (Path("/dev/null"), "no regular file"), (Path(""), "a folder")):
        with pytest.raises(InputError, match=rf"--csv is '.*', which is {kind}: give the name of a file"):
            options.check_writable(argparse.Namespace(csv=place), "csv")


def complete(script, *words):
    """What bash offers for the last of ``words``."""
    line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _segkit; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(("option", "value"), [
    ("--batch-size", "0"), ("--workers", "-1"), ("--workers", "100000"), ("--max-images", "-1"), ("--max-images", "x"),
])  # fmt: skip
def test_counts_that_are_none_are_refused(option, value):
    with pytest.raises(InputError, match=rf"argument {option}: '{value}' is no whole number from [01] to \d+"):
        evaluate.run(["run", f"{option}={value}"])


def test_no_output_replaces_a_file_of_a_run(tmp_path):
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "train/label_counts.json", "train/checkpoints/last.pt"):
        (tmp_path / name).write_text("kept")
        with pytest.raises(
            InputError, match=rf"--output is .*{name}, a file of the run .*, which stays as it is: name an"
        ):
            options.check_writable(argparse.Namespace(output=tmp_path / name), "output")
    (tmp_path / "report.html").touch()
    options.check_writable(argparse.Namespace(output=tmp_path / "report.html"), "output")


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("a.json", True),
        ("A.PNG", True),
        ("x/new.png", True),
        ("new.json", False),
        ("a.html", False),
        ("../a.zip", False),
    ],
)
def test_no_output_replaces_data_or_becomes_an_image_of_them(tmp_path, name, is_refused):
    (tmp_path / "data").mkdir()
    for there in ("data/a.json", "data/a.html", "a.zip"):
        (tmp_path / there).touch()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    arguments = argparse.Namespace(output=tmp_path / "data" / name, csv=None)
    with pytest.raises(InputError, match=r"--output is .* which stay as they") if is_refused else nullcontext():
        options.check_spares(arguments, [None, str(tmp_path / "link")], "csv", "output")


def test_a_shell_completes_verbs_and_options(capsys):
    cli.verb_function("completion")(["bash"])
    script = capsys.readouterr().out
    assert complete(script, "segkit", "ev") == {"evaluate"}
    assert complete(script, "segkit", "''") == set(cli.VERBS)
    assert complete(script, "segkit", "evaluate", "RUN", "--p") == {"--phase", "--precision", "--protocol"}
    assert complete(script, "segkit", "train", "--p") == set()
    for shell, line in (
        ("zsh", "autoload -U +X bashcompinit && bashcompinit"),
        ("fish", "complete -c segkit -n '__fish_seen_subcommand_from export' -l format -d 'kind of file'"),
    ):
        cli.verb_function("completion")([shell])
        assert line in capsys.readouterr().out.splitlines()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"--json is .*, but the folder .* cannot be written: give another one"):
        options.check_writable(argparse.Namespace(json=tmp_path / "a.json"), "json")


def test_windows_are_rounded_up_and_that_is_said_once(capsys):
    arguments = evaluate.parser().parse_args(["RUN", "--slide", "769x1"])
    assert [options.inference(arguments, [64, 64]).window for _ in range(2)] == [(800, 32)] * 2
    assert capsys.readouterr().out == "windows of 769x1 are 800x32 here: sides are multiples of 32\n"
    bare = evaluate.parser().parse_args(["RUN", "--slide"])
    assert options.inference(bare, [480, 352]).window == (480, 352)
    assert capsys.readouterr().out == ""
