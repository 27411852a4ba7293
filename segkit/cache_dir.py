"""Where label counts, margins and finished phases are kept between runs. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from segkit.config.schema import Config


def cache_dir_of(config: Config) -> Path:
    """``cache_dir`` of the configuration; else ``$SEGKIT_CACHE``, or ``~/.cache/segkit``."""
    if config.cache_dir:
        return Path(config.cache_dir)
    base = os.environ.get("SEGKIT_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "segkit"
