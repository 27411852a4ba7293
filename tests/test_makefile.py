"""``make`` in a clone: what it installs, and into which environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("linked", [True, False])
def test_an_environment_of_another_checkout_is_never_installed_into(tmp_path, linked):
    """A stand-in for Python writes down how it is called."""
    clone, other = tmp_path / "clone", tmp_path / "other"
    (other / ".venv" / "bin").mkdir(parents=True)
    python = other / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\n')
    python.chmod(0o755)
    clone.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
    if linked:
        (clone / ".venv").symlink_to(other / ".venv")
    else:
        shutil.copytree(other / ".venv", clone / ".venv")
    done = subprocess.run(["make", "types", "train"], cwd=clone, capture_output=True, text=True)
    calls = (clone / ".venv" / "bin" / "calls").read_text() if (clone / ".venv" / "bin" / "calls").exists() else ""
    assert ("pip install" in calls) is not linked
    assert ("compileall -qq -j 0 .venv/lib segkit" in calls) is not linked
    assert (f"is a link to {other / '.venv'}" in done.stdout) is linked
    assert (other / ".venv" / ".installed").exists() is False
