"""Lets the tests of this folder import what they share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def small():
    """The configuration of a small run on a folder of one's own."""
    from label_files import SMALL

    from segkit.config.compose import compose

    return compose(SMALL)
