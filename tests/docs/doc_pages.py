"""What the documentation shows: blocks of code, commands in them, and code in running text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"

SHELL = ("bash", "console", "sh", "shell")
COMMANDS = ("python", "python3", "segkit", "torchrun", "srun", "make", "pip", "tensorboard")
"""First words by which a command is known outside a block of shell commands."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<info>[^\n`]*)$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented one (language ``indented``)."""

    page: str
    line: int
    language: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The commands: lines, with those that end in a backslash put together."""
        joined = re.sub(r" *\\\n *", " ", self.text)
        return [line.strip() for line in joined.splitlines() if line.strip()]


def pages() -> dict[str, Path]:
    """Name to file of every page, README.md last."""
    found = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    for included in (
        "loss_table.md",
        "loss_bench.md",
        "study/registration.md",
    ):  # included; kept
        del found[included]
    return {**found, "README.md": README}


def blocks(name: str) -> list[Block]:
    """All blocks of page ``name``, in order."""
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None
    lines: list[str] = []
    indented: tuple[int, list[str]] | None = None
    previous = ""
    for number, line in enumerate(pages()[name].read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is not None:
            start, mark, info = opened
            if fence and fence["fence"].startswith(mark) and not fence["info"]:
                title = _TITLE.search(info)
                words = info.split()
                language = words[0] if words and "=" not in words[0] else ""
                text = "\n".join(lines)
                found.append(Block(name, start, language, title and title[1], text))
                opened, lines = None, []
            else:
                lines.append(line)
        elif fence:
            opened = (number, fence["fence"], fence["info"].strip())
        elif line.startswith("    ") and (indented or not previous.strip()):
            indented = indented or (number, [])
            indented[1].append(line[4:])
        if indented and not line.startswith("    "):
            found.append(Block(name, indented[0], "indented", None, "\n".join(indented[1])))
            indented = None
        previous = line
    assert opened is None, f"{name}: a fence is not closed"
    return found


def shell_commands(name: str) -> list[tuple[str, str]]:
    """(where, command) of every command in a block of page ``name``."""
    return [
        (block.where, command)
        for block in blocks(name)
        if block.language in SHELL or (block.language == "indented" and looks_like_command(block.text))
        for command in block.commands()
    ]


def looks_like_command(text: str) -> bool:
    """True if a line of ``text`` begins as a command does."""
    return any(line.split()[0] in COMMANDS for line in text.splitlines() if line.strip())


def inline_code(name: str) -> list[str]:
    """Code in running text, without that in blocks."""
    text = pages()[name].read_text(encoding="utf-8")
    text = re.sub(r"^( *)(```+|~~~+).*?^ *\2", "", text, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def words_of(command: str) -> list[str]:
    """The words of a command, without a comment behind it."""
    return shlex.split(command, comments=True)


def first_table_cells(name: str, heading: str | None = None) -> dict[str, list[str]]:
    """Key to the other cells, for the tables below ``heading`` of a page; a first cell may name several keys.

    Without a heading those before the first one of the second level.
    """
    text = pages()[name].read_text(encoding="utf-8")
    assert heading is None or f"## {heading}\n" in text, f"{name} has no heading {heading}"
    section = (text if heading is None else text.split(f"## {heading}\n", 1)[1]).split("\n## ", 1)[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith(("| `", "| [`"))]
    return {key: [cell.strip() for cell in rest] for first, *rest in rows for key in re.findall(r"`([^`]+)`", first)}
