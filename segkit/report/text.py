"""A user's text (names of classes, runs, data sets) made safe for a terminal, Markdown, LaTeX, CSV and matplotlib.

Every table of segkit passes its names through these functions. HTML needs none: the templates of the page escape
whatever they are given.
"""

from __future__ import annotations

from segkit.progress import for_terminal

MARKDOWN = {letter: "\\" + letter for letter in "\\`*_[]|~$#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {letter: "\\" + letter for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after \\ and \midrule, a bare bracket or star would be read as an option of theirs
    "]": "{]}",
    "*": "{*}",
    "τ": r"$\tau$",
    "υ": r"$\upsilon$",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What the cells that a spreadsheet runs as a formula begin with."""


def for_markdown(text: str) -> str:
    """Return ``text`` as Markdown that shows it as it is written, on one line, also in a cell of a table."""
    return "".join(MARKDOWN.get(letter, letter) for letter in for_terminal(text))


def for_latex(text: str) -> str:
    """Return ``text`` with the letters that LaTeX reads as commands written out, on one line."""
    return "".join(LATEX.get(letter, letter) for letter in for_terminal(text))


def for_csv(text: str) -> str:
    """Return ``text`` on one line, with an apostrophe before it where a spreadsheet would take it for a formula."""
    return ("'" if text.startswith(FORMULA) else "") + for_terminal(text)


def for_matplotlib(text: str) -> str:
    """Return ``text`` with its dollar signs escaped, so that matplotlib draws them and no formula."""
    return for_terminal(text).replace("$", r"\$")
