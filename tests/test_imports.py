"""The import rules of the design, walked over the syntax trees, so that they cannot rot."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "segkit"
PARTS = {"data", "models", "losses", "training", "evaluation"}
SHARED = {"bilinear", "config", "errors", "files", "margins", "memory", "progress", "runtime", "targets"}
HEAVY = {"torch", "torchvision", "segmentation_models_pytorch", "timm", "albumentations", "cv2", "matplotlib", "scipy"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def segkit_parts(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("segkit.")}


def test_files_are_found():
    found = {path.relative_to(PACKAGE).parts[0] for path in FILES}
    assert found >= PARTS | {"pipeline.py"}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_parts_do_not_know_each_other(part):
    for path in (PACKAGE / part).rglob("*.py"):
        assert segkit_parts(path) <= {part} | SHARED, path


def test_report_reads_run_folders_only():
    for path in (PACKAGE / "report").rglob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in imported(path)}, path
        others = {name for name in imported(path) if name.startswith("segkit.")}
        numpy_only = ("segkit.evaluation.metrics", "segkit.evaluation.per_image", "segkit.evaluation.bootstrap")
        allowed = ("segkit.report", "segkit.errors", "segkit.progress", "segkit.config.schema", *numpy_only)
        assert all(name.startswith(allowed) for name in others), (path, others)


def test_config_imports_nothing_of_segkit_but_errors_and_targets():
    assert segkit_parts(PACKAGE / "config.py") == {"errors", "targets"}
    assert segkit_parts(PACKAGE / "targets.py") == {"errors"}


@pytest.mark.parametrize(
    "module", ["segkit", "segkit.config.schema", "segkit.cli", "segkit.train", "segkit.run.splits"]
)
def test_start_up_is_light(module):
    code = f"import sys, {module}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_only_transforms_know_albumentations():
    users = {path.name for path in FILES if any(name.startswith("albumentations") for name in imported(path))}
    assert users <= {"transforms.py"}


def test_checkpoints_are_never_unpickled():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {item.arg: ast.unparse(item.value) for item in node.keywords}
                assert keywords.get("weights_only") == "True", path
