"""Dockerfile and devcontainer are built nowhere here: they are read, and their steps compared with the Makefile's."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in order, with their arguments in one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


def check_python(image: str) -> None:
    """The image has a Python that the package takes."""
    found = re.search(r"python:(\d+)\.(\d+)(-slim)?$", image)
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert found
    assert least
    assert (int(found[1]), int(found[2])) >= (int(least[1]), int(least[2]))


def check_make(command: str) -> None:
    """A target of the Makefile, and one that installs all that there is to install."""
    program, *targets = shlex.split(command)
    assert program == "make"
    for target in targets:
        assert re.search(rf"^{target}: \$\(STAMP\)", MAKEFILE, re.MULTILINE)
    extras = re.search(r"pip install --quiet --no-compile -e '\.\[([\w,]+)\]'", MAKEFILE)
    assert extras
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_dockerfile_does_what_make_setup_does():
    steps = instructions()
    assert steps[0][0] == "FROM"
    assert {name for name, _ in steps} == KNOWN
    check_python(steps[0][1])
    runs = [rest for name, rest in steps if name == "RUN"]
    makes = [rest for rest in runs if rest.startswith("make")]
    assert makes == ["make setup"]
    check_make(makes[0])
    order = [f"{name} {rest}" for name, rest in steps]
    assert order.index("RUN make setup") > order.index("COPY --chown=segkit . .")
    assert order.index("RUN make setup") > order.index("USER segkit")  # nothing is installed or run as root
    (packages,) = (rest.split("--no-install-recommends", 1)[1].split("&&")[0].split() for rest in runs if "apt" in rest)
    assert {"make"} <= set(packages) <= {"make", "git"}
    folder = next(rest for name, rest in steps if name == "WORKDIR")
    variables = dict(rest.split("=", 1) for name, rest in steps if name == "ENV")
    venv = re.search(r"^VENV := (\S+)$", MAKEFILE, re.MULTILINE)
    assert venv
    assert variables.pop("PATH") == f"{folder}/{venv[1]}/bin:$PATH"
    exported = dict(re.findall(r"^export (\w+) := (\S+)$", MAKEFILE, re.MULTILINE))
    assert variables == exported
    (entry,) = (json.loads(rest) for name, rest in steps if name == "ENTRYPOINT")
    assert entry[0] in PROJECT["scripts"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {venv[1], "outputs", ".git"} <= set(ignored)
    assert not {"segkit", "configs", "Makefile", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)


def test_the_devcontainer_does_what_make_setup_does():
    content = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    check_python(content["image"])
    check_make(content["postCreateCommand"])
    settings = content["customizations"]["vscode"]["settings"]
    assert settings == {"python.defaultInterpreterPath": "${containerWorkspaceFolder}/.venv/bin/python"}
    assert "VENV := .venv\n" in MAKEFILE
