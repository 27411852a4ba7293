"""What is shown while a command works: lines, and the progress of long work, a bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TypeVar

T = TypeVar("T")

MOST_LETTERS = 2000
"""Letters of a sentence, or of a cell of a table, beyond which its middle is left out"""

PLAIN_INTERVAL = 5.0
"""Seconds between two lines where the output is not a terminal."""


def for_terminal(text: str) -> str:
    """Return ``text`` with everything that has no visible form (control characters, ANSI sequences, line breaks,
    marks of direction, lone surrogates) written as an escape such as ``\\x1b``.

    Square brackets stay: nothing is printed with rich's markup.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shortened(text: str) -> str:
    """Return ``text``, without its middle if it is endless, as the name in a file that is no list of names."""
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]} ... {text[-half:]}"


def show(text: str, *, error: bool = False) -> None:
    """Print ``text`` as one line, through :func:`for_terminal`; ``error``: on the standard error."""
    print(for_terminal(text), file=sys.stderr if error else sys.stdout, flush=True)


class _Unread:
    """The text ``stream``, which loses what is written once nobody reads it, as of a terminal that was closed.

    ``needed``: another error, as of a full disk, is raised, and not lost as well.
    """

    def __init__(self, stream: TextIOWrapper, *, needed: bool) -> None:
        stream.reconfigure(errors="backslashreplace")
        self._stream, self._needed = stream, needed and not stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._needed and not isinstance(error, BrokenPipeError):
                self._needed = False  # it is said once
                error.filename = "the standard output"
                raise

    def write(self, text: str) -> int:
        with self._lost():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lost():
            self._stream.flush()


def need_no_reader() -> None:
    """Let the work go on when what reads its output has ended (``| head``); escape letters that a terminal lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the shell has closed it: no file may take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            setattr(sys, name, _Unread(stream, needed=name == "stdout"))


def is_terminal() -> bool:
    """True if a moving bar can be drawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def track(iterable: Iterable[T], *, description: str, total: int | None = None, unit: str = "items") -> Iterator[T]:
    """Yield the items of ``iterable`` and show how many are done, at what rate, and how long it will take.

    ``total`` is taken from ``len(iterable)`` where that is known.
    """
    if total is None and isinstance(iterable, Sized):
        with suppress(TypeError):  # the length of some iterables is known only at their end
            total = len(iterable)
    if is_terminal():
        yield from _bar(iterable, description, total)
    else:
        yield from _lines(iterable, description, total, unit)


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(iterable, total=total, description=escape(for_terminal(description)))


def _lines(iterable: Iterable[T], description: str, total: int | None, unit: str) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL:
            last = now
            rate = done / (now - start)
            of = f"/{total}" if total is not None else ""
            left = f", {(total - done) / rate:.0f} s left" if total is not None else ""
            show(f"{description}: {done}{of} {unit}, {rate:.1f}/s{left}", error=True)
