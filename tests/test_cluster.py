"""Sweeps on a cluster: Hydra's launcher for Slurm composes with our configuration, and runs a job here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None
    or importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None,
    reason="needs the extra 'cluster' (hydra-submitit-launcher)",
)


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


def test_the_options_of_the_documentation_compose(tmp_path):
    text = (ROOT / "docs" / "cluster.md").read_text()
    options = [word for word in text.split() if word.startswith("hydra.launcher.")]
    assert len(options) >= 4
    done = train(
        "hydra/launcher=submitit_slurm", *options, "--cfg", "hydra", "--package", "hydra.launcher", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "submitit_launcher.SlurmLauncher" in done.stdout
    for option in options:
        key, _, value = option.removeprefix("hydra.launcher.").partition("=")
        assert f"{key}: {value}" in done.stdout.replace("'", ""), option
