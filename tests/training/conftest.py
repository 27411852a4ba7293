"""Lets the tests of this folder import what they share."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from segkit.training.sinks import TensorBoard

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def event_files_are_closed(monkeypatch):
    """A thread of TensorBoard would write half a minute later, into a folder that is gone."""
    opened, begin = [], TensorBoard.__init__

    def noted(sink, *arguments, **options):
        begin(sink, *arguments, **options)
        opened.append(sink)

    monkeypatch.setattr(TensorBoard, "__init__", noted)
    yield
    for sink in opened:
        with contextlib.suppress(OSError):
            sink.close()
