"""The built wheel, installed in an environment of its own: ``segkit train`` works from any folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """The bin folder of a new virtual environment that holds the wheel; it sees this one's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    wheel = next(folder.glob("segkit-*.whl"))
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    # A plain path line: the packages are seen, the editable segkit (a .pth file over there) is not.
    (Path(target) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin"


OUTSIDE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
"""Without a path that might lead to another segkit than the wheel's."""


def call(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([environment / "segkit", *arguments], cwd=folder, env=OUTSIDE, capture_output=True, text=True)


@pytest.mark.slow
def test_configs_travel_in_the_wheel(environment, tmp_path):
    where = subprocess.run(
        [environment / "python", "-c", "from segkit.config.compose import config_dir; print(config_dir())"],
        cwd=tmp_path,
        env=OUTSIDE,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(where.stdout.strip())
    assert environment.parent in folder.parents
    shipped = {path.relative_to(folder) for path in folder.rglob("*.yaml")}
    assert shipped == {path.relative_to(REPOSITORY / "configs") for path in (REPOSITORY / "configs").rglob("*.yaml")}


@pytest.mark.slow
def test_every_file_of_the_package_travels_in_the_wheel(environment):
    """Templates, label tables and layouts too: whatever is in segkit/ here."""
    (folder,) = environment.parent.glob("lib/python*/site-packages/segkit")
    here = {path.relative_to(REPOSITORY / "segkit") for path in (REPOSITORY / "segkit").rglob("*") if path.is_file()}
    here = {path for path in here if "__pycache__" not in path.parts and path.suffix != ".pyc"}
    assert {path.suffix for path in here} >= {".py", ".yaml", ".j2"}
    assert here <= {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.nightly
def test_it_trains_from_any_folder(environment, tmp_path):
    options = ["debug=smoke", "limit_steps=2", "batch_size=2", "dataset.crop=[64,64]", "evaluation.max_images=2"]
    done = call(environment, tmp_path, "train", *options, "hydra.run.dir=run", "cache_dir=cache", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").is_file()
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


@pytest.mark.slow
def test_the_examples_of_ones_own_code_work_from_an_empty_folder(environment, tmp_path):
    """The files of docs/own.md as they stand, all three in one run; a saved run is opened with --trust only."""
    page = (REPOSITORY / "docs" / "own.md").read_text(encoding="utf-8")
    files = re.findall(r'```\w+ title="(mine/[^"]+)"\n(.*?)```', page, re.DOTALL)
    assert len(files) == 6
    for name, text in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "pairs" / split).mkdir(parents=True)
        for number in range(2):
            place = tmp_path / "pairs" / split / str(number)
            Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(f"{place}_rgb.png")
            Image.fromarray(generator.integers(0, 4, (48, 64), np.uint8)).save(f"{place}_label.png")
    own = ["--config-dir", "mine/configs", "trust=[mine]", "dataset=pairs", "dataset.root=pairs", "model=small_net"]
    small = ["schedule=single", "limit_steps=1", "dataset.crop=[32,32]", "batch_size=2", "workers=0", "device=cpu"]
    done = call(environment, tmp_path, "train", *own, "loss=poly", *small, "hydra.run.dir=run", "cache_dir=cache")
    assert done.returncode == 0, done.stderr
    refused = call(environment, tmp_path, "evaluate", "run", "--workers", "0")
    assert refused.returncode == 2
    assert "is 'mine.small_net.small_net', but must be one of" in refused.stderr
    done = call(environment, tmp_path, "evaluate", "run", "--workers", "0", "--trust", "mine")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "evaluations").glob("val-last-*.json"))) == 1


@pytest.mark.slow
def test_its_mistakes_are_sentences_too(environment, tmp_path):
    done = call(environment, tmp_path, "train", "schedle=single")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no key schedle: did you mean schedule?")
    assert call(environment, tmp_path, "trian").stderr.startswith(
        "error: there is no verb 'trian': did you mean train?"
    )
