"""Sentences for what goes wrong, and where a result comes from."""

import subprocess
from pathlib import Path

import pytest
import torch

import segkit
from segkit import runtime
from segkit.errors import InputError, raised
from segkit.files import read_text


def test_the_line_of_a_users_module_is_named_wherever_it_lies():
    beside = Path(segkit.__file__).parent.with_name("segkit_mine.py")  # whose path begins with that of segkit
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("\n1 / 0", beside, "exec"))
    assert raised(caught.value) == "ZeroDivisionError: division by zero in segkit_mine.py, line 2"


def test_a_name_that_no_file_can_have_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"x cannot be read \(.*too long.*\): copy it again"):
        read_text(tmp_path / ("x" * 300), most=1, cure="copy it again")


def test_the_commit_is_that_of_segkit_and_not_of_the_project_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "a project")
    module = tmp_path / ".venv" / "segkit" / "runtime.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(runtime, "__file__", str(module))
    found = runtime.provenance(device=torch.device("cpu"), seed=0)
    assert (found["git_commit"], found["git_dirty"]) == (None, False)
    git("add", ".")
    found = runtime.provenance(device=torch.device("cpu"), seed=0)
    assert (found["git_commit"], found["git_dirty"]) == (git("rev-parse", "HEAD").strip(), True)
