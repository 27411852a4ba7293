"""The import rules of the design, walked over the syntax trees, so that they cannot rot."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "segkit"
ROOT = PACKAGE.parent
FLOORS = [
    {"bilinear", "errors", "progress"},
    {"config", "evaluation", "files", "margins", "memory", "models", "runtime"},
    {"data", "losses", "report", "training"},
    {"guard", "run", "sweeps", "synthetic"},
    {"check", "cli", "launch"},
    {"commands"},
]
"""Folders of segkit, and modules beside them, from the ground up: whatever one imports stands on a lower floor."""

PARTS = {"data", "models", "losses", "evaluation", "training"}
SHARED = {"bilinear", "config", "errors", "files", "margins", "memory", "progress", "runtime"}
MOST_IN_THE_HALL = 11
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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported_modules(module: str) -> set[str]:
    """Modules of segkit that ``module`` imports, anywhere in it."""
    names = {name for name in imported(MODULES[module]) if name.split(".")[0] == "segkit"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} - {module}


def test_every_folder_stands_on_a_floor_and_every_module_is_counted():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert found == set().union(*FLOORS)
    assert sum(len(floor) for floor in FLOORS) == len(found)


def test_nothing_is_imported_from_the_same_floor_or_a_higher_one():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for module in MODULES:
        own = module.split(".")[1] if "." in module else None
        for name in imported_modules(module):
            other = name.split(".")[1] if "." in name else None
            if own is None or other is None or own == other:
                continue  # the door of the package itself, and what a folder does within
            assert floor_of[other] < floor_of[own], f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    state: dict[str, bool] = {}  # False while its imports are followed, True afterwards

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module, True), f"a circle: {' -> '.join((*path, module))}"
        if module in state:
            return
        state[module] = False
        for name in sorted(imported_modules(module)):
            follow(name, (*path, module))
        state[module] = True

    for module in MODULES:
        follow(module, ())


def test_the_hall_is_small():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_IN_THE_HALL


def test_the_map_in_contributing_is_true():
    """Every module that it names exists, and the floors that it draws are these."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(segkit/[\w/]+(?:\.py)?)`", text)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name
    drawn = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert drawn is not None
    floors = [set(line.split(":", 1)[1].split()) for line in drawn.group(1).splitlines() if line.startswith("floor")]
    assert floors == FLOORS[::-1]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_parts_do_not_know_each_other(part):
    for path in (PACKAGE / part).rglob("*.py"):
        assert segkit_parts(path) <= {part} | SHARED, path


def test_report_reads_run_folders_only():
    for path in (PACKAGE / "report").rglob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in imported(path)}, path
        others = {name for name in imported(path) if name.startswith("segkit.")}
        numpy_only = ("segkit.evaluation.metrics", "segkit.evaluation.per_image", "segkit.evaluation.bootstrap")
        shared = ("segkit.errors", "segkit.files", "segkit.progress", "segkit.config")
        assert all(name.startswith(("segkit.report", *shared, *numpy_only)) for name in others), (path, others)


def test_config_knows_nothing_of_segkit_but_errors():
    for path in (PACKAGE / "config").rglob("*.py"):
        assert segkit_parts(path) <= {"config", "errors"}, path


@pytest.mark.parametrize(
    "module", ["segkit", "segkit.config.compose", "segkit.cli", "segkit.launch", "segkit.run.splits"]
)
def test_start_up_is_light(module):
    code = f"import sys, {module}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_only_one_file_knows_albumentations():
    users = {path.name for path in FILES if any(name.startswith("albumentations") for name in imported(path))}
    assert users == {"augment.py"}


MODEL_LIBRARIES = {"segmentation_models_pytorch", "timm"}
WAITS_NOT_FOR = {
    "++model.arch=0": HEAVY,
    "loss.tua=1": HEAVY,
    "optimizer.lr=1e-4f": HEAVY,
    "model.encoder=[1]": HEAVY,
    "optimizer.lr=-1": HEAVY,
    "optimizer.betas=[1,2]": HEAVY,
    "loss.scale=log": HEAVY,
    "model=coplenet model.norm=layer": HEAVY,
    "device=gpu": HEAVY,
    "model.encoder_weights=/dev/null/nowhere": HEAVY,
    "model=coplenet model.weights=/dev/null/nowhere": HEAVY,
    "init_from=/dev/null/nowhere": HEAVY,
    "model.mean=[1,2]": HEAVY,
    "model=smp model.std=[]": HEAVY,
    "model=smp": HEAVY - {"cv2"},  # whose weights are nowhere, as set below; readers of images want cv2
    "loss.tau=-1": {"torch._dynamo", "albumentations", *MODEL_LIBRARIES},
    "optimizer.eps=0": {"torch._dynamo", *MODEL_LIBRARIES},
}
"""Overrides with a mistake -> modules that need not be imported to find it; ever fewer, as they are tried in turn."""
TRY = """
import json, pathlib, sys
from segkit.config.compose import compose
from segkit.errors import InputError
from segkit.guard import sentences
from segkit.run.splits import check_hub, open_phases
def run(overrides):
    config = compose([*overrides.split(), "cache_dir=" + sys.argv[2]])
    splits = open_phases(config)
    check_hub(config)
    from segkit.run import pipeline
    pipeline.run(config, pathlib.Path(sys.argv[2], "run"), splits)
for overrides in json.loads(sys.argv[1]):
    try:
        with sentences():
            run(overrides)
    except InputError as error:
        print(json.dumps(sorted(sys.modules)))
"""


def test_a_mistake_waits_for_no_import_that_it_does_not_need(tmp_path):
    command = [sys.executable, "-c", TRY, json.dumps(list(WAITS_NOT_FOR)), str(tmp_path)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=offline)
    loaded = [set(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(loaded) == len(WAITS_NOT_FOR)
    for (override, not_needed), modules in zip(WAITS_NOT_FOR.items(), loaded, strict=True):
        assert not not_needed & modules, override


def test_checkpoints_are_never_unpickled():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {item.arg: ast.unparse(item.value) for item in node.keywords}
                assert keywords.get("weights_only") == "True", path


def test_lines_are_shown_through_one_function():
    """A bare print is for text that is escaped already: the pages of help, tables and JSON."""
    allowed = {"usage()", "__version__", "self.table()", "as_text(content)", "screen(comparison.table)"}
    allowed |= {"table(rows, summary)", "class_table(results)", "json.dumps(without_nan(findings), indent=2)"}
    allowed |= {"screen_table(head, rows, left=['encoder', 'ImageNet weights'], width=120)"}
    printed = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                printed.add(ast.unparse(node.args[0]))
    assert printed - {"for_terminal(text)"} == allowed
