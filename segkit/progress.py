"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

PLAIN_INTERVAL = 5.0
"""Seconds between two lines where the output is not a terminal."""


def is_terminal() -> bool:
    """True if a moving bar can be drawn."""
    return sys.stderr.isatty()


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
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)


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
            print(f"{description}: {done}{of} {unit}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)
